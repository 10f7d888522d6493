"""A tiny random model on disk, and one fault in a safetensors header, in the names of its tensors or in a config."""

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from segresearch.checkpoints.folder import build_networks
from segresearch.checkpoints.key_maps import clip_map, open_clip_map, unet_map, vae_map

UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1], "attention_head_dim": [1, 1], "cross_attention_dim": 96, "in_channels": 4,
    "out_channels": 4, "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 40, "use_linear_projection": True,
}  # fmt: skip
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "layers_per_block": 1, "scaling_factor": 0.13025,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "bos_token_id": 0,
    "eos_token_id": 2, "num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 8,
    "projection_dim": 16,
}  # fmt: skip
TEXT_2 = {**TEXT, "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 64, "hidden_act": "gelu"}
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
             "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "num_train_timesteps": 1000}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
}  # fmt: skip
CONFIGS = {
    "unet/config.json": UNET, "vae/config.json": VAE, "text_encoder/config.json": TEXT, "model_index.json": INDEX,
    "text_encoder_2/config.json": TEXT_2, "scheduler/scheduler_config.json": SCHEDULER,
}  # fmt: skip
TOKENS = ("a", "a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>")
END = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
NAMED = {"bos_token": "<|startoftext|>", "eos_token": END, "pad_token": "<|endoftext|>", "unk_token": END}
TOKENIZER: dict[str, dict[str, Any]] = {
    "tokenizer/vocab.json": {token: i for i, token in enumerate(TOKENS)},
    "tokenizer/tokenizer_config.json": {
        **NAMED, "eos_token": {**END, "__type": "AddedToken"}, "unk_token": "<|endoftext|>", "model_max_length": 8,
        "tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": {"5": {**END, "special": True}},
        "additional_special_tokens": [], "padding_side": "right",
    },
    "tokenizer/special_tokens_map.json": NAMED, "tokenizer/added_tokens.json": {"<|endoftext|>": 5},
    "tokenizer/tokenizer.json": {
        "version": "1.0", "added_tokens": [{**END, "id": 5, "special": True}], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 5], "cls": ["<|startoftext|>", 4],
                           "trim_offsets": False, "add_prefix_space": False},
        "model": {"type": "BPE", "unk_token": "<|endoftext|>", "end_of_word_suffix": "</w>", "merges": [],
                  "vocab": {token: i for i, token in enumerate(TOKENS)}},
    },
}  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**18, 2**63, 10**400, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "UNet2DConditionModel", "\n", "../..", [], {}, [[]], [None], [1], [0, 0], [1] * 40,
    [[1, 2]] * 2, [10**9, 10**9], {"a": [1]}, [[[[[[1]]]]]], ["DownBlock2D"] * 2, "a" * 5000,
)  # fmt: skip
FIELDS = ("data_offsets", "shape", "dtype")
FAULTS: tuple[list[Any], ...] = (
    [[0, 0], [0, 2**64], [-1, 5], [5, 1], [0.5, 3], [], [0], "x", None, [2**63, 2**63]],
    [[], [0], [-1], [2**40, 2**40], [2**63], [1.5], ["x"], None, [1] * 300, [2**31, 2**31, 4]],
    ["F8_E4M3", "I8", "BOOL", "X", None, 5, "F64", "U64", "F4", ""],
)
METADATA = (
    None, 5, {"a": 1}, {"prediction_type": "v" * 9999}, {"a": {"b": "c"}}, {"modelspec.prediction_type": "\n\n"},
    {"ss_v_parameterization": ""},
)  # fmt: skip
NAMES = ("", "\n", "a" * 99999, "\ud800", "v_pred", "edm_vpred.sigma_max", "edm_mean")
STARTS = ("model.", "", "first_stage_model.", "cond_stage_model.", "double_blocks.", "lora_unet_")
MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_min", "scaled_fp8")
NET = "controlnet/net/config.json"
NET_CONFIG = {**UNET, "_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [8, 16]}


def write_model(folder: Path, file: Path) -> None:
    """A random model in the folder layout, with a ControlNet's config, and its weights in the original layout."""
    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
    (folder / "controlnet" / "net").mkdir(parents=True)
    (folder / NET).write_text(json.dumps(NET_CONFIG))
    networks = build_networks([copy.deepcopy(config) for config in (UNET, VAE, TEXT, TEXT_2)], folder)
    maps = (unet_map(networks[0].config), vae_map(2), clip_map, open_clip_map)
    original: dict[str, Any] = {}
    for part, network, source_of in zip(("unet", "vae", "text_encoder", "text_encoder_2"), networks, maps, strict=True):
        weights = {key: torch.zeros(weight.shape, dtype=torch.float16) for key, weight in network.state_dict().items()}
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{stem}.safetensors")
        for key, weight in weights.items():
            source = source_of(key)
            shape = list(weight.shape[::-1] if source.transpose else weight.shape)
            shape[:1] = [shape[0] * 3] if source.third is not None else shape[:1]
            original[source.key] = torch.zeros(shape, dtype=torch.float16)
    save_file(original, file)


def parsed(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: Any, data: bytes) -> bytes:
    """A safetensors file; header: as JSON, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def broken_header(draw: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """One fault in the header: its length, its bytes, or a field of an entry."""
    header, text = copy.deepcopy(header), json.dumps(header).encode()
    key, kind = draw.choice(list(header)), draw.randrange(9)
    entry = header[key]
    if kind == 0:
        length = draw.choice([0, 1, 7, len(text) - 1, len(text) + 1, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + text + data
    if kind == 1:
        at = draw.randrange(len(text))
        return packed(text[:at] + draw.choice([b"", b"\xff", b"\0", b"[" * 9999, b'{"' * 999]) + text[at + 1 :], data)
    if kind == 2:
        return packed(text, data)[: draw.randrange(len(text) + len(data) + 8)]
    if kind == 6:  # a name twice
        return packed(text[:-1] + f', "{key}": {json.dumps(entry)}'.encode() + b"}", data)
    if kind < 6:
        entry[FIELDS[kind - 3]] = draw.choice(FAULTS[kind - 3])
    elif kind == 7:
        header["__metadata__"] = draw.choice(METADATA)
    else:
        empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
        header[draw.choice(NAMES)] = draw.choice([empty, {}, None, {"dtype": "F16"}, entry])
    return packed(header, data)


def renamed_keys(draw: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A valid header whose tensors have other names or shapes than those of a model, or are fewer."""
    entries = {key: dict(value) for key, value in header.items()}
    for _ in range(draw.choice([1, 1, 2, 5])):
        key, kind = draw.choice(list(entries)), draw.randrange(7)
        number = str(draw.choice([0, 1, 3, 99, 10**6, 10**12, "9" * 5000, "01", "-1"]))
        if kind == 0:
            parts = key.split(".")
            digits = [i for i, part in enumerate(parts) if part.isdigit()] or [0]
            parts[draw.choice(digits)] = number
            entries[".".join(parts)] = entries.pop(key)
        elif kind == 1 and len(entries) > 1:
            del entries[key]
        elif kind == 2:
            other = draw.choice(list(entries))
            entries[key], entries[other] = entries[other], entries[key]
        elif kind == 3:
            entry = entries[key]
            entry["shape"] = draw.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]],
                                          [entry["data_offsets"][1] // 2 - entry["data_offsets"][0] // 2]])  # fmt: skip
        elif kind == 4:
            start = draw.choice(
                ["model.", "", "first_stage_model.", "cond_stage_model.", "double_blocks.", "lora_unet_"]
            )
            entries[start + key] = entries.pop(key)
        elif kind == 5:
            prefix, name = key.split(".")[0], draw.choice(["x", "", "cond_stage_model", "conditioner.embedders.9"])
            entries = {name + k.removeprefix(prefix) if k.startswith(prefix) else k: e for k, e in entries.items()}
        else:
            entries[draw.choice(MARKS)] = entries.pop(key)
    return entries


def mutated_json(draw: random.Random, value: Any) -> str:
    """A config with one to three strange values, or with broken text."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 3])):
        place = value
        while True:
            key: Any = draw.choice(list(place) if isinstance(place, dict) else range(len(place))) if place else None
            if key is None:
                break
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.6:
                place = place[key]
                continue
            if isinstance(place, dict) and draw.random() < 0.2:
                del place[key]
            else:
                place[key] = copy.deepcopy(draw.choice(STRANGE))
            break
    text = json.dumps(value)
    if draw.random() < 0.1:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", "[" * 100_000, "\0", "NaN", "\ud800", "}", '"' * 3]) + text[at + 1 :]
    return text
