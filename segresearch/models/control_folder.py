"""ControlNets on disk, in the diffusers folder layout: where a name lies, what is there, whether it fits the UNet."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from segresearch.models.checkpoint import open_weights
from segresearch.models.controlnet import ControlNet, ControlNetConfig
from segresearch.models.encoder import EncoderConfig
from segresearch.models.layouts import Weights, read_json
from segresearch.models.locate import CheckpointError, refuse_pickle

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


def located_controlnet(name: str, model: Path) -> Path:
    """The folder of a ControlNet: a name in the model's own folder, a path, or a hub id in the local cache.

    Raises CheckpointError, listing the model's own ones, if there is none.
    """
    own = model / "controlnet" if model.is_dir() else None
    known = sorted(p.parent.name for p in own.glob("*/config.json")) if own else []
    if own and name in known:
        return own / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    refuse_pickle(path)
    if path.is_file():
        raise CheckpointError(f"controlnet {name}: give its folder in the diffusers layout, with config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import constants, try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise CheckpointError(
            f"controlnet {name!r} is neither a path nor in the local cache ({constants.HF_HUB_CACHE}); fetch it once "
            f'with: hf download {name} --include "*.json" "*.safetensors"'
        )
    has = f"the model has {', '.join(known)}" if known else f"the model {model} has none of its own"
    raise CheckpointError(f"unknown controlnet {name!r}: {has}; or give a diffusers folder or a hub id")


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
