"""Published weights of other networks than SDXL's: located, checked by their SHA-256, read. Nothing is fetched: a file
is taken from the given path, else from the cache that its publisher's own tools fill. The checksum is the given one,
else the published one. The digest that was read is a part of every result."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor

from segresearch.checkpoints.resolve import cached_folder
from segresearch.errors import CheckpointError

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
        hint = "(sha256=, of an evaluation checksums.<network>=) if this file is the one you mean"
        problem = f"its SHA-256 is {actual}, not {sha256}: fetch it again"
        raise CheckpointError(f"{path}: {problem}, or give this checksum {hint}")
    return actual


def load_tensors(asset: Asset, path: str | Path | None, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of an asset, and the SHA-256 of the file. path: None looks in torch.hub's cache. CheckpointError for
    a file that is missing, has another checksum, or cannot be read."""
    file = Path(path).expanduser() if path else Path(torch.hub.get_dir()) / "checkpoints" / asset.file
    url = asset.folder + asset.file
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; download {url} there, or give its path")
    actual = digest(file, sha256 or asset.sha256)
    return read_tensors(file, f"{asset.file} is at {url}"), actual


def read_tensors(file: Path, published: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a pickle, there alone or as its `state_dict`. Pickles are opened
    by torch's weights-only reader, which runs no code of theirs. published: where the right file is, for the message.
    CheckpointError for a file that cannot be read or holds something else."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds for a damaged file
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: does not hold named tensors only; {published}")
    return dict(tensors)


def hub_file(repo: str, file: str, path: str | Path | None = None, more: str = "") -> Path:
    """A file of a repository of the hub: at `path`, or in that folder; None looks in the hub's cache. more: other files
    to fetch with it. CheckpointError names the file and the command that fetches it."""
    place = Path(path).expanduser() if path else try_to_load_from_cache(repo, file)
    at = Path(place) if isinstance(place, str | Path) else None
    at = at / file if at is not None and at.is_dir() else at
    if at is None or not at.is_file():
        fetch = f"fetch it once with: hf download {repo} {file}{more}"
        cache = f"{file} of {repo} is not in the local cache ({constants.HF_HUB_CACHE})"
        where = f"{at}: no such file" if at else cache
        raise CheckpointError(f"{where}; {fetch}, or give its path")
    return at


def hub_digest(file: Path, sha256: str | None = None) -> str:
    """SHA-256 of a file, checked against `sha256`, else against the digest under which the hub's cache keeps it, where
    it does. Raises CheckpointError."""
    blob = Path(os.path.realpath(file)).name
    return digest(file, sha256 or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None))


@contextmanager
def fitting(source: str | Path) -> Iterator[None]:
    """A `with` block around a load_state_dict; CheckpointError where the weights of `source` do not fit."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{source}: the weights do not fit: {' '.join(str(error).split())[:300]}") from error


def frozen(module: Any, device: Device = "cpu") -> Any:
    """The same module on its device, in fp32 and for evaluation only."""
    return module.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def model_folder(path_or_id: str | Path, files: Sequence[str], weights: Sequence[str]) -> Path:
    """The folder of a model of transformers, given as a path or as a hub id in the local cache. files: names that must
    all be there. weights: patterns of which one must match. Raises CheckpointError."""
    path = Path(path_or_id).expanduser()
    more = ("*.txt", "pytorch_model.bin") if "pytorch_model.bin" in weights else ()
    folder = path if path.is_dir() else cached_folder(str(path_or_id), files[0], files=(*more, "*.safetensors"))
    if folder is None:
        raise CheckpointError(f"{path_or_id}: no such folder; give one with {' and '.join(files)}, or a hub id")
    missing = [file for file in files if not (folder / file).is_file()]
    if not any(any(folder.glob(pattern)) for pattern in weights):
        missing.append(" or ".join(weights))
    if missing:
        raise CheckpointError(f"{folder}: no {', '.join(missing)} there; fetch it again with all of these")
    return folder


def hub_weights(path_or_id: str | Path, sha256: str | None = None) -> tuple[Path, str]:
    """`model_folder` with config.json and weights, and the weights' SHA-256, checked against `sha256`, else against the
    digest under which the hub's cache keeps the file, where it does."""
    folder = model_folder(path_or_id, ["config.json"], HUB_WEIGHTS)
    file = next(folder / name for name in HUB_WEIGHTS if (folder / name).is_file())
    return folder, hub_digest(file, sha256)


@contextmanager
def reading(folder: Path, problem: str) -> Iterator[None]:
    """A `with` block for from_pretrained of transformers: without reports and progress bars, the RNG as before.
    Whatever it raises becomes one line of CheckpointError: the folder, the problem, the reason."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder}: {problem} ({' '.join(str(error).split())[:300]})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(architecture: Any, folder: Path, device: Device = "cpu", kind: str = "", **options: Any) -> Any:
    """A model of transformers, `frozen`. architecture: its class, or an AutoModel class. kind: its name in messages.
    options: with `config` and `state_dict` the model is of these, all of them, and `folder` only names them.
    CheckpointError where weights are missing or have other shapes."""
    kind = kind or architecture.__name__
    options |= {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if architecture.__name__.startswith("Auto"):  # a folder's auto_map names code of its own
        options["trust_remote_code"] = False
    given = "state_dict" in options
    with reading(folder, f"not a {kind} of transformers"):
        model, report = architecture.from_pretrained(None if given else str(folder), dtype=torch.float32, **options)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: the {kind} misses {len(missing)} weights, such as {missing[0]}")
    if report["mismatched_keys"]:
        key, stored, expected = sorted(report["mismatched_keys"])[0]
        needs = "the others need" if given else "its config.json needs"
        raise CheckpointError(f"{folder}: {key} is {tuple(stored)}, {needs} {tuple(expected)}")
    if given and (unknown := sorted(report["unexpected_keys"])):
        raise CheckpointError(f"{folder}: {len(unknown)} weights that the {kind} has not, such as {unknown[0]}")
    return frozen(model, device)
