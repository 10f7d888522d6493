"""The figures of the diagnostics: each branch alone, and each quantity at every noise level; a row a method."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from segresearch.analysis.branch_diagnostics import Number
from segresearch.config.method import GuidanceConfig
from segresearch.evaluation.branches import QUESTIONS, Question, Row, rows_of
from segresearch.evaluation.frame import Frame
from segresearch.evaluation.plots import NAMES, within
from segresearch.image_grid import INK, QUIET
from segresearch.method_looks import line
from segresearch.plot_style import brief, canvas, dot, label, row_height, rows, window

PLAIN = {"color": INK, "marker": "o"}  # of rows that are of several methods
Methods = Mapping[str, GuidanceConfig]


def draw_branches(frame: Frame, numbers: Sequence[Number], methods: Methods, where: str) -> dict[str, Figure]:
    """A figure for each question that has numbers, by name. methods: of the run, by name."""
    figures = {"branch_alone": _alone(frame, numbers, methods, where)} if frame.metrics("fd_to_baseline") else {}
    for question in QUESTIONS:
        if rows_of(question, numbers):
            figures[f"branch_{question.key}"] = _levels(question, numbers, methods, where)
    return figures


def _alone(frame: Frame, numbers: Sequence[Number], methods: Methods, where: str) -> Figure:
    """Dots with their errors: distance, precision, recall, sharpness of each diagnosed method and the baseline's."""
    diagnosed = {n.method for n in numbers}
    names = [m for m in frame.methods[1:] if m in diagnosed]
    distance = frame.metrics("fd_to_baseline")[0]
    shown = [(distance.name, "FD − the baseline's"), (f"precision-{distance.features}", "precision"),
             (f"recall-{distance.features}", "recall"), ("sharpness", "sharpness")]  # fmt: skip
    shown = [(name, text) for name, text in shown if any(frame[m, name].value is not None for m in names)]
    caption = (
        f"{where}. Bars are one bootstrap standard error (dark) and two (light). The grey line is the baseline, "
        f"“{frame.methods[0]}”. A branch that guidance should point away from is worse than it."
    )
    texts = brief(names, NAMES)
    height = -(-len(shown) // 2) * (0.75 + row_height(texts) * len(names))
    figure = canvas(height, "The images of each branch alone", caption)
    for axis, (name, text) in zip(_panels(figure, len(shown)), shown, strict=False):
        baseline = 0 if name == distance.name else frame[frame.methods[0], name].value
        values = {place: v for place, m in enumerate(names) if (v := frame[m, name]).value is not None}
        known = [v.value for v in values.values() if v.value is not None]
        ends = within(known, [v.error or 0.0 for v in values.values()], known[0] if baseline is None else baseline)
        for place, value in values.items():
            dot(axis, (value.value or 0.0, place), value.error or 0.0, _style(methods, names[place]), ends=ends)
        if baseline is not None:
            axis.axvline(baseline, color=QUIET, linewidth=1)
        axis.set_xlim(*ends)
        label(axis, x=text, grid="x")
        rows(axis, texts)
    return figure


def _panels(figure: Figure, count: int, across: int = 2) -> list[Any]:
    """Axes `across` beside each other, which share their rows."""
    grid: Any = figure.subplots(-(-count // across), min(across, count), sharey=True, squeeze=False)
    for axis in list(grid.flat)[count:]:
        axis.set_axis_off()
    return list(grid.flat)[:count]


def _style(methods: Methods, name: str) -> dict[str, Any]:
    return line(methods[name]) if name in methods else PLAIN


def _levels(question: Question, numbers: Sequence[Number], methods: Methods, where: str) -> Figure:
    table = rows_of(question, numbers)
    quantities = [q for q in question.labels if any(row.quantity == q for row in table)]
    names = list(dict.fromkeys(row.name for row in table))
    sigmas = {step: n.sigma for row in table for step, some in row.by_step.items() for n in some}
    bars = "from the lowest to the highest site" if question.sites else "one standard error over images"
    levels = ", ".join(f"{sigmas[step]:.3g}" for step in sorted(sigmas))
    caption = (
        f"{where}. In a row from top to bottom the noise levels σ = {levels}, the noisiest dark. Bars: "
        f"{bars}. What lies far out is at the edge, as an open mark."
    )
    across = 1 if len(names) <= 3 else 2
    texts = brief([_first(name) for name in names], NAMES * (1 if across == 2 else 1.5))
    row = max(0.06 * len(sigmas) + 0.06, row_height(texts))
    figure = canvas(0.3 + -(-len(quantities) // across) * (0.85 + row * len(names)), question.title, caption)
    for axis, quantity in zip(_panels(figure, len(quantities), across), quantities, strict=True):
        signed = quantity in ("common", "cosine", "best_scale")
        _dots(axis, [r for r in table if r.quantity == quantity], names, sorted(sigmas), methods, signed)
        if signed:
            axis.axvline(0, color=INK, linewidth=0.8)
        label(axis, x=textwrap.fill(question.labels[quantity], 26), grid="x")
        rows(axis, texts)
    return figure


def _first(name: str) -> str:
    """The name of a row of several methods: the first of them, how many others, and what they share."""
    names, _, sites = name.partition(" (")
    first, *others = names.split(", ")
    return name if len(others) < 2 else f"{first} and {len(others)} others ({sites}"


def _depth(i: int, count: int) -> float:
    """How dark the i-th noise level is drawn, from 1 for the noisiest to 0.35."""
    return 1 - 0.65 * i / max(1, count - 1)


def _dots(
    axis: Any, table: Sequence[Row], names: Sequence[str], steps: Sequence[int], methods: Methods, signed: bool
) -> None:
    points = []  # place, value, lower and upper end, style, depth
    for row in table:
        for i, step in enumerate(steps):
            some = [n for n in row.by_step.get(step, []) if n.value is not None]
            if not some:
                continue
            values = [float(n.value) for n in some if n.value is not None]
            mean, error = float(np.mean(values)), some[0].error or 0.0
            ends = (min(values), max(values)) if len(values) > 1 else (mean - error, mean + error)
            place = names.index(row.name) + 0.62 * ((i + 0.5) / len(steps) - 0.5)
            points.append((place, mean, *ends, _style(methods, row.name), _depth(i, len(steps))))
    low, high = window([v for _, mean, a, b, *_ in points for v in (mean, a, b)], keep=[0.0] * signed, fences=4.0)
    for place, mean, a, b, style, depth in points:
        whole = low <= mean <= high
        if whole:
            shown = [max(a, low), min(b, high)]
            axis.plot(shown, [place, place], color=style["color"], alpha=0.6 * depth, linewidth=0.9)
        axis.plot(min(max(mean, low), high), place, style["marker"], color=style["color"], alpha=depth, markersize=3.6,
                  markerfacecolor=style["color"] if whole else "white", clip_on=whole)  # fmt: skip
    axis.set_xlim(low, high)
