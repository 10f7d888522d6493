"""Which figures an analysis draws, and of which head, query and step; the drawing itself is in `figures`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from segresearch.analysis import energy, figures, regimes
from segresearch.analysis.measurements import Row, chosen, short
from segresearch.analysis.recorder import Entry, Recording
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import blurred, columns, moments
from segresearch.config import AnalyzeConfig
from segresearch.threads import one_thread

REACH = 2.5  # of an energy slice, in parts of the real column


@one_thread
def draw(
    config: AnalyzeConfig,
    recording: Recording,
    rows: Sequence[Row],
    pictures: np.ndarray,
    images: Sequence[Mapping[str, Any]],
) -> dict[str, Figure]:
    """All figures, by name."""
    model, sigmas, boundaries = config.model.name, config.blur.sigmas, config.blur.boundaries
    first = boundaries[0]
    middle = min((s for s in sigmas if s > 0), key=lambda s: abs(np.log(s)), default=sigmas[0])  # nearest to 1
    entry = example(recording)
    made = {"sigma": figures.against_sigma(rows, model)}
    for boundary in dict.fromkeys((first, boundaries[-1])):
        if any(map(figures.on_map, rows)):
            made[f"regime_{boundary}"] = regime(rows, entry, boundary, model)
        made[f"layers_{boundary}"] = figures.heat_maps(rows, middle, boundary, model)
    shown = [Smoothing(entry.grid, float(s), first) for s in _few(sigmas)]
    row = next((i for i, image in enumerate(entry.images) if image["prompt"]), 0)
    head = int(moments(entry.q, entry.k, "queries")[1][row].mean(dim=-1).argmax())  # of the widest logits
    made["field"] = field(entry, row, head, shown)
    made["limits"] = limits(entry, boundaries)
    made["energy"] = landscape(entry, row, head, shown)
    picture = pictures[list(images).index(entry.images[row])]
    made["attention"] = attention(entry, row, shown, picture)
    return made


def example(recording: Recording) -> Entry:
    """The middle site of the mid block (of all, if it was not recorded), at the middle step recorded."""
    mid = [site for site in recording.sites if site.startswith("mid_block.")] or list(recording.sites)
    steps = recording.select(mid[len(mid) // 2]).steps
    return recording.select(mid[len(mid) // 2], step=steps[len(steps) // 2]).entries[0]


def _few(sigmas: Sequence[float]) -> list[float]:
    """At most three of the blur sigmas: the widest, and two from the rest."""
    rising = sorted(s for s in sigmas if s > 0)
    return rising if len(rising) <= 3 else [rising[1], rising[2], rising[-1]]


def place(entry: Entry, row: int, head: int) -> str:
    """Where an example was taken, in words."""
    prompt = entry.images[row]["prompt"]
    words = f"“{prompt}”" if prompt else "no prompt"
    noise = f"σ_t = {entry.sigma[row]:.3g} (step {entry.step})"
    return f"{short(entry.site)}, head {entry.heads[head]}, {noise}, {words}, seed {entry.images[row]['seed']}"


def regime(rows: Sequence[Row], entry: Entry, boundary: str, model: str) -> Figure:
    """The regime map of the grid that most heads have, over white noise drawn from a fixed seed."""
    grids = [row["grid"] for row in rows]
    common = max(dict.fromkeys(grids), key=grids.count)
    h, w = map(int, common.split("x"))
    noise = torch.randn(16, h * w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean(dim=1, keepdim=True)) / noise.std(dim=1, correction=0, keepdim=True)

    def margin(spread: float, sigma: float) -> tuple[float, float]:
        smoothing, a = Smoothing((h, w), sigma, boundary), spread * noise
        after = smoothing.apply(a)
        rise = (after.mean(1) - after.logsumexp(1)) - (a.mean(1) - a.logsumexp(1))  # of log Π ξ, per token
        middle = float(rise.median())
        return -smoothing.log_diagonal / (h * w) - middle, -2 * smoothing.log_det / (h * w) - middle

    return figures.regime_map(chosen(rows, grid=common), (h, w), margin, boundary, model)


def field(entry: Entry, row: int, head: int, shown: Sequence[Smoothing]) -> Figure:
    """One key's logits over the grid of queries, before and after the blur."""
    variance = moments(entry.q, entry.k, "queries")[1][row, head]
    key = int(variance.argmax())
    a = columns(entry.q[[row]][:, [head]], entry.k[[row]][:, [head]], "queries", torch.tensor([key]))[0, 0, 0]
    fields = {"original": a, **{_named(s): s.apply(a) for s in shown}}
    h, w = entry.grid
    caption = (
        f"Logits q·k/√d of all queries with key {key} (row {key // w}, column {key % w}), the key of largest variance "
        f"at {place(entry, row, head)}. The energy of Definition 2.1 is minus the log-sum-exp of this field; the blur "
        "of the queries is the blur of the field (Proposition 3.1): its mean stays (not under the reflect boundary), "
        "its peaks and pits go."
    )
    pictures = {name: z.reshape(h, w).numpy() for name, z in fields.items()}
    return figures.surfaces(
        pictures,
        "The field that the blur smooths",
        caption,
        ("query column", "query row", "logit"),
        (np.arange(w), np.arange(h)),
    )


