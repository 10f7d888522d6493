"""Energies, their gradients against autograd, Hopfield's update as a gradient step, slices of the landscape."""

import math

import pytest
import torch
import torch.nn.functional as F
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import AXES, columns

from segresearch.analysis.curvature import hessian
from segresearch.analysis.energy import (
    column_slice,
    energies,
    energy,
    energy_gradient,
    hopfield_energy,
    hopfield_gradient,
    hopfield_update,
    line,
    query_slice,
    surface,
)
from segresearch.guidance.blur import BOUNDARIES, blur

GRID = (3, 4)
GRID_POINTS = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)


def heads(seed=0, rows=2, count=2, tokens=12, dim=4):
    g = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(rows, count, tokens, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k


@pytest.mark.parametrize("axis", AXES)
def test_energy_and_gradient(axis):
    q, k = heads()
    side = (q if axis == "queries" else k).requires_grad_()
    a = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    expected = -a.logsumexp(dim=2 if axis == "queries" else 3)
    torch.testing.assert_close(energies(q.detach(), k.detach(), axis), expected.detach())
    torch.testing.assert_close(energy(q.detach(), k.detach(), axis), expected.sum(-1).detach())
    (gradient,) = torch.autograd.grad(expected.sum(), side)
    for block in (5, 10**6):
        found = energy_gradient(q.detach(), k.detach(), axis, block=block)
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-10)


def test_gradient_by_logits_is_minus_softmax():
    a = heads()[0].flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(-a.logsumexp(0), a)
    torch.testing.assert_close(gradient, -a.detach().softmax(0))


def test_attention_is_a_hopfield_step():
    """With v = k and β = 1/√d attention is z − ∇E(z); the gradient is autograd's; steps never raise the energy ≥ 0."""
    q, k = heads()
    beta = 1 / math.sqrt(q.shape[-1])
    torch.testing.assert_close(hopfield_update(q, k, beta), F.scaled_dot_product_attention(q, k, k))
    z = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hopfield_energy(z, k, beta).sum(), z)
    torch.testing.assert_close(hopfield_gradient(q, k, beta), gradient)
    torch.testing.assert_close(q - gradient, F.scaled_dot_product_attention(q, k, k))
    levels = [hopfield_energy(q, k, beta)]
    for _ in range(5):
        q = hopfield_update(q, k, beta)
        levels.append(hopfield_energy(q, k, beta))
    fall = torch.stack(levels).diff(dim=0)
    assert float(fall.max()) <= 1e-12 and float(fall[0].max()) < 0 and float(levels[-1].min()) >= 0


def test_surface_is_autograd():
    """Energy and derivatives of a slice at each point; curvature of the concave surface is never negative."""
    q, k = heads()
    base, along = query_slice(q, k, (1, 0, 5))
    found = surface(base, along, GRID_POINTS, GRID_POINTS[:4])
    assert found.energy.shape == (7, 4) and found.second.shape == (7, 4, 2, 2)
    at = lambda z: -(base + z @ along).logsumexp(0)  # noqa: E731
    z = torch.stack([GRID_POINTS[2], GRID_POINTS[3]])
    torch.testing.assert_close(found.energy[2, 3], at(z))
    gradient = torch.autograd.functional.jacobian(at, z)
    second = torch.autograd.functional.hessian(at, z)
    torch.testing.assert_close(found.gradient[2, 3], gradient)
    torch.testing.assert_close(found.second[2, 3], second)
    expected = torch.linalg.det(second) / (1 + gradient.square().sum()) ** 2
    torch.testing.assert_close(found.gaussian_curvature[2, 3], expected, atol=1e-8, rtol=1e-8)
    assert float(found.gaussian_curvature.min()) > -1e-12
    cut = line(base, along[0], GRID_POINTS)
    torch.testing.assert_close(cut.energy, surface(base, along, GRID_POINTS, torch.zeros(1)).energy[:, 0])
    torch.testing.assert_close(cut.slope[2], surface(base, along, GRID_POINTS, torch.zeros(1)).gradient[2, 0, 0])
    assert float(cut.second.max()) <= 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("axis", AXES)
def test_column_slice(boundary, axis):
    """The landscape a ↦ −lse(Ba): its second derivative at the column is the block of BᵀH(ã)B for the two tokens."""
    q, k = heads()
    smoothing, place, tokens = Smoothing(GRID, 0.8, boundary), (1, 1, 7), (4, 9)
    a = columns(q, k, axis, torch.tensor([7]))[1, 1, 0]
    base, along = column_slice(q, k, place, tokens, smoothing, axis)
    zero = torch.zeros(1, dtype=torch.float64)
    found = surface(base, along, zero, zero)
    dense = smoothing.dense()
    chain = dense.T @ hessian(smoothing.apply(a)) @ dense
    torch.testing.assert_close(found.second[0, 0], chain[list(tokens)][:, list(tokens)], atol=1e-10, rtol=1e-10)
    plain_base, plain_along = column_slice(q, k, place, tokens, axis=axis)
    torch.testing.assert_close(plain_base, a)
    assert plain_along.sum() == 2 and plain_along[0, 4] == plain_along[1, 9] == 1


def test_query_slice_under_blur():
    """Around the blurred query; a query that moves alone moves it b_ii times as far, all together just as far."""
    q, k = heads()
    smoothing = Smoothing(GRID, 0.8, "reflect")
    smooth = blur(q, GRID, 0.8, "reflect")
    directions = torch.eye(4, dtype=torch.float64)[:2]
    for move, shift in (("one", torch.nn.functional.one_hot(torch.tensor(5), 12)), ("all", torch.ones(12))):
        base, along = query_slice(q, k, (0, 1, 5), smoothing, directions, move)
        torch.testing.assert_close(base, k[0, 1] @ smooth[0, 1, 5] / 2)
        moved = q.clone()
        moved[0, 1] += shift.double()[:, None] * directions[0]
        expected = k[0, 1] @ blur(moved, GRID, 0.8, "reflect")[0, 1, 5] / 2
        torch.testing.assert_close(base + along[0], expected)
    with pytest.raises(ValueError, match='move must be "one"'):
        query_slice(q, k, (0, 1, 5), smoothing, directions, "two")
