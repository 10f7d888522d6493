"""A ControlNet as one .safetensors file, under diffusers' key names or the original ones, told by its keys and shapes.

    conv_in.*, down_blocks.*, controlnet_cond_embedding.*, controlnet_down_blocks.*      diffusers' names
    [control_model.]input_blocks.*, input_hint_block.*, zero_convs.*, middle_block_out.*      original names

A ControlNet is a copy of the encoding half of a UNet: what shapes cannot tell (heads, groups) is the UNet's.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from segresearch.checkpoints.key_maps import unet_map
from segresearch.checkpoints.other_files import other_kind
from segresearch.checkpoints.tensors import Entry, Source, Weights, open_file
from segresearch.errors import CheckpointError
from segresearch.models.network_configs import CROSSED_MID, PLAIN_MID, ControlNetConfig, EncoderConfig, UNetConfig

OTHERS = {  # a pattern of keys -> what the file is, though it reads an image as a ControlNet does
    r"^lora_controlnet$": "a Control-LoRA",
    r"enc_zero_convs|base_to_ctrl|ctrl_to_base|base_to_control|control_to_base": "a ControlNet-XS",
    r"^(down_blocks\.\d+\.)?difference$": "a difference of ControlNets, which needs the model that it was made from",
    r"motion_modules\.": "a SparseCtrl of AnimateDiff",
}
PREFIX = "control_model."

Shapes = Mapping[str, tuple[int, ...]]


def open_controlnet_file(path: Path, unet: EncoderConfig, config: ControlNetConfig | None = None) -> tuple[
    ControlNetConfig, Weights
]:  # fmt: skip
    """The sizes and the stored tensors of a ControlNet in one file. unet: of the model that it steers. config: from
    beside the file, if there is one. CheckpointError, with what the file is, for anything else."""
    entries, _ = open_file(path)
    refuse_other_file(entries, path)
    name = f"controlnet {path.name}"
    if not any("input_hint_block." in key for key in entries):
        shapes = {key: entry.shape for key, entry in entries.items()}
        with telling_sizes(path):
            config = config or ControlNetConfig(**encoder_sizes(unet) | sizes(shapes, unet))
        return config, Weights(name, entries)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in entries) else ""
    own = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    hints = sorted({int(key.split(".")[1]) for key in own if key.startswith("input_hint_block.")})
    with telling_sizes(path):
        config = ControlNetConfig(**encoder_sizes(unet) | original_sizes(own, hints, unet))
    return config, Weights(name, entries, original_map(config, hints, prefix))


@contextmanager
def telling_sizes(path: Path) -> Iterator[None]:
    """CheckpointError where a key that tells a size is missing, or has another form."""
    try:
        yield
    except (KeyError, IndexError) as error:
        problem = f"its sizes cannot be told, keys are missing ({error}): fetch it again"
        raise CheckpointError(f"controlnet {path}: {problem}") from error


def refuse_other_file(keys: Mapping[str, Any], path: Path) -> None:
    """CheckpointError for the keys of anything but a ControlNet, with what the file is."""
    text = "\n".join(sorted(keys))
    for pattern, kind in OTHERS.items():
        if re.search(pattern, text, re.MULTILINE):
            raise CheckpointError(f"controlnet {path} is {kind}, which is not supported: give a full ControlNet")
    if re.search(r"^controlnet_cond_embedding\.|input_hint_block\.", text, re.MULTILINE):
        return
    kind = (other_kind(keys) or "").partition(":")[0].replace(", not a checkpoint", "")
    if re.search(r"^(model\.diffusion_model|first_stage_model)\.", text, re.MULTILINE):
        kind = "a whole model"
    kind = kind or f"of an unknown layout (its first key is {min(keys)!r})"
    raise CheckpointError(f"controlnet {path} is {kind}: give a ControlNet, which reads an image")


def encoder_sizes(unet: EncoderConfig) -> dict[str, Any]:
    """What a ControlNet has in common with its UNet."""
    return {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}


def span(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many indices the pattern's group takes: 1 + the largest, 0 without a match."""
    return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, shapes) if m), default=-1)


