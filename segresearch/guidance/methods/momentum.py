"""Momentum Guidance: away from the mean of the velocities at earlier sigmas."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Fraction, NonNegative, Number
from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class Momentum:
    """Momentum Guidance, arXiv 2602.20360: v′ = v + α·(v − m), m ← (1 − β)·v + β·m, m = v at the first σ.

    v is the velocity of the sampling ODE. With the sign of the paper's time (towards the image) v = (D − x)/σ here, so
    D′ = D + α·σ·(v − m). m takes the v before the change.

    alpha: α. beta: β. low, high: σ at which it acts, both included; m is kept up everywhere. Published: α 0.5, β 0.6,
    t in [0.05, 0.7] of a flow model with noise level 1 − t, which is σ/(1 + σ) here: σ from 3/7 to 19. The paper has
    flow models and Euler steps only, so for SDXL all of this is a carry-over. Its option to normalise m is not here.

    pamparamm's node is another formula: D + α·(D − mean of D), without σ.

    Raises InputError for an alpha that is not finite, a beta outside [0, 1] or low > high.
    """

    kind: Literal["momentum"] = field(default="momentum", kw_only=True, repr=False)
    alpha: Number = 0.5
    beta: Fraction = 0.6
    low: NonNegative = 3 / 7
    high: NonNegative = 19.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0 <= self.beta <= 1 and 0 <= self.low <= self.high):
            raise InputError(f"momentum needs a finite alpha, beta in [0, 1] and 0 <= low <= high, got {self}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """D′."""
        sigma = step.noise_level
        velocity = -step.eps(guided)
        previous = step.past.read()
        mean = velocity if previous is None else previous
        step.past.write(torch.lerp(velocity, mean, self.beta))
        moved = guided + self.alpha * sigma * (velocity - mean)
        return torch.where((sigma >= self.low) & (sigma <= self.high), moved, guided)
