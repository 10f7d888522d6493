"""The schedule of a model on disk, read without its weights. Light for a folder: no torch."""

import warnings
from pathlib import Path
from typing import Any

from segresearch.checkpoints.json_files import read_json
from segresearch.errors import CheckpointError, InputError
from segresearch.models.scheduler import folder_scheduler, own_schedule

FILE = "scheduler/scheduler_config.json"


def schedule_of(path: Path, config: Path | None = None, unet: str | None = None) -> str:
    """The name that `auto` stands for at this model: of a folder, or of a single file with its folder of configs; unet:
    of another file or folder, which brings what it declares.

    CheckpointError for a scheduler that is not supported or cannot be read. No warning is given: to load the model is
    what says these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return own_schedule(scheduler_of(path, config, unet)).name
        except InputError as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error


def scheduler_of(path: Path, config: Path | None = None, unet: str | None = None) -> dict[str, Any]:
    """The config of the scheduler of a model on disk."""
    if path.is_dir():
        index, own = (read_json(path / file, optional=True) for file in ("model_index.json", FILE))
        scheduler = folder_scheduler(index, own)
    elif config is not None and (written := read_json(config / FILE, optional=True)):
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