def sizes(shapes: Shapes, unet: EncoderConfig) -> dict[str, Any]:
    """Fields of ControlNetConfig that shapes under diffusers' names tell."""
    levels = range(span(shapes, r"down_blocks\.(\d+)\."))
    widths = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
    depths = [span(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.") for i in levels]
    mid = span(shapes, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    texts = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
    projections = [len(shape) for key, shape in shapes.items() if key.endswith("proj_in.weight")]
    image = "controlnet_cond_embedding"
    steps = range(1, span(shapes, rf"{image}\.blocks\.(\d+)\."), 2)
    facts = {
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": tuple(span(shapes, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in levels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "mid_block_type": CROSSED_MID if mid else PLAIN_MID,
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths[:-1]) + (mid or depths[-1] or 1,),
        "heads": unet.heads if widths == tuple(unet.block_out_channels) else tuple(max(w // 64, 1) for w in widths),
        "cross_attention_dim": max(texts, default=unet.cross_attention_dim),
        "use_linear_projection": (projections or [4 - 2 * unet.use_linear_projection])[0] == 2,
        "conditioning_embedding_out_channels": (
            shapes[f"{image}.conv_in.weight"][0], *(shapes[f"{image}.blocks.{i}.weight"][0] for i in steps)
        ),
    }  # fmt: skip
    return facts | added_sizes(shapes.get("add_embedding.linear_1.weight"), unet)


def added_sizes(embedding: tuple[int, ...] | None, unet: EncoderConfig) -> dict[str, Any]:
    """The fields of the embedding of sizes and pooled text, from the shape of its first layer; None: there is none."""
    names = ("projection_class_embeddings_input_dim", "addition_time_embed_dim", "size_ids")
    if embedding is None:
        return {**dict.fromkeys(names, 0), "time_cond_proj_dim": None}
    values = (embedding[1], unet.addition_time_embed_dim or 1, unet.size_ids or 6)  # of a UNet without: refused later
    return {**dict(zip(names, values, strict=True)), "time_cond_proj_dim": None}


def original_sizes(entries: Mapping[str, Entry], hints: list[int], unet: EncoderConfig) -> dict[str, Any]:
    """The same for original names, where all that has no entry here is as in the UNet."""
    texts = {entry.shape[1] for key, entry in entries.items() if key.endswith("attn2.to_k.weight")}
    image = [entries[f"input_hint_block.{i}.weight"].shape[0] for i in hints[:-1]]
    channels = entries["input_blocks.0.0.weight"].shape[1]
    widths = (image[0], *image[2::2])  # of conv_in, then of each convolution that halves the image
    added = entries.get("label_emb.0.0.weight")
    facts = {"in_channels": channels, "conditioning_embedding_out_channels": widths}
    facts |= added_sizes(added and added.shape, unet)
    return facts | ({"cross_attention_dim": max(texts)} if texts else {})


def original_map(config: ControlNetConfig, hints: list[int], prefix: str) -> Any:
    """From a key of ControlNet to the original one."""
    up = {f.name: getattr(config, f.name) for f in fields(EncoderConfig)}
    levels = len(config.block_out_channels)
    encoder = unet_map(UNetConfig(**up, up_block_types=("UpBlock2D",) * levels), prefix)
    image = ["conv_in", *(f"blocks.{i}" for i in range(len(hints) - 2)), "conv_out"]
    names = {f"controlnet_cond_embedding.{name}.": f"input_hint_block.{i}." for name, i in zip(image, hints)}
    names |= {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0." for i in range(len(config.skip_widths))}
    names["controlnet_mid_block."] = "middle_block_out.0."

    def original(key: str) -> Source:
        for name, other in names.items():
            if key.startswith(name):
                return Source(prefix + other + key.removeprefix(name))
        return encoder(key)

    return original
