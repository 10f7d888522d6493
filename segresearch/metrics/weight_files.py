"""Published weights of metrics: located, checked by their SHA-256, read. Nothing is fetched.

A file is taken from the path that is given, else from the cache that its publisher's own tools fill. The checksum is
the given one, else the published one. The digest that was read is a part of every result.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from segresearch.errors import CheckpointError
from segresearch.pretrained import model_folder

Device = torch.device | str
INSTALL = "pip install 'segresearch[metrics]'"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Asset(NamedTuple):
    """A published file: its name, the address of its folder, and its SHA-256 or the first digits of it."""

    file: str
    folder: str
    sha256: str


def digest(path: Path, sha256: str | None = None) -> str:
    """SHA-256 of a file, in hexadecimal. Raises CheckpointError where it does not begin with `sha256`."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise CheckpointError(f"sha256={sha256!r}: give 64 hexadecimal digits in lower case, or at least the first 8")
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if not actual.startswith(sha256 or ""):
        raise CheckpointError(
            f"{path}: its SHA-256 is {actual}, not {sha256}: fetch it again, or give this checksum (sha256=, "
            "of an evaluation checksums.<network>=) if this file is the one you mean"
        )
    return actual


def load_tensors(
    asset: Asset, path: str | Path | None = None, sha256: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of an asset, and the SHA-256 of the file. path: None looks in torch.hub's cache.

    Pickles are opened by torch's weights-only reader, which runs no code of theirs. Raises CheckpointError for a file
    that is missing, has another checksum, or cannot be read.
    """
    file = Path(path).expanduser() if path else Path(torch.hub.get_dir()) / "checkpoints" / asset.file
    url = asset.folder + asset.file
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; download {url} there, or give its path")
    actual = digest(file, sha256 or asset.sha256)
    try:
        if file.suffix == ".safetensors":
            return load_file(file), actual
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds for a damaged file
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: does not hold named tensors only; {asset.file} is at {url}")
    return dict(tensors), actual


@contextmanager
def fitting(source: str | Path) -> Iterator[None]:
    """A `with` block around a load_state_dict; CheckpointError where the weights of `source` do not fit."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{source}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error


def frozen(module: Any, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The same module on its device, for evaluation only."""
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def hub_weights(path_or_id: str | Path, sha256: str | None = None) -> tuple[Path, str]:
    """A folder with config.json and weights, given as a path or as a hub id in the local cache; the weights' SHA-256.

    Checked against `sha256`, else against the digest under which the hub's cache keeps the file, where it does.
    """
    folder = model_folder(path_or_id, ["config.json"], HUB_WEIGHTS)
    file = next(folder / name for name in HUB_WEIGHTS if (folder / name).is_file())
    blob = Path(os.path.realpath(file)).name
    return folder, digest(file, sha256 or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None))
