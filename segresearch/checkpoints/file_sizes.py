"""Configs of the diffusers layout from the shapes in a file of the original layout.

What shapes cannot tell is a rule of the families: 64 channels a head (Stable Diffusion 1: 8 heads at every width), 32
groups, quick_gelu in OpenAI's CLIP and gelu in OpenCLIP. A folder of configs overrides it.
"""

import re
from collections.abc import Mapping
from typing import Any

from segresearch.errors import InputError

HEAD_DIM = 64
Shapes = Mapping[str, tuple[int, ...]]


def span(shapes: Shapes, pattern: str) -> int:
    """How many indices the pattern's group takes, from 0 on; 0 without a match. InputError where one is left out."""
    numbers = {m[1] for m in map(re.compile(pattern).match, shapes) if m}
    if numbers != {str(i) for i in range(len(numbers))}:
        raise InputError(f"the numbers of {pattern!r} are not 0 to {len(numbers) - 1}")
    return len(numbers)


def _plain(depths: list[int]) -> int | list[int]:
    """Equal depths of a level as one number."""
    return depths[0] if len(set(depths)) == 1 else depths


def unet_config(shapes: Shapes, pooled: int | None, ids: int = 6) -> dict[str, Any]:
    """A diffusers `unet/config.json` from the shapes below `model.diffusion_model.`; pooled: its text width, None where
    the model has none; ids: sizes in its time_ids."""
    inputs = span(shapes, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    starts, ends = [1, *(i + 1 for i in downs)], [*downs, inputs]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]

    def depth(block: str) -> int:
        return span(shapes, rf"{block}\.1\.transformer_blocks\.(\d+)\.")

    levels = [[depth(rf"input_blocks\.{i}") for i in range(a, b)] for a, b in zip(starts, ends, strict=True)]
    layers = [len(level) for level in levels]
    ups = [depth(rf"output_blocks\.{i}") for i in range(sum(layers) + len(layers))]
    up_levels = [[ups.pop(0) for _ in range(count + 1)] for count in reversed(layers)]
    mid = depth("middle_block") if "middle_block.1.proj_in.weight" in shapes else 0
    depths: list[Any] = [_plain(level) or 1 for level in levels]
    mirrored = [[max(up)] * len(up) == up and up[0] == level[0] for up, level in zip(reversed(up_levels), levels)]
    more: dict[str, Any] = {}
    if not all(mirrored):
        more["reverse_transformer_layers_per_block"] = [_plain(level) or 1 for level in up_levels]
    if not mid:
        more["mid_block_type"] = "UNetMidBlock2D" if any(key.startswith("middle_block.") for key in shapes) else None
    elif not any(levels[-1]):
        depths[-1] = mid
    elif mid != levels[-1][-1]:
        raise InputError(f"{mid} transformer blocks in the middle, {levels[-1]} on the lowest level: of no known model")
    crossed = next(key for key in shapes if key.endswith(".transformer_blocks.0.attn2.to_k.weight"))
    block = crossed.removesuffix(".transformer_blocks.0.attn2.to_k.weight")
    linear, context = len(shapes[f"{block}.proj_in.weight"]) == 2, shapes[crossed][1]
    if "label_emb.0.0.weight" in shapes:
        sizes = shapes["label_emb.0.0.weight"][1]
        if pooled is None:
            raise InputError("label_emb is there, in a model without a pooled text: of no known model")
        more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": (sizes - pooled) // ids,
                 "projection_class_embeddings_input_dim": sizes}  # fmt: skip
    else:
        more |= {"addition_embed_type": None}
    eight = "label_emb.0.0.weight" not in shapes and (not linear or context == 768)
    if "time_embedding.cond_proj.weight" in shapes:
        more["time_cond_proj_dim"] = shapes["time_embedding.cond_proj.weight"][1]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1], "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up_levels],
        "transformer_layers_per_block": depths,
        "attention_head_dim": [8] * len(widths) if eight else [max(width // HEAD_DIM, 1) for width in widths],
        "cross_attention_dim": context, "use_linear_projection": linear,
        **more,
    }  # fmt: skip


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A diffusers `vae/config.json`, without what scales latents, from the shapes below `first_stage_model.`."""
    levels = span(shapes, r"encoder\.down\.(\d+)\.block\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": span(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes, "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }  # fmt: skip


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """A transformers CLIP text `config.json` from the shapes of a text encoder below its prefix, in CLIP's names or in
    OpenCLIP's. A projection has its own width; without one it has that of the states."""
    open_clip = "positional_embedding" in shapes
    model = "" if open_clip or "embeddings.token_embedding.weight" in shapes else "text_model."
    positions = "positional_embedding" if open_clip else f"{model}embeddings.position_embedding.weight"
    layers, mlp = ("transformer.resblocks", "c_fc") if open_clip else (f"{model}encoder.layers", "fc1")
    vocabulary, width = shapes["token_embedding.weight" if open_clip else f"{model}embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", shapes.get("text_projection", (width, width))[::-1])
    return {
        "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": shapes[f"{layers}.0.mlp.{mlp}.weight"][0],
        "num_hidden_layers": span(shapes, rf"{re.escape(layers)}\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_DIM, 1),
        "max_position_embeddings": shapes[positions][0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": 0, "eos_token_id": 2,  # SDXL's configs say 2: the end of a text is its highest token id
        "projection_dim": projection[0],
    }  # fmt: skip
