"""The figures of a study: distances against the blur's σ, quality against change, colours, the size of the guidance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from segresearch.analysis.figures import INK, QUIET, RULE, canvas, name_sigma
from segresearch.config import CFGTerm, GuidanceConfig, PerturbedTerm
from segresearch.evaluation.spec import Study
from segresearch.evaluation.table import DISTANCES, FRECHET, Row
from segresearch.guidance import PAG, SEG, Ramp

COLORS = {"vanilla": QUIET, "CFG": "#b8860b", "SEG": "#1f5fa8", "PAG": "#b03a2e", "SAG": "#2e7d4f", "other": "#7a4ea3"}
MARKS = "os^DvPX*<>"


def _segs(guidance: GuidanceConfig) -> list[tuple[PerturbedTerm, SEG]]:
    terms = [t for t in guidance.terms.values() if isinstance(t, PerturbedTerm)]
    return [(t, t.perturbation) for t in terms if isinstance(t.perturbation, SEG)]


def method(guidance: GuidanceConfig) -> str:
    """What colours a setting: SEG, PAG, SAG, CFG, vanilla or other."""
    if _segs(guidance):
        return "SEG"
    if guidance.sag is not None:
        return "SAG"
    kinds = [type(t.perturbation) for t in guidance.terms.values() if isinstance(t, PerturbedTerm)]
    if kinds:
        return "PAG" if kinds[0] is PAG else "other"
    return "CFG" if any(isinstance(t, CFGTerm) for t in guidance.terms.values()) else "vanilla"


def family(guidance: GuidanceConfig) -> tuple[str, float] | None:
    """Settings that differ in SEG's σ alone make a line: its name and this σ; None for others."""
    found = _segs(guidance)
    if len(found) != 1:
        return None
    term, seg = found[0]
    words = [] if isinstance(term.scale, Ramp) else [f"s = {term.scale:g}"]
    words += [] if seg.on == "q" else [f"blur of {seg.on}"]
    words += [] if seg.where == "mid" else [str(seg.where)]
    cfg = [t.weight for t in guidance.terms.values() if isinstance(t, CFGTerm) and not isinstance(t.weight, Ramp)]
    return "SEG " + ", ".join(words + [f"CFG {w:g}" for w in cfg]), seg.sigma


def _number(row: Row, key: str) -> float:
    """0 where it has none, as the first setting's distance to itself."""
    return float(row.get(key) or 0.0)


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [_number(row, key) for row in rows]


def draw(plan: Study, rows: Sequence[Row], norms: Mapping[str, Sequence[float]], where: str) -> dict[str, Figure]:
    """By name: what there is to be drawn of these rows. where: the run, in words."""
    guidance = {row["setting"]: plan.settings[row["setting"]] for row in rows}
    key = next((k for k in rows[0] if k.startswith("fd-") and k.count("-") == 1), None)
    apart = next((k for k in rows[0] if k.startswith("distance-") and k.count("-") == 1), None)
    found = {}
    if key is not None:
        found["quality"] = _quality(rows, guidance, key, apart, where, plan.first)
    if "saturation" in rows[0]:
        found["colour"] = _colour(rows, guidance, where)
    if any(any(steps) for steps in norms.values()):
        found["norms"] = _norms(norms, guidance, where)
    return found


