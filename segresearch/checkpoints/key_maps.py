"""From the key names of the diffusers layout to those of the original one: where each parameter lies in a single file.

    model.diffusion_model.*    UNet: input_blocks, middle_block and output_blocks, numbered through all levels
    first_stage_model.*        VAE: decoder levels numbered from the finest; attention as 1×1 convolutions
    conditioner.embedders.0.transformer.*    CLIP text encoder, names as in transformers
    conditioner.embedders.1.model.*    OpenCLIP text encoder: q, k, v in one in_proj; text_projection transposed

A `Source` says which tensor it is, which third of it, and whether transposed.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import product

from segresearch.checkpoints.tensors import Source
from segresearch.models.network_configs import UNetConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_RESNET = {  # a module in the folder layout -> in the original layout
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "text_projection.weight": "text_projection", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final", "layer_norm": "ln_",
    "encoder.layers": "transformer.resblocks", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def _renamed(key: str, *tables: Mapping[str, str]) -> str:
    """`key` with the longest module that it begins with renamed by a table, and what follows it by the next table."""
    original = ""
    for names in tables:
        if module := max((name for name in names if key.startswith(f"{name}.")), key=len, default=""):
            original, key = f"{original}{names[module]}.", key[len(module) + 1 :]
    return original + key


def unet_map(config: UNetConfig, prefix: str = UNET) -> Callable[[str], Source]:
    """From a UNet key of the folder layout to the original one."""
    return unet_source(config.layers_per_block, config.up_block_types, prefix)


def unet_source(layers: Sequence[int], up_types: Sequence[str], prefix: str) -> Callable[[str], Source]:
    """As `unet_map`, by the layers of each level and the types of the up blocks; in the original layout blocks of all
    levels are numbered through."""
    names, down, up, kinds = dict(_UNET), 1, 0, ((0, "resnets"), (1, "attentions"))
    for level, count in enumerate(layers):
        for i, (k, kind) in product(range(count), kinds):
            names[f"down_blocks.{level}.{kind}.{i}"] = f"input_blocks.{down + i}.{k}"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down + count}.0.op"
        down += count + 1
    for level, count in enumerate(reversed(layers)):
        for i, (k, kind) in product(range(count + 1), kinds):
            names[f"up_blocks.{level}.{kind}.{i}"] = f"output_blocks.{up + i}.{k}"
        slot = 2 if up_types[level] == "CrossAttnUpBlock2D" else 1
        names[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{up + count}.{slot}"
        up += count + 1
    return lambda key: Source(prefix + _renamed(key, names, _RESNET))


def vae_map(levels: int, prefix: str = VAE) -> Callable[[str], Source]:
    """From a VAE key of the folder layout to the original one; there the decoder counts levels from the finest."""
    names = {}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        names |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        names |= {f"{half}.mid_block.attentions.0.{k}": f"{half}.mid.attn_1.{v}" for k, v in _VAE_ATTENTION.items()}
        for level in range(levels):
            block = f"{half}.{way}.{level if way == 'down' else levels - 1 - level}"
            names[f"{half}.{way}_blocks.{level}.resnets"] = f"{block}.block"
            names[f"{half}.{way}_blocks.{level}.{way}samplers.0"] = f"{block}.{way}sample"
    return lambda key: Source(prefix + _renamed(key, names).replace("conv_shortcut", "nin_shortcut"))


def clip_map(key: str, prefix: str = CLIP, model: str = "text_model.") -> Source:
    """From a key of transformers' CLIP text models, flattened or not, to the original one. model: what old files leave
    out before all but the projection."""
    key = key.removeprefix("text_model.")
    return Source(prefix + ("" if key.startswith("text_projection.") else model) + key)


def open_clip_map(key: str, prefix: str = OPEN_CLIP, keys: Container[str] = ()) -> Source:
    """From a key of transformers' CLIP text models to OpenCLIP's: q, k and v are thirds of in_proj. keys: of the file,
    which may hold the projection as a linear layer's weight, not transposed."""
    key = key.removeprefix("text_model.")
    if key == "text_projection.weight" and prefix + key in keys and prefix + "text_projection" not in keys:
        return Source(prefix + key)
    for name, original in _OPEN_CLIP.items():
        key = key.replace(name, original)
    if part := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
        return Source(f"{prefix}{part[1]}.attn.in_proj_{part[3]}", third="qkv".index(part[2]))
    return Source(prefix + key, transpose=key == "text_projection")
