"""Fréchet distance between two Gaussians fitted to features (FID, arXiv 1706.08500), with its errors.

    d² = |μ₁ − μ₂|² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½

in fp64, by eigenvalues of symmetric matrices (no `sqrtm`, whose result may be complex for singular covariances).

The estimate is biased upwards by about const / N (arXiv 1911.07023), so distances compare only at equal N, and N is a
part of every result. `extrapolated` removes the first order of it: 2·d²(N) − mean of d² over two halves. Errors are
standard errors of a bootstrap over pictures at fixed N; resampling repeats pictures and thereby adds bias of its own,
so the resampled values serve for their spread, never for their mean. The reference is taken as given.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
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


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance (squared, as FID is) and what it rests on.

    distance = mean_part + cov_part. n, n_reference: how many feature vectors of `dim` numbers on either side.
    error: bootstrap standard error over the n, and draws: the resampled distances (empty without bootstrap).
    groups: distances of disjoint groups, each of n/len(groups). extrapolated: with the first order in 1/n removed.
    """

    distance: float
    mean_part: float
    cov_part: float
    n: int
    n_reference: int
    dim: int
    extrapolated: float = math.nan
    error: float = math.nan
    groups: tuple[float, ...] = ()
    draws: tuple[float, ...] = ()

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.3g}"
        return f"{self.distance:.4g}{error} (N = {self.n} against {self.n_reference}, {self.dim} features)"


class Moments:
    """Mean and covariance of features that arrive in parts, by pairwise updates in fp64 (Chan, Golub, LeVeque 1979)."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    def add(self, features: Float[Tensor, "n dim"]) -> None:
        """Raises ValueError for another number of features, or values that are not finite."""
        if features.shape[1] != len(self.mean):
            raise InputError(f"features of {features.shape[1]} numbers after some of {len(self.mean)}")
        if not features.isfinite().all():
            raise InputError("features hold values that are not finite: the pictures they come from are broken")
        if not len(features):
            return
        x = features.detach().to("cpu", torch.float64)
        mean, n, total = x.mean(0), len(x), self.count + len(x)
        x, shift = x - mean, mean - self.mean
        self.scatter += x.T @ x + shift.outer(shift) * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def gaussian(self, force: bool = False) -> Gaussian:
        """Raises ValueError below dim + 1 vectors, where the covariance is singular, unless forced; and below two."""
        return _checked(Gaussian(self.mean, self.scatter / max(1, self.count - 1), self.count), force)


def _checked(g: Gaussian, force: bool) -> Gaussian:
    if g.count < 2 or (g.count <= g.dim and not force):
        raise InputError(
            f"{g.count} pictures for {g.dim} features: the covariance needs at least {g.dim + 1} to be of full rank; "
            "take more pictures, or force=True for a distance that is biased far upwards"
        )
    return g


def gaussian(features: Float[Tensor, "n dim"] | Iterable[Tensor], force: bool = False) -> Gaussian:
    """The Gaussian of features (n, dim), whole or in parts. ValueError below dim + 1 vectors unless forced."""
    parts = iter([features] if isinstance(features, Tensor) else features)
    first = next(parts, None)
    if first is None:
        raise InputError("no features: give at least one part")
    moments = Moments(first.shape[1])
    moments.add(first)
    for part in parts:
        moments.add(part)
    return moments.gaussian(force)


def root(cov: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """The symmetric square root of a covariance; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def parts_of(a: Gaussian, b: Gaussian, b_root: Float[Tensor, "dim dim"] | None = None) -> tuple[float, float]:
    """(|μ₁ − μ₂|², the rest) of the distance between two Gaussians; b_root: root(b.cov), if it is known already."""
    if a.dim != b.dim:
        raise InputError(f"Gaussians of {a.dim} and {b.dim} features cannot be compared")
    half = root(b.cov) if b_root is None else b_root
    middle = half @ a.cov @ half
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    mean = (a.mean - b.mean).square().sum()
    return mean.item(), (a.cov.trace() + b.cov.trace() - 2 * cross).clamp(min=0).item()


def resamples(n: int, draws: int, seed: int = 0) -> Int[Tensor, "draws n"]:
    """Keyed bootstrap indices: the same for every setting of n pictures, so that their differences are paired."""
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


@one_thread_for(few_features)
def frechet_distance(
    features: Float[Tensor, "n dim"],
    reference: Gaussian,
    draws: int = 0,
    groups: int = 0,
    seed: int = 0,
    force: bool = False,
) -> Frechet:
    """Fréchet distance of features (n, dim) to a reference, N stated.

    draws: bootstrap resamples for `error`. groups: disjoint groups of consecutive rows, each with its own distance (at
    the smaller N, so each is larger). force: allow n or a group below dim + 1.
    Raises ValueError for too few pictures, a dimension other than the reference's, or values that are not finite.
    """
    _checked(reference, force)
    half = root(reference.cov)
    x = features.detach().to("cpu", torch.float64)
    mean, cov = parts_of(gaussian(x, force), reference, half)

    def at(rows: Tensor) -> float:
        return sum(parts_of(gaussian(rows, True), reference, half))

    n = len(x)
    small = n // 2 <= reference.dim
    extrapolated = math.nan if small else 2 * (mean + cov) - (at(x[0::2]) + at(x[1::2])) / 2
    if groups and n // groups <= reference.dim and not force:
        raise InputError(
            f"{groups} groups of {n // groups} pictures for {reference.dim} features: each needs {reference.dim + 1}; "
            "take fewer groups"
        )
    apart = tuple(at(part) for part in x[: n // groups * groups].split(n // groups)) if groups else ()
    drawn = tuple(at(x[index]) for index in resamples(n, draws, seed))
    error = torch.tensor(drawn, dtype=torch.float64).std().item() if draws > 1 else math.nan
    return Frechet(mean + cov, mean, cov, n, reference.count, reference.dim, extrapolated, error, apart, drawn)
