"""The original SDXL layout, one .safetensors file: the sizes in it, and the key map to the folder layout.

    model.diffusion_model.*              UNet: input_blocks, middle_block and output_blocks, numbered through all levels
    conditioner.embedders.0.transformer.text_model.*    CLIP text encoder, names as in transformers
    conditioner.embedders.1.model.*      OpenCLIP text encoder: q, k, v in one in_proj; text_projection transposed
    first_stage_model.*                  VAE: decoder levels numbered from the finest; attention as 1×1 convolutions

Sizes are read from the shapes. What shapes cannot tell is SDXL's rule: 64 channels a head, 32 groups, VAE scaling
0.13025, quick_gelu in the first text encoder and gelu in the second; a folder of configs overrides it.
"""

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTokenizer

from segresearch.checkpoints.folder import Checkpoint, build_networks, read_optional, read_tokenizer
from segresearch.checkpoints.refusals import CLIP, OPEN_CLIP, UNET, VAE, refuse_other_file
from segresearch.checkpoints.tensors import Source, Weights, open_file, unexpected
from segresearch.errors import CheckpointError, InputError
from segresearch.models.text import TOKENIZERS
from segresearch.models.unet import UNetConfig

HEAD_DIM = 64

Shapes = Mapping[str, tuple[int, ...]]


def open_sdxl_file(path: Path, config: Path | None, tokenizer: Path | None) -> Checkpoint:
    """An SDXL in the original layout. config, tokenizer: as in `load_sdxl`. CheckpointError for anything else."""
    entries, metadata = open_file(path)
    refuse_other_file(entries, path)
    if config is not None and not config.is_dir():
        raise CheckpointError(f"config={str(config)!r}: no such folder")
    parts = {
        prefix: {key: entry for key, entry in entries.items() if key.startswith(prefix)}
        for prefix in (UNET, VAE, CLIP, OPEN_CLIP)
    }
    stray = unexpected(set(entries).difference(*parts.values()))
    if stray:
        raise CheckpointError(f"{path}: {stray} that belong to no part of SDXL")

    def override(name: str) -> dict[str, Any]:
        return {} if config is None else read_optional(config / name)

    def sizes(prefix: str, folder: str, infer: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
        if values := override(f"{folder}/config.json"):
            return values
        try:
            return infer({key.removeprefix(prefix): entry.shape for key, entry in parts[prefix].items()})
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot tell the sizes of {prefix}* ({error}): keys are missing, fetch it again"
            ) from error

    vae_sizes = sizes(VAE, "vae", vae_config)
    first, second = sizes(CLIP, "text_encoder", clip_config), sizes(OPEN_CLIP, "text_encoder_2", open_clip_config)
    unet_sizes = sizes(UNET, "unet", lambda shapes: unet_config(shapes, second["projection_dim"]))
    networks = build_networks((unet_sizes, vae_sizes, first, second), path)
    unet, vae = networks[:2]

    def weights(module: nn.Module, source: Callable[[str], Source], prefix: str) -> Weights:
        return Weights(f"{prefix}*", parts[prefix], {key: source(key) for key in module.state_dict()})

    v_prediction = {"v", "v_prediction", "velocity"} & {str(metadata.get("modelspec.prediction_type")).lower()}
    scheduler = {
        "prediction_type": "v_prediction" if v_prediction or "v_pred" in entries else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in entries,
    }
    return Checkpoint(
        networks,
        (
            weights(unet, unet_map(unet.config), UNET),
            weights(vae, vae_map(len(vae.config.block_out_channels)), VAE),
            weights(networks[2], clip_map, CLIP),
            weights(networks[3], open_clip_map, OPEN_CLIP),
        ),
        _tokenizers(tokenizer, config),
        override("scheduler/scheduler_config.json") or scheduler,
        bool(override("model_index.json").get("force_zeros_for_empty_prompt", True)),
        bool(vae_sizes.get("force_upcast", True)),
    )


