"""Adaptive Guidance: CFG until the two predictions agree."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from segresearch.errors import InputError
from segresearch.fields import Fraction, one_of
from segresearch.guidance.step import Latents, Step, dot, norm
from segresearch.sampling.memory import Past


@dataclass(frozen=True)
class AdaptiveStop:
    """Adaptive Guidance, arXiv 2312.12487: once cos(ε_pos, ε_neg) exceeds `cosine`, an image has no guidance any more.

    The step at which it does still has its guidance (both branches were evaluated); from the next on Δ = 0. Images of
    a batch stop one by one, and when all have stopped, `neg` is no longer evaluated. It needs a run: without one it
    never stops.

    cosine: published 0.991, of ε in models of the paper's own. space: "eps" (the paper), or "denoised" for D, as
        ComfyUI's node has it. Of SDXL (and mini) ε is mostly the noise in x at first, so "eps" stops at the first step.
        In denoised space mini passes 0.991 after 7 to 12 of 25 steps.

    Raises InputError for a cosine outside [0, 1] or an unknown space.
    """

    kind: Literal["adaptive_stop"] = field(default="adaptive_stop", kw_only=True, repr=False)
    cosine: Fraction = 0.991
    space: Annotated[str, one_of("eps", "denoised")] = "denoised"

    def __post_init__(self) -> None:
        if not 0 <= self.cosine <= 1 or self.space not in ("eps", "denoised"):
            raise InputError(f'adaptive stop needs a cosine in [0, 1] and space="eps" or "denoised", got {self}')

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ, or 0 for images that have stopped."""
        a, b = (step.x - pos, step.x - neg) if self.space == "eps" else (pos, neg)
        agree = dot(a, b) > self.cosine * norm(a) * norm(b)  # (b, 1, 1, 1)
        stopped = step.past.read()
        step.past.write(agree if stopped is None else agree | stopped)
        return pos - neg if stopped is None else (pos - neg).masked_fill(stopped, 0.0)

    def stopped(self, past: Past) -> bool:
        """Whether every image has stopped at a sigma before this one."""
        stopped = past.read()
        return stopped is not None and bool(stopped.all())
