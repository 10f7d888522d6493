"""The figures of a sweep: the ranking with its intervals, and what quality costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from segresearch.evaluation.frame import Frame
from segresearch.evaluation.plots import COLORS, kind, name_points
from segresearch.evaluation.ranking import Ranked, metric_of
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.image_grid import INK, QUIET
from segresearch.plot_style import canvas, label


def draw_ranking(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> dict[str, Figure]:
    """The ranking, and the trade-offs, by name."""
    return {"ranking": _ranking(spec, frame, ranked, where), "tradeoffs": _tradeoffs(spec, frame, ranked, where)}


def _ranking(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> Figure:
    fd = frame.metrics("fd")[0]
    caption = (
        f"{where}. Distance less that of “{spec.baseline}” on the same resampled images; left of 0 is better. Filled: "
        "the best of a method's scales, with one bootstrap standard error (dark) and two (light). Rings: its other "
        "scales. The best of several scales is lower by chance too, which the whiskers do not hold."
    )
    figure = canvas(11.5, max(2.6, 0.3 * len(ranked) + 0.5), f"{len(ranked)} methods, each at its best scale", caption)
    axis = figure.subplots()
    for place, one in enumerate(ranked):
        best = frame[one.at_best, f"fd_to_baseline-{fd.features}"]
        others = [frame[m, f"fd_to_baseline-{fd.features}"].value for m in one.scales.values() if m != one.at_best]
        color = COLORS[kind(spec.methods[one.at_best])]
        if best.value is None:
            continue
        axis.scatter([v for v in others if v is not None], [place] * sum(v is not None for v in others), s=18,
                     facecolors="none", edgecolors=color, linewidths=0.9, zorder=2)  # fmt: skip
        error = best.error or 0.0
        axis.plot(
            [best.value - 2 * error, best.value + 2 * error], [place, place], color=color, alpha=0.35, linewidth=1.2
        )
        axis.errorbar(best.value, place, xerr=error, fmt="o", markersize=5.5, color=color, elinewidth=2, zorder=3)
    axis.axvline(0, color=INK, linewidth=0.9)
    axis.set_yticks(range(len(ranked)), [f"{place}  {one.name}" for place, one in enumerate(ranked, 1)])
    axis.invert_yaxis()
    bests = [frame[one.at_best, f"fd_to_baseline-{fd.features}"].value or 0.0 for one in ranked]
    if bests and max(_largest(frame, ranked, fd.features)) > 20 * max(1.0, *map(abs, bests)):
        axis.set_xscale("symlog", linthresh=max(1.0, float(np.median(np.abs(bests)))))
    label(axis, x=f"{fd.head} − that of “{spec.baseline}”", grid="x")
    return figure


def _largest(frame: Frame, ranked: Sequence[Ranked], net: str) -> list[float]:
    return [abs(frame[m, f"fd_to_baseline-{net}"].value or 0.0) for one in ranked for m in one.scales.values()]


def _tradeoffs(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> Figure:
    fd = frame.metrics("fd")[0]
    name = f"fd_to_baseline-{fd.features}"
    distance, agreement = metric_of(frame, "distance"), metric_of(frame, "text_alignment", "edges")
    axes = [(m.name, text) for m, text in ((distance, f"{distance.head} to “{spec.baseline}”" if distance else ""),
                                           (agreement, agreement.head if agreement else "")) if m]  # fmt: skip
    axes = [*axes, ("cost", "cost, relative to the baseline's"), (f"recall-{fd.features}", "recall")][:3]
    caption = (
        f"{where}. Every method at all its scales, joined, the best scale filled; below 0 is better than the baseline. "
        "Names are of the best scales of the first twelve."
    )
    figure = canvas(11.5, 4.4, "Quality against what it changes and costs", caption)
    for axis, (metric, text) in zip(np.atleast_1d(figure.subplots(1, len(axes), sharey=True)), axes):
        points = {}
        for place, one in enumerate(ranked):
            color = COLORS[kind(spec.methods[one.at_best])]
            pairs = [(frame[m, metric].value, frame[m, name].value) for m in one.scales.values()]
            whole = [(x, y) for x, y in pairs if x is not None and y is not None]
            if not whole:
                continue
            axis.plot(*zip(*whole), "-o", color=color, markersize=2.5, linewidth=0.7, alpha=0.6, markerfacecolor="none")
            x, y = frame[one.at_best, metric].value, frame[one.at_best, name].value
            if x is not None and y is not None:
                axis.plot(x, y, "o", color=color, markersize=4.5)
                if place < 12:
                    points[one.name] = (x, y)
        x = frame[spec.baseline, metric].value
        axis.plot(0.0 if x is None else x, 0, "s", color=QUIET, markersize=5)
        axis.axhline(0, color=INK, linewidth=0.8)
        bests = [abs(frame[one.at_best, name].value or 0.0) for one in ranked]
        if bests and max(_largest(frame, ranked, fd.features)) > 20 * max(1.0, *bests):
            axis.set_yscale("symlog", linthresh=max(1.0, float(np.median(bests))))
        axis.margins(x=0.12)
        name_points(axis, points)
        label(axis, x=text, y=f"{fd.head} − that of “{spec.baseline}”" if axis is figure.axes[0] else "", grid="both")
    return figure
