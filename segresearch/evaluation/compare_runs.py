"""All runs of an experiment in one table: what differs between them, then the methods and their values. Light: no
torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from segresearch import runs
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError
from segresearch.evaluation.frame import FORCED, RESULTS, Frame, markdown, marked, table
from segresearch.pages import Cell, counted, render, to_csv

NOT_COMPARED = ("hydra", "defaults", "out", "device", "stage", "wandb", "n_examples", "name")
LONG = 40  # characters of a setting that a cell shows


@dataclass(frozen=True)
class Run:
    """A run with results. settings: by dotted key. looks: the key of each method's look, by name."""

    folder: str
    settings: Mapping[str, Any]
    frame: Frame
    looks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Overview:
    """differing: the settings in which the runs differ, in the order of the config. unfinished: the folders without
    results."""

    name: str
    runs: tuple[Run, ...]
    differing: tuple[str, ...]
    unfinished: tuple[str, ...]

    def table(self, words: bool = False) -> list[list[Cell]]:
        """The head, then a row a method: the run, which leads to its page; what differs; the method; its values. words:
        say what a run is, in place of the name of its folder."""
        leads = [
            {"run": Cell(_words(run) if words else run.folder, "run" if words else "", href=f"{run.folder}/index.html"),
             **{key: Cell(_short(run.settings.get(key)) or "–") for key in self.differing}}
            for run in self.runs
        ]  # fmt: skip
        return table(*(run.frame for run in self.runs), leads=leads)

    def markdown(self) -> str:
        return markdown(*self.table()) + "".join(f"\n{note}\n" for note in self.notes())

    def csv(self) -> str:
        """A row a value: the run, what differs, method, metric, value, error."""
        return to_csv([
            {"run": run.folder, **{key: _short(run.settings.get(key)) for key in self.differing}, **row}
            for run in self.runs
            for row in run.frame.plain()
        ])  # fmt: skip

    def page(self) -> str:
        """One HTML file."""
        head, *rows = self.table(words=True)
        rows = [row if "first" in row[0].kind else [Cell("", "run"), *row[1:]] for row in rows]  # a run is said once
        looks = [run.looks for run in self.runs for _ in run.frame.methods]
        rows = [marked([row], one)[0] for row, one in zip(rows, looks, strict=True)]
        return render(f"{self.name}: {counted(len(self.runs), 'run')}", self.notes(), head=head, rows=rows)

    def notes(self) -> list[str]:
        """What has to be known to read it."""
        lines = [FORCED] if any(run.settings.get("force") for run in self.runs) else []
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
            results = json.loads((folder / RESULTS).read_text())
            frame = Frame.of(results["metrics"])
            finished.append(Run(folder.name, settings, frame, results.get("looks", {})))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
            unfinished.append(folder.name)
    if not finished:
        text = "has results; those of `generate` and `analyze` never have, those of `evaluate` at their end"
        raise ConfigError(f"{name}: none of the {len(unfinished)} runs in {parent} {text}")
    keys = dict.fromkeys(key for run in finished for key in run.settings)
    differing = [key for key in keys if len({json.dumps(run.settings.get(key)) for run in finished}) > 1]
    if len({run.frame.methods for run in finished}) == len(finished):  # the names of the methods tell runs apart
        differing = [key for key in differing if not key.startswith(("guidance.", "compare."))
                     or all(key in run.settings for run in finished)]  # fmt: skip
    finished.sort(key=lambda run: ([_order(run.settings.get(key)) for key in differing], run.folder))
    return Overview(name, tuple(finished), tuple(differing), tuple(unfinished))


def write(overview: Overview, out: str | Path = "runs") -> list[Path]:
    """overview.md, .csv and .html beside the runs; their paths."""
    texts = {"md": overview.markdown(), "csv": overview.csv(), "html": overview.page()}
    files = {Path(out) / overview.name / f"overview.{kind}": text for kind, text in texts.items()}
    for path, text in files.items():
        runs.write(path, text)
    return list(files)


def _words(run: Run) -> str:
    """A run in a few words: its model, sampler and number of images."""
    parts = [str(run.settings.get(key) or "") for key in ("model.name", "sampler.name")]
    images = max((int(run.frame[method, "n"].value or 0) for method in run.frame.methods), default=0)
    forced = "force=true" if run.settings.get("force") else ""
    return ", ".join(filter(None, [*parts, f"{images} images" * bool(images), forced])) or run.folder


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key, such as guidance.terms.seg.scale."""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value)) or value
    if not isinstance(value, Mapping) or not value:
        return {prefix.removesuffix("."): value}
    return {key: item for name in value for key, item in _flat(value[name], f"{prefix}{name}.").items()}


def _short(value: Any) -> str:
    """A setting as a cell shows it: numbers as they were written, long lists by their length, "" for none."""
    text = "" if value is None else str(value)
    if isinstance(value, list) and len(text) > LONG:
        return f"{len(value)} items ({runs.digest(value)[:4]})"
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _order(value: Any) -> tuple[float, str]:
    """Numbers by size, before text; "inf" is a number."""
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return float("inf"), str(value)
