"""Beyond one blur: the limits of σ, where Theorem 3.1 holds and fails, and eq. (19) against the chain rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.curvature import (
    chain_hessian,
    entrywise_hessian,
    entrywise_log_product,
    hessian,
    log_product,
    log_pseudo_det,
)
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import blurred, moments, sides
from segresearch.analysis.verdict import Verdict
from segresearch.errors import InputError


def distances(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    smoothing: Smoothing,
) -> tuple[Float[Tensor, "rows heads m"], Float[Tensor, "rows heads m"]]:
    """Root mean square of Ba − a and of Ba − mean(a), of every column, by moments: no logit is formed."""
    entries, vectors = sides(q.double(), k.double(), axis)
    smooth, _ = sides(*blurred(q.double(), k.double(), smoothing.grid, smoothing.sigma, smoothing.boundary, axis), axis)

    def size(side: Tensor) -> Tensor:
        mean, variance = moments(side, vectors, "queries")
        return (mean.square() + variance).sqrt()

    return size(smooth - entries), size(smooth - entries.mean(dim=2, keepdim=True))


@dataclass(frozen=True)
class Limits:
    """How far the blur is from its two limits, over blur sigmas: 0 is there, 1 is as far as a column is spread.

    to_identity: rms of Ba − a; to_mean: rms of Ba − mean(a); each over the rms spread of a, pooled over all columns.
    """

    boundary: str
    axis: str
    sigmas: tuple[float, ...]
    to_identity: Float[Tensor, " sigmas"]
    to_mean: Float[Tensor, " sigmas"]


def limits(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    grid: tuple[int, int],
    sigmas: Sequence[float | int],
    boundary: str,
) -> Limits:
    """`Limits` over `sigmas`. The cut kernels stay away from the mean at every finite σ; "exact" tends to it."""
    spread = moments(q, k, axis)[1].mean().sqrt()
    pairs = [distances(q, k, axis, Smoothing(grid, sigma, boundary)) for sigma in sigmas]
    near, far = (torch.stack([z.square().mean().sqrt() / spread for z in side]) for side in zip(*pairs))
    return Limits(boundary, axis, tuple(float(sigma) for sigma in sigmas), near, far)


def _limit(q: Tensor, k: Tensor, axis: str, smoothing: Smoothing, which: int, claim: str, statement: str) -> Verdict:
    left = distances(q, k, axis, smoothing)[which]
    spread = moments(q, k, axis)[1].sqrt()
    return Verdict(
        claim,
        statement,
        "=",
        axis,
        smoothing.sigma,
        smoothing.boundary,
        smoothing.n,
        left,
        torch.zeros_like(left),
        1e-3 * spread + 1e-9,
    )


def limit_zero(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    grid: tuple[int, int],
    boundary: str,
    sigma: float | int = 0.1,
) -> Verdict:
    """σ → 0 is the identity: at the small `sigma`, rms(Ba − a) is under 0.1 % of the column's spread."""
    return _limit(q, k, axis, Smoothing(grid, sigma, boundary), 0, "limit_zero", "σ → 0: rms(Ba − a) = 0")


def limit_infinity(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    grid: tuple[int, int],
    boundary: str,
    sigma: float | int = 9999.0,
) -> Verdict:
    """σ → ∞ is the mean: at `sigma` (9999, the largest finite one), rms(Ba − mean a) is under 0.1 % of the spread.

    At σ = inf every boundary is the mean exactly. Up to 9999 only "exact" gets there; the cut kernels, the official
    "reflect" among them, do not, so that for them infinity is a jump.
    """
    return _limit(q, k, axis, Smoothing(grid, sigma, boundary), 1, "limit_infinity", "σ → ∞: rms(Ba − mean a) = 0")


@dataclass(frozen=True)
class Regime:
    """Theorem 3.1 over logit spread and blur σ, of one boundary; margins in nats per token (positive: attenuated).

    spreads: standard deviation that the columns were scaled to. entrywise: mean margin of Π ξ(ã)_i b_ii < Π ξ(a)_i;
    chain: of pdet Bᵀ H(ã) B < pdet H(a), +inf where B is singular. The fractions are of columns with a positive margin.
    """

    boundary: str
    grid: tuple[int, int]
    spreads: tuple[float, ...]
    sigmas: tuple[float, ...]
    entrywise: Float[Tensor, "spreads sigmas"]
    chain: Float[Tensor, "spreads sigmas"]
    entrywise_fraction: Float[Tensor, "spreads sigmas"]
    chain_fraction: Float[Tensor, "spreads sigmas"]


