"""Attention as an argument.

Every self-attention call of the UNet goes through an `attend(q, k, v, site)` that the caller hands in; `sdpa` is the
plain one. This is the only way to see or change attention: a perturbation (SEG, PAG, ...) is another function in the
same place, a recorder is a function that looks and calls `sdpa`. Nothing is ever set on a module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class Site(NamedTuple):
    """One self-attention call.

    name: the module path, which is also the checkpoint key prefix, such as
        "mid_block.attentions.0.transformer_blocks.3.attn1".
    grid: (height, width) of the image that the tokens were flattened from, row by row.

    The guided denoiser adds two fields, for perturbations and recorders; the UNet itself leaves them out.
    branches: names of the branches that the rows belong to. The rows are as many equal blocks as there are entries;
        an entry holds several names where branches are still equal.
    sigma: noise level of each row of a block. All calls of one evaluation hold the same tensor object.
    """

    name: str
    grid: tuple[int, int]
    branches: tuple[tuple[str, ...], ...] = ()
    sigma: Float[Tensor, " block_rows"] | None = None


Heads = Float[Tensor, "rows heads tokens dim"]
KeyHeads = Float[Tensor, "rows heads keys dim"]
TextKeys = Mapping[str, tuple[Tensor, Tensor]]  # keys and values of the text, by the name of the cross-attention
Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]  # (q, k, v, site) -> out, each Heads


def sdpa(q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
    """Plain attention, softmax(q kᵀ / √dim) v over the keys; the site is not used."""
    return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Fork:
    """Where a forward pass splits into more rows.

    site: name of the self-attention before which the rows are copied (q, k and v of it are still computed once).
    index: for each row after the fork, the row before it that it continues.

    Two rows that differ only by a perturbation are equal up to the first perturbed site and computed once up to
    there. The number of rows must grow: a tensor is known to come from before the fork by having fewer rows.
    """

    site: str
    index: Int[Tensor, " rows_out"]


def follow(tensor: Tensor, x: Tensor, fork: Fork | None) -> Tensor:
    """`tensor` with the rows of x: itself where the counts agree, else copied along the fork."""
    if fork is None or tensor.shape[0] == x.shape[0]:
        return tensor
    return tensor[fork.index]  # (rows, ...) -> (rows_out, ...)


class Context(NamedTuple):
    """What all blocks of one forward pass share.

    emb: embedding of the timestep, the sizes and the pooled text. text: keys and values of the text, by the name of the
    cross-attention. attend: the self-attention. fork: where the rows become more rows, if they do.
    """

    emb: Float[Tensor, "_rows e"]
    text: TextKeys
    attend: Attend
    fork: Fork | None = None


class Attention(nn.Module):
    """Multi-head attention with the parameter names of diffusers (to_q, to_k, to_v, to_out.0)."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, *, name: str):
        super().__init__()
        self.heads, self.name = heads, name
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def split(self, z: Float[Tensor, "rows tokens c"]) -> Heads:
        """Channels split into heads, as views."""
        return rearrange(z, "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, context: Float[Tensor, "rows keys context_c"]) -> tuple[Tensor, Tensor]:
        """Keys and values of a text, (rows, heads, keys, dim) each."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def merge(self, out: Heads) -> Float[Tensor, "rows tokens c"]:
        """Heads side by side again, through the output projection."""
        return self.to_out[0](rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Float[Tensor, "rows tokens c"]) -> Float[Tensor, "rows tokens inner"]:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # index 1 is a dropout in the checkpoints' own code; the keys are net.0.proj and net.2
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Float[Tensor, "rows tokens c"]) -> Float[Tensor, "rows tokens c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention (the site), cross-attention to the text, feed-forward; each with a residual."""

    def __init__(self, channels: int, heads: int, context_channels: int, *, name: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, name=f"{name}.attn1")
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, name=f"{name}.attn2")
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self, x: Float[Tensor, "rows tokens c"], grid: tuple[int, int], context: Context
    ) -> Float[Tensor, "rows_out tokens c"]:
        (_, text, attend, fork), site = context, Site(self.attn1.name, grid)
        y = self.norm1(x)
        q, k, v = (self.attn1.split(to(y)) for to in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v))
        if fork is not None and fork.site == site.name:
            x, q, k, v = (z[fork.index] for z in (x, q, k, v))  # rows -> rows_out
        x = x + self.attn1.merge(attend(q, k, v, site))
        q = self.attn2.split(self.attn2.to_q(self.norm2(x)))
        k, v = (follow(z, x, fork) for z in text[self.attn2.name])
        x = x + self.attn2.merge(F.scaled_dot_product_attention(q, k, v))
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A stack of transformer blocks over an image, flattened row by row into tokens (diffusers: Transformer2DModel)."""

    def __init__(
        self, channels: int, heads: int, depth: int, context_channels: int, groups: int, linear: bool, *, name: str
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_channels, name=f"{name}.transformer_blocks.{i}")
            for i in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "rows c h w"], context: Context) -> Float[Tensor, "rows_out c h w"]:
        (h, w), y = x.shape[2:], self.norm(x)
        tokens, image = "b c h w -> b (h w) c", "b (h w) c -> b c h w"
        y = self.proj_in(rearrange(y, tokens)) if self.linear else rearrange(self.proj_in(y), tokens)
        for block in self.transformer_blocks:
            y = block(y, (h, w), context)
        y = rearrange(self.proj_out(y), image, h=h) if self.linear else self.proj_out(rearrange(y, image, h=h))
        return follow(x, y, context.fork) + y  # in this order: the sum has the memory layout of the residual