def _named(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside every (x, y): inward, so that it stays inside, and above a name it would lie on."""
    axes.autoscale_view()
    pixels = axes.transData.transform([point[:2] for point in points])
    turn = axes.transAxes.transform((0.6, 0.5))[0]
    scale = 72 / axes.figure.dpi  # points a pixel
    taken: list[tuple[float, float, float]] = []
    for (x, y, text), (x_pixels, y_pixels) in sorted(zip(points, pixels), key=lambda pair: pair[1][1]):
        right_of = x_pixels < turn
        width = 4.2 * len(text)  # points, about
        start = x_pixels * scale + (5 if right_of else -5 - width)
        height = y_pixels * scale + 4
        for begin, end, other in sorted(taken, key=lambda t: t[2]):
            if begin < start + width and start < end and abs(height - other) < 9:
                height = other + 9
        taken.append((start, start + width, height))
        offset = (5 if right_of else -5, height - y_pixels * scale)
        axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=7.5, color=INK,
                      ha="left" if right_of else "right")  # fmt: skip


def _quality(
    rows: Sequence[Row], guidance: Mapping[str, GuidanceConfig], key: str, apart: str | None, where: str, first: str
) -> Figure:
    name = f"{FRECHET[key.partition('-')[2]]} − that of “{first}”"
    key = f"{key}-first"  # of the same resampled pictures, whose error is smaller than those of the two
    lines: dict[str, list[Row]] = {}
    for row in rows:
        found = family(guidance[row["setting"]])
        if found:
            lines.setdefault(found[0], []).append(row)
    sigmas = sorted({f[1] for g in guidance.values() if (f := family(g))})
    ranked = len(sigmas) > 1
    caption = (
        f"{where}. Whiskers are one bootstrap standard error of the difference. Left: "
        f"{'against the σ of the blur' if ranked else 'each setting'}; below 0 is better than “{first}”. Right: "
        f"against the distance to the picture of “{first}” from the same noise; lower left is better at less change."
    )
    figure = canvas(11.5, max(3.8, 0 if ranked else 0.3 * len(rows)), f"Quality of {len(rows)} settings", caption)
    left, right = figure.subplots(1, 2)
    colors = {setting: COLORS[method(g)] for setting, g in guidance.items()}
    if ranked:
        spread: list[float] = [*sigmas]
        for i, (line, some) in enumerate(lines.items()):
            some = sorted(some, key=lambda r: family(guidance[r["setting"]])[1])  # type: ignore[index]
            x = [spread.index(family(guidance[r["setting"]])[1]) for r in some]  # type: ignore[index]
            left.errorbar(x, _numbers(some, key), _errors(some, key), fmt=f"-{MARKS[i % len(MARKS)]}", markersize=4,
                          linewidth=1.4, label=line, capsize=2)  # fmt: skip
        for row in rows:
            if family(guidance[row["setting"]]) is None:
                left.axhline(_number(row, key), color=colors[row["setting"]], linestyle="--", linewidth=1.1,
                             label=row["setting"])  # fmt: skip
        left.set_xticks(range(len(spread)), [name_sigma(s) for s in spread])
        left.set_xlabel("blur σ (tokens)", fontsize=9)
        left.set_ylabel(name, fontsize=9)
        left.legend(fontsize=7.5, frameon=False)
        left.grid(axis="y", color=RULE, linewidth=0.6)
    else:
        for y, row in enumerate(rows):
            left.barh(y, _number(row, key), xerr=_number(row, f"{key}-error"), color=colors[row["setting"]],
                      height=0.7, ecolor=INK)  # fmt: skip
        left.set_yticks(range(len(rows)), [row["setting"] for row in rows], fontsize=8)
        left.axvline(0, color=INK, linewidth=0.8)
        left.invert_yaxis()
        left.set_xlabel(name, fontsize=9)
    if apart is None:
        right.set_axis_off()
        return figure
    for row in rows:
        x_at = 0.0 if row.get(apart) is None else row[apart]
        error = _number(row, f"{key}-error")
        right.errorbar(x_at, _number(row, key), error, fmt="o", markersize=5, color=colors[row["setting"]])
    right.margins(x=0.12)
    _named(right, [(row[apart] or 0.0, _number(row, key), str(row["setting"])) for row in rows])
    right.set_xlabel(f"{DISTANCES[apart.partition('-')[2]]} to “{first}”", fontsize=9)
    right.set_ylabel(name, fontsize=9)
    right.grid(color=RULE, linewidth=0.6)
    return figure


def _errors(rows: Sequence[Row], key: str) -> list[float]:
    return [_number(row, f"{key}-error") for row in rows]


def _colour(rows: Sequence[Row], guidance: Mapping[str, GuidanceConfig], where: str) -> Figure:
    caption = (
        f"{where}. Means over pictures: saturation (HSV) and contrast (deviation of the luminance) within a picture, "
        "and the mean red, green and blue less those of the first setting. Too strong a guidance shows here first."
    )
    figure = canvas(11.5, max(2.6, 0.3 * len(rows)), "Saturation, contrast and colour", caption)
    panels: Any = figure.subplots(1, 3, sharey=True)
    for axis, key in zip(panels, ("saturation", "contrast")):
        for y, row in enumerate(rows):
            axis.barh(y, row[key], color=COLORS[method(guidance[row["setting"]])], height=0.7)
        axis.set_xlabel(key, fontsize=9)
    for channel, color, shift in (("red", "#c0392b", -0.25), ("green", "#2e7d4f", 0.0), ("blue", "#1f5fa8", 0.25)):
        drift = [row[channel] - rows[0][channel] for row in rows]
        panels[2].barh([y + shift for y in range(len(rows))], drift, color=color, height=0.24)
    panels[2].axvline(0, color=INK, linewidth=0.8)
    panels[2].locator_params(axis="x", nbins=4)
    panels[2].set_xlabel("colour − that of the first", fontsize=9)
    panels[0].set_yticks(range(len(rows)), [row["setting"] for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def _norms(norms: Mapping[str, Sequence[float]], guidance: Mapping[str, GuidanceConfig], where: str) -> Figure:
    caption = (
        f"{where}. Root mean square over a picture's latents of what guidance adds to the denoised prediction, mean "
        "over pictures, at each evaluation of the model from the noisiest on."
    )
    figure = canvas(8.0, 3.4, "How much guidance adds, step by step", caption)
    axis = figure.subplots()
    shown = [s for s, steps in norms.items() if any(steps)]
    tints = colormaps["viridis"](np.linspace(0, 0.9, max(len(shown), 2)))
    for i, setting in enumerate(shown):
        steps, tint = norms[setting], {} if len(shown) <= 8 else {"color": tints[i]}
        axis.plot(range(1, len(steps) + 1), steps, f"-{MARKS[i % len(MARKS)]}", markersize=3, linewidth=1.2,
                  label=setting, **tint)  # fmt: skip
    axis.set_xlabel("evaluation", fontsize=9)
    axis.set_ylabel("RMS of D − D[base]", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    return figure
