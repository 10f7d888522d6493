"""Finished runs in Weights & Biases. The run's folder is the record; a W&B that fails costs one line on stderr.

W&B runs in a process of its own, with a time limit: whatever happens there (no such package, a service that is killed,
a network that hangs), the folder and the exit code of the run stay as they are. Light: wandb is imported there alone.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from segresearch.errors import one_line
from segresearch.runs import digest, plain

LIMITS = {"offline": 60.0, "online": 600.0}  # seconds for a call
PER_RUN = 5.0  # and for every W&B run more
TAG = 64  # letters, the limit of W&B
GUIDANCE = "guidance_rms"  # of a method: the size of its guidance, by evaluation of the model
GALLERY, TABLE, SIDE_BY_SIDE = "images", "table", "side by side"


@dataclass(frozen=True)
class WandbConfig:
    """Where a finished run is logged: "off", "offline" (in <out>/wandb, no account needed) or "online". tags: beside
    the experiment, the model and the kind."""

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "segresearch"
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class WandbRun:
    """One W&B run. series: values by step, from 1. tables: lists of rows, whose cells may be paths of images. images:
    (path, caption) of each; several of one key are shown as a gallery. tags: beside the config's, group and kind."""

    name: str
    group: str
    kind: str
    settings: Any = None
    values: Mapping[str, float | int | None] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    images: Mapping[str, Sequence[tuple[Path, str]]] = field(default_factory=dict)
    tags: Sequence[str] = ()


def log(
    config: WandbConfig, folder: Path, key: Any, runs: Callable[[Path], Sequence[WandbRun]], limit: float | None = None
) -> bool:
    """Write W&B runs below `folder`/wandb, once; whether they were written now. Never raises but for an interrupt.

    key: what the runs are made of. The same key is logged once a mode, and gives the same W&B ids. runs: makes them,
    given a temporary folder for images. limit: seconds until what W&B has not done by then is given up.
    """
    logged = folder / "wandb" / ".logged" / f"{digest(key)}-{config.mode}"
    if config.mode == "off" or logged.exists():
        return False
    try:
        with tempfile.TemporaryDirectory(prefix="segresearch-", ignore_cleanup_errors=True) as temporary:
            content = [(digest([key, run.kind, run.name]), run) for run in runs(Path(temporary))]
            seconds = LIMITS[config.mode] + PER_RUN * len(content) if limit is None else limit
            message = _in_process((config, folder.absolute(), content), seconds, Path(temporary))
        if not message:
            logged.parent.mkdir(parents=True, exist_ok=True)
            logged.touch()
    except Exception as error:  # trouble of the log, of whatever kind, is not the run's
        message = one_line(error)
    if message:
        print(f"wandb: {message[:200]}; the run itself is complete in {folder}", file=sys.stderr)
    return not message


def _in_process(arguments: tuple[WandbConfig, Path, Any], limit: float, temporary: Path) -> str:
    """`_write` in a process: what went wrong, in words; "" where all is written. Neither the process nor W&B's service
    outlives the call."""
    task, answer = temporary / "task", temporary / "answer"
    task.write_bytes(pickle.dumps(arguments))
    process = start("segresearch.wandb_log", [str(task), str(answer)], arguments[1], temporary / "log")
    try:
        code = process.wait(limit)
        return answer.read_text() if answer.is_file() else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        return f"not done in {limit:g} s, given up"
    finally:
        kill(process)


def start(
    module: str, arguments: Sequence[str], folder: Path, log: Path, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """A process of `module`, in a session of its own, whose W&B writes below `folder`/wandb. log: takes what it says; a
    file, since a pipe that W&B's service holds open would be waited for."""
    data = folder / "wandb"
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
           "WANDB_DATA_DIR": str(data / "data"),  # images in tables wait there until they are sent
           "WANDB_CACHE_DIR": str(data / "cache")}  # fmt: skip
    call = [sys.executable, "-P", "-m", module, *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(call, env=env, stdin=stdin, stdout=output, stderr=output, start_new_session=True)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process of `start`, and W&B's service with it."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def opened(config: WandbConfig, folder: Path, run_id: str, run: WandbRun) -> Any:
    """The W&B run of `run`, open, without its values."""
    import wandb

    quiet = wandb.Settings(  # of each run anew: init writes into it
        silent=True, console="off", init_timeout=30, disable_git=True, save_code=False, x_disable_meta=True,
        x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
    )  # fmt: skip
    return wandb.init(
        project=config.project, name=run.name, group=run.group, job_type=run.kind, id=run_id, dir=folder,
        tags=[tag[:TAG] for tag in dict.fromkeys((run.group, run.kind, *run.tags, *config.tags)) if tag],
        mode=cast(Any, config.mode), config=plain(run.settings), settings=quiet, reinit="finish_previous",
    )  # fmt: skip


def _write(config: WandbConfig, folder: Path, content: Sequence[tuple[str, WandbRun]]) -> None:
    """In W&B's own process: every run, one after the other."""
    import wandb

    for run_id, run in content:
        logged = opened(config, folder, run_id, run)
        for name in ("evaluation", *run.series):
            logged.define_metric(name, step_metric="evaluation" if name in run.series else None)
        for step, values in enumerate(zip(*run.series.values(), strict=True), 1):
            logged.log({"evaluation": step, **dict(zip(run.series, values))})
        summary: dict[str, Any] = {name: value for name, value in run.values.items() if value is not None}
        for name, rows in run.tables.items():
            columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
            cells = [[wandb.Image(str(v)) if isinstance(v := row.get(c), Path) else v for c in columns] for row in rows]
            summary[name] = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        for name, images in run.images.items():
            shown = [wandb.Image(str(path), caption=caption or None) for path, caption in images]
            summary[name] = shown if len(shown) > 1 else shown[0]
        logged.log(summary)
        logged.finish()


if __name__ == "__main__":
    try:
        _write(*pickle.loads(Path(sys.argv[1]).read_bytes()))
        outcome = ""
    except BaseException as error:
        outcome = one_line(error)
    Path(sys.argv[2]).write_text(outcome)
