"""The schedule of a model on disk, read without its weights. Light for a folder: no torch."""

import json
import warnings
from pathlib import Path
from typing import Any

from segresearch.errors import CheckpointError, InputError
from segresearch.models.scheduler import folder_scheduler, own_schedule

FILE = "scheduler/scheduler_config.json"


def schedule_of(path: Path, config: Path | None = None, unet: str | None = None) -> str:
    """The name that `auto` stands for at this model: of a folder, or of a single file with its folder of configs; unet:
    of another file or folder, which brings what it declares.

    CheckpointError for a scheduler that is not supported. Configs that cannot be read count as missing, and no warning
    is given: to load the model is what says these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return own_schedule(scheduler_of(path, config, unet)).name
        except InputError as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error


def scheduler_of(path: Path, config: Path | None, unet: str | None) -> dict[str, Any]:
    """The config of the scheduler of a model on disk."""
    if path.is_dir():
        scheduler = folder_scheduler(_json(path / "model_index.json"), _json(path / FILE))
    elif config is not None and (written := _json(config / FILE)):
        scheduler = written
    else:
        from segresearch.checkpoints.declared import file_scheduler
        from segresearch.checkpoints.tensors import open_file

        scheduler = file_scheduler(path, *open_file(path))
    if unet is None:
        return scheduler
    from segresearch.checkpoints.part_files import open_part
    from segresearch.checkpoints.parts import Given, with_unet_scheduler

    return dict(with_unet_scheduler(scheduler, Given(unet=open_part("unet", unet)[0])))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
