"""The numbers of a run in Weights & Biases while it goes on: how much is done, how fast, and of which method.

A W&B run of its own, of the kind "progress", in a process of its own that reads lines from a pipe. The run writes to
that pipe without waiting: a line that does not fit now is left out, and a pipe that has broken is written to no more.
So a W&B that hangs or dies costs one line on stderr. Light: wandb is imported there alone.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from segresearch.errors import one_line
from segresearch.wandb_log import WandbConfig, WandbRun, kill, opened, start

FIRST = 10.0  # seconds of a run before anything starts; a shorter one is over before anyone could look
EVERY = 2.0  # seconds between two lines at least; the last is written always
LIMITS = {"offline": 20.0, "online": 60.0}  # seconds that W&B has to close after the run's end
STOPPED = 5.0  # seconds that it has where the run failed or was stopped
KIND = "progress"
Numbers = Mapping[str, float | int]


class _Mirror:
    """The process of W&B and the pipe to it, once the run has taken `FIRST` seconds."""

    def __init__(self, config: WandbConfig, folder: Path, run: WandbRun, clock: Callable[[], float]):
        self.task, self.clock = (config, folder.absolute(), uuid4().hex[:12], run), clock
        self.begun = clock()
        self.sent = -EVERY
        self.last: dict[str, Any] = {}  # numbers that were not sent yet
        self.message = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.temporary = tempfile.TemporaryDirectory(prefix="segresearch-", ignore_cleanup_errors=True)

    def __call__(self, numbers: Numbers) -> None:
        """Take the numbers of this moment; they are sent now, or with later ones."""
        now = self.clock() - self.begun
        self.last = {"seconds": round(now, 1), **numbers}
        if now >= FIRST and now - self.sent >= EVERY:
            self.sent = now
            self.send(self.last)

    def send(self, line: Mapping[str, Any]) -> None:
        if self.message:
            return
        try:
            if self.process is None:
                task = Path(self.temporary.name) / "task"
                task.write_bytes(pickle.dumps(self.task))
                log = Path(self.temporary.name) / "log"
                self.process = start("segresearch.wandb_live", [str(task)], self.task[1], log, subprocess.PIPE)
                os.set_blocking(self._pipe, False)
            os.write(self._pipe, json.dumps(line).encode() + b"\n")  # under 4096 bytes: whole, or not at all
            self.last = {}
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.message = "its process ended"
        except Exception as error:  # trouble of the log, of whatever kind, is not the run's
            self.message = one_line(error)

    @property
    def _pipe(self) -> int:
        return self.process.stdin.fileno()  # type: ignore[union-attr]

    def close(self, whole: bool) -> None:
        """End the W&B run, as one that is whole or one that was stopped."""
        with self.temporary:
            if self.process is None:
                return
            if self.last:
                self.send(self.last)
            if whole:
                self.send({"end": 0})
            try:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()  # type: ignore[union-attr]
                limit = LIMITS[self.task[0].mode] if whole else STOPPED
                code = self.process.wait(0.0 if self.message else limit)
                self.message = self.message or (f"its process ended with code {code}" if code else "")
            except subprocess.TimeoutExpired:
                self.message = self.message or f"not closed in {limit:g} s, given up"
            finally:
                kill(self.process)
            if self.message:
                lines = (Path(self.temporary.name) / "log").read_text(errors="replace").split("\n")
                reason = next((f" ({line.strip()[:150]})" for line in reversed(lines) if line.strip()), "")
                print(f"wandb: progress: {self.message[:200]}{reason}; the run itself goes on", file=sys.stderr)


@contextlib.contextmanager
def live(
    config: WandbConfig, folder: Path, run: WandbRun, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Numbers], None] | None]:
    """A function that takes the numbers of a run while the block goes on; None where nothing is logged.

    run: the experiment, the settings and tags; its name gets the time of the start, since a run may be resumed.
    """
    if config.mode == "off":
        yield None
        return
    name = f"{run.name} {KIND} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    mirror = _Mirror(config, folder, WandbRun(name, run.group, KIND, run.settings, tags=run.tags), clock)
    try:
        yield mirror
    except BaseException:
        mirror.close(False)
        raise
    mirror.close(True)


def _write(config: WandbConfig, folder: Path, run_id: str, run: WandbRun) -> None:
    """In W&B's own process: each line of the standard input as a step, to its end."""
    logged, code = opened(config, folder, run_id, run), 1
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # a line that was cut off with its process
            numbers = json.loads(line)
            code = numbers.pop("end", code)
            if numbers:
                logged.log(numbers)
    logged.finish(exit_code=code)


if __name__ == "__main__":
    _write(*pickle.loads(Path(sys.argv[1]).read_bytes()))
