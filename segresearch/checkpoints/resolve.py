"""Where the weights of a path or a name lie. Light: no torch."""

import re
from pathlib import Path

from segresearch.errors import CheckpointError

MINI = Path(__file__).parent.parent / "weights" / "mini"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointError for a file name of a pickled checkpoint."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: pickle checkpoints can run code when opened and are refused: convert it to .safetensors "
            "(where you trust its origin, load it once and save its tensors with safetensors.torch.save_file)"
        )


def located(path_or_name: str | Path) -> Path:
    """The folder or the file that is meant. Raises CheckpointError if there is none."""
    if str(path_or_name) == "mini":
        if not (MINI / "model_index.json").is_file():
            raise CheckpointError(
                f'"mini": {MINI} holds no model: install the package with its weights, or train it (experiments/mini)'
            )
        return MINI
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    name = str(path_or_name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (".safetensors", ".ckpt"):
        from huggingface_hub import constants, try_to_load_from_cache

        cached = try_to_load_from_cache(name, "model_index.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise CheckpointError(
            f"{name!r} is neither a path nor a complete model in the local cache ({constants.HF_HUB_CACHE}); fetch "
            f'it once with: hf download {name} --include "*.json" "*.txt" "*.safetensors"'
        )
    refuse_pickle(path)
    raise CheckpointError(
        f'{name}: no such file or folder; give a diffusers folder, a .safetensors file, a hub id or "mini"'
    )


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
        if not any((path / kind).is_file() for kind in ("config.json", "model_index.json")):
            raise CheckpointError(f"controlnet {name}: config.json is missing there; give a ControlNet's folder")
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
