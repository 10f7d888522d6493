"""The original SDXL layout, one .safetensors file: the sizes in it, and the key map to the folder layout.

    model.diffusion_model.*              UNet: input_blocks, middle_block and output_blocks, numbered through all levels
    conditioner.embedders.0.transformer.text_model.*    CLIP text encoder, names as in transformers
    conditioner.embedders.1.model.*      OpenCLIP text encoder: q, k, v in one in_proj; text_projection transposed
    first_stage_model.*                  VAE: decoder levels numbered from the finest; attention as 1×1 convolutions

Sizes are read from the shapes. What shapes cannot tell is SDXL's rule: 64 channels a head, 32 groups, VAE scaling
0.13025, quick_gelu in the first text encoder and gelu in the second; a folder of configs overrides it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from segresearch.checkpoints.folder import Checkpoint, build_networks, read_json, read_tokenizer
from segresearch.checkpoints.tensors import Source, Weights, open_file, unexpected
from segresearch.errors import CheckpointError, InputError
from segresearch.models.network_configs import UNetConfig
from segresearch.models.text import TOKENIZERS

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PARTS = {UNET: "UNet", VAE: "VAE", CLIP: "first text encoder", OPEN_CLIP: "second text encoder"}
OTHERS = {  # a pattern of keys -> what the file is; the first that matches
    r"lora_|\.lora\.": "a LoRA, not a checkpoint: merge it into its base model first",
    r"control_model\.|controlnet_cond_embedding": "a ControlNet, not a checkpoint: pass the SDXL that it steers",
    r"double_blocks\.": "Flux, not SDXL",
    r"joint_blocks\.": "Stable Diffusion 3, not SDXL",
    r"clip_txt_(pooled_)?mapper": "Stable Cascade, not SDXL",
    r"cond_stage_model\.model\.": "a Stable Diffusion 2 checkpoint, not SDXL",
    r"cond_stage_model\.": "a Stable Diffusion 1 checkpoint, not SDXL",
    r"conditioner\.embedders\.0\.model\.": "the SDXL refiner as one file, not SDXL base",
    r"^edm_mean$": "Playground v2.5 (EDM formulation), which is not supported",
}
HEAD_DIM = 64

Shapes = Mapping[str, tuple[int, ...]]


def refuse_other_file(keys: Iterable[str], path: Path) -> None:
    """CheckpointError for a file whose keys are not those of an SDXL in the original layout, with what it is."""
    keys, hint = sorted(keys), "give the base checkpoint (as sd_xl_base_1.0.safetensors) or a diffusers folder of SDXL"
    text = "\n".join(keys)
    for pattern, kind in OTHERS.items():
        if re.search(pattern, text, re.MULTILINE):
            raise CheckpointError(f"{path} is {kind}; {hint}")
    missing = [prefix for prefix in PARTS if not any(key.startswith(prefix) for key in keys)]
    if len(missing) == len(PARTS):
        component = re.search(r"down_blocks\.|text_model\.", text)
        kind = "one component in the folder layout" if component else "of an unknown layout"
        raise CheckpointError(f"{path} is {kind} (its first key is {keys[0]!r}); {hint}")
    if missing:
        raise CheckpointError(f"{path}: the {PARTS[missing[0]]} is missing (no {missing[0]}* keys); {hint}")


def open_model_file(path: Path, config: Path | None, tokenizer: Path | None) -> Checkpoint:
    """An SDXL in the original layout. config, tokenizer: as in `load_model`. CheckpointError for anything else."""
    entries, metadata = open_file(path)
    refuse_other_file(entries, path)
    if config is not None and not config.is_dir():
        raise CheckpointError(f"config={str(config)!r}: no such folder")
    parts = {prefix: {key: one for key, one in entries.items() if key.startswith(prefix)} for prefix in PARTS}
    if stray := unexpected(set(entries).difference(*parts.values())):
        raise CheckpointError(f"{path}: {stray} that belong to no part of SDXL")

    def override(name: str) -> dict[str, Any]:
        return {} if config is None else read_json(config / name, optional=True)

    def sizes(prefix: str, folder: str, infer: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
        if values := override(f"{folder}/config.json"):
            return values
        try:
            return infer({key.removeprefix(prefix): entry.shape for key, entry in parts[prefix].items()})
        except (KeyError, IndexError, ValueError) as error:
            problem = f"cannot tell the sizes of {prefix}*: keys are missing ({error}), fetch it again"
            raise CheckpointError(f"{path}: {problem}") from error

    vae = sizes(VAE, "vae", vae_config)
    first, second = sizes(CLIP, "text_encoder", clip_config), sizes(OPEN_CLIP, "text_encoder_2", clip_config)
    unet = sizes(UNET, "unet", lambda shapes: unet_config(shapes, second["projection_dim"]))
    networks = build_networks((unet, vae, first, second), path)
    maps = (unet_map(networks[0].config), vae_map(len(networks[1].config.block_out_channels)), clip_map, open_clip_map)
    v = metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction", "velocity")
    prediction = "v_prediction" if v or "v_pred" in entries else "epsilon"
    scheduler = {"prediction_type": prediction, "rescale_betas_zero_snr": "ztsnr" in entries}
    return Checkpoint(
        networks,
        tuple(Weights(f"{prefix}*", entries, source) for (prefix, entries), source in zip(parts.items(), maps)),
        _tokenizers(tokenizer, config),
        override("scheduler/scheduler_config.json") or scheduler,
        bool(override("model_index.json").get("force_zeros_for_empty_prompt", True)),
        bool(vae.get("force_upcast", True)),
    )


def _tokenizers(folder: Path | None, config: Path | None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """From a folder, or the local transformers cache; the second pads with token 0, as OpenCLIP does."""
    both = folder or config
    if both is not None and (both / "tokenizer").is_dir():
        return read_tokenizer(both / "tokenizer"), read_tokenizer(both / "tokenizer_2")
    cached = [try_to_load_from_cache(name, "vocab.json") for name in TOKENIZERS]
    folders = [folder] if folder else [Path(file).parent for file in cached if isinstance(file, str)]
    if not folders:
        hint = f'fetch it once with: hf download {TOKENIZERS[0]} --include "*.json" "*.txt"'
        problem = "a single file brings no tokenizer and none is in the local cache"
        raise CheckpointError(f"{problem}: pass tokenizer=<folder with vocab.json and merges.txt>, or {hint}")
    first, second = read_tokenizer(folders[0]), read_tokenizer(folders[-1])  # their vocabulary is the same
    second.pad_token = second.convert_ids_to_tokens(0)
    return first, second


def _span(shapes: Shapes, pattern: str) -> int:
    """How many indices the pattern's group takes: 1 + the largest, 0 without a match."""
    return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, shapes) if m), default=-1)


