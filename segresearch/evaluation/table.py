"""A frame of numbers as tables: markdown and LaTeX (a row a method), metrics.csv and metrics.jsonl (a row a number).
Light: no torch."""

import json
from collections.abc import Mapping
from typing import Any

from segresearch.evaluation.frame import METRICS, Frame, Metric

LATEX = {"σ": r"$\sigma$", "∞": r"$\infty$", "±": r"$\pm$", "−": r"$-$", "τ": r"$\tau$", "γ": r"$\gamma$",
         "→": r"$\to$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}  # fmt: skip


def columns(*frames: Frame) -> list[Metric]:
    """The metrics that a table of these frames shows, in order. One method alone has no columns relative to others."""
    names = {metric.name for frame in frames for metric in frame.metrics if metric.head}
    if all(len(frame.methods) < 2 for frame in frames):
        names = {name for name in names if METRICS[name].kind not in ("fd_to_baseline", "cost")}
    return [metric for name, metric in METRICS.items() if name in names]


def cells(frame: Frame, method: str, metrics: list[Metric]) -> list[str]:
    """The numbers of one method, as text."""
    return [str(frame[method, metric.name]) for metric in metrics]


def markdown(frame: Frame) -> str:
    metrics = columns(frame)
    lines = [["method", *(metric.head for metric in metrics)], ["---"] + ["---:"] * len(metrics)]
    lines += [[method.replace("|", r"\|"), *cells(frame, method, metrics)] for method in frame.methods]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(frame: Frame) -> str:
    """A tabular for the package booktabs; the paper's columns stand apart, behind a rule."""

    def line(texts: list[str]) -> str:
        return " & ".join("".join(LATEX.get(c, c) for c in text) for text in texts) + r" \\"

    metrics = columns(frame)
    paper = sum(metric.group == "paper" for metric in metrics)
    form = "l" + "r" * (len(metrics) - paper) + ("|" + "r" * paper if paper else "")
    lines = [r"\begin{tabular}{" + form + "}", r"\toprule"]
    lines += [line(["method", *(metric.head for metric in metrics)]), r"\midrule"]
    lines += [line([method, *cells(frame, method, metrics)]) for method in frame.methods]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_jsonl(frame: Frame, common: Mapping[str, Any]) -> str:
    """A line a number: the facts common to the run, then method, metric, value, error."""
    return "".join(json.dumps({**common, **row}, ensure_ascii=False) + "\n" for row in frame.plain())
