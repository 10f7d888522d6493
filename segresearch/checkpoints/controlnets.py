"""ControlNets by name, by path and by hub id: in the diffusers folder layout, or as one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segresearch.checkpoints.controlnet_file import open_controlnet_file
from segresearch.checkpoints.folder import STEM, building
from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.resolve import resolve_controlnet
from segresearch.checkpoints.tensors import Weights, open_folder
from segresearch.errors import CheckpointError
from segresearch.models.controlnet import ControlNet
from segresearch.models.controlnet_union import ControlNetUnion, UnionConfig
from segresearch.models.network_configs import ControlNetConfig, EncoderConfig

Names = str | Path | Sequence[str | Path] | None  # of ControlNets


def open_controlnets(
    names: Names, model: Path, variant: str | None, unet: EncoderConfig
) -> dict[str, tuple[ControlNet, Weights]]:
    """The ControlNets of these names, in their order, still on the meta device, with their weights. model: the model,
    whose own ones lie in its controlnet/. variant: of the weights, where there are such. unet: the model's.
    CheckpointError for what is not a ControlNet of a UNet, or is named twice."""
    opened: dict[str, tuple[ControlNet, Weights]] = {}
    for name in map(str, [names] if isinstance(names, str | Path) else names or ()):
        if name in opened:
            raise CheckpointError(f"controlnet {name!r} is named twice: load it once")
        path = resolve_controlnet(name, model)
        opened[name] = open_file(path, unet) if path.is_file() else open_folder_of(path, variant)
    return opened


def open_file(path: Path, unet: EncoderConfig) -> tuple[ControlNet, Weights]:
    """One file. A config.json beside one of diffusers' file names is its own."""
    beside = path.with_name("config.json")
    own = path.name.startswith(STEM) and beside.is_file()
    with building(path):
        given = read_config(read_json(beside)) if own else None
        config, weights = open_controlnet_file(path, unet, given)
        return built(config, weights), weights


def built(config: ControlNetConfig, weights: Weights) -> ControlNet:
    """The network of these weights: a union of ControlNets has an embedding of its kinds."""
    kinds = weights.entries.get("task_embedding")
    if kinds is None:
        return ControlNet(config)
    layers = {key.split(".")[1] for key in weights.entries if key.startswith("transformer_layes.")}
    return ControlNetUnion(UnionConfig(**vars(config), kinds=kinds.shape[0], layers=len(layers)))


def open_folder_of(folder: Path, variant: str | None) -> tuple[ControlNet, Weights]:
    """A folder in the diffusers layout."""
    if any((folder / file).is_file() for file in ("model_index.json", "unet/config.json")):
        raise CheckpointError(f"{folder} is a whole model, not a ControlNet: give the folder of a ControlNet")
    config = read_json(folder / "config.json")
    has_variant = variant is not None and any(folder.glob(f"{STEM}*.{variant}.*"))
    weights = Weights(f"controlnet {folder.name}", open_folder(folder, STEM, variant if has_variant else None))
    with building(folder):
        return built(read_config(config), weights), weights


def read_config(config: dict[str, Any]) -> ControlNetConfig:
    """Sizes from a config.json, also of a union of ControlNets, whose own sizes its weights tell."""
    union = "Union" in str(config.get("_class_name")) or config.get("num_control_type")
    own = ("_class_name", "num_control_type") if union else ()
    return ControlNetConfig.from_dict({key: value for key, value in config.items() if key not in own})
