"""Rescaled guidance as a post-processor, in v or eps space."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from segresearch.errors import InputError
from segresearch.fields import Fraction, one_of
from segresearch.guidance.postprocess import rescale
from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class Rescale:
    """Rescale, arXiv 2305.08891, Section 3.4: φ·v·std(v_base)/std(v) + (1 − φ)·v, std over all axes but the rows.

    With v = (α·ε − s·D), α = 1/√(1 + σ²), s = σ·α: v is x − (1 + σ²)·D times a factor of σ, and the factor cancels. At
    σ → 0 v is ε, at σ → ∞ it is −D.

    phi: φ, published 0.7. space: "v" (the paper's, whose model predicts v; ComfyUI's RescaleCFG at an eps or v model)
    or "eps" (diffusers' `guidance_rescale` at an eps model, and `rescale` of GuidedDenoiser). Against D[base], at every
    σ, whatever the terms are; `rescale` of GuidedDenoiser acts only where CFG is on.

    Raises InputError for phi outside [0, 1] or an unknown space.
    """

    kind: Literal["rescale"] = field(default="rescale", kw_only=True, repr=False)
    phi: Fraction = 0.7
    space: Annotated[str, one_of("v", "eps")] = "v"

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1 or self.space not in ("v", "eps"):
            raise InputError(f'rescale needs phi in [0, 1] and space="v" or "eps", got {self}')

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """The rescaled D."""
        spread = 1 + step.noise_level**2 if self.space == "v" else 1.0
        return rescale(spread * guided, spread * step.plain, step.x, self.phi) / spread
