"""The diffusers folder layout: an SDXL or a ControlNet, opened with its networks on the meta device."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.checkpoints.resolve import refuse_pickle
from segresearch.checkpoints.tensors import Entry, Weights, open_folder, refuse_pointer
from segresearch.errors import CheckpointError, InputError
from segresearch.models.network_configs import UNetConfig
from segresearch.models.scheduler import folder_scheduler
from segresearch.models.text import load_tokenizer
from segresearch.models.unet import UNet
from segresearch.models.vae import VAE, VAEConfig

STEM = "diffusion_pytorch_model"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
REFINER = "it has one text encoder and cannot start from noise"

Stored = TypeVar("Stored", Entry, torch.Tensor)  # on disk, or of a pipeline in memory
Networks = tuple[UNet, VAE, CLIPTextModel, CLIPTextModelWithProjection]


@dataclass(frozen=True)
class Checkpoint:
    """An SDXL on disk: its networks, still on the meta device, the weights of each, and the facts beside them."""

    networks: Networks
    weights: tuple[Weights, ...]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    scheduler: Mapping[str, Any]
    zero_negative: bool
    force_upcast: bool


def refuse_other_folder(folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """CheckpointError for anything but an SDXL pipeline, with what it is. index: model_index.json; unet: the UNet's
    config; {} for one that is missing."""
    component = (folder / "config.json").is_file()
    file = min((path.name for path in folder.glob("*.safetensors")), default=None)
    if not index and not component and file is None:
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
    kind, width = str(index.get("_class_name") or "pipeline"), unet.get("cross_attention_dim")
    model = {"768": "Stable Diffusion 1", "1024": "Stable Diffusion 2"}.get(str(width), kind)
    parts = ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")
    missing = next((part for part in parts if not (folder / part).is_dir()), None)
    refiner = missing == "text_encoder" and index.get("requires_aesthetics_score")
    sizes = unet.get("addition_embed_type") == "text_time"
    hint = "give a folder in the diffusers layout of SDXL (with model_index.json)"
    for fault, holds in {
        "is one component, not a whole model: give the folder above it, with model_index.json": component and not index,
        f"has no model_index.json but {file}: give that file's path, if it is the checkpoint": file and not index,
        f"has no model_index.json: {hint}": not index,
        f"is a {kind} without unet/config.json, not SDXL; {hint}": not unet,
        f"is {model} (cross_attention_dim {width}, no size conditioning), not SDXL; {hint}": not sizes,
        f"is the SDXL refiner: {REFINER}; give SDXL base": refiner,
        f"is incomplete, {missing}/ is missing: SDXL needs two text encoders with tokenizers, and a VAE": missing,
    }.items():
        if holds:
            raise CheckpointError(f"{folder} {fault}")


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A config; {} for an optional one that is missing. CheckpointError for another that is missing, a git-lfs pointer
    or not a JSON object."""
    if optional and not path.is_file():
        return {}
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the model again, with its configs")
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(errors="replace"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a config: fetch it again")
    return value


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder. Raises CheckpointError where it is missing or cannot be read."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise CheckpointError(f"{folder}: no tokenizer here (vocab.json and merges.txt): fetch the model's tokenizers")
    for name in names:
        refuse_pointer(folder / name)
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers' own errors have no common class
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({reason}): fetch its files again") from error


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """An InputError within its block becomes a CheckpointError that begins with the path."""
    try:
        yield
    except InputError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error


@contextmanager
def building(folder: Path | str) -> Iterator[None]:
    """Networks that are built here lie on the meta device; CheckpointError for a config that is not supported."""
    try:
        with torch.device("meta"):
            yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers checks its configs with errors of its own classes
        kind, reason = type(error).__name__, " ".join(str(error).split())
        problem = "" if isinstance(error, ValueError) else f"a config that no model can be built from, {kind}: "
        raise CheckpointError(f"{folder}: {problem}{reason}") from error


def build_networks(configs: Sequence[dict[str, Any]], path: Path | str) -> Networks:
    """The networks of the configs of PARTS, without weights."""
    unet, vae, first, second = configs
    with building(path):
        image = UNet(UNetConfig.from_dict(unet)), VAE(VAEConfig.from_dict(vae))
        text = CLIPTextModel(CLIPTextConfig.from_dict(first))
        return *image, text, CLIPTextModelWithProjection(CLIPTextConfig.from_dict(second))


def open_model_folder(folder: Path, variant: str | None) -> Checkpoint:
    """An SDXL pipeline. variant: of its weights. Raises CheckpointError for anything else."""
    index = read_json(folder / "model_index.json", optional=True)
    refuse_other_folder(folder, index, read_json(folder / "unet" / "config.json", optional=True))
    configs = [read_json(folder / part / "config.json") for part in PARTS]
    networks, stems = build_networks(configs, folder), (STEM, STEM, "model", "model")
    unet, vae, first, second = (open_folder(folder / part, stem, variant) for part, stem in zip(PARTS, stems))
    vae = {vae_key(key): entry for key, entry in vae.items()}
    entries = (unet, vae, text_entries(networks[2], first), text_entries(networks[3], second))
    with naming_path(folder):
        scheduler = folder_scheduler(index, read_json(folder / "scheduler" / "scheduler_config.json", optional=True))
    return Checkpoint(
        networks,
        tuple(map(Weights, PARTS, entries)),
        (read_tokenizer(folder / "tokenizer"), read_tokenizer(folder / "tokenizer_2")),
        scheduler,
        bool(index.get("force_zeros_for_empty_prompt", True)),
        bool(configs[1].get("force_upcast", True)),
    )


def text_entries(encoder: torch.nn.Module, entries: Mapping[str, Stored]) -> dict[str, Stored]:
    """Under the encoder's own names: transformers 5.6 dropped `text_model.` from those of CLIPTextModel."""
    keys, prefix = encoder.state_dict().keys(), "text_model."
    names = {key: {key, prefix + key, key.removeprefix(prefix)} & keys for key in entries}
    return {min(names[key], default=key): entry for key, entry in entries.items()}


def vae_key(key: str) -> str:
    """VAE attention names of old diffusers folders as they are called today."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda old: names[old[0]], key)


def open_unet(folder: Path) -> tuple[UNet, Weights]:
    """A UNet alone, still on the meta device, with its weights. CheckpointError for a folder of another network."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "UNet2DConditionModel":
        raise CheckpointError(f"{folder} is a {config.get('_class_name') or 'folder of no known network'}, not a UNet")
    with building(folder):
        unet = UNet(UNetConfig.from_dict(config))
    return unet, Weights(f"unet {folder.name}", open_folder(folder, STEM))
