"""The plots of an analysis, each readable on its own: a title, axes with units, and a caption in the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from segresearch.analysis import claims, energy
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import blurred, columns, moments
from segresearch.analysis.measurements import Row, Rows, chosen, short, values
from segresearch.analysis.recorder import Entry, Images, Recording
from segresearch.config import AnalyzeConfig
from segresearch.image_grid import INK
from segresearch.plot_style import SMALL, TEXT, canvas, label, name_sigma
from segresearch.threads import one_thread

Arrays = Mapping[str, np.ndarray]
HOLDS, FAILS = "#2166ac", "#c4501b"
LINES = {"reflect": ("-", "#d55e00"), "symmetric": ("--", "#0072b2"), "circular": (":", "#009e73"),
         "exact": ("-.", "#8c2fd8")}  # fmt: skip
LIGHT = LinearSegmentedColormap.from_list("margin", ["#e58a5f", "#f8d9c6", "#ffffff", "#cfe0f0", "#7fb0dd"])
MARKS: dict[float, tuple[str, dict[str, Any]]] = {  # how a head is drawn by its share of columns, from this on
    1.0: ("head: all columns", {"ms": 3, "mew": 0.4, "mec": "white", "mfc": HOLDS}),
    0.95: ("95 % or more", {"ms": 3.2, "mew": 0.8, "mec": HOLDS, "mfc": "white"}),
    0.5: ("half or more", {"ms": 3.6, "mew": 0.9, "mec": FAILS, "mfc": "white"}),
    0.0: ("fewer", {"ms": 3.6, "mew": 0.4, "mec": "white", "mfc": FAILS}),
}
REACH = 2.5  # of an energy slice, in multiples of the real column
SIGMAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0, 100.0)  # of the limits


@one_thread
def draw(
    config: AnalyzeConfig, recording: Recording, rows: Rows, pixels: UInt8[np.ndarray, "n h w 3"], images: Images
) -> dict[str, Figure]:
    """All plots, by name. images: the prompt and seed of each of the `pixels`."""
    model, sigmas, boundaries = config.model.name, config.blur.sigmas, config.blur.boundaries
    rising = sorted(s for s in sigmas if s > 0)
    middle = min((s for s in sigmas if s > 0), key=lambda s: abs(np.log(s)), default=sigmas[0])  # nearest to 1
    plots = {"sigma": against_sigma(rows, model)}
    for boundary in dict.fromkeys((boundaries[0], boundaries[-1])):
        if any(map(on_map, rows)):
            plots[f"regime_{boundary}"] = regime(rows, boundary, model)
        plots[f"layers_{boundary}"] = heat_maps(rows, middle, boundary, model)
    entry = example(recording)
    few = rising if len(rising) <= 3 else [rising[1], rising[2], rising[-1]]
    blurs = [BlurOperator(entry.grid, float(s), boundaries[0]) for s in few]
    row = next((i for i, image in enumerate(entry.images) if image["prompt"]), 0)
    head = int(moments(entry.q, entry.k, "queries")[1][row].mean(dim=-1).argmax())  # of the widest logits
    image = pixels[list(images).index(entry.images[row])]
    return plots | {
        "field": field(entry, row, head, blurs), "limits": limits(entry, boundaries),
        "energy": landscape(entry, row, head, blurs), "attention": attention(entry, row, blurs, image),
    }  # fmt: skip


def example(recording: Recording) -> Entry:
    """The middle site of the mid block (of all, if it was not recorded), at the middle step recorded."""
    sites = [site for site in recording.sites if site.startswith("mid_block.")] or recording.sites
    of_site = recording.select(sites[len(sites) // 2])
    return of_site.select(step=of_site.steps[len(of_site.steps) // 2])[0]


def _origin(entry: Entry, row: int) -> str:
    """Where an example was taken, in words."""
    image = entry.images[row]
    prompt = f"“{image['prompt']}”" if image["prompt"] else "no prompt"
    return f"{short(entry.site)}, σ_t = {entry.sigma[row]:.3g} (step {entry.step}), {prompt}, seed {image['seed']}"


def _column(entry: Entry, row: int, head: int) -> tuple[int, torch.Tensor, str]:
    """The key whose logits over queries vary most, these logits (n,), and where they were taken, in words."""
    q, k = (z[row, head][None, None] for z in (entry.q, entry.k))
    key = moments(q, k, "queries")[1].argmax().reshape(1)
    return int(key), columns(q, k, "queries", key)[0, 0, 0], f"head {entry.heads[head]} of {_origin(entry, row)}"


def _name(blur: BlurOperator) -> str:
    return f"blur σ = {name_sigma(blur.sigma)}, {blur.boundary}"


def against_sigma(rows: Rows, model: str) -> Figure:
    """Mean, variance and lse of the logits after the blur, over its sigma, by boundary: Lemmas 3.1 and 3.2."""
    sigmas = sorted({row["blur_sigma"] for row in rows})
    caption = (
        "Each line is the median over sites, heads and σ_t of a head's mean over keys and images; the bands (reflect, "
        "exact) are the middle half. Top: shift of a column's mean over queries, in standard deviations of that "
        "column (Lemma 3.1 says 0). Middle: variance after the blur over variance before (Lemma 3.1 says at most 1). "
        "Bottom: fall of the log-sum-exp (Lemma 3.2; the fall is at least 0 for a doubly stochastic blur), with the "
        "second-order approximation, half the fall of the variance, as dots."
    )
    figure = canvas(7.2, f"What the query blur does to the logits of {model}", caption)
    axes = figure.subplots(3, 1, sharex=True)
    panels = (("mean_shift", "shift of the mean (Lemma 3.1)", "shift / standard deviation"),
              ("variance_ratio", "variance after / before (Lemma 3.1)", "ratio"),
              ("lse_fall", "fall of the lse (Lemma 3.2)", "nats"))  # fmt: skip
    for axis, (column, title, unit) in zip(axes, panels):
        label(axis, title, "blur σ (tokens)" * (column == "lse_fall"), unit, grid="y")
        for boundary in dict.fromkeys(row["boundary"] for row in rows):
            at = [chosen(rows, boundary=boundary, blur_sigma=s) for s in sigmas]
            low, middle, high = np.array([np.quantile(values(r, column), (0.25, 0.5, 0.75)) for r in at]).T
            style, color = LINES[boundary]
            axis.plot(middle, style, color=color, label=boundary, linewidth=1.8)
            if boundary in ("reflect", "exact"):
                axis.fill_between(range(len(sigmas)), low, high, color=color, alpha=0.12, linewidth=0)
                if column == "lse_fall":
                    axis.plot([np.median(values(r, "taylor_fall")) for r in at], "o", color=color, markersize=3.5)
        axis.set_xticks(range(len(sigmas)), [name_sigma(s) for s in sigmas])
    axes[1].axhline(1, color=INK, linewidth=0.8)
    axes[0].legend(fontsize=SMALL, frameon=False, title="boundary", title_fontsize=SMALL)
    return figure


def on_map(row: Row) -> bool:
    """Whether a row has a point on the regime map: a finite blur, and logits that vary."""
    return 0 < row["blur_sigma"] < np.inf and row["spread"] > 1e-6


def regime(rows: Rows, boundary: str, model: str) -> Figure:
    """Where Theorem 3.1's conclusion holds on the grid that most heads have: its margin over logit spread and blur σ
    for white noise of a fixed seed, and the model's heads as points."""
    grids = [row["grid"] for row in rows]
    common = max(dict.fromkeys(grids), key=grids.count)
    h, w = map(int, common.split("x"))
    heads = [r for r in chosen(rows, grid=common, boundary=boundary) if on_map(r)]
    spreads, blurs = values(heads, "spread"), values(heads, "blur_sigma")
    xs = np.geomspace(min(0.1, spreads.min() / 1.3), max(10.0, spreads.max() * 1.3), 28)
    ys = np.geomspace(0.3, max(4.0, blurs.max()) * 1.35, 22)
    noise = claims.white_noise(h * w)
    operators = [BlurOperator((h, w), float(y), boundary) for y in ys]
    margins = np.array([[claims.theorem_margins(x * noise, b) for x in xs] for b in operators])  # (ys, xs, 2)
    caption = (
        f"Colour: margin of the conclusion, log|det H| − log|det H̃| over the {h * w} tokens, for white-noise logits of "
        f"that standard deviation on a {h}×{w} grid ({boundary} boundary); above 0 (blue) the blur attenuates the "
        "curvature; the black line is 0. Points: the model's heads at the spread of their logits over queries "
        "(jittered in σ), at every measured σ_t, marked by the share of their columns for which it holds. Logits of a "
        "model are smoother than white noise, so that a blur lowers their lse less: a point may hold where the noise "
        "around it fails."
    )
    figure = canvas(8.0, f"Regime map of Theorem 3.1: {model}, {boundary} boundary", caption)
    axes = figure.subplots(2, 1, sharex=True)
    titles = {"eq20_holds": "eqs. (19) and (20):\nΠ ξ(ã)ᵢ bᵢᵢ against Π ξ(a)ᵢ",
              "chain_holds": "chain rule:\npdet BᵀH(ã)B against pdet H(a)"}  # fmt: skip
    jitter = np.random.default_rng(0)
    limit = float(np.quantile(np.abs(margins[np.isfinite(margins)]), 0.8))
    for index, (axis, (column, title)) in enumerate(zip(axes, titles.items())):
        margin = margins[..., index]
        label(axis, title, "deviation of the logits over queries" * index, "blur σ (tokens)")
        mesh = axis.contourf(xs, ys, margin.clip(-limit, limit), np.linspace(-limit, limit, 25), cmap=LIGHT,
                             norm=TwoSlopeNorm(0, -limit, limit))  # fmt: skip
        if margin.min() < 0 < margin.max():
            axis.contour(xs, ys, margin, [0], colors=INK, linewidths=1.4)
        y, shares = blurs * np.exp(jitter.uniform(-0.08, 0.08, len(heads))), values(heads, column)
        for least, (_, look) in reversed(MARKS.items()):
            here = (shares >= least) & (shares < min((other for other in MARKS if other > least), default=2))
            axis.plot(spreads[here], y[here], "o", **look)
        axis.set(xscale="log", yscale="log", xlim=(xs[0], xs[-1]), ylim=(ys[0], ys[-1]))
        ticks = sorted(set(blurs.tolist()))
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    bar = figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02, aspect=40, ticks=MaxNLocator(5))
    bar.set_label("margin (nats per token)", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    marks = [Line2D([], [], marker="o", linestyle="", label=name, **look) for name, look in MARKS.values()]
    axes[0].legend(handles=marks, fontsize=SMALL, ncols=2, frameon=False, handletextpad=0.1, columnspacing=0.8,
                   loc="lower left", bbox_to_anchor=(-0.02, 1.17), borderaxespad=0)  # fmt: skip
    return figure


def limits(entry: Entry, boundaries: Sequence[str]) -> Figure:
    """How far the blurred logits are from the two limits of the blur, over its sigma from 0.1 to 100."""
    caption = (
        "Root mean square over a column, as a share of its standard deviation, over all heads, keys and images of "
        f"{short(entry.site)}, σ_t = {entry.sigma[0]:.3g} (step {entry.step}). Left: distance of the blurred logits to "
        "the original ones, which goes to 0 with σ under every boundary. Right: distance to the column's mean. The "
        "exact Gaussian reaches it; the cut kernels, the official code's reflect among them, stop short at every "
        "finite σ, so that σ = ∞ is a jump for them."
    )
    figure = canvas(3.0, "The two limits of the blur", caption)
    axes = figure.subplots(1, 2, sharey=True)
    label(axes[0], "distance to the original", "blur σ (tokens)", "rms / standard deviation", grid="y")
    label(axes[1], "distance to the mean", "blur σ (tokens)", grid="y")
    for boundary in boundaries:
        style, color = LINES[boundary]
        for axis, distances in zip(axes, claims.limits(entry.q, entry.k, entry.grid, SIGMAS, boundary)):
            axis.plot(SIGMAS, distances, style, color=color, label=boundary, linewidth=1.8)
            axis.set_xscale("log")
    axes[0].legend(fontsize=SMALL, frameon=False, title="boundary", title_fontsize=SMALL, loc="lower right")
    return figure


def heat_maps(rows: Rows, sigma: float, boundary: str, model: str) -> Figure:
    """Per site and step, the mean over heads, keys and images."""
    rows = chosen(rows, boundary=boundary, blur_sigma=sigma)
    sites = list(dict.fromkeys(row["site"] for row in sorted(rows, key=lambda r: r["layer"])))
    steps = sorted({row["step"] for row in rows})
    noise = [f"{np.mean(values(chosen(rows, step=step), 'sigma_t')):.2g}" for step in steps]
    caption = (
        "One row a self-attention site, in the order of a forward pass; one column a measured step, at its σ_t. Means "
        "over heads, keys and images. Columns of logits run over queries, as in Definition 2.1. The last four panels "
        f"are for blur σ = {name_sigma(sigma)}, {boundary}: variance after / before, fall of the lse in nats, "
        "and the share of (head, key, image) where the conclusion of Theorem 3.1 holds, as in eqs. (19) and (20) and "
        "by the chain rule."
    )
    figure = canvas(3 * (1.3 + 0.19 * len(sites)), f"Layer by layer, step by step: {model}, {boundary}", caption)
    panels = {"spread": "logit std", "rank_share": "effective rank / n", "variance_ratio": "variance ratio",
              "lse_fall": "lse fall", "eq20_holds": "Thm 3.1, eq. (20)", "chain_holds": "Thm 3.1, chain rule"}
    for axis, (column, title) in zip(figure.subplots(3, 2, sharey=True).flat, panels.items()):
        label(axis, title, "σ_t")
        means = np.array([[np.mean(values(chosen(rows, site=s, step=t), column)) for t in steps] for s in sites])
        top = max(float(means.max()), 1e-9) if column in ("spread", "lse_fall") else 1
        colors = "RdBu" if column.endswith("holds") else "viridis"
        image = axis.imshow(means, aspect="auto", cmap=colors, norm=Normalize(0, top))
        axis.set_xticks(range(len(steps)), noise, rotation=45)
        axis.set_yticks(range(len(sites)), [short(s) for s in sites], fontsize=SMALL, family="monospace")
        bar = figure.colorbar(image, ax=axis, location="bottom", pad=0.02, aspect=14, ticks=MaxNLocator(3))
        bar.ax.tick_params(labelsize=SMALL)
    return figure


def field(entry: Entry, row: int, head: int, blurs: Sequence[BlurOperator]) -> Figure:
    """One key's logits over the grid of queries, before and after the blur."""
    key, a, origin = _column(entry, row, head)
    h, w = entry.grid
    caption = (
        f"Logits q·k/√d of all queries with key {key} (row {key // w}, column {key % w}), the key of largest variance "
        f"in {origin}. The energy of Definition 2.1 is minus the log-sum-exp of this field; the blur of queries is "
        "that of the field (Proposition 3.1): its mean stays (not under the reflect boundary), its peaks and pits go."
    )
    surfaces = {name: z.reshape(h, w).numpy() for name, z in
                {"original": a, **{_name(blur): blur.apply(a) for blur in blurs}}.items()}
    axes = {"query column": np.arange(w), "query row": np.arange(h)}
    return _surfaces(surfaces, axes, "logit", "The field that the blur smooths", caption)


def landscape(entry: Entry, row: int, head: int, blurs: Sequence[BlurOperator]) -> Figure:
    """The energy of that key's column as its smooth and its rough part are scaled, before and after the blur."""
    key, a, origin = _column(entry, row, head)
    mean = a.mean().expand_as(a)
    smooth = BlurOperator(entry.grid, 1.0, "exact").apply(a) - mean
    along = torch.stack([smooth, a - mean - smooth])
    reach = torch.linspace(-REACH, REACH, 25, dtype=torch.float64)
    surfaces, slices = {}, []
    for name, blur in (("original", BlurOperator(entry.grid, 0.0)), *((_name(blur), blur) for blur in blurs)):
        base, directions = blur.apply(mean), blur.apply(along)
        log_pdet = float(energy.chain_log_pseudo_det(a, blur))
        name = f"{name}\nlog pdet H = {log_pdet:.0f}".replace("-", "−").replace("inf", "∞")
        surfaces[name] = energy.surface(base, directions, reach, reach)[0].numpy().T
        _, gradient, second = energy.surface(base, directions, torch.ones(1), torch.ones(1))
        slices.append([float(z) for z in (energy.gaussian_curvature(gradient, second), torch.linalg.det(second),
                                          gradient.norm())])  # fmt: skip
    curvatures, bends, slopes = zip(*slices, strict=True)
    caption = (
        f"Energy of one column of logits (Definition 2.1): key {key}, {origin}. The column is its mean plus a smooth "
        "part, what a blur of σ = 1 leaves of its variation, plus a rough part, the rest. The axes scale the parts: s "
        "the smooth one, t the rough one. (1, 1) is the real column, (0, 0) a uniform one. H is the matrix of second "
        f"derivatives of the energy over all {a.numel()} logits, by the chain rule. pdet H is the product of its "
        "eigenvalues' sizes at (1, 1) but for the constant direction's, the curvature of Theorem 3.1. Where it falls, "
        "the blur attenuates the curvature. "
        "The surface has a curvature of its own at (1, 1), in two directions alone. It may rise where pdet H falls. "
        f"From the original to the widest blur, the determinant d of the surface's second derivatives is "
        f"{_course(bends)}. Its slope g is {_course(slopes)}. Its Gaussian curvature K = d/(1 + g²)² is "
        f"{_course(curvatures)}."
    )
    axes = {"s (smooth)": reach.numpy(), "t (rough)": reach.numpy()}
    return _surfaces(surfaces, axes, "energy (nats)", "The energy landscape around a column", caption)


def _course(values: Sequence[float]) -> str:
    return " → ".join(f"{value if abs(value) > 1e-12 else 0:.2g}" for value in values).replace("-", "−")


def _surfaces(surfaces: Arrays, axes: Arrays, height: str, title: str, caption: str) -> Figure:
    """Surfaces (rows, columns) beside each other on one scale. axes: names and positions of columns, then of rows."""
    across = min(2, len(surfaces))
    down = -(-len(surfaces) // across)
    figure = canvas(2.6 * down + 0.6, title, caption)
    engine: Any = figure.get_layout_engine()
    engine.set(hspace=0.08)  # of names of axes, which the layout of a 3D axis leaves out
    low, high = min(z.min() for z in surfaces.values()), max(z.max() for z in surfaces.values())
    (x_name, x), (y_name, y) = axes.items()
    panels: list[Any] = []
    for index, (name, z) in enumerate(surfaces.items()):
        axis: Any = figure.add_subplot(down, across, index + 1, projection="3d")
        surface = axis.plot_surface(*np.meshgrid(x, y), z, cmap="viridis", norm=Normalize(low, high), linewidth=0.2,
                                    edgecolor="#ffffff80", rstride=1, cstride=1)  # fmt: skip
        axis.set_title(name, fontsize=TEXT, color=INK)
        axis.set_xlabel(x_name, fontsize=SMALL, labelpad=-3)
        axis.set_ylabel(y_name, fontsize=SMALL, labelpad=-3)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.set_zticks([])
        axis.set_zlim(low, high if high > low else low + 1)
        axis.tick_params(labelsize=SMALL, pad=-2)
        axis.view_init(elev=28, azim=-58)
        axis.set_box_aspect(None, zoom=0.86)
        panels.append(axis)
    bar = figure.colorbar(surface, ax=panels, location="bottom", pad=0.02, aspect=30, shrink=0.7, ticks=MaxNLocator(5))
    bar.set_label(f"{height}: height and colour", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def attention(entry: Entry, row: int, blurs: Sequence[BlurOperator], image: np.ndarray) -> Figure:
    """Attention of the query that is most selective on average over heads, before and after the blur, one row a head.

    image: (height, width, 3) uint8, the decoded image.
    """
    h, w = entry.grid
    q, k = entry.q[[row]].double(), entry.k[[row]].double()
    queries = {"original": q, **{_name(b): blurred(q, k, "queries", b)[0] for b in blurs}}
    maps = {name: (z @ k.mT / z.shape[-1] ** 0.5).softmax(dim=-1)[0] for name, z in queries.items()}  # (heads, n, n)
    query = int(torch.special.entr(maps["original"]).sum(dim=-1).mean(dim=0).argmin())
    at = ((query % w + 0.5) / w, (query // w + 0.5) / h)  # (x, y) of the query, from 0 to 1
    caption = (
        f"Softmax over keys of one query (the cross) at {_origin(entry, row)}, n times the weight, so that 1 is "
        "uniform attention; each row has one colour scale, given at its right. A wider blur of the queries moves the "
        "query towards the mean query of the grid, and its attention towards what the mean query attends to; that "
        "need not be uniform."
    )
    heads = min(4, len(entry.heads))
    title = "Attention of a query, before and after the blur"
    figure = canvas(5.0 / (len(maps) + 1) * heads + 0.35, title, caption)
    panels: Any = figure.subplots(heads, len(maps) + 1, squeeze=False)
    for head, (first, *others) in enumerate(panels):
        first.imshow(image)
        cross = (at[0] * image.shape[1] - 0.5, at[1] * image.shape[0] - 0.5, "+")
        first.plot(*cross, color="white", markersize=9, markeredgewidth=2.4)
        first.plot(*cross, color="black", markersize=8, markeredgewidth=1)
        first.set_ylabel(f"head {entry.heads[head]}", fontsize=SMALL)
        scaled = [z[head, query].reshape(h, w).numpy() * (h * w) for z in maps.values()]
        norm = Normalize(0, max(float(z.max()) for z in scaled))
        for axis, z in zip(others, scaled):
            shown = axis.imshow(z, cmap="magma", norm=norm)
            axis.plot(at[0] * w - 0.5, at[1] * h - 0.5, "+", color="white", markersize=7)
        bar = figure.colorbar(shown, ax=others[-1], fraction=0.05, pad=0.04, ticks=MaxNLocator(2))
        bar.ax.tick_params(labelsize=SMALL)
    for axis, title in zip(panels[0], ["image", *maps]):
        axis.set_title(title.replace(", ", "\n").replace("blur σ", "σ"), fontsize=SMALL)
    for axis in panels.flat:
        axis.set(xticks=[], yticks=[])
    return figure
