"""The diffusers folder layout: an SDXL or a ControlNet, opened with its networks on the meta device."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.checkpoints.refusals import refuse_other_folder, refuse_pointer
from segresearch.checkpoints.resolve import resolve_controlnet
from segresearch.checkpoints.tensors import Entry, Weights, open_folder
from segresearch.errors import CheckpointError
from segresearch.models.controlnet import ControlNet
from segresearch.models.network_configs import ControlNetConfig, UNetConfig
from segresearch.models.text import load_tokenizer
from segresearch.models.unet import UNet
from segresearch.models.vae import VAE, VAEConfig

STEM = "diffusion_pytorch_model"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")

Networks = tuple[UNet, VAE, CLIPTextModel, CLIPTextModelWithProjection]
Names = str | Path | Sequence[str | Path] | None  # of ControlNets


@dataclass(frozen=True)
class Checkpoint:
    """An SDXL on disk: its networks, still on the meta device, the weights of each, and the facts beside them."""

    networks: Networks
    weights: tuple[Weights, Weights, Weights, Weights]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    scheduler: Mapping[str, Any]
    zero_negative: bool
    force_upcast: bool


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A config; {} for an optional one that is missing.

    Raises CheckpointError for a file that is missing, a git-lfs pointer or not a JSON object.
    """
    if not path.is_file():
        if optional:
            return {}
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
    files = {path.name: path for path in sorted(folder.glob("*")) if path.is_file()}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        raise CheckpointError(f"{folder}: no tokenizer here (vocab.json and merges.txt): fetch the model's tokenizers")
    for path in files.values():
        refuse_pointer(path)
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers' own errors have no common class
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({reason}): fetch its files again") from error


@contextmanager
def building(where: Path) -> Iterator[None]:
    """Networks that are built here lie on the meta device; CheckpointError for a config that is not supported."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:  # transformers checks its configs with errors of its own classes
        kind = type(error).__name__
        problem = "" if isinstance(error, ValueError) else f"a config that no model can be built from, {kind}: "
        raise CheckpointError(f"{where}: {problem}{' '.join(str(error).split())}") from error


def build_networks(configs: Sequence[dict[str, Any]], where: Path) -> Networks:
    """The networks of the configs of PARTS, without weights."""
    unet, vae, first, second = configs
    with building(where):
        return (
            UNet(UNetConfig.from_dict(unet)),
            VAE(VAEConfig.from_dict(vae)),
            CLIPTextModel(CLIPTextConfig.from_dict(first)),
            CLIPTextModelWithProjection(CLIPTextConfig.from_dict(second)),
        )


def open_sdxl_folder(folder: Path, variant: str | None) -> Checkpoint:
    """An SDXL pipeline. variant: of its weights. Raises CheckpointError for anything else."""
    index = read_json(folder / "model_index.json", optional=True)
    refuse_other_folder(folder, index, read_json(folder / "unet" / "config.json", optional=True))
    configs = [read_json(folder / part / "config.json") for part in PARTS]
    networks = build_networks(configs, folder)
    unet, vae = (open_folder(folder / part, STEM, variant) for part in PARTS[:2])
    first, second = (open_folder(folder / part, "model", variant) for part in PARTS[2:])
    return Checkpoint(
        networks,
        (
            Weights("unet", unet),
            Weights("vae", {_vae_key(key): entry for key, entry in vae.items()}),
            Weights("text_encoder", _text_entries(networks[2], first)),
            Weights("text_encoder_2", _text_entries(networks[3], second)),
        ),
        (read_tokenizer(folder / "tokenizer"), read_tokenizer(folder / "tokenizer_2")),
        read_json(folder / "scheduler" / "scheduler_config.json", optional=True),
        bool(index.get("force_zeros_for_empty_prompt", True)),
        bool(configs[1].get("force_upcast", True)),
    )


def _text_entries(encoder: torch.nn.Module, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Under the encoder's own names: transformers 5.6 dropped `text_model.` from those of CLIPTextModel."""
    keys, prefix = encoder.state_dict().keys(), "text_model."
    names = {key: {key, prefix + key, key.removeprefix(prefix)} & keys for key in entries}
    return {min(names[key], default=key): entry for key, entry in entries.items()}


def _vae_key(key: str) -> str:
    """VAE attention names of old diffusers folders as they are called today."""
    old = re.fullmatch(r"(.+\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{old[1]}.{names[old[2]]}.{old[3]}" if old else key


def open_controlnets(names: Names, model: Path, variant: str | None) -> dict[str, tuple[ControlNet, Weights]]:
    """The ControlNets of these names, in their order, still on the meta device, with their weights.

    model: the folder of the SDXL, whose own ones lie in controlnet/. variant: of the weights, where there are such.
    Raises CheckpointError for what is not a ControlNet of SDXL, or is named twice.
    """
    several = [] if names is None else [names] if isinstance(names, str | Path) else names
    opened: dict[str, tuple[ControlNet, Weights]] = {}
    for name in map(str, several):
        if name in opened:
            raise CheckpointError(f"controlnet {name!r} is named twice: load it once")
        folder = resolve_controlnet(name, model)
        if any((folder / file).is_file() for file in ("model_index.json", "unet/config.json")):
            raise CheckpointError(f"{folder} is a whole model, not a ControlNet: give the folder of a ControlNet")
        config = read_json(folder / "config.json")
        with building(folder):
            net = ControlNet(ControlNetConfig.from_dict(config))
        has_variant = variant is not None and any(folder.glob(f"{STEM}*.{variant}.*"))
        entries = open_folder(folder, STEM, variant if has_variant else None)
        if any(key.startswith(("task_embedding", "control_add_embedding.")) for key in entries):
            raise CheckpointError(f"{folder}: a union of ControlNets is not supported: give one for a kind of image")
        opened[name] = net, Weights(f"controlnet {folder.name}", entries)
    return opened
