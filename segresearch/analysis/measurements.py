"""From a recording to numbers: the tidy table (site × head × σ_t × blur σ × boundary) and the tested claims.

The table is along the axis "queries" (Definition 2.1 of arXiv 2408.00760), on which SEG's blur of the queries acts. One
of its rows is one head's mean over its columns, that is over keys and images; shares ("..._holds") are of the same
columns. Claims are tested on both axes.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.claims import ClaimResult, blur_commutes, check_claims, check_statistics, check_weighted
from segresearch.analysis.energy import Curvature, curvature
from segresearch.analysis.logit_statistics import PerColumn, statistics, wide
from segresearch.analysis.recorder import Entry, Recording
from segresearch.guidance.blur import INFINITE
from segresearch.models.compute import arithmetic
from segresearch.progress import Bar
from segresearch.threads import one_thread_for

Row = dict[str, Any]
Rows = Sequence[Row]
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


def measure(
    recording: Recording, sigmas: Sequence[float], boundaries: Sequence[str], sites: Sequence[str],
    device: torch.device | str = "cpu",
) -> tuple[list[Row], list[ClaimSummary]]:  # fmt: skip
    """The rows of the table, and the claims. `sites`: the model's, in order. Recordings of one head at one step, of
    other images, are one row, in which each weighs the same.

    Entries that follow each other and have one shape are measured in one call, up to COLUMNS columns: at small grids
    calls take longer than what they compute. device: where; q and k go there in one transfer each, and two small
    tensors come back for each blur. Logits of fp32 are products in fp32, never in TF32.
    """
    blurs = list(itertools.product(boundaries, sigmas))
    rows: dict[tuple, list[Row]] = {}
    claims: dict[tuple, list[ClaimSummary]] = {}
    bar = Bar(len(recording), "attention")
    bar.describe("measuring")
    bar.tell(f"measuring {len(recording)} attentions under {len(blurs)} blurs")
    shapes = itertools.groupby(recording, lambda entry: (entry.grid, len(entry.heads), len(entry.images)))
    with bar, arithmetic("exact", torch.device(device)):
        for ((h, w), heads, images), entries in shapes:
            while batch := list(itertools.islice(entries, max(1, COLUMNS // (h * w * heads * images)))):
                of_batch, tested = _measured(batch, blurs, sites, device)
                for row in of_batch:
                    rows.setdefault(tuple(row[key] for key in KEYS), []).append(row)
                for part in tested:
                    claims.setdefault((part.claim, part.axis, part.boundary, part.blur_sigma), []).append(part)
                bar.add(len(batch))
    return list(map(_mean, rows.values())), list(map(_merged, claims.values()))


def _mean(rows: Rows) -> Row:
    """Rows of the same keys as one."""
    return {key: v if key in KEYS else float(np.mean([row[key] for row in rows])) for key, v in rows[0].items()}


def _merged(parts: Sequence[ClaimSummary]) -> ClaimSummary:
    """Summaries of the same claim, axis and blur as one."""
    count, holding = sum(part.count for part in parts), sum(part.holding for part in parts)
    medians = tuple(itertools.chain.from_iterable(part.medians for part in parts))
    return replace(min(parts, key=lambda part: part.smallest), count=count, holding=holding, medians=medians)


@one_thread_for(lambda entries, *rest: math.prod(entries[0].grid) <= SMALL)
def _measured(
    entries: Sequence[Entry], blurs: Sequence[tuple[str, float]], sites: Sequence[str], device: torch.device | str
) -> tuple[list[Row], list[ClaimSummary]]:
    """`measure` of entries of one shape, whose rows (images) become one axis."""
    q, k = (torch.cat(side).to(device) for side in zip(*((e.q, e.k) for e in entries), strict=True))
    q, k = (z.to(wide(z.dtype)) for z in (q, k))
    grid = entries[0].grid
    before, before_of_keys = curvature(q, k, "queries", BlurOperator(grid, 0.0)), statistics(q, k, "keys")
    rows: list[list[Row]] = [[] for _ in entries]
    claims: list[ClaimSummary] = []
    for boundary, sigma in blurs:
        operator = BlurOperator(grid, float(sigma), boundary)
        after = curvature(q, k, "queries", operator)
        results = check_statistics(before, after, operator)
        for of_entry, entry, of_heads in zip(rows, entries, _values(before, after, results, len(entries)), strict=True):
            keys = {"site": entry.site, "layer": sites.index(entry.site), "grid": f"{grid[0]}x{grid[1]}"}
            at = {"step": entry.step, "sigma_t": float(np.mean(entry.sigma)), "blur_sigma": operator.sigma}
            for head, values in zip(entry.heads, of_heads, strict=True):
                of_entry.append({**keys, "head": head, **at, "boundary": boundary, **values})
        if boundary == "reflect" and sigma <= INFINITE:  # beyond, every boundary is the plain mean
            results += check_weighted(q, k, "queries", operator, before)
        results += check_claims(q, k, "keys", operator, before_of_keys)
        claims += _summaries(entries, (*results, blur_commutes(q, k, "queries", operator)))
    return list(itertools.chain.from_iterable(rows)), claims


def _values(a: Curvature, b: Curvature, results: Iterable[ClaimResult], entries: int) -> list[list[Row]]:
    """The measured columns of the table, before (a) and after the blur (b), of each head of each entry, at once."""

    def mean(z: PerColumn) -> Float[Tensor, "entries heads"]:
        return z.unflatten(0, (entries, -1)).mean(dim=(1, 3))

    n, std, least = a.n, a.variance.sqrt().clamp_min(1e-6), 1e-12
    margins = {result.claim: mean(result.margin) / n for result in results if result.claim.startswith("theorem")}
    per_head = {
        "spread": mean(a.variance).sqrt(),
        "mean_shift": mean((b.mean - a.mean).abs() / std),
        "variance_ratio": mean(b.variance) / mean(a.variance).clamp_min(least),
        "variance_ratio_max": (b.variance / a.variance.clamp_min(least)).unflatten(0, (entries, -1)).amax(dim=(1, 3)),
        "lse_fall": mean(a.lse - b.lse),
        "taylor_fall": mean(a.variance - b.variance) / 2,
        "log_product_before": mean(a.log_product),
        "log_product_after": mean(b.log_product),
        "eq20_margin": margins["theorem_paper"],
        "chain_margin": margins["theorem_chain"],
        "entropy_before": mean(a.entropy),
        "entropy_after": mean(b.entropy),
        "rank_share": mean(a.entropy.exp()) / n,
        "rank_share_after": mean(b.entropy.exp()) / n,
        "trace_before": mean(a.trace),
        "trace_after": mean(b.trace),
        "chain_trace_after": mean(b.chain_trace),
        "norm_before": mean(a.norm),
        "norm_after": mean(b.norm),
    }
    per_head |= {SHARES[r.claim]: mean(r.holds.double()) for r in results if r.claim in SHARES}
    values = torch.stack(list(per_head.values()), dim=-1).tolist()  # names of (e, h) -> (e, h, names)
    return [[dict(zip(per_head, of_head, strict=True)) for of_head in heads] for heads in values]


def _summaries(entries: Sequence[Entry], results: Sequence[ClaimResult]) -> list[ClaimSummary]:
    """The summary of each result over the columns of all entries; their numbers are read back at once."""
    # (claims, entries·images, heads, columns) -> (c, e, i, h, m)
    margin = torch.stack([result.margin for result in results]).unflatten(1, (len(entries), -1))
    medians = margin.transpose(2, 3).flatten(3).median(dim=-1).values.flatten(1)  # -> (c, e, h, i·m) -> (c, e·h)
    flat, holds = margin.flatten(1), torch.stack([result.holds for result in results]).flatten(1)
    of_all = torch.stack([flat.argmin(-1).double(), flat.amin(-1), holds.sum(-1).double()], dim=-1)
    numbers = torch.cat([of_all, medians], dim=-1).tolist()
    summaries = []
    for result, (at, smallest, held, *of_heads) in zip(results, numbers, strict=True):
        number, image, head, column = map(int, np.unravel_index(int(at), margin.shape[1:]))
        entry, key = entries[number], "key" if result.axis == "queries" else "query"
        worst = {"site": short(entry.site), "head": entry.heads[head], key: column, "step": entry.step}
        summaries.append(ClaimSummary(
            result.claim, result.statement, result.axis, float(result.operator.sigma), result.operator.boundary,
            flat.shape[1], int(held), tuple(of_heads), smallest, {**worst, **entry.images[image]},
        ))  # fmt: skip
    return summaries


def chosen(rows: Rows, **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: Rows, column: str) -> np.ndarray:
    """One column as an array."""
    return np.array([row[column] for row in rows], dtype=float)


def short(site: str) -> str:
    """A site's name as a selector: "mid.0.3", "up.0.1.3"."""
    group, *rest = site.split(".")
    return ".".join([group.split("_")[0], *(part for part in rest if part.isdigit())])
