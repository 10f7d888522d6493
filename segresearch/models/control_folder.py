"""ControlNets on disk, in the diffusers folder layout: where a name lies, what is there, whether it fits the UNet."""

from collections.abc import Sequence
from pathlib import Path

import torch

from segresearch.errors import CheckpointError
from segresearch.models.checkpoint import open_weights
from segresearch.models.controlnet import ControlNet, ControlNetConfig
from segresearch.models.layouts import Weights, read_json
from segresearch.models.locate import located_controlnet
from segresearch.models.network_configs import EncoderConfig

STEM = "diffusion_pytorch_model"
Asked = str | Path | Sequence[str | Path] | None


def open_controlnets(asked: Asked, model: Path, variant: str | None) -> dict[str, tuple[ControlNet, Weights]]:
    """The ControlNets asked for, by the names they were asked by, still on the meta device, with their weights.

    model: the folder of the SDXL, whose own ones lie in controlnet/. variant: of the weights, where there are such.
    Raises CheckpointError for what is not a ControlNet of SDXL, or asked twice.
    """
    several = [] if asked is None else [asked] if isinstance(asked, str | Path) else list(asked)
    names = [str(name) for name in several]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(f"controlnet {twice[0]!r} is asked for twice: load it once")
    return {name: _opened(located_controlnet(name, model), variant) for name in names}


def _opened(folder: Path, variant: str | None) -> tuple[ControlNet, Weights]:
    for other in ("model_index.json", "unet/config.json"):
        if (folder / other).is_file():
            raise CheckpointError(
                f"{folder} is a whole model, not a ControlNet: give a folder with a ControlNet's config.json"
            )
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            net = ControlNet(ControlNetConfig.from_dict(config))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from error
    there = variant is not None and any(folder.glob(f"{STEM}*.{variant}.*"))
    entries = open_weights(folder, STEM, variant if there else None)
    if "task_embedding" in entries or any(key.startswith("control_add_embedding.") for key in entries):
        raise CheckpointError(f"{folder}: a union of ControlNets is not supported: give one for a single kind of image")
    return net, Weights(entries, None, f"controlnet {folder.name}")


def check_fit(name: str, net: ControlNetConfig, unet: EncoderConfig, vae_factor: int) -> None:
    """Raises CheckpointError, naming both values, for a ControlNet made for another model than this one."""
    facts = (
        ("latent channels", net.in_channels, "UNet", unet.in_channels),
        ("level widths", net.block_out_channels, "UNet", unet.block_out_channels),
        ("layers per level", net.layers_per_block, "UNet", unet.layers_per_block),
        ("text width", net.cross_attention_dim, "UNet", unet.cross_attention_dim),
        ("pooled text width", net.pooled_dim, "UNet", unet.pooled_dim),
        ("image pixels per latent pixel", net.image_factor, "VAE", vae_factor),
    )
    for what, mine, other, its in facts:
        if mine != its:
            raise CheckpointError(
                f"controlnet {name!r}: {what}: {mine} in the ControlNet, {its} in the {other}: it was made for another "
                "model"
            )
