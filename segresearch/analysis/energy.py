"""Energies of attention, and slices of their landscapes.

Definition 2.1 of SEG (arXiv 2408.00760): the energy of a column of logits over the queries is E = −lse(a). Its dual
(Appendix B) is −lse of a row over the keys. Both have the gradient −softmax. The logits carry the model's 1/√d.

Modern Hopfield networks (arXiv 2008.02217, eqs. 2 and 3) add a quadratic well:
E(z) = −lse(β, Xz) + ½ z·z + β⁻¹ log N + ½ M², where lse(β, y) = β⁻¹ log Σ exp(β y) and M is the largest pattern's norm.
Their update z ← Xᵀ softmax(β X z) is attention of the query z with keys X = values X and β = 1/√d, and it is a gradient
step of length 1: z − ∇E(z).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.logit_statistics import Keys, PerColumn, Queries, log_sum_exp


def energies(q: Queries, k: Keys, axis: str) -> PerColumn:
    """E = −lse of every column along `axis` ("queries": Definition 2.1; "keys": its dual), fp64, streamed."""
    return -log_sum_exp(q, k, axis)


def hopfield_energy(
    z: Float[Tensor, "*batch states dim"], patterns: Float[Tensor, "*batch n dim"], beta: float
) -> Float[Tensor, "*batch states"]:
    """E(z) of the modern Hopfield network that stores `patterns`, at least 0 (arXiv 2008.02217, eq. 2)."""
    lse = (beta * z @ patterns.transpose(-1, -2)).logsumexp(dim=-1) / beta
    largest = patterns.square().sum(dim=-1).amax(dim=-1)
    constant = math.log(patterns.shape[-2]) / beta + largest.unsqueeze(-1) / 2
    return z.square().sum(dim=-1) / 2 - lse + constant


def hopfield_update(
    z: Float[Tensor, "*batch states dim"], patterns: Float[Tensor, "*batch n dim"], beta: float
) -> Float[Tensor, "*batch states dim"]:
    """Xᵀ softmax(β X z), eq. 3 of arXiv 2008.02217: attention with k = v = patterns where β = 1/√d. Never raises E."""
    return (beta * z @ patterns.transpose(-1, -2)).softmax(dim=-1) @ patterns


@dataclass(frozen=True)
class Surface:
    """E = −lse over a(s, t) = base + s·u + t·v, fp64: energy, its derivatives by (s, t), curvature of the graph."""

    energy: Float[Tensor, "across down"]
    gradient: Float[Tensor, "across down 2"]
    second: Float[Tensor, "across down 2 2"]
    gaussian_curvature: Float[Tensor, "across down"]


def surface(
    base: Float[Tensor, " n"], along: Float[Tensor, "2 n"], s: Float[Tensor, " across"], t: Float[Tensor, " down"]
) -> Surface:
    """The slice of −lse through the logits `base` in two directions; memory 3·len(t)·n numbers at a time.

    For the landscape a ↦ −lse(Ba) around a column a, blur both: `surface(B.apply(a), B.apply(directions), s, t)`.
    """
    s, t, base, along = (z.double() for z in (s, t, base, along))
    parts = [_derivatives(base + at * along[0] + t[:, None] * along[1], along) for at in s]
    energy, gradient, second = (torch.stack(part) for part in zip(*parts))
    return Surface(energy, gradient, second, gaussian_curvature(gradient, second))


def _derivatives(a: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E (...), ∂E = −Σ ξ u (..., p) and ∂²E = −Cov_ξ(u) (..., p, p) of logits (..., n) along p directions (p, n)."""
    xi = a.softmax(dim=-1)
    mean = xi @ along.T
    centred = along - mean.unsqueeze(-1)  # (..., p, n)
    return -a.logsumexp(dim=-1), -mean, -(centred * xi.unsqueeze(-2)) @ centred.transpose(-1, -2)


def gaussian_curvature(
    gradient: Float[Tensor, "*batch 2"], second: Float[Tensor, "*batch 2 2"]
) -> Float[Tensor, "*batch"]:
    """Gaussian curvature of the surface z = E(s, t): K = (E_ss E_tt − E_st²)/(1 + E_s² + E_t²)²."""
    return torch.linalg.det(second) / (1 + gradient.square().sum(dim=-1)).square()
