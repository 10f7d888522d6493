"""Perp-Neg: negative prompts without their part along the prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step, along


@dataclass(frozen=True)
class PerpNeg:
    """Perp-Neg, arXiv 2304.04968: D = D[neg] + w·(Δ − weight·Σ_i (Δ_i − part of Δ_i along Δ)).

    Δ = D[pos] − D[neg], where `neg` is the *empty* prompt, and Δ_i = D[conditioning i] − D[neg] of negative prompts.
    All differences scale alike, so it is the same in eps and denoised space. Written for D[pos] as base.

    conditionings: names of the negative prompts' conditionings. weight: of all of them; 0 is plain CFG.
    Published: weights of their own for each prompt and view (text to 3D); ComfyUI's `neg_scale` is `weight` (1), its
    `cfg` is w. ComfyUI takes one projection for a whole batch; here each image has its own, as in the authors' code.

    Raises InputError for no conditionings, or a weight that is negative or not finite.
    """

    kind: Literal["perp_neg"] = field(default="perp_neg", kw_only=True, repr=False)
    conditionings: Sequence[str] = ("negative",)
    weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.conditionings, str) or not self.conditionings:
            raise InputError(f"Perp-Neg needs a list of conditionings, got {self.conditionings!r}")
        if not 0 <= self.weight < math.inf:
            raise InputError(f"Perp-Neg weight must be a finite number >= 0, got {self.weight!r}")
        object.__setattr__(self, "conditionings", tuple(self.conditionings))

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """(D − D[base])/s."""
        delta = guidance = pos - neg
        for name in self.conditionings:
            against = step.denoised[name] - neg
            guidance = guidance - self.weight * (against - along(against, delta))
        return step.reaching(neg + (step.scale + 1) * guidance, pos)
