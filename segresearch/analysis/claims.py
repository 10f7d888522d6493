"""The claims of SEG's section 3 (arXiv 2408.00760), each tested on measured logits; where Theorem 3.1 holds.

A claim compares two `Statistics`: of the logits a before and of the blurred logits ã = Ba after, along the same axis.
Its `ClaimResult` has both sides for every column. `check_claims` starts from q and k. The axis "queries" with blurred
queries is the paper's text, the axis "keys" with blurred keys its dual (Appendix B).

Known beforehand, and tested: with a doubly stochastic B (symmetric, circular, exact) Lemmas 3.1 and 3.2 hold without
exception, and eq. (22) is reversed: the mean stays and lse falls, so the product rises. Theorem 3.1 depends on the
logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from segresearch.analysis import logit_statistics as stats
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import Keys, PerColumn, Queries, Statistics
from segresearch.errors import InputError


@dataclass(frozen=True)
class ClaimResult:
    """Both sides of one claim `left relation right`, for every column. All tensors fp64.

    relation: "=", "<=" or "<". statement: its place in arXiv 2408.00760, then its formula.
    tolerance: what the rounding of both sides can account for. A "<" holds only beyond it, "<=" and "=" up to it.
    """

    claim: str
    relation: str
    statement: str
    left: PerColumn
    right: PerColumn
    tolerance: PerColumn
    axis: str  # of the columns
    operator: BlurOperator

    @property
    def margin(self) -> PerColumn:
        """By how much the claim holds (positive) or fails (negative): right − left, and −|right − left| for "="."""
        gap = torch.where(self.left == self.right, 0.0, self.left - self.right)  # 0 where both are −inf
        return -gap.abs() if self.relation == "=" else -gap

    @cached_property
    def holds(self) -> Bool[Tensor, "rows heads m"]:
        return self.margin > self.tolerance if self.relation == "<" else self.margin >= -self.tolerance

    @property
    def fraction(self) -> float:
        """Share of (row, head, column) where the claim holds."""
        return float(self.holds.double().mean())


Results = tuple[ClaimResult, ...]


def _rounding(a: Statistics) -> tuple[PerColumn, PerColumn, PerColumn]:
    """Rounding of a column's mean, variance and lse, with room."""
    spread = a.variance.sqrt()
    size, unit = a.mean.abs() + 4 * spread, 16 * a.eps
    return unit * (size + 1e-6), unit * (size * spread + 1e-6), unit * (1 + size)


def check_statistics(before: Statistics, after: Statistics, operator: BlurOperator) -> Results:
    """The claims that statistics alone decide, in the order of the paper.

    Raises InputError if the two statistics are not of the same columns or not of the operator's grid.
    """
    if (before.axis, before.n) != (after.axis, after.n) or after.n != operator.n:
        raise InputError(
            f"statistics of {before.n} {before.axis} and {after.n} {after.axis} do not fit each other and "
            f"a grid of {operator.n} tokens"
        )
    n, log_n, exact = after.n, math.log(after.n), torch.zeros_like(after.mean)
    mean, variance, lse = _rounding(before)
    product, product_before = after.log_product, before.log_product
    with_diagonal = product + operator.log_diagonal
    claims = (
        # True for all a if and only if B's columns sum to 1.
        ("mean_kept", "=", "Lemma 3.1: mean(Ba) = mean(a)", after.mean, before.mean, mean),
        # Certain for doubly stochastic B.
        ("variance_falls", "<=", "Lemma 3.1: var(Ba) ≤ var(a)", after.variance, before.variance, variance),
        # As the proof shows it: lse falls, so the energy −lse rises (the text says that lse increases). For doubly
        # stochastic B without any approximation: Ba is majorised by a, and Σ exp is Schur-convex.
        ("lse_falls", "<=", "Lemma 3.2: lse(Ba) ≤ lse(a)", after.lse, before.lse, lse),
        ("lse_taylor", "<=", "Lemma 3.2, second order: log n + mean + ½ var of Ba ≤ of a",
         after.taylor_lse, before.taylor_lse, mean + variance),
        # |det H| ≈ Π ξ_i in logs. det H is 0; the pseudo-determinant is n·Π ξ_i, so the gap is log n.
        ("product_is_determinant", "=", "Eq. (20): log Π ξ(Ba) = log pdet H(Ba)", product, product + log_n, exact),
        # True where b_ii < 1; the gap is Σ log b_ii.
        ("diagonal_shrinks", "<", "Eq. (21): log Π ξ(Ba)·b_ii < log Π ξ(Ba)", with_diagonal, product, exact),
        # Reversed where the mean stays and lse falls.
        ("product_falls", "<=", "Eq. (22): log Π ξ(Ba) ≤ log Π ξ(a)", product, product_before, n * lse),
        # With the mean kept: if and only if n·(lse(a) − lse(ã)) < −Σ log b_ii: for soft attention, not for sharp.
        ("theorem_paper", "<", "Theorem 3.1 by eqs. (19)–(23): log Π ξ(Ba)·b_ii < log Π ξ(a)",
         with_diagonal, product_before, n * lse),
        # For the Hessian that the chain rule gives, exactly. With the mean kept: if and only if
        # n·(lse(a) − lse(ã)) < −2 log |det B|.
        ("theorem_chain", "<", "Theorem 3.1 by the chain rule: log pdet BᵀH(Ba)B < log pdet H(a)",
         log_n + product + 2 * operator.log_det, log_n + product_before, n * lse),
        # Beside the determinants (no claim of the paper). Not for sharp columns.
        ("trace_falls", "<=", "Trace: tr −H(Ba) ≤ tr −H(a)",
         1 - after.concentration, 1 - before.concentration, exact + 16 * before.eps),
    )  # fmt: skip
    return tuple(ClaimResult(*claim, after.axis, operator) for claim in claims)


