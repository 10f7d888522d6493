"""The claims: what must hold does, what is known to fail is seen failing, and both sides are the dense ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import AXES, Statistics, blurred, columns, statistics

from segresearch.analysis import lemmas, regimes
from segresearch.analysis.curvature import chain_log_pseudo_det, entrywise_log_product, log_product, log_pseudo_det
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


def by_name(found):
    return {verdict.claim: verdict for verdict in found}


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
    before, any_blur = statistics(q, k, "queries"), Smoothing((1, n), 1.0, "circular")
    for claim in (lemmas.mean_kept, lemmas.variance_falls, lemmas.lse_falls):
        assert claim(before, after, any_blur).fraction == 1
    assert bool((after.log_product - before.log_product > -1e-9 * scale * n).all())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("boundary", DOUBLY)
def test_blurs_that_keep_the_mean(boundary, axis, dtype):
    q, k = heads(dtype=dtype)
    for sigma in (0.5, 1.0, math.inf):
        smoothing = Smoothing(GRID, sigma, boundary)
        found = by_name(lemmas.judge(q, k, axis, smoothing))
        assert len(found) == len(lemmas.CLAIMS)
        for claim in ("mean_kept", "variance_falls", "lse_falls", "lse_taylor", "diagonal_shrinks"):
            assert found[claim].fraction == 1 and found[claim].counterexample is None, claim
        assert found["product_falls"].fraction == 0  # eq. (22) is reversed
        assert found["product_is_determinant"].gap.add(math.log(15)).abs().max() < 1e-9
        assert lemmas.blur_commutes(q, k, axis, smoothing).fraction == 1


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_both_sides_are_the_dense_ones(boundary):
    q, k = heads()
    smoothing = Smoothing(GRID, 0.7, boundary)
    a = columns(q, k, "queries", torch.arange(15))
    smooth = smoothing.apply(a)
    found = by_name(lemmas.judge(q, k, "queries", smoothing))
    expected = {
        "mean_kept": (smooth.mean(-1), a.mean(-1)),
        "variance_falls": (smooth.var(-1, correction=0), a.var(-1, correction=0)),
        "lse_falls": (smooth.logsumexp(-1), a.logsumexp(-1)),
        "product_falls": (log_product(smooth), log_product(a)),
        "theorem_paper": (entrywise_log_product(a, smoothing), log_product(a)),
        "theorem_chain": (chain_log_pseudo_det(a, smoothing), log_pseudo_det(a)),
    }
    for claim, (left, right) in expected.items():
        verdict = found[claim]
        torch.testing.assert_close(verdict.left, left, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(verdict.right, right, atol=1e-8, rtol=1e-8)
        assert verdict.fraction == pytest.approx(float(verdict.holds.double().mean()))
        assert verdict.by_head.shape == (1, 3) and verdict.row()["claim"] == claim
    # the theorem's conditions in the form n·(lse(a) − lse(ã)) < bound, where the mean is kept
    if boundary != "reflect":
        fall = 15 * (a.logsumexp(-1) - smooth.logsumexp(-1))
        margin = {"theorem_paper": -smoothing.log_diagonal - fall, "theorem_chain": -2 * smoothing.log_det - fall}
        for claim, value in margin.items():
            torch.testing.assert_close(found[claim].margin, value, atol=1e-8, rtol=1e-8)


def test_reflect_breaks_lemma_31_and_end_weights_mend_it():
    sums = blur_matrix(32, 1.0, "reflect").sum(0)
    assert (round(float(sums.min()), 2), round(float(sums.max()), 2)) == (0.70, 1.24)
    q, k = heads(count=8, grid=(6, 5))
    smoothing = Smoothing((6, 5), 1.0, "reflect")
    found = by_name(lemmas.judge(q, k, "queries", smoothing))
    assert found["mean_kept"].fraction == 0
    row, head, column = found["mean_kept"].counterexample
    assert float(found["mean_kept"].gap[row, head, column].abs()) == float(found["mean_kept"].gap.abs().max())
    for axis in AXES:
        assert [verdict.fraction for verdict in lemmas.corrected(q, k, axis, smoothing)] == [1, 1, 1]
    with pytest.raises(ValueError, match="end weights mend the boundary \"reflect\", got 'exact'"):
        lemmas.corrected(q, k, "queries", Smoothing((6, 5), 1.0, "exact"))


def test_reflect_can_raise_variance_and_lse():
    """Worst fields at σ = 1: along one axis of 32×32, of 16×16; and a bump that raises lse."""
    for grid, golden in (((1, 32), 1.0114), ((16, 16), 1.0135)):
        matrix = Smoothing(grid, 1.0, "reflect").dense()
        centre = torch.eye(len(matrix), dtype=torch.float64) - 1 / len(matrix)
        field = torch.linalg.eigh(centre @ matrix.T @ centre @ matrix @ centre).eigenvectors[:, -1]
        square = field.repeat(32) if grid[0] == 1 else field
        smoothing = Smoothing((32, 32) if grid[0] == 1 else grid, 1.0, "reflect")
        falls = by_name(lemmas.judge(*as_heads(square[:, None]), "queries", smoothing))["variance_falls"]
        assert falls.fraction == 0 and float(falls.left / falls.right) == pytest.approx(golden, abs=5e-5)
    bump = (smoothing.column_sums - 1)[:, None] * 0.01
    assert by_name(lemmas.judge(*as_heads(bump), "queries", smoothing))["lse_falls"].fraction == 0


def noise(spread, seed=0, grid=(8, 8), samples=200):
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(samples, math.prod(grid), generator=g, dtype=torch.float64)


def test_theorem_31_depends_on_the_logits():
    """Circular 8×8, N(0, 3²): fails by eq. (20); by the chain rule it holds at σ = 1 and mostly fails at 0.5."""
    q, k = as_heads(noise(3).T)
    one = by_name(lemmas.judge(q, k, "queries", Smoothing((8, 8), 1.0, "circular")))
    assert float(one["product_falls"].right.mean()) == pytest.approx(-500, abs=15)
    assert float(one["product_falls"].left.mean()) == pytest.approx(-284, abs=4)
    assert Smoothing((8, 8), 1.0, "circular").log_diagonal == pytest.approx(-403.7 + 286.1, abs=0.1)
    assert one["theorem_paper"].fraction < 0.05 and one["theorem_chain"].fraction > 0.97
    assert one["product_falls"].fraction == 0
    half = by_name(lemmas.judge(q, k, "queries", Smoothing((8, 8), 0.5, "circular")))
    assert half["theorem_chain"].fraction < 0.35 and half["theorem_paper"].fraction < 0.1
    soft = by_name(lemmas.judge(*as_heads(noise(0.3).T), "queries", Smoothing((8, 8), 0.5, "circular")))
    assert soft["theorem_paper"].fraction == soft["theorem_chain"].fraction == 1


def test_blur_can_raise_the_trace():
    """Near one-hot columns: the trace of −H rises, while the chain rule's determinant falls."""
    q, k = as_heads(noise(30, samples=20).T)
    found = by_name(lemmas.judge(q, k, "queries", Smoothing((8, 8), 1.0, "circular")))
    assert found["trace_falls"].fraction < 0.2


