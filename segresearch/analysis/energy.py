"""Energies of attention and their curvature: slices of the landscape, Hessians, determinants in log space.

Definition 2.1 of SEG (arXiv 2408.00760): the energy of a column of logits over the queries is E = −lse(a). Its dual
(Appendix B) is −lse of a row over the keys. Both have the gradient −softmax. The logits carry the model's 1/√d.

Modern Hopfield networks (arXiv 2008.02217, eqs. 2 and 3) add a quadratic well:
E(z) = −lse(β, Xz) + ½ z·z + β⁻¹ log N + ½ M², where lse(β, y) = β⁻¹ log Σ exp(β y) and M is the largest pattern's norm.
Their update z ← Xᵀ softmax(β X z) is attention of the query z with keys X = values X and β = 1/√d, and it is a gradient
step of length 1: z − ∇E(z).

The Hessian of E is H(a) = ξξᵀ − diag ξ with ξ = softmax(a), as the paper writes it in section 3. It is negative
semi-definite with H·1 = 0; hence det H = 0, and its size is the pseudo-determinant, the product of the moduli of the
n − 1 other eigenvalues. In closed form pdet H = n·Π ξ_i, so eq. (20), |det H| ≈ Π ξ_i, is that up to the factor n which
every matrix here shares. Traces and norms below are those of −H.

Two matrices are called the Hessian of the blurred energy:
- *entrywise*, eq. (19): H̃ = H(ã) ∘ B with ã = Ba;
- *chain rule*: Bᵀ H(ã) B, the Hessian of a ↦ −lse(Ba). Its pseudo-determinant is pdet H(ã)·(det B)² for every B whose
  rows sum to 1, doubly stochastic or not: with P = −H(ã) and u = B⁻ᵀ1, pdet(BᵀPB) = det(BᵀPB + 11ᵀ/n) =
  (det B)² det(P + uuᵀ/n), and adj P = (pdet P/n) 11ᵀ and 1ᵀu = n give det(P + uuᵀ/n) = pdet P.

Functions of logits `a` (last axis) take unblurred ones; their dense matrices are for small grids. `curvature` measures
every column of a site, streamed and without n×n matrices.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis import logit_statistics as stats
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import Keys, PerColumn, Queries, Statistics
from segresearch.errors import InputError

States = Float[Tensor, "*batch states dim"]
Patterns = Float[Tensor, "*batch n dim"]
Logits = Float[Tensor, "*batch n"]
Dense = Float[Tensor, "*batch n n"]
Values = Float[Tensor, "*batch"]
STEPS = 12  # of Newton's method, at most
LARGEST = 1024  # tokens of a dense Hessian


def energies(q: Queries, k: Keys, axis: str) -> PerColumn:
    """E = −lse of every column along `axis` ("queries": Definition 2.1; "keys": its dual), fp64, streamed."""
    return -stats.log_sum_exp(q, k, axis)


def hopfield_energy(z: States, patterns: Patterns, beta: float) -> Float[Tensor, "*batch states"]:
    """E(z) of the modern Hopfield network that stores `patterns`, at least 0 (arXiv 2008.02217, eq. 2)."""
    lse = (beta * z @ patterns.mT).logsumexp(dim=-1) / beta
    largest = patterns.square().sum(dim=-1).amax(dim=-1)
    constant = math.log(patterns.shape[-2]) / beta + largest.unsqueeze(-1) / 2
    return z.square().sum(dim=-1) / 2 - lse + constant


def hopfield_update(z: States, patterns: Patterns, beta: float) -> States:
    """Xᵀ softmax(β X z), eq. 3 of arXiv 2008.02217: attention with k = v = patterns where β = 1/√d. Never raises E."""
    return (beta * z @ patterns.mT).softmax(dim=-1) @ patterns


def surface(
    base: Float[Tensor, " n"], along: Float[Tensor, "2 n"], s: Float[Tensor, " across"], t: Float[Tensor, " down"]
) -> tuple[Float[Tensor, "across down"], Float[Tensor, "across down 2"], Float[Tensor, "across down 2 2"]]:
    """The slice a(s, t) = base + s·u + t·v of −lse: energy, its first and second derivatives by (s, t), fp64.

    For the landscape a ↦ −lse(Ba) around a column a, blur both: `surface(B.apply(a), B.apply(directions), s, t)`.
    Memory: about 4·len(s)·len(t)·n numbers.
    """
    s, t, base, along = (z.double() for z in (s, t, base, along))
    a = base + s[:, None, None] * along[0] + t[:, None] * along[1]  # (across, down, n)
    xi = a.softmax(dim=-1)
    mean = xi @ along.T  # (across, down, 2)
    centred = along - mean.unsqueeze(-1)  # (across, down, 2, n)
    return -a.logsumexp(dim=-1), -mean, -(centred * xi.unsqueeze(-2)) @ centred.mT


def gaussian_curvature(gradient: Float[Tensor, "*batch 2"], second: Float[Tensor, "*batch 2 2"]) -> Values:
    """Of the surface z = E(s, t): K = (E_ss E_tt − E_st²)/(1 + E_s² + E_t²)²."""
    return torch.linalg.det(second) / (1 + gradient.square().sum(dim=-1)).square()


def hessian(a: Logits) -> Dense:
    """H = ξξᵀ − diag ξ, the Hessian of −lse."""
    xi = a.softmax(dim=-1)
    return xi.unsqueeze(-1) * xi.unsqueeze(-2) - torch.diag_embed(xi)


def entrywise_hessian(a: Logits, operator: BlurOperator) -> Dense:
    """Eq. (19) of arXiv 2408.00760, H(ã) ∘ B."""
    return hessian(operator.apply(a)) * operator.dense().to(a)


def chain_hessian(a: Logits, operator: BlurOperator) -> Dense:
    """Bᵀ H(ã) B, the Hessian of a ↦ −lse(Ba)."""
    matrix = operator.dense().to(a)
    return matrix.T @ hessian(operator.apply(a)) @ matrix


def log_product(a: Logits) -> Values:
    """log Π ξ_i = Σ a − n·lse(a): eq. (20)'s approximation of log |det H|, fp64."""
    a = a.double()
    return a.sum(dim=-1) - a.shape[-1] * a.logsumexp(dim=-1)


