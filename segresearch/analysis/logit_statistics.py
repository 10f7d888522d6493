"""Statistics of attention logits along a named axis, without the n×n map.

a = q kᵀ/√d has two axes. Along "queries" there is one column per key: this is the axis on which a blur of the queries
acts, and that of Definition 2.1 of SEG (arXiv 2408.00760). Along "keys" there is one row per query: the axis of
attention's own softmax, and the dual of the paper's Appendix B. A *column* is the n entries along the named axis.

Mean and variance are exact from the moments of one side: mean(Q)·k and kᵀ Cov(Q) k. Everything that needs exp is
streamed over blocks of whole columns. Logits and exp are in the dtype of q and k (at least fp32); sums are fp64.
Memory beside the inputs and the (rows, heads, m) results: about `8 * block_size` numbers, whatever the size of the map.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.errors import InputError
from segresearch.guidance.blur import blur

Queries = Float[Tensor, "rows heads queries dim"]
Keys = Float[Tensor, "rows heads keys dim"]
Entries = Float[Tensor, "rows heads n dim"]  # the side that runs along the axis
Vectors = Float[Tensor, "rows heads m dim"]  # the side with one column per token
PerColumn = Float[Tensor, "rows heads m"]  # m: number of columns, that is of keys (axis "queries") or queries ("keys")
Block = Float[Tensor, "groups columns n"]
BlockColumns = Float[Tensor, "groups columns"]
AXES = ("queries", "keys")
BLOCK = 2**18  # logits held at once on a CPU: 1 MiB in fp32, which stays in cache
WIDE = 2**24  # on other devices: 64 MiB in fp32, so that a launch has enough to do


def block_size(z: Tensor) -> int:
    """How many logits are held at once on the device of z."""
    return BLOCK if z.device.type == "cpu" else WIDE


def sides(q: Tensor, k: Tensor, axis: str) -> tuple[Entries, Vectors]:
    """(entries, vectors). Raises InputError for an unknown axis and for q and k that do not fit each other."""
    if axis not in AXES:
        raise InputError(f'axis must be "queries" (Definition 2.1) or "keys" (its dual), got {axis!r}')
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise InputError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in rows, heads and dim")
    return (q, k) if axis == "queries" else (k, q)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits of such q and k are computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def blurred(q: Queries, k: Keys, axis: str, operator: BlurOperator) -> tuple[Queries, Keys]:
    """q and k after SEG's blur of the queries (axis "queries") or of the keys (axis "keys"), at least fp32.

    Half precisions are widened before the blur, so that the pipeline's rounding is not measured.
    """
    sides(q, k, axis)
    q, k = (z.to(wide(z.dtype)) for z in (q, k))
    if axis == "queries":
        return blur(q, operator.grid, operator.sigma, operator.boundary), k
    return q, blur(k, operator.grid, operator.sigma, operator.boundary)


def total(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Sum over the last axis, fp64; fp32 entries are first summed in runs of 32 (relative rounding about 1e-8)."""
    if x.dtype == torch.float32 and x.shape[-1] % 32 == 0:
        x = x.unflatten(-1, (-1, 32)).sum(dim=-1)  # (..., n) -> (..., n/32)
    return x.sum(dim=-1, dtype=torch.float64)


class Columns(NamedTuple):
    """A block of whole columns of logits a, and what measures of ξ = softmax(a) share."""

    a: Block
    top: Float[Tensor, "groups columns 1"]  # max a
    exp: Block  # exp(a − max a), 1 at the top, so that it never overflows
    total: BlockColumns  # Σ exp(a − max a), fp64, between 1 and n


def exponentials(a: Block) -> Columns:
    """The `Columns` of logits."""
    top = a.amax(dim=-1, keepdim=True)
    exp = (a - top).exp_()
    return Columns(a, top, exp, total(exp))


Measure = Callable[[Columns], Tensor]  # -> BlockColumns
MEASURES: dict[str, Measure] = {
    "lse": lambda c: c.top.squeeze(-1).double() + c.total.log(),
    "entropy": lambda c: (c.total.log() - total((c.a - c.top).mul_(c.exp)) / c.total).clamp_min(0),  # −Σ ξ log ξ
    "concentration": lambda c: total(c.exp.square()) / c.total.square(),  # Σ ξ²
}


