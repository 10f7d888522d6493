"""The diffusers folder layout: a whole model or a ControlNet, opened with its networks on the meta device."""

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
VAE_SCALING = 0.18215  # of SD 1.5 and 2.1, whose VAE configs often do not say it

Stored = TypeVar("Stored", Entry, torch.Tensor)  # on disk, or of a pipeline in memory
Networks = tuple[Any, ...]  # UNet, VAE, then one or two text encoders


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its networks, still on the meta device, the weights of each, and the facts beside them."""

    networks: Networks
    weights: tuple[Weights, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler: Mapping[str, Any]
    zero_negative: bool
    force_upcast: bool


def has_sizes(unet: Mapping[str, Any]) -> bool:
    """Whether the UNet of this config reads image sizes and a pooled text, as SDXL's does; SD 1.5 and 2.1 do not."""
    return unet.get("addition_embed_type") == "text_time"


def text_parts(index: Mapping[str, Any], unet: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders of the text encoders: one of SD 1.5 and 2.1, two of SDXL, the second alone of its refiner."""
    if not has_sizes(unet):
        return ("text_encoder",)
    null = "text_encoder" in index and (index["text_encoder"] or [None])[-1] is None
    return ("text_encoder_2",) if null else ("text_encoder", "text_encoder_2")


def tokenizer_of(part: str) -> str:
    """The folder of the tokenizer of a text encoder."""
    return part.replace("text_encoder", "tokenizer")


def refuse_other_folder(folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """CheckpointError for anything but a Stable Diffusion pipeline, with what it is. index: model_index.json; unet: the
    UNet's config; {} for one that is missing."""
    component = (folder / "config.json").is_file()
    file = min((path.name for path in folder.glob("*.safetensors")), default=None)
    if not index and not component and file is None:
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
    kind, texts = str(index.get("_class_name") or "pipeline"), text_parts(index, unet)
    parts = (*texts, "vae", *map(tokenizer_of, texts))
    missing = next((part for part in parts if not (folder / part).is_dir()), None)
    needs = "two text encoders with tokenizers" if has_sizes(unet) else "a text encoder with its tokenizer"
    network = unet.get("_class_name", "UNet2DConditionModel")
    hint = "give a folder in the diffusers layout of Stable Diffusion or SDXL (with model_index.json)"
    for fault, holds in {
        "is one component, not a whole model: give the folder above it, with model_index.json": component and not index,
        f"has no model_index.json but {file}: give that file's path, if it is the checkpoint": file and not index,
        f"has no model_index.json: {hint}": not index,
        f"is a {kind} without unet/config.json, which is not supported; {hint}": not unet,
        f"is a {kind} with a {network}, not a UNet2DConditionModel; {hint}": network != "UNet2DConditionModel",
        f"is incomplete, {missing}/ is missing: this model needs {needs}, and a VAE": missing,
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
    """The networks of these configs, without weights: UNet, VAE, text encoders. Where the UNet reads a pooled text, it
    is that of the last encoder."""
    unet, vae, *texts = configs
    for text in texts:
        if text.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
            raise CheckpointError(f"{path}: a text encoder is a {text['model_type']}, not CLIP's: not supported")
    if not has_sizes(unet):
        vae = {"scaling_factor": VAE_SCALING} | vae
    with building(path):
        image = UNet(UNetConfig.from_dict(unet)), VAE(VAEConfig.from_dict(vae))
        kinds = [CLIPTextModel] * (len(texts) - 1) + [CLIPTextModelWithProjection if has_sizes(unet) else CLIPTextModel]
        return *image, *(kind(CLIPTextConfig.from_dict(text)) for kind, text in zip(kinds, texts, strict=True))


def open_model_folder(folder: Path, variant: str | None) -> Checkpoint:
    """A Stable Diffusion pipeline. variant: of its weights. Raises CheckpointError for anything else."""
    index = read_json(folder / "model_index.json", optional=True)
    config = read_json(folder / "unet" / "config.json", optional=True)
    refuse_other_folder(folder, index, config)
    texts = text_parts(index, config)
    if index.get("requires_aesthetics_score"):
        config["size_ids"] = 5
    parts = ("unet", "vae", *texts)
    configs = [config, *(read_json(folder / part / "config.json") for part in parts[1:])]
    networks = build_networks(configs, folder)
    unet, vae = (open_folder(folder / part, STEM, variant) for part in parts[:2])
    vae = {vae_key(key): entry for key, entry in vae.items()}
    encoders = (
        text_entries(encoder, open_folder(folder / part, "model", variant))
        for encoder, part in zip(networks[2:], texts, strict=True)
    )
    with naming_path(folder):
        scheduler = folder_scheduler(index, read_json(folder / "scheduler" / "scheduler_config.json", optional=True))
    return Checkpoint(
        networks,
        tuple(map(Weights, parts, (unet, vae, *encoders))),
        tuple(read_tokenizer(folder / tokenizer_of(part)) for part in texts),
        scheduler,
        has_sizes(config) and bool(index.get("force_zeros_for_empty_prompt", True)),
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


def open_unet(folder: Path, size_ids: int = 6) -> tuple[UNet, Weights]:
    """A UNet alone, still on the meta device, with its weights. size_ids: numbers that it reads beside a pooled text.
    CheckpointError for a folder of another network."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "UNet2DConditionModel":
        raise CheckpointError(f"{folder} is a {config.get('_class_name') or 'folder of no known network'}, not a UNet")
    with building(folder):
        unet = UNet(UNetConfig.from_dict({**config, "size_ids": size_ids}))
    return unet, Weights(f"unet {folder.name}", open_folder(folder, STEM))