def log_pseudo_det(a: Logits) -> Values:
    """log pdet H(a) = log n + Σ a − n·lse(a), exactly, fp64."""
    return math.log(a.shape[-1]) + log_product(a)


def entrywise_log_product(a: Logits, operator: BlurOperator) -> Values:
    """log Π ξ(ã)_i b_ii, eqs. (20)–(21): the paper's approximation of log |det H̃|, fp64."""
    return log_product(operator.apply(a.double())) + operator.log_diagonal


def chain_log_pseudo_det(a: Logits, operator: BlurOperator) -> Values:
    """log pdet Bᵀ H(ã) B = log pdet H(ã) + 2 log |det B|, fp64; −inf where B is singular."""
    return log_pseudo_det(operator.apply(a.double())) + 2 * operator.log_det


def compare_hessians(a: Float[Tensor, "samples n"], operator: BlurOperator) -> dict[str, Float[Tensor, " samples"]]:
    """Eq. (19) beside the chain rule, for each column, fp64: O(n³) work each. InputError for more than 1024 tokens.

    distance: ‖H(ã)∘B − BᵀH(ã)B‖ / ‖BᵀH(ã)B‖ (Frobenius). entrywise_log_det: log |det H(ã)∘B| itself (the matrix is
    regular, unlike H). entrywise_log_product: what eqs. (20)–(21) put in its place. chain_log_pdet: log pdet BᵀH(ã)B,
    from eigenvalues. log_pdet: log pdet H(a).
    """
    if a.shape[1] > LARGEST:
        raise InputError(f"dense Hessians are for up to {LARGEST} tokens, these columns have {a.shape[1]}")
    a = a.double()
    entrywise, chain = entrywise_hessian(a, operator), chain_hessian(a, operator)
    return {
        "distance": torch.linalg.matrix_norm(entrywise - chain) / torch.linalg.matrix_norm(chain),
        "entrywise_log_det": torch.linalg.slogdet(entrywise).logabsdet,
        "entrywise_log_product": entrywise_log_product(a, operator),
        "chain_log_pdet": torch.linalg.eigvalsh(-chain)[:, 1:].clamp_min(0).log().sum(dim=-1),
        "log_pdet": log_pseudo_det(a),
    }


def spectral_norm(columns: stats.Columns) -> stats.BlockColumns:
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
        rho = (rho + step.clamp_min(0)).clamp_max(1)
        if rho.device.type == "cpu" and bool((step <= tolerance * rho).all()):
            break
    return rho.squeeze(-1).double() / columns.total


@dataclass(frozen=True)
class Curvature(Statistics):
    """Statistics of the blurred logits ã = Ba (σ = 0: of a itself), and the curvature there, fp64.

    norm: largest eigenvalue of −H(ã). chain_trace: of −BᵀH(ã)B; `trace` is that of −H(ã). Determinants follow from
    `log_product` and the operator, see `log_pseudo_det`, `entrywise_log_product` and `chain_log_pseudo_det`.
    """

    norm: PerColumn
    chain_trace: PerColumn


def curvature(q: Queries, k: Keys, axis: str, operator: BlurOperator) -> Curvature:
    """`Curvature` in one streamed pass over the logits of the *unblurred* q and k.

    The blur acts on the side of `axis` (queries: SEG; keys: its dual), on the grid of `operator`. Memory beside inputs
    and results: one blurred copy of that side, and about `8 * block_size` numbers.

    Raises InputError for an unknown axis, or a grid that does not have as many cells as that side has tokens.
    """
    q, k = stats.blurred(q, k, axis, operator)
    row_norms = operator.row_norms_squared.to(q)

    def chain_trace(c: stats.Columns) -> Tensor:
        if operator.sigma == 0:
            return (1 - stats.MEASURES["concentration"](c)).clamp_min(0)
        spread = stats.total(operator.adjoint(c.exp).square_())
        return (c.exp @ row_norms) / c.total - spread / c.total.square()

    measures = {**stats.MEASURES, "norm": spectral_norm, "chain_trace": chain_trace}
    return Curvature(**stats.fields(q, k, axis, measures))
