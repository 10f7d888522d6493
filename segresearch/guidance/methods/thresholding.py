"""Dynamic thresholding of Imagen, on the guided prediction."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Fraction, NonNegative
from segresearch.guidance.step import Latents, Step


def quantile(z: Float[Tensor, "*rows n"], p: float | int) -> Float[Tensor, "*rows 1"]:
    """The p-quantile over the last axis, linear between values; without the size limit of `torch.quantile`."""
    ordered = z.to(torch.promote_types(z.dtype, torch.float32)).sort(dim=-1).values
    place = p * (z.shape[-1] - 1)
    below, above = math.floor(place), math.ceil(place)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], place - below)


@dataclass(frozen=True)
class Threshold:
    """Imagen, arXiv 2205.11487, Section 2.3, in denoised space: D′ = clip(D, −t, t)·bound/t, t = max(bound, quantile).

    percentile: of |D| over an image, 0.995. bound: the largest value of an image, 1 in pixels. Latents have no such
    bound, so there is no published value for SDXL; conf/guidance/threshold.yaml takes 3, three standard deviations of
    the latents it was made for. diffusers' `dynamic_thresholding_ratio` is `percentile`; its `sample_max_value` holds t
    down and is not here.

    Raises InputError for a percentile outside [0, 1] or a bound that is not positive and finite.
    """

    kind: Literal["threshold"] = field(default="threshold", kw_only=True, repr=False)
    percentile: Fraction = 0.995
    bound: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.percentile <= 1 and 0 < self.bound < math.inf):
            raise InputError(f"thresholding needs a percentile in [0, 1] and a positive bound, got {self}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """D′."""
        limit = quantile(guided.abs().flatten(1), self.percentile).clamp_min(self.bound)[..., None, None]
        return guided.clamp(-limit, limit) * (self.bound / limit)
