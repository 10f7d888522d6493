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

States = Float[Tensor, "*batch states dim"]
Patterns = Float[Tensor, "*batch n dim"]


def energies(q: Queries, k: Keys, axis: str) -> PerColumn:
    """E = −lse of every column along `axis` ("queries": Definition 2.1; "keys": its dual), fp64, streamed."""
    return -log_sum_exp(q, k, axis)


def hopfield_energy(z: States, patterns: Patterns, beta: float) -> Float[Tensor, "*batch states"]:
    """E(z) of the modern Hopfield network that stores `patterns`, at least 0 (arXiv 2008.02217, eq. 2)."""
    lse = (beta * z @ patterns.mT).logsumexp(dim=-1) / beta
    largest = patterns.square().sum(dim=-1).amax(dim=-1)
    constant = math.log(patterns.shape[-2]) / beta + largest.unsqueeze(-1) / 2
    return z.square().sum(dim=-1) / 2 - lse + constant


def hopfield_update(z: States, patterns: Patterns, beta: float) -> States:
    """Xᵀ softmax(β X z), eq. 3 of arXiv 2008.02217: attention with k = v = patterns where β = 1/√d. Never raises E."""
    return (beta * z @ patterns.mT).softmax(dim=-1) @ patterns


@dataclass(frozen=True)
class Surface:
    """E = −lse over a(s, t) = base + s·u + t·v, fp64: energy, its derivatives by (s, t), curvature of the graph."""

    energy: Float[Tensor, "across down"]
    gradient: Float[Tensor, "across down 2"]
    second: Float[Tensor, "across down 2 2"]

    @property
    def gaussian_curvature(self) -> Float[Tensor, "across down"]:
        """K = (E_ss E_tt − E_st²)/(1 + E_s² + E_t²)² of the graph z = E(s, t)."""
        return torch.linalg.det(self.second) / (1 + self.gradient.square().sum(dim=-1)).square()


def surface(
    base: Float[Tensor, " n"], along: Float[Tensor, "2 n"], s: Float[Tensor, " across"], t: Float[Tensor, " down"]
) -> Surface:
    """The slice of −lse through the logits `base` in two directions; memory about 4·len(s)·len(t)·n numbers.

    For the landscape a ↦ −lse(Ba) around a column a, blur both: `surface(B.apply(a), B.apply(directions), s, t)`.
    """
    s, t, base, along = (z.double() for z in (s, t, base, along))
    a = base + s[:, None, None] * along[0] + t[:, None] * along[1]  # (across, down, n)
    xi = a.softmax(dim=-1)
    mean = xi @ along.T  # (across, down, 2)
    centred = along - mean.unsqueeze(-1)  # (across, down, 2, n)
    covariance = (centred * xi.unsqueeze(-2)) @ centred.mT
    return Surface(-a.logsumexp(dim=-1), -mean, -covariance)
