"""Energies of attention and slices through their landscapes.

Definition 2.1 of SEG (arXiv 2408.00760): the energy of a column of logits over the queries is E = −lse(a). Its dual
(Appendix B) is −lse of a row over the keys. Both have the gradient −softmax. The logits carry the model's 1/√d.

Modern Hopfield networks (arXiv 2008.02217, eqs. 2 and 3) add a quadratic well:
E(z) = −lse(β, Xz) + ½ z·z + β⁻¹ log N + ½ M², where lse(β, y) = β⁻¹ log Σ exp(β y) and M is the largest pattern's norm.
Their update z ← Xᵀ softmax(β X z) is attention of the query z with keys X = values X and β = 1/√d, and it is a gradient
step of length 1: z − ∇E(z).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.curvature import gaussian_curvature
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import blocks, columns, log_sum_exp, sides
from segresearch.errors import InputError


def energies(
    q: Float[Tensor, "rows heads queries dim"], k: Float[Tensor, "rows heads keys dim"], axis: str
) -> Float[Tensor, "rows heads m"]:
    """E = −lse of every column along `axis` ("queries": Definition 2.1; "keys": its dual), fp64, streamed."""
    return -log_sum_exp(q, k, axis)


def energy(
    q: Float[Tensor, "rows heads queries dim"], k: Float[Tensor, "rows heads keys dim"], axis: str
) -> Float[Tensor, "rows heads"]:
    """The scalar energy of a head's whole query (or key) grid: the sum of `energies` over its columns."""
    return energies(q, k, axis).sum(dim=-1)


def energy_gradient(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    block: int | None = None,
) -> Float[Tensor, "rows heads n dim"]:
    """∂`energy`/∂q (axis "queries") or ∂/∂k (axis "keys"): −Σ_j ξ_ij v_j/√d, streamed, without autograd.

    The gradient by a column of logits is −softmax; this is its image in the space of queries or keys. At least fp32.
    """
    entries, vectors = sides(q, k, axis)
    out = torch.zeros_like(entries, dtype=torch.promote_types(entries.dtype, torch.float32)).flatten(0, 1)
    flat = vectors.flatten(0, 1).to(out.dtype) / math.sqrt(vectors.shape[-1])
    for groups, chosen, block_of in blocks(entries, vectors, block):
        out[groups] -= block_of.softmax.transpose(1, 2) @ flat[groups, chosen]  # (g, n, c) (g, c, d) -> (g, n, d)
    return out.reshape(entries.shape)


def hopfield_energy(
    z: Float[Tensor, "*batch states dim"], patterns: Float[Tensor, "*batch n dim"], beta: float
) -> Float[Tensor, "*batch states"]:
    """E(z) of the modern Hopfield network that stores `patterns`, at least 0 (arXiv 2008.02217, eq. 2)."""
    lse = (beta * z @ patterns.transpose(-1, -2)).logsumexp(dim=-1) / beta
    largest = patterns.square().sum(dim=-1).amax(dim=-1)
    constant = math.log(patterns.shape[-2]) / beta + largest.unsqueeze(-1) / 2
    return z.square().sum(dim=-1) / 2 - lse + constant


def hopfield_gradient(
    z: Float[Tensor, "*batch states dim"], patterns: Float[Tensor, "*batch n dim"], beta: float
) -> Float[Tensor, "*batch states dim"]:
    """∇E(z) = z − Xᵀ softmax(β X z)."""
    return z - hopfield_update(z, patterns, beta)


def hopfield_update(
    z: Float[Tensor, "*batch states dim"], patterns: Float[Tensor, "*batch n dim"], beta: float
) -> Float[Tensor, "*batch states dim"]:
    """Xᵀ softmax(β X z), eq. 3 of arXiv 2008.02217: attention with k = v = patterns where β = 1/√d. Never raises E."""
    return (beta * z @ patterns.transpose(-1, -2)).softmax(dim=-1) @ patterns


@dataclass(frozen=True)
class Line:
    """E = −lse along a(s) = base + s·along, fp64: energy, first and second derivative by s (never positive)."""

    s: Float[Tensor, " steps"]
    energy: Float[Tensor, " steps"]
    slope: Float[Tensor, " steps"]
    second: Float[Tensor, " steps"]


