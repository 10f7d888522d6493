"""Frequencies of latents: the levels of a pyramid, and a high-pass filter in the discrete cosine transform."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from segresearch.guidance.blur import constant, fold_taps
from segresearch.guidance.step import Latents, wide

SHARPNESS = 50.0  # of the edge of the filter


@constant
def _binomial(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "{n} {n}"]:
    distance = (torch.arange(5, dtype=dtype, device=device) - 2).abs()
    return fold_taps((12 - 3 * distance - distance**2) / 32, n, "reflect")  # 1 4 6 4 1, over 16


def smooth(z: Latents) -> Latents:
    """The 5 × 5 binomial filter, mirrored about the end samples."""
    h, w = z.shape[2:]
    return _binomial(h, z.dtype, z.device) @ z @ _binomial(w, z.dtype, z.device).mT


def halved(z: Latents) -> Float[Tensor, "rows c half_h half_w"]:
    """The next coarser level of a Gaussian pyramid: smoothed, then half of each side, rounded down, bilinear."""
    h, w = z.shape[2:]
    return F.interpolate(smooth(z), size=(h // 2, w // 2), mode="bilinear")


def grown(z: Float[Tensor, "rows c half_h half_w"], size: Sequence[int]) -> Latents:
    """The next finer level, of this size: bilinear, then smoothed."""
    return smooth(F.interpolate(z, size=tuple(size), mode="bilinear"))


@constant
def cosines(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "{n} {n}"]:
    """The orthonormal DCT-II as a matrix, a row for each frequency."""
    k = torch.arange(n, device=device)
    phase = (2 * k + 1) * k[:, None] % (4 * n)  # of a period of 4n
    matrix = (math.pi / (2 * n) * phase.to(dtype)).cos() * math.sqrt(2 / n)
    return torch.where(k[:, None] == 0, matrix * math.sqrt(0.5), matrix)


def high_pass(z: Latents, cutoff: float | int) -> Latents:
    """iDCT(H·DCT(z)), H = sigmoid(50·(R − cutoff)), R the length of the frequency (u/h, v/w)."""
    z = wide(z)
    h, w = z.shape[2:]
    down, across = (cosines(n, z.dtype, z.device) for n in (h, w))
    u, v = (torch.arange(n, dtype=z.dtype, device=z.device) / n for n in (h, w))
    gain = (SHARPNESS * ((u[:, None] ** 2 + v**2).sqrt() - cutoff)).sigmoid()
    return down.mT @ (gain * (down @ z @ across.mT)) @ across
