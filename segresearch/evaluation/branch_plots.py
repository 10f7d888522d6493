"""The figures of the diagnostics: each branch alone, and each quantity over the noise level."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from segresearch.analysis.branch_diagnostics import Number
from segresearch.evaluation.branches import QUESTIONS, Question, rows_of
from segresearch.evaluation.frame import Frame
from segresearch.image_grid import INK
from segresearch.plot_style import canvas, label

MARKS = "os^DvPX*<>"
SHORT = 46  # characters of a name in a legend


def draw_branches(frame: Frame, numbers: Sequence[Number], where: str) -> dict[str, Figure]:
    """A figure for each question that has numbers, by name."""
    figures = {"branch_alone": _alone(frame, numbers, where)} if frame.metrics("fd_to_baseline") else {}
    for question in QUESTIONS:
        if rows_of(question, numbers):
            figures[f"branch_{question.key}"] = _levels(question, numbers, where)
    return figures


def _alone(frame: Frame, numbers: Sequence[Number], where: str) -> Figure:
    """Dots with whiskers: distance, precision, recall, sharpness of each diagnosed method against the baseline."""
    diagnosed = {n.method for n in numbers}
    methods = [m for m in frame.methods[1:] if m in diagnosed]
    distance = frame.metrics("fd_to_baseline")[0]
    shown = [(distance.name, "FD − that of the baseline"), (f"precision-{distance.features}", "precision"),
             (f"recall-{distance.features}", "recall"), ("sharpness", "sharpness")]  # fmt: skip
    shown = [(name, text) for name, text in shown if any(frame[m, name].value is not None for m in methods)]
    caption = f"{where}. Whiskers are one bootstrap standard error. Grey lines are the baseline, “{frame.methods[0]}”."
    figure = canvas(11.5, max(2.6, 0.28 * len(methods) + 0.6), "The images of each method", caption)
    for axis, (name, text) in zip(np.atleast_1d(figure.subplots(1, len(shown), sharey=True)), shown):
        values = [frame[m, name] for m in methods]
        x = [v.value if v.value is not None else np.nan for v in values]
        axis.errorbar(x, range(len(methods)), xerr=[v.error or 0 for v in values], fmt="o", markersize=4, color=INK)
        baseline = 0 if name == distance.name else frame[frame.methods[0], name].value
        if baseline is not None:
            axis.axvline(baseline, color="#9aa0aa", linewidth=1)
        axis.set_yticks(range(len(methods)), methods)
        label(axis, x=text, grid="x")
    figure.axes[0].invert_yaxis()
    return figure


def _levels(question: Question, numbers: Sequence[Number], where: str) -> Figure:
    rows = rows_of(question, numbers)
    quantities = [q for q in question.labels if any(row.quantity == q for row in rows)]
    names = list(dict.fromkeys(row.name for row in rows))
    whiskers = "the lowest and the highest site" if question.sites else "one standard error over images"
    caption = f"{where}. Over the noise level σ, noisiest on the left. Whiskers are {whiskers}."
    figure = canvas(11.5, 3.4 + 0.12 * max(0, len(names) - 14), question.title, caption)
    tints = colormaps["turbo"](np.linspace(0.05, 0.95, max(len(names), 2)))
    axes = np.atleast_1d(figure.subplots(1, len(quantities)))
    for axis, quantity in zip(axes, quantities):
        for row in (row for row in rows if row.quantity == quantity):
            i, points = names.index(row.name), []
            for step in sorted(row.by_step):
                found = [n for n in row.by_step[step] if n.value is not None]
                if not found:
                    continue
                values = [n.value for n in found if n.value is not None]
                mean = float(np.mean(values))
                spread = [mean - min(values), max(values) - mean] if len(values) > 1 else [found[0].error or 0.0] * 2
                points.append((found[0].sigma, mean, *spread))
            if points:
                x, y, low, high = zip(*points)
                axis.errorbar(x, y, yerr=[low, high], fmt=f"-{MARKS[i % len(MARKS)]}", markersize=3, linewidth=1,
                              elinewidth=0.7, color=tints[i], label=row.name[:SHORT])  # fmt: skip
        if quantity in ("common", "cosine", "best_scale"):
            axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_xscale("log")
        axis.invert_xaxis()
        if quantity == "best_scale":
            axis.set_yscale("symlog", linthresh=0.1)
        label(axis, question.labels[quantity], x="σ", grid="y")
    axes[-1].legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)
    return figure