def check_claims(q: Queries, k: Keys, axis: str, operator: BlurOperator, before: Statistics | None = None) -> Results:
    """`check_statistics` for q and k, with the blur on the side of `axis`. before: of unblurred logits, if known."""
    after = stats.statistics(*stats.blurred(q, k, axis, operator), axis)
    return check_statistics(before or stats.statistics(q, k, axis), after, operator)


def check_weighted(q: Queries, k: Keys, axis: str, operator: BlurOperator, before: Statistics | None = None) -> Results:
    """Lemmas 3.1 (both halves) and 3.2 under "reflect" with `end_weights`: so weighted, they hold without exception.

    before: statistics of the unblurred logits, if known.
    Raises InputError for another boundary, for which the plain lemmas hold.
    """
    if operator.boundary != "reflect":
        raise InputError(f'end weights mend the boundary "reflect", got {operator.boundary!r}')
    weights = stats.end_weights(operator.grid).to(q.device)
    names = (
        ("mean_kept_weighted", "=", "Lemma 3.1 with end weights: mean(Ba) = mean(a)"),
        ("variance_falls_weighted", "<=", "Lemma 3.1 with end weights: var(Ba) ≤ var(a)"),
        ("lse_falls_weighted", "<=", "Lemma 3.2 with end weights: lse(Ba) ≤ lse(a)"),
    )
    left, right = (
        (*stats.moments(*pair, axis, weights), stats.log_sum_exp(*pair, axis, weights))
        for pair in (stats.blurred(q, k, axis, operator), (q, k))
    )
    claims = zip(names, left, right, _rounding(before or stats.statistics(q, k, axis)))
    return tuple(ClaimResult(*name, after, plain, slack, axis, operator) for name, after, plain, slack in claims)


def blur_commutes(q: Queries, k: Keys, axis: str, operator: BlurOperator) -> ClaimResult:
    """Proposition 3.1: logits of blurred queries are the blurred logits, blur(Q)Kᵀ = B(QKᵀ). Exact for any linear B.

    left is the largest |difference| in a column, right 0; logits of both kinds are streamed side by side.
    """
    plain = stats.sides(q, k, axis)
    after = stats.sides(*stats.blurred(q, k, axis, operator), axis)
    gap = torch.empty(plain[1].shape[:3], dtype=torch.float64, device=q.device)
    size = torch.empty_like(gap)
    for (g, c, a), (_, _, expected) in zip(stats.column_blocks(*plain), stats.column_blocks(*after)):
        gap.flatten(0, 1)[g, c] = (operator.apply(a) - expected).abs().amax(dim=-1).double()
        size.flatten(0, 1)[g, c] = a.abs().amax(dim=-1).double()
    # one logit is a sum of dim products, each as large as |q||k|/√d, which may cancel
    bound = math.sqrt(q.shape[-1]) * q.abs().max().double() * k.abs().max().double()
    tolerance = 16 * torch.finfo(after[0].dtype).eps * (size + bound)
    statement = "Proposition 3.1: max |blur(Q)Kᵀ − blur(QKᵀ)| = 0"
    return ClaimResult("blur_commutes", "=", statement, gap, torch.zeros_like(gap), tolerance, axis, operator)


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


def limits(
    q: Queries, k: Keys, grid: tuple[int, int], sigmas: Sequence[float | int], boundary: str
) -> tuple[Float[Tensor, " sigmas"], Float[Tensor, " sigmas"]]:
    """How far the blur of the queries is from its two limits: rms of Ba − a, and of Ba − mean(a), over `sigmas`.

    Both over the rms spread of a, pooled over all columns: 0 is there, 1 is as far as a column is spread. The cut
    kernels stay away from the mean at every finite σ; "exact" tends to it.
    """
    q, k = q.double(), k.double()
    spread = stats.moments(q, k, "queries")[1].mean().sqrt()
    mean_query = q.mean(dim=2, keepdim=True)

    def distance(difference: Queries) -> Tensor:  # by moments: no logit is formed
        mean, variance = stats.moments(difference, k, "queries")
        return (mean.square() + variance).mean().sqrt() / spread

    after = (stats.blurred(q, k, "queries", BlurOperator(grid, sigma, boundary))[0] for sigma in sigmas)
    to_identity, to_mean = zip(*((distance(z - q), distance(z - mean_query)) for z in after))
    return torch.stack(to_identity), torch.stack(to_mean)
