"""All runs of an experiment in one table: what differs between them, then the methods and their values. Light: no
torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segresearch import runs
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError
from segresearch.evaluation.frame import Frame
from segresearch.evaluation.table import cells, columns
from segresearch.pages import Cell, render
from segresearch.tidy_csv import to_csv

RESULTS = "results.json"
NOT_COMPARED = ("hydra", "defaults", "out", "device", "stage", "wandb", "n_examples", "name")
LONG = 40  # characters of a setting that a cell shows


@dataclass(frozen=True)
class Run:
    """A run with results. settings: by dotted key."""

    folder: str
    settings: Mapping[str, Any]
    frame: Frame


@dataclass(frozen=True)
class Overview:
    """differing: the settings in which the runs differ, in the order of the config. unfinished: the folders without
    results."""

    name: str
    runs: tuple[Run, ...]
    differing: tuple[str, ...]
    unfinished: tuple[str, ...]

    def _lead(self, run: Run) -> dict[str, str | None]:
        return {"run": run.folder, **{key: _short(run.settings.get(key)) for key in self.differing}}

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: the run, what differs, the method, the values."""
        metrics = columns(*(run.frame for run in self.runs))
        head = ["run", *self.differing, "method", *(metric.head for metric in metrics)]
        return head, [
            [*(text or "–" for text in self._lead(run).values()), method, *cells(run.frame, method, metrics)]
            for run in self.runs
            for method in run.frame.methods
        ]

    def markdown(self) -> str:
        head, rows = self._table()
        lead = 2 + len(self.differing)
        lines = [head, ["---"] * lead + ["---:"] * (len(head) - lead)]
        lines += [[text.replace("|", r"\|") for text in row] for row in rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{s}\n" for s in self.notes())

    def csv(self) -> str:
        """A row a value: the run, what differs, method, metric, value, error."""
        return to_csv([{**self._lead(run), **row} for run in self.runs for row in run.frame.plain()])

    def page(self) -> str:
        """One HTML file; a run's name leads to its own page."""
        head, rows = self._table()
        metrics = columns(*(run.frame for run in self.runs))
        kinds = [""] * (2 + len(self.differing)) + [f"number {metric.group}" for metric in metrics]
        last, lines = "", []
        for folder, *texts in rows:
            first = Cell(folder, "first" if folder != last else "", href=f"{folder}/index.html")
            lines.append([first, *map(Cell, texts, kinds[1:])])
            last = folder
        title = f"{self.name}: {len(self.runs)} runs"
        return render(title, self.notes(), head=list(map(Cell, head, kinds)), rows=lines)

    def notes(self) -> list[str]:
        """What has to be known to read it."""
        lines = []
        if len({run.frame[method, "n"].value for run in self.runs for method in run.frame.methods}) > 1:
            lines.append("These runs differ in the number of images; Fréchet distances compare only at equal N.")
        if self.unfinished:
            lines.append(f"Without results yet: {', '.join(self.unfinished)}.")
        return lines


def overview(name: str, out: str | Path = "runs") -> Overview:
    """All runs in <out>/<name>. ConfigError where there is none with results."""
    parent = Path(out) / name
    if not parent.is_dir():
        names = sorted({path.parent.parent.name for path in Path(out).glob(f"*/*/{RESULTS}")})
        listed = f" (there are {', '.join(names)})" if names else ""
        raise ConfigError(f"{name}: no runs of it in {out}{nearest(name, names)}{listed}")
    finished, unfinished = [], []
    for folder in sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            settings = _flat({key: value for key, value in config.items() if key not in NOT_COMPARED})
            frame = Frame.of(json.loads((folder / RESULTS).read_text())["metrics"])
            finished.append(Run(folder.name, settings, frame))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            unfinished.append(folder.name)
    if not finished:
        raise ConfigError(f"{name}: none of the {len(unfinished)} runs in {parent} has results yet")
    keys = dict.fromkeys(key for run in finished for key in run.settings)
    differing = [key for key in keys if len({json.dumps(run.settings.get(key)) for run in finished}) > 1]
    if len({run.frame.methods for run in finished}) == len(finished):  # the names of the methods tell runs apart
        differing = [key for key in differing if not key.startswith(("guidance.", "compare."))
                     or all(key in run.settings for run in finished)]  # fmt: skip
    finished.sort(key=lambda run: ([_order(run.settings.get(key)) for key in differing], run.folder))
    return Overview(name, tuple(finished), tuple(differing), tuple(unfinished))


def write(table: Overview, out: str | Path = "runs") -> list[Path]:
    """overview.md, .csv and .html beside the runs; their paths."""
    texts = {"overview.md": table.markdown(), "overview.csv": table.csv(), "overview.html": table.page()}
    for name, text in texts.items():
        runs.write(Path(out) / table.name / name, text)
    return [Path(out) / table.name / name for name in texts]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key, such as guidance.terms.seg.scale."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    nested = [_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items()]
    return {key: item for settings in nested for key, item in settings.items()}


def _short(value: Any) -> str | None:
    """A setting as a cell shows it: numbers as they were written, long lists by their length."""
    if value is None:
        return None
    text = str(value)
    if isinstance(value, list) and len(text) > LONG:
        return f"{len(value)} items ({runs.digest(value)[:4]})"
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _order(value: Any) -> tuple[float, str]:
    """Numbers by size, before text; "inf" is a number."""
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return float("inf"), str(value)
