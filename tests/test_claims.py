"""The claims: those that must hold hold, those known to fail fail, and both sides are the dense ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segresearch.analysis import claims
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.energy import (
    chain_log_pseudo_det,
    compare_hessians,
    entrywise_log_product,
    log_product,
    log_pseudo_det,
)
from segresearch.analysis.logit_statistics import AXES, Statistics, blurred, columns, statistics
from segresearch.guidance.blur import BOUNDARIES, blur_matrix

DOUBLY = ["symmetric", "circular", "exact"]
GRID = (3, 5)


def heads(seed=0, rows=1, count=3, grid=GRID, dim=4, scale=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shape = (rows, count, math.prod(grid), dim)
    q, k = ((scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2))
    return q, k


def as_heads(a):
    """q and k whose logits over the queries are the columns of a (n, m) exactly: q = a·√m, k the unit vectors."""
    n, m = a.shape
    return (a * math.sqrt(m)).reshape(1, 1, n, m), torch.eye(m, dtype=a.dtype).reshape(1, 1, m, m)


def by_name(results):
    return {result.claim: result for result in results}


def doubly_stochastic(seed, n):
    """A random mixture of permutations (every doubly stochastic matrix is one)."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, generator=g, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    return sum(w * eye[torch.randperm(n, generator=g)] for w in weights / weights.sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.01, 1.0, 30.0]))
def test_lemmas_hold_for_every_doubly_stochastic_matrix(seed, n, scale):
    """Lemmas 3.1 and 3.2 for any such B, not only blurs; hence eq. (22) reversed."""
    a = scale * torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, k = as_heads(a)
    after = statistics(*as_heads(doubly_stochastic(seed + 1, n) @ a), "queries")
    before, any_blur = statistics(q, k, "queries"), BlurOperator((1, n), 1.0, "circular")
    results = by_name(claims.check_statistics(before, after, any_blur))
    for claim in ("mean_kept", "variance_falls", "lse_falls"):
        assert results[claim].fraction == 1
    assert bool((after.log_product - before.log_product > -1e-9 * scale * n).all())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("boundary", DOUBLY)
