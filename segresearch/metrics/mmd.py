"""Kernel distances between sets of features: squared maximum mean discrepancies (Gretton et al. 2012), in fp64.

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y)

Unbiased: pairs of a feature with itself left out of the first two means, so the estimate may be below 0, and its mean
does not depend on N. Biased: with them, never below 0, and larger at small N. No Gaussian is assumed and no covariance
inverted, so N may lie below the number of features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.threads import few_features, one_thread_for

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 2048  # rows and columns of a kernel matrix that are held at once


@dataclass(frozen=True)
class Discrepancy:
    """MMD² over all pictures, by both estimators, of n features of `dim` numbers against n_reference."""

    biased: float
    unbiased: float
    n: int
    n_reference: int
    dim: int


@dataclass(frozen=True)
class KernelDistance:
    """The mean of unbiased MMD² over subsets, and their standard deviation `spread` (of one subset, not of the mean).

    n, n_reference: how many pictures the subsets of `size` are drawn from.
    """

    distance: float
    spread: float
    subsets: int
    size: int
    n: int
    n_reference: int
    dim: int

    def __str__(self) -> str:
        drawn = f"{self.subsets} subsets of {self.size} of N = {self.n} against {self.n_reference}"
        return f"{self.distance:.4g} ± {self.spread:.2g} ({drawn}, {self.dim} features)"


def polynomial(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """(x·y / dim + 1)³, the kernel of KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(width: float) -> Kernel:
    """exp(−|x − y|² / 2·width²)."""
    if not 0 < width < math.inf:
        raise InputError(f"width={width}: a Gaussian kernel needs a positive, finite width")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        apart = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T  # (n, dim), (m, dim) -> (n, m)
        return torch.exp(-apart.clamp(min=0) / (2 * width**2))

    return kernel


def _prepared(features: Tensor, reference: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    if features.shape[1] != reference.shape[1]:
        raise InputError(f"features of {features.shape[1]} and {reference.shape[1]} numbers cannot be compared")
    for x, side in ((features, "features"), (reference, "reference")):
        if len(x) < least:
            raise InputError(f"{side}: {len(x)} pictures, at least {least} are needed")
        if not x.isfinite().all():
            raise InputError(f"{side} hold values that are not finite: the pictures they come from are broken")
    return features.detach().double(), reference.detach().double()


def _sums(kernel: Kernel, x: Tensor, y: Tensor, own: bool) -> tuple[float, float]:
    """(sum of all k(x, y), of k(x, x) alone if `own`), block by block."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    diagonal = total.clone()
    for i, rows in enumerate(x.split(BLOCK)):
        for j, columns in enumerate(y.split(BLOCK)):
            if own and j < i:
                continue  # symmetric
            block = kernel(rows, columns)
            total += block.sum() * (2 if own and i != j else 1)
            diagonal += block.diagonal().sum() if own and i == j else 0
    return total.item(), diagonal.item()


def discrepancy(kernel: Kernel, features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"]) -> Discrepancy:
    """MMD² over all pairs, in memory that does not grow with their number. ValueError for fewer than two on a side."""
    x, y = _prepared(features, reference)
    n, m = len(x), len(y)
    (xx, x_own), (yy, y_own) = _sums(kernel, x, x, True), _sums(kernel, y, y, True)
    cross = 2 * _sums(kernel, x, y, False)[0] / (n * m)
    biased = xx / n**2 + yy / m**2 - cross
    unbiased = (xx - x_own) / (n * (n - 1)) + (yy - y_own) / (m * (m - 1)) - cross
    return Discrepancy(biased, unbiased, n, m, x.shape[1])


def subset(n: int, size: int, seed: int, index: int, side: int) -> Tensor:
    """`size` different ones of n, keyed by seed, subset and side, so that every setting of n pictures draws alike."""
    generator = torch.Generator().manual_seed((seed * 2 + side) * 1_000_003 + index)
    return torch.randperm(n, generator=generator)[:size]


def _drawn(x: Tensor, size: int, seed: int, index: int, side: int) -> Tensor:
    return x[subset(len(x), size, seed, index, side).to(x.device)]


@one_thread_for(few_features)
def kid(
    features: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m other"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Kernel inception distance (arXiv 1801.01401): the unbiased MMD² of subsets under the polynomial kernel.

    Published with 100 subsets of 1000; not scaled here (papers often print it times 100 or 1000).
    Raises ValueError for subsets larger than either side, or of fewer than two.
    """
    if subsets < 1 or size < 2:
        raise InputError(f"subsets={subsets}, size={size}: at least 1 subset of 2 pictures is needed")
    x, y = _prepared(features, reference)
    n, m = len(x), len(y)
    if size > min(n, m):
        raise InputError(f"size={size}: subsets cannot be larger than the {n} pictures or the {m} of the reference")
    drawn = torch.tensor(
        [
            discrepancy(polynomial, _drawn(x, size, seed, i, 0), _drawn(y, size, seed, i, 1)).unbiased
            for i in range(subsets)
        ],
        dtype=torch.float64,
    )
    spread = drawn.std(correction=0).item()
    return KernelDistance(drawn.mean().item(), spread, subsets, size, n, m, x.shape[1])


@one_thread_for(few_features)
def cmmd(
    features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"], width: float = 10.0, scale: float = 1000.0
) -> Discrepancy:
    """CLIP maximum mean discrepancy (arXiv 2401.09603) of CLIP embeddings, which are scaled to unit length here.

    The published figure is `biased`: Gaussian kernel of width σ = 10, times 1000, pairs with themselves included.
    """
    x, y = (f.detach().double() for f in (features, reference))
    found = discrepancy(
        gaussian_kernel(width), torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
    )
    return Discrepancy(scale * found.biased, scale * found.unbiased, found.n, found.n_reference, found.dim)
