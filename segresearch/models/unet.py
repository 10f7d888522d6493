"""The UNet of the Stable Diffusion families. Module names are the key names of a diffusers checkpoint: it loads with
no converter.

    x (rows, 4, h, w) ─ conv_in ─ down_blocks ─ mid_block ─ up_blocks ─ conv_out ─ eps (rows_out, 4, h, w)
                                       └────────── skips ──────┘

The timestep, the pooled text and the image sizes become one embedding, which every resnet adds. The text enters by
cross-attention. Attention is the caller's `attend`, blocks go through the caller's `wrap` (see `attention`). At a
`fork` the rows become more rows. Which configs are accepted: `models.network_configs`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.attention import (
    EMBEDDING,
    Attend,
    Context,
    Fork,
    Part,
    Site,
    Transformer,
    TransformerBlock,
    Wrap,
    follow,
    plain,
    sdpa,
)  # fmt: skip
from segresearch.models.conditioning import Cond, Projection
from segresearch.models.layers import Downsample, Resnet, Upsample
from segresearch.models.network_configs import CROSSED_MID, EncoderConfig, UNetConfig

Skips = list[Tensor]  # (rows, c, h, w) each, in the order of the down path; rows_out from the fork on


@dataclass(frozen=True)
class ControlResiduals:
    """Output of a ControlNet: one residual for every skip of the down path, in order, and one for the mid block."""

    down: tuple[Float[Tensor, "rows _c _h _w"], ...]
    mid: Float[Tensor, "rows _c _h _w"]

    def each(self, change: Callable[[Tensor], Tensor]) -> "ControlResiduals":
        """Every residual changed by one function."""
        return ControlResiduals(tuple(map(change, self.down)), change(self.mid))

    def __add__(self, other: "ControlResiduals") -> "ControlResiduals":
        return ControlResiduals(tuple(a + b for a, b in zip(self.down, other.down, strict=True)), self.mid + other.mid)


def sinusoid(values: Float[Tensor, " n"], dim: int) -> Float[Tensor, "n dim"]:
    """cos and sin of the values at dim/2 frequencies from 1 down to 1/10000, cosines first, in fp32 at least."""
    if dim % 2:
        raise InputError(f"sinusoid: the width must be even, not {dim}")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    steps = torch.arange(dim // 2, dtype=values.dtype, device=values.device)
    angles = values[:, None] * torch.exp(-math.log(10000.0) * steps / (dim // 2))  # (n,) -> (n, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, linear (diffusers: TimestepEmbedding). `cond_proj`, which the caller applies: to the input, of a
    further embedding `cond_channels` wide."""

    def __init__(self, channels: int, out_channels: int, cond_channels: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(channels, out_channels)
        self.cond_proj = nn.Linear(cond_channels, channels, bias=False) if cond_channels else None
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Float[Tensor, "rows c"]) -> Float[Tensor, "rows d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


def resnet(c: EncoderConfig, channels: int, out_channels: int) -> Resnet:
    """A residual block of these widths that adds the embedding of t."""
    return Resnet(channels, out_channels, c.norm_num_groups, c.norm_eps, 4 * c.block_out_channels[0])


def transformer(c: EncoderConfig, level: int, depth: int | tuple[int, ...], layer: int, name: str) -> Transformer:
    """The transformer of one layer on a level of resolution; `name` is its place in the checkpoint."""
    own = depth[layer] if isinstance(depth, tuple) else depth
    width, heads = c.block_out_channels[level], c.heads[level]
    return Transformer(width, heads, own, c.cross_attention_dim, c.norm_num_groups, c.use_linear_projection, name=name)


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer where the level has them; then half the resolution."""

    def __init__(self, c: EncoderConfig, level: int):
        super().__init__()
        width, above = c.block_out_channels[level], c.block_out_channels[max(level - 1, 0)]
        layers, crossed = range(c.layers_per_block[level]), c.down_block_types[level] == "CrossAttnDownBlock2D"
        self.resnets = nn.ModuleList(resnet(c, width if i else above, width) for i in layers)
        depth = c.transformer_layers_per_block[level]
        self.attentions = nn.ModuleList(
            transformer(c, level, depth, i, f"down_blocks.{level}.attentions.{i}") for i in layers if crossed
        )
        lowest = level == len(c.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if lowest else [Downsample(width, symmetric=True)])

    def forward(
        self, x: Float[Tensor, "rows c h w"], context: Context
    ) -> tuple[Float[Tensor, "rows_out d h2 w2"], Skips]:
        """x after the block, and the skips that it leaves."""
        skips = []
        for i, block in enumerate(self.resnets):
            x = block(x, context.emb, context.fork)
            if len(self.attentions):
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (h, w) -> (⌈h/2⌉, ⌈w/2⌉)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet; the first resnet alone in networks without attention there (SSD-1B, Vega)."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        width, crossed = c.block_out_channels[-1], c.mid_block_type == CROSSED_MID
        self.resnets = nn.ModuleList(resnet(c, width, width) for _ in range(1 + crossed))
        depth, name = c.transformer_layers_per_block[-1], "mid_block.attentions.0"
        self.attentions = nn.ModuleList([transformer(c, -1, depth, 0, name)] if crossed else [])

    def forward(self, x: Float[Tensor, "rows c h w"], context: Context) -> Float[Tensor, "rows_out c h w"]:
        x = self.resnets[0](x, context.emb, context.fork)
        for attention, block in zip(self.attentions, self.resnets[1:], strict=True):
            x = block(attention(x, context), context.emb, context.fork)
        return x


class UpBlock(nn.Module):
    """Resnets, each on x and the next skip, each followed by a transformer where the level has them; then the
    resolution of the next skip."""

    def __init__(self, c: UNetConfig, index: int):
        super().__init__()
        n = len(c.block_out_channels)
        level = n - 1 - index
        width = c.block_out_channels[level]
        before = c.block_out_channels[min(level + 1, n - 1)]  # of x, from the block before
        above = c.block_out_channels[max(level - 1, 0)]  # of the last skip, which the level above left
        layers, crossed = range(c.layers_per_block[level] + 1), c.up_block_types[index] == "CrossAttnUpBlock2D"
        self.resnets = nn.ModuleList(
            resnet(c, (width if i else before) + (above if i == layers[-1] else width), width) for i in layers
        )
        self.attentions = nn.ModuleList(
            transformer(c, level, c.up_depths[index], i, f"up_blocks.{index}.attentions.{i}")
            for i in layers
            if crossed
        )
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(width)])

    def forward(
        self, x: Float[Tensor, "rows c h w"], skips: Skips, context: Context
    ) -> Float[Tensor, "rows_out d h2 w2"]:
        """x after the block, which takes its skips off the end of the list."""
        for i, block in enumerate(self.resnets):
            x = torch.cat([x, follow(skips.pop(), x, context.fork)], dim=1)  # c -> c + skip
            x = block(x, context.emb, context.fork)
            if len(self.attentions):
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size=tuple(skips[-1].shape[-2:]))  # (h, w) -> those of the next skip, odd ones included
        return x


class Encoder(nn.Module):
    """conv_in to mid_block, the half that ControlNets copy: UNet and ControlNet are this and what follows."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c, widths = config, config.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0], c.time_cond_proj_dim)
        added = c.projection_class_embeddings_input_dim
        self.add_embedding = Embedding(added, 4 * widths[0]) if added else None
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(len(widths)))
        self.mid_block = None if c.mid_block_type is None else MidBlock(c)  # KOALA-700M has none

    @property
    def blocks(self) -> list[Any]:
        """The down, mid and up blocks, in the order of a forward pass."""
        return [*self.down_blocks, *filter(None, [self.mid_block])]

    @property
    def transformer_blocks(self) -> list[TransformerBlock]:
        """All transformer blocks, in the order of a forward pass."""
        return [block for part in self.blocks for stack in part.attentions for block in stack.transformer_blocks]

    def project(self, cond: Cond) -> Projection:
        """What does not depend on x or t: keys and values at every cross-attention, the embedding of sizes and pooled
        text. Raises InputError if cond does not fit this network."""
        dtype, c = self.conv_in.weight.dtype, self.config
        widths = tuple(z.shape[-1] for z in (cond.context, cond.pooled, cond.time_ids))
        if widths != (c.cross_attention_dim, c.pooled_dim, c.size_ids):
            given, taken = (
                f"{width} wide (pooled {pooled}, {ids} sizes)"
                for width, pooled, ids in (widths, (c.cross_attention_dim, c.pooled_dim, c.size_ids))
            )
            raise InputError(
                f"{c.network}: conditioning is {given}, this model takes {taken}: "
                "encode prompts with this model's own text encoders"
            )
        text = cond.context.to(dtype)
        keys_values = {block.attn2.name: block.attn2.keys_values(text) for block in self.transformer_blocks}
        added = None
        if self.add_embedding is not None:
            sizes = sinusoid(cond.time_ids.flatten(), c.addition_time_embed_dim)
            sizes = rearrange(sizes, "(b ids) c -> b (ids c)", ids=c.size_ids)
            added = self.add_embedding(torch.cat([cond.pooled.to(dtype), sizes.to(dtype)], dim=-1))
        return Projection(added, keys_values, self.embed_guidance(cond))

    def embed_guidance(self, cond: Cond) -> Float[Tensor, "rows c"] | None:
        """What the embedding of the guidance weight adds to that of t, in a network that has one (LCM).

        w − 1, times 1000, at frequencies as of `sinusoid` but down to 1/10000 itself and sines first (diffusers'
        get_guidance_scale_embedding). InputError where cond has no weight, or has one that a UNet does not read.
        """
        c, projection = self.config, self.time_embedding.cond_proj
        if projection is None:
            if cond.guidance is not None and c.network == "unet":
                raise InputError("unet: cond.guidance is set, but this model embeds no guidance weight (LCM's do)")
            return None
        if cond.guidance is None:
            raise InputError("unet: this model embeds the guidance weight (LCM): cond.guidance must be set")
        half = projection.in_features // 2
        w = (cond.guidance.to(torch.promote_types(cond.guidance.dtype, torch.float32)) - 1) * 1000
        steps = torch.arange(half, dtype=w.dtype, device=w.device)
        angles = w[:, None] * torch.exp(-math.log(10000.0) * steps / (half - 1))  # (rows,) -> (rows, half)
        return projection(torch.cat([angles.sin(), angles.cos()], dim=-1).to(projection.weight.dtype))

    def context(
        self, t: Float[Tensor, " rows"], cond: Cond | Projection,
        attend: Attend = sdpa, wrap: Wrap = plain, fork: Fork | None = None,
    ) -> Context:  # fmt: skip
        """What the blocks of one forward pass share. cond may be a projection by this network."""
        projection = cond if isinstance(cond, Projection) else self.project(cond)
        embed = partial(self.embed_time, guidance=projection.guidance)
        time = wrap(embed, t, Site(EMBEDDING, (1, 1), "embedding"))
        return Context(
            time if projection.added is None else time + projection.added, projection.text, attend, wrap, fork
        )

    def embed_time(
        self, t: Float[Tensor, " rows"], guidance: Float[Tensor, "_rows c"] | None = None, part: Part | None = None
    ) -> Float[Tensor, "rows e"]:
        """The embedding of the timestep alone, and of the guidance weight where the network has one.

        part: the rows of the pass that t has, where it has some of them only.
        """
        sines = sinusoid(t, self.config.block_out_channels[0]).to(self.conv_in.weight.dtype)
        if guidance is not None:
            sines = sines + (guidance if part is None else part.rows_of(guidance, None))
        return self.time_embedding(sines)

    def encode(
        self, x: Float[Tensor, "rows c h w"], context: Context, hint: Float[Tensor, "hint_rows d h w"] | None = None
    ) -> tuple[Float[Tensor, "rows_out e h2 w2"], Skips]:
        """The mid block's output and the skips. A ControlNet's hint is added to the first skip."""
        x = self.conv_in(x.to(context.emb.dtype))
        if hint is not None:
            x = x + hint
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, context)
            skips += more
        return x if self.mid_block is None else self.mid_block(x, context), skips

    def check(self, x: Float[Tensor, "rows c h w"], cond: Cond | Projection) -> None:
        """InputError unless x fits this network and has the rows of cond."""
        c = self.config
        if cond.rows != x.shape[0]:
            raise InputError(f"{c.network}: {x.shape[0]} rows of x but {cond.rows} rows of conditioning")
        if x.shape[1] != c.in_channels:
            raise InputError(f"{c.network}: x has {x.shape[1]} channels, this model takes {c.in_channels}")


