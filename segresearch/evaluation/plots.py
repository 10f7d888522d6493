"""The plots of an evaluation: Fréchet distance by method or blur σ and against LPIPS to the baseline, colours, the size
of the guidance."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from segresearch.config.method import CFGTerm, GuidanceConfig, PerturbedTerm
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import Frame, Metric
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.guidance import PAG, SEG
from segresearch.image_grid import INK, QUIET
from segresearch.method_looks import line, look
from segresearch.plot_names import name_lines, name_points
from segresearch.plot_style import (
    Number,
    brief,
    canvas,
    dot,
    label,
    letter,
    name_sigma,
    quoted,
    row_height,
    rows,
    window,
)

NAMES = 1.6  # inches of the names of rows
MOST_LINES = 12  # that one plot holds
LINES = ("-", "--", "-.", ":")  # of scales of one method


def kind(guidance: GuidanceConfig) -> str:
    """What a method is in W&B's filters: SEG, PAG, SAG, CFG, vanilla or other."""
    perturbations = [term.perturbation for term in guidance.terms.values() if isinstance(term, PerturbedTerm)]
    if any(isinstance(perturbation, SEG) for perturbation in perturbations):
        return "SEG"
    if guidance.sag is not None:
        return "SAG"
    if perturbations:
        return "PAG" if isinstance(perturbations[0], PAG) else "other"
    if guidance.every or guidance.post or guidance.conditionings or any(t.shape for t in guidance.terms.values()):
        return "other"
    return "CFG" if guidance.terms else "vanilla"


def family(guidance: GuidanceConfig) -> tuple[str, float] | None:
    """Methods that differ in SEG's σ alone make a line: its name and this σ; None for others."""
    terms = [term for term in guidance.terms.values() if isinstance(term, PerturbedTerm)]
    pairs = [(term.scale, term.perturbation) for term in terms if isinstance(term.perturbation, SEG)]
    if len(pairs) != 1:
        return None
    ((scale, seg),) = pairs
    words = [f"s = {scale:g}"] if isinstance(scale, float | int) else []
    words += [] if seg.on == "q" else [f"blur of {seg.on}"]
    words += [] if seg.where == "mid" else [str(seg.where)]
    weights = [term.weight for term in guidance.terms.values() if isinstance(term, CFGTerm)]
    return "SEG " + ", ".join(words + [f"CFG {w:g}" for w in weights if isinstance(w, float | int)]), seg.sigma


def draw(spec: EvaluationSpec, result: Result) -> dict[str, Figure]:
    """The plots that the frame has values for, by name."""
    where, frame, plots = spec.describe(result.reference_images), result.frame, {}
    if frame.metrics("fd"):
        families = {m: pair for m in frame.methods if (pair := family(spec.methods[m]))}
        plots["quality"] = _quality(spec, frame, where)
        if len({sigma for _, sigma in families.values()}) > 1:
            plots["blur"] = _over_sigma(spec, frame, families, where)
        if distance := next(iter(frame.metrics("distance")), None):
            plots["tradeoff"] = _tradeoff(spec, frame, distance, where)
    if frame.metrics("saturation"):
        plots["colour"] = _colour(spec, frame, where)
    if any(any(steps) for steps in result.norms.values()):
        plots["norms"] = _norms(spec, result.norms, where)
    return plots


def to_baseline(frame: Frame) -> tuple[dict[str, Number], dict[str, Number], str]:
    """Of each method the first Fréchet distance less the baseline's, its paired error, and the name of the axis."""
    fd = frame.metrics("fd")[0]
    differences = {m: frame[m, f"fd_to_baseline-{fd.features}"] for m in frame.methods}
    values, errors = ({m: getattr(row, key) or 0.0 for m, row in differences.items()} for key in ("value", "error"))
    return values, errors, f"{fd.head} − that of {quoted(frame.methods[0])}"


def within(values: Sequence[Number], errors: Sequence[Number], keep: Number = 0.0) -> tuple[float, float]:
    """The ends of an axis that shows values with two errors, but for those far out; `keep` in any case."""
    low, high = window(values, keep=[keep])
    reach = [v + side * 2 * e for v, e in zip(values, errors) for side in (-1, 1) if low <= v <= high]
    inside = [r for r in reach if low - (high - low) <= r <= high + (high - low)]
    return window(inside, keep=[low, high], fences=math.inf)


def field_height(methods: int) -> Number:
    """Inches of a plot of points with names."""
    return 4.0 + 0.1 * max(0, methods - 8)