def column_blocks(entries: Entries, vectors: Vectors) -> Iterator[tuple[slice, slice, Block]]:
    """(groups, columns, logits) until every column was seen once; a group is one (row, head), row by row.

    Each block holds at most about `block_size` logits, at least one whole column.
    """
    block, dtype = block_size(entries), wide(entries.dtype)
    n, m, dim = entries.shape[2], vectors.shape[2], entries.shape[3]
    entries, vectors = entries.flatten(0, 1), vectors.flatten(0, 1)  # (r, h, n, d) -> (g, n, d)
    groups_per_block = max(1, block // max(n * m, 1))
    columns_per_block = m if n * m <= block else max(1, block // n)
    for g in range(0, len(entries), groups_per_block):
        groups = slice(g, min(g + groups_per_block, len(entries)))
        side = entries[groups].to(dtype).transpose(1, 2)  # (g, n, d) -> (g, d, n)
        for c in range(0, m, columns_per_block):
            columns = slice(c, min(c + columns_per_block, m))
            scaled = vectors[groups, columns].to(dtype) / math.sqrt(dim)
            yield groups, columns, scaled @ side  # (g, c, d) (g, d, n) -> (g, c, n)


def stream(q: Queries, k: Keys, axis: str, measures: Mapping[str, Measure]) -> dict[str, PerColumn]:
    """Each measure of every column, fp64, in one pass over the logits."""
    entries, vectors = sides(q, k, axis)
    shape = vectors.shape[:3]
    out = {name: torch.empty(shape, dtype=torch.float64, device=vectors.device).flatten(0, 1) for name in measures}
    for groups, columns, a in column_blocks(entries, vectors):
        block = exponentials(a)
        for name, measure in measures.items():
            out[name][groups, columns] = measure(block).double()
    return {name: values.reshape(shape) for name, values in out.items()}


def moments(q: Queries, k: Keys, axis: str, weights: Float[Tensor, " n"] | None = None) -> tuple[PerColumn, PerColumn]:
    """Mean and population variance of each column, fp64, exact and without any logit.

    mean = mean(entries)·v/√d and variance = vᵀ Cov(entries) v/d. `weights` ≥ 0 weigh the entries (see `end_weights`);
    None is equal weights.
    """
    entries, vectors = sides(q, k, axis)
    rows, heads, m, dim = vectors.shape
    n = entries.shape[2]
    w = torch.ones(n, dtype=torch.float64, device=entries.device) if weights is None else weights.double()
    w = w / w.sum()
    mean = torch.empty(rows * heads, m, dtype=torch.float64, device=entries.device)
    variance = torch.empty_like(mean)
    step = max(1, block_size(entries) // (max(n, m) * dim))  # heads whose sides are copied to fp64 at once
    for start in range(0, rows * heads, step):
        g = slice(start, start + step)
        side, other = entries.flatten(0, 1)[g].double(), vectors.flatten(0, 1)[g].double() / math.sqrt(dim)
        centre = w @ side  # (n) (g, n, d) -> (g, d)
        side = side - centre[:, None]
        covariance = side.mT @ (side * w[:, None])  # (g, d, n) (g, n, d) -> (g, d, d)
        mean[g] = (other @ centre[:, :, None])[..., 0]  # (g, m, d) (g, d, 1) -> (g, m)
        variance[g] = ((other @ covariance) * other).sum(dim=-1).clamp_min(0)
    return mean.reshape(rows, heads, m), variance.reshape(rows, heads, m)


def log_sum_exp(q: Queries, k: Keys, axis: str, weights: Float[Tensor, " n"] | None = None) -> PerColumn:
    """lse = log Σ_i w_i exp(a_i) of each column, fp64, streamed; weights > 0, None is 1."""
    lse = MEASURES["lse"]
    measure = lse if weights is None else lambda c: lse(exponentials(c.a + weights.log().to(c.a)))
    return stream(q, k, axis, {"lse": measure})["lse"]


def end_weights(grid: tuple[int, int]) -> Float[Tensor, " n"]:
    """Weights ½ at both ends of each axis (¼ in corners): the reflect blur keeps *this* weighted mean exactly.

    The reflecting extension has period 2n − 2 and holds the end samples once and the others twice. So with these
    weights Lemmas 3.1 and 3.2 of arXiv 2408.00760 are true for the official boundary too.
    """
    weights = [torch.ones(side, dtype=torch.float64) for side in grid]
    for side in weights:
        side[[0, -1]] = 0.5 if len(side) > 1 else 1.0
    return torch.outer(*weights).flatten()  # (h), (w) -> (h·w)


@dataclass(frozen=True)
class Statistics:
    """Statistics of every column along `axis`, fp64.

    n: entries in a column. eps: relative rounding of the logits behind exp (1.2e-7 for fp32 inputs). mean, variance: of
    the logits (population variance). lse: log Σ exp. entropy: of ξ = softmax, nats; its exp is how many tokens a
    pattern is spread over. concentration: Σ ξ².
    """

    axis: str
    n: int
    eps: float
    mean: PerColumn
    variance: PerColumn
    lse: PerColumn
    entropy: PerColumn
    concentration: PerColumn

    @property
    def trace(self) -> PerColumn:
        """1 − Σ ξ², the trace of minus the Hessian of −lse (see `energy`)."""
        return (1 - self.concentration).clamp_min(0)

    @property
    def taylor_lse(self) -> PerColumn:
        """log n + mean + ½ variance: lse to second order about the mean, the step of Lemma 3.2's proof."""
        return math.log(self.n) + self.mean + self.variance / 2

    @property
    def log_product(self) -> PerColumn:
        """log Π ξ_i = Σ a − n·lse, the size that eq. (20) of arXiv 2408.00760 gives to det H."""
        return self.n * (self.mean - self.lse)


def statistics(q: Queries, k: Keys, axis: str) -> Statistics:
    """The statistics of q kᵀ/√d along `axis`; of blurred logits with `statistics(*blurred(q, k, axis, B), axis)`.
    Raises InputError as `sides`."""
    return Statistics(**fields(q, k, axis, MEASURES))


def fields(q: Queries, k: Keys, axis: str, measures: Mapping[str, Measure]) -> dict[str, Any]:
    """The fields of `Statistics` (of a subclass, with more measures), in one pass over the logits."""
    n, eps = sides(q, k, axis)[0].shape[2], torch.finfo(wide(q.dtype)).eps
    mean, variance = moments(q, k, axis)
    return {"axis": axis, "n": n, "eps": eps, "mean": mean, "variance": variance, **stream(q, k, axis, measures)}


def columns(q: Queries, k: Keys, axis: str, index: Int[Tensor, " samples"]) -> Float[Tensor, "rows heads samples n"]:
    """The logits of the columns `index`, fp64: of these keys (axis "queries") or queries (axis "keys")."""
    entries, vectors = sides(q, k, axis)
    scaled = vectors[:, :, index].double() / math.sqrt(q.shape[-1])
    return scaled @ entries.double().transpose(2, 3)  # (r, h, s, d) (r, h, d, n) -> (r, h, s, n)
