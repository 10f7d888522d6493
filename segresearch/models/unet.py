"""The SDXL UNet, written out. Module names are the key names of a diffusers checkpoint: it loads with no converter.

    x (rows, 4, h, w) ─ conv_in ─ down_blocks ─ mid_block ─ up_blocks ─ conv_out ─ eps (rows_out, 4, h, w)
                                       └────────── skips ──────┘
t and the pooled text with the sizes become one embedding that every resnet adds; the text enters by cross-attention;
self-attention is whatever `attend` does; `fork` turns the rows into more rows on the way (see attention.Fork).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.models.attention import Attend, Fork, Transformer, follow, sdpa
from segresearch.models.blocks import Downsample, Resnet, Upsample
from segresearch.models.conditioning import Cond

# What config.json may say besides the sizes: everything else is another architecture, refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def _per_block(value: int | list | tuple, blocks: int, name: str, least: int = 1) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * blocks
    if len(values) != blocks or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(
            f"unet config: {name}={value!r} must be an integer from {least} up"
            + (f", or one for each of {blocks} blocks" if blocks > 1 else "")
        )
    return values


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of an SDXL-shaped UNet, in the terms of a diffusers config.json; the defaults are SDXL base."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 128
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "UNetConfig":
        """From a diffusers `unet/config.json`.

        Raises ValueError, naming key and value, for anything that is not an SDXL-shaped UNet.
        """
        for key, allowed in _FIXED.items():
            if key in config and config[key] not in allowed:
                hint = " (SDXL's UNet has text_time)" if key == "addition_embed_type" else ""
                raise ValueError(f"unet config: {key}={config[key]!r} is not supported, only {allowed[0]!r}{hint}")
        if "addition_embed_type" not in config:
            raise ValueError("unet config: addition_embed_type is missing: not an SDXL UNet (SDXL's has text_time)")
        types = {name: tuple(config[name]) for name in ("down_block_types", "up_block_types") if name in config}
        for kind, known in (
            ("down", ("DownBlock2D", "CrossAttnDownBlock2D")),
            ("up", ("UpBlock2D", "CrossAttnUpBlock2D")),
        ):
            for name in types.get(f"{kind}_block_types", ()):
                if name not in known:
                    raise ValueError(f"unet config: {kind}_block_types has {name!r}, supported are {known}")
        given = config.get("block_out_channels", UNetConfig.block_out_channels)
        n = len(given) if isinstance(given, list | tuple) else 1
        widths = _per_block(given, n, "block_out_channels")
        contexts = set(_per_block(config.get("cross_attention_dim", 2048), n, "cross_attention_dim"))
        if len(contexts) > 1:
            raise ValueError(f"unet config: cross_attention_dim={config['cross_attention_dim']!r} must be one width")
        if config.get("reverse_transformer_layers_per_block") is not None:
            raise ValueError("unet config: reverse_transformer_layers_per_block is not supported")
        # a quirk of diffusers: `attention_head_dim` holds the number of heads unless num_attention_heads is given
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", list(UNetConfig.heads))
        own = {f.name for f in fields(UNetConfig)} - {"heads", "layers_per_block", "transformer_layers_per_block"}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in own}
        values |= types | {"block_out_channels": widths, "cross_attention_dim": contexts.pop()}
        for name in ("in_channels", "out_channels", "sample_size", "addition_time_embed_dim", "norm_num_groups"):
            _per_block(values.get(name, 1), 1, name)
        return UNetConfig(
            **values,
            heads=_per_block(heads, n, "attention_head_dim (the number of heads)"),
            layers_per_block=_per_block(config.get("layers_per_block", 2), n, "layers_per_block"),
            transformer_layers_per_block=_per_block(
                config.get("transformer_layers_per_block", 1), n, "transformer_layers_per_block", least=0
            ),
        )

    def __post_init__(self) -> None:
        n = len(self.block_out_channels)
        if len(self.down_block_types) != n or len(self.up_block_types) != n:
            raise ValueError(
                f"unet config: {n} block_out_channels, {len(self.down_block_types)} down_block_types and "
                f"{len(self.up_block_types)} up_block_types must be as many"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise ValueError(
                    f"unet config: width {width} must be a multiple of its heads {heads} and of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if self.pooled_dim < 1:
            raise ValueError(
                f"unet config: projection_class_embeddings_input_dim={self.projection_class_embeddings_input_dim} "
                f"leaves no room for pooled text beside 6 × addition_time_embed_dim={self.addition_time_embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding: what the six size embeddings leave of the added embedding's input."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @property
    def downsampling(self) -> int:
        """Latent pixels per pixel of the lowest grid, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class Control:
    """Residuals of a ControlNet: one for every skip of the down path, in order, and one for the mid block's output."""

    down: tuple[Float[Tensor, "rows _c _h _w"], ...]
    mid: Float[Tensor, "rows _c _h _w"]


