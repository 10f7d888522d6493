"""The JSON files beside weights, and what git-lfs leaves in place of a file. Light: no torch."""

import json
from pathlib import Path
from typing import Any

from segresearch.errors import CheckpointError


def refuse_pointer(path: Path) -> None:
    """CheckpointError for what git-lfs left in place of the file."""
    with path.open("rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            hint = "run `git lfs pull` in its repository, or download the file itself"
            raise CheckpointError(f"{path} is a git-lfs pointer: {hint}")


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A config; {} for an optional one that is missing. CheckpointError for another that is missing, a git-lfs pointer
    or not a JSON object."""
    if not path.is_file():
        if optional:
            return {}
        raise CheckpointError(f"{path} is missing: fetch the model again, with its configs")
    refuse_pointer(path)
    return mapping(path.read_text(errors="replace"), str(path))


def mapping(text: str, place: str) -> dict[str, Any]:
    """A JSON object. place: where it stands, for the CheckpointError of a text that is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{place} is not a mapping: fetch it again")
    return value
