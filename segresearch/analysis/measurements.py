"""From a recording to numbers: the tidy table (site × head × σ_t × blur σ × boundary) and the judged claims.

The table is along the axis "queries" (Definition 2.1 of arXiv 2408.00760: one column of logits per key, over the
queries), on which SEG's blur of the queries acts. One of its rows is one head's mean over its columns, that is over
keys and images; shares ("..._holds") are of the same columns. Claims are judged on both axes, the other one being the
dual of the paper's Appendix B (blurred keys, columns over keys).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.curvature import Curvature, curvature
from segresearch.analysis.lemmas import blur_commutes, corrected, judge, verdicts
from segresearch.analysis.recorder import Entry, Recording
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import statistics
from segresearch.analysis.verdict import Verdict
from segresearch.guidance.blur import INFINITE
from segresearch.models.compute import arithmetic
from segresearch.threads import one_thread_for

Row = dict[str, Any]
COLUMNS = 2**17  # measured in one call: 1 MiB for each number of a column
SMALL = 256  # tokens of a grid up to which one thread is enough
KEYS = ("site", "layer", "grid", "head", "step", "sigma_t", "blur_sigma", "boundary")
CLAIMS = {  # a claim of `lemmas` -> its column of shares
    "mean_kept": "mean_holds",
    "variance_falls": "variance_holds",
    "lse_falls": "lse_holds",
    "product_falls": "eq22_holds",
    "theorem_paper": "eq20_holds",
    "theorem_chain": "chain_holds",
}


@dataclass(frozen=True)
class Judged:
    """One claim under one blur, over every column measured: how often it holds, by how much, and the worst column.

    A margin is how far the claim is from failing, in the unit of its sides; it fails below 0 by more than rounding.
    medians: of the margin, over the columns of each head measured, one after another. worst: where the margin is
    smallest: site, head, key (the column), step, image.
    """

    claim: str
    statement: str
    axis: str
    blur_sigma: float
    boundary: str
    count: int
    holding: int
    medians: tuple[float, ...]
    smallest: float
    worst: Row

    @property
    def median(self) -> float:
        """Of the heads' medians."""
        return float(np.median(self.medians))

    @property
    def share(self) -> float:
        """Of the columns, from 0 to 1."""
        return self.holding / self.count

    def row(self) -> Row:
        """For the csv file."""
        place = " ".join(f"{key}={value}" for key, value in self.worst.items())
        return {"claim": self.claim, "statement": self.statement, "axis": self.axis, "boundary": self.boundary,
                "blur_sigma": self.blur_sigma, "columns": self.count, "share_holding": self.share,
                "median_margin": self.median, "smallest_margin": self.smallest, "smallest_at": place}  # fmt: skip


def measure(
    recording: Recording,
    sigmas: Sequence[float | int],
    boundaries: Sequence[str],
    sites: Sequence[str],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[Row], list[Judged]]]:
    """For each entry, one after another: its rows of the table, and what was judged. `sites`: the model's, in order.

    Entries that follow each other and have one shape are measured in one call, up to COLUMNS columns: at small grids
    calls take longer than what they compute. device: where; q and k go there in one transfer each, and two small
    tensors come back for each blur. Logits of fp32 are products in fp32, never in TF32.
    """
    for entries in _alike(recording):
        with arithmetic("exact", torch.device(device)):
            measured = _measured(entries, sigmas, boundaries, sites, device)
        yield from measured


