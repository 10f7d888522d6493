"""Attention, transformer blocks, and the two arguments by which a caller sees or changes what they compute.

attend(q, k, v, site): every self- and cross-attention of the UNet. `sdpa` is the plain one.
wrap(call, h, site): every transformer block, feed-forward and the embedding of t. `plain` calls and nothing else.

A perturbation (SEG, TPG, ...) is another function in the same place; a recorder is a function that looks and calls
`sdpa`. There is no other way in, and nothing is ever set on a module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from segresearch.sampling.memory import NOTHING, Past

KINDS = ("embedding", "block", "self", "cross", "ff")  # of sites, in the order in which a forward pass meets them

EMBEDDING = "time_embedding"  # the site of that kind


class Site(NamedTuple):
    """One call inside the UNet that a caller may see or change.

    name: the module path, which is also the checkpoint key prefix, such as
        "mid_block.attentions.0.transformer_blocks.3.attn1".
    grid: (height, width) of the image that the tokens were flattened from, row by row.
    kind: "self" or "cross" (attention: `attend`), "block", "ff" or "embedding" (calls: `wrap`).

    The guided denoiser adds the others, for perturbations and recorders; the UNet itself leaves them out.
    branches: names of the branches that the rows belong to. The rows are as many equal parts as there are entries;
        an entry holds several names where branches are still equal.
    sigma: noise level of each row of a part. All calls of one evaluation hold the same tensor object.
    keys: of each row of a part, for random choices (`sampling.draws`).
    texts: at a cross-attention, keys and values of other conditionings, for perturbations that ask for them by name.
    past: what the perturbation remembers at this site, if it remembers anything.
    """

    name: str
    grid: tuple[int, int]
    kind: str = "self"
    branches: tuple[tuple[str, ...], ...] = ()
    sigma: Float[Tensor, " part_rows"] | None = None
    keys: Int[Tensor, " part_rows"] | None = None
    texts: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
    past: Past = NOTHING


Heads = Float[Tensor, "rows heads tokens dim"]
KeyHeads = Float[Tensor, "rows heads keys dim"]
TextKeys = Mapping[str, tuple[Tensor, Tensor]]  # keys and values of the text, by the name of the cross-attention
Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]  # (q, k, v, site) -> out, each Heads
Call = Callable[..., Tensor]  # h -> h; of a block (h, without=()) -> h
Wrap = Callable[[Call, Tensor, Site], Tensor]  # (call, h, site) -> h


def sdpa(q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
    """Plain attention, softmax(q kᵀ / √dim) v over the keys; the site is not used."""
    return F.scaled_dot_product_attention(q, k, v)


def plain(call: Call, h: Float[Tensor, "rows *shape"], site: Site) -> Float[Tensor, "rows_out *out"]:
    """The call itself; the site is not used."""
    return call(h)


@dataclass(frozen=True)
class Fork:
    """Where a forward pass splits into more rows.

    site: name of the site before which the rows are copied (of an attention q, k and v are still computed once).
    index: for each row after the fork, the row before it that it continues.

    Two rows that differ only by a perturbation are equal up to the first perturbed site and computed once up to
    there. The number of rows must grow: a tensor is known to come from before the fork by having fewer rows.
    """

    site: str
    index: Int[Tensor, " rows_out"]


def copied(tensor: Tensor, site: str, fork: Fork | None) -> Tensor:
    """`tensor` with its rows copied, where the pass forks at `site`."""
    return tensor if fork is None or fork.site != site else tensor[fork.index]  # (rows, ...) -> (rows_out, ...)


def follow(tensor: Tensor, x: Tensor, fork: Fork | None) -> Tensor:
    """`tensor` with the rows of x: itself where the counts agree, else copied along the fork."""
    if fork is None or tensor.shape[0] == x.shape[0]:
        return tensor
    return tensor[fork.index]  # (rows, ...) -> (rows_out, ...)


@dataclass(frozen=True)
class Part:
    """Some rows of a pass, which a call of a block is for.

    index: their numbers among the rows after the fork. attend, wrap: those of the pass, for these rows.
    """

    index: Int[Tensor, " part_rows"]
    attend: Attend
    wrap: Wrap

    def rows_of(self, tensor: Tensor, fork: Fork | None) -> Tensor:
        """These rows of a tensor from before the fork, or where there is none of any."""
        return tensor[self.index if fork is None else fork.index[self.index]]


class Context(NamedTuple):
    """What all blocks of one forward pass share.

    emb: embedding of the timestep, the sizes and the pooled text. text: keys and values of the text, by the name of the
    cross-attention. attend, wrap: what the caller handed in. fork: where the rows become more rows, if they do.
    """

    emb: Float[Tensor, "_rows e"]
    text: TextKeys
    attend: Attend = sdpa
    wrap: Wrap = plain
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
    """Self-attention, cross-attention to the text, feed-forward; each with a residual."""

    def __init__(self, channels: int, heads: int, context_channels: int, *, name: str):
        super().__init__()
        self.name = name
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, name=f"{name}.attn1")
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, name=f"{name}.attn2")
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self, x: Float[Tensor, "rows tokens c"], grid: tuple[int, int], context: Context
    ) -> Float[Tensor, "rows_out tokens c"]:
        x = copied(x, self.name, context.fork)  # rows -> rows_out
        return context.wrap(partial(self.layers, grid=grid, context=context), x, Site(self.name, grid, "block"))

    def layers(
        self,
        x: Float[Tensor, "rows tokens c"],
        grid: tuple[int, int],
        context: Context,
        without: Sequence[str] = (),
        part: Part | None = None,
    ) -> Float[Tensor, "rows_out tokens c"]:
        """The three layers in turn, but those in `without` ("attn1", "attn2", "ff"), whose residual is then nothing.

        part: the rows of the pass that x has, where it has some of them only.
        """
        _, text, attend, wrap, fork = context if part is None else context._replace(attend=part.attend, wrap=part.wrap)
        if "attn1" not in without:
            y = self.norm1(x)
            q, k, v = (self.attn1.split(to(y)) for to in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v))
            x, q, k, v = (copied(z, self.attn1.name, fork) for z in (x, q, k, v))  # rows -> rows_out
            x = x + self.attn1.merge(attend(q, k, v, Site(self.attn1.name, grid, "self")))
        if "attn2" not in without:
            q = self.attn2.split(self.attn2.to_q(self.norm2(x)))
            x, q = (copied(z, self.attn2.name, fork) for z in (x, q))
            k, v = text[self.attn2.name]
            k, v = (follow(z, x, fork) if part is None else part.rows_of(z, fork) for z in (k, v))
            x = x + self.attn2.merge(attend(q, k, v, Site(self.attn2.name, grid, "cross")))
        if "ff" not in without:
            x = copied(x, f"{self.name}.ff", fork)
            x = x + wrap(self.feed_forward, x, Site(f"{self.name}.ff", grid, "ff"))
        return x

    def feed_forward(self, x: Float[Tensor, "rows tokens c"]) -> Float[Tensor, "rows tokens c"]:
        """The feed-forward layer without its residual."""
        return self.ff(self.norm3(x))


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
