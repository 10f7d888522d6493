"""The claims of SEG's section 3 (arXiv 2408.00760), judged one by one on measured logits.

A function of (before, after, smoothing) takes the `Statistics` of the logits a and of the blurred logits ã = Ba along
the same axis, needs nothing else, and returns a `Verdict` with both sides of every column. `judge` starts from q and k.
The axis "queries" with blurred queries is the paper's text, the axis "keys" with blurred keys its dual (Appendix B).

Known beforehand, and tested: with a doubly stochastic B (symmetric, circular, exact) Lemmas 3.1 and 3.2 hold without
exception, and eq. (22) is reversed: the mean stays and lse falls, so the product rises. Theorem 3.1 depends on the
logits.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import (
    AXES,
    Statistics,
    blocks,
    blurred,
    end_weights,
    log_sum_exp,
    moments,
    precision,
    sides,
    statistics,
)
from segresearch.analysis.verdict import Verdict
from segresearch.errors import InputError

# claim: its relation, and where it stands in the paper with what is on both sides of the relation
STATEMENTS = {
    "mean_kept": ("=", "Lemma 3.1: mean(Ba) = mean(a)"),
    "variance_falls": ("<=", "Lemma 3.1: var(Ba) ≤ var(a)"),
    "lse_falls": ("<=", "Lemma 3.2: lse(Ba) ≤ lse(a)"),
    "lse_taylor": ("<=", "Lemma 3.2, second order: log n + mean + ½ var of Ba ≤ of a"),
    "product_is_determinant": ("=", "Eq. (20): log Π ξ(Ba) = log pdet H(Ba)"),
    "diagonal_shrinks": ("<", "Eq. (21): log Π ξ(Ba)·b_ii < log Π ξ(Ba)"),
    "product_falls": ("<=", "Eq. (22): log Π ξ(Ba) ≤ log Π ξ(a)"),
    "theorem_paper": ("<", "Theorem 3.1 by eqs. (19)–(23): log Π ξ(Ba)·b_ii < log Π ξ(a)"),
    "theorem_chain": ("<", "Theorem 3.1 by the chain rule: log pdet BᵀH(Ba)B < log pdet H(a)"),
    "trace_falls": ("<=", "Trace: tr −H(Ba) ≤ tr −H(a)"),
    "mean_kept_weighted": ("=", "Lemma 3.1 with end weights: mean(Ba) = mean(a)"),
    "variance_falls_weighted": ("<=", "Lemma 3.1 with end weights: var(Ba) ≤ var(a)"),
    "lse_falls_weighted": ("<=", "Lemma 3.2 with end weights: lse(Ba) ≤ lse(a)"),
    "blur_commutes": ("=", "Proposition 3.1: max |blur(Q)Kᵀ − blur(QKᵀ)| = 0"),
}


def _verdict(
    claim: str, after: Statistics, smoothing: Smoothing, left: Tensor, right: Tensor, tolerance: Tensor
) -> Verdict:
    relation, statement = STATEMENTS[claim]
    sigma, boundary = smoothing.sigma, smoothing.boundary
    return Verdict(claim, statement, relation, after.axis, sigma, boundary, after.n, left, right, tolerance)


def _slack(before: Statistics, power: int) -> Tensor:
    """Rounding of a mean (power 1), variance (power 2) or lse (power 0) of columns, with room."""
    spread = before.variance.sqrt()
    size = before.mean.abs() + 4 * spread
    return 16 * before.eps * (1 + size if power == 0 else size * spread + 1e-6 if power == 2 else size + 1e-6)


def mean_kept(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Lemma 3.1, first half: the blur keeps the mean. True for all a if and only if B's columns sum to 1."""
    return _verdict("mean_kept", after, smoothing, after.mean, before.mean, _slack(before, 1))


