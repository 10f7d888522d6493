"""History-Guided Sampling: the new high frequencies of a prediction, amplified."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Fraction, NonNegative
from segresearch.guidance.frequencies import high_pass
from segresearch.guidance.step import Latents, Step, along


@dataclass(frozen=True)
class HiGS:
    """HiGS, arXiv 2509.22300: D′ = D + w(t)·high_pass(D − g), in denoised space, g the running mean of earlier D.

    g ← α·D + (1 − α)·g from g = 0; the first sigma only records. The part of D − g along D is multiplied by `eta`.
    w(t) = weight·√((t − t_min)/(t_max − t_min)) for t_min < t ≤ t_max, else 0; here t = σ/(1 + σ), the noise level of
    the flow path with the same signal-to-noise ratio.

    Published: weight 1.75, eta 0 or 1, alpha 0.5 or 0.75, cutoff 0.05, t from 0.3–0.5 to 0.9–1. [Formula and numbers by
    third parties' summaries; the paper's own t for SDXL is not known, and no code of the authors was read.] It is
    reported to destroy images with multistep samplers, which extrapolate already.

    Raises InputError for alpha, eta or times outside [0, 1], t_min ≥ t_max, or an infinite weight.
    """

    kind: Literal["higs"] = field(default="higs", kw_only=True, repr=False)
    weight: NonNegative = 1.75
    alpha: Fraction = 0.75
    eta: Fraction = 1.0
    cutoff: NonNegative = 0.05
    t_min: Fraction = 0.4
    t_max: Fraction = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.eta <= 1 and 0 <= self.t_min < self.t_max <= 1):
            raise InputError(f"HiGS needs alpha, eta in [0, 1] and 0 <= t_min < t_max <= 1, got {self}")
        if not 0 <= self.weight < math.inf:
            raise InputError(f"HiGS weight must be a finite number >= 0, got {self.weight!r}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """D′."""
        past = step.past.read()
        step.past.write(self.alpha * guided if past is None else torch.lerp(past, guided, self.alpha))
        if past is None:
            return guided
        change = guided - past
        change = change - (1 - self.eta) * along(change, guided)
        t = step.noise_level / (1 + step.noise_level)
        weight = self.weight * ((t - self.t_min) / (self.t_max - self.t_min)).clamp_min(0).sqrt()
        return guided + torch.where(t > self.t_max, 0.0, weight) * high_pass(change, self.cutoff)
