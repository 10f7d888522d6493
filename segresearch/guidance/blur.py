"""The separable Gaussian blur of Smoothed Energy Guidance (SEG, arXiv 2408.00760, Definition 2.1).

A blur is two dense per-axis matrices, B = B_h ⊗ B_w. At the sizes of attention grids two small matmuls are as fast as a
convolution, the analysis reads the same factors, and a boundary is one rule for filling a matrix.
"""

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError

BOUNDARIES = ("reflect", "symmetric", "circular", "exact")
INFINITE = 9999.0  # a sigma above this means infinity, as in the official code; 9999 itself is finite


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for a function of hashable values that gives a small tensor: it is made once for each set of values.

    All are kept, for a CUDA graph may read them; `cache_clear()` drops them. Such a tensor serves gradients too,
    wherever it was first made. torch.compile sees the function without its cache. So what makes the tensor must run on
    the device, without a copy from the CPU, wherever a perturbation calls it: a CUDA graph could not hold that copy.
    """
    cached = cache(torch.inference_mode(False)(function))

    @wraps(function)
    def call(*values: Any) -> Any:
        return function(*values) if torch.compiler.is_compiling() else cached(*values)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call


def check_blur(sigma: float | int, boundary: str) -> None:
    """ValueError unless `sigma` is a number ≥ 0 (tokens; inf allowed) and `boundary` is one of `BOUNDARIES`."""
    if not sigma >= 0:  # NaN fails too
        raise InputError(f"blur sigma must be a number >= 0 (0 = identity, inf = mean over the grid), got {sigma!r}")
    if boundary not in BOUNDARIES:
        raise InputError(f"blur boundary must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")


CPU = torch.device("cpu")


def gaussian_taps(sigma: float | int, size: int, device: torch.device = CPU) -> Float[Tensor, "{size}"]:
    """`size` (odd) samples of exp(−½(x/σ)²) at the integers around 0, normalised after truncation, fp64."""
    x = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    return taps / taps.sum()


def fold_taps(taps: Float[Tensor, " size"], n: int, boundary: str) -> Float[Tensor, "{n} {n}"]:
    """The n×n matrix of a 1-D filter (odd number of taps) on n samples, whose extension beyond the ends is `boundary`.

    "reflect" mirrors about the end sample (period 2n − 2, needs size//2 ≤ n − 1 only for parity with padding; longer
    filters go on reflecting), "symmetric" mirrors about the half sample beyond it (period 2n), "circular" has period n.
    """
    size = taps.shape[0]
    offsets = torch.arange(size, device=taps.device) - size // 2
    at = torch.arange(n, device=taps.device)[:, None] + offsets  # (n, size): the extended position each tap reads
    if boundary == "circular":
        source = at % n
    elif boundary == "symmetric":
        source = torch.where(at % (2 * n) < n, at % (2 * n), 2 * n - 1 - at % (2 * n))
    else:
        period = max(2 * n - 2, 1)
        source = torch.where(at % period < n, at % period, period - at % period)
    matrix = torch.zeros(n, n, dtype=taps.dtype, device=taps.device)
    return matrix.scatter_add_(1, source, taps.expand(n, size))


@constant
def _matrix(n: int, sigma: float | int, boundary: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    # in fp64, so on the CPU, for some devices have none; compiled code makes it where it is used (never that of 0 or ∞)
    where = device if torch.compiler.is_compiling() else CPU
    if sigma == 0:
        matrix = torch.eye(n, dtype=torch.float64)
    elif sigma > INFINITE:
        matrix = torch.full((n, n), 1 / n, dtype=torch.float64)
    elif boundary == "exact":
        # The whole Gaussian: beyond 9σ a tap is under 3e-18 of the largest. First sum it over the period 2n of the
        # symmetric extension, so that memory stays n × 2n whatever sigma is, then fold.
        radius = math.ceil(9 * sigma)
        taps = gaussian_taps(sigma, 2 * radius + 1, where)
        wrapped = torch.zeros(2 * n, dtype=torch.float64, device=where)
        wrapped.index_add_(0, torch.arange(-radius, radius + 1, device=where) % (2 * n), taps)
        j = torch.arange(n, device=where)
        i = j[:, None]
        matrix = wrapped[(i - j) % (2 * n)] + wrapped[(i + j + 1) % (2 * n)]
    else:
        size = math.ceil(6 * sigma) | 1  # smallest odd number ≥ ⌈6σ⌉
        taps = gaussian_taps(sigma, min(size, n | 1), where)  # n | 1: n + 1 if n is even, else n
        matrix = fold_taps(taps, n, boundary)
    return matrix.to(device=device, dtype=dtype)


def blur_matrix(n: int, sigma: float | int, boundary: str = "reflect") -> Float[Tensor, "{n} {n}"]:
    """One axis of the blur as a dense matrix B, fp64, on the CPU: blurred = B @ signal.

    Args:
        n: grid side, in tokens.
        sigma: standard deviation in tokens. 0 is the identity; above 9999 every entry is 1/n; 9999 itself is finite.
        boundary: "reflect" is the official code's filter: as many taps as the smallest odd number ≥ ⌈6σ⌉, at most n
            (n odd) or n + 1 (n even), normalised after truncation, mirrored about the end sample. Its rows sum to 1 but
            its columns do not, so it breaks the assumption of Lemma 3.1 (arXiv 2408.00760), and because of the cut
            it never tends to the mean: σ → ∞ is a jump. "symmetric" and "circular" are the same taps with a doubly
            stochastic extension. "exact" is the Gaussian without any cut on the symmetric extension: symmetric,
            doubly stochastic, and continuous up to the mean at σ → ∞.

    Raises ValueError for a negative or NaN sigma, an unknown boundary or n < 1.
    """
    check_blur(sigma, boundary)
    if n < 1:
        raise InputError(f"a grid side must be at least 1, got {n}")
    return _matrix(n, float(sigma), boundary, torch.float64, torch.device("cpu")).clone()


def blur(
    z: Float[Tensor, "rows heads tokens dim"], grid: tuple[int, int], sigma: float | int, boundary: str = "reflect"
) -> Float[Tensor, "rows heads tokens dim"]:
    """Blur every channel of `z` as an image of `grid` = (h, w) tokens: (B_h ⊗ B_w) z (arXiv 2408.00760, Prop. 3.1).

    `sigma` is in tokens: 0 returns `z` itself, above 9999 every token becomes the mean over the grid (an expanded
    view), per head and channel. Boundaries: see `blur_matrix`. Half precisions are filtered in fp32 and rounded once
    (the official code filters in the network's dtype). The matrices of a tensor in fp64 are fp64.

    Raises ValueError for a negative or NaN sigma or an unknown boundary, or if the grid does not have `tokens` cells.
    """
    check_blur(sigma, boundary)
    h, w = grid
    if h * w != z.shape[2]:
        raise InputError(f"grid {h}x{w} has {h * w} cells, but the tensor has {z.shape[2]} tokens")
    if sigma == 0:
        return z
    wide = torch.promote_types(z.dtype, torch.float32)
    if sigma > INFINITE:
        return z.mean(dim=2, keepdim=True, dtype=wide).to(z.dtype).expand_as(z)
    rows, heads, _, dim = z.shape
    down = _matrix(h, float(sigma), boundary, wide, z.device)
    across = _matrix(w, float(sigma), boundary, wide, z.device)
    image = down @ z.to(wide).reshape(rows * heads, h, w * dim)  # (r, H, h·w, d) -> (r·H, h, w·d)
    image = across @ image.reshape(rows * heads * h, w, dim)  # -> (r·H·h, w, d)
    return image.reshape(z.shape).to(z.dtype)
