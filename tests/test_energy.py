"""Energies against dense logits, attention as a Hopfield update, surfaces through the landscape against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.energy import (
    chain_log_pseudo_det,
    energies,
    gaussian_curvature,
    hessian,
    hopfield_energy,
    hopfield_update,
    surface,
)
from segresearch.analysis.logit_statistics import AXES, columns
from segresearch.guidance.blur import BOUNDARIES

GRID = (3, 4)
GRID_POINTS = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)


def heads(seed=0, rows=2, count=2, tokens=12, dim=4):
    g = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(rows, count, tokens, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k


@pytest.mark.parametrize("axis", AXES)
def test_energy(axis):
    q, k = heads()
    a = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    torch.testing.assert_close(energies(q, k, axis), -a.logsumexp(dim=2 if axis == "queries" else 3))


def test_attention_is_a_hopfield_step():
    """With v = k and β = 1/√d attention is z − ∇E(z), with autograd's gradient; steps never raise the energy ≥ 0."""
    q, k = heads()
    beta = 1 / math.sqrt(q.shape[-1])
    torch.testing.assert_close(hopfield_update(q, k, beta), F.scaled_dot_product_attention(q, k, k))
    z = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hopfield_energy(z, k, beta).sum(), z)
    torch.testing.assert_close(q - gradient, F.scaled_dot_product_attention(q, k, k))
    energy = [hopfield_energy(q, k, beta)]
    for _ in range(5):
        q = hopfield_update(q, k, beta)
        energy.append(hopfield_energy(q, k, beta))
    fall = torch.stack(energy).diff(dim=0)
    assert float(fall.max()) <= 1e-12 and float(fall[0].max()) < 0 and float(energy[-1].min()) >= 0


def test_surface_is_autograd():
    """Energy and derivatives of a slice at each point; curvature of the concave surface is never negative."""
    g = torch.Generator().manual_seed(1)
    base, along = (2 * torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((12,), (2, 12)))
    energy, first, second = surface(base, along, GRID_POINTS, GRID_POINTS[:4])
    assert energy.shape == (7, 4) and second.shape == (7, 4, 2, 2)
    at = lambda z: -(base + z @ along).logsumexp(0)  # noqa: E731
    z = torch.stack([GRID_POINTS[2], GRID_POINTS[3]])
    torch.testing.assert_close(energy[2, 3], at(z))
    gradient = torch.autograd.functional.jacobian(at, z)
    hessian_at = torch.autograd.functional.hessian(at, z)
    torch.testing.assert_close(first[2, 3], gradient)
    torch.testing.assert_close(second[2, 3], hessian_at)
    expected = torch.linalg.det(hessian_at) / (1 + gradient.square().sum()) ** 2
    torch.testing.assert_close(gaussian_curvature(first, second)[2, 3], expected, atol=1e-8, rtol=1e-8)
    assert float(gaussian_curvature(first, second).min()) > -1e-12


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("axis", AXES)
def test_surface_around_a_column(boundary, axis):
    """The landscape a ↦ −lse(Ba): its second derivative at the column is the block of BᵀH(ã)B for two tokens."""
    operator, tokens = BlurOperator(GRID, 0.8, boundary), [4, 9]
    a = columns(*heads(), axis, torch.tensor([7]))[1, 1, 0]
    directions = torch.eye(12, dtype=torch.float64)[tokens]
    zero = torch.zeros(1, dtype=torch.float64)
    _, _, second = surface(operator.apply(a), operator.apply(directions), zero, zero)
    dense = operator.dense()
    chain = dense.T @ hessian(operator.apply(a)) @ dense
    torch.testing.assert_close(second[0, 0], chain[tokens][:, tokens], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("peak", [4.0, 8.0])
def test_the_curvature_of_a_slice_is_not_what_the_theorem_attenuates(peak):
    """Under the blur the pseudo-determinant over all directions falls, the slope and the determinant of a slice too; at
    a high peak the slope falls so far that the slice's Gaussian curvature rises all the same."""
    a = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a[27] += peak
    mean, blur = a.mean().expand_as(a), BlurOperator((8, 8), 1.0, "exact")
    smooth = blur.apply(a) - mean
    along, before_and_after = torch.stack([smooth, a - mean - smooth]), []
    for operator in (BlurOperator((8, 8), 0.0), blur):
        _, slope, second = surface(operator.apply(mean), operator.apply(along), torch.ones(1), torch.ones(1))
        values = (chain_log_pseudo_det(a, operator), slope.norm(), torch.linalg.det(second))
        before_and_after.append([*map(float, values), float(gaussian_curvature(slope, second))])
    before, after = before_and_after
    assert all(b < a for a, b in zip(before[:3], after[:3], strict=True))
    assert (after[3] > 10 * before[3]) == (peak == 8.0) and (after[3] < before[3]) == (peak == 4.0)
