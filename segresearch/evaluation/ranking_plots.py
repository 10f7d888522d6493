"""The figures of a sweep: the ranking with its intervals, how much the scale matters, and what quality changes and
costs."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from segresearch.evaluation.frame import Frame
from segresearch.evaluation.plots import NAMES, field_height
from segresearch.evaluation.ranking import Ranked, metric_of, one_scale
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.image_grid import INK, QUIET, text_width
from segresearch.method_looks import line
from segresearch.plot_names import name_points
from segresearch.plot_style import (
    APART,
    SMALL,
    Number,
    Point,
    beyond,
    brief,
    canvas,
    dot,
    label,
    quoted,
    row_height,
    rows,
    window,
)  # fmt: skip

ACROSS = 3  # small panels beside each other


def draw_ranking(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> dict[str, Figure]:
    """The ranking, its scales, and the trade-offs, by name."""
    fd = frame.metrics("fd")[0]
    distance, agreement = metric_of(frame, "distance"), metric_of(frame, "text_alignment", "edges")
    axes = {"cost": "cost of an image, relative to the baseline's"}
    if distance:
        axes = {distance.name: f"{distance.head} to {quoted(spec.baseline)}, same noise"} | axes
    if agreement:
        axes[agreement.name] = agreement.head
    axes[f"recall-{fd.features}"] = "recall"
    titles = {"cost": "Quality against cost", f"recall-{fd.features}": "Quality against variety"}
    titles |= {distance.name: "Quality against change"} if distance else {}
    titles |= {agreement.name: "Quality against agreement"} if agreement else {}
    figures = {"ranking": _ranking(spec, frame, ranked, where)}
    if not one_scale(ranked):
        figures["scales"] = _scales(spec, frame, ranked, where)
    for metric, text in axes.items():
        if any(frame[one.at_best, metric].value is not None for one in ranked):
            name = f"tradeoff_{metric.partition('-')[0]}"
            figures[name] = _tradeoff(spec, frame, ranked, where, metric, (titles[metric], text))
    return figures


def _name(frame: Frame) -> str:
    return f"fd_to_baseline-{frame.metrics('fd')[0].features}"


def _axis(spec: EvaluationSpec, frame: Frame) -> str:
    return f"{frame.metrics('fd')[0].head} − that of {quoted(spec.baseline)}"


def _value(frame: Frame, method: str) -> Number:
    value = frame[method, _name(frame)].value
    return math.nan if value is None else value


def _error(frame: Frame, method: str) -> Number:
    return frame[method, _name(frame)].error or 0.0


def _ends(frame: Frame, ranked: Sequence[Ranked]) -> tuple[float, float]:
    """The range of differences that figures show: all methods at their best scale but for those far out, and 0."""
    bests = [_value(frame, one.at_best) for one in ranked]
    whiskers = [b + side * 2 * _error(frame, one.at_best) for b, one in zip(bests, ranked) for side in (-1, 1)]
    low, high = window(bests, keep=[0.0])
    inside = [w for w in whiskers if low - (high - low) <= w <= high + (high - low)]
    return window(inside, keep=[low, high], fences=math.inf)


def _ranking(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> Figure:
    single, bars = one_scale(ranked), "with one bootstrap standard error (dark) and two (light)"
    several = (
        f"Filled: the best of a method's scales, {bars}. Rings: its other scales; arrows: beyond the axis, with the "
        "value where the best is. The best of several scales is lower by chance too, which the bars do not hold."
    )
    caption = (
        f"{where}. Distance less that of “{spec.baseline}” on the same resampled images; left of 0 is better. "
        + (f"Each {bars}; arrows: beyond the axis." if single else several)
    )
    title = f"{len(ranked)} methods, each at {'one' if single else 'its best'} scale"
    texts = brief([one.name for one in ranked], NAMES)
    figure = canvas(1.1 + row_height(texts) * len(ranked), title, caption)
    axis = figure.subplots()
    low, high = _ends(frame, ranked)
    for place, one in enumerate(ranked):
        style, best = line(spec.methods[one.at_best]), _value(frame, one.at_best)
        for method in one.scales.values():
            value = _value(frame, method)
            if low <= value <= high and method != one.at_best:
                axis.plot(value, place, style["marker"], markersize=4, markerfacecolor="none", markeredgewidth=0.9,
                          color=style["color"], zorder=2)  # fmt: skip
            elif value > high or value < low:
                beyond(axis, value, place, (low, high), style["color"], method == one.at_best)
        if low <= best <= high:
            dot(axis, (best, place), _error(frame, one.at_best), style)
    axis.axvline(0, color=INK, linewidth=0.9)
    axis.set_xlim(low, high)
    label(axis, x=_axis(spec, frame), grid="x")
    rows(axis, [f"{place}  {text}" for place, text in enumerate(texts, 1)])
    return figure


def _scales(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str) -> Figure:
    caption = (
        f"{where}. {_axis(spec, frame)}, over the factor on a method's own scale; below the line is better. Bars "
        "are two paired bootstrap standard errors. A flat curve is robust to its scale; a best at an end may lie "
        "beyond it. Open marks at an edge lie beyond the axis."
    )
    across = min(ACROSS, len(ranked))
    lines = -(-len(ranked) // across)
    texts = brief([one.name for one in ranked], 3.1 / ACROSS)
    figure = canvas((0.91 + row_height(texts)) * lines + 0.5, "How much the scale matters", caption)
    panels: Any = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
    factors = sorted({factor for one in ranked for factor in one.scales})
    names = [f"×{factor:g}" for factor in factors]
    every = -(-sum(text_width(name, round(SMALL)) + APART for name in names) // int(72 * 3.1 / across))
    low, high = _ends(frame, ranked)
    for axis, one, text in zip(panels.flat, ranked, texts):
        style = line(spec.methods[one.at_best])
        x = [factors.index(factor) for factor in one.scales]
        y = [_value(frame, method) for method in one.scales.values()]
        errors = [2 * _error(frame, method) for method in one.scales.values()]
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.plot(x, y, "-", color=style["color"], linewidth=1.2)
        for place, value, error in zip(x, y, errors):
            whole = low <= value <= high
            axis.errorbar(place, min(max(value, low), high), error if whole else 0, fmt=style["marker"], markersize=4,
                          color=style["color"], markerfacecolor=style["color"] if whole else "white", elinewidth=1,
                          clip_on=whole)  # fmt: skip
        axis.set_title(text, fontsize=SMALL, color=INK, loc="left", pad=5)
        axis.set_xticks(range(len(factors)), [name if i % every == 0 else "" for i, name in enumerate(names)])
        axis.set_xlim(-0.35, len(factors) - 0.65)
        axis.set_ylim(low, high)
        axis.tick_params(labelsize=SMALL, colors=QUIET)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(panels.flat)[len(ranked) :]:
        axis.set_axis_off()
    for column in range(len(ranked) - (lines - 1) * across, across * (lines > 1)):  # columns whose last panel is empty
        panels[-2][column].tick_params(labelbottom=True)
    return figure


def _tradeoff(
    spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked], where: str, metric: str, texts: tuple[str, str]
) -> Figure:
    several = "Large: each method at its best scale; small and joined to it: its other scales. "
    caption = (
        f"{where}. {'' if one_scale(ranked) else several}Below 0 is better "
        f"than “{spec.baseline}” (the cross). What lies far out is beyond the axes."
    )
    figure = canvas(field_height(len(ranked)), texts[0], caption)
    axis = figure.subplots()
    low, high = _ends(frame, ranked)
    pairs = {one.name: {m: (frame[m, metric].value, _value(frame, m)) for m in one.scales.values()} for one in ranked}
    best = {one.name: x for one in ranked if (x := pairs[one.name][one.at_best][0]) is not None}
    base = frame[spec.baseline, metric].value
    origin = (0.0 if base is None else float(base), 0.0)
    left, right = window([*map(float, best.values())], keep=[origin[0]])
    points: dict[str, Point] = {}
    small = [origin]
    for one in ranked:
        style = line(spec.methods[one.at_best])
        inside = {m: (float(x), y) for m, (x, y) in pairs[one.name].items()
                  if x is not None and left <= x <= right and low <= y <= high}  # fmt: skip
        if inside:
            axis.plot(*zip(*inside.values()), "-", color=style["color"], linewidth=0.7, alpha=0.5)
        for method, point in inside.items():
            large = method == one.at_best
            axis.plot(*point, style["marker"], color=style["color"], markersize=6.5 if large else 3, zorder=3 + large,
                      alpha=1 if large else 0.6, markeredgecolor="white" if large else style["color"],
                      markeredgewidth=0.5)  # fmt: skip
            if large:
                points[one.name] = point
            else:
                small.append(point)
    axis.plot(*origin, "x", color=INK, markersize=7, markeredgewidth=1.6, zorder=5)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)
    label(axis, x=texts[1], y=_axis(spec, frame), grid="both")
    name_points(axis, points, others=small, levels=[0.0])
    return figure
