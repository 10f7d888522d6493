"""The half of SDXL's UNet that its ControlNets copy: embeddings, down path and mid block, and the sizes of them.

x (rows, c, h, w) ─ conv_in (+ hint) ─ down_blocks ─ mid_block ─► mid (rows_out, ...)
                           └────────────────┴─► skips, one for each resnet and downsampling
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

from segresearch.errors import InputError
from segresearch.models.attention import Attend, Fork, TextKeys, Transformer, TransformerBlock
from segresearch.models.conditioning import Cond, Projection
from segresearch.models.layers import Downsample, Resnet

# What config.json may say besides the sizes: everything else is another architecture, refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": ("text_time",),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1, 1.0),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
}
CROSSED_MID, PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"


def refuse_unless(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """ValueError, naming key and value, for a key of `config` that has none of its values in `fixed`."""
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            hint = " (SDXL's has text_time)" if key == "addition_embed_type" else ""
            only = " or ".join(map(repr, dict.fromkeys(allowed)))
            raise InputError(f"{what} config: {key}={config[key]!r} is not supported, only {only}{hint}")


def counts(value: Any, n: int, name: str, what: str, least: int = 1) -> tuple[int, ...]:
    """`value`, or each of `n` values, as whole numbers from `least` up; else ValueError."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(values) != n or not all(isinstance(v, int) and v >= least for v in values):
        raise InputError(
            f"{what} config: {name}={value!r} must be an integer from {least} up"
            + (f", or one for each of {n} blocks" if n > 1 else "")
        )
    return values


