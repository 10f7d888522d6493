"""Figures of the energy landscape, each readable on its own: title, axes with units, and a caption in the picture.

Each function takes plain numbers (rows of `segresearch.analysis.measurements`, or arrays) and returns a Figure of
matplotlib; nothing is shown, and pyplot's global state is not touched. `save` writes one atomically as PNG.
"""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from segresearch.analysis.measurements import Row, chosen, short, values
from segresearch.analysis.regimes import Limits
from segresearch.png_metadata import KEY
from segresearch.runs import plain, replacing

INK, QUIET, RULE = "#16181d", "#5f6672", "#d9dce1"
HOLDS, FAILS = "#2166ac", "#c4501b"
BOUNDARY_COLORS = {"reflect": "#c4501b", "symmetric": "#2166ac", "circular": "#3a8f5c", "exact": "#7a4ea3"}
STYLE = {"reflect": "-", "symmetric": "--", "circular": ":", "exact": "-."}
LIGHT = LinearSegmentedColormap.from_list("margin", ["#e58a5f", "#f8d9c6", "#ffffff", "#cfe0f0", "#7fb0dd"])
MARKS: dict[float, tuple[str, dict[str, Any]]] = {  # how a head is drawn by its share of columns, from this on
    1.0: ("head: all columns", {"ms": 3, "mew": 0.4, "mec": "white", "mfc": HOLDS}),
    0.95: ("95 % or more", {"ms": 3.2, "mew": 0.8, "mec": HOLDS, "mfc": "white"}),
    0.5: ("half or more", {"ms": 3.6, "mew": 0.9, "mec": FAILS, "mfc": "white"}),
    0.0: ("fewer", {"ms": 3.6, "mew": 0.4, "mec": "white", "mfc": FAILS}),
}
CHARACTERS = 15.5  # of a caption's line, an inch


def canvas(width: float, height: float, title: str, caption: str) -> Figure:
    """An empty figure (inches) with its title above and its caption below, and room for axes between."""
    lines = textwrap.wrap(caption, int((width - 0.4) * CHARACTERS))
    head, foot = 0.42, 0.2 + 0.165 * len(lines)
    total = height + head + foot
    figure = Figure(figsize=(width, total), dpi=130, layout="constrained", facecolor="white")
    figure.text(0.2 / width, 1 - 0.14 / total, title, ha="left", va="top", fontsize=12, weight="bold", color=INK)
    figure.text(0.2 / width, 0.1 / total, "\n".join(lines), ha="left", va="bottom", fontsize=8.5, color=QUIET)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, foot / total, 1, height / total))
    return figure