def sinusoid(values: Float[Tensor, " n"], dim: int) -> Float[Tensor, "n dim"]:
    """cos and sin of the values at dim/2 frequencies from 1 down to 1/10000, cosines first (in fp32 at least)."""
    if dim % 2:
        raise ValueError(f"sinusoid: the width must be even, not {dim}")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    steps = torch.arange(dim // 2, dtype=values.dtype, device=values.device)
    angles = values[:, None] * torch.exp(-math.log(10000.0) * steps / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, linear (diffusers: TimestepEmbedding)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Float[Tensor, "rows c"]) -> Float[Tensor, "rows d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class DownBlock(nn.Module):
    def __init__(self, c: UNetConfig, level: int):
        super().__init__()
        width, name = c.block_out_channels[level], f"down_blocks.{level}"
        before, emb = c.block_out_channels[max(level - 1, 0)], 4 * c.block_out_channels[0]
        layers = range(c.layers_per_block[level])
        self.resnets = nn.ModuleList(
            Resnet(width if i else before, width, c.norm_num_groups, c.norm_eps, emb) for i in layers
        )
        crossed = c.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = nn.ModuleList(_transformer(c, level, f"{name}.attentions.{i}") for i in layers if crossed)
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, symmetric=True)])

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, attend: Attend, fork: Fork | None
    ) -> tuple[Tensor, list[Tensor]]:
        """x after the block, and the skips it leaves on the way."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, fork)
            if len(self.attentions):
                x = self.attentions[i](x, context, attend, fork)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (h, w) -> (⌈h/2⌉, ⌈w/2⌉)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, c: UNetConfig):
        super().__init__()
        width, emb = c.block_out_channels[-1], 4 * c.block_out_channels[0]
        self.resnets = nn.ModuleList(Resnet(width, width, c.norm_num_groups, c.norm_eps, emb) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(c, -1, "mid_block.attentions.0")])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, attend: Attend, fork: Fork | None) -> Tensor:
        x = self.resnets[0](x, emb, fork)
        x = self.attentions[0](x, context, attend, fork)
        return self.resnets[1](x, emb, fork)


class UpBlock(nn.Module):
    def __init__(self, c: UNetConfig, index: int):
        super().__init__()
        n = len(c.block_out_channels)
        level, name, emb = n - 1 - index, f"up_blocks.{index}", 4 * c.block_out_channels[0]
        width = c.block_out_channels[level]
        before = c.block_out_channels[min(level + 1, n - 1)]
        below = c.block_out_channels[max(level - 1, 0)]  # width of the last skip, which the level above left
        layers = range(c.layers_per_block[level] + 1)
        self.resnets = nn.ModuleList(
            Resnet(
                (width if i else before) + (below if i == layers[-1] else width),
                width,
                c.norm_num_groups,
                c.norm_eps,
                emb,
            )
            for i in layers
        )
        crossed = c.up_block_types[index] == "CrossAttnUpBlock2D"
        self.attentions = nn.ModuleList(_transformer(c, level, f"{name}.attentions.{i}") for i in layers if crossed)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(width)])

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor, attend: Attend, fork: Fork | None
    ) -> Tensor:
        """x after the block; takes its skips off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, follow(skips.pop(), x, fork)], dim=1)  # c -> c + skip
            x = resnet(x, emb, fork)
            if len(self.attentions):
                x = self.attentions[i](x, context, attend, fork)
        for upsample in self.upsamplers:
            x = upsample(x, size=tuple(skips[-1].shape[-2:]))  # to the grid of the next skip, odd sizes included
        return x