def _alike(recording: Recording) -> Iterator[list[Entry]]:
    """Runs of entries of one shape, of at most COLUMNS columns unless one entry has more."""
    shapes = itertools.groupby(recording, lambda entry: (entry.grid, len(entry.heads), len(entry.images)))
    for ((h, w), heads, images), run in shapes:
        yield from map(list, batched(run, max(1, COLUMNS // (h * w * heads * images))))


def batched(items: Iterable[Entry], count: int) -> Iterator[tuple[Entry, ...]]:
    """Tuples of `count`, and what remains."""
    iterator = iter(items)
    while part := tuple(itertools.islice(iterator, count)):
        yield part


def _small(entries: Sequence[Entry], *rest: Any) -> bool:
    return math.prod(entries[0].grid) <= SMALL


@one_thread_for(_small)
def _measured(
    entries: Sequence[Entry],
    sigmas: Sequence[float | int],
    boundaries: Sequence[str],
    sites: Sequence[str],
    device: torch.device | str,
) -> list[tuple[list[Row], list[Judged]]]:
    """`measure` of entries of one shape, whose rows (images) become one axis."""
    q, k = (torch.cat(side).to(device) for side in zip(*((e.q, e.k) for e in entries), strict=True))
    q, k = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (q, k))
    before = curvature(q, k, "queries", Smoothing(entries[0].grid, 0.0))
    dual_before = statistics(q, k, "keys")

    def under(boundary: str, sigma: float | int) -> list[tuple[list[Row], list[Judged]]]:
        smoothing = Smoothing(entries[0].grid, float(sigma), boundary)
        after = curvature(q, k, "queries", smoothing)
        found = verdicts(before.statistics, after.statistics, smoothing)
        more = (*judge(q, k, "keys", smoothing, dual_before), blur_commutes(q, k, "queries", smoothing))
        cut = boundary == "reflect" and sigma <= INFINITE  # beyond, every boundary is the plain mean
        mended = corrected(q, k, "queries", smoothing, before.statistics) if cut else ()
        numbers = _numbers(before, after, found, len(entries))
        rows = [
            [place | values for place, values in zip(_rows(entry, sites, smoothing), of_heads, strict=True)]
            for entry, of_heads in zip(entries, numbers, strict=True)
        ]
        return list(zip(rows, _judged(entries, (*found, *mended, *more)), strict=True))

    of_blurs = [under(boundary, sigma) for boundary in boundaries for sigma in sigmas]
    return [
        (list(itertools.chain(*rows)), list(itertools.chain(*judged)))
        for rows, judged in (zip(*of_entry, strict=True) for of_entry in zip(*of_blurs, strict=True))
    ]


def _rows(entry: Entry, sites: Sequence[str], smoothing: Smoothing) -> list[Row]:
    common = {"site": entry.site, "layer": sites.index(entry.site), "grid": f"{entry.grid[0]}x{entry.grid[1]}"}
    return [
        {**common, "head": head, "step": entry.step, "sigma_t": float(np.mean(entry.sigma)),
         "blur_sigma": float(smoothing.sigma), "boundary": smoothing.boundary}
        for head in entry.heads
    ]  # fmt: skip


def _numbers(before: Curvature, after: Curvature, found: Iterable[Verdict], entries: int) -> list[list[Row]]:
    """What is measured of each head of each entry, read back at once."""

    def apart(z: Float[Tensor, "rows heads m"]) -> Float[Tensor, "entries images heads m"]:
        return z.unflatten(0, (entries, -1))

    def mean(z: Float[Tensor, "rows heads m"]) -> Float[Tensor, "entries heads"]:
        return apart(z).mean(dim=(1, 3))

    a, b, n = before.statistics, after.statistics, before.statistics.n
    std = a.variance.sqrt().clamp_min(1e-6)
    per_head = {
        "spread": mean(a.variance).sqrt(),
        "mean_shift": mean((b.mean - a.mean).abs() / std),
        "variance_ratio": mean(b.variance) / mean(a.variance).clamp_min(1e-12),
        "variance_ratio_max": apart(b.variance / a.variance.clamp_min(1e-12)).amax(dim=(1, 3)),
        "lse_fall": mean(a.lse - b.lse),
        "taylor_fall": mean(a.variance - b.variance) / 2,
        "log_product_before": mean(before.log_product),
        "log_product_after": mean(after.log_product),
        "eq20_margin": mean(before.log_product - after.entrywise_log_product) / n,
        "chain_margin": mean(before.log_pdet - after.chain_log_pdet) / n,
        "entropy_before": mean(a.entropy),
        "entropy_after": mean(b.entropy),
        "rank_share": mean(a.effective_rank) / n,
        "rank_share_after": mean(b.effective_rank) / n,
        "trace_before": mean(before.trace),
        "trace_after": mean(after.trace),
        "chain_trace_after": mean(after.chain_trace),
        "norm_before": mean(before.norm),
        "norm_after": mean(after.norm),
    }
    for verdict in found:
        if verdict.claim in CLAIMS:
            per_head[CLAIMS[verdict.claim]] = mean(verdict.holds.double())
    values = torch.stack(list(per_head.values()), dim=-1).tolist()  # names of (e, h) -> (e, h, names)
    return [[dict(zip(per_head, numbers, strict=True)) for numbers in heads] for heads in values]


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same keys (of several runs of the same steps) as one, each run weighing the same."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [
        {name: value if name in KEYS else float(np.mean([r[name] for r in group])) for name, value in group[0].items()}
        for group in groups.values()
    ]


def _judged(entries: Sequence[Entry], found: Sequence[Verdict]) -> list[list[Judged]]:
    """Of each entry, its columns' verdicts in a few numbers, which are read back at once."""
    apart = (len(entries), -1)
    margin = torch.stack([verdict.margin for verdict in found]).unflatten(1, apart)  # (c, e·r, h, m) -> (c, e, r, h, m)
    holding = torch.stack([verdict.holds for verdict in found]).unflatten(1, apart).flatten(2).sum(-1, keepdim=True)
    medians = margin.transpose(2, 3).flatten(3).median(dim=-1).values  # -> (c, e, h, r·m) -> (c, e, h)
    shape, flat = margin.shape[2:], margin.flatten(2)
    least = flat.argmin(-1, keepdim=True), flat.amin(-1, keepdim=True)
    values = torch.cat([z.double() for z in (*least, holding, medians)], dim=-1).tolist()  # (c, e, 3 + h)
    return [
        [_of_entry(entry, verdict, shape, *numbers[i]) for verdict, numbers in zip(found, values, strict=True)]
        for i, entry in enumerate(entries)
    ]


def _of_entry(
    entry: Entry, verdict: Verdict, shape: Sequence[int], at: float, smallest: float, holding: float, *medians: float
) -> Judged:
    """shape: (images, heads, columns) of the entry; at: place of its smallest margin among them, flat."""
    row, head, column = np.unravel_index(int(at), tuple(shape))
    worst = {
        "site": short(entry.site),
        "head": entry.heads[head],
        "key" if verdict.axis == "queries" else "query": int(column),
        "step": entry.step,
        **entry.images[row],
    }
    return Judged(
        verdict.claim, verdict.statement, verdict.axis, float(verdict.sigma), verdict.boundary, math.prod(shape),
        int(holding), medians, smallest, worst,
    )  # fmt: skip


def together(judged: Iterable[Judged]) -> list[Judged]:
    """All that was judged of the same claim, axis and blur as one."""
    groups: dict[tuple, list[Judged]] = {}
    for part in judged:
        groups.setdefault((part.claim, part.axis, part.boundary, part.blur_sigma), []).append(part)
    return [
        replace(
            min(parts, key=lambda part: part.smallest),
            count=sum(part.count for part in parts),
            holding=sum(part.holding for part in parts),
            medians=tuple(median for part in parts for median in part.medians),
        )
        for parts in groups.values()
    ]


def chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: Sequence[Row], column: str) -> np.ndarray:
    """One column as an array."""
    return np.array([row[column] for row in rows], dtype=float)


def short(site: str) -> str:
    """A site's name as a selector: "mid.0.3", "up.0.1.3"."""
    group, *rest = site.split(".")
    return ".".join([group.split("_")[0], *(part for part in rest if part.isdigit())])
