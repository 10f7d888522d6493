"""CFG++ as a weight: the factor by which an Euler step of the guided D is a CFG++ step."""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.sampling.memory import Run


@dataclass(frozen=True)
class PlusPlus:
    """CFG++, arXiv 2406.08070: x′ = D_λ + (x − D[uncond])·σ′/σ, D_λ = D[uncond] + λ·(D[cond] − D[uncond]).

    It is an Euler step from σ to the next one, σ′, of CFG with the weight λ·σ/(σ − σ′): `cfg(PlusPlus(λ))`. At the last
    step the weight is λ. As the scale of any other term the term's full difference moves x by λ, whatever the length of
    the step ("SEG++").

    strength: λ, published 0.6 (up to 1). ComfyUI's `euler_cfg_pp` sampler takes λ for its cfg; A1111 maps its cfg w to
    λ = w/12.5. Exact for euler without churn, which alone reads one weight for one step; the paper's forms of second
    order are other steps. In the official code ᾱ is shifted by one in DDIM and DPM++ 2M; here it is not.

    Raises InputError for a strength that is negative or not finite, outside of a run, for another sampler, and at a σ
    that is not of the run's schedule.
    """

    kind: Literal["cfg++"] = field(default="cfg++", kw_only=True, repr=False)
    strength: NonNegative = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise InputError(f"CFG++ needs a finite strength >= 0, got {self.strength!r}")

    def __call__(self, sigma: float) -> float:
        """InputError: the weight depends on the next sigma, which only a run knows."""
        return self.in_run(sigma, None)

    def in_run(self, sigma: float, run: Run | None) -> float:
        """λ·σ/(σ − σ′)."""
        if run is None:
            raise InputError("CFG++ depends on the next sigma, which only a run knows: call `sample`")
        if run.sampler != "euler":
            raise InputError(f"CFG++ is exact for sampler euler alone, and this run is {run.sampler}")
        sigmas = run.schedule("CFG++")
        if sigma not in sigmas[:-1]:
            raise InputError(f"CFG++: sigma {sigma:g} is not of the schedule")
        return self.strength * sigma / (sigma - sigmas[sigmas.index(sigma) + 1])

    def __str__(self) -> str:
        return f"({self.strength:g}·σ/(σ − σ′))"
