"""The SEG blur: golden numbers of the official filter, its other boundaries, limits and grids."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segresearch.guidance.blur import blur, blur_matrix, gaussian_taps

BOUNDARIES = ["reflect", "symmetric", "circular", "exact"]


def image(values, h, w):
    return torch.as_tensor(values, dtype=torch.float32).reshape(1, 1, h * w, 1)


def reference(z, grid, sigma):
    """The official filter written with padding and convolution: one (h, w) image per head and channel."""
    rows, heads, _, dim = z.shape
    h, w = grid
    x = z.transpose(2, 3).reshape(rows * heads * dim, 1, h, w)
    for n, axis in ((h, 2), (w, 3)):
        size = math.ceil(6 * sigma)
        size = min(size + 1 - size % 2, n + 1 - n % 2)
        taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-(size // 2), size // 2 + 1)]
        taps = torch.tensor(taps, dtype=z.dtype) / sum(taps)
        pad = (0, 0, size // 2, size // 2) if axis == 2 else (size // 2, size // 2, 0, 0)
        taps = taps.reshape(1, 1, -1, 1) if axis == 2 else taps.reshape(1, 1, 1, -1)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), taps)
    return x.reshape(rows, heads, dim, h * w).transpose(2, 3)


def test_golden_taps():
    assert gaussian_taps(0.5, 3).tolist() == pytest.approx([0.10650698, 0.78698604, 0.10650698], abs=1e-8)
    taps = gaussian_taps(1.0, 7).tolist()
    assert taps[:4] == pytest.approx([0.00443305, 0.05400558, 0.24203623, 0.39905028], abs=1e-8)


@pytest.mark.parametrize(
    "sigma, row",
    [
        (1.0, [3.53178711, 3.93440706, 4.71645232, 5.11907227]),
        (0.5, [1.06506979, 1.85205583, 2.85205583, 3.63904187]),
        (100.0, [5.9997, 6.19972, 6.3998, 6.59982]),
    ],
)
def test_golden_ramp(sigma, row):
    blurred = blur(image(range(16), 4, 4), (4, 4), sigma)
    assert blurred.flatten()[:4].tolist() == pytest.approx(row, abs=2e-5 if sigma == 100 else 2e-6)


@pytest.mark.parametrize("place, mass", [(0, 0.49183568), (5, 1.68659579)])
def test_golden_mass(place, mass):
    z = torch.zeros(16)
    z[place] = 1
    assert blur(image(z, 4, 4), (4, 4), 1.0).sum().item() == pytest.approx(mass, abs=1e-6)
    for boundary in ("symmetric", "circular", "exact"):
        assert blur(image(z, 4, 4), (4, 4), 1.0, boundary).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_low_mode_at_32_is_not_the_mean():
    wave = torch.cos(math.pi * (torch.arange(32, dtype=torch.float64) + 0.5) / 32)
    kept = (blur_matrix(32, 100.0) @ wave) @ wave / (wave @ wave)
    assert 0.55 < kept < 0.65
    assert (blur_matrix(32, 5.6) - blur_matrix(32, 100.0)).abs().max() > 1e-3  # cut to 33 taps, yet still a Gaussian


@pytest.mark.parametrize("grid", [(5, 8), (8, 5), (1, 6), (6, 1), (2, 3), (3, 2), (1, 1), (2, 2), (4, 16)])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.3, 9999.0])
def test_reflect_equals_padding_and_convolution(grid, sigma):
    z = torch.randn(2, 3, grid[0] * grid[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blur(z, grid, sigma), reference(z, grid, sigma), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), sigma=st.floats(0, 1e5), boundary=st.sampled_from(BOUNDARIES))
def test_rows_are_averages(n, sigma, boundary):
    matrix = blur_matrix(n, sigma, boundary)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-12)
    if boundary != "reflect":  # doubly stochastic and symmetric: the lemmas' own assumption
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)


def test_reflect_is_not_doubly_stochastic():
    columns = blur_matrix(32, 1.0).sum(0)
    assert columns.min().item() == pytest.approx(0.70, abs=5e-3)
    assert columns.max().item() == pytest.approx(1.24, abs=5e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 32, 128])
def test_exact_is_continuous_from_identity_to_mean(n):
    mean = torch.full((n, n), 1 / n, dtype=torch.float64)
    torch.testing.assert_close(blur_matrix(n, 1e-3, "exact"), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(blur_matrix(n, 9999.0, "exact"), mean, rtol=0, atol=1e-13)
    gaps = [(blur_matrix(n, s, "exact") - mean).norm().item() for s in (0.5, 1, 2, 4, 8, 16, 64, 256)]
    assert all(a >= b - 1e-12 for a, b in zip(gaps, gaps[1:], strict=False)) and gaps[-1] < 1e-2


def test_exact_is_the_sampled_gaussian_on_the_symmetric_extension():
    n, sigma = 6, 1.7
    z = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    long = torch.cat([z if m % 2 == 0 else z.flip(0) for m in range(-20, 21)])
    x = torch.arange(long.numel()) - 20 * n
    for i in range(n):
        weight = torch.exp(-0.5 * ((x - i).double() / sigma) ** 2)
        mean = (weight @ long / weight.sum()).item()
        assert (blur_matrix(n, sigma, "exact") @ z)[i].item() == pytest.approx(mean, abs=1e-13)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_limits(boundary, dtype):
    z = torch.randn(2, 2, 15, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert blur(z, (3, 5), 0.0, boundary) is z
    mean = z.double().mean(2, keepdim=True).expand_as(z)
    eps = torch.finfo(dtype).eps
    for sigma in (math.inf, 9999.5):
        out = blur(z, (3, 5), sigma, boundary)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), mean, rtol=eps, atol=eps)
    torch.testing.assert_close(blur(z, (3, 5), 1e-3, boundary), z, rtol=0, atol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_separable_factors_and_batch(boundary):
    z = torch.randn(3, 2, 24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = torch.kron(blur_matrix(4, 1.3, boundary), blur_matrix(6, 1.3, boundary))
    out = blur(z, (4, 6), 1.3, boundary)
    torch.testing.assert_close(out, whole @ z, rtol=0, atol=1e-13)
    torch.testing.assert_close(out[1:2], blur(z[1:2], (4, 6), 1.3, boundary), rtol=0, atol=1e-14)


def test_the_cached_matrix_is_safe():
    blur_matrix(7, 1.0).zero_()
    assert blur_matrix(7, 1.0).sum().item() == pytest.approx(7)


@pytest.mark.parametrize("sigma", [-1.0, -1e-9, math.nan])
def test_wrong_sigma(sigma):
    with pytest.raises(ValueError, match="blur sigma must be a number >= 0"):
        blur(torch.zeros(1, 1, 4, 1), (2, 2), sigma)


def test_wrong_boundary_and_grid():
    with pytest.raises(ValueError, match="reflect, symmetric, circular, exact"):
        blur_matrix(4, 1.0, "mirror")
    with pytest.raises(ValueError, match="has 6 cells, but the tensor has 4 tokens"):
        blur(torch.zeros(1, 1, 4, 1), (2, 3), 1.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        blur_matrix(0, 1.0)
