"""The index of all runs below a folder: <out>/index.html, a line a run in words, and <out>/latest. Light: no torch."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from segresearch import runs
from segresearch.pages import Cell, counted, render

LATEST, INDEX = "latest", "index.html"
MARK = "the newest first"  # in the index; a file without it is the user's own
SHOWN = ("index.html", "grid.png")  # what a run is looked at by


class Line(NamedTuple):
    """A run: its experiment, the folder's name, what it is in words, when it was last written, what to open."""

    name: str
    folder: str
    words: str
    written: float
    opened: str


def lines(out: str | Path) -> list[Line]:
    """All runs in `out`, the newest first. A folder whose config cannot be read is left out."""
    index = []
    for path in Path(out).glob("*/*/config.yaml"):
        if path.parent.parent.name in runs.RESERVED:
            continue
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            words, written = caption(config), path.stat().st_mtime
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError):
            continue
        opened = next((name for name in SHOWN if (path.parent / name).is_file()), "")
        index.append(Line(path.parent.parent.name, path.parent.name, words, written, opened))
    return sorted(index, key=lambda line: (-line.written, line.name, line.folder))


def caption(config: Mapping[str, Any]) -> str:
    """A run in words: its methods, prompts, model, sampler and steps."""
    panels = config.get("panels") or [{}]
    methods = [m for table in (config, *panels) for m in table.get("compare") or ()] + [config.get("guidance") or {}]
    named = dict.fromkeys(_method(method) for method in methods)
    given = config.get("prompts")
    prompts = given if isinstance(given, list) else [given]
    text = f"{len(prompts)} prompts" if len(prompts) > 1 else f"“{prompts[0]}”" if prompts[0] else "no prompt"
    part = f"{config['model']['name']}, {config['sampler']['name']}, {config['steps']} steps"
    shown = ", ".join(list(named)[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")
    return f"{shown}; {text[:80]}; {part}" + "; made with force=true" * bool(config.get("force"))


def _method(guidance: Mapping[str, Any]) -> str:
    named = [*(guidance.get("terms") or {}).items(), *((k, guidance[k]) for k in ("sag", "zigzag") if guidance.get(k))]
    terms = [" ".join(filter(None, (name, _number(term)))) for name, term in named]
    return str(guidance.get("label") or " + ".join(terms) or "no guidance")


def _number(term: Mapping[str, Any]) -> str:
    """The scale or the weight of a term, where it is a plain number."""
    value = term.get("scale", term.get("weight"))
    return f"{value:g}" if isinstance(value, float | int) else ""


def table(index: list[Line]) -> tuple[list[Cell], list[list[Cell]]]:
    """Head and rows; the words lead to the run."""
    rows = [
        [Cell(line.name), Cell(line.words, "run", href=f"{line.name}/{line.folder}/{line.opened}"),
         Cell(time.strftime("%Y-%m-%d %H:%M", time.localtime(line.written))), Cell(line.folder, "quiet wide")]
        for line in index
    ]  # fmt: skip
    return [Cell("experiment"), Cell("run"), Cell("written"), Cell("folder", "wide")], rows


def note(folder: Path, out: str | Path) -> None:
    """Point <out>/latest at a run and write the index anew, but where such names are files of the user's own. Whatever
    fails here does not touch the run."""
    index, latest = Path(out) / INDEX, Path(out) / LATEST
    with contextlib.suppress(OSError):
        if not index.exists() or MARK in index.read_text(encoding="utf-8", errors="replace"):
            head, rows = table(lines(out))
            lead = [f"{counted(len(rows), 'run')}, {MARK}."]
            runs.write(index, render("Runs", lead, head=head, rows=rows))
    with contextlib.suppress(OSError, ValueError):
        if latest.is_symlink() or not latest.exists():
            temporary = Path(out) / f".{LATEST}.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(folder.resolve().relative_to(Path(out).resolve()), target_is_directory=True)
            os.replace(temporary, latest)
