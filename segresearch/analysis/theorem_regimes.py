"""Where Theorem 3.1 of arXiv 2408.00760 holds, the limits of σ, and eq. (19) against the chain rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.curvature import chain_hessian, entrywise_hessian, entrywise_log_product, log_pseudo_det
from segresearch.analysis.logit_statistics import Keys, PerColumn, Queries, blurred, moments, sides
from segresearch.errors import InputError

LARGEST = 1024  # tokens of a dense Hessian


def white_noise(n: int, samples: int = 16) -> Float[Tensor, "samples n"]:
    """Gaussian columns of mean 0 and standard deviation 1, each exactly, from a fixed seed; fp64, on the CPU."""
    noise = torch.randn(samples, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise - noise.mean(dim=1, keepdim=True)) / noise.std(dim=1, correction=0, keepdim=True)


def theorem_margins(columns: Float[Tensor, "samples n"], operator: BlurOperator) -> tuple[float, float]:
    """Median margins of Theorem 3.1's conclusion, nats per token; positive where the blur attenuates the curvature.

    First under eqs. (19) and (20), log Π ξ(a)_i − log Π ξ(ã)_i b_ii; then by the chain rule,
    log pdet H(a) − log pdet BᵀH(ã)B, which is inf where B is singular.
    """
    after = operator.apply(columns)
    rise = (after.mean(1) - after.logsumexp(1)) - (columns.mean(1) - columns.logsumexp(1))  # of log Π ξ, per token
    middle = float(rise.median())
    return -operator.log_diagonal / operator.n - middle, -2 * operator.log_det / operator.n - middle


def distances(q: Queries, k: Keys, axis: str, operator: BlurOperator) -> tuple[PerColumn, PerColumn]:
    """Root mean square of Ba − a and of Ba − mean(a), of every column, by moments: no logit is formed."""
    entries, vectors = sides(q.double(), k.double(), axis)
    after, _ = sides(*blurred(q.double(), k.double(), axis, operator), axis)

    def size(side: Tensor) -> Tensor:
        mean, variance = moments(side, vectors, "queries")
        return (mean.square() + variance).sqrt()

    return size(after - entries), size(after - entries.mean(dim=2, keepdim=True))


@dataclass(frozen=True)
class Limits:
    """How far the blur is from its two limits, over blur sigmas: 0 is there, 1 is as far as a column is spread.

    to_identity: rms of Ba − a; to_mean: rms of Ba − mean(a); each over the rms spread of a, pooled over all columns.
    """

    boundary: str
    sigmas: tuple[float, ...]
    to_identity: Float[Tensor, " sigmas"]
    to_mean: Float[Tensor, " sigmas"]


def limits(
    q: Queries, k: Keys, axis: str, grid: tuple[int, int], sigmas: Sequence[float | int], boundary: str
) -> Limits:
    """`Limits` over `sigmas`. The cut kernels stay away from the mean at every finite σ; "exact" tends to it."""
    spread = moments(q, k, axis)[1].mean().sqrt()
    pairs = [distances(q, k, axis, BlurOperator(grid, sigma, boundary)) for sigma in sigmas]
    to_identity, to_mean = (torch.stack([z.square().mean().sqrt() / spread for z in side]) for side in zip(*pairs))
    return Limits(boundary, tuple(float(sigma) for sigma in sigmas), to_identity, to_mean)


@dataclass(frozen=True)
class Hessians:
    """Eq. (19) beside the chain rule, for each column; dense, fp64.

    distance: ‖H(ã)∘B − BᵀH(ã)B‖ / ‖BᵀH(ã)B‖ (Frobenius). entrywise_log_det: log |det H(ã)∘B| itself (the matrix is
    regular, unlike H). entrywise_log_product: what eqs. (20)–(21) put in its place. chain_log_pdet: log pdet BᵀH(ã)B,
    from eigenvalues. log_pdet: log pdet H(a). Traces and norms: see `curvature`.
    """

    distance: Float[Tensor, " samples"]
    entrywise_log_det: Float[Tensor, " samples"]
    entrywise_log_product: Float[Tensor, " samples"]
    chain_log_pdet: Float[Tensor, " samples"]
    log_pdet: Float[Tensor, " samples"]


def hessians(columns: Float[Tensor, "samples n"], operator: BlurOperator) -> Hessians:
    """`Hessians` of unblurred columns, one at a time: n² numbers and O(n³) work each.

    Raises InputError for more than 1024 tokens.
    """
    n = columns.shape[1]
    if n > LARGEST:
        raise InputError(f"dense Hessians are for up to {LARGEST} tokens, these columns have {n}; see `curvature`")

    def compared(a: Float[Tensor, " n"]) -> tuple[Tensor, ...]:
        entrywise, chain = entrywise_hessian(a, operator), chain_hessian(a, operator)
        return (
            (entrywise - chain).norm() / chain.norm(),
            torch.linalg.slogdet(entrywise).logabsdet,
            entrywise_log_product(a, operator),
            torch.linalg.eigvalsh(-chain)[1:].clamp_min(0).log().sum(),
            log_pseudo_det(a),
        )

    return Hessians(*(torch.stack(values) for values in zip(*map(compared, columns.double()))))
