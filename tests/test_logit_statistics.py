"""Streamed statistics against the dense map; moments; half precision; the blur on either side; end weights."""

import math

import pytest
import torch

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.logit_statistics import (
    AXES,
    blurred,
    columns,
    end_weights,
    log_sum_exp,
    moments,
    sides,
    statistics,
)
from segresearch.guidance.blur import BOUNDARIES, blur_matrix

GRID = (3, 5)
FIELDS = ("mean", "variance", "lse", "entropy", "concentration")


def heads(seed=0, rows=2, heads=3, queries=15, keys=7, dim=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda n: (2 * torch.randn(rows, heads, n, dim, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
    return make(queries), make(keys)


def dense(q, k, axis):
    """The map with the named axis last."""
    a = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return a.transpose(2, 3) if axis == "queries" else a


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("block", [1, 40, 150, 10**6])
def test_streamed_equals_dense(axis, block, monkeypatch):
    monkeypatch.setattr("segresearch.analysis.logit_statistics.BLOCK", block)
    q, k = heads()
    a = dense(q, k, axis)
    xi = a.softmax(dim=-1)
    found = statistics(q, k, axis)
    assert (found.axis, found.n, found.eps) == (axis, a.shape[-1], 2**-52)
    expected = (a.mean(-1), a.var(-1, correction=0), a.logsumexp(-1), -(xi * xi.log()).sum(-1), xi.square().sum(-1))
    for name, value in zip(FIELDS, expected):
        torch.testing.assert_close(getattr(found, name), value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.log_product, xi.log().sum(-1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(log_sum_exp(q, k, axis), a.logsumexp(-1))
    index = torch.tensor([3, 0])
    torch.testing.assert_close(columns(q, k, axis, index), a[:, :, index])


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
def test_low_precision_is_summed_in_fp64(dtype, close):
    q, k = heads(dtype=dtype)
    found, exact = statistics(q, k, "queries"), statistics(q.double(), k.double(), "queries")
    assert found.eps == 2**-23
    for name in FIELDS:
        value = getattr(found, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, getattr(exact, name), atol=close * 8, rtol=close)
    # the analysis blurs half precisions in fp32, so it does not measure the pipeline's rounding
    operator = BlurOperator(GRID, 1.0)
    torch.testing.assert_close(
        blurred(q, k, "queries", operator)[0].double(), blurred(q.double(), k.double(), "queries", operator)[0],
        atol=1e-5, rtol=1e-5,
    )


def test_extremes():
    """Logits of ±1000 overflow nothing; constant columns are uniform; one token is one-hot."""
    q, k = heads(queries=15, keys=7)
    sharp = statistics(1000 * q, k, "queries")
    assert all(bool(getattr(sharp, name).isfinite().all()) for name in FIELDS)
    flat = statistics(torch.ones_like(q), k, "queries")
    torch.testing.assert_close(flat.entropy.exp(), torch.full_like(flat.lse, 15.0))
    assert float(flat.variance.abs().max()) < 1e-20
    alone = statistics(q[:, :, :1], k, "queries")
    assert float(alone.entropy.abs().max()) == 0 and float((alone.lse - alone.mean).abs().max()) < 1e-12


def test_lse_to_second_order():
    """log n + mean + ½ variance meets lse for small logits, with an error of third order."""
    q, k = heads()
    errors = [(s.lse - s.taylor_lse).abs().max() for s in (statistics(q * e, k, "queries") for e in (1e-2, 1e-3))]
    assert errors[0] / errors[1] > 900


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_blur_of_either_side(axis, boundary):
    """Blurring the side of an axis blurs every column of logits (Proposition 3.1 and its dual)."""
    q, k = heads(keys=15)
    matrix = torch.kron(*(blur_matrix(side, 0.8, boundary) for side in GRID))
    smooth = dense(*blurred(q, k, axis, BlurOperator(GRID, 0.8, boundary)), axis)
    torch.testing.assert_close(smooth, dense(q, k, axis) @ matrix.T, atol=1e-12, rtol=1e-12)
    mean = dense(*blurred(q, k, axis, BlurOperator(GRID, math.inf, boundary)), axis)
    assert float((mean - dense(q, k, axis).mean(-1, keepdim=True)).abs().max()) < 1e-12


def test_end_weights_mend_reflect():
    """wᵀB = wᵀ for the reflect blur on any grid, with w = ½ at the ends of each axis; and weights reach the sums."""
    for grid in ((3, 5), (8, 8), (1, 4), (2, 7)):
        w = end_weights(grid)
        for sigma in (0.5, 1.0, 2.5, 50.0):
            matrix = torch.kron(*(blur_matrix(side, sigma, "reflect") for side in grid))
            torch.testing.assert_close(w @ matrix, w, atol=1e-12, rtol=1e-12)
    q, k = heads()
    w, a = end_weights(GRID), dense(q, k, "queries")
    mean = (a * w).sum(-1) / w.sum()
    variance = ((a - mean[..., None]).square() * w).sum(-1) / w.sum()
    for found, value in zip(moments(q, k, "queries", w), (mean, variance)):
        torch.testing.assert_close(found, value)
    torch.testing.assert_close(log_sum_exp(q, k, "queries", w), (a + w.log()).logsumexp(-1))


def test_bad_input():
    q, k = heads()
    with pytest.raises(ValueError, match="axis must be \"queries\".*got 'rows'"):
        statistics(q, k, "rows")
    with pytest.raises(ValueError, match="must agree in rows, heads and dim"):
        sides(q, k[:, :2], "keys")
    with pytest.raises(ValueError, match="axis must be"):
        blurred(q, k, "v", BlurOperator(GRID, 1.0))
