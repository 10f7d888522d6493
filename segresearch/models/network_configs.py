"""Sizes of SDXL's networks, in the terms of a diffusers config.json, and which of these configs are accepted.

A key that SDXL's code has and this code lacks is accepted only with the value that SDXL has (FIXED, FIXED_UNET,
FIXED_CONTROLNET): with another value the weights belong to another architecture, which is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from segresearch.errors import InputError

CROSSED_MID, PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

FIXED: dict[str, tuple[Any, ...]] = {
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
FIXED_UNET: dict[str, tuple[Any, ...]] = {
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
FIXED_CONTROLNET: dict[str, tuple[Any, ...]] = {
    "_class_name": ("ControlNetModel",),
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "encoder_hid_dim_type": (None,),
    "global_pool_conditions": (False,),
    "mid_block_type": (CROSSED_MID, PLAIN_MID),
    "num_control_type": (None,),  # of a union of ControlNets
}


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], network: str) -> None:
    """InputError, with key and value, for a key of `config` whose value is not among those in `fixed`."""
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            hint = " (SDXL's has text_time)" if key == "addition_embed_type" else ""
            only = " or ".join(map(repr, dict.fromkeys(allowed)))
            raise InputError(f"{network} config: {key}={config[key]!r} is not supported, only {only}{hint}")


def counts(value: Any, n: int, name: str, network: str, least: int = 1) -> tuple[int, ...]:
    """`value`, or each of its `n` values, as whole numbers from `least` up. InputError for anything else."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(values) != n or not all(isinstance(v, int) and v >= least for v in values):
        each = f", or one for each of {n} blocks" if n > 1 else ""
        raise InputError(f"{network} config: {name}={value!r} must be an integer from {least} up{each}")
    return values


def block_types(config: Mapping[str, Any], kind: str, default: tuple[str, ...], network: str) -> tuple[str, ...]:
    """The block types of one half ("Down", "Up"). InputError for a type that SDXL does not have."""
    key, known = f"{kind.lower()}_block_types", (f"{kind}Block2D", f"CrossAttn{kind}Block2D")
    types = tuple(config.get(key, default))
    for name in types:
        if name not in known:
            raise InputError(f"{network} config: {key} has {name!r}, supported are {known}")
    return types


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoding half, which UNet and ControlNet share; the defaults are SDXL base."""

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
    def sizes(config: Mapping[str, Any], network: str) -> dict[str, Any]:
        """The fields of this class in the config.json of a UNet or a ControlNet (`network`, for the messages).

        Raises InputError, with key and value, for anything that is not SDXL-shaped.
        """
        check_fixed(config, FIXED, network)
        if "addition_embed_type" not in config:
            raise InputError(
                f"{network} config: addition_embed_type is missing: not of SDXL, whose networks have text_time"
            )
        widths = config.get("block_out_channels", EncoderConfig.block_out_channels)
        n = len(widths) if isinstance(widths, list | tuple) else 1

        def per_block(key: str, default: Any, name: str | None = None, least: int = 1) -> tuple[int, ...]:
            return counts(config.get(key, default), n, name or key, network, least)

        contexts = set(per_block("cross_attention_dim", EncoderConfig.cross_attention_dim))
        if len(contexts) > 1:
            raise InputError(
                f"{network} config: cross_attention_dim={config['cross_attention_dim']!r} must be one width"
            )
        values = {f.name: config[f.name] for f in fields(EncoderConfig) if f.name in config and f.name != "heads"}
        for name in ("in_channels", "addition_time_embed_dim", "norm_num_groups"):
            counts(values.get(name, 1), 1, name, network)
        # diffusers keeps the number of heads under `attention_head_dim`, unless num_attention_heads is set
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        return values | {
            "down_block_types": block_types(config, "Down", EncoderConfig.down_block_types, network),
            "block_out_channels": counts(widths, n, "block_out_channels", network),
            "layers_per_block": per_block("layers_per_block", 2),
            "transformer_layers_per_block": per_block("transformer_layers_per_block", 1, least=0),
            "heads": per_block(heads, EncoderConfig.heads, f"{heads} (the number of heads)"),
            "cross_attention_dim": contexts.pop(),
        }

    @property
    def network(self) -> str:
        """The network's name in messages."""
        return "unet"

    def __post_init__(self) -> None:
        n = len(self.block_out_channels)
        if len(self.down_block_types) != n:
            raise InputError(
                f"{self.network} config: {n} block_out_channels and {len(self.down_block_types)} down_block_types must "
                "be as many"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise InputError(
                    f"{self.network} config: width {width} must be a multiple of its heads {heads} and of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if self.pooled_dim < 1:
            raise InputError(
                f"{self.network} config: projection_class_embeddings_input_dim="
                f"{self.projection_class_embeddings_input_dim} leaves no room for pooled text beside "
                f"6 × addition_time_embed_dim={self.addition_time_embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding: the added embedding's input without the six size embeddings."""
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


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """Sizes of an SDXL-shaped UNet; the defaults are SDXL base."""

    out_channels: int = 4
    sample_size: int = 128
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "UNetConfig":
        """From a diffusers `unet/config.json`. InputError, with key and value, for what is not an SDXL-shaped UNet."""
        values = EncoderConfig.sizes(config, "unet")
        check_fixed(config, FIXED_UNET, "unet")
        for name in ("out_channels", "sample_size"):
            if name in config:
                (values[name],) = counts(config[name], 1, name, "unet")
        return UNetConfig(**values, up_block_types=block_types(config, "Up", UNetConfig.up_block_types, "unet"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.up_block_types) != len(self.block_out_channels):
            raise InputError(
                f"unet config: {len(self.block_out_channels)} block_out_channels and {len(self.up_block_types)} "
                "up_block_types must be as many"
            )


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Sizes of an SDXL-shaped ControlNet; the defaults are SDXL's.

    conditioning_embedding_out_channels: widths of the image's embedding; between two of them it halves the image.
    """

    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "ControlNetConfig":
        """From the config.json of a diffusers ControlNetModel. InputError, with key and value, for another network."""
        check_fixed(config, FIXED_CONTROLNET, "controlnet")
        values = EncoderConfig.sizes(config, "controlnet")
        name = "conditioning_embedding_out_channels"
        widths = config.get(name, ControlNetConfig.conditioning_embedding_out_channels)
        n = len(widths) if isinstance(widths, list | tuple) and widths else 1
        values[name] = counts(widths, n, name, "controlnet")
        order = str(config.get("controlnet_conditioning_channel_order", "rgb"))
        return ControlNetConfig(**values, controlnet_conditioning_channel_order=order)

    @property
    def network(self) -> str:
        return "controlnet"

    @property
    def image_factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)