def _tokenizers(tokenizer: Path | None, config: Path | None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """From a folder, or the local transformers cache; the second pads with token 0, as OpenCLIP does."""
    if tokenizer is None and config is not None and (config / "tokenizer").is_dir():
        tokenizer = config
    if tokenizer is not None and (tokenizer / "tokenizer").is_dir():
        return read_tokenizer(tokenizer / "tokenizer"), read_tokenizer(tokenizer / "tokenizer_2")
    if tokenizer is not None:
        folders = [tokenizer]
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(name, "vocab.json") for name in TOKENIZERS]
        folders = [Path(file).parent for file in cached if isinstance(file, str)]
    if not folders:
        raise CheckpointError(
            "a single file brings no tokenizer and none is in the local cache: pass "
            "tokenizer=<folder with vocab.json and merges.txt>, "
            f'or fetch it once with: hf download {TOKENIZERS[0]} --include "*.json" "*.txt"'
        )
    first, second = read_tokenizer(folders[0]), read_tokenizer(folders[-1])  # their vocabulary is the same
    second.pad_token = second.convert_ids_to_tokens(0)
    return first, second


# --- sizes from shapes ----------------------------------------------------------------------------


def _span(shapes: Shapes, pattern: str) -> int:
    """How many indices the pattern's group takes: 1 + the largest, 0 without a match."""
    regex = re.compile(pattern)
    return 1 + max((int(m[1]) for m in map(regex.match, shapes) if m), default=-1)


