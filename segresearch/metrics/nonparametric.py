"""Comparisons of two sets of features that assume no distribution, in fp64. N may lie below the number of features.

KID and CMMD are squared maximum mean discrepancies (Gretton et al. 2012): mean k(x, x') + mean k(y, y') − 2 mean
k(x, y). Unbiased: pairs of a feature with itself are left out of the first two means. So the estimate may be below 0,
and its mean does not depend on N. Biased: with them, never below 0, and larger at small N.

Improved precision and recall (arXiv 1904.06991): the balls around the features of a set reach to the k-th nearest other
feature of it. Precision is the share of generated features in a ball of the reference, recall the share of the
reference in a ball of the generated. Balls shrink as N grows, so both compare only at equal N on either side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.threads import few_features, one_thread_for

Features = Float[Tensor, "n dim"]
Reference = Float[Tensor, "m other"]
Kernel = Callable[[Tensor, Tensor], Tensor]
SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as published
BLOCK = 2048  # rows and columns of a kernel matrix that are held at once
ROWS = 1024  # of a matrix of distances that are held at once
EDGE = 1 + 1e-9  # of a squared radius: what lies on the edge of a ball is in it however it is rounded
ROUNDING = 1e-13  # squared distances below this times the squared lengths are rounding, and count as 0


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


def discrepancy(kernel: Kernel, features: Features, reference: Reference) -> tuple[float, float]:
    """(biased, unbiased) MMD² over all pairs, in memory that does not grow with them. InputError for fewer than two."""
    x, y = checked_sets(features, reference)
    n, m = len(x), len(y)
    (xx, x_diagonal), (yy, y_diagonal) = _kernel_sums(kernel, x, x), _kernel_sums(kernel, y, y)
    cross = 2 * _kernel_sums(kernel, x, y)[0] / (n * m)
    unbiased = (xx - x_diagonal) / (n * (n - 1)) + (yy - y_diagonal) / (m * (m - 1)) - cross
    return xx / n**2 + yy / m**2 - cross, unbiased


def subset_indices(n: int, size: int, index: int, side: int) -> Int[Tensor, " size"]:
    """`size` different ones of n, keyed by subset and side, so that every method with n images has the same."""
    generator = torch.Generator().manual_seed(side * 1_000_003 + index)
    return torch.randperm(n, generator=generator)[:size]


@one_thread_for(few_features)
def kid(features: Features, reference: Reference, n_subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Kernel inception distance (arXiv 1801.01401): the mean of the unbiased MMD² of subsets under the polynomial
    kernel, and its standard deviation (of one subset, not of the mean). Published with 100 subsets of 1000; not scaled
    here (papers often print it times 100 or 1000). InputError for subsets larger than a side, or of fewer than two."""
    if n_subsets < 1 or size < 2:
        raise InputError(f"n_subsets={n_subsets}, size={size}: at least 1 subset of 2 images is needed")
    x, y = checked_sets(features, reference)
    n, m = len(x), len(y)
    if size > min(n, m):
        raise InputError(f"size={size}: subsets cannot be larger than the {n} images or the {m} of the reference")
    values = []
    for i in range(n_subsets):
        subsets = (z[subset_indices(len(z), size, i, side).to(z.device)] for side, z in enumerate((x, y)))
        values.append(discrepancy(polynomial, *subsets)[1])
    distances = torch.tensor(values, dtype=torch.float64)
    return distances.mean().item(), distances.std(correction=0).item()


@one_thread_for(few_features)
def cmmd(features: Features, reference: Reference) -> tuple[float, float]:
    """(biased, unbiased) CLIP maximum mean discrepancy times 1000 (arXiv 2401.09603) of CLIP embeddings, which are
    scaled to unit length here. The published figure is the biased one."""
    unit = (F.normalize(z.detach().double(), dim=1) for z in (features, reference))
    biased, unbiased = discrepancy(gaussian_kernel, *unit)
    return SCALE * biased, SCALE * unbiased


def _squared_distances(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """Exactly 0 between equal features."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)  # (n, dim), (m, dim) -> (n, m)
    squares = lengths - 2 * x @ y.T
    return squares.where(squares > ROUNDING * lengths, 0)


def squared_radii(x: Float[Tensor, "n dim"], neighbour: int = 3) -> Float[Tensor, " n"]:
    """Squared distance of each feature to its k-th nearest other one (itself is the first)."""
    return torch.cat([_squared_distances(rows, x).kthvalue(neighbour + 1, dim=1).values for rows in x.split(ROWS)])


def covered(x: Float[Tensor, "n dim"], centres: Float[Tensor, "m dim"], radii: Float[Tensor, " m"]) -> float:
    """Share of x that lies within one of the balls of squared radii, whose edge belongs to them."""
    inside = [(_squared_distances(rows, centres) <= EDGE * radii).any(1) for rows in x.split(ROWS)]
    return torch.cat(inside).double().mean().item()


@one_thread_for(few_features)
def precision_recall(features: Features, reference: Reference, neighbour: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated features against a reference; neighbour: k. InputError for as few images as
    `neighbour`, for values that are not finite or features of another number."""
    x, y = checked_sets(features, reference, least=0)
    n, m = len(x), len(y)
    if not 1 <= neighbour < min(n, m):
        raise InputError(f"neighbour={neighbour}: must lie between 1 and {min(n, m) - 1}, for {n} and {m} images")
    centre = y.mean(0)  # distances do not change, their rounding shrinks
    x, y = x - centre, y - centre
    return covered(x, y, squared_radii(y, neighbour)), covered(y, x, squared_radii(x, neighbour))


@one_thread_for(few_features)
def density_coverage(features: Features, reference: Reference, neighbour: int = 5) -> tuple[float, float]:
    """(density, coverage) of generated features against a reference (arXiv 2002.09797), with the balls of the reference
    alone. Density is the mean number of balls that a generated image lies in, over k, and may exceed 1. Coverage is the
    share of balls that hold a generated image. InputError: as `precision_recall`."""
    x, y = checked_sets(features, reference, least=0)
    if not 1 <= neighbour < len(y):
        raise InputError(f"neighbour={neighbour}: must lie between 1 and {len(y) - 1}, for {len(y)} images")
    centre = y.mean(0)
    x, y = x - centre, y - centre
    radii = squared_radii(y, neighbour)
    balls, reached = 0, torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for rows in x.split(ROWS):
        inside = _squared_distances(rows, y) <= EDGE * radii  # (rows, m)
        balls, reached = balls + int(inside.sum()), reached | inside.any(0)
    return balls / (neighbour * len(x)), reached.double().mean().item()