def _quality(spec: EvaluationSpec, frame: Frame, where: str) -> Figure:
    values, errors, name = to_baseline(frame)
    caption = (
        f"{where}. Left of 0 is better than “{spec.baseline}”. Bars are one paired bootstrap standard error of the "
        "difference (dark) and two (light). Arrows: beyond the axis, with the value."
    )
    title = "Fréchet distance" + (f" of {len(values)} methods" if len(values) > 1 else "")
    texts = brief([*values], NAMES)
    figure = canvas(0.9 + row_height(texts) * len(values), title, caption)
    axis = figure.subplots()
    ends = within([*values.values()], [*errors.values()])
    for place, m in enumerate(values):
        dot(axis, (values[m], place), errors[m], line(spec.methods[m]), ends=ends)
    axis.axvline(0, color=INK, linewidth=0.9)
    axis.set_xlim(*ends)
    label(axis, x=name, grid="x")
    rows(axis, texts, bold=texts[:1])
    return figure


def _over_sigma(
    spec: EvaluationSpec, frame: Frame, families: Mapping[str, tuple[str, float]], where: str
) -> Figure:
    values, errors, name = to_baseline(frame)
    sigmas = sorted({sigma for _, sigma in families.values()})
    caption = (
        f"{where}. Below 0 is better than “{spec.baseline}”. Bars are one paired bootstrap standard error of the "
        "difference. Dashed: methods without a blur."
    )
    figure = canvas(3.7, "Fréchet distance against the blur", caption)
    axis, others = _beside(figure), [m for m in values if m not in families]
    ends, colors = {}, {}
    for i, one in enumerate(dict.fromkeys(name for name, _ in families.values())):
        some = sorted((m for m in families if families[m][0] == one), key=lambda m: families[m][1])
        x, y, error = zip(*((sigmas.index(families[m][1]), values[m], errors[m]) for m in some))
        style = {**line(spec.methods[some[-1]]), "alpha": 1.0}
        axis.errorbar(x, y, error, linestyle=LINES[i % len(LINES)], markersize=4, linewidth=1.3, capsize=2, **style)
        ends[one], colors[one] = (x[-1], y[-1]), style["color"]
    for m in others:
        colors[m] = look(spec.methods[m]).color
        axis.axhline(values[m], color=colors[m], linestyle=(0, (4, 3)), linewidth=1.1)
        ends[m] = (len(sigmas) - 1, values[m])
    axis.set_xticks(range(len(sigmas)), [name_sigma(s) for s in sigmas])
    axis.set_xlim(-0.3, len(sigmas) - 0.7)
    label(axis, x="blur σ (tokens)", y=name, grid="y")
    name_lines(axis, ends, colors)
    return figure


def _beside(figure: Figure, share: float = 0.68) -> Any:
    """An axis with room at its right for the names of lines."""
    axis, room = figure.subplots(1, 2, width_ratios=[share, 1 - share])
    room.set_axis_off()
    return axis


def _tradeoff(spec: EvaluationSpec, frame: Frame, distance: Metric, where: str) -> Figure:
    values, errors, name = to_baseline(frame)
    caption = (
        f"{where}. Against the distance to the image of “{spec.baseline}” from the same noise: lower left is better at "
        "less change. Bars are one paired bootstrap standard error. What lies far out is beyond the axis."
    )
    figure = canvas(field_height(len(values)), "Quality against change", caption)
    axis = figure.subplots()
    ends = within([*values.values()], [e / 2 for e in errors.values()])
    changes = {m: frame[m, distance.name].value or 0.0 for m in values}
    left, right = window([*changes.values()], keep=[0.0])
    points = {m: (x, values[m]) for m, x in changes.items() if left <= x <= right and ends[0] <= values[m] <= ends[1]}
    for m, (x, y) in points.items():
        style = line(spec.methods[m])
        axis.errorbar(x, y, errors[m], fmt=style["marker"], markersize=5, color=style["color"], elinewidth=1)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xlim(left, right)
    axis.set_ylim(*ends)
    label(axis, x=f"{distance.head} to {quoted(spec.baseline)}", y=name, grid="both")
    bars = [(x, y + share * errors[m]) for m, (x, y) in points.items() for share in np.linspace(-1, 1, 9) if errors[m]]
    name_points(axis, points, others=bars, levels=[0.0])
    return figure