def save(figure: Figure, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write `figure` to `path` as PNG, atomically, with `settings` in its text chunk as pictures have theirs."""
    said = {} if settings is None else {KEY: json.dumps(plain(settings), ensure_ascii=False, sort_keys=True)}
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": "segresearch", **said})


def _plain(axis: Any, title: str = "", x: str = "", y: str = "") -> Any:
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8, colors=QUIET)
    for side in ("top", "right"):
        if side in axis.spines:
            axis.spines[side].set_visible(False)
    return axis


def name_sigma(sigma: float) -> str:
    """A blur sigma as it is written: "1", "0.5", "∞"."""
    return "∞" if np.isinf(sigma) else f"{sigma:g}"


def against_sigma(rows: Sequence[Row], model: str) -> Figure:
    """Mean, variance and lse of the logits after the blur, over its sigma, by boundary: Lemmas 3.1 and 3.2."""
    sigmas = sorted({row["blur_sigma"] for row in rows})
    caption = (
        "Each line is the median over sites, heads and noise levels of a head's mean over keys and images; the bands "
        "(reflect, exact) are the middle half. Left: shift of a column's mean over queries, in standard deviations "
        "of that column (Lemma 3.1 says 0). Middle: variance after the blur over variance before (Lemma 3.1 says at "
        "most 1). Right: fall of the log-sum-exp (Lemma 3.2; the fall is at least 0 for a doubly stochastic blur), "
        "with the second-order approximation, half the fall of the variance, as dots."
    )
    figure = canvas(11.5, 3.4, f"What the query blur does to the logits of {model}", caption)
    panels = figure.subplots(1, 3)
    titles = ("shift of the mean (Lemma 3.1)", "variance after / before (Lemma 3.1)", "fall of the lse (Lemma 3.2)")
    units = ("shift / standard deviation", "ratio", "nats")
    for axis, title, unit, column in zip(panels, titles, units, ("mean_shift", "variance_ratio", "lse_fall")):
        _plain(axis, title, "blur σ (tokens)", unit)
        for boundary in dict.fromkeys(row["boundary"] for row in rows):
            parts = [values(chosen(rows, boundary=boundary, blur_sigma=s), column) for s in sigmas]
            low, middle, high = (np.array([np.quantile(p, f) for p in parts]) for f in (0.25, 0.5, 0.75))
            color = BOUNDARY_COLORS[boundary]
            axis.plot(middle, STYLE[boundary], color=color, label=boundary, linewidth=1.8)
            if boundary in ("reflect", "exact"):
                axis.fill_between(range(len(sigmas)), low, high, color=color, alpha=0.12, linewidth=0)
            if column == "lse_fall" and boundary in ("exact", "reflect"):
                taylor = [
                    np.median(values(chosen(rows, boundary=boundary, blur_sigma=s), "taylor_fall")) for s in sigmas
                ]
                axis.plot(taylor, "o", color=color, markersize=3.5)
        axis.set_xticks(range(len(sigmas)), [name_sigma(s) for s in sigmas])
        axis.grid(axis="y", color=RULE, linewidth=0.6)
    panels[1].axhline(1, color=INK, linewidth=0.8)
    panels[0].legend(fontsize=8, frameon=False, title="boundary", title_fontsize=8)
    return figure


Margin = Callable[[float, float], tuple[float, float]]


def on_map(row: Row) -> bool:
    """Whether a row has a place on the regime map: a finite blur, and logits that vary."""
    return 0 < row["blur_sigma"] < np.inf and row["spread"] > 1e-6


def regime_map(rows: Sequence[Row], grid: tuple[int, int], margin: Margin, boundary: str, model: str) -> Figure:
    """Where Theorem 3.1's conclusion holds: margin over logit spread and blur sigma, the model's heads as points.

    margin(spread, sigma): (under eqs. 19 and 20, by the chain rule), in nats per token, above 0 where it holds.
    """
    mine = [r for r in chosen(rows, boundary=boundary) if on_map(r)]
    spreads = values(mine, "spread")
    xs = np.geomspace(min(0.1, spreads.min() / 1.3), max(10.0, spreads.max() * 1.3), 28)
    top = max([4.0, *(r["blur_sigma"] for r in mine)])
    ys = np.geomspace(0.3, top * 1.35, 22)
    fields = np.array([[margin(float(x), float(y)) for x in xs] for y in ys])  # (sigma, spread, 2)
    caption = (
        f"Colour: margin of the conclusion, log|det H| − log|det H̃| over the {grid[0] * grid[1]} tokens, for "
        f"white-noise logits of that standard deviation on a {grid[0]}×{grid[1]} grid ({boundary} boundary); above 0 "
        "(blue) the blur attenuates the curvature; the black line is 0. Points: the model's heads at the spread of "
        "their logits over queries (jittered in σ), at every measured noise level, marked by the share of their "
        "columns for which it holds. Logits of a model are smoother than white noise, so that a blur lowers their lse "
        "less: a point may hold where the noise around it fails."
    )
    figure = canvas(11.5, 4.2, f"Regime map of Theorem 3.1: {model}", caption)
    panels = figure.subplots(1, 2, sharey=True)
    titles = (
        "as in eqs. (19) and (20): Π ξ(ã)ᵢ bᵢᵢ against Π ξ(a)ᵢ",
        "by the chain rule: pdet(BᵀH(ã)B) against pdet H(a)",
    )
    jitter = np.random.default_rng(0)
    limit = float(np.quantile(np.abs(fields[np.isfinite(fields)]), 0.8))
    for index, (axis, title, column) in enumerate(zip(panels, titles, ("eq20_holds", "chain_holds"))):
        _plain(axis, title, "standard deviation of the logits over queries", "blur σ (tokens)" if not index else "")
        shown = fields[..., index].clip(-limit, limit)
        mesh = axis.contourf(
            xs, ys, shown, np.linspace(-limit, limit, 25), cmap=LIGHT, norm=TwoSlopeNorm(0, -limit, limit)
        )
        if fields[..., index].min() < 0 < fields[..., index].max():
            axis.contour(xs, ys, fields[..., index], [0], colors=INK, linewidths=1.4)
        y, shares = values(mine, "blur_sigma") * np.exp(jitter.uniform(-0.08, 0.08, len(mine))), values(mine, column)
        for least, (_, look) in reversed(MARKS.items()):
            higher = [other for other in MARKS if other > least]
            here = (shares >= least) & (shares < min(higher, default=2))
            axis.plot(spreads[here], y[here], "o", **look)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = sorted({r["blur_sigma"] for r in mine})
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_xlim(xs[0], xs[-1])
        axis.set_ylim(ys[0], ys[-1])
    bar = figure.colorbar(mesh, ax=panels, pad=0.01, aspect=28, ticks=MaxNLocator(7))
    bar.set_label("margin (nats per token)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    marks = [Line2D([], [], marker="o", linestyle="", label=label, **look) for label, look in MARKS.values()]
    figure.legend(handles=marks, fontsize=8.5, loc="upper right", ncols=4, frameon=False, handletextpad=0.1)
    return figure


def limits(found: Sequence[Limits], where: str) -> Figure:
    """How far the blurred logits are from the two limits of the blur, over its sigma."""
    caption = (
        "Root mean square over a column, as a share of its standard deviation, over all heads, keys and images of "
        f"{where}. Left: distance of the blurred logits to the original ones, which goes to 0 with σ under every "
        "boundary. Right: distance to the column's mean. The exact Gaussian reaches it; the cut kernels, the "
        "official code's reflect among them, stop short at every finite σ, so that σ = ∞ is a jump for them."
    )
    figure = canvas(9.5, 3.1, "The two limits of the blur", caption)
    near, far = figure.subplots(1, 2, sharey=True)
    for axis, title in ((near, "distance to the original"), (far, "distance to the mean")):
        _plain(axis, title, "blur σ (tokens)", "rms / standard deviation" if axis is near else "")
        for one in found:
            y = one.to_identity if axis is near else one.to_mean
            axis.plot(
                one.sigmas,
                y,
                STYLE[one.boundary],
                color=BOUNDARY_COLORS[one.boundary],
                label=one.boundary,
                linewidth=1.8,
            )
        axis.set_xscale("log")
        axis.grid(axis="y", color=RULE, linewidth=0.6)
    far.legend(fontsize=8, frameon=False, title="boundary", title_fontsize=8)
    return figure


def heat_maps(rows: Sequence[Row], sigma: float, boundary: str, model: str) -> Figure:
    """Per site and noise level, the mean over heads, keys and images."""
    mine = chosen(rows, boundary=boundary, blur_sigma=sigma)
    sites = list(dict.fromkeys(row["site"] for row in sorted(mine, key=lambda r: r["layer"])))
    steps = sorted({row["step"] for row in mine})
    noise = [float(np.mean(values(chosen(mine, step=step), "sigma_t"))) for step in steps]
    name = f"blur σ = {name_sigma(sigma)}, {boundary}"
    caption = (
        "One row a self-attention site, in the order of a forward pass; one column a measured step, at its noise "
        "level σ_t. Means over heads, keys and images. Columns of logits run over queries, as in Definition 2.1. The "
        f"four panels on the right are for {name}: variance after / before, fall of the lse in nats, and the share of "
        "(head, key, image) where the conclusion of Theorem 3.1 holds, as in eqs. (19) and (20) and by the chain "
        "rule."
    )
    figure = canvas(13.0, 1.5 + 0.2 * len(sites), f"Layer by layer, step by step: {model}", caption)
    panels = figure.subplots(1, 6, sharey=True)
    columns = ("spread", "rank_share", "variance_ratio", "lse_fall", "eq20_holds", "chain_holds")
    titles = (
        "logit std",
        "effective rank / n",
        "variance ratio",
        "lse fall",
        "Thm 3.1, eq. (20)",
        "Thm 3.1, chain rule",
    )
    for axis, column, title in zip(panels, columns, titles):
        _plain(axis, title, "noise level σ_t")
        field = np.array([[np.mean(values(chosen(mine, site=s, step=t), column)) for t in steps] for s in sites])
        share = column.endswith("holds") or column in ("rank_share", "variance_ratio")
        image = axis.imshow(
            field, aspect="auto", cmap="RdBu" if column.endswith("holds") else "viridis",
            norm=Normalize(0, 1) if share else Normalize(0, max(float(field.max()), 1e-9)),
        )  # fmt: skip
        axis.set_xticks(range(len(steps)), [f"{s:.2g}" for s in noise], rotation=45)
        axis.set_yticks(range(len(sites)), [short(s) for s in sites], fontsize=7.5, family="monospace")
        bar = figure.colorbar(image, ax=axis, orientation="horizontal", pad=0.02, aspect=14)
        bar.ax.tick_params(labelsize=7)
    return figure


def surfaces(
    fields: Mapping[str, np.ndarray],
    title: str,
    caption: str,
    axes: tuple[str, str, str],
    at: tuple[np.ndarray, np.ndarray],
) -> Figure:
    """Surfaces over a plane beside each other, on one height scale.

    fields: name -> (rows, columns). axes: names of x (columns), y (rows) and height. at: positions of columns, rows.
    """
    figure = canvas(3.9 * len(fields), 3.6, title, caption)
    low, high = min(f.min() for f in fields.values()), max(f.max() for f in fields.values())
    for index, (name, field) in enumerate(fields.items()):
        axis: Any = figure.add_subplot(1, len(fields), index + 1, projection="3d")
        x, y = np.meshgrid(*at)
        axis.plot_surface(
            x, y, field, cmap="viridis", norm=Normalize(low, high), linewidth=0.2, edgecolor="#ffffff80", rstride=1,
            cstride=1,
        )  # fmt: skip
        axis.set_title(name, fontsize=9.5, color=INK)
        axis.set_xlabel(axes[0], fontsize=8, labelpad=-4)
        axis.set_ylabel(axes[1], fontsize=8, labelpad=-4)
        axis.set_zlabel(axes[2], fontsize=8, labelpad=-2)
        axis.set_zlim(low, high if high > low else low + 1)
        axis.tick_params(labelsize=7, pad=-1)
        axis.view_init(elev=28, azim=-58)
        axis.set_box_aspect(None, zoom=0.88)
    return figure


def attention_maps(
    image: np.ndarray,
    query: tuple[float, float],
    maps: Mapping[str, Sequence[np.ndarray]],
    names: Sequence[str],
    where: str,
) -> Figure:
    """Attention of one query before and after the blur, one row a head.

    image: (height, width, 3) uint8, the decoded picture. query: its (y, x) in the picture, from 0 to 1. maps: column
    name -> for each head an (h, w) map that sums to 1. names: of the heads.
    """
    columns = list(maps)
    caption = (
        f"Softmax over keys of one query (the cross) at {where}, n times the weight, so that 1 is uniform attention; "
        "each row has one colour scale, given at its right. A wider blur of the queries moves the query towards the "
        "mean query of the grid, and its attention towards what the mean query attends to; that need not be uniform."
    )
    figure = canvas(
        1.75 * (len(columns) + 1) + 0.8, 1.75 * len(names), "Attention of a query, before and after the blur", caption
    )
    panels: Any = figure.subplots(len(names), len(columns) + 1, squeeze=False)
    h, w = image.shape[:2]
    for row, name in enumerate(names):
        panels[row][0].imshow(image)
        panels[row][0].plot(
            query[1] * w - 0.5, query[0] * h - 0.5, "+", color="white", markersize=9, markeredgewidth=2.4
        )
        panels[row][0].plot(query[1] * w - 0.5, query[0] * h - 0.5, "+", color="black", markersize=8, markeredgewidth=1)
        panels[row][0].set_ylabel(name, fontsize=9)
        scaled = [maps[column][row] * maps[column][row].size for column in columns]
        top = max(float(m.max()) for m in scaled)
        for axis, m in zip(panels[row][1:], scaled):
            shown = axis.imshow(m, cmap="magma", norm=Normalize(0, top))
            axis.plot(query[1] * m.shape[1] - 0.5, query[0] * m.shape[0] - 0.5, "+", color="white", markersize=7)
        figure.colorbar(shown, ax=panels[row][-1], fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    for axis, title in zip(panels[0], ["picture", *columns]):
        axis.set_title(title, fontsize=9)
    for axis in panels.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure
