"""Temporal Score Rescaling, with eps-scaling as its limit."""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class TSR:
    """TSR, arXiv 2510.01184: ε′ = ε·(s²/σ² + 1)/(s²/(k·σ²) + 1), in eps space.

    k: below 1 sharpens the distribution, above 1 widens it, 1 changes nothing. spread: s, the spread of the data around
    a mode; the larger, the earlier it acts. s²/σ² is the paper's η·s² (η the signal-to-noise ratio). Published: k 0.93
    to 0.95, s 1 to 3 (ComfyUI's `tsr_k` 0.95, `tsr_sigma` 1).

    spread=inf is ε′ = k·ε at every σ: the uniform eps-scaling of arXiv 2308.15321, whose (and ComfyUI's) λ is 1/k, such
    as 1.005.

    Raises InputError unless 0 < k < ∞ and spread > 0.
    """

    kind: Literal["tsr"] = field(default="tsr", kw_only=True, repr=False)
    k: NonNegative = 0.95
    spread: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.k < math.inf and self.spread > 0):
            raise InputError(f"TSR needs a positive, finite k and a positive spread, got {self}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """x − σ·ε′."""
        noise = (step.noise_level / self.spread) ** 2  # σ²/s², 0 where s is infinite
        return guided + (1 - (1 + noise) / (1 / self.k + noise)) * (step.x - guided)