def variance_falls(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Lemma 3.1, second half: the blur never raises the variance. Certain for doubly stochastic B."""
    return _verdict("variance_falls", after, smoothing, after.variance, before.variance, _slack(before, 2))


def lse_falls(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Lemma 3.2 as its proof shows it: lse falls, so the energy −lse rises (the text says that lse increases).

    For doubly stochastic B without any approximation: Ba is majorised by a, and Σ exp is Schur-convex.
    """
    return _verdict("lse_falls", after, smoothing, after.lse, before.lse, _slack(before, 0))


def lse_taylor(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Lemma 3.2 by the paper's step: lse to second order, log n + mean + ½ variance, falls."""
    return _verdict(
        "lse_taylor", after, smoothing, after.taylor_lse, before.taylor_lse, _slack(before, 1) + _slack(before, 2)
    )


def trace_falls(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Beside the determinants (no claim of the paper): does tr −H(ã) = 1 − Σ ξ² fall? Sharp columns say no."""
    return _verdict(
        "trace_falls",
        after,
        smoothing,
        1 - after.concentration,
        1 - before.concentration,
        16 * before.eps * torch.ones_like(before.mean),
    )


def product_is_determinant(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Eq. (20), |det H| ≈ Π ξ_i, in logs at ã. det H is 0; the pseudo-determinant is n·Π ξ_i, so the gap is log n."""
    product = after.log_product
    return _verdict(
        "product_is_determinant", after, smoothing, product, product + math.log(after.n), torch.zeros_like(product)
    )


def diagonal_shrinks(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Eq. (21): Π ξ(ã)_i b_ii < Π ξ(ã)_i, in logs. True where b_ii < 1; the gap is Σ log b_ii."""
    product = after.log_product
    return _verdict(
        "diagonal_shrinks", after, smoothing, product + smoothing.log_diagonal, product, torch.zeros_like(product)
    )


def product_falls(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Eq. (22): Π ξ(ã)_i ≤ Π ξ(a)_i, in logs. Reversed where the mean stays and lse falls."""
    return _verdict(
        "product_falls", after, smoothing, after.log_product, before.log_product, after.n * _slack(before, 0)
    )


def theorem_paper(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Theorem 3.1 by eqs. (19)–(23), as the paper argues: Π ξ(ã)_i b_ii < Π ξ(a)_i, in logs.

    With the mean kept: if and only if n·(lse(a) − lse(ã)) < −Σ log b_ii. True for soft, false for sharp attention.
    """
    return _verdict(
        "theorem_paper",
        after,
        smoothing,
        after.log_product + smoothing.log_diagonal,
        before.log_product,
        after.n * _slack(before, 0),
    )


def theorem_chain(before: Statistics, after: Statistics, smoothing: Smoothing) -> Verdict:
    """Theorem 3.1 for the Hessian that the chain rule gives: pdet Bᵀ H(ã) B < pdet H(a), in logs and exactly.

    With the mean kept: if and only if n·(lse(a) − lse(ã)) < −2 log |det B|.
    """
    log_n = math.log(after.n)
    return _verdict(
        "theorem_chain",
        after,
        smoothing,
        log_n + after.log_product + 2 * smoothing.log_det,
        log_n + before.log_product,
        after.n * _slack(before, 0),
    )


CLAIMS = (
    mean_kept,
    variance_falls,
    lse_falls,
    lse_taylor,
    product_is_determinant,
    diagonal_shrinks,
    product_falls,
    theorem_paper,
    theorem_chain,
    trace_falls,
)


def verdicts(before: Statistics, after: Statistics, smoothing: Smoothing) -> tuple[Verdict, ...]:
    """All claims that need statistics alone, in the order of the paper.

    Raises ValueError if the two statistics are not of the same columns or not of the grid.
    """
    if (before.axis, before.n) != (after.axis, after.n) or after.n != smoothing.n:
        raise InputError(
            f"statistics of {before.n} {before.axis} and {after.n} {after.axis} do not fit each other and "
            f"a grid of {smoothing.n} tokens"
        )
    return tuple(claim(before, after, smoothing) for claim in CLAIMS)


def judge(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    smoothing: Smoothing,
    before: Statistics | None = None,
) -> tuple[Verdict, ...]:
    """`verdicts` of q and k under a blur of the side of `axis`; `before` saves measuring the unblurred logits again."""
    after = statistics(*blurred(q, k, smoothing.grid, smoothing.sigma, smoothing.boundary, on=axis), axis)
    return verdicts(before or statistics(q, k, axis), after, smoothing)


def dual(
    q: Float[Tensor, "rows heads queries dim"], k: Float[Tensor, "rows heads keys dim"], smoothing: Smoothing
) -> tuple[Verdict, ...]:
    """Appendix B: the same claims for blurred keys, along the keys."""
    return judge(q, k, AXES[1], smoothing)


def corrected(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    smoothing: Smoothing,
    before: Statistics | None = None,
) -> tuple[Verdict, Verdict, Verdict]:
    """Lemmas 3.1 (both halves) and 3.2 under "reflect" with `end_weights`: so weighted, they hold without exception.

    before: statistics of the unblurred logits, where they are known.
    Raises ValueError for another boundary, for which the plain lemmas hold.
    """
    if smoothing.boundary != "reflect":
        raise InputError(f'end weights mend the boundary "reflect", got {smoothing.boundary!r}')
    weights = end_weights(smoothing.grid).to(q.device)
    plain = before or statistics(q, k, axis)
    smooth = blurred(q, k, smoothing.grid, smoothing.sigma, smoothing.boundary, on=axis)
    (mean, variance), (mean_after, variance_after) = moments(q, k, axis, weights), moments(*smooth, axis, weights)
    lse, lse_after = log_sum_exp(q, k, axis, weights), log_sum_exp(*smooth, axis, weights)
    return (
        _verdict("mean_kept_weighted", plain, smoothing, mean_after, mean, _slack(plain, 1)),
        _verdict("variance_falls_weighted", plain, smoothing, variance_after, variance, _slack(plain, 2)),
        _verdict(
            "lse_falls_weighted",
            plain,
            smoothing,
            lse_after,
            lse,
            _slack(plain, 0),
        ),
    )


def blur_commutes(
    q: Float[Tensor, "rows heads queries dim"],
    k: Float[Tensor, "rows heads keys dim"],
    axis: str,
    smoothing: Smoothing,
    block: int | None = None,
) -> Verdict:
    """Proposition 3.1: logits of blurred queries are the blurred logits, blur(Q)Kᵀ = B(QKᵀ). Exact for any linear B.

    left is the largest |difference| in a column, right 0; logits of both kinds are streamed side by side.
    """
    entries, vectors = sides(q, k, axis)
    smooth, others = sides(*blurred(q, k, smoothing.grid, smoothing.sigma, smoothing.boundary, on=axis), axis)
    rows, heads, m = vectors.shape[:3]
    gap = torch.empty(rows * heads, m, dtype=torch.float64, device=q.device)
    size = torch.empty_like(gap)
    for (g, c, plain), (_, _, moved) in zip(blocks(entries, vectors, block), blocks(smooth, others, block)):
        gap[g, c] = (smoothing.apply(plain.a) - moved.a).abs().amax(dim=-1).double()
        size[g, c] = plain.a.abs().amax(dim=-1).double()
    gap, size = gap.reshape(rows, heads, m), size.reshape(rows, heads, m)
    # one logit is a sum of dim products, each as large as |q||k|/√d, which may cancel
    bound = math.sqrt(q.shape[-1]) * q.abs().max().double() * k.abs().max().double()
    relation, statement = STATEMENTS["blur_commutes"]
    none, tolerance = torch.zeros_like(gap), 16 * precision(q) * (size + bound)
    sigma, boundary = smoothing.sigma, smoothing.boundary
    return Verdict("blur_commutes", statement, relation, axis, sigma, boundary, smoothing.n, gap, none, tolerance)