def unet_config(shapes: Shapes, pooled: int) -> dict[str, Any]:
    """A diffusers `unet/config.json` from the shapes below `model.diffusion_model.`; pooled: its text width."""
    inputs = _span(shapes, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    starts, ends = [1, *(i + 1 for i in downs)], [*downs, inputs]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]
    depths = [_span(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in starts]
    mid = _span(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if depths[-1] not in (0, mid):
        raise InputError(f"{mid} transformer blocks in the middle, {depths[-1]} on the lowest level: not SDXL's shape")
    sizes = shapes["label_emb.0.0.weight"][1]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1], "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": [end - start for start, end in zip(starts, ends, strict=True)],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "transformer_layers_per_block": [d or 1 for d in depths[:-1]] + [mid],
        "attention_head_dim": [max(width // HEAD_DIM, 1) for width in widths],
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "addition_embed_type": "text_time", "addition_time_embed_dim": (sizes - pooled) // 6,
        "projection_class_embeddings_input_dim": sizes,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }  # fmt: skip


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A diffusers `vae/config.json` from the shapes below `first_stage_model.`."""
    levels = _span(shapes, r"encoder\.down\.(\d+)\.block\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": _span(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes, "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }  # fmt: skip


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """A transformers CLIP text `config.json` from the shapes of either text encoder below its prefix."""
    open_clip = "positional_embedding" in shapes
    embeddings = "" if open_clip else "text_model.embeddings."
    positions = "positional_embedding" if open_clip else f"{embeddings}position_embedding.weight"
    layers, mlp = ("transformer.resblocks", "c_fc") if open_clip else ("text_model.encoder.layers", "fc1")
    vocabulary, width = shapes[f"{embeddings}token_embedding.weight"]
    config = {
        "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": shapes[f"{layers}.0.mlp.{mlp}.weight"][0],
        "num_hidden_layers": _span(shapes, rf"{layers}\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_DIM, 1),
        "max_position_embeddings": shapes[positions][0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": 0, "eos_token_id": 2,  # SDXL's configs say 2: the end of a text is its highest token id
    }  # fmt: skip
    return config | ({"projection_dim": shapes["text_projection"][1]} if open_clip else {})


_RESNET = {  # the key maps: a module in the folder layout -> in the original layout
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


def unet_map(config: UNetConfig) -> Callable[[str], Source]:
    """From a UNet key of the folder layout to the original one; blocks of all levels are numbered through there."""
    names, down, up, kinds = dict(_UNET), 1, 0, ((0, "resnets"), (1, "attentions"))
    for level, layers in enumerate(config.layers_per_block):
        for i, (k, kind) in product(range(layers), kinds):
            names[f"down_blocks.{level}.{kind}.{i}"] = f"input_blocks.{down + i}.{k}"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{down + layers}.0.op"
        down += layers + 1
    for level, layers in enumerate(reversed(config.layers_per_block)):
        for i, (k, kind) in product(range(layers + 1), kinds):
            names[f"up_blocks.{level}.{kind}.{i}"] = f"output_blocks.{up + i}.{k}"
        slot = 2 if config.up_block_types[level] == "CrossAttnUpBlock2D" else 1
        names[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{up + layers}.{slot}"
        up += layers + 1
    return lambda key: Source(UNET + _renamed(key, names, _RESNET))


def vae_map(levels: int) -> Callable[[str], Source]:
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
    return lambda key: Source(VAE + _renamed(key, names).replace("conv_shortcut", "nin_shortcut"))


def clip_map(key: str) -> Source:
    """From a key of transformers' CLIPTextModel, flattened or not, to the original one."""
    return Source(f"{CLIP}text_model.{key.removeprefix('text_model.')}")


def open_clip_map(key: str) -> Source:
    """From a key of transformers' CLIPTextModelWithProjection to OpenCLIP's: q, k and v are thirds of in_proj."""
    key = key.removeprefix("text_model.")
    for name, original in _OPEN_CLIP.items():
        key = key.replace(name, original)
    if part := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
        return Source(f"{OPEN_CLIP}{part[1]}.attn.in_proj_{part[3]}", third="qkv".index(part[2]))
    return Source(OPEN_CLIP + key, transpose=key == "text_projection")
