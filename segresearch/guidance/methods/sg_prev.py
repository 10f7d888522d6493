"""SG-prev: guidance away from the prediction at the sigma before."""

from dataclasses import dataclass, field
from typing import Literal

from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class SGPrev:
    """SG-prev of Self-Guidance, arXiv 2412.05827: Δ = D[pos] − D[pos] at the σ before; 0 at the first σ.

    The noisier prediction takes the place of Self-Guidance's D[pos] at t + δ, without an extra row. `neg` is not read:
    a term of this shape has neg = pos. Here it is the difference of two predictions of the clean image, in denoised
    space [the space of the authors' code was not checked]. Published: s 3, and only for t < 500, which is σ < 1.62 for
    SDXL and goes into the interval of the term. The first σ of the interval only records. Meant for ODE samplers of
    first order.
    """

    kind: Literal["sg_prev"] = field(default="sg_prev", kw_only=True, repr=False)

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """D[pos] − D[pos] before."""
        previous = step.past.read()
        step.past.write(pos)
        return pos - (pos if previous is None else previous)
