"""Which part of a run is this process's, by torchrun's environment or Slurm's. Workers never talk to each other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segresearch.errors import ConfigError

LAUNCHERS = (  # a step's tasks, not the job's: a batch script that calls the program once is one worker
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Worker:
    """Worker `rank` (from 0) of `world`; `local` is its number on its machine, and that of its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def __str__(self) -> str:
        return f"worker {self.rank + 1} of {self.world}"

    def part(self, items: Sequence[Any]) -> list[Any]:
        """Every `world`-th of items, from `rank` on."""
        return list(items[self.rank :: self.world])

    def device(self, device: str) -> str:
        """ "auto" as the GPU of this worker where there are several workers; anything else as it is."""
        if device == "auto" and self.world > 1:
            import torch

            return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        return device


def worker(environ: Mapping[str, str] = os.environ) -> Worker:
    """This process among the workers. ConfigError where the variables make no sense."""
    for names in LAUNCHERS:
        if names[0] in environ and names[1] in environ:
            values = [environ.get(name, "0") for name in names]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                listed = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise ConfigError(f"{listed}: the rank must be a whole number below the number of workers")
            return Worker(*map(int, values))
    return Worker()
