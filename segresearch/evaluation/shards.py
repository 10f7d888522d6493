"""Shards: safetensors files of arrays, each file complete or absent, with a checksum of every array.

The header holds, for each array, its SHA-256 and its producer; the shard's place, which is its folder (named by the
method) and its name (the range of images); and the versions of the code that sampled the images, which no checksum and
no comparison looks at. A file in another place counts as damaged. A shard is written beside its final name, synced to
the disk and moved there. Two processes that write the same shard do no harm: both write the same bytes.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
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
    """A shard whose bytes are not those that were written there: uncaught, it ends a script with exit code 4."""

    def __init__(self, path: Path, fault: str):
        super().__init__(4, f"{path}: {fault}; remove the file, and the same command without stage= writes it again")
        self.path, self.fault = path, fault


def header(path: Path) -> dict[str, Any]:
    """arrays: of each its sha256 and its producer. versions: of the code that sampled the images, by package. place: as
    `place` says; a shard of an earlier version has none.

    Raises Damaged, OSError; contents are read by `load` and `verify` alone.
    """
    entry: Any = None
    try:
        with safe_open(path, "numpy") as file:  # refuses a file that is cut short
            entry = json.loads(file.metadata()[HEADER])
            summed = [entry["arrays"], entry["place"]] if "place" in entry else entry["arrays"]
            whole = entry["sha256"] == runs.digest(summed) and entry["arrays"].keys() == set(file.keys())
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(path, "damaged")
    if entry.get("place", place(path)) != place(path):
        raise Damaged(path, f"holds {entry['place']}, not what its name says")
    return entry


def place(path: Path) -> str:
    """What a shard holds by its path: the method's folder, whose name has the method's digest, and the range."""
    return f"{path.parent.name}/{path.stem}"


def unplaced(paths: Iterable[Path]) -> str:
    """A remark on shards of an earlier version, which do not say what they hold; "" where there are none."""
    count = sum("place" not in header(path) for path in paths)
    return f"{count} shards are of a version that did not note whose images they hold" if count else ""


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
        raise Damaged(path, f"{key}: not the bytes that were written")
    return value


def read(path: Path) -> None:
    """Every byte of a shard, compared. Raises Damaged, OSError."""
    for key in header(path)["arrays"]:
        load(path, key)


def verify(path: Path) -> str | None:
    """Reads every byte of a shard: what is wrong with it, or None."""
    if not path.is_file():
        return f"{path}: missing"
    try:
        read(path)
    except (OSError, Damaged) as error:
        return str(error) if isinstance(error, Damaged) else f"{path}: {error.strerror or error}"
    return None


def drop(error: Damaged) -> None:
    """Remove a damaged file, with a line on stderr, so that it counts as missing. Raises OSError."""
    print(f"{error.path}: {error.fault}; it is written again", file=sys.stderr, flush=True)
    error.path.unlink(missing_ok=True)


def drop_damaged(path: Path) -> None:
    """`drop` a file whose header is damaged or of another place; its contents are not read. Raises OSError."""
    try:
        header(path)
    except Damaged as error:
        drop(error)
    except OSError:
        pass  # missing


def write(
    path: Path, arrays: Mapping[str, Array], versions: Mapping[str, str] | None = None, placed: bool = True
) -> None:
    """Write a shard atomically, replacing an older one. OSError leaves the older one as it was.

    placed: False where it is not known whose the arrays are, since the shard that they come from had no place.
    """
    values = {key: np.ascontiguousarray(value) for key, (value, _) in arrays.items()}
    entries = {key: {"sha256": _sha256(values[key]), "producer": producer} for key, (_, producer) in arrays.items()}
    described: dict[str, Any] = {"arrays": entries, "versions": dict(versions or {})}
    if placed:
        described["place"] = place(path)
    described["sha256"] = runs.digest([entries, place(path)] if placed else entries)
    data = save(values, {HEADER: json.dumps(described, sort_keys=True)})
    with runs.replacing(path) as temporary:
        temporary.write_bytes(data)


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are gone; one that cannot be removed is left."""
    for path in filter(runs.abandoned, folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()


def _sha256(value: np.ndarray) -> str:
    return hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
