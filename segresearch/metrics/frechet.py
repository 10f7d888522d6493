"""Fréchet distance between two Gaussians fitted to features (FID, arXiv 1706.08500), with its errors.

    d² = |μ₁ − μ₂|² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½

in fp64, by eigenvalues of symmetric matrices (no `sqrtm`, whose result may be complex for singular covariances).
The estimate is biased upwards by about const / N (arXiv 1911.07023), so distances compare only at equal N, and N is a
part of every result. `extrapolated` removes the first order of it: 2·d²(N) − mean of d² over two halves. Errors are
standard errors of a bootstrap over images at fixed N, with the reference as given. Resampled distances are biased
further: they serve for their spread, never for their mean. Methods are resampled by the same indices, so the spread of
the difference of two methods' `resamples` is the paired error of their difference.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.rounding import rounded
from segresearch.threads import few_features, one_thread_for


@dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance (fp64) of `count` feature vectors."""

    mean: Float[Tensor, " dim"]
    cov: Float[Tensor, "dim dim"]
    count: int

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def root(self) -> Float[Tensor, "dim dim"]:
        """The symmetric square root of the covariance. Eigenvalues below 0 are rounding and count as 0."""
        values, vectors = torch.linalg.eigh(self.cov)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance (squared, as FID is) of n feature vectors of `dim` numbers to n_reference."""

    distance: float
    mean_part: float  # |μ₁ − μ₂|²; the rest is of the covariances
    n: int
    n_reference: int
    dim: int
    extrapolated: float  # with the first order in 1/n removed; nan where a half has too few
    error: float  # bootstrap standard error; nan without bootstrap
    resamples: tuple[float, ...]

    def __str__(self) -> str:
        number = rounded(self.distance, None if math.isnan(self.error) else self.error)
        return f"{number} (N = {self.n} against {self.n_reference}, {self.dim} features)"


def _check_rank(count: int, dim: int, force: bool) -> None:
    if count < 2 or (count <= dim and not force):
        need = f"the covariance needs at least {dim + 1} to be of full rank"
        hint = "take more images, or force=True for a distance that is biased far upwards"
        raise InputError(f"{count} images for {dim} features: {need}; {hint}")


def gaussian(features: Float[Tensor, "n dim"], force: bool = False) -> Gaussian:
    """The Gaussian of features, on the CPU. InputError for values that are not finite, for dim vectors or fewer unless
    forced, and always below two."""
    if not features.isfinite().all():
        raise InputError("features hold values that are not finite: the images they come from are broken")
    n, dim = features.shape
    _check_rank(n, dim, force)
    x = features.detach().to("cpu", torch.float64)
    mean = x.mean(0)
    x = x - mean
    return Gaussian(mean, x.T @ x / (n - 1), n)


def distance_parts(a: Gaussian, b: Gaussian) -> tuple[float, float]:
    """(|μ₁ − μ₂|², the part of the covariances) of d² between two Gaussians."""
    if a.dim != b.dim:
        raise InputError(f"Gaussians of {a.dim} and {b.dim} features cannot be compared")
    product = b.root @ a.cov @ b.root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return (a.mean - b.mean).square().sum().item(), (a.cov.trace() + b.cov.trace() - 2 * cross).clamp(min=0).item()


def bootstrap_indices(n: int, n_bootstrap: int) -> Int[Tensor, "n_bootstrap n"]:
    """Rows of each resample: the same for every method with n images, so that errors are paired."""
    return torch.randint(n, (n_bootstrap, n), generator=torch.Generator().manual_seed(0))


@one_thread_for(few_features)
def frechet_distance(
    features: Float[Tensor, "n dim"], reference: Gaussian, n_bootstrap: int = 0, force: bool = False
) -> Frechet:
    """Fréchet distance of features to a reference. n_bootstrap: how many resamples `error` is taken from. force: allow
    n below dim + 1. InputError for too few images, features of another number, or values that are not finite."""
    _check_rank(reference.count, reference.dim, force)
    x = features.detach().to("cpu", torch.float64)
    n = len(x)
    mean_part, cov_part = distance_parts(gaussian(x, force), reference)
    whole = mean_part + cov_part

    def distance(rows: Tensor) -> float:
        return sum(distance_parts(gaussian(rows, force=True), reference))

    halves = (distance(x[0::2]) + distance(x[1::2])) / 2 if n // 2 > reference.dim else math.nan
    resamples = tuple(distance(x[rows]) for rows in bootstrap_indices(n, n_bootstrap))
    error = torch.tensor(resamples, dtype=torch.float64).std().item() if n_bootstrap > 1 else math.nan
    return Frechet(whole, mean_part, n, reference.count, reference.dim, 2 * whole - halves, error, resamples)
