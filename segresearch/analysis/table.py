"""From a recording to numbers: the tidy table (site × head × σ_t × blur σ × boundary) and the judged claims.

The table is along the axis "queries" (Definition 2.1 of arXiv 2408.00760: one column of logits per key, over the
queries), on which SEG's blur of the queries acts. One of its rows is one head's mean over its columns, that is over
keys and images; shares ("..._holds") are of the same columns. Claims are judged on both axes, the other one being the
dual of the paper's Appendix B (blurred keys, columns over keys).
"""

import csv
import io
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
from segresearch.analysis.record import Entry, Recording
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import statistics
from segresearch.analysis.verdict import Verdict
from segresearch.guidance.blur import INFINITE

Row = dict[str, Any]
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
    recording: Recording, sigmas: Sequence[float | int], boundaries: Sequence[str], sites: Sequence[str]
) -> Iterator[tuple[list[Row], list[Judged]]]:
    """For each entry, one after another: its rows of the table, and what was judged. `sites`: the model's, in order."""
    for entry in recording:
        q, k = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (entry.q, entry.k))
        before = curvature(q, k, "queries", Smoothing(entry.grid, 0.0))
        rows: list[Row] = []
        judged: list[Judged] = []
        dual_before = statistics(q, k, "keys")
        for boundary in boundaries:
            for sigma in sigmas:
                smoothing = Smoothing(entry.grid, float(sigma), boundary)
                after = curvature(q, k, "queries", smoothing)
                found = verdicts(before.statistics, after.statistics, smoothing)
                more = (*judge(q, k, "keys", smoothing, dual_before), blur_commutes(q, k, "queries", smoothing))
                cut = boundary == "reflect" and sigma <= INFINITE  # beyond, every boundary is the plain mean
                mended = corrected(q, k, "queries", smoothing) if cut else ()
                judged += [_judged(entry, verdict) for verdict in (*found, *mended, *more)]
                for row, numbers in zip(_rows(entry, sites, smoothing), _numbers(before, after, found), strict=True):
                    rows.append(row | numbers)
        yield rows, judged


def _rows(entry: Entry, sites: Sequence[str], smoothing: Smoothing) -> list[Row]:
    common = {"site": entry.site, "layer": sites.index(entry.site), "grid": f"{entry.grid[0]}x{entry.grid[1]}"}
    return [
        {**common, "head": head, "step": entry.step, "sigma_t": float(np.mean(entry.sigma)),
         "blur_sigma": float(smoothing.sigma), "boundary": smoothing.boundary}
        for head in entry.heads
    ]  # fmt: skip


def _numbers(before: Curvature, after: Curvature, found: Iterable[Verdict]) -> list[Row]:
    """What is measured of each head."""
    a, b, n = before.statistics, after.statistics, before.statistics.n
    std = a.variance.sqrt().clamp_min(1e-6)
    per_head = {
        "spread": _mean(a.variance).sqrt(),
        "mean_shift": _mean((b.mean - a.mean).abs() / std),
        "variance_ratio": _mean(b.variance) / _mean(a.variance).clamp_min(1e-12),
        "variance_ratio_max": (b.variance / a.variance.clamp_min(1e-12)).amax(dim=(0, 2)),
        "lse_fall": _mean(a.lse - b.lse),
        "taylor_fall": _mean(a.variance - b.variance) / 2,
        "log_product_before": _mean(before.log_product),
        "log_product_after": _mean(after.log_product),
        "eq20_margin": _mean(before.log_product - after.entrywise_log_product) / n,
        "chain_margin": _mean(before.log_pdet - after.chain_log_pdet) / n,
        "entropy_before": _mean(a.entropy),
        "entropy_after": _mean(b.entropy),
        "rank_share": _mean(a.effective_rank) / n,
        "rank_share_after": _mean(b.effective_rank) / n,
        "trace_before": _mean(before.trace),
        "trace_after": _mean(after.trace),
        "chain_trace_after": _mean(after.chain_trace),
        "norm_before": _mean(before.norm),
        "norm_after": _mean(after.norm),
    }
    for verdict in found:
        if verdict.claim in CLAIMS:
            per_head[CLAIMS[verdict.claim]] = verdict.by_head.mean(dim=0)
    table = {name: value.tolist() for name, value in per_head.items()}
    return [dict(zip(table, numbers, strict=True)) for numbers in zip(*table.values(), strict=True)]


def _mean(z: Float[Tensor, "rows heads m"]) -> Float[Tensor, " heads"]:
    return z.mean(dim=(0, 2))


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same keys (of several runs of the same steps) as one, each run weighing the same."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [
        {name: value if name in KEYS else float(np.mean([r[name] for r in group])) for name, value in group[0].items()}
        for group in groups.values()
    ]


def _judged(entry: Entry, verdict: Verdict) -> Judged:
    """A verdict on the columns of one entry, in a few numbers."""
    margin = verdict.margin
    row, head, column = np.unravel_index(int(margin.argmin()), margin.shape)
    worst = {
        "site": short(entry.site),
        "head": entry.heads[head],
        "key" if verdict.axis == "queries" else "query": int(column),
        "step": entry.step,
        **entry.images[row],
    }
    medians = tuple(margin.transpose(0, 1).flatten(1).median(dim=1).values.tolist())  # (r, h, m) -> (h, r·m)
    return Judged(
        verdict.claim, verdict.statement, verdict.axis, float(verdict.sigma), verdict.boundary, margin.numel(),
        int(verdict.holds.sum()), medians, float(margin.min()), worst,
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


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as csv text; infinities are written "inf"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _text(value) for key, value in row.items()})
    return text.getvalue()


def _text(value: Any) -> Any:
    if isinstance(value, float):
        return format(value, ".7g") if math.isfinite(value) else str(value)
    return value
