"""Shards: safetensors files of arrays, each file complete or absent, with a checksum of every array.

The header holds, for each array, its SHA-256 and its producer; and the versions of the code that sampled the images,
which no checksum and no comparison looks at. A shard is written beside its final name, synced to the disk and moved
there. Two processes that write the same shard do no harm: both write the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from segresearch import runs
from segresearch.errors import Ended

HEADER = "shard"  # one key, since safetensors keeps no order of several


class Array(NamedTuple):
    """An array and its producer: a name, or a digest of the weights that it was computed with."""

    value: np.ndarray
    producer: str


class Damaged(Ended):
    """A shard whose bytes are not those that were written: uncaught, it ends a script with exit code 4."""

    def __init__(self, message: str):
        super().__init__(4, f"{message}; remove the file, and the same command writes it again")


def header(path: Path) -> dict[str, Any]:
    """arrays: of each its sha256 and its producer. versions: of the code that sampled the images, by package.

    Raises Damaged, OSError; contents are read by `load` and `verify` alone.
    """
    try:
        with safe_open(path, "numpy") as file:  # refuses a file that is cut short
            entry = json.loads(file.metadata()[HEADER])
            if entry["sha256"] == runs.digest(entry["arrays"]) and entry["arrays"].keys() == set(file.keys()):
                return entry
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Damaged(f"{path}: damaged")


def producers(path: Path) -> dict[str, str]:
    """The producer of each array in a shard; {} where it is missing or cut short."""
    try:
        return {key: entry["producer"] for key, entry in header(path)["arrays"].items()}
    except (OSError, Damaged):
        return {}


def load(path: Path, key: str) -> np.ndarray:
    """One array, its checksum compared. Raises Damaged, OSError."""
    checksum = header(path)["arrays"][key]["sha256"]
    with safe_open(path, "numpy") as file:
        value = file.get_tensor(key)
    if _sha256(value) != checksum:
        raise Damaged(f"{path}: {key}: not the bytes that were written")
    return value


def verify(path: Path) -> str | None:
    """Reads every byte of a shard: what is wrong with it, or None."""
    if not path.is_file():
        return f"{path}: missing"
    try:
        for key in header(path)["arrays"]:
            load(path, key)
    except (OSError, Damaged) as error:
        return str(error) if isinstance(error, Damaged) else f"{path}: {error.strerror or error}"
    return None


def write(path: Path, arrays: Mapping[str, Array], versions: Mapping[str, str] | None = None) -> None:
    """Write a shard atomically, replacing an older one. OSError leaves the older one as it was."""
    values = {key: np.ascontiguousarray(value) for key, (value, _) in arrays.items()}
    entries = {key: {"sha256": _sha256(values[key]), "producer": producer} for key, (_, producer) in arrays.items()}
    described = {"arrays": entries, "sha256": runs.digest(entries), "versions": dict(versions or {})}
    data = save(values, {HEADER: json.dumps(described, sort_keys=True)})
    with runs.replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            raise


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are gone."""
    for path in filter(runs.abandoned, folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def _sha256(value: np.ndarray) -> str:
    return hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
