"""What a path, a name or a hub id stands for: the files of a model or of a ControlNet. Light: no torch."""

import re
from pathlib import Path

from segresearch.checkpoints.refusals import refuse_pickle
from segresearch.errors import CheckpointError

MINI = Path(__file__).parent.parent / "weights" / "mini"


def resolve_model(path_or_name: str | Path) -> Path:
    """The folder or the single file of a model: "mini", a path, or a hub id in the local cache.

    Raises CheckpointError if there is none.
    """
    name = str(path_or_name)
    if name == "mini":
        if not (MINI / "model_index.json").is_file():
            raise CheckpointError(
                f'"mini": {MINI} holds no model: install the package with its weights, or train it (experiments/mini)'
            )
        return MINI
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    refuse_pickle(path)
    if path.suffix != ".safetensors" and _is_hub_id(name):
        return _cached(name, "model_index.json", f"{name!r} is neither a path nor a complete model", '"*.txt" ')
    raise CheckpointError(
        f'{name}: no such file or folder; give a diffusers folder, a .safetensors file, a hub id or "mini"'
    )


def resolve_controlnet(name: str, model: Path) -> Path:
    """The folder of a ControlNet: a name in the model's own controlnet/, a path, or a hub id in the local cache.

    Raises CheckpointError, listing the model's own ones, if there is none.
    """
    own = {path.parent.name: path.parent for path in sorted((model / "controlnet").glob("*/config.json"))}
    if name in own:
        return own[name]
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / kind).is_file() for kind in ("config.json", "model_index.json")):
            raise CheckpointError(f"controlnet {name}: config.json is missing there; give a ControlNet's folder")
        return path
    refuse_pickle(path)
    if path.is_file():
        raise CheckpointError(f"controlnet {name}: give its folder in the diffusers layout, with config.json")
    if _is_hub_id(name):
        return _cached(name, "config.json", f"controlnet {name!r} is neither a path nor")
    has = f"the model has {', '.join(own)}" if own else f"the model {model} has none of its own"
    raise CheckpointError(f"unknown controlnet {name!r}: {has}; or give a diffusers folder or a hub id")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _cached(name: str, file: str, problem: str, more: str = "") -> Path:
    """The folder of a hub id's `file` in the local cache; CheckpointError with the problem and the command to fetch."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(name, file)
    if isinstance(path, str):
        return Path(path).parent
    raise CheckpointError(
        f"{problem} in the local cache ({constants.HF_HUB_CACHE}); fetch it once with: "
        f'hf download {name} --include "*.json" {more}"*.safetensors"'
    )
