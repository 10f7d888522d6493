"""From a recording to numbers: the tidy table (site × head × σ_t × blur σ × boundary) and the tested claims.

The table is along the axis "queries" (Definition 2.1 of arXiv 2408.00760: one column of logits per key, over the
queries), on which SEG's blur of the queries acts. One of its rows is one head's mean over its columns, that is over
keys and images; shares ("..._holds") are of the same columns. Claims are tested on both axes, the other one being the
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

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.claims import ClaimResult, blur_commutes, check_claims, check_statistics, check_weighted
from segresearch.analysis.curvature import Curvature, curvature
from segresearch.analysis.logit_statistics import PerColumn, statistics
from segresearch.analysis.recorder import Entry, Recording
from segresearch.guidance.blur import INFINITE
from segresearch.models.compute import arithmetic
from segresearch.threads import one_thread_for

Row = dict[str, Any]
COLUMNS = 2**17  # measured in one call: 1 MiB for each number of a column
SMALL = 256  # tokens of a grid up to which one thread is enough
KEYS = ("site", "layer", "grid", "head", "step", "sigma_t", "blur_sigma", "boundary")
# claim -> the column of the table that holds its share
SHARES = {"mean_kept": "mean_holds", "variance_falls": "variance_holds", "lse_falls": "lse_holds",
          "product_falls": "eq22_holds", "theorem_paper": "eq20_holds", "theorem_chain": "chain_holds"}  # fmt: skip


@dataclass(frozen=True)
class ClaimSummary:
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
        worst = " ".join(f"{key}={value}" for key, value in self.worst.items())
        return {"claim": self.claim, "statement": self.statement, "axis": self.axis, "boundary": self.boundary,
                "blur_sigma": self.blur_sigma, "columns": self.count, "share_holding": self.share,
                "median_margin": self.median, "smallest_margin": self.smallest, "smallest_at": worst}  # fmt: skip


Measured = tuple[list[Row], list[ClaimSummary]]


def measure(
    recording: Recording,
    sigmas: Sequence[float | int],
    boundaries: Sequence[str],
    sites: Sequence[str],
    device: torch.device | str = "cpu",
) -> Iterator[Measured]:
    """The rows of the table and the claims of each entry, one entry after another. `sites`: the model's, in order.

    Entries that follow each other and have one shape are measured in one call, up to COLUMNS columns: at small grids
    calls take longer than what they compute. device: where; q and k go there in one transfer each, and two small
    tensors come back for each blur. Logits of fp32 are products in fp32, never in TF32.
    """
    blurs = list(itertools.product(boundaries, sigmas))
    shapes = itertools.groupby(recording, lambda entry: (entry.grid, len(entry.heads), len(entry.images)))
    for ((h, w), heads, images), entries in shapes:
        while batch := list(itertools.islice(entries, max(1, COLUMNS // (h * w * heads * images)))):
            with arithmetic("exact", torch.device(device)):
                measured = _measured(batch, blurs, sites, device)
            yield from measured


@one_thread_for(lambda entries, *rest: math.prod(entries[0].grid) <= SMALL)
def _measured(
    entries: Sequence[Entry], blurs: Sequence[tuple[str, float | int]], sites: Sequence[str], device: torch.device | str
) -> list[Measured]:
    """`measure` of entries of one shape, whose rows (images) become one axis."""
    q, k = (torch.cat(side).to(device) for side in zip(*((e.q, e.k) for e in entries), strict=True))
    q, k = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (q, k))
    grid = entries[0].grid
    before, before_of_keys = curvature(q, k, "queries", BlurOperator(grid, 0.0)), statistics(q, k, "keys")
    measured: list[Measured] = [([], []) for _ in entries]
    for boundary, sigma in blurs:
        operator = BlurOperator(grid, float(sigma), boundary)
        after = curvature(q, k, "queries", operator)
        results = check_statistics(before.statistics, after.statistics, operator)
        values = _values(before, after, results, len(entries))
        if boundary == "reflect" and sigma <= INFINITE:  # beyond, every boundary is the plain mean
            results += check_weighted(q, k, "queries", operator, before.statistics)
        results += check_claims(q, k, "keys", operator, before_of_keys)
        results += (blur_commutes(q, k, "queries", operator),)
        summaries = _summaries(entries, results)
        for entry, (rows, claims), of_heads, of_claims in zip(entries, measured, values, summaries, strict=True):
            rows += [_keys(entry, head, sites, operator) | of_head for head, of_head in zip(entry.heads, of_heads)]
            claims += of_claims
    return measured


def _keys(entry: Entry, head: int, sites: Sequence[str], operator: BlurOperator) -> Row:
    h, w = entry.grid
    keys = (entry.site, sites.index(entry.site), f"{h}x{w}", head, entry.step, float(np.mean(entry.sigma)))
    return dict(zip(KEYS, (*keys, float(operator.sigma), operator.boundary), strict=True))


def _values(before: Curvature, after: Curvature, results: Iterable[ClaimResult], entries: int) -> list[list[Row]]:
    """The measured columns of the table for each head of each entry, read back at once."""

    def by_entry(z: PerColumn) -> Float[Tensor, "entries images heads m"]:
        return z.unflatten(0, (entries, -1))

    def mean(z: PerColumn) -> Float[Tensor, "entries heads"]:
        return by_entry(z).mean(dim=(1, 3))

    a, b, n = before.statistics, after.statistics, before.statistics.n
    std = a.variance.sqrt().clamp_min(1e-6)
    per_head = {
        "spread": mean(a.variance).sqrt(),
        "mean_shift": mean((b.mean - a.mean).abs() / std),
        "variance_ratio": mean(b.variance) / mean(a.variance).clamp_min(1e-12),
        "variance_ratio_max": by_entry(b.variance / a.variance.clamp_min(1e-12)).amax(dim=(1, 3)),
        "lse_fall": mean(a.lse - b.lse),
        "taylor_fall": mean(a.variance - b.variance) / 2,
        "log_product_before": mean(a.log_product),
        "log_product_after": mean(b.log_product),
        "eq20_margin": mean(a.log_product - after.entrywise_log_product) / n,
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
    per_head |= {SHARES[r.claim]: mean(r.holds.double()) for r in results if r.claim in SHARES}
    values = torch.stack(list(per_head.values()), dim=-1).tolist()  # names of (e, h) -> (e, h, names)
    return [[dict(zip(per_head, of_head, strict=True)) for of_head in heads] for heads in values]


def mean_over_runs(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same keys (of several runs of the same steps) as one, each run weighing the same."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return [
        {name: value if name in KEYS else float(np.mean([r[name] for r in group])) for name, value in group[0].items()}
        for group in groups.values()
    ]


def _summaries(entries: Sequence[Entry], results: Sequence[ClaimResult]) -> list[list[ClaimSummary]]:
    """The summary of each result over the columns of each entry; their numbers are read back at once."""
    by_entry = (len(entries), -1)
    # (claims, entries·images, heads, columns) -> (c, e, i, h, m)
    margin = torch.stack([result.margin for result in results]).unflatten(1, by_entry)
    holding = torch.stack([result.holds for result in results]).unflatten(1, by_entry).flatten(2).sum(-1, keepdim=True)
    medians = margin.transpose(2, 3).flatten(3).median(dim=-1).values  # -> (c, e, h, i·m) -> (c, e, h)
    shape, flat = margin.shape[2:], margin.flatten(2)  # (c, e, i·h·m)
    worst = flat.argmin(-1, keepdim=True), flat.amin(-1, keepdim=True)
    values = torch.cat([z.double() for z in (*worst, holding, medians)], dim=-1).tolist()  # (c, e, 3 + h)
    return [
        [_summary(entry, result, shape, *of_entry[i]) for result, of_entry in zip(results, values, strict=True)]
        for i, entry in enumerate(entries)
    ]


def _summary(
    entry: Entry, result: ClaimResult, shape: Sequence[int], at: float, smallest: float, holding: float, *medians: float
) -> ClaimSummary:
    """shape: (images, heads, columns) of the entry; at: flat index of the smallest margin."""
    row, head, column = np.unravel_index(int(at), tuple(shape))
    key = "key" if result.axis == "queries" else "query"
    worst = {"site": short(entry.site), "head": entry.heads[head], key: int(column), "step": entry.step}
    return ClaimSummary(
        result.claim, result.statement, result.axis, float(result.operator.sigma), result.operator.boundary,
        math.prod(shape), int(holding), medians, smallest, {**worst, **entry.images[row]},
    )  # fmt: skip


def merge_claims(summaries: Iterable[ClaimSummary]) -> list[ClaimSummary]:
    """The summaries of the same claim, axis and blur as one."""
    groups: dict[tuple, list[ClaimSummary]] = {}
    for part in summaries:
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
