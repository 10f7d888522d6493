"""The claims of SEG's section 3 (arXiv 2408.00760), each tested on measured logits.

A claim is a function of (before, after, operator): the `Statistics` of the logits a and of the blurred logits ã = Ba
along the same axis. It returns a `ClaimResult` with both sides for every column. `check_claims` starts from q and k.
The axis "queries" with blurred queries is the paper's text, the axis "keys" with blurred keys its dual (Appendix B).

Known beforehand, and tested: with a doubly stochastic B (symmetric, circular, exact) Lemmas 3.1 and 3.2 hold without
exception, and eq. (22) is reversed: the mean stays and lse falls, so the product rises. Theorem 3.1 depends on the
logits.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import (
    Keys,
    PerColumn,
    Queries,
    Statistics,
    blurred,
    column_blocks,
    end_weights,
    log_sum_exp,
    moments,
    precision,
    sides,
    statistics,
)
from segresearch.errors import InputError


@dataclass(frozen=True)
class ClaimResult:
    """Both sides of one claim `left relation right`, for every column. All tensors fp64.

    claim: the name of the claim's function. relation: "=", "<=" or "<". statement: its place in arXiv 2408.00760, then
    its formula. axis: of the columns. operator: the blur.
    tolerance: what the rounding of both sides can account for. A "<" holds only beyond it, "<=" and "=" up to it.
    """

    claim: str
    relation: str
    statement: str
    axis: str
    operator: BlurOperator
    left: PerColumn
    right: PerColumn
    tolerance: PerColumn

    @property
    def gap(self) -> PerColumn:
        """left − right; 0 where both are −inf."""
        return torch.where(self.left == self.right, torch.zeros_like(self.left), self.left - self.right)

    @property
    def margin(self) -> PerColumn:
        """By how much the claim holds (positive) or fails (negative): right − left, and −|gap| for an equality."""
        return -self.gap.abs() if self.relation == "=" else -self.gap

    @cached_property
    def holds(self) -> Bool[Tensor, "rows heads m"]:
        return self.margin > self.tolerance if self.relation == "<" else self.margin >= -self.tolerance

    @property
    def fraction(self) -> float:
        """Share of (row, head, column) where the claim holds."""
        return float(self.holds.double().mean())


Sides = tuple[Tensor, Tensor, Tensor]  # left, right, tolerance
Claim = Callable[[Statistics, Statistics, BlurOperator], ClaimResult]
CLAIMS: list[Claim] = []  # those that statistics alone decide, in the order of the paper


def _claim(relation: str, statement: str) -> Callable[[Callable[..., Sides]], Claim]:
    """Decorator: a function that returns the sides as a claim, appended to CLAIMS."""

    def decorated(function: Callable[..., Sides]) -> Claim:
        @functools.wraps(function)
        def claim(before: Statistics, after: Statistics, operator: BlurOperator) -> ClaimResult:
            sides = function(before, after, operator)
            return ClaimResult(function.__name__, relation, statement, after.axis, operator, *sides)

        CLAIMS.append(claim)
        return claim

    return decorated


def _slack(before: Statistics, power: int) -> PerColumn:
    """Rounding of a mean (power 1), variance (power 2) or lse (power 0) of columns, with room."""
    spread = before.variance.sqrt()
    size = before.mean.abs() + 4 * spread
    return 16 * before.eps * (1 + size if power == 0 else size * spread + 1e-6 if power == 2 else size + 1e-6)


@_claim("=", "Lemma 3.1: mean(Ba) = mean(a)")
def mean_kept(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Lemma 3.1, first half: the blur keeps the mean. True for all a if and only if B's columns sum to 1."""
    return after.mean, before.mean, _slack(before, 1)


@_claim("<=", "Lemma 3.1: var(Ba) ≤ var(a)")
def variance_falls(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Lemma 3.1, second half: the blur never raises the variance. Certain for doubly stochastic B."""
    return after.variance, before.variance, _slack(before, 2)


@_claim("<=", "Lemma 3.2: lse(Ba) ≤ lse(a)")
def lse_falls(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Lemma 3.2 as its proof shows it: lse falls, so the energy −lse rises (the text says that lse increases).

    For doubly stochastic B without any approximation: Ba is majorised by a, and Σ exp is Schur-convex.
    """
    return after.lse, before.lse, _slack(before, 0)


@_claim("<=", "Lemma 3.2, second order: log n + mean + ½ var of Ba ≤ of a")
def lse_taylor(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Lemma 3.2 by the paper's step: lse to second order, log n + mean + ½ variance, falls."""
    return after.taylor_lse, before.taylor_lse, _slack(before, 1) + _slack(before, 2)


@_claim("=", "Eq. (20): log Π ξ(Ba) = log pdet H(Ba)")
def product_is_determinant(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Eq. (20), |det H| ≈ Π ξ_i, in logs at ã. det H is 0; the pseudo-determinant is n·Π ξ_i, so the gap is log n."""
    return after.log_product, after.log_product + math.log(after.n), torch.zeros_like(after.mean)


@_claim("<", "Eq. (21): log Π ξ(Ba)·b_ii < log Π ξ(Ba)")
def diagonal_shrinks(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Eq. (21): Π ξ(ã)_i b_ii < Π ξ(ã)_i, in logs. True where b_ii < 1; the gap is Σ log b_ii."""
    return after.log_product + operator.log_diagonal, after.log_product, torch.zeros_like(after.mean)


@_claim("<=", "Eq. (22): log Π ξ(Ba) ≤ log Π ξ(a)")
def product_falls(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Eq. (22): Π ξ(ã)_i ≤ Π ξ(a)_i, in logs. Reversed where the mean stays and lse falls."""
    return after.log_product, before.log_product, after.n * _slack(before, 0)


@_claim("<", "Theorem 3.1 by eqs. (19)–(23): log Π ξ(Ba)·b_ii < log Π ξ(a)")
def theorem_paper(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Theorem 3.1 by eqs. (19)–(23), as the paper argues: Π ξ(ã)_i b_ii < Π ξ(a)_i, in logs.

    With the mean kept: if and only if n·(lse(a) − lse(ã)) < −Σ log b_ii. True for soft, false for sharp attention.
    """
    return after.log_product + operator.log_diagonal, before.log_product, after.n * _slack(before, 0)


@_claim("<", "Theorem 3.1 by the chain rule: log pdet BᵀH(Ba)B < log pdet H(a)")
def theorem_chain(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Theorem 3.1 for the Hessian that the chain rule gives: pdet Bᵀ H(ã) B < pdet H(a), in logs and exactly.

    With the mean kept: if and only if n·(lse(a) − lse(ã)) < −2 log |det B|.
    """
    log_n = math.log(after.n)
    left = log_n + after.log_product + 2 * operator.log_det
    return left, log_n + before.log_product, after.n * _slack(before, 0)


@_claim("<=", "Trace: tr −H(Ba) ≤ tr −H(a)")
def trace_falls(before: Statistics, after: Statistics, operator: BlurOperator) -> Sides:
    """Beside the determinants (no claim of the paper): does tr −H(ã) = 1 − Σ ξ² fall? Not for sharp columns."""
    return 1 - after.concentration, 1 - before.concentration, 16 * before.eps * torch.ones_like(before.mean)


def check_statistics(before: Statistics, after: Statistics, operator: BlurOperator) -> tuple[ClaimResult, ...]:
    """All CLAIMS. Raises InputError if the two statistics are not of the same columns or not of the operator's grid."""
    if (before.axis, before.n) != (after.axis, after.n) or after.n != operator.n:
        raise InputError(
            f"statistics of {before.n} {before.axis} and {after.n} {after.axis} do not fit each other and "
            f"a grid of {operator.n} tokens"
        )
    return tuple(claim(before, after, operator) for claim in CLAIMS)


def check_claims(
    q: Queries, k: Keys, axis: str, operator: BlurOperator, before: Statistics | None = None
) -> tuple[ClaimResult, ...]:
    """All CLAIMS for q and k, with the blur on the side of `axis`: "queries" is the paper's text, "keys" Appendix B.

    before: statistics of the unblurred logits, if known.
    """
    after = statistics(*blurred(q, k, axis, operator), axis)
    return check_statistics(before or statistics(q, k, axis), after, operator)


def check_weighted(
    q: Queries, k: Keys, axis: str, operator: BlurOperator, before: Statistics | None = None
) -> tuple[ClaimResult, ClaimResult, ClaimResult]:
    """Lemmas 3.1 (both halves) and 3.2 under "reflect" with `end_weights`: so weighted, they hold without exception.

    before: statistics of the unblurred logits, if known.
    Raises InputError for another boundary, for which the plain lemmas hold.
    """
    if operator.boundary != "reflect":
        raise InputError(f'end weights mend the boundary "reflect", got {operator.boundary!r}')
    weights = end_weights(operator.grid).to(q.device)
    before = before or statistics(q, k, axis)
    after = blurred(q, k, axis, operator)
    (mean, variance), (mean_after, variance_after) = moments(q, k, axis, weights), moments(*after, axis, weights)
    lse, lse_after = log_sum_exp(q, k, axis, weights), log_sum_exp(*after, axis, weights)

    def result(claim: str, relation: str, statement: str, left: Tensor, right: Tensor, power: int) -> ClaimResult:
        return ClaimResult(claim, relation, statement, axis, operator, left, right, _slack(before, power))

    lemma_31 = "Lemma 3.1 with end weights"
    return (
        result("mean_kept_weighted", "=", f"{lemma_31}: mean(Ba) = mean(a)", mean_after, mean, 1),
        result("variance_falls_weighted", "<=", f"{lemma_31}: var(Ba) ≤ var(a)", variance_after, variance, 2),
        result("lse_falls_weighted", "<=", "Lemma 3.2 with end weights: lse(Ba) ≤ lse(a)", lse_after, lse, 0),
    )


def blur_commutes(q: Queries, k: Keys, axis: str, operator: BlurOperator, block: int | None = None) -> ClaimResult:
    """Proposition 3.1: logits of blurred queries are the blurred logits, blur(Q)Kᵀ = B(QKᵀ). Exact for any linear B.

    left is the largest |difference| in a column, right 0; logits of both kinds are streamed side by side.
    """
    plain = sides(q, k, axis)
    after = sides(*blurred(q, k, axis, operator), axis)
    rows, heads, m = plain[1].shape[:3]
    gap = torch.empty(rows * heads, m, dtype=torch.float64, device=q.device)
    size = torch.empty_like(gap)
    for (g, c, logits), (_, _, expected) in zip(column_blocks(*plain, block), column_blocks(*after, block)):
        gap[g, c] = (operator.apply(logits.a) - expected.a).abs().amax(dim=-1).double()
        size[g, c] = logits.a.abs().amax(dim=-1).double()
    gap, size = gap.reshape(rows, heads, m), size.reshape(rows, heads, m)
    # one logit is a sum of dim products, each as large as |q||k|/√d, which may cancel
    bound = math.sqrt(q.shape[-1]) * q.abs().max().double() * k.abs().max().double()
    tolerance = 16 * precision(q) * (size + bound)
    statement = "Proposition 3.1: max |blur(Q)Kᵀ − blur(QKᵀ)| = 0"
    return ClaimResult("blur_commutes", "=", statement, axis, operator, gap, torch.zeros_like(gap), tolerance)
