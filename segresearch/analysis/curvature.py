"""Curvature of the attention energy, arXiv 2408.00760, section 3: Hessians of −lse and their determinants in log space.

Sign: H is the Hessian of the energy E = −lse, so H(a) = ξξᵀ − diag ξ with ξ = softmax(a), as the paper writes it. It is
negative semi-definite with H·1 = 0; hence det H = 0, and its size is the pseudo-determinant, the product
of the moduli of the n − 1 other eigenvalues. In closed form pdet H = n·Π ξ_i, so eq. (20), |det H| ≈ Π ξ_i, is the
pseudo-determinant up to the factor n that every matrix here shares. Traces and norms below are those of −H.

Two matrices are called the Hessian of the blurred energy:
- *entrywise*, eq. (19): H̃ = H(ã) ∘ B with ã = Ba;
- *chain rule*: Bᵀ H(ã) B, the Hessian of a ↦ −lse(Ba). Its pseudo-determinant is pdet H(ã)·(det B)² for every B whose
  rows sum to 1, doubly stochastic or not: with P = −H(ã) and u = B⁻ᵀ1, pdet(BᵀPB) = det(BᵀPB + 11ᵀ/n) =
  (det B)² det(P + uuᵀ/n), and adj P = (pdet P/n) 11ᵀ and 1ᵀu = n give det(P + uuᵀ/n) = pdet P.

`curvature` measures every column of a site, streamed and without n×n matrices; functions of one column `a`
(last axis) come first, and the dense matrices are for small grids and checks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import (
    MEASURES,
    Columns,
    Keys,
    PerColumn,
    Queries,
    Statistics,
    blurred,
    moments,
    precision,
    sides,
    stream,
    total,
)

STEPS = 12  # of Newton's method, at most


def hessian(a: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
    """H = ξξᵀ − diag ξ, the Hessian of −lse: n² numbers each."""
    xi = a.softmax(dim=-1)
    return xi.unsqueeze(-1) * xi.unsqueeze(-2) - torch.diag_embed(xi)


def entrywise_hessian(a: Float[Tensor, "*batch n"], operator: BlurOperator) -> Float[Tensor, "*batch n n"]:
    """Eq. (19) of arXiv 2408.00760, H(ã) ∘ B, for the unblurred column a. Dense."""
    return hessian(operator.apply(a)) * operator.dense().to(a)


def chain_hessian(a: Float[Tensor, "*batch n"], operator: BlurOperator) -> Float[Tensor, "*batch n n"]:
    """Bᵀ H(ã) B, the Hessian of a ↦ −lse(Ba), for the unblurred column a. Dense."""
    matrix = operator.dense().to(a)
    return matrix.T @ hessian(operator.apply(a)) @ matrix


def log_product(a: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """log Π ξ_i = Σ a − n·lse(a): eq. (20)'s approximation of log |det H|, fp64."""
    a = a.double()
    return a.sum(dim=-1) - a.shape[-1] * a.logsumexp(dim=-1)