def test_dual_is_the_other_axis():
    q, k = heads()
    smoothing = Smoothing(GRID, 0.7, "symmetric")
    for one, other in zip(lemmas.dual(q, k, smoothing), lemmas.judge(k, q, "queries", smoothing)):
        assert (one.axis, other.axis) == ("keys", "queries")
        torch.testing.assert_close(one.left, other.left)
        torch.testing.assert_close(one.right, other.right)


def test_no_blur_changes_nothing():
    """σ = 0: equalities and ≤ hold, strict claims do not."""
    q, k = heads(dtype=torch.float32)
    found = by_name(lemmas.judge(q, k, "queries", Smoothing(GRID, 0)))
    for claim, verdict in found.items():
        if claim != "product_is_determinant":
            assert verdict.fraction == (0 if verdict.relation == "<" else 1), claim
            assert float(verdict.gap.abs().max()) == 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_limits(boundary):
    """σ → 0 is the identity for all; σ → ∞ the mean, reached continuously by the exact blur alone."""
    q, k = heads(grid=(4, 6))
    found = regimes.limits(q, k, "queries", (4, 6), [0, 0.1, 1, 10, 9999, math.inf], boundary)
    assert float(found.to_identity[:2].max()) < 1e-9 and float(found.to_mean[0]) == pytest.approx(1)
    assert float(found.to_mean[-1]) < 1e-12 and float(found.to_identity[-1]) == pytest.approx(1)
    assert regimes.limit_zero(q, k, "keys", (4, 6), boundary).fraction == 1
    reached = regimes.limit_infinity(q, k, "keys", (4, 6), boundary)
    assert reached.fraction == (1 if boundary == "exact" else 0)
    assert (float(found.to_mean[-2]) < 1e-9) == (boundary == "exact")
    a = columns(q, k, "queries", torch.arange(24))
    smooth = Smoothing((4, 6), 1, boundary).apply(a)
    expected = (smooth - a).square().mean(-1).sqrt()
    found_distance = regimes.distances(q, k, "queries", Smoothing((4, 6), 1, boundary))
    torch.testing.assert_close(found_distance[0], expected, atol=1e-9, rtol=1e-9)
    expected = (smooth - a.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    torch.testing.assert_close(found_distance[1], expected, atol=1e-9, rtol=1e-9)


def test_regime_map():
    """Margins of a scaled column equal the verdict's; soft attention is attenuated, sharp is not."""
    a = noise(1, grid=GRID, samples=6)
    a = (a - a.mean(1, keepdim=True)) / a.var(1, correction=0, keepdim=True).sqrt()
    found = regimes.regime(7 + 3 * a, GRID, [0.1, 4.0, 30.0], [0.5, 1.0, math.inf], "symmetric")
    verdicts = by_name(lemmas.judge(*as_heads((4 * a).T), "queries", Smoothing(GRID, 1.0, "symmetric")))
    assert float(found.entrywise[1, 1]) == pytest.approx(float(verdicts["theorem_paper"].margin.mean()) / 15)
    assert float(found.chain[1, 1]) == pytest.approx(float(verdicts["theorem_chain"].margin.mean()) / 15)
    assert float(found.chain_fraction[1, 1]) == verdicts["theorem_chain"].fraction
    assert float(found.entrywise_fraction[0].min()) == 1 and float(found.entrywise_fraction[2, 0]) == 0
    assert bool((found.chain[:, 2] == math.inf).all())
    with pytest.raises(ValueError, match="column 0 is constant"):
        regimes.regime(torch.ones(2, 15), GRID, [1.0], [1.0], "exact")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_eq_19_is_not_the_chain_rule(boundary):
    a, smoothing = noise(2, grid=GRID, samples=3), Smoothing(GRID, 0.7, boundary)
    found = regimes.hessians(a, smoothing)
    assert float(found.distance.min()) > 0.1
    torch.testing.assert_close(found.chain_log_pdet, chain_log_pseudo_det(a, smoothing), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found.entrywise_log_product, entrywise_log_product(a, smoothing))
    assert float((found.entrywise_log_det - found.entrywise_log_product).abs().min()) > 1e-3
    assert float(regimes.hessians(a, Smoothing(GRID, 0)).entrywise_log_det.max()) < -10
    with pytest.raises(ValueError, match="up to 1024 tokens, these columns have 1056"):
        regimes.hessians(torch.zeros(1, 1056), Smoothing((32, 33), 1.0))


def test_statistics_must_fit():
    q, k = heads()
    before, other = statistics(q, k, "queries"), statistics(q, k, "keys")
    assert isinstance(before, Statistics)
    with pytest.raises(ValueError, match="statistics of 15 queries and 15 keys do not fit each other"):
        lemmas.verdicts(before, other, Smoothing(GRID, 1.0))
    with pytest.raises(ValueError, match="a grid of 16 tokens"):
        lemmas.verdicts(before, statistics(*blurred(q, k, GRID, 1.0), "queries"), Smoothing((4, 4), 1.0))