def test_blurs_that_keep_the_mean(boundary, axis, dtype):
    q, k = heads(dtype=dtype)
    for sigma in (0.5, 1.0, math.inf):
        operator = BlurOperator(GRID, sigma, boundary)
        results = by_name(claims.check_claims(q, k, axis, operator))
        assert len(results) == 10
        for claim in ("mean_kept", "variance_falls", "lse_falls", "lse_taylor", "diagonal_shrinks"):
            assert results[claim].fraction == 1, claim
        assert results["product_falls"].fraction == 0  # eq. (22) is reversed
        assert results["product_is_determinant"].margin.add(math.log(15)).abs().max() < 1e-9
        assert claims.blur_commutes(q, k, axis, operator).fraction == 1


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_both_sides_are_the_dense_ones(boundary):
    q, k = heads()
    operator = BlurOperator(GRID, 0.7, boundary)
    a = columns(q, k, "queries", torch.arange(15))
    smooth = operator.apply(a)
    results = by_name(claims.check_claims(q, k, "queries", operator))
    expected = {
        "mean_kept": (smooth.mean(-1), a.mean(-1)),
        "variance_falls": (smooth.var(-1, correction=0), a.var(-1, correction=0)),
        "lse_falls": (smooth.logsumexp(-1), a.logsumexp(-1)),
        "product_falls": (log_product(smooth), log_product(a)),
        "theorem_paper": (entrywise_log_product(a, operator), log_product(a)),
        "theorem_chain": (chain_log_pseudo_det(a, operator), log_pseudo_det(a)),
    }
    for claim, (left, right) in expected.items():
        result = results[claim]
        torch.testing.assert_close(result.left, left, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(result.right, right, atol=1e-8, rtol=1e-8)
    # the theorem's conditions in the form n·(lse(a) − lse(ã)) < bound, where the mean is kept
    if boundary != "reflect":
        fall = 15 * (a.logsumexp(-1) - smooth.logsumexp(-1))
        margin = {"theorem_paper": -operator.log_diagonal - fall, "theorem_chain": -2 * operator.log_det - fall}
        for claim, value in margin.items():
            torch.testing.assert_close(results[claim].margin, value, atol=1e-8, rtol=1e-8)


def test_reflect_breaks_lemma_31_and_end_weights_mend_it():
    sums = blur_matrix(32, 1.0, "reflect").sum(0)
    assert (round(float(sums.min()), 2), round(float(sums.max()), 2)) == (0.70, 1.24)
    q, k = heads(count=8, grid=(6, 5))
    operator = BlurOperator((6, 5), 1.0, "reflect")
    results = by_name(claims.check_claims(q, k, "queries", operator))
    assert results["mean_kept"].fraction == 0
    for axis in AXES:
        assert [result.fraction for result in claims.check_weighted(q, k, axis, operator)] == [1, 1, 1]
    with pytest.raises(ValueError, match="end weights mend the boundary \"reflect\", got 'exact'"):
        claims.check_weighted(q, k, "queries", BlurOperator((6, 5), 1.0, "exact"))


def test_reflect_can_raise_variance_and_lse():
    """Worst fields at σ = 1: along one axis of 32×32, of 16×16; and a bump that raises lse."""
    for grid, golden in (((1, 32), 1.0114), ((16, 16), 1.0135)):
        matrix = BlurOperator(grid, 1.0, "reflect").dense()
        centre = torch.eye(len(matrix), dtype=torch.float64) - 1 / len(matrix)
        field = torch.linalg.eigh(centre @ matrix.T @ centre @ matrix @ centre).eigenvectors[:, -1]
        square = field.repeat(32) if grid[0] == 1 else field
        operator = BlurOperator((32, 32) if grid[0] == 1 else grid, 1.0, "reflect")
        falls = by_name(claims.check_claims(*as_heads(square[:, None]), "queries", operator))["variance_falls"]
        assert falls.fraction == 0 and float(falls.left / falls.right) == pytest.approx(golden, abs=5e-5)
    bump = (operator.dense().sum(0) - 1)[:, None] * 0.01
    assert by_name(claims.check_claims(*as_heads(bump), "queries", operator))["lse_falls"].fraction == 0


def noise(spread, seed=0, grid=(8, 8), samples=200):
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(samples, math.prod(grid), generator=g, dtype=torch.float64)


def test_theorem_31_depends_on_the_logits():
    """Circular 8×8, N(0, 3²): fails by eq. (20); by the chain rule it holds at σ = 1 and mostly fails at 0.5."""
    q, k = as_heads(noise(3).T)
    one = by_name(claims.check_claims(q, k, "queries", BlurOperator((8, 8), 1.0, "circular")))
    assert float(one["product_falls"].right.mean()) == pytest.approx(-500, abs=15)
    assert float(one["product_falls"].left.mean()) == pytest.approx(-284, abs=4)
    assert BlurOperator((8, 8), 1.0, "circular").log_diagonal == pytest.approx(-403.7 + 286.1, abs=0.1)
    assert one["theorem_paper"].fraction < 0.05 and one["theorem_chain"].fraction > 0.97
    assert one["product_falls"].fraction == 0
    half = by_name(claims.check_claims(q, k, "queries", BlurOperator((8, 8), 0.5, "circular")))
    assert half["theorem_chain"].fraction < 0.35 and half["theorem_paper"].fraction < 0.1
    soft = by_name(claims.check_claims(*as_heads(noise(0.3).T), "queries", BlurOperator((8, 8), 0.5, "circular")))
    assert soft["theorem_paper"].fraction == soft["theorem_chain"].fraction == 1


def test_blur_can_raise_the_trace():
    """Near one-hot columns: the trace of −H rises, while the chain rule's determinant falls."""
    q, k = as_heads(noise(30, samples=20).T)
    results = by_name(claims.check_claims(q, k, "queries", BlurOperator((8, 8), 1.0, "circular")))
    assert results["trace_falls"].fraction < 0.2


def test_dual_is_the_other_axis():
    q, k = heads()
    operator = BlurOperator(GRID, 0.7, "symmetric")
    for one, other in zip(claims.check_claims(q, k, "keys", operator), claims.check_claims(k, q, "queries", operator)):
        assert (one.axis, other.axis) == ("keys", "queries")
        torch.testing.assert_close(one.left, other.left)
        torch.testing.assert_close(one.right, other.right)


def test_no_blur_changes_nothing():
    """σ = 0: equalities and ≤ hold, strict claims do not."""
    q, k = heads(dtype=torch.float32)
    results = by_name(claims.check_claims(q, k, "queries", BlurOperator(GRID, 0)))
    for claim, result in results.items():
        if claim != "product_is_determinant":
            assert result.fraction == (0 if result.relation == "<" else 1), claim
            assert float(result.margin.abs().max()) == 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_limits(boundary):
    """σ → 0 is the identity for all; σ → ∞ the mean, reached continuously by the exact blur alone."""
    q, k = heads(grid=(4, 6))
    to_identity, to_mean = claims.limits(q, k, (4, 6), [0, 0.1, 1, 10, 9999, math.inf], boundary)
    assert float(to_identity[:2].max()) < 1e-9 and float(to_mean[0]) == pytest.approx(1)
    assert float(to_mean[-1]) < 1e-12 and float(to_identity[-1]) == pytest.approx(1)
    assert (float(to_mean[-2]) < 1e-9) == (boundary == "exact")
    a = columns(q, k, "queries", torch.arange(24))
    smooth = BlurOperator((4, 6), 1, boundary).apply(a)
    mean = a.mean(-1, keepdim=True)
    for measured, difference in ((to_identity[2], smooth - a), (to_mean[2], smooth - mean)):
        expected = (difference.square().mean() / (a - mean).square().mean()).sqrt()
        torch.testing.assert_close(measured, expected, atol=1e-9, rtol=1e-9)


def test_theorem_margins():
    """Margins per token of noise are the medians of the claims'; soft noise is attenuated, sharp noise is not."""
    noise = claims.white_noise(15, samples=15)
    assert float(noise.mean(1).abs().max()) < 1e-12 and float((noise.var(1, correction=0) - 1).abs().max()) < 1e-12
    operator = BlurOperator(GRID, 1.0, "symmetric")
    results = by_name(claims.check_claims(*as_heads((4 * noise).T), "queries", operator))
    margins = claims.theorem_margins(4 * noise, operator)
    for margin, claim in zip(margins, ("theorem_paper", "theorem_chain")):
        assert margin == pytest.approx(float(results[claim].margin.median()) / 15)
    narrow, singular = BlurOperator(GRID, 0.5, "symmetric"), BlurOperator(GRID, math.inf, "symmetric")
    assert min(claims.theorem_margins(0.1 * noise, narrow)) > 0
    assert claims.theorem_margins(30 * noise, narrow)[0] < 0
    assert claims.theorem_margins(noise, singular)[1] == math.inf


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_eq_19_is_not_the_chain_rule(boundary):
    a, operator = noise(2, grid=GRID, samples=3), BlurOperator(GRID, 0.7, boundary)
    dense = compare_hessians(a, operator)
    assert float(dense["distance"].min()) > 0.1
    torch.testing.assert_close(dense["chain_log_pdet"], chain_log_pseudo_det(a, operator), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(dense["entrywise_log_product"], entrywise_log_product(a, operator))
    assert float((dense["entrywise_log_det"] - dense["entrywise_log_product"]).abs().min()) > 1e-3
    assert float(compare_hessians(a, BlurOperator(GRID, 0))["entrywise_log_det"].max()) < -10
    with pytest.raises(ValueError, match="up to 1024 tokens, these columns have 1056"):
        compare_hessians(torch.zeros(1, 1056), BlurOperator((32, 33), 1.0))


def test_statistics_must_fit():
    q, k = heads()
    before, other = statistics(q, k, "queries"), statistics(q, k, "keys")
    assert isinstance(before, Statistics)
    with pytest.raises(ValueError, match="statistics of 15 queries and 15 keys do not fit each other"):
        claims.check_statistics(before, other, BlurOperator(GRID, 1.0))
    with pytest.raises(ValueError, match="a grid of 16 tokens"):
        after = statistics(*blurred(q, k, "queries", BlurOperator(GRID, 1.0)), "queries")
        claims.check_statistics(before, after, BlurOperator((4, 4), 1.0))