@dataclass(frozen=True)
class Surface:
    """E = −lse over a(s, t) = base + s·u + t·v, fp64.

    Energy, its derivatives by (s, t), and the Gaussian curvature of the graph (s, t, E).
    """

    s: Float[Tensor, " across"]
    t: Float[Tensor, " down"]
    energy: Float[Tensor, "across down"]
    gradient: Float[Tensor, "across down 2"]
    second: Float[Tensor, "across down 2 2"]
    gaussian_curvature: Float[Tensor, "across down"]


def _derivatives(a: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E (...), ∂E = −Σ ξ u (..., p) and ∂²E = −Cov_ξ(u) (..., p, p) of logits (..., n) along p directions (p, n)."""
    xi = a.softmax(dim=-1)
    mean = xi @ along.T
    centred = along - mean.unsqueeze(-1)  # (..., p, n)
    return -a.logsumexp(dim=-1), -mean, -(centred * xi.unsqueeze(-2)) @ centred.transpose(-1, -2)


def line(base: Float[Tensor, " n"], along: Float[Tensor, " n"], s: Float[Tensor, " steps"]) -> Line:
    """The slice of −lse through the logits `base` in the direction `along`, at the positions s."""
    s, base, along = s.double(), base.double(), along.double()
    energy, gradient, second = _derivatives(base + s[:, None] * along, along[None])
    return Line(s, energy, gradient[:, 0], second[:, 0, 0])


def surface(
    base: Float[Tensor, " n"],
    along: Float[Tensor, "2 n"],
    s: Float[Tensor, " across"],
    t: Float[Tensor, " down"],
) -> Surface:
    """The slice of −lse through the logits `base` in two directions; memory 3·len(t)·n numbers at a time."""
    s, t, base, along = (z.double() for z in (s, t, base, along))
    parts = [_derivatives(base + at * along[0] + t[:, None] * along[1], along) for at in s]
    energy, gradient, second = (torch.stack(part) for part in zip(*parts))
    return Surface(s, t, energy, gradient, second, gaussian_curvature(gradient, second))


def column_slice(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    place: tuple[int, int, int],
    tokens: tuple[int, int],
    smoothing: Smoothing | None = None,
    axis: str = "queries",
) -> tuple[Float[Tensor, " n"], Float[Tensor, "2 n"]]:
    """(base, along) of Definition 2.1's landscape a ↦ −lse(Ba) around a real column, for `line` and `surface`.

    place = (row, head, key) names the column (axis "keys": row, head, query). s and t raise the logits of the two
    `tokens` in it, before the blur: ã = Ba + s·B e_i + t·B e_j. Without smoothing B = 1.
    """
    row, head, index = place
    chosen = torch.tensor([index], device=q.device)
    base = columns(q[row, head][None, None], k[row, head][None, None], axis, chosen)[0, 0, 0]
    along = torch.zeros(2, base.shape[0], dtype=torch.float64, device=q.device)
    along[0, tokens[0]] = along[1, tokens[1]] = 1
    return (base, along) if smoothing is None else (smoothing.apply(base), smoothing.apply(along))


def query_slice(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    place: tuple[int, int, int],
    smoothing: Smoothing | None = None,
    directions: Float[Tensor, "2 dim"] | None = None,
    move: str = "one",
) -> tuple[Float[Tensor, " n"], Float[Tensor, "2 n"]]:
    """(base, along) of the landscape z ↦ −lse(K z/√d) that a real query sees, for `line` and `surface`.

    place = (row, head, query). s and t move the query along `directions` (default: the first two principal
    directions of the head's queries, in units of their standard deviations). With smoothing the queries are blurred: if
    "one" query moves, its blurred position moves b_ii times as far; if "all" move together, just as far.

    Raises ValueError for another `move`.
    """
    if move not in ("one", "all"):
        raise InputError(f'move must be "one" (query) or "all", got {move!r}')
    row, head, index = place
    queries, keys = q[row, head].double(), k[row, head].double() / math.sqrt(q.shape[-1])
    if directions is None:
        _, values, axes = torch.linalg.svd(queries - queries.mean(dim=0), full_matrices=False)
        directions = axes[:2] * (values[:2, None] / math.sqrt(queries.shape[0]))
    directions, centre = directions.double(), queries[index]
    if smoothing is not None:
        centre = smoothing.apply(queries.T)[:, index]  # (d, n) -> (d)
        if move == "one":
            directions = directions * float(smoothing.diagonal[index])
    return keys @ centre, directions @ keys.T
