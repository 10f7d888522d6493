"""Kernel distances between sets of features: squared maximum mean discrepancies (Gretton et al. 2012), in fp64.

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y)

Unbiased: pairs of a feature with itself are left out of the first two means. So the estimate may be below 0, and its
mean does not depend on N. Biased: with them, never below 0, and larger at small N. No Gaussian is assumed and no
covariance inverted, so N may lie below the number of features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.threads import few_features, one_thread_for

Kernel = Callable[[Tensor, Tensor], Tensor]
SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as published
BLOCK = 2048  # rows and columns of a kernel matrix that are held at once


@dataclass(frozen=True)
class Discrepancy:
    """MMD² over all images, by both estimators, of n features of `dim` numbers against n_reference."""

    biased: float
    unbiased: float
    n: int
    n_reference: int
    dim: int


@dataclass(frozen=True)
class KernelDistance:
    """The mean of unbiased MMD² over subsets, and their standard deviation `spread` (of one subset, not of the mean).

    n, n_reference: how many images the subsets of `size` are taken from.
    """

    distance: float
    spread: float
    n_subsets: int
    size: int
    n: int
    n_reference: int
    dim: int


def checked_sets(features: Tensor, reference: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both in fp64. InputError for other numbers of features, fewer than `least` images, or values not finite."""
    if features.shape[1] != reference.shape[1]:
        raise InputError(f"features of {features.shape[1]} and {reference.shape[1]} numbers cannot be compared")
    for x, side in ((features, "features"), (reference, "reference")):
        if len(x) < least:
            raise InputError(f"{side}: {len(x)} images, at least {least} are needed")
        if not x.isfinite().all():
            raise InputError(f"{side} hold values that are not finite: the images they come from are broken")
    return features.detach().double(), reference.detach().double()


def polynomial(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """(x·y / dim + 1)³, the kernel of KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """exp(−|x − y|² / 2σ²) with σ = 10, the kernel of CMMD."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T  # (n, dim), (m, dim) -> (n, m)
    return torch.exp(-squares.clamp(min=0) / (2 * SIGMA**2))


def _kernel_sums(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The sums of k over all pairs, block by block, and over pairs of a row with itself where x is y."""
    total, diagonal = torch.zeros(2, dtype=torch.float64, device=x.device)
    same = x is y
    for i, rows in enumerate(x.split(BLOCK)):
        for j, columns in enumerate(y.split(BLOCK)):
            if same and j < i:
                continue  # k is symmetric
            block = kernel(rows, columns)
            total += block.sum() * (2 if same and i != j else 1)
            diagonal += block.diagonal().sum() if same and i == j else 0
    return total.item(), diagonal.item()


def discrepancy(kernel: Kernel, features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"]) -> Discrepancy:
    """MMD² over all pairs, in memory that does not grow with their number. InputError for fewer than two on a side."""
    x, y = checked_sets(features, reference)
    n, m = len(x), len(y)
    (xx, x_diagonal), (yy, y_diagonal) = _kernel_sums(kernel, x, x), _kernel_sums(kernel, y, y)
    cross = 2 * _kernel_sums(kernel, x, y)[0] / (n * m)
    biased = xx / n**2 + yy / m**2 - cross
    unbiased = (xx - x_diagonal) / (n * (n - 1)) + (yy - y_diagonal) / (m * (m - 1)) - cross
    return Discrepancy(biased, unbiased, n, m, x.shape[1])


def subset_indices(n: int, size: int, seed: int, index: int, side: int) -> Tensor:
    """`size` different ones of n, keyed by seed, subset and side, so that every method with n images has the same."""
    generator = torch.Generator().manual_seed((seed * 2 + side) * 1_000_003 + index)
    return torch.randperm(n, generator=generator)[:size]


@one_thread_for(few_features)
def kid(
    features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"],
    n_subsets: int = 100, size: int = 1000, seed: int = 0,
) -> KernelDistance:  # fmt: skip
    """Kernel inception distance (arXiv 1801.01401): the unbiased MMD² of subsets under the polynomial kernel.

    Published with 100 subsets of 1000; not scaled here (papers often print it times 100 or 1000).
    Raises InputError for subsets larger than either side, or of fewer than two.
    """
    if n_subsets < 1 or size < 2:
        raise InputError(f"n_subsets={n_subsets}, size={size}: at least 1 subset of 2 images is needed")
    x, y = checked_sets(features, reference)
    n, m = len(x), len(y)
    if size > min(n, m):
        raise InputError(f"size={size}: subsets cannot be larger than the {n} images or the {m} of the reference")
    values = []
    for i in range(n_subsets):
        x_subset, y_subset = (z[subset_indices(len(z), size, seed, i, k).to(z.device)] for k, z in enumerate((x, y)))
        values.append(discrepancy(polynomial, x_subset, y_subset).unbiased)
    distances = torch.tensor(values, dtype=torch.float64)
    spread = distances.std(correction=0).item()
    return KernelDistance(distances.mean().item(), spread, n_subsets, size, n, m, x.shape[1])


@one_thread_for(few_features)
def cmmd(features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"]) -> Discrepancy:
    """CLIP maximum mean discrepancy (arXiv 2401.09603) of CLIP embeddings, which are scaled to unit length here.

    The published figure is `biased`: times 1000, pairs of an image with itself included.
    """
    x, y = (F.normalize(z.detach().double(), dim=1) for z in (features, reference))
    d = discrepancy(gaussian_kernel, x, y)
    return Discrepancy(SCALE * d.biased, SCALE * d.unbiased, d.n, d.n_reference, d.dim)
