"""Shards: folders of arrays, each there whole or not at all, with a checksum of every file.

    <folder>/manifest.json    of each array: its SHA-256, its size in bytes, and `by`, what made it; `made`: with which
                              versions of the code, which no checksum and no comparison looks at
    <folder>/NAME.npy

A shard is written beside its place, synced to the disk and renamed into place. Two processes that make the same one do
no harm: it holds the same bytes, and the second finds it there.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segresearch import runs
from segresearch.errors import InputError

MANIFEST = "manifest.json"
TRIES = 5


@dataclass(frozen=True)
class Array:
    """An array and what made it: a name or a digest. One that something else made counts as missing."""

    value: np.ndarray
    by: str


class Damaged(InputError):
    """A shard whose bytes are not those that were written."""


def cut(count: int, size: int) -> list[range]:
    """0 to `count` in ranges of `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def name(rows: range) -> str:
    """The folder of a shard."""
    return f"{rows.start:07d}-{rows.stop:07d}"


def held(folder: Path) -> dict[str, str]:
    """What the shard holds: by what each array was made. {} where it is missing or cut short (sizes are looked at,
    not contents: `verify` does that)."""
    try:
        entries = _entries(folder)
        if all((folder / f"{key}.npy").stat().st_size == entry["bytes"] for key, entry in entries.items()):
            return {key: entry["by"] for key, entry in entries.items()}
    except (OSError, Damaged):
        pass
    return {}


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        given = json.loads((folder / MANIFEST).read_text())
        if given["sha256"] == _digest(_text(given["arrays"])):
            return given["arrays"]
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged(f"{folder / MANIFEST}: damaged; remove the folder, and the same command makes it again")


def load(folder: Path, key: str) -> np.ndarray:
    """One array, its checksum compared. Raises Damaged, OSError."""
    data = (folder / f"{key}.npy").read_bytes()
    if _digest(data) != _entries(folder)[key]["sha256"]:
        raise Damaged(f"{folder / key}.npy: not the bytes that were written; remove the folder {folder.name}, and the "
                      "same command makes it again")  # fmt: skip
    return np.load(io.BytesIO(data), allow_pickle=False)


def verify(folder: Path) -> str | None:
    """What is wrong with a shard, in words; None where every byte is as it was written."""
    if not folder.is_dir():
        return f"{folder}: missing"
    try:
        entries = _entries(folder)
        for key in entries:
            load(folder, key)
        strange = {path.name for path in folder.iterdir()} - {MANIFEST, *(f"{key}.npy" for key in entries)}
    except (OSError, Damaged) as error:
        return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return f"{folder}: holds {sorted(strange)[0]}, which is not a part of it" if strange else None


def made(folder: Path) -> dict[str, str]:
    """The versions that a shard was made with; {} where it does not say. Raises OSError, ValueError."""
    return json.loads((folder / MANIFEST).read_text()).get("made", {})


def commit(folder: Path, arrays: Mapping[str, Array], made: Mapping[str, str] | None = None) -> None:
    """Write a shard atomically, in the place of an older one if there is any. OSError leaves the older one.

    made: the versions it was made with, by name.
    """
    own = f"{socket.gethostname()}-{os.getpid()}.tmp"
    temporary = folder.with_name(f".{folder.name}.{own}")
    entries = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for key, array in sorted(arrays.items()):
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array.value), allow_pickle=False)
            data = buffer.getvalue()
            entries[key] = {"sha256": _digest(data), "bytes": len(data), "by": array.by}
            _write(temporary / f"{key}.npy", data)
        manifest = {"arrays": entries, "sha256": _digest(_text(entries)), "made": dict(made or {})}
        _write(temporary / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        _sync(temporary)
        _place(temporary, folder, own)
        _sync(folder.parent)
    except FileNotFoundError:  # swept away beside another process that has made it
        if not _same(folder, entries):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(temporary: Path, folder: Path, own: str) -> None:
    for attempt in range(TRIES):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == TRIES - 1:
                raise
        if _same(folder, json.loads((temporary / MANIFEST).read_text())["arrays"]):
            return
        old = folder.with_name(f".{folder.name}.old-{own}")
        try:
            os.rename(folder, old)
        except FileNotFoundError:
            continue  # another process is replacing it, too
        shutil.rmtree(old, ignore_errors=True)


def _same(folder: Path, entries: Mapping[str, Any]) -> bool:
    """Whether the shard at `folder` holds these arrays, byte for byte."""
    try:
        there = _entries(folder)
    except (OSError, Damaged):
        return False
    return bool(entries) and all(there.get(key) == entry for key, entry in entries.items()) and not verify(folder)


def sweep(place: Path) -> None:
    """Remove what processes of this machine that are gone left unfinished in `place`."""
    for path in place.glob(".*.tmp"):
        if runs.abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def sums(folder: Path, keys: Iterable[str]) -> list[str]:
    """The checksums of some arrays of a shard, as its manifest has them. Raises Damaged, OSError, KeyError."""
    entries = _entries(folder)
    return [entries[key]["sha256"] for key in keys]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _write(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