def block_types(config: Mapping[str, Any], kind: str, default: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The block types of one half ("Down", "Up"). ValueError for one that SDXL does not have."""
    key, known = f"{kind.lower()}_block_types", (f"{kind}Block2D", f"CrossAttn{kind}Block2D")
    types = tuple(config.get(key, default))
    for name in types:
        if name not in known:
            raise InputError(f"{what} config: {key} has {name!r}, supported are {known}")
    return types


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoding half, in the terms of a diffusers config.json; the defaults are SDXL base."""

    in_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    mid_block_type: str = CROSSED_MID
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
    def sizes(config: Mapping[str, Any], what: str) -> dict[str, Any]:
        """The fields of this class in a config.json of a UNet or a ControlNet (`what`, for the messages).

        Raises ValueError, naming key and value, for anything that is not SDXL-shaped.
        """
        refuse_unless(config, _FIXED, what)
        if "addition_embed_type" not in config:
            raise InputError(
                f"{what} config: addition_embed_type is missing: not of SDXL, whose networks have text_time"
            )
        given = config.get("block_out_channels", EncoderConfig.block_out_channels)
        n = len(given) if isinstance(given, list | tuple) else 1

        def per_block(key: str, default: Any, name: str | None = None, least: int = 1) -> tuple[int, ...]:
            return counts(config.get(key, default), n, name or key, what, least)

        contexts = set(per_block("cross_attention_dim", EncoderConfig.cross_attention_dim))
        if len(contexts) > 1:
            raise InputError(f"{what} config: cross_attention_dim={config['cross_attention_dim']!r} must be one width")
        own = {f.name for f in fields(EncoderConfig)} - {"heads"}
        values: dict[str, Any] = {k: v for k, v in config.items() if k in own}
        for name in ("in_channels", "addition_time_embed_dim", "norm_num_groups"):
            counts(values.get(name, 1), 1, name, what)
        # a quirk of diffusers: `attention_head_dim` holds the number of heads unless num_attention_heads is given
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        return values | {
            "down_block_types": block_types(config, "Down", EncoderConfig.down_block_types, what),
            "block_out_channels": counts(given, n, "block_out_channels", what),
            "layers_per_block": per_block("layers_per_block", 2),
            "transformer_layers_per_block": per_block("transformer_layers_per_block", 1, least=0),
            "heads": per_block(heads, EncoderConfig.heads, f"{heads} (the number of heads)"),
            "cross_attention_dim": contexts.pop(),
        }

    @property
    def what(self) -> str:
        """How messages call a network of this config."""
        return "unet"

    def __post_init__(self) -> None:
        n = len(self.block_out_channels)
        if len(self.down_block_types) != n:
            raise InputError(
                f"{self.what} config: {n} block_out_channels and {len(self.down_block_types)} down_block_types must be "
                "as many"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise InputError(
                    f"{self.what} config: width {width} must be a multiple of its heads {heads} and of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if self.pooled_dim < 1:
            raise InputError(
                f"{self.what} config: projection_class_embeddings_input_dim="
                f"{self.projection_class_embeddings_input_dim} leaves no room for pooled text beside "
                f"6 × addition_time_embed_dim={self.addition_time_embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding: what the six size embeddings leave of the added embedding's input."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @property
    def downsampling(self) -> int:
        """Latent pixels per pixel of the lowest grid, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Channels of every skip of the down path, in order: conv_in, then each level's resnets and downsampling."""
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        levels = ((w,) * (self.layers_per_block[i] + (i < last)) for i, w in enumerate(widths))
        return (widths[0], *(w for level in levels for w in level))


def sinusoid(values: Float[Tensor, " n"], dim: int) -> Float[Tensor, "n dim"]:
    """cos and sin of the values at dim/2 frequencies from 1 down to 1/10000, cosines first (in fp32 at least)."""
    if dim % 2:
        raise InputError(f"sinusoid: the width must be even, not {dim}")
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


def transformer(c: EncoderConfig, level: int, name: str) -> Transformer:
    return Transformer(
        c.block_out_channels[level],
        c.heads[level],
        c.transformer_layers_per_block[level],
        c.cross_attention_dim,
        c.norm_num_groups,
        c.use_linear_projection,
        name=name,
    )


class DownBlock(nn.Module):
    def __init__(self, c: EncoderConfig, level: int):
        super().__init__()
        width, name = c.block_out_channels[level], f"down_blocks.{level}"
        before, emb = c.block_out_channels[max(level - 1, 0)], 4 * c.block_out_channels[0]
        layers = range(c.layers_per_block[level])
        self.resnets = nn.ModuleList(
            Resnet(width if i else before, width, c.norm_num_groups, c.norm_eps, emb) for i in layers
        )
        crossed = c.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = nn.ModuleList(transformer(c, level, f"{name}.attentions.{i}") for i in layers if crossed)
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, symmetric=True)])

    def forward(
        self, x: Tensor, emb: Tensor, text: TextKeys, attend: Attend, fork: Fork | None
    ) -> tuple[Tensor, list[Tensor]]:
        """x after the block, and the skips it leaves on the way."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, fork)
            if len(self.attentions):
                x = self.attentions[i](x, text, attend, fork)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (h, w) -> (⌈h/2⌉, ⌈w/2⌉)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet; the first resnet alone in ControlNets without attention there."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        width, emb, crossed = c.block_out_channels[-1], 4 * c.block_out_channels[0], c.mid_block_type == CROSSED_MID
        self.resnets = nn.ModuleList(
            Resnet(width, width, c.norm_num_groups, c.norm_eps, emb) for _ in range(1 + crossed)
        )
        self.attentions = nn.ModuleList([transformer(c, -1, "mid_block.attentions.0")] if crossed else [])

    def forward(self, x: Tensor, emb: Tensor, text: TextKeys, attend: Attend, fork: Fork | None) -> Tensor:
        x = self.resnets[0](x, emb, fork)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, text, attend, fork), emb, fork)
        return x


class Encoder(nn.Module):
    """conv_in to mid_block; UNet and ControlNet are this and what follows, so their keys agree."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c, widths = config, config.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], 4 * widths[0])
        self.add_embedding = Embedding(c.projection_class_embeddings_input_dim, 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(len(widths)))
        self.mid_block = MidBlock(c)

    @property
    def levels(self) -> list[Any]:
        """The down, mid and up blocks, in the order of a forward pass."""
        return [*self.down_blocks, self.mid_block]

    @property
    def transformer_blocks(self) -> list[TransformerBlock]:
        """All of them, in the order of a forward pass."""
        return [block for level in self.levels for stack in level.attentions for block in stack.transformer_blocks]

    def project(self, cond: Cond) -> Projection:
        """What a forward pass needs of `cond`: keys and values at every cross-attention, the embedding of sizes and
        pooled text. Neither depends on x or t. Raises ValueError if cond does not fit this network."""
        self.check_widths(cond)
        dtype, c = self.conv_in.weight.dtype, self.config
        context = cond.context.to(dtype)
        text = {block.attn2.name: block.attn2.keys_values(context) for block in self.transformer_blocks}
        sizes = sinusoid(cond.time_ids.flatten(), c.addition_time_embed_dim)
        sizes = rearrange(sizes, "(b six) c -> b (six c)", six=6)
        return Projection(self.add_embedding(torch.cat([cond.pooled.to(dtype), sizes.to(dtype)], dim=-1)), text)

    def projection(self, cond: Cond | Projection) -> Projection:
        """`cond` itself where it is a projection by this network, else made here."""
        return cond if isinstance(cond, Projection) else self.project(cond)

    def embed(self, t: Float[Tensor, " rows"], projection: Projection) -> Float[Tensor, "rows e"]:
        """One embedding of t, the sizes and the pooled text."""
        time = sinusoid(t, self.config.block_out_channels[0]).to(self.conv_in.weight.dtype)
        return self.time_embedding(time) + projection.added

    def encode(
        self, x: Tensor, emb: Tensor, text: TextKeys, attend: Attend, fork: Fork | None, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The mid block's output and the skips; a ControlNet's hint is added to the first."""
        x = self.conv_in(x.to(emb.dtype))
        if hint is not None:
            x = x + hint
        skips = [x]
        for down in self.down_blocks:
            x, left = down(x, emb, text, attend, fork)
            skips += left
        return self.mid_block(x, emb, text, attend, fork), skips

    def check(self, x: Tensor, cond: Cond | Projection) -> None:
        """ValueError unless x and cond fit this network and each other."""
        c = self.config
        if cond.rows != x.shape[0]:
            raise InputError(f"{c.what}: {x.shape[0]} rows of x but {cond.rows} rows of conditioning")
        if x.shape[1] != c.in_channels:
            raise InputError(f"{c.what}: x has {x.shape[1]} channels, this model takes {c.in_channels}")
        if isinstance(cond, Cond):
            self.check_widths(cond)

    def check_widths(self, cond: Cond) -> None:
        """ValueError unless cond is of the widths of this network."""
        c = self.config
        widths = (cond.context.shape[-1], cond.pooled.shape[-1])
        if widths != (c.cross_attention_dim, c.pooled_dim):
            raise InputError(
                f"{c.what}: conditioning is {widths[0]} wide (pooled {widths[1]}), this model takes "
                f"{c.cross_attention_dim} (pooled {c.pooled_dim}): encode prompts with this model's own text encoders"
            )
