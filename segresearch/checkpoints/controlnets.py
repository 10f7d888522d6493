"""ControlNets by name, by path and by hub id: in the diffusers folder layout, or as one file."""

from collections.abc import Sequence
from pathlib import Path

from segresearch.checkpoints.controlnet_file import open_controlnet_file
from segresearch.checkpoints.folder import STEM, building, read_json
from segresearch.checkpoints.resolve import resolve_controlnet
from segresearch.checkpoints.tensors import Weights, open_folder
from segresearch.errors import CheckpointError
from segresearch.models.controlnet import ControlNet
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
        given = ControlNetConfig.from_dict(read_json(beside)) if own else None
        config, weights = open_controlnet_file(path, unet, given)
        return ControlNet(config), weights


def open_folder_of(folder: Path, variant: str | None) -> tuple[ControlNet, Weights]:
    """A folder in the diffusers layout."""
    if any((folder / file).is_file() for file in ("model_index.json", "unet/config.json")):
        raise CheckpointError(f"{folder} is a whole model, not a ControlNet: give the folder of a ControlNet")
    config = read_json(folder / "config.json")
    with building(folder):
        net = ControlNet(ControlNetConfig.from_dict(config))
    has_variant = variant is not None and any(folder.glob(f"{STEM}*.{variant}.*"))
    entries = open_folder(folder, STEM, variant if has_variant else None)
    if any(key.startswith(("task_embedding", "control_add_embedding.")) for key in entries):
        raise CheckpointError(f"{folder}: a union of ControlNets is not supported: give one for a kind of image")
    return net, Weights(f"controlnet {folder.name}", entries)
