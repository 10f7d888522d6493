"""Closed forms of curvature against autograd and dense eigenvalues, to 1e-8 in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segresearch.analysis.blur_operator import BlurOperator, log_spectrum
from segresearch.analysis.energy import (
    chain_hessian,
    chain_log_pseudo_det,
    curvature,
    entrywise_hessian,
    entrywise_log_product,
    gaussian_curvature,
    hessian,
    log_product,
    log_pseudo_det,
    spectral_norm,
)
from segresearch.analysis.logit_statistics import AXES, columns, exponentials, statistics
from segresearch.guidance.blur import BOUNDARIES, blur_matrix

GRIDS = [(3, 5), (4, 4), (1, 6)]
CLOSE = {"atol": 1e-8, "rtol": 1e-8}


def field(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(a):
    return -a.logsumexp(dim=-1)


def log_modes(h):
    """The log pseudo-determinant from a dense matrix: its eigenvalues but the one nearest 0."""
    return torch.linalg.eigvalsh(-h)[..., 1:].log().sum(-1)


def test_hessian_is_autograd():
    a = field(0, 9)
    expected = torch.autograd.functional.hessian(energy, a)
    torch.testing.assert_close(hessian(a), expected, **CLOSE)
    assert float((hessian(a) @ torch.ones(9, dtype=torch.float64)).abs().max()) < 1e-15
    assert float(torch.linalg.eigvalsh(hessian(a)).max()) < 1e-15  # E is concave in the logits


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_determinants(boundary, grid):
    """pdet H = n Π ξ, and pdet BᵀH(ã)B = pdet H(ã)·(det B)² under every boundary, reflect too."""
    operator, a = BlurOperator(grid, 0.6, boundary), field(2, 4, math.prod(grid))
    torch.testing.assert_close(log_pseudo_det(a), log_modes(hessian(a)), **CLOSE)
    chain = torch.stack([torch.autograd.functional.hessian(lambda z: energy(operator.apply(z)), z) for z in a])
    torch.testing.assert_close(chain_hessian(a, operator), chain, **CLOSE)
    torch.testing.assert_close(chain_log_pseudo_det(a, operator), log_modes(chain), **CLOSE)
    dense = operator.dense()
    torch.testing.assert_close(entrywise_hessian(a, operator), hessian(a @ dense.T) * dense, **CLOSE)
    xi = (a @ dense.T).softmax(-1)
    torch.testing.assert_close(entrywise_log_product(a, operator), (xi * dense.diagonal()).log().sum(-1), **CLOSE)
    torch.testing.assert_close(log_product(a), a.softmax(-1).log().sum(-1), **CLOSE)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_operator_from_factors(boundary):
    for grid in GRIDS:
        for sigma in (0, 0.3, 0.9, 1.4):
            operator = BlurOperator(grid, sigma, boundary)
            dense = torch.kron(*(blur_matrix(side, sigma, boundary) for side in grid))
            assert operator.log_det == pytest.approx(float(torch.linalg.slogdet(dense).logabsdet), rel=1e-8, abs=1e-8)
            assert operator.log_diagonal == pytest.approx(float(dense.diagonal().log().sum()), abs=1e-10)
            torch.testing.assert_close(operator.row_norms_squared, (dense @ dense.T).diagonal())
            x = field(3, 2, operator.n)
            torch.testing.assert_close(operator.apply(x), x @ dense.T)
            torch.testing.assert_close(operator.adjoint(x), x @ dense)


def test_spectrum_limits():
    """σ = 0: 1; σ = ∞: singular; the exact blur's tiny eigenvalues stay right in log space."""
    for boundary in BOUNDARIES:
        assert BlurOperator((3, 4), 0, boundary).log_det == 0
        assert BlurOperator((3, 4), math.inf, boundary).log_det == -math.inf
        assert BlurOperator((1, 1), math.inf, boundary).log_det == 0
    # at σ = 9999 three taps around a ring of three are a box but for (1 − e^(−½/σ²))/3, and so not quite singular
    assert float(log_spectrum(3, 9999, "circular")[1]) == pytest.approx(math.log(0.5 / 9999**2 / 3), rel=1e-6)
    # the smallest is e^-108 of the largest, which no fp64 matrix holds; by two images of the Gaussian
    far, at = log_spectrum(16, 5.0, "exact"), [math.pi * (15 / 16 - turn) for turn in (0, 2)]
    assert float(far[-1]) == pytest.approx(math.log(sum(math.exp(-0.5 * (5 * w) ** 2) for w in at)), rel=1e-12)
    for sigma in (0.29, 0.31, 0.8):
        exact = torch.linalg.eigvalsh(blur_matrix(6, sigma, "exact")).flip(0)
        torch.testing.assert_close(log_spectrum(6, sigma, "exact").exp(), exact, **CLOSE)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_curvature_of_a_site(axis, boundary, monkeypatch):
    """Streamed over every column, against the dense matrices of each."""
    grid = (3, 4)
    operator, (q, k) = BlurOperator(grid, 0.7, boundary), (field(4, 1, 2, 12, 3), field(5, 1, 2, 12, 3))
    monkeypatch.setattr("segresearch.analysis.logit_statistics.BLOCK", 50)
    measured = curvature(q, k, axis, operator)
    a = columns(q, k, axis, torch.arange(12))
    plain, chain = hessian(operator.apply(a)), chain_hessian(a, operator)
    trace = lambda m: -m.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    expected = {
        "log_product": log_modes(plain) - math.log(operator.n),
        "trace": trace(plain),
        "chain_trace": trace(chain),
        "norm": torch.linalg.eigvalsh(-plain)[..., -1],
        "lse": operator.apply(a).logsumexp(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(measured, name), value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_no_blur_is_the_original():
    q, k = field(6, 1, 1, 6, 3), field(7, 1, 1, 6, 3)
    blurred, plain = curvature(q, k, "queries", BlurOperator((2, 3), 0)), statistics(q, k, "queries")
    torch.testing.assert_close(blurred.lse, plain.lse)
    torch.testing.assert_close(blurred.chain_trace, blurred.trace)
    xi = columns(q, k, "queries", torch.arange(6)).softmax(-1)
    flat, infinite = curvature(q, k, "queries", BlurOperator((2, 3), math.inf)), BlurOperator((2, 3), math.inf)
    assert bool((chain_log_pseudo_det(xi, infinite) == -math.inf).all())
    assert float(flat.chain_trace.abs().max()) < 1e-12
    torch.testing.assert_close(flat.trace, torch.full_like(flat.trace, 1 - 1 / 6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1e-6, 0.1, 1.0, 10.0, 100.0]), st.booleans())
def test_spectral_norm(seed, n, scale, tie):
    """From uniform to one-hot, with and without a tie at the top."""
    a = field(seed, 1, 3, n, scale=scale)
    if tie and n > 1:
        a[..., 0] = a[..., 1] = a.amax(-1)
    expected = torch.linalg.eigvalsh(-hessian(a))[..., -1]
    torch.testing.assert_close(spectral_norm(exponentials(a)), expected, atol=1e-14, rtol=1e-9)
    single = spectral_norm(exponentials(a.float()))
    torch.testing.assert_close(single, expected, atol=1e-6, rtol=1e-5 * (1 + scale))


def test_gaussian_curvature():
    """Of a sphere of radius 2, as a graph, away from its pole; and of the saddle st at 0."""
    s, t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    sphere = lambda z: (4 - z.square().sum()).sqrt()  # noqa: E731
    z = torch.stack([s, t])
    gradient = torch.autograd.functional.jacobian(sphere, z)
    second = torch.autograd.functional.hessian(sphere, z)
    assert float(gaussian_curvature(gradient, second)) == pytest.approx(0.25)
    saddle = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert float(gaussian_curvature(torch.zeros(2, dtype=torch.float64), saddle)) == -1


def test_bad_input():
    q = field(9, 1, 1, 6, 3)
    with pytest.raises(ValueError, match="grid 2x2 has 4 cells, but the tensor has 6 tokens"):
        curvature(q, q, "queries", BlurOperator((2, 2), 1.0))
    with pytest.raises(ValueError, match="at least one token, got 0x3"):
        BlurOperator((0, 3), 1.0)
    with pytest.raises(ValueError, match="sigma must be a number >= 0"):
        BlurOperator((2, 3), -1.0)
