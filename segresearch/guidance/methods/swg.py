"""Sliding window guidance."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import ceil
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Count, Fraction
from segresearch.guidance.blur import constant
from segresearch.guidance.step import Latents, Step

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Windows:
    """Overlapping crops: `per_side`² of them, each `crop` of the image's sides, evenly spaced from edge to edge.

    A side of the crops is rounded up to whole latents, their starts down. 5/8 and 2 overlap by 0.4 of a crop.
    """

    crop: Fraction = 0.625
    per_side: Count = 2

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1 or self.crop * self.per_side < 1 or (self.per_side == 1 and self.crop < 1):
            raise InputError(f"{self}: {self.per_side} crops a side of {self.crop!r} of it do not cover the image")

    def windows(self, h: int, w: int) -> Iterator[Window]:
        """The crops of an image of h × w latents."""

        def spans(side: int) -> list[slice]:
            length, gaps = ceil(self.crop * side - 1e-9), max(self.per_side - 1, 1)
            starts = [(side - length) * i // gaps for i in range(self.per_side)]
            return [slice(start, start + length) for start in starts]

        return product(spans(h), spans(w))


@dataclass(frozen=True)
class SWG(Windows):
    """Sliding Window Guidance, arXiv 2411.10257: the weak branch sees crops of x and joins them by averaging.

    D = D[c] + s·(D[c] − D[c~swg]), the same in every space. Published: 2×2 crops of 5/8 of the side, which overlap by
    0.4 (EDM2, 64² latents); the port for ComfyUI takes crops of 768 px, overlap 256, s 5 and σ > 5.42 on SDXL, and its
    crops differ from these. The crops keep the conditioning as it is, with the sizes of the whole image (SDXL's
    time_ids); a crop's own would be another choice. In the official code a last crop that does not reach the edge
    leaves 0/0 there, here it always reaches it. One crop of the whole image is the plain branch. Cost: per_side²·crop²
    of a plain branch (1.56), without a fork.
    """

    kind: Literal["swg"] = field(default="swg", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "view"

    def split(self, z: Float[Tensor, "rows c h w"]) -> Float[Tensor, "parts_rows c h2 w2"]:
        """The crops of all rows, crop after crop."""
        return torch.cat([z[..., rows, columns] for rows, columns in self.windows(*z.shape[2:])])

    def join(self, denoised: Float[Tensor, "parts_rows c h2 w2"], like: Latents) -> Latents:
        """The mean of the crops, wherever they overlap."""
        total = torch.zeros_like(like, dtype=denoised.dtype)
        for part, (rows, columns) in zip(denoised.split(len(like)), self.windows(*like.shape[2:]), strict=True):
            total[..., rows, columns] += part
        return total / coverage(self.crop, self.per_side, *like.shape[2:], total.device).to(total.dtype)


@dataclass(frozen=True)
class Overlap(Windows):
    """The mask of M-SWG, the official default: the term acts only where two or more crops meet, [count > 1]·Δ.

    In denoised space. Give it the crop and per_side of the term's `SWG`.
    """

    kind: Literal["swg_mask"] = field(default="swg_mask", kw_only=True, repr=False)

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """(D[pos] − D[neg]) where crops overlap, 0 elsewhere."""
        return (pos - neg) * (coverage(self.crop, self.per_side, *pos.shape[2:], pos.device) > 1)


@constant
def coverage(crop: float, per_side: int, h: int, w: int, device: torch.device) -> Float[Tensor, "{h} {w}"]:
    """How many crops each latent lies in."""
    count = torch.zeros(h, w, device=device)
    for rows, columns in Windows(crop, per_side).windows(h, w):
        count[rows, columns] += 1
    return count
