"""The JSON files beside weights, and what git-lfs leaves in place of a file. Light: no torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segresearch.errors import CheckpointError

LARGEST = 64 << 20  # bytes
DEEPEST = 60  # levels; configs have 3, a tokenizer.json 7


def refuse_pointer(path: Path) -> None:
    """CheckpointError for what git-lfs left in place of the file."""
    with path.open("rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            hint = "run `git lfs pull` in its repository, or download the file itself"
            raise CheckpointError(f"{path} is a git-lfs pointer: {hint}")


def refuse_large(path: Path) -> None:
    """CheckpointError for a file that is larger than any that is read whole."""
    if (size := path.stat().st_size) > LARGEST:
        limit = f"{size:,} bytes, the largest such file has {LARGEST:,}"
        raise CheckpointError(f"{path}: {limit}: it is something else, fetch it again")


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A config; {} for an optional one that is missing. CheckpointError for another that is missing, a git-lfs pointer,
    too large or nested, or not a JSON object."""
    if not path.is_file():
        if optional:
            return {}
        raise CheckpointError(f"{path} is missing: fetch the model again, with its configs")
    refuse_pointer(path)
    refuse_large(path)
    return mapping(path.read_text(errors="replace"), str(path))


def mapping(text: str, place: str) -> dict[str, Any]:
    """A JSON object. place: where it stands, for the CheckpointError of a text that is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{place} is not a mapping: fetch it again")
    level: list[Any] = [value]
    depth = 1
    while level := [item for node in level for item in items(node) if isinstance(item, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise CheckpointError(f"{place} is nested in more than {DEEPEST} levels: fetch it again")
    return value


def items(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """The values of a JSON object or array."""
    return node.values() if isinstance(node, dict) else node