def landscape(entry: Entry, row: int, head: int, shown: Sequence[Smoothing]) -> Figure:
    """The energy of that key's column as its smooth and its rough part are scaled, before and after the blur."""
    key = int(moments(entry.q, entry.k, "queries")[1][row, head].argmax())
    a, _ = energy.column_slice(entry.q, entry.k, (row, head, key), (0, 1))
    mean = a.mean().expand_as(a)
    smooth = Smoothing(entry.grid, 1.0, "exact").apply(a) - mean
    along = torch.stack([smooth, a - mean - smooth])
    reach = torch.linspace(-REACH, REACH, 25, dtype=torch.float64)
    fields = {}
    for name, blur in (("original", Smoothing(entry.grid, 0.0)), *((_named(s), s) for s in shown)):
        slice_ = energy.surface(blur.apply(mean), blur.apply(along), reach, reach)
        real = energy.surface(blur.apply(mean), blur.apply(along), torch.ones(1), torch.ones(1))
        fields[f"{name}\nGaussian curvature {float(real.gaussian_curvature):.2g}"] = slice_.energy.numpy().T
    caption = (
        f"Energy −lse(B a) of Definition 2.1 for the logits a = mean + s·smooth + t·rough of one column: key {key} at "
        f"{place(entry, row, head)}. Smooth is what a blur of σ = 1 leaves of its variation, rough the rest; (1, 1) "
        "is the real column, where the Gaussian curvature of the surface is given, and (0, 0) a uniform one. The "
        "blur flattens the landscape along the rough direction first."
    )
    ticks = ("s (smooth)", "t (rough)", "energy (nats)")
    return figures.surfaces(
        fields, "The energy landscape around a column", caption, ticks, (reach.numpy(), reach.numpy())
    )


def limits(entry: Entry, boundaries: Sequence[str]) -> Figure:
    """Distances to the limits of the blur, at all sigma from 0.1 to 100."""
    sigmas = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0, 100.0]
    found = [regimes.limits(entry.q, entry.k, "queries", entry.grid, sigmas, boundary) for boundary in boundaries]
    return figures.limits(found, f"{short(entry.site)}, σ_t = {entry.sigma[0]:.3g} (step {entry.step})")


def attention(entry: Entry, row: int, shown: Sequence[Smoothing], picture: np.ndarray) -> Figure:
    """The attention of the query that is most selective on average over heads, head by head."""
    h, w = entry.grid
    q, k = entry.q[[row]].double(), entry.k[[row]].double()

    def maps(q: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)[0]  # (heads, n, n)

    original = maps(q)
    query = int(torch.special.entr(original).sum(dim=-1).mean(dim=0).argmin())
    heads = range(min(4, len(entry.heads)))
    named = {"original": original}
    named |= {_named(s): maps(blurred(q, k, entry.grid, s.sigma, s.boundary)[0]) for s in shown}
    pictures = {name: [z[head, query].reshape(h, w).numpy() for head in heads] for name, z in named.items()}
    spot = ((query // w + 0.5) / h, (query % w + 0.5) / w)
    where = place(entry, row, 0).replace(f", head {entry.heads[0]}", "")
    return figures.attention_maps(picture, spot, pictures, [f"head {entry.heads[head]}" for head in heads], where)


def _named(smoothing: Smoothing) -> str:
    return f"blur σ = {figures.name_sigma(smoothing.sigma)}, {smoothing.boundary}"
