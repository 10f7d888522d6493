"""What may be done to a guided prediction after the terms are summed.

A post-processor is a call `(guided, step) -> guided`, on denoised images (`guidance.step`). Unlike the sum of terms
these do not commute with the change between eps, denoised and v, so each says where it acts.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step, along, norm


def rescale(guided: Latents, plain: Latents, x: Latents, phi: float | int) -> Latents:
    """Lin et al., arXiv 2305.08891, Section 3.4: bring the guided prediction's spread back to the plain one's, by φ.

    Acts in eps space, ε → φ·ε·std(ε_plain)/std(ε) + (1 − φ)·ε, unbiased std over all axes but the rows. With
    ε = (x − D)/σ the σ cancels, so it is not an argument.
    """
    noise, reference = x - guided, x - plain  # σ·ε
    spread, target = (z.std(dim=(1, 2, 3), keepdim=True) for z in (noise, reference))  # (b, 1, 1, 1)
    return x - noise * (phi * (target / spread.clamp_min(1e-30)) + (1 - phi))


@dataclass(frozen=True)
class Projected:
    """The projection and norm limit of APG (arXiv 2410.02416), without its momentum, which is state between steps.

    Acts in denoised space, on the whole guidance Δ = D − D[base]: Δ is shortened to at most `norm` (L2 norm over an
    image), then its component along D[base] is multiplied by `eta` (1 keeps it all, 0 removes it).

    Raises ValueError for a negative or NaN eta or norm.
    """

    kind: Literal["projected"] = field(default="projected", kw_only=True, repr=False)
    eta: NonNegative = 0.0
    norm: NonNegative = math.inf

    def __post_init__(self) -> None:
        if not (self.eta >= 0 and self.norm >= 0):
            raise InputError(f"eta and norm must be >= 0, got {self}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """D[base] + Δ⊥ + eta·Δ∥."""
        delta = guided - step.plain
        delta = delta * (self.norm / norm(delta).clamp_min(1e-30)).clamp_max(1.0)
        return step.plain + delta - (1 - self.eta) * along(delta, step.plain)
