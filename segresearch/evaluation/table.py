"""Rows as tables: markdown, csv, LaTeX, and metrics.jsonl. Light: no torch."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segresearch.evaluation import paper_numbers

Row = Mapping[str, Any]
CAPTIONS = {"mini": "cosine (mini)", "clip": "CLIP cosine"}
DISTANCES = {"mini": "distance (mini)", "vgg": "LPIPS vgg", "alex": "LPIPS alex"}
FRECHET = {"mini": "FD (mini)", "inception": "FID", "dinov2": "FD (DINOv2)", "clip": "FD (CLIP)"}
KERNEL = {"mini": "KD (mini)", "inception": "KID", "dinov2": "KD (DINOv2)", "clip": "CMMD"}
PLAIN = {"count": "count", "colors": "colours", "shapes": "shapes", "objects": "objects",
         "objects_chance": "(chance)", "exact": "exact", "edges": "edges",
         "saturation": "saturation", "contrast": "contrast"}  # fmt: skip
LATEX = {"σ": r"$\sigma$", "∞": r"$\infty$", "±": r"$\pm$", "−": r"$-$", "τ": r"$\tau$", "γ": r"$\gamma$",
         "→": r"$\to$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A head, and how a row fills it: `key` with `digits`, and ± `error` where there is one. paper: of others."""

    head: str
    key: str
    digits: int = 3
    error: str | None = None
    paper: bool = False

    def cell(self, row: Row) -> str:
        value, error = row.get(self.key), row.get(self.error or "")
        if not isinstance(value, float | int):
            return "–" if value is None else str(value)
        text = f"{value:.{self.digits}f}".replace("-", "−")
        return text if error is None else f"{text} ± {error:.{self.digits}f}"


def columns(rows: Sequence[Row]) -> list[Column]:
    """Those that the rows have, in the order they are read in; the paper's last."""
    keys, found = dict.fromkeys(key for row in rows for key in row), [Column("setting", "setting")]
    if "n" in keys:
        found.append(Column("N", "n", 0))
    for key in keys:
        kind, _, name = key.partition("-")
        if kind == "fd" and name in FRECHET:
            found.append(Column(FRECHET[name], key, 2, f"{key}-error"))
            if len(rows) > 1:
                found.append(Column("− first", f"{key}-first", 2, f"{key}-first-error"))
            found.append(Column(KERNEL[name], f"kd-{name}", 1 if name == "mini" else 4))
            found += [Column("precision", f"precision-{name}"), Column("recall", f"recall-{name}")]
        elif kind == "distance" and name in DISTANCES:
            found.append(Column(DISTANCES[name], key, 3, f"{key}-error"))
        elif kind == "caption" and name in CAPTIONS:
            found.append(Column(CAPTIONS[name], key, 3, f"{key}-error"))
        elif key in PLAIN:
            found.append(Column(PLAIN[key], key))
    if "cost" in keys and len(rows) > 1:
        found.append(Column("cost", "cost", 2))
    of_paper = [c for c in paper_numbers.HEADS if f"paper-{c}" in keys]
    return found + [Column(f"paper: {paper_numbers.HEADS[c]}", f"paper-{c}", 3, paper=True) for c in of_paper]


def markdown(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    lines = [[c.head for c in shown], ["---"] + ["---:"] * (len(shown) - 1)]
    lines += [[c.cell(row).replace("|", r"\|") for c in shown] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(rows: Sequence[Row]) -> str:
    """Every number, unrounded as far as it is kept; empty where there is none."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def latex(rows: Sequence[Row]) -> str:
    """A tabular for the package booktabs; the paper's columns stand apart, behind a rule."""

    def text(value: str) -> str:
        return "".join(LATEX.get(c, c) for c in value)

    shown = columns(rows)
    own = sum(not c.paper for c in shown)
    form = "l" + "r" * (own - 1) + ("|" + "r" * (len(shown) - own) if own < len(shown) else "")
    lines = [
        r"\begin{tabular}{" + form + "}",
        r"\toprule",
        " & ".join(text(c.head) for c in shown) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(text(c.cell(row)) for c in shown) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_jsonl(rows: Sequence[Row], common: Mapping[str, Any]) -> str:
    """A line a setting: what is common to all, then its numbers."""
    return "".join(json.dumps({**common, **row}, ensure_ascii=False) + "\n" for row in rows)
