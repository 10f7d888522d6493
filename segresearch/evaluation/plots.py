"""The plots of an evaluation: Fréchet distance against the blur's σ and against LPIPS to the baseline, colours, the
size of the guidance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segresearch.config.schema import CFGTerm, GuidanceConfig, PerturbedTerm
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import Frame
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.guidance import PAG, SEG
from segresearch.image_grid import INK, QUIET
from segresearch.plot_style import canvas, label, name_sigma

COLORS = {"vanilla": QUIET, "CFG": "#b8860b", "SEG": "#1f5fa8", "PAG": "#b03a2e", "SAG": "#2e7d4f", "other": "#7a4ea3"}
MARKS = "os^DvPX*<>"


def kind(guidance: GuidanceConfig) -> str:
    """What colours a method: SEG, PAG, SAG, CFG, vanilla or other."""
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
    where, plots = spec.describe(result.reference_images), {}
    if result.frame.metrics("fd"):
        plots["quality"] = _quality(spec, result.frame, where)
    if result.frame.metrics("saturation"):
        plots["colour"] = _colour(spec, result.frame, where)
    if any(any(steps) for steps in result.norms.values()):
        plots["norms"] = _norms(result.norms, where)
    return plots


def _quality(spec: EvaluationSpec, frame: Frame, where: str) -> Figure:
    fd, distance = frame.metrics("fd")[0], next(iter(frame.metrics("distance")), None)
    name = f"{fd.head} − that of “{spec.baseline}”"
    rows = {m: frame[m, f"fd_to_baseline-{fd.features}"] for m in frame.methods}  # paired, so with a smaller error
    values, errors = ({m: getattr(row, key) or 0.0 for m, row in rows.items()} for key in ("value", "error"))
    colors = {m: COLORS[kind(spec.methods[m])] for m in frame.methods}
    families = {m: pair for m in frame.methods if (pair := family(spec.methods[m]))}
    sigmas = sorted({sigma for _, sigma in families.values()})
    ranked = len(sigmas) > 1
    caption = (
        f"{where}. Whiskers are one bootstrap standard error of the difference. Left: "
        f"{'against the σ of the blur' if ranked else 'each method'}; below 0 is better than “{spec.baseline}”. Right: "
        f"against the distance to the image of “{spec.baseline}” from the same noise; lower left is better at less "
        "change."
    )
    height = max(3.8, 0 if ranked else 0.3 * len(values))
    figure = canvas(11.5, height, f"Quality of {len(values)} methods", caption)
    left, right = figure.subplots(1, 2)
    if ranked:
        for mark, line in zip(MARKS * len(values), dict.fromkeys(line for line, _ in families.values())):
            some = sorted((m for m in families if families[m][0] == line), key=lambda m: families[m][1])
            x, y, error = zip(*((sigmas.index(families[m][1]), values[m], errors[m]) for m in some))
            left.errorbar(x, y, error, fmt=f"-{mark}", markersize=4, linewidth=1.4, label=line, capsize=2)
        for m in (m for m in values if m not in families):
            left.axhline(values[m], color=colors[m], linestyle="--", linewidth=1.1, label=m)
        left.set_xticks(range(len(sigmas)), [name_sigma(s) for s in sigmas])
        left.legend(fontsize=7.5, frameon=False)
        label(left, x="blur σ (tokens)", y=name, grid="y")
    else:
        left.barh([*values], values.values(), xerr=[*errors.values()], color=[*colors.values()], height=0.7, ecolor=INK)
        left.axvline(0, color=INK, linewidth=0.8)
        left.invert_yaxis()
        label(left, x=name)
    if distance is None:
        right.set_axis_off()
        return figure
    points = {m: (frame[m, distance.name].value or 0.0, values[m]) for m in values}
    for m, point in points.items():
        right.errorbar(*point, errors[m], fmt="o", markersize=5, color=colors[m])
    right.margins(x=0.12)
    name_points(right, points)
    label(right, x=f"{distance.head} to “{spec.baseline}”", y=name, grid="both")
    return figure


def name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside every (x, y): inward, so that it stays inside, and above a name it would lie on."""
    axes.autoscale_view()
    scale = 72 / axes.figure.dpi  # points a pixel
    middle, _ = axes.transAxes.transform((0.6, 0.5)) * scale
    taken: list[tuple[float, float, float]] = []  # height, start and end of the names, in points
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axes.transData.transform(point) * scale
        side, width = (1 if x < middle else -1), 4.2 * len(name)
        start, height = x + 5 * side - (width if side < 0 else 0), y + 4
        for other, begin, end in sorted(taken):
            if begin < start + width and start < end and abs(height - other) < 9:
                height = other + 9
        taken.append((height, start, start + width))
        axes.annotate(name, point, (5 * side, height - y), textcoords="offset points", fontsize=7.5, color=INK,
                      ha="left" if side > 0 else "right")  # fmt: skip


def _colour(spec: EvaluationSpec, frame: Frame, where: str) -> Figure:
    caption = (
        f"{where}. Means over images: saturation (HSV) and contrast (deviation of the luminance) within an image, and "
        "the mean red, green and blue less those of the baseline. Too strong a guidance shows here first."
    )
    rows = np.arange(len(frame.methods))
    figure = canvas(11.5, max(2.6, 0.3 * len(rows)), "Saturation, contrast and colour", caption)
    *left, right = figure.subplots(1, 3, sharey=True)
    colors = [COLORS[kind(spec.methods[m])] for m in frame.methods]
    for axis, key in zip(left, ("saturation", "contrast")):
        axis.barh(rows, [frame[m, key].value for m in frame.methods], color=colors, height=0.7)
        label(axis, x=key)
    for channel, color, shift in (("red", "#c0392b", -0.25), ("green", "#2e7d4f", 0.0), ("blue", "#1f5fa8", 0.25)):
        values = np.array([frame[m, channel].value for m in frame.methods], float)
        right.barh(rows + shift, values - values[0], color=color, height=0.24)
    right.axvline(0, color=INK, linewidth=0.8)
    right.locator_params(axis="x", nbins=4)
    label(right, x="colour − that of the baseline")
    left[0].set_yticks(rows, frame.methods)
    left[0].invert_yaxis()
    return figure


def _norms(norms: Mapping[str, Sequence[float]], where: str) -> Figure:
    caption = (
        f"{where}. Root mean square over an image's latents of what guidance adds to the denoised prediction, mean "
        "over images, at each evaluation of the model from the noisiest on."
    )
    figure = canvas(11.5, 3.8, "How much guidance adds, step by step", caption)
    axis = figure.subplots()
    shown = {method: steps for method, steps in norms.items() if any(steps)}
    tints = colormaps["viridis"](np.linspace(0, 0.9, max(len(shown), 2)))
    for i, (method, steps) in enumerate(shown.items()):
        axis.plot(range(1, len(steps) + 1), steps, f"-{MARKS[i % len(MARKS)]}", markersize=3, linewidth=1.2,
                  label=method, color=tints[i] if len(shown) > 8 else None)  # fmt: skip
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(axis, x="evaluation", y="RMS of D − D[base]", grid="y")
    return figure
