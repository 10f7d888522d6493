"""SG-prev: guidance away from the prediction of the level before."""

from dataclasses import dataclass, field
from typing import Literal

from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class SGPrev:
    """SG-prev of Self-Guidance, arXiv 2412.05827: Δ = D[pos] − D[pos] at the level before; 0 at the first. No extra row.

    The noisier prediction takes the place of Self-Guidance's D[pos] at t + δ. `neg` is not read: a term of this shape
    has neg = pos. In denoised space, as the difference of the two predictions of the clean image [the paper's repository
    differs by model and was not read]. Published: s 3, and only for t < 500 (σ < 1.62 for SDXL): the interval of the
    term. The first level in the interval only records. Meant for first-order ODE samplers.
    """

    kind: Literal["sg_prev"] = field(default="sg_prev", kw_only=True, repr=False)

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """D[pos] − D[pos] before."""
        previous = step.past.read()
        step.past.write(pos)
        return pos - (pos if previous is None else previous)
