"""Sizes of UNets and ControlNets, in the terms of a diffusers config.json, and which of these configs are accepted.

A key that diffusers' code has and this code lacks is accepted only with the value that the supported models have
(FIXED, FIXED_UNET, FIXED_CONTROLNET): with another value the weights belong to another architecture, which is refused
by name. A key that is missing has the value that diffusers gives it (MISSING), for old configs leave keys out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from segresearch.errors import InputError, shown

CROSSED_MID, PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

Allowed = Mapping[str, tuple[Any, ...]]
FIXED: Allowed = {
    "act_fn": ("silu",), "addition_embed_type": (None, "text_time"), "class_embed_type": (None,),
    "downsample_padding": (1,), "encoder_hid_dim": (None,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "mid_block_scale_factor": (1,), "mid_block_type": (CROSSED_MID, PLAIN_MID, None), "num_class_embeds": (None,),
    "only_cross_attention": (False,), "resnet_time_scale_shift": ("default",),
}  # fmt: skip
FIXED_UNET: Allowed = {
    "attention_type": ("default",), "center_input_sample": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "cross_attention_norm": (None,), "dual_cross_attention": (False,), "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False), "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,),
    "time_embedding_act_fn": (None,), "time_embedding_dim": (None,), "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}  # fmt: skip
FIXED_CONTROLNET: Allowed = {  # num_control_type: of a union of ControlNets
    "_class_name": ("ControlNetModel",), "conditioning_channels": (3,), "encoder_hid_dim_type": (None,),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"), "global_pool_conditions": (False,),
    "mid_block_type": (CROSSED_MID, PLAIN_MID), "num_control_type": (None,),
}  # fmt: skip
MISSING: Mapping[str, Any] = {
    "cross_attention_dim": 1280, "use_linear_projection": False,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "transformer_layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
MAY_BE_NULL = (
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "sample_size", "time_cond_proj_dim",
    "reverse_transformer_layers_per_block",
)  # fmt: skip
SAMPLE_SIZES = {True: 128, False: 64}  # of configs that say none, by whether image sizes are read (SDXL, SD 1.5)

OF_BLOCKS = (  # keys of the numbers of layers and of transformer blocks
    ("layers_per_block", "num_hidden_layers"),
    ("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
)  # fmt: skip
MOST_BLOCKS = 1024


def check_fixed(config: Mapping[str, Any], fixed: Allowed, network: str) -> None:
    """InputError, with key and value, for a key of `config` whose value is not among those in `fixed`."""
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            only = " or ".join(map(repr, allowed))
            raise InputError(f"{network} config: {key}={shown(config[key])} is not supported, only {only}")


def refuse_giant(config: Mapping[str, Any], network: str) -> None:
    """InputError for a config of more blocks than a network can have, before they are built one by one."""
    lists = [config.get(key) for key in ("block_out_channels", "down_block_types", "up_block_types")]
    levels = max([len(value) for value in lists if isinstance(value, list | tuple)], default=1)
    layers, depth = (max(largest(config.get(key)) for key in keys) for keys in OF_BLOCKS)
    if levels > 64 or (1 + layers) * (1 + depth) > MOST_BLOCKS:
        raise InputError(f"{network} config: {levels} levels of {layers} layers, {depth} deep, make no known network")


def largest(value: Any) -> float | int:
    """The largest number within nested lists, or the length of the longest; 0 for anything else."""
    if isinstance(value, list | tuple):
        return len(value) if len(value) > 64 else max([len(value), *map(largest, value)])
    return value if isinstance(value, int | float) and value > 0 else 0


def counts(value: Any, n: int, name: str, network: str, least: int = 1) -> tuple[int, ...]:
    """`value`, or each of its `n` values, as whole numbers from `least` up. InputError for anything else."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(values) != n or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
        each = f", or one for each of {n} blocks" if n > 1 else ""
        raise InputError(f"{network} config: {name}={shown(value)} must be an integer from {least} up{each}")
    return values