class UNet(Encoder):
    """A UNet of any size; SDXL base is `UNet(UNetConfig())`."""

    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c, widths = config, config.block_out_channels
        self.up_blocks = nn.ModuleList(UpBlock(c, index) for index in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    @property
    def blocks(self) -> list[Any]:
        return [*super().blocks, *self.up_blocks]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all self-attention sites, in the order of a forward pass."""
        return tuple(self.site_heads)

    @property
    def site_heads(self) -> dict[str, int]:
        """Number of heads at every self-attention site, in the order of a forward pass."""
        return {block.attn1.name: block.attn1.heads for block in self.transformer_blocks}

    @property
    def sites_by_kind(self) -> dict[str, dict[str, int]]:
        """Names of the sites of every kind (`attention.KINDS`), each in the order of a forward pass, with the number of
        heads (0 where there are none)."""
        blocks = self.transformer_blocks
        return {
            "embedding": {EMBEDDING: 0},
            "block": {block.name: 0 for block in blocks},
            "self": self.site_heads,
            "cross": {block.attn2.name: block.attn2.heads for block in blocks},
            "ff": {f"{block.name}.ff": 0 for block in blocks},
        }

    @property
    def all_sites(self) -> tuple[str, ...]:
        """Names of the sites of every kind, in the order of a forward pass."""
        time, *rest = self.sites_by_kind.values()
        return (*time, *(name for names in zip(*rest, strict=True) for name in names))

    def forward(
        self,
        x: Float[Tensor, "rows c h w"],
        t: Float[Tensor, " rows"],
        cond: Cond | Projection,
        attend: Attend = sdpa,
        wrap: Wrap = plain,
        residuals: ControlResiduals | None = None,
        fork: Fork | None = None,
    ) -> Float[Tensor, "rows_out d h w"]:
        """The network's output (eps or v) for model input x at timestep t, in the network's dtype.

        cond: the conditioning, or what `project` made of it. attend: every self- and cross-attention. wrap: every
        transformer block, feed-forward and the embedding of t. residuals: of ControlNets, added to the skips and the
        mid block's output. fork: rows_out is then len(fork.index), else rows.
        Raises InputError if cond or residuals do not fit x, or the fork's site does not exist.
        """
        self.check(x, cond)
        if residuals is not None:
            self.check_residuals(x, residuals)
        if fork is not None:
            self.check_fork(x, fork)
        context = self.context(t, cond, attend, wrap, fork)
        x, skips = self.encode(x, context)
        if residuals is not None:
            x = x + follow(residuals.mid.to(x.dtype), x, fork)
            skips = [s + follow(r.to(s.dtype), s, fork) for s, r in zip(skips, residuals.down, strict=True)]
        for block in self.up_blocks:
            x = block(x, skips, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def check_residuals(self, x: Float[Tensor, "rows c h w"], residuals: ControlResiduals) -> None:
        """InputError unless the residuals are of a ControlNet of this UNet, with the rows of x."""
        skips, down, mid = self.config.skip_widths, tuple(r.shape[1] for r in residuals.down), residuals.mid.shape[1]
        if (*down, mid) != (*skips, skips[-1]):
            widths = f"residuals {down} and {mid} wide, this model has skips {skips} and {skips[-1]} wide"
            raise InputError(f"unet: control has {widths}: the ControlNet belongs to another model")
        if {r.shape[0] for r in (*residuals.down, residuals.mid)} != {x.shape[0]}:
            raise InputError(f"unet: {x.shape[0]} rows of x but {residuals.mid.shape[0]} rows of control")

    def check_fork(self, x: Float[Tensor, "rows c h w"], fork: Fork) -> None:
        """InputError unless the fork is at a site of this UNet and adds rows."""
        sites = self.all_sites[1:]  # not at the embedding of t: x itself must have the rows then
        if fork.site not in sites:
            raise InputError(f"unet: fork at unknown site {fork.site!r}; sites are {', '.join(sites)}")
        if fork.index.shape[0] <= x.shape[0]:
            raise InputError(f"unet: a fork must add rows, not turn {x.shape[0]} into {fork.index.shape[0]}")
