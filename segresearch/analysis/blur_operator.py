"""The blur as a matrix B = B_h ⊗ B_w: its determinant, diagonal and traces, from its 1-D factors alone."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.blur import INFINITE, blur_matrix, check_blur

Signal = Float[Tensor, "*batch n"]


def log_spectrum(n: int, sigma: float | int, boundary: str) -> Float[Tensor, " {n}"]:
    """log |λ| of the n eigenvalues of `blur_matrix(n, sigma, boundary)`, fp64; −inf where it is singular.

    Each boundary has its cosines: period n (circular), half samples (symmetric, exact) and whole samples (reflect,
    whose matrix is not symmetric but similar to a diagonal one). For a cut filter the eigenvalue is the first row times
    the cosine, and one below 8n·eps counts as 0. The exact Gaussian has theta functions for eigenvalues, by
    Poisson's sum ∝ Σ_m exp(−½σ²(ω + 2πm)²): in log space they are good to any σ, far below what a matrix can hold.
    """
    k = torch.arange(n, dtype=torch.float64)
    if sigma == 0:
        return torch.zeros(n, dtype=torch.float64)
    if sigma > INFINITE:
        return torch.where(k == 0, 0.0, -math.inf)
    if boundary == "exact" and sigma > 0.3:
        turns = 2 * math.pi * torch.arange(-10, 11, dtype=torch.float64)
        theta = torch.logsumexp(-0.5 * (sigma * (math.pi * k[:, None] / n + turns)) ** 2, dim=1)
        return theta - theta[0]
    first = blur_matrix(n, sigma, boundary)[0]
    offset, half_period = {"circular": (0, n / 2), "reflect": (0, max(n - 1, 1))}.get(boundary, (0.5, n))
    waves = torch.cos(math.pi * k[:, None] * (k + offset) / half_period)  # (frequency, token)
    values = (waves @ first / waves[:, 0]).abs()
    return torch.where(values > 8 * n * torch.finfo(torch.float64).eps, values, 0.0).log()


@dataclass(frozen=True)
class BlurOperator:
    """The blur B = B_h ⊗ B_w of one grid, n = h·w tokens. sigma in tokens; boundary as in `blur_matrix`.

    Rows of B sum to 1 under every boundary (B·1 = 1). Columns do so, which keeps the mean of every signal (Lemma 3.1),
    under all but "reflect". Raises InputError for a bad sigma or boundary or an empty grid.
    """

    grid: tuple[int, int]
    sigma: float | int
    boundary: str = "reflect"

    def __post_init__(self) -> None:
        check_blur(self.sigma, self.boundary)
        if min(self.grid) < 1:
            raise InputError(f"a grid needs at least one token, got {self.grid[0]}x{self.grid[1]}")

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def factors(self) -> tuple[Float[Tensor, "h h"], Float[Tensor, "w w"]]:
        """(B_h, B_w), fp64."""
        down, across = (blur_matrix(side, self.sigma, self.boundary) for side in self.grid)
        return down, across

    @cached_property
    def log_det(self) -> float:
        """log |det B| = w·log|det B_h| + h·log|det B_w|; −inf where B is singular (every σ > 9999 with n > 1)."""
        h, w = self.grid
        down, across = (float(log_spectrum(side, self.sigma, self.boundary).sum()) for side in self.grid)
        return w * down + h * across

    @cached_property
    def log_diagonal(self) -> float:
        """Σ log b_ii of the centre weights, at most 0."""
        return float(torch.outer(*(factor.diagonal() for factor in self.factors)).flatten().log().sum())

    @property
    def row_norms_squared(self) -> Float[Tensor, " n"]:
        """(B Bᵀ)_ii = Σ_j b_ij², at most 1."""
        return torch.outer(*(factor.square().sum(dim=1) for factor in self.factors)).flatten()  # (h), (w) -> (h·w)

    def dense(self) -> Float[Tensor, "n n"]:
        """B itself: n² numbers, for small grids."""
        return torch.kron(*self.factors)

    def apply(self, x: Signal) -> Signal:
        """B x along the last axis, in the dtype of x."""
        return self._separable(x, *self.factors)

    def adjoint(self, x: Signal) -> Signal:
        """Bᵀ x along the last axis."""
        return self._separable(x, *(factor.T for factor in self.factors))

    def _separable(self, x: Tensor, down: Tensor, across: Tensor) -> Tensor:
        h, w = self.grid
        if h * w != x.shape[-1]:
            raise InputError(f"grid {h}x{w} has {h * w} cells, but there are {x.shape[-1]} entries")
        image = x.reshape(-1, w) @ across.to(x).T  # (..., h·w) -> (...·h, w)
        return (down.to(x) @ image.reshape(-1, h, w)).reshape(x.shape)  # (..., h, w) -> (..., h·w)