def _transformer(c: UNetConfig, level: int, name: str) -> Transformer:
    return Transformer(
        c.block_out_channels[level],
        c.heads[level],
        c.transformer_layers_per_block[level],
        c.cross_attention_dim,
        c.norm_num_groups,
        c.use_linear_projection,
        name=name,
    )


class UNet(nn.Module):
    """SDXL's UNet of any size; SDXL base is `UNet(UNetConfig())`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c, widths = config, config.block_out_channels
        self.config = config
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(c.projection_class_embeddings_input_dim, 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(len(widths)))
        self.mid_block = MidBlock(c)
        self.up_blocks = nn.ModuleList(UpBlock(c, index) for index in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all self-attention sites, in the order in which a forward pass meets them."""
        return tuple(self.site_heads)

    @property
    def site_heads(self) -> dict[str, int]:
        """Number of heads at every self-attention site, in the order of a forward pass."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        attentions = (b.attn1 for block in blocks for a in block.attentions for b in a.transformer_blocks)
        return {attention.name: attention.heads for attention in attentions}

    def embed(self, t: Float[Tensor, " rows"], cond: Cond) -> Float[Tensor, "rows e"]:
        """One embedding of t, the sizes and the pooled text."""
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(sinusoid(t, self.config.block_out_channels[0]).to(dtype))
        sizes = sinusoid(cond.time_ids.flatten(), self.config.addition_time_embed_dim)
        sizes = rearrange(sizes, "(b six) c -> b (six c)", six=6)
        return emb + self.add_embedding(torch.cat([cond.pooled.to(dtype), sizes.to(dtype)], dim=-1))

    def forward(
        self,
        x: Float[Tensor, "rows c h w"],
        t: Float[Tensor, " rows"],
        cond: Cond,
        attend: Attend = sdpa,
        control: Control | None = None,
        fork: Fork | None = None,
    ) -> Float[Tensor, "rows_out d h w"]:
        """The network's output (eps or v) for model input x at timestep t, in the network's dtype.

        attend replaces every self-attention; control is added to the skips and the mid block; with a fork, rows_out is
        len(fork.index), else rows. Raises ValueError if cond does not fit x or the fork's site does not exist.
        """
        self._check(x, cond, control, fork)
        emb = self.embed(t, cond)
        context = cond.context.to(emb.dtype)
        x = self.conv_in(x.to(emb.dtype))
        skips = [x]
        for down in self.down_blocks:
            x, left = down(x, emb, context, attend, fork)
            skips += left
        x = self.mid_block(x, emb, context, attend, fork)
        if control is not None:
            x = x + follow(control.mid.to(x.dtype), x, fork)
            skips = [
                follow(s, r, fork) + follow(r.to(s.dtype), s, fork) for s, r in zip(skips, control.down, strict=True)
            ]
        for up in self.up_blocks:
            x = up(x, skips, emb, context, attend, fork)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _check(self, x: Tensor, cond: Cond, control: Control | None, fork: Fork | None) -> None:
        c = self.config
        if cond.rows != x.shape[0]:
            raise ValueError(f"unet: {x.shape[0]} rows of x but {cond.rows} rows of conditioning")
        if x.shape[1] != c.in_channels:
            raise ValueError(f"unet: x has {x.shape[1]} channels, this model takes {c.in_channels}")
        widths = (cond.context.shape[-1], cond.pooled.shape[-1])
        if widths != (c.cross_attention_dim, c.pooled_dim):
            raise ValueError(
                f"unet: conditioning is {widths[0]} wide (pooled {widths[1]}), this model takes "
                f"{c.cross_attention_dim} (pooled {c.pooled_dim}): encode prompts with this model's own text encoders"
            )
        if control is not None:
            skips = 1 + sum(c.layers_per_block) + len(c.block_out_channels) - 1
            if len(control.down) != skips:
                raise ValueError(f"unet: control has {len(control.down)} down residuals, this model has {skips} skips")
        if fork is not None:
            if fork.site not in self.site_heads:
                raise ValueError(f"unet: fork at unknown site {fork.site!r}; sites are {', '.join(self.sites)}")
            if fork.index.shape[0] <= x.shape[0]:
                raise ValueError(f"unet: a fork must add rows, not turn {x.shape[0]} into {fork.index.shape[0]}")
