"""Content-addressed run folders: a run's settings name its folder, so the same command again is the resume. Files are
written beside their final name and moved there, so that none is ever seen half-written."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from segresearch import __version__
from segresearch.errors import ConfigError

EDGE, SAMPLES = 1 << 16, 16  # of a weight file's fingerprint: bytes of each end, parts of 4 KiB between
LATER = MappingProxyType({"later": True})  # of a field that `plain` leaves out at its default: identities stay
RESERVED = ("shards", "reference", "wandb", "latest")  # folders of `out` that hold no runs


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and paths as what JSON and YAML can hold; infinities become "inf", "-inf". A
    field with the metadata LATER is left out at its default: a setting that came later changes no old run."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {f.name: plain(item) for f, item in items if "later" not in f.metadata or item != f.default}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    infinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if infinite or isinstance(value, Path) else value


def digest(value: Any) -> str:
    """12 hex digits that depend on the content of `value` alone, not on the order of mappings."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_folder(out: str | Path, name: str, identity: Mapping[str, Any]) -> Path:
    """The folder `out`/`name`/<digest of `identity`>, not created. ConfigError for a name that cannot name a folder, or
    that of a folder with another use (RESERVED)."""
    parts = name.split("/")
    if parts[0] in RESERVED or not all(re.fullmatch(r"\w[\w.+ -]{0,99}", part) for part in parts):
        raise ConfigError(f"name: {name!r} cannot name the folder of a run; use at most 100 letters, digits, _ and -")
    return Path(out) / name / digest(identity)


def create(folder: Path) -> None:
    """A folder that is to be written to, created where it is missing. OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "not writable", str(folder))


def abandoned(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file of `replacing` is gone; False for one of another machine."""
    number = re.search(rf"\.{re.escape(socket.gethostname())}-(\d+)\.tmp$", temporary.name)
    return number is not None and os.path.exists("/proc/self") and not os.path.exists(f"/proc/{number[1]}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, at the end of the block synced to the disk and moved onto it, so that a loss of
    power leaves no empty file; removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename in (None, str(temporary)):  # a write names no file, as where the disk is full
            error.filename, error.filename2 = str(path), None
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(out: str | Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the lock `name` below `out` within the block. wait: for another process that has it, on
    this machine or another; the lock ends with its process, however that ends. True where the disk has no locks."""
    path = Path(out) / ".locks" / digest(name)
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except (ImportError, OSError):
        yield True
        return
    with file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = wait
            if wait:
                print(f"another process works on {name}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield held


def write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically; a file that already holds just that is left alone."""
    data = content.encode() if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def fingerprint(path: str | Path) -> str:
    """A cheap identity of model weights, 12 hex digits, whatever their folder. FileNotFoundError without weights.

    Of each safetensors file: name, size, both ends and 16 parts between. Of each JSON or text file of a model folder
    (configs, vocabularies) and of the yaml beside a single file: everything. ControlNets in controlnet/ have their own.
    """
    path, total = Path(path), hashlib.sha256()
    contents = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [f for f in contents if f.is_file() and f.relative_to(path).parts[:1] != ("controlnet",)]
    if not any(f.suffix == ".safetensors" for f in files):
        raise FileNotFoundError(2, "no safetensors weights here", str(path))
    if path.is_file() and (beside := path.with_suffix(".yaml")).is_file():
        total.update(beside.read_bytes())
    for file in (f for f in files if f == path or f.suffix in (".safetensors", ".json", ".txt")):
        size = file.stat().st_size
        total.update(f"{file.relative_to(path) if file != path else 'file'} {size}\n".encode())
        between = [(size * i // (SAMPLES + 1), 4096) for i in range(1, SAMPLES + 1)]
        sampled = file.suffix == ".safetensors" and size > 4 * EDGE
        with file.open("rb") as stream:
            for start, count in [(0, EDGE), (size - EDGE, EDGE), *between] if sampled else [(0, size)]:
                stream.seek(start)
                total.update(stream.read(count))
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of segresearch ("code") and torch."""
    return {"code": code_version(), "torch": version("torch")}


@cache
def code_version() -> str:
    """The package's version, and in a git checkout the commit, with "+changed" if tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changed"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            commit = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=30, check=True)
            return f"{__version__}+git.{commit.stdout.strip()}"
    return __version__
