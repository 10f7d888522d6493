"""The diffusers folder layout: a whole model or a ControlNet, opened with its networks on the meta device."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.parts import NONE, Given, Part, arranged, part_weights, with_unet_scheduler
from segresearch.checkpoints.resolve import refuse_pickle
from segresearch.checkpoints.tensors import Weights, open_folder, variants
from segresearch.checkpoints.tokenizer_files import read_tokenizer
from segresearch.errors import CheckpointError, InputError
from segresearch.models.network_configs import UNetConfig
from segresearch.models.scheduler import folder_scheduler
from segresearch.models.text_config import text_config
from segresearch.models.unet import UNet
from segresearch.models.vae import VAE, VAEConfig

STEM = "diffusion_pytorch_model"
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
    entry = index.get("text_encoder", "missing")
    null = not entry or (isinstance(entry, list) and entry[-1] is None)
    return ("text_encoder_2",) if null else ("text_encoder", "text_encoder_2")


def tokenizer_of(part: str) -> str:
    """The folder of the tokenizer of a text encoder."""
    return part.replace("text_encoder", "tokenizer")


def refuse_other_folder(folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any], given: Given = NONE) -> None:
    """CheckpointError for anything but a Stable Diffusion pipeline, with what it is. index: model_index.json; unet: the
    UNet's config; {} for one that is missing. given: parts that it need not have."""
    component = (folder / "config.json").is_file()
    file = min((path.name for path in folder.glob("*.safetensors")), default=None)
    if not index and not component and file is None:
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
    kind, texts = str(index.get("_class_name") or "pipeline"), text_parts(index, unet)
    parts = (*texts, "vae", *map(tokenizer_of, texts))
    there = [part for part in parts if (folder / part).is_dir() or given.replaces(part.removesuffix("_2"))]
    missing = next((part for part in parts if part not in there), None)
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
    with building(path):
        fields = [text_config(text, f"{path}: text encoder config") for text in texts]
        # the other ids are not read, and those of transformers are beyond a small vocabulary, of which it warns
        checked = [CLIPTextConfig(**each, bos_token_id=None, pad_token_id=None) for each in fields]
        image = UNet(UNetConfig.from_dict(unet)), VAE(VAEConfig.from_dict(vae))
        kinds = [CLIPTextModel] * (len(texts) - 1) + [CLIPTextModelWithProjection if has_sizes(unet) else CLIPTextModel]
        return *image, *(kind(text) for kind, text in zip(kinds, checked, strict=True))


def open_model_folder(folder: Path, variant: str | None, given: Given = NONE) -> Checkpoint:
    """A Stable Diffusion pipeline. variant: of its weights. given: parts in place of its own, which may then be
    missing. Raises CheckpointError for anything else."""
    index = read_json(folder / "model_index.json", optional=True)
    config = read_json(folder / "unet" / "config.json", optional=True)
    refuse_other_folder(folder, index, config, given)
    texts = text_parts(index, config)
    own: list[Part | None] = []
    for part, own_variant in component_variants(folder, variant, ("unet", "vae", *texts)).items():
        kind = part.removesuffix("_2")
        missing = given.replaces(kind) and not (folder / part).is_dir()
        own.append(None if missing else folder_part(folder / part, kind, own_variant))
    parts, configs = arranged(own, given, folder)
    networks = build_networks(configs, folder)
    with naming_path(folder):
        scheduler = folder_scheduler(index, read_json(folder / "scheduler" / "scheduler_config.json", optional=True))
    return Checkpoint(
        networks,
        tuple(part_weights(part, net) for part, net in zip(parts, networks, strict=True)),
        tuple(read_tokenizer(folder / tokenizer_of(part)) for part in texts),
        with_unet_scheduler(scheduler, given),
        has_sizes(config) and bool(index.get("force_zeros_for_empty_prompt", True)),
        bool(configs[1].get("force_upcast", True)),
    )


def folder_part(folder: Path, kind: str, variant: str | None) -> Part:
    """One network of a pipeline, or of a folder of its own. CheckpointError where its config or weights are missing."""
    config = read_json(folder / "config.json")
    return Part(kind, folder, open_folder(folder, "model" if kind == "text_encoder" else STEM, variant), config=config)


def component_variants(folder: Path, variant: str | None, parts: Sequence[str]) -> dict[str, str | None]:
    """The variant of each network that has it, and None for those whose plain weights are taken, with a warning of one
    line. CheckpointError for a variant that no network has."""
    having = [part for part in parts if variant is not None and any((folder / part).glob(f"*.{variant}.*"))]
    lacking = [part for part in parts if part not in having]
    if variant is not None and not having:
        there = variants(path for part in parts for path in (folder / part).glob("*.safetensors*"))
        raise CheckpointError(f"{folder}: no network has the variant {variant!r}; there are {there or 'none'}")
    if variant is not None and lacking:
        text = f"no variant {variant!r} of {', '.join(lacking)}, whose plain weights are taken"
        warnings.warn(f"{folder}: {text}", stacklevel=2)
    return {part: variant if part in having else None for part in parts}