def depths(value: Any, n: int, name: str, network: str) -> tuple[int | tuple[int, ...], ...]:
    """The depth of the transformers in each of `n` blocks: a number, or one for each of its layers."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(values) != n:
        raise InputError(f"{network} config: {name}={shown(value)} must be an integer, or one for each of {n} blocks")
    return tuple(
        counts(v, len(v), name, network, least=0)
        if isinstance(v, list | tuple) and v
        else counts(v, 1, name, network, least=0)[0]
        for v in values
    )


def block_types(config: Mapping[str, Any], kind: str, network: str) -> tuple[str, ...]:
    """The block types of one half ("Down", "Up"). InputError for a type that is not supported."""
    key, known = f"{kind.lower()}_block_types", (f"{kind}Block2D", f"CrossAttn{kind}Block2D")
    types = config.get(key, MISSING[key])
    if not isinstance(types, list | tuple):
        raise InputError(f"{network} config: {key}={shown(types)} must be a list of block types")
    for name in types:
        if name not in known:
            raise InputError(f"{network} config: {key} has {shown(name)}, supported are {known}")
    return tuple(types)


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoding half, which UNet and ControlNet share; the defaults are SDXL base.

    transformer_layers_per_block: depth of the transformers of each level, or of each of its layers.
    addition_time_embed_dim, projection_class_embeddings_input_dim: 0 for networks that read no sizes and no pooled text
        (SD 1.5, 2.1).
    size_ids: numbers in the conditioning beside the text, 6 (5 in SDXL's refiner); no key of a config.json.
    time_cond_proj_dim: width of the embedded guidance weight (LCM).
    """

    network: ClassVar[str] = "unet"  # in messages
    in_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    mid_block_type: str | None = CROSSED_MID
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2)
    transformer_layers_per_block: tuple[int | tuple[int, ...], ...] = (1, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True
    time_cond_proj_dim: int | None = None
    size_ids: int = 6

    @classmethod
    def sizes(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this class in a config.json. InputError, with key and value, for what is not supported."""
        network = cls.network
        refuse_giant(config, network)
        check_fixed(config, FIXED, network)
        values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        values = {name: value for name, value in values.items() if value is not None or name not in MAY_BE_NULL}
        sized = config.get("addition_embed_type") == "text_time"
        added = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        if sized and (lacking := [name for name in added if name not in values]):
            raise InputError(f"{network} config: {lacking[0]} is missing, which addition_embed_type='text_time' needs")
        if not sized:
            values |= {**dict.fromkeys(added, 0), "size_ids": 0}
        names = ("in_channels", "out_channels", "sample_size", *(added if sized else ()), "norm_num_groups")
        for name in (*names, "time_cond_proj_dim"):
            if name in values:
                (values[name],) = counts(values[name], 1, name, network)
        get = {**MISSING, **values}.__getitem__
        widths = get("block_out_channels")
        n = len(widths) if isinstance(widths, list | tuple) else 1
        # diffusers keeps the number of heads under `attention_head_dim`, unless num_attention_heads is set
        heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        contexts = counts(get("cross_attention_dim"), n, "cross_attention_dim", network)
        if len(set(contexts)) > 1:
            raise InputError(f"{network} config: cross_attention_dim={list(contexts)} must be one width")
        return values | {
            "down_block_types": block_types(config, "Down", network),
            "block_out_channels": counts(widths, n, "block_out_channels", network),
            "layers_per_block": counts(get("layers_per_block"), n, "layers_per_block", network),
            "transformer_layers_per_block": depths(
                get("transformer_layers_per_block"), n, "transformer_layers_per_block", network
            ),
            "heads": counts(config.get(heads, 8), n, f"{heads} (the number of heads)", network),
            "cross_attention_dim": contexts[0],
            "use_linear_projection": bool(get("use_linear_projection")),
        }

    def __post_init__(self) -> None:
        n, types = len(self.block_out_channels), len(self.down_block_types)
        if types != n:
            raise InputError(f"{self.network} config: {n} block_out_channels and {types} down_block_types differ")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                factors = f"its heads {heads} and of norm_num_groups {self.norm_num_groups}"
                raise InputError(f"{self.network} config: width {width} must be a multiple of {factors}")
        layers = [count if "CrossAttn" in t else 0 for count, t in zip(self.layers_per_block, self.down_block_types)]
        self.check_depths("transformer_layers_per_block", self.transformer_layers_per_block, layers)
        if self.projection_class_embeddings_input_dim and self.pooled_dim < 1:
            raise InputError(
                f"{self.network} config: projection_class_embeddings_input_dim="
                f"{self.projection_class_embeddings_input_dim} leaves no room for pooled text beside "
                f"{self.size_ids} × addition_time_embed_dim={self.addition_time_embed_dim}"
            )

    def check_depths(self, name: str, depths: Sequence[int | tuple[int, ...]], layers: Sequence[int]) -> None:
        """InputError unless each block has one depth, or one for each of its layers with attention."""
        for depth, own in zip(depths, layers, strict=True):
            if isinstance(depth, tuple) and len(depth) < own:
                raise InputError(f"{self.network} config: {name} has {list(depth)} for a block of {own} layers")

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding: the added embedding's input without the embeddings of the sizes."""
        return self.projection_class_embeddings_input_dim - self.size_ids * self.addition_time_embed_dim

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Channels of every skip of the down path, in order: conv_in, then each level's resnets and downsampling."""
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        levels = ((w,) * (self.layers_per_block[i] + (i < last)) for i, w in enumerate(widths))
        return (widths[0], *(w for level in levels for w in level))


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """Sizes of a UNet; the defaults are SDXL base. reverse_transformer_layers_per_block: as
    transformer_layers_per_block, of the up blocks, from the lowest level on (None: the same as of the down blocks)."""

    out_channels: int = 4
    sample_size: int = 128
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "UNetConfig":
        """From a diffusers `unet/config.json`. InputError, with key and value, for what is not supported."""
        values, up = UNetConfig.sizes(config), "reverse_transformer_layers_per_block"
        check_fixed(config, FIXED_UNET, "unet")
        if up in values:
            values[up] = depths(values[up], len(values["block_out_channels"]), up, "unet")
        values = {"sample_size": SAMPLE_SIZES[values.get("size_ids") != 0]} | values
        return UNetConfig(**values | {"up_block_types": block_types(config, "Up", "unet")})

    def __post_init__(self) -> None:
        super().__post_init__()
        n, types = len(self.block_out_channels), len(self.up_block_types)
        if types != n:
            raise InputError(f"unet config: {n} block_out_channels and {types} up_block_types differ")
        name, ups = "reverse_transformer_layers_per_block", zip(self.layers_per_block[::-1], self.up_block_types)
        layers = [count + 1 if "CrossAttn" in kind else 0 for count, kind in ups]
        if self.reverse_transformer_layers_per_block is not None:
            self.check_depths(name, self.reverse_transformer_layers_per_block, layers)
        elif any(isinstance(depth, tuple) for depth in self.transformer_layers_per_block):
            raise InputError(f"unet config: {name} is missing, where transformer_layers_per_block has lists")

    @property
    def up_depths(self) -> tuple[int | tuple[int, ...], ...]:
        """Depth of the transformers of each up block, from the lowest level on."""
        return self.reverse_transformer_layers_per_block or self.transformer_layers_per_block[::-1]


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Sizes of a ControlNet; the defaults are SDXL's.

    conditioning_embedding_out_channels: widths of the image's embedding; between two of them it halves the image.
    """

    network: ClassVar[str] = "controlnet"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "ControlNetConfig":
        """From the config.json of a diffusers ControlNetModel. InputError, with key and value, for another network."""
        check_fixed(config, FIXED_CONTROLNET, "controlnet")
        values, name = ControlNetConfig.sizes(config), "conditioning_embedding_out_channels"
        widths = values.get(name, ControlNetConfig.conditioning_embedding_out_channels)
        n = len(widths) if isinstance(widths, list | tuple) and widths else 1
        return ControlNetConfig(**values | {name: counts(widths, n, name, "controlnet")})

    @property
    def image_factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)
