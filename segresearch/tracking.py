"""A mirror of finished runs in Weights & Biases. The run folder is the record; a mirror that fails costs one line.

W&B runs in a process of its own, with a limit: whatever happens there (no such package, a service that is killed, a
network that hangs), the run that is mirrored has ended well before, and its folder and exit code stay as they are.
Light: wandb is imported in that process alone.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from segresearch.runs import plain

LIMITS = {"offline": 60.0, "online": 600.0}  # seconds for all runs of a call
EACH = 5.0  # and for every run more
GUIDANCE = "guidance_rms"  # of an evaluation: how much guidance adds, by evaluation of the model
PICTURES, TABLE, SIDE_BY_SIDE = "pictures", "table", "side by side"  # of an evaluation
PICTURE = "picture of"  # what a picture in a cell becomes on the way to the other process


@dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases mirrors a run when it is finished: "off", "offline" (a folder, no account) or "online"."""

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "segresearch"


@dataclass(frozen=True)
class Mirror:
    """One W&B run. metrics: its last numbers. series: numbers by step, from 1. tables: lists of rows, whose cells may
    be paths of pictures. images: figures, or lists of pictures with captions. id: by content, so that sending it twice
    adds nothing; "" is a random one."""

    name: str
    group: str = ""
    kind: str = ""
    id: str = ""
    settings: Any = None
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    images: Mapping[str, Path | Sequence[tuple[Path, str]]] = field(default_factory=dict)


def mirror(config: WandbConfig, folder: Path, runs: Sequence[Mirror], limit: float | None = None) -> bool:
    """Write `runs` as W&B runs; whether it worked. Never raises but for an interrupt.

    "offline" writes below `folder`/wandb and needs no account (`wandb sync` sends it later). limit: seconds until
    what W&B has not done by then is given up.
    """
    if config.mode == "off":
        return False
    most = LIMITS[config.mode] + EACH * len(runs) if limit is None else limit
    try:
        with tempfile.TemporaryDirectory(prefix="segresearch-", ignore_cleanup_errors=True) as place:
            said = _sent(config, folder, runs, most, Path(place))
    except Exception as error:  # a mirror's trouble, of whatever kind, is not the run's
        said = _line(error)
    if said:
        refused(said, folder)
    return not said


def refused(reason: str | Exception, folder: Path) -> None:
    """Say in one line why there is no mirror."""
    said = reason if isinstance(reason, str) else _line(reason)
    print(f"wandb: {said[:200]}; the run itself is complete in {folder}", file=sys.stderr)


def _sent(config: WandbConfig, folder: Path, runs: Sequence[Mirror], limit: float, place: Path) -> str:
    """What went wrong, in words; "" where all is written."""
    task, answer = place / "task.json", place / "answer"
    content = {"mode": config.mode, "project": config.project, "folder": str(folder.absolute()),
               "answer": str(answer), "runs": [_packed(run) for run in runs]}  # fmt: skip
    task.write_text(json.dumps(content))
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = folder.absolute() / "wandb"  # the pictures of tables wait in W&B's data folder until they are sent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
           "WANDB_DATA_DIR": str(own / "data"), "WANDB_CACHE_DIR": str(own / "cache")}  # fmt: skip
    call = [sys.executable, "-P", "-m", "segresearch.tracking", str(task)]
    with (place / "log").open("wb") as log:  # a file: a pipe that W&B's service holds open would be waited for
        process = subprocess.Popen(
            call, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        with _ended(process):
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return f"not done in {limit:g} s, given up"
    if answer.is_file():
        return answer.read_text()
    return f"its process ended with code {process.returncode}"


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """At the end of the block neither `process` nor what it has started is left, W&B's service included."""
    import psutil

    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            whole = psutil.Process(process.pid) if process.poll() is None else None
            for one in [*(whole.children(recursive=True) if whole else []), *([whole] if whole else [])]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.wait()


def _packed(run: Mirror) -> dict[str, Any]:
    """`run` as JSON holds it. Infinities stay numbers in tables, and are text in settings."""

    def cell(value: Any) -> Any:
        return {PICTURE: str(value.absolute())} if isinstance(value, Path) else value

    tables = {
        name: {"columns": list(dict.fromkeys(c for row in rows for c in row)),
               "rows": [{column: cell(value) for column, value in row.items()} for row in rows]}
        for name, rows in run.tables.items()
    }  # fmt: skip
    return {
        "name": run.name, "group": run.group, "kind": run.kind, "id": run.id, "settings": plain(run.settings or {}),
        "metrics": {key: value for key, value in run.metrics.items() if value is not None},
        "series": {key: list(values) for key, values in run.series.items()}, "tables": tables,
        "images": {key: [(str(path.absolute()), said) for path, said in ([(one, "")] if isinstance(one, Path) else one)]
                   for key, one in run.images.items()},
    }  # fmt: skip


def once(config: WandbConfig, folder: Path, runs: Sequence[Mirror]) -> bool:
    """`mirror`, unless the very same runs (by their ids) have been mirrored below `folder` before."""
    from segresearch.runs import digest

    mark = folder / "wandb" / ".mirrored" / f"{digest([run.id for run in runs])}-{config.mode}"
    if config.mode == "off" or mark.exists():
        return False
    if not mirror(config, folder, runs):
        return False
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return True


def numbered(runs: Sequence[Mirror], key: Any) -> list[Mirror]:
    """`runs` with ids that depend on `key`, and on nothing else but their names."""
    from segresearch.runs import digest

    return [replace(run, id=digest([key, run.kind, run.name])) for run in runs]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _write(task: Mapping[str, Any]) -> None:
    """In the process of W&B: every run of `task`, one after the other."""
    import wandb

    def cell(value: Any) -> Any:
        return wandb.Image(value[PICTURE]) if isinstance(value, dict) and PICTURE in value else value

    for given in task["runs"]:
        quiet = wandb.Settings(  # of each run anew: init writes into it
            silent=True, console="off", init_timeout=30, disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        run = wandb.init(
            project=task["project"], name=given["name"], group=given["group"] or None, job_type=given["kind"] or None,
            id=given["id"] or None, dir=task["folder"], mode=task["mode"], config=given["settings"], settings=quiet,
            reinit="finish_previous",
        )  # fmt: skip
        if given["series"]:
            run.define_metric("evaluation")
            for key in given["series"]:
                run.define_metric(key, step_metric="evaluation")
        for step in range(max(map(len, given["series"].values()), default=0)):
            values = {key: some[step] for key, some in given["series"].items() if step < len(some)}
            run.log({"evaluation": step + 1, **values})
        content: dict[str, Any] = dict(given["metrics"])
        for key, table in given["tables"].items():
            rows = [[cell(row.get(column)) for column in table["columns"]] for row in table["rows"]]
            content[key] = wandb.Table(columns=table["columns"], data=rows, allow_mixed_types=True)
        for key, some in given["images"].items():
            shown = [wandb.Image(path, caption=said or None) for path, said in some]
            content[key] = shown if len(shown) > 1 else shown[0]
        run.log(content)
        run.finish()


def _main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    try:
        _write(task)
        said = ""
    except BaseException as error:
        said = _line(error)
    Path(task["answer"]).write_text(said)


if __name__ == "__main__":
    _main()