def unet_config(shapes: Shapes, pooled: int) -> dict[str, Any]:
    """A diffusers `unet/config.json` from the shapes below `model.diffusion_model.`; pooled: its text width."""
    inputs = _span(shapes, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    starts, ends = [1, *(i + 1 for i in downs)], [*downs, inputs]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]
    depths = [_span(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in starts]
    mid = _span(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if depths[-1] not in (0, mid):
        raise InputError(
            f"the mid block is {mid} transformer blocks deep, the lowest level {depths[-1]}: not SDXL's shape"
        )
    context = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    sizes = shapes["label_emb.0.0.weight"][1]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": [end - start for start, end in zip(starts, ends, strict=True)],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "transformer_layers_per_block": [d or 1 for d in depths[:-1]] + [mid],
        "attention_head_dim": [max(width // HEAD_DIM, 1) for width in widths],
        "cross_attention_dim": context,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (sizes - pooled) // 6,
        "projection_class_embeddings_input_dim": sizes,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A diffusers `vae/config.json` from the shapes below `first_stage_model.`."""
    levels = _span(shapes, r"encoder\.down\.(\d+)\.block\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": _span(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def _text_config(shapes: Shapes, tokens: str, positions: str, mlp: str, layers: str) -> dict[str, Any]:
    """From the names of the embeddings and of the first layer's MLP, and a pattern that counts the layers."""
    vocabulary, width = shapes[tokens]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[mlp][0],
        "num_hidden_layers": _span(shapes, layers),
        "num_attention_heads": max(width // HEAD_DIM, 1),
        "max_position_embeddings": shapes[positions][0],
        "bos_token_id": 0,
        "eos_token_id": 2,  # SDXL's configs say 2: the end of a text is its highest token id
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """A transformers CLIP text `config.json` from the shapes below `conditioner.embedders.0.transformer.`."""
    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    config = _text_config(
        shapes, f"{embeddings}.token_embedding.weight", f"{embeddings}.position_embedding.weight",
        f"{layers}.0.mlp.fc1.weight", rf"{layers}\.(\d+)\.",
    )  # fmt: skip
    return config | {"hidden_act": "quick_gelu"}


def open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """The same from the shapes below `conditioner.embedders.1.model.`."""
    layers = "transformer.resblocks"
    config = _text_config(
        shapes, "token_embedding.weight", "positional_embedding", f"{layers}.0.mlp.c_fc.weight", rf"{layers}\.(\d+)\."
    )
    return config | {"hidden_act": "gelu", "projection_dim": shapes["text_projection"][1]}


# --- the key map: folder layout -> original layout ------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def _swap(name: str, table: Mapping[str, str]) -> str:
    """`a.b.weight` with a.b looked up."""
    stem, leaf = name.rsplit(".", 1)
    return f"{table.get(stem, stem)}.{leaf}"


def unet_map(config: UNetConfig) -> Callable[[str], Source]:
    """From a UNet key of the folder layout to the original one; blocks of all levels are counted through there."""
    layers = config.layers_per_block
    first_in = list(accumulate((n + 1 for n in layers), initial=1))  # a level's resnets and its downsampler
    first_out = list(accumulate((n + 1 for n in reversed(layers)), initial=0))  # one resnet more a level

    def source(key: str) -> Source:
        match = _BLOCK.match(key)
        if not match:
            return Source(UNET + _swap(key, _UNET_ENDS))
        side, level, part, index, name = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if part == "resnets":
            name = _swap(name, _RESNET)
        if side == "mid_block":
            return Source(f"{UNET}middle_block.{1 if part == 'attentions' else 2 * index}.{name}")
        slot = 0 if part == "resnets" else 1
        if part == "downsamplers":
            return Source(f"{UNET}input_blocks.{first_in[level] + layers[level]}.0.op.{name.removeprefix('conv.')}")
        if part == "upsamplers":
            index, slot = layers[-1 - level], 2 if config.up_block_types[level] == "CrossAttnUpBlock2D" else 1
        block = ("input", first_in) if side == "down_blocks" else ("output", first_out)
        return Source(f"{UNET}{block[0]}_blocks.{block[1][level] + index}.{slot}.{name}")

    return source


def vae_map(levels: int) -> Callable[[str], Source]:
    """From a VAE key of the folder layout to the original one; there the decoder counts levels from the finest."""

    def source(key: str) -> Source:
        side, _, rest = key.partition(".")
        match = _BLOCK.match(rest)
        if not match:
            return Source(VAE + key.replace("conv_norm_out", "norm_out"))
        block, level, part, index, name = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if part == "attentions":
            return Source(f"{VAE}{side}.mid.attn_{index + 1}.{_swap(name, _VAE_ATTENTION)}")
        name = name.replace("conv_shortcut", "nin_shortcut")
        if block == "mid_block":
            return Source(f"{VAE}{side}.mid.block_{index + 1}.{name}")
        place = f"down.{level}" if block == "down_blocks" else f"up.{levels - 1 - level}"
        inner = {"resnets": f"block.{index}", "downsamplers": "downsample", "upsamplers": "upsample"}[part]
        return Source(f"{VAE}{side}.{place}.{inner}.{name}")

    return source


def clip_map(key: str) -> Source:
    """From a key of transformers' CLIPTextModel, flattened or not, to the original one."""
    return Source(f"{CLIP}text_model.{key.removeprefix('text_model.')}")


def open_clip_map(key: str) -> Source:
    """From a key of transformers' CLIPTextModelWithProjection to OpenCLIP's: q, k and v are thirds of in_proj."""
    if key == "text_projection.weight":
        return Source(OPEN_CLIP + "text_projection", transpose=True)
    key = key.removeprefix("text_model.")
    ends = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    if key == "embeddings.position_embedding.weight":
        return Source(OPEN_CLIP + "positional_embedding")
    match = re.match(r"encoder\.layers\.(\d+)\.(.+)", key)
    if not match:
        return Source(OPEN_CLIP + _swap(key, ends))
    block = f"{OPEN_CLIP}transformer.resblocks.{match[1]}."
    projection = re.match(r"self_attn\.([qkv])_proj\.(weight|bias)", match[2])
    if projection:
        return Source(f"{block}attn.in_proj_{projection[2]}", third="qkv".index(projection[1]))
    return Source(block + _swap(match[2], _OPEN_CLIP))
