"""All runs of an experiment in one table: what differs between them, then the settings and their numbers. Light: no
torch."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segresearch import runs
from segresearch.config.names import nearest
from segresearch.errors import ConfigError
from segresearch.evaluation.table import Column, Row, columns, to_csv

RESULTS = "results.json"
NOT_COMPARED = ("hydra", "defaults", "out", "device", "stage", "wandb", "n_examples", "name")
LONG = 40  # characters of a setting that a cell shows
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #16181d }
table { border-collapse: collapse; font-size: .85rem } th, td { padding: .3rem .6rem; border-bottom: 1px solid #d9dce1 }
th { text-align: left; position: sticky; top: 0; background: #fff } td.number, th.number { text-align: right }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap } .paper { background: #f7f4ea }
.quiet { color: #5f6672 } tr.first td { border-top: 2px solid #9aa1ac } .scroll { overflow-x: auto }
"""


@dataclass(frozen=True)
class Overview:
    """rows: of every run every setting. differing: the settings of the runs that differ, in the order of the config.
    unfinished: the folders without results."""

    name: str
    rows: tuple[Row, ...]
    differing: tuple[str, ...]
    unfinished: tuple[str, ...]

    def shown(self) -> list[Column]:
        """The run, what differs, the setting, the numbers."""
        metrics = columns([{k: v for k, v in row.items() if k not in ("run", *self.differing)} for row in self.rows])
        return [Column("run", "run"), *(Column(key, key) for key in self.differing), *metrics]

    def markdown(self) -> str:
        shown, lead = self.shown(), 2 + len(self.differing)
        lines = [[c.head for c in shown], ["---"] * lead + ["---:"] * (len(shown) - lead)]
        lines += [[c.cell(row).replace("|", r"\|") for c in shown] for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{s}\n" for s in self.notes())

    def csv(self) -> str:
        return to_csv(self.rows)

    def page(self) -> str:
        """One HTML file; a run's name leads to its own page."""
        shown, lead, last = self.shown(), 2 + len(self.differing), ""

        def kind(i: int) -> str:
            words = (["number"] if i >= lead else []) + (["paper"] if shown[i].paper else [])
            return f' class="{" ".join(words)}"' if words else ""

        lines = ["".join(f"<th{kind(i)}>{html.escape(c.head)}</th>" for i, c in enumerate(shown))]
        marks = [""]
        for row in self.rows:
            cells = [html.escape(c.cell(row)) for c in shown]
            cells[0] = f'<a href="{cells[0]}/index.html">{cells[0]}</a>'
            lines.append("".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(cells)))
            marks.append(' class="first"' if row["run"] != last else "")
            last = row["run"]
        table = "".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
        title = html.escape(f"{self.name}: {len({row['run'] for row in self.rows})} runs")
        notes = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in self.notes())
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        return (f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head><body><h1>{title}</h1>{notes}'
                f'<div class="scroll"><table>{table}</table></div></body></html>\n')  # fmt: skip

    def notes(self) -> list[str]:
        """What has to be known to read it."""
        said = []
        if len({row.get("n") for row in self.rows}) > 1:
            said.append("These runs differ in the number of pictures; Fréchet distances compare only at equal N.")
        if self.unfinished:
            said.append(f"Without results yet: {', '.join(self.unfinished)}.")
        return said


def overview(name: str, out: str | Path = "runs") -> Overview:
    """All runs in <out>/<name>. ConfigError where there is none with results."""
    folder = Path(out) / name
    if not folder.is_dir():
        there = sorted(p.parent.parent.name for p in Path(out).glob(f"*/*/{RESULTS}"))
        listed = f" (there are {', '.join(dict.fromkeys(there))})" if there else ""
        raise ConfigError(f"{name}: no runs of it in {out}{nearest(name, there)}{listed}")
    found, unfinished = [], []
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            rows = json.loads((place / RESULTS).read_text())["rows"]
            found.append((place.name, _settings(place / "config.yaml"), rows))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            unfinished.append(place.name)
    if not found:
        raise ConfigError(f"{name}: none of the {len(unfinished)} runs in {folder} has results yet")
    differing = _differing([settings for _, settings, _ in found])
    labels = [tuple(row["setting"] for row in of_run) for _, _, of_run in found]
    if len(set(labels)) == len(labels):  # what only some of the methods have says no more than their names do
        whole = [set(settings) for _, settings, _ in found]
        differing = [k for k in differing if not k.startswith(("guidance.", "compare.")) or all(k in w for w in whole)]
    found.sort(key=lambda run: ([_order(run[1].get(key)) for key in differing], run[0]))
    rows = tuple({"run": run, **{key: _short(settings.get(key)) for key in differing}, **row}
                 for run, settings, of_run in found for row in of_run)  # fmt: skip
    return Overview(name, rows, tuple(differing), tuple(unfinished))


def write(found: Overview, out: str | Path = "runs") -> list[Path]:
    """overview.md, .csv and .html beside the runs; their paths."""
    folder = Path(out) / found.name
    texts = {"overview.md": found.markdown(), "overview.csv": found.csv(), "overview.html": found.page()}
    for name, text in texts.items():
        runs.write(folder / name, text)
    return [folder / name for name in texts]


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a run, flat: guidance.terms.seg.scale."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dict(_flat({key: value for key, value in given.items() if key not in NOT_COMPARED}))


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [item for key, inner in value.items() for item in _flat(inner, f"{at}.{key}" if at else str(key))]
    if isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        return [item for i, inner in enumerate(value) for item in _flat(inner, f"{at}.{i}")]
    return [(at, value)]


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in settings}) > 1]


def _short(value: Any) -> Any:
    """A setting as a cell shows it: numbers as they were written, long lists by their length."""
    if value is None:
        return None
    if isinstance(value, list) and len(str(value)) > LONG:
        return f"{len(value)} items ({runs.digest(value)[:4]})"
    text = str(value)
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before text; "inf" is a number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    return (0, number, "") if not math.isnan(number) else (1, 0.0, str(value))
