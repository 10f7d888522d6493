"""MAMBO-G: less guidance where the difference is large."""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step, norm


@dataclass(frozen=True)
class MamboG:
    """MAMBO-G, arXiv 2508.03442: Δ′ = exp(−α·‖v_pos − v_neg‖/‖v_neg‖)·Δ, so w_eff = 1 + (w − 1)·exp(…).

    v is the velocity of the sampling ODE, here ε = (x − D)/σ (as for CFG-Zero*), in which the ratio is
    ‖Δ‖/‖x − D[neg]‖. Published: α 8 and w 10, on flow models. An eps model's ratio is small (ε is mostly the noise in
    x), so the damping is weak there; a larger α makes up for it.

    diffusers' guider has the same formula on raw outputs, but raises on images (a norm over three axes); its "original"
    form c + w·exp(…)·Δ is weight w + 1 here.

    Raises InputError for an alpha that is negative or not finite.
    """

    kind: Literal["mambo"] = field(default="mambo", kw_only=True, repr=False)
    alpha: NonNegative = 8.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"MAMBO-G alpha must be a finite number >= 0, got {self.alpha!r}")

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ′."""
        delta = pos - neg
        return (-self.alpha * norm(delta) / norm(step.x - neg).clamp_min(1e-30)).exp() * delta