def log_pseudo_det(a: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """log pdet H(a) = log n + Σ a − n·lse(a), exactly, fp64."""
    return math.log(a.shape[-1]) + log_product(a)


def entrywise_log_product(a: Float[Tensor, "*batch n"], operator: BlurOperator) -> Float[Tensor, "*batch"]:
    """log Π ξ(ã)_i b_ii, eqs. (20)–(21): the paper's approximation of log |det H̃|, fp64, of the unblurred column a."""
    return log_product(operator.apply(a.double())) + operator.log_diagonal


def chain_log_pseudo_det(a: Float[Tensor, "*batch n"], operator: BlurOperator) -> Float[Tensor, "*batch"]:
    """log pdet Bᵀ H(ã) B = log pdet H(ã) + 2 log |det B|, fp64, of the unblurred column a; −inf where B is singular."""
    return log_pseudo_det(operator.apply(a.double())) + 2 * operator.log_det


def spectral_norm(columns: Columns) -> Float[Tensor, "groups columns"]:
    """Largest eigenvalue of diag ξ − ξξᵀ of each column, fp64, in O(n) per step and at machine precision of the logits.

    With r = exp(a − max a) and the top entry set apart, the eigenvalue ρ/Σr solves (1 − ρ)·Σ' r_i/(ρ − r_i) = 1 between
    the second largest r and 1. There F(ρ) = ρ − 1 + 1/Σ' r_i/(ρ − r_i) rises and is concave, so Newton's steps from the
    left, from 2r₂/(1 + r₂) (exact for two entries), grow to the root monotonically and quadratically. A CPU stops when
    no column moves any more, which takes two to four steps; other devices take all STEPS, for no value is read back.
    """
    others = columns.exp.clone()
    others.scatter_(-1, columns.a.argmax(dim=-1, keepdim=True), 0.0)
    second = others.amax(dim=-1, keepdim=True)
    rho = 2 * second / (1 + second)
    solvable = (second > 0) & (second < 1)  # 0: one-hot, eigenvalue 0; 1: a tie at the top, eigenvalue exactly there
    tolerance = 4 * torch.finfo(others.dtype).eps
    gap, share = torch.empty_like(others), torch.empty_like(others)
    for _ in range(STEPS):
        torch.sub(torch.where(solvable, rho, 2.0), others, out=gap)
        torch.div(others, gap, out=share)
        phi = share.sum(dim=-1, keepdim=True)
        slope = 1 + share.div_(gap).sum(dim=-1, keepdim=True) / phi.square()
        step = torch.where(solvable, (1 - rho - 1 / phi) / slope, 0.0)
        rho = torch.minimum(rho + step.clamp_min(0), torch.ones_like(rho))
        if rho.device.type == "cpu" and bool((step <= tolerance * rho).all()):
            break
    return rho.squeeze(-1).double() / columns.total


def chain_norm(xi: Float[Tensor, "*batch n"], operator: BlurOperator, steps: int = 24) -> Float[Tensor, "*batch"]:
    """Largest eigenvalue of Bᵀ(diag ξ − ξξᵀ)B by `steps` of Lanczos, fp64; converges from below.

    The non-zero eigenvalues are those of D·BBᵀ, D = diag ξ − ξξᵀ, which is symmetric under ⟨x, y⟩ = xᵀBBᵀy: one pass
    over the factors per step, and no matrix. The start is one fixed random vector, so the result is reproducible.
    Rounding of fp32 entries weighs up to 3e-4 of it where B is nearly singular (σ = 8 on 32×32), else under 1e-5.
    """
    n = xi.shape[-1]
    steps = min(steps, n)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start.to(xi).expand(xi.shape)
    w = operator.gram(x)
    scale = (x * w).sum(dim=-1, keepdim=True).sqrt()
    x, w, before = x / scale, w / scale, torch.zeros_like(x)
    beta = torch.zeros_like(scale)
    tiny = torch.finfo(xi.dtype).tiny ** 0.5
    alphas, betas = [], []
    for _ in range(steps):
        y = xi * (w - (xi * w).sum(dim=-1, keepdim=True))
        alpha = (y * w).sum(dim=-1, keepdim=True)
        y = y - alpha * x - beta * before
        w_y = operator.gram(y)
        beta = (y * w_y).sum(dim=-1, keepdim=True).clamp_min(0).sqrt()
        alphas.append(alpha)
        betas.append(beta)
        alive = beta > tiny
        before, inverse = x, torch.where(alive, 1 / beta.clamp_min(tiny), 0.0)
        x, w = y * inverse, w_y * inverse
    diagonal = torch.cat(alphas, dim=-1).double()
    off = torch.cat(betas[:-1], dim=-1).double() if steps > 1 else diagonal[..., :0]
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return torch.linalg.eigvalsh(tridiagonal)[..., -1].clamp_min(0)


@dataclass(frozen=True)
class Curvature:
    """Curvature of every column along an axis, at the blurred logits ã = Ba (σ = 0: at a itself), fp64.

    statistics: of ã, from the same pass. log_pdet: of H(ã).
    entrywise_log_product: log Π ξ(ã)_i b_ii (eqs. 20–21). chain_log_pdet: of Bᵀ H(ã) B.
    trace, norm: of −H(ã), 1 − Σ ξ² and the largest eigenvalue. entrywise_trace, chain_trace: of −H̃ and −BᵀH(ã)B.
    chain_norm: largest eigenvalue of −BᵀH(ã)B; None without `chain_norms`.
    """

    statistics: Statistics
    log_pdet: PerColumn
    entrywise_log_product: PerColumn
    chain_log_pdet: PerColumn
    trace: PerColumn
    entrywise_trace: PerColumn
    chain_trace: PerColumn
    norm: PerColumn
    chain_norm: PerColumn | None


def curvature(
    q: Queries, k: Keys, axis: str, operator: BlurOperator, chain_norms: bool = False, block: int | None = None
) -> Curvature:
    """All statistics and curvature of blurred logits in one streamed pass; q, k are the *unblurred* ones.

    The blur acts on the side of `axis` (queries: SEG; keys: its dual), on the grid of `operator`. Memory beside inputs
    and results: one blurred copy of that side, and about `8 * block` numbers, twice that with `chain_norms`, which
    adds 24 Lanczos steps per column, several times the cost of all else.

    Raises InputError for an unknown axis, or a grid that does not have as many cells as that side has tokens.
    """
    q, k = blurred(q, k, axis, operator)
    entries, vectors = sides(q, k, axis)
    identity = operator.sigma == 0
    measures: dict[str, Callable[[Columns], Tensor]] = {**MEASURES, "norm": spectral_norm}
    if not identity:
        row_norms, diagonal = (z.to(entries.device) for z in (operator.row_norms_squared, operator.diagonal))

        def chain_trace(c: Columns) -> Tensor:
            spread = total(operator.adjoint(c.exp).square_())
            return (c.exp @ row_norms.to(c.a)) / c.total - spread / c.total.square()

        def entrywise_trace(c: Columns) -> Tensor:
            return (c.exp @ diagonal.to(c.a)) / c.total - (c.square @ diagonal.to(c.a)) / c.total.square()

        measures |= {"chain_trace": chain_trace, "entrywise_trace": entrywise_trace}
        if chain_norms:
            measures["chain_norm"] = lambda c: chain_norm(c.softmax, operator)
    values = stream(entries, vectors, measures, block)
    mean, variance = moments(q, k, axis)
    after = Statistics(axis, operator.n, precision(q), mean, variance, *(values[name] for name in MEASURES))
    trace, log_pdet = (1 - after.concentration).clamp_min(0), math.log(operator.n) + after.log_product
    return Curvature(
        statistics=after,
        log_pdet=log_pdet,
        entrywise_log_product=after.log_product + operator.log_diagonal,
        chain_log_pdet=log_pdet + 2 * operator.log_det,
        trace=trace,
        entrywise_trace=values.get("entrywise_trace", trace),
        chain_trace=values.get("chain_trace", trace),
        norm=values["norm"],
        chain_norm=values.get("chain_norm", values["norm"] if identity and chain_norms else None),
    )