def regime(
    columns: Float[Tensor, "samples n"],
    grid: tuple[int, int],
    spreads: Sequence[float | int],
    sigmas: Sequence[float | int],
    boundary: str,
) -> Regime:
    """The regime map of the `columns` (measured, or Gaussian noise), brought to mean 0 and to every spread in turn.

    Raises ValueError for a constant column, which cannot be scaled.
    """
    a = columns.double() - columns.double().mean(dim=1, keepdim=True)
    spread = a.square().mean(dim=1, keepdim=True).sqrt()
    if not bool((spread > 0).all()):
        raise InputError(f"column {int(spread.squeeze(1).argmin())} is constant: it has no spread to scale")
    unit, n = a / spread, a.shape[1]
    shape = (len(spreads), len(sigmas))
    out = [torch.empty(shape, dtype=torch.float64, device=a.device) for _ in range(4)]
    for j, sigma in enumerate(sigmas):
        smoothing = Smoothing(grid, sigma, boundary)
        smooth = smoothing.apply(unit)
        for i, scale in enumerate(spreads):
            rise = log_product(scale * smooth) - log_product(scale * unit)
            margins = (-(rise + smoothing.log_diagonal) / n, -(rise + 2 * smoothing.log_det) / n)
            for which, margin in enumerate(margins):
                out[which][i, j] = margin.mean()
                out[which + 2][i, j] = (margin > 0).double().mean()
    return Regime(boundary, grid, tuple(map(float, spreads)), tuple(map(float, sigmas)), *out)


@dataclass(frozen=True)
class Hessians:
    """Eq. (19) beside the chain rule, for each column; dense, fp64.

    distance: ‖H(ã)∘B − BᵀH(ã)B‖ / ‖BᵀH(ã)B‖ (Frobenius). entrywise_log_det: log |det H(ã)∘B| itself (the matrix is
    regular, unlike H). entrywise_log_product: what eqs. (20)–(21) put in its place. chain_log_pdet: log pdet BᵀH(ã)B,
    from eigenvalues. log_pdet: log pdet H(a). traces and norms (largest singular value) of both, and of H(a).
    """

    distance: Float[Tensor, " samples"]
    entrywise_log_det: Float[Tensor, " samples"]
    entrywise_log_product: Float[Tensor, " samples"]
    chain_log_pdet: Float[Tensor, " samples"]
    log_pdet: Float[Tensor, " samples"]
    trace: Float[Tensor, " samples"]
    entrywise_trace: Float[Tensor, " samples"]
    chain_trace: Float[Tensor, " samples"]
    norm: Float[Tensor, " samples"]
    entrywise_norm: Float[Tensor, " samples"]
    chain_norm: Float[Tensor, " samples"]


LARGEST = 1024  # tokens of a dense Hessian


def hessians(columns: Float[Tensor, "samples n"], smoothing: Smoothing) -> Hessians:
    """`Hessians` of unblurred columns, one at a time: n² numbers and O(n³) work each.

    Raises ValueError for more than 1024 tokens.
    """
    n = columns.shape[1]
    if n > LARGEST:
        raise InputError(f"dense Hessians are for up to {LARGEST} tokens, these columns have {n}; see `curvature`")
    found = []
    for a in columns.double():
        plain, entrywise, chain = hessian(a), entrywise_hessian(a, smoothing), chain_hessian(a, smoothing)
        modes = torch.linalg.eigvalsh(-chain)
        found.append(
            (
                (entrywise - chain).norm() / chain.norm(),
                torch.linalg.slogdet(entrywise).logabsdet,
                entrywise_log_product(a, smoothing),
                modes[1:].clamp_min(0).log().sum(),
                log_pseudo_det(a),
                -plain.trace(),
                -entrywise.trace(),
                -chain.trace(),
                torch.linalg.matrix_norm(plain, 2),
                torch.linalg.matrix_norm(entrywise, 2),
                modes[-1],
            )
        )
    return Hessians(*(torch.stack(values) for values in zip(*found)))
