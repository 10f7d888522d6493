"""Weights that others published: found where they lie, checked by their SHA-256, never fetched.

A file is looked for at the path that is given, else in the caches its publisher's own tools fill. The checksum is the
one given, else the published one; the digest that was read is a part of every result.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from segresearch.errors import CheckpointError

Module = TypeVar("Module", bound=nn.Module)
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Asset:
    """A published file: its name, address, SHA-256 (or the first digits of it, where only those are published).

    package: an installed package and the folder in it that holds the file; else it lies in torch.hub's cache.
    """

    file: str
    url: str
    sha256: str
    package: tuple[str, str] | None = None

    @property
    def home(self) -> Path | None:
        """The folder where the file is looked for; None where its package is not installed."""
        if self.package is None:
            return Path(torch.hub.get_dir()) / "checkpoints"
        spec = find_spec(self.package[0])
        return Path(spec.submodule_search_locations[0]) / self.package[1] if spec else None  # type: ignore[index]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked(path: Path, sha256: str) -> str:
    """The digest of `path`, which begins with `sha256`; CheckpointError where it does not."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise CheckpointError(f"sha256={sha256!r}: give 64 hexadecimal digits in lower case, or at least the first 8")
    found = digest(path)
    if not found.startswith(sha256):
        raise CheckpointError(
            f"{path}: its SHA-256 is {found}, not {sha256}: fetch it again, or give this checksum (sha256=, "
            "of an evaluation checksums.<network>=) if this file is the one you mean"
        )
    return found


def tensors(asset: Asset, path: str | Path | None = None, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of an asset, and the SHA-256 of the file.

    Pickles are opened by torch's weights-only reader, which runs no code of theirs. Raises CheckpointError for a file
    that is missing, has another checksum, or cannot be read.
    """
    if path is None:
        home = asset.home
        if home is None or not (home / asset.file).is_file():
            package = asset.package[0] if asset.package else None
            how = f"pip install {package}" if package else f"download {asset.url} to {home}"
            raise CheckpointError(
                f"{asset.file} is not in {home or f'the package {package}, which is not installed'}: {how}, "
                f"or give the path of the file (from {asset.url})"
            )
        found = home / asset.file
    else:
        found = Path(path).expanduser()
        if not found.is_file():
            raise CheckpointError(f"{path}: no such file; {asset.file} is at {asset.url}")
    known = checked(found, sha256 or asset.sha256)
    try:
        if found.suffix == ".safetensors":
            return load_file(found), known
        held = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader says of a damaged file
        raise CheckpointError(f"{found}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise CheckpointError(f"{found}: does not hold named tensors only; {asset.file} is at {asset.url}")
    return dict(held), known


def put(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Fill a module that was built on the meta device; CheckpointError where names or shapes do not fit."""
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{what}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error


def frozen(module: Module, device: torch.device | str, dtype: torch.dtype) -> Module:
    """In place, on its device, for evaluation only."""
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def hub_folder(path_or_id: str | Path, sha256: str | None = None) -> tuple[Path, str]:
    """A folder with config.json and weights, given as a path or as a hub id in the local cache; the weights' SHA-256.

    Checked against `sha256`, else against the digest under which the hub's cache keeps the file, where it does.
    """
    folder = Path(path_or_id).expanduser()
    name = str(path_or_id)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise CheckpointError(
                f"{name}: no such folder; give one with config.json and model.safetensors, or a hub id"
            )
        from huggingface_hub import constants, try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise CheckpointError(
                f"{name} is neither a folder nor in the local cache ({constants.HF_HUB_CACHE}); fetch it once with: "
                f'hf download {name} --include "*.json" "*.txt" "model.safetensors" "pytorch_model.bin"'
            )
        folder = Path(cached).parent
    for file in HUB_WEIGHTS:
        if (folder / file).is_file() and (folder / "config.json").is_file():
            kept = Path(os.path.realpath(folder / file)).name
            known = sha256 or (kept if re.fullmatch(r"[0-9a-f]{64}", kept) else None)
            return folder, checked(folder / file, known) if known else digest(folder / file)
    raise CheckpointError(f"{folder}: needs config.json and one of {', '.join(HUB_WEIGHTS)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars and reports; what matters of them is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def pretrained(build: Callable[..., Any], folder: Path, **extra: Any) -> Any:
    """`build(folder)`, a from_pretrained of transformers, offline; CheckpointError where weights do not fit."""
    try:
        with _quiet():
            made, report = build(
                str(folder),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                **extra,
            )
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    name = type(made).__name__
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise CheckpointError(f"{folder}: {name} misses {len(lacking)} weights, such as {lacking[0]}")
    if report["mismatched_keys"]:
        key, held, wanted = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(f"{folder}: {key} is {tuple(held)}, {name} needs {tuple(wanted)} by config.json")
    return made
