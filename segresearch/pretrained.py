"""Models of transformers, from a folder or the hub's local cache. Nothing is fetched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from segresearch.checkpoints.resolve import cached_folder
from segresearch.errors import CheckpointError


def model_folder(path_or_id: str | Path, files: Sequence[str], weights: Sequence[str]) -> Path:
    """The folder of a model, given as a path or as a hub id in the local cache.

    files: names that must all be there. weights: patterns of which one must match. Raises CheckpointError.
    """
    path = Path(path_or_id).expanduser()
    more = '"*.txt" "pytorch_model.bin" ' if "pytorch_model.bin" in weights else ""
    folder = path if path.is_dir() else cached_folder(str(path_or_id), files[0], more=more)
    if folder is None:
        raise CheckpointError(f"{path_or_id}: no such folder; give one with {' and '.join(files)}, or a hub id")
    missing = [file for file in files if not (folder / file).is_file()]
    if not any(any(folder.glob(pattern)) for pattern in weights):
        missing.append(" or ".join(weights))
    if missing:
        raise CheckpointError(f"{folder}: no {', '.join(missing)} there; fetch it again with all of these")
    return folder


@contextmanager
def reading(folder: Path, problem: str) -> Iterator[None]:
    """A `with` block for from_pretrained of transformers: without reports and progress bars, the RNG as before.

    Whatever it raises becomes one line of CheckpointError: the folder, the problem, the reason.
    """
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


def load_model(architecture: Any, folder: Path, kind: str = "", **options: Any) -> Any:
    """A model of transformers, in fp32, for evaluation. architecture: its class, or an AutoModel class.

    kind: what it is called in messages. Raises CheckpointError where weights are missing or have other shapes.
    """
    kind = kind or architecture.__name__
    with reading(folder, f"not a {kind} of transformers"):
        model, report = architecture.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: the {kind} misses {len(missing)} weights, such as {missing[0]}")
    if report["mismatched_keys"]:
        key, stored, expected = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(f"{folder}: {key} is {tuple(stored)}, its config.json needs {tuple(expected)}")
    return model.eval().requires_grad_(False)
