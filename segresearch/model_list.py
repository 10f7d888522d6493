"""The models that can be named here: configs of the group `model`, and whole models in the local hub cache.

A line each, for `segresearch models`. Light: no torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path


def configured() -> Iterator[str]:
    """A line for each config of the group `model`: its name, its path, and whether that is here."""
    from omegaconf import OmegaConf

    from segresearch.checkpoints.resolve import resolve_model
    from segresearch.config import conf_dir
    from segresearch.errors import CheckpointError

    yield "model=NAME of the configs:"
    for file in sorted((conf_dir() / "model").glob("*.yaml")):
        path = str(OmegaConf.select(OmegaConf.load(file), "path"))
        try:
            state = "missing" if path == "???" else f"here ({resolve_model(path)})"
        except CheckpointError as error:
            state = f"not here: {error}"
        about = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        yield f"  {file.stem:12} {path:45} {state}\n  {'':12} {about}"


def cached(folder: Path | None = None) -> Iterator[str]:
    """A line for each model of the hub cache that says in model_index.json what it is."""
    from huggingface_hub import constants

    place = folder or Path(constants.HF_HUB_CACHE)
    yield f"model.path=ID of the local hub cache ({place}):"
    count = 0
    for index in sorted(place.glob("models--*/snapshots/*/model_index.json")):
        try:
            kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            kind = "a model_index.json that cannot be read"
        name = index.parts[-4].removeprefix("models--").replace("--", "/")
        files = [path for path in index.parent.rglob("*.safetensors")]
        size = sum(path.stat().st_size for path in files if path.exists()) / 2**30
        yield f"  {name:45} {kind}, {len(files)} weight files, {size:.1f} GiB"
        count += 1
    if not count:
        yield "  none; `hf download ID` fetches one"
