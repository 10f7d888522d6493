"""What a path, a name or a hub id stands for: the files of a model or of a ControlNet. Light: no torch."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from segresearch.errors import CheckpointError

MINI = Path(__file__).parent.parent / "weights" / "mini"
UNQUANTISED = "give its fp16, bf16, fp32 or fp8 weights in .safetensors files"


def refuse_pickle(path: Path) -> None:
    """CheckpointError for the file name of a pickled checkpoint, of a quantised one, and for a pipe or a device."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: not a file but a pipe or a device; give a .safetensors file or a folder")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        convert = "where you trust its origin, load it once and save its tensors with safetensors.torch.save_file"
        fault = "pickle checkpoints can run code when opened and are refused: convert it to .safetensors"
        raise CheckpointError(f"{path}: {fault} ({convert})")
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: GGUF weights are quantised and not supported: {UNQUANTISED}")


def resolve_model(path_or_name: str | Path) -> Path:
    """The folder or the single file of a model: "mini", a path, or a hub id in the local cache."""
    name = str(path_or_name)
    if name == "mini":
        if not (MINI / "model_index.json").is_file():
            hint = "install the package with its weights, or train it (experiments/mini)"
            raise CheckpointError(f'"mini": {MINI} holds no model: {hint}')
        return MINI
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    refuse_pickle(path)
    if path.exists():
        return path
    if path.suffix != ".safetensors":
        if folder := cached_folder(name, "model_index.json", "a complete model ", ("*.txt", "*.fp16.safetensors")):
            return folder
    hint = 'give a diffusers folder, a .safetensors file, a hub id or "mini"'
    raise CheckpointError(f"{name}: no such file or folder; {hint}")


def resolve_controlnet(name: str, model: Path) -> Path:
    """The folder or the file of a ControlNet: a name in the model's own controlnet/, a path, or a hub id in the local
    cache. CheckpointError, listing the model's own ones, if there is none."""
    home = model / "controlnet"
    own = {path.stem: path for path in sorted(home.glob("*.safetensors"))}
    own |= {path.parent.name: path.parent for path in sorted(home.glob("*/config.json"))}
    if name in own:
        return own[name]
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / kind).is_file() for kind in ("config.json", "model_index.json")):
            raise CheckpointError(f"controlnet {name}: config.json is missing there; give a ControlNet's folder")
        return path
    refuse_pickle(path)
    if path.is_file():
        return path
    if name.lower().startswith("reference"):
        raise CheckpointError(f"controlnet {name!r}: reference-only is no network but a change of attention, not here")
    if folder := cached_folder(name, "config.json"):
        return folder
    has = f"the model has {', '.join(own)}" if own else f"the model {model} has none of its own"
    raise CheckpointError(f"unknown controlnet {name!r}: {has}; or give a diffusers folder, a file or a hub id")


def resolve_network(name: str, model: Path) -> Path:
    """The folder of a UNet in the model's folder, by its name, or any UNet's folder or whole model, by its path."""
    for path in (model / name, Path(name).expanduser()):
        if (path / "config.json").is_file():
            return path
    return resolve_model(name)


def resolve_part(name: str | Path, kind: str) -> Path:
    """The file, or the folder of a component or of a whole model, that a part is taken from: a path, or a hub id in the
    local cache. kind: the setting, for messages."""
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    refuse_pickle(path)
    if path.suffix != ".safetensors":
        with contextlib.suppress(CheckpointError):  # of a whole model
            if folder := cached_folder(str(name), "model_index.json"):
                return folder
        if folder := cached_folder(str(name), "config.json"):
            return folder
    raise CheckpointError(f"{kind}={str(name)!r}: no such file or folder; give one, or a hub id")


def part_paths(name: str | Path, kind: str) -> list[Path]:
    """The file that a part is read from, or the folders of components: the path itself or those of a whole model. kind:
    "unet", "vae" or "text_encoder", of which a model may have two."""
    path = resolve_part(name, kind)
    if path.is_file() or (path / "config.json").is_file():
        return [path]
    folders = [path / part for part in (kind, f"{kind}_2") if (path / part / "config.json").is_file()]
    if not folders:
        hint = "give a folder with config.json, a whole model, or a file"
        raise CheckpointError(f"{kind}={str(name)!r}: no {kind} in this folder: {hint}")
    return folders


def cached_folder(name: str, file: str, kind: str = "", files: Sequence[str] = ("*.safetensors",)) -> Path | None:
    """The folder of a hub id in the local cache, which has `file`; None for what is no hub id, else CheckpointError,
    with the call that fetches its configs and `files` (patterns)."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    try:
        path = try_to_load_from_cache(name, file)
    except HFValidationError:  # such as ./folder
        return None
    if isinstance(path, str):
        return Path(path).parent
    problem = f"neither a path nor {kind}in the local cache ({constants.HF_HUB_CACHE})"
    plain = "" if "*.safetensors" in files else ' (where it has no fp16 files, "*.safetensors")'
    raise CheckpointError(f"{name!r} is {problem}; fetch it once with: {fetching(name, '*.json', *files)}{plain}")


def fetching(name: str, *patterns: str) -> str:
    """The call of `hf` (1.0 or newer, which takes an --include a pattern) for files of a repository."""
    return " ".join([f"hf download {name}", *(f'--include "{pattern}"' for pattern in patterns)])
