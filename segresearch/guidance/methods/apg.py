"""Adaptive Projected Guidance, as the shape of one term."""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative, Number
from segresearch.guidance.step import Latents, Step, along
from segresearch.guidance.step import norm as l2_norm


@dataclass(frozen=True)
class APG:
    """APG, arXiv 2410.02416, in denoised space: Δ loses its part along D[pos] and is held to a norm.

    m ← Δ + β·m over the sigmas of a run, m′ = min(1, r/‖m‖)·m, and Δ′ = m′⊥ + η·m′∥, with ∥ along D[pos].

    eta: η. norm: r, an L2 norm over an image; inf is no limit. momentum: β; 0 keeps no state.
    Published for SDXL: η 0, r 15, β −0.5, weight 15. `Projected` has the same projection without β, on the whole sum of
    the terms and along D[base].

    Other conventions: the paper adds (w − 1)·Δ′ to D[cond], as `cfg(w, shape=APG())` does. ComfyUI adds w·Δ′ to
    D[cond], which is `cfg(w + 1)`. diffusers adds w·Δ′ to the *unconditional* raw output: in denoised space that is a
    term of scale w on base "uncond", and an eps model's raw output is another space.

    Raises InputError for a negative eta or norm, or a momentum outside (−1, 1).
    """

    kind: Literal["apg"] = field(default="apg", kw_only=True, repr=False)
    eta: NonNegative = 0.0
    norm: NonNegative = 15.0
    momentum: Number = -0.5

    def __post_init__(self) -> None:
        if not (self.eta >= 0 and self.norm >= 0 and math.isfinite(self.eta) and -1 < self.momentum < 1):
            raise InputError(f"APG needs a finite eta >= 0, norm >= 0 and -1 < momentum < 1, got {self}")

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ′."""
        delta = pos - neg
        if self.momentum:
            previous = step.past.read()
            delta = delta if previous is None else delta + self.momentum * previous
            step.past.write(delta)
        delta = delta * (self.norm / l2_norm(delta).clamp_min(1e-30)).clamp_max(1.0)
        return delta - (1 - self.eta) * along(delta, pos)
