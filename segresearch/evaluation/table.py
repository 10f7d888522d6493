"""Frames as tables: cells of a page, markdown and LaTeX (a row a method), JSON lines (a row a number). Light:
no torch."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from segresearch.evaluation.frame import METRICS, Frame
from segresearch.pages import Cell

LATEX = str.maketrans({
    "σ": r"$\sigma$", "∞": r"$\infty$", "±": r"$\pm$", "−": r"$-$", "τ": r"$\tau$", "γ": r"$\gamma$", "→": r"$\to$",
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
})  # fmt: skip
GROUPS = ("quality", "content", "paper")


def table(
    *frames: Frame, leads: Sequence[Mapping[str, Cell]] = ({},), groups: Collection[str] = GROUPS
) -> list[list[Cell]]:
    """The head, then a row for each method: the lead of its frame, by head; the method; its numbers of these groups.

    One method alone has no columns relative to others.
    """
    alone = ("fd_to_baseline", "cost") if all(len(frame.methods) < 2 for frame in frames) else ()
    present = {metric for frame in frames for metric in frame.metrics() if metric.head and metric.kind not in alone}
    metrics = [metric for metric in METRICS.values() if metric in present and metric.group in groups]
    lines = [[*map(Cell, leads[0]), Cell("method", "method"), *(Cell(m.head, f"number {m.group}") for m in metrics)]]
    for lead, frame in zip(leads, frames, strict=True):
        for method in frame.methods:
            kind = "first" if method == frame.methods[0] else ""
            numbers = [Cell(str(frame[method, m.name]), f"number {m.group}") for m in metrics]
            lines.append([*(cell._replace(kind=kind) for cell in lead.values()), Cell(method, "method"), *numbers])
    return lines


def markdown(*lines: Sequence[Cell]) -> str:
    """The lines of `table`."""
    texts = [[cell.text.replace("|", r"\|") for cell in line] for line in lines]
    texts.insert(1, ["---:" if "number" in cell.kind else "---" for cell in lines[0]])
    return "".join(f"| {' | '.join(line)} |\n" for line in texts)


def latex(head: Sequence[Cell], *rows: Sequence[Cell]) -> str:
    """The lines of `table` for the package booktabs; the paper's columns stand apart, behind a rule."""
    top, *lines = (" & ".join(cell.text.translate(LATEX) for cell in line) + r" \\" for line in (head, *rows))
    paper = sum("paper" in cell.kind for cell in head)
    form = "l" + "r" * (len(head) - 1 - paper) + ("|" + "r" * paper if paper else "")
    start, end = [r"\begin{tabular}{" + form + "}", r"\toprule"], [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*start, top, r"\midrule", *lines, *end])


def to_jsonl(frame: Frame, common: Mapping[str, Any]) -> str:
    """A line a number: the facts common to the run, then method, metric, value, error."""
    return "".join(json.dumps({**common, **row}, ensure_ascii=False) + "\n" for row in frame.plain())