def _colour(spec: EvaluationSpec, frame: Frame, where: str) -> Figure:
    caption = (
        f"{where}. Means over images: saturation (HSV) and contrast (deviation of the luminance) within an image, and "
        "the mean red, green and blue less those of the baseline. The line is the baseline. Too strong a guidance "
        "shows here first."
    )
    methods = frame.methods
    texts = brief(methods, 0.85 * NAMES)
    figure = canvas(0.9 + row_height(texts) * len(methods), "Saturation, contrast and colour", caption)
    *left, right = figure.subplots(1, 3, sharey=True)
    for axis, key in zip(left, ("saturation", "contrast")):
        for place, m in enumerate(methods):
            row = frame[m, key]
            if row.value is not None:
                dot(axis, (row.value, place), row.error or 0.0, line(spec.methods[m]))
        base = frame[spec.baseline, key].value
        if base is not None:
            axis.axvline(base, color=QUIET, linewidth=0.9)
        label(axis, x=key, grid="x")
    for channel, color, shift in (("red", "#c0392b", -0.31), ("green", "#2e7d4f", 0.0), ("blue", "#1f5fa8", 0.31)):
        values = np.array([frame[m, channel].value for m in methods], float)
        right.plot(values - values[0], np.arange(len(methods)) + shift, marker=letter(channel[0].upper()), linestyle="",
                   color=color, markersize=5.5, markeredgewidth=0)  # fmt: skip
    right.axvline(0, color=QUIET, linewidth=0.9)
    label(right, x="R, G, B", grid="x")
    for axis in (*left, right):
        axis.margins(x=0.12)
    rows(left[0], texts, bold=texts[:1])
    for axis in (left[1], right):
        axis.grid(axis="y", linewidth=0.4)
        axis.tick_params(axis="y", length=0)
    return figure


def _norm_ranges(spec: EvaluationSpec, shown: Mapping[str, Sequence[float]], where: str) -> Figure:
    """Of many methods the mean over the evaluations, and the range."""
    caption = (
        f"{where}. Root mean square over an image's latents of what guidance adds to the denoised prediction, mean "
        "over images: the mean over the evaluations of the model, and from the lowest to the highest of them. Arrows: "
        "beyond the axis."
    )
    texts = brief([*shown], NAMES)
    figure = canvas(0.9 + row_height(texts) * len(shown), "How much guidance adds", caption)
    axis = figure.subplots()
    means = {method: float(np.mean(steps)) for method, steps in shown.items()}
    ends = window([*means.values(), *(max(steps) for steps in shown.values())], keep=[0.0])
    for place, (method, steps) in enumerate(shown.items()):
        style = line(spec.methods[method])
        span = [min(steps), min(max(steps), ends[1])]
        axis.plot(span, [place, place], color=style["color"], linewidth=1.4, alpha=0.5)
        dot(axis, (means[method], place), 0.0, style, ends=ends)
    axis.set_xlim(*ends)
    label(axis, x="RMS of D − D[base]", grid="x")
    rows(axis, texts)
    return figure


def _norms(spec: EvaluationSpec, norms: Mapping[str, Sequence[float]], where: str) -> Figure:
    caption = (
        f"{where}. Root mean square over an image's latents of what guidance adds to the denoised prediction, mean "
        "over images, at each evaluation of the model from the noisiest on."
    )
    shown = {method: steps for method, steps in norms.items() if any(steps)}
    if len(shown) > MOST_LINES:
        return _norm_ranges(spec, shown, where)
    figure = canvas(max(3.4, 0.17 * len(shown)), "How much guidance adds, step by step", caption)
    axis, ends = _beside(figure), {}
    looks = {method: line(spec.methods[method]) for method in shown}
    for method, steps in shown.items():
        same = [m for m in shown if looks[m] == looks[method]]
        axis.plot(range(1, len(steps) + 1), steps, linestyle=LINES[same.index(method) % len(LINES)], markersize=3,
                  linewidth=1.2, **looks[method])  # fmt: skip
        ends[method] = (len(steps), steps[-1])
    top = max(max(steps) for steps in shown.values())
    if top > 0 and window([v for steps in shown.values() for v in steps])[1] < 0.5 * top:
        axis.set_ylim(0, 1.05 * window([v for steps in shown.values() for v in steps])[1])
    label(axis, x="evaluation", y="RMS of D − D[base]", grid="y")
    axis.locator_params(axis="x", integer=True)
    name_lines(axis, ends, {method: style["color"] for method, style in looks.items()})
    return figure
