"""CFG-Zero*: the unconditional prediction at its best length."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Whole
from segresearch.guidance.step import Latents, Step, along


@dataclass(frozen=True)
class CFGZero:
    """CFG-Zero*, arXiv 2503.18886: v = α·v_neg + w·(v_pos − α·v_neg), with α = ⟨v_pos, v_neg⟩/‖v_neg‖².

    v is the velocity of the sampling ODE. In k-diffusion's coordinates that is dx/dσ = ε = (x − D)/σ. So α comes from ε
    and acts on ε; in denoised space Δ′ = α·(x − D[neg]) − (x − D[pos]), where σ cancels. It is written for D[pos] as
    base. Published: flow models; for SDXL no numbers.

    zero_steps: sigmas at which the ODE does not move (D = x, for all other terms being off). Published: 1. Here 0, for
        an eps model's first step is a good one (ε ≈ x/σ), and x would keep the noise of σ₀ where that of σ₁ is
        expected. The first sigmas of a run are counted, so it needs a run.

    Other conventions: diffusers' guider is this formula on raw outputs (an eps model's are ε: the same). ComfyUI takes
    α from x − D and applies it to D, which is another formula: it differs by (w − 1)·(α − 1)·x.

    Raises InputError for negative zero_steps, and without a run where they are not 0.
    """

    kind: Literal["cfg_zero"] = field(default="cfg_zero", kw_only=True, repr=False)
    zero_steps: Whole = 0

    def __post_init__(self) -> None:
        if self.zero_steps < 0:
            raise InputError(f"zero_steps must be >= 0, got {self.zero_steps!r}")

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ′."""
        eps_pos, eps_neg = step.x - pos, step.x - neg  # σ·ε
        delta = along(eps_pos, eps_neg) - eps_pos
        if not self.zero_steps:
            return delta
        if step.past.run is None:
            raise InputError("zero_steps of CFG-Zero* counts the sigmas of a run, and there is none: call `sample`")
        sigmas = step.past.run.schedule("CFG-Zero*")
        last = sigmas[min(self.zero_steps, len(sigmas)) - 1]
        return torch.where(step.noise_level >= last, step.reaching(step.x, pos), delta)
