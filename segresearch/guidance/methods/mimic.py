"""Dynamic thresholding to the range that a lower weight would give (mimic scale)."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Fraction, Number
from segresearch.guidance.methods.thresholding import quantile
from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class Mimic:
    """sd-dynamic-thresholding (mcmonkey, no paper), in denoised space: CFG of weight w in the range of weight `mimic`.

    For each image and channel, with spatial means taken off: a = max |D[neg] + mimic·Δ|, b the percentile of
    |D[neg] + w·Δ|, t = max(a, b), and D = mean + clip(·, −t, t)·a/t of the one of weight w. Written for D[pos] as base.

    Published defaults: mimic 7 with weights of 15 to 30, percentile 1, phi 1. phi: how far, 0 is plain CFG of weight w.
    Of that program's options this is startpoint MEAN, variability AD, each channel by itself; its schedules of the two
    scales are not here (`Schedule` gives one to w).

    Raises InputError for a percentile or phi outside [0, 1] or a mimic that is not finite.
    """

    kind: Literal["mimic"] = field(default="mimic", kw_only=True, repr=False)
    mimic: Number = 7.0
    percentile: Fraction = 1.0
    phi: Fraction = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.percentile <= 1 and 0 <= self.phi <= 1 and math.isfinite(self.mimic)):
            raise InputError(f"mimic must be finite, percentile and phi in [0, 1], got {self}")

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """(D − D[base])/s."""
        low, high = (neg + weight * (pos - neg) for weight in (self.mimic, step.scale + 1))
        mean = high.mean(dim=(2, 3), keepdim=True)  # (b, c, 1, 1)
        low, centred = low - low.mean(dim=(2, 3), keepdim=True), high - mean
        target = low.abs().amax(dim=(2, 3), keepdim=True)
        limit = torch.maximum(target, quantile(centred.abs().flatten(2), self.percentile)[..., None]).clamp_min(1e-30)
        held = mean + centred.clamp(-limit, limit) * (target / limit)
        return step.reaching(torch.lerp(high.to(held.dtype), held, self.phi), pos)
