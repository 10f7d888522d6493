"""The SDXL UNet, written out. Module names are the key names of a diffusers checkpoint: it loads with no converter.

    x (rows, 4, h, w) ─ conv_in ─ down_blocks ─ mid_block ─ up_blocks ─ conv_out ─ eps (rows_out, 4, h, w)
                                       └────────── skips ──────┘
t and the pooled text with the sizes become one embedding that every resnet adds; the text enters by cross-attention;
self-attention is whatever `attend` does; `fork` turns the rows into more rows on the way (see attention.Fork).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.attention import Attend, Fork, TextKeys, follow, sdpa
from segresearch.models.conditioning import Cond, Projection
from segresearch.models.encoder import (
    CROSSED_MID,
    Encoder,
    EncoderConfig,
    block_types,
    counts,
    refuse_unless,
    transformer,
)
from segresearch.models.layers import Resnet, Upsample

# What only a UNet's config.json says besides the sizes (see encoder.py).
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": (CROSSED_MID,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """Sizes of an SDXL-shaped UNet, in the terms of a diffusers config.json; the defaults are SDXL base."""

    out_channels: int = 4
    sample_size: int = 128
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "UNetConfig":
        """From a diffusers `unet/config.json`.

        Raises ValueError, naming key and value, for anything that is not an SDXL-shaped UNet.
        """
        values = EncoderConfig.sizes(config, "unet")
        refuse_unless(config, _FIXED, "unet")
        own = {name: config[name] for name in ("out_channels", "sample_size") if name in config}
        for name, value in own.items():
            counts(value, 1, name, "unet")
        return UNetConfig(**values, **own, up_block_types=block_types(config, "Up", UNetConfig.up_block_types, "unet"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.up_block_types) != len(self.block_out_channels):
            raise InputError(
                f"unet config: {len(self.block_out_channels)} block_out_channels and {len(self.up_block_types)} "
                "up_block_types must be as many"
            )


@dataclass(frozen=True)
class Control:
    """Residuals of a ControlNet: one for every skip of the down path, in order, and one for the mid block's output."""

    down: tuple[Float[Tensor, "rows _c _h _w"], ...]
    mid: Float[Tensor, "rows _c _h _w"]


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
        self.attentions = nn.ModuleList(transformer(c, level, f"{name}.attentions.{i}") for i in layers if crossed)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(width)])

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, text: TextKeys, attend: Attend, fork: Fork | None
    ) -> Tensor:
        """x after the block; takes its skips off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, follow(skips.pop(), x, fork)], dim=1)  # c -> c + skip
            x = resnet(x, emb, fork)
            if len(self.attentions):
                x = self.attentions[i](x, text, attend, fork)
        for upsample in self.upsamplers:
            x = upsample(x, size=tuple(skips[-1].shape[-2:]))  # to the grid of the next skip, odd sizes included
        return x


class UNet(Encoder):
    """SDXL's UNet of any size; SDXL base is `UNet(UNetConfig())`."""

    config: UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c, widths = config, config.block_out_channels
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
        return {block.attn1.name: block.attn1.heads for block in self.transformer_blocks}

    @property
    def levels(self) -> list[Any]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def forward(
        self,
        x: Float[Tensor, "rows c h w"],
        t: Float[Tensor, " rows"],
        cond: Cond | Projection,
        attend: Attend = sdpa,
        control: Control | None = None,
        fork: Fork | None = None,
    ) -> Float[Tensor, "rows_out d h w"]:
        """The network's output (eps or v) for model input x at timestep t, in the network's dtype.

        cond may be what `project` made of one; attend replaces every self-attention; control is added to the skips and
        the mid block; with a fork, rows_out is len(fork.index), else rows. Raises ValueError if cond does not fit x or
        the fork's site does not exist.
        """
        self._check(x, cond, control, fork)
        projection = self.projection(cond)
        emb, text = self.embed(t, projection), projection.text
        x, skips = self.encode(x, emb, text, attend, fork)
        if control is not None:
            x = x + follow(control.mid.to(x.dtype), x, fork)
            skips = [s + follow(r.to(s.dtype), s, fork) for s, r in zip(skips, control.down, strict=True)]
        for up in self.up_blocks:
            x = up(x, skips, emb, text, attend, fork)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _check(self, x: Tensor, cond: Cond | Projection, control: Control | None, fork: Fork | None) -> None:
        self.check(x, cond)
        if control is not None:
            widths, given = self.config.skip_widths, tuple(r.shape[1] for r in control.down)
            if given != widths or control.mid.shape[1] != widths[-1]:
                raise InputError(
                    f"unet: control has residuals {given} and {control.mid.shape[1]} wide, this model has skips "
                    f"{widths} and {widths[-1]} wide: the ControlNet belongs to another model"
                )
            if {r.shape[0] for r in (*control.down, control.mid)} != {x.shape[0]}:
                raise InputError(f"unet: {x.shape[0]} rows of x but {control.mid.shape[0]} rows of control")
        if fork is not None:
            if fork.site not in self.site_heads:
                raise InputError(f"unet: fork at unknown site {fork.site!r}; sites are {', '.join(self.sites)}")
            if fork.index.shape[0] <= x.shape[0]:
                raise InputError(f"unet: a fork must add rows, not turn {x.shape[0]} into {fork.index.shape[0]}")
