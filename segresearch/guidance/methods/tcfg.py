"""Tangential damping CFG: the unconditional prediction without its part that disagrees."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.guidance.step import Latents, Step, along, dot


@dataclass(frozen=True)
class TCFG:
    """TCFG, arXiv 2503.18137: ε_neg is projected on the first right singular vector of the two rows [ε_pos; ε_neg].

    ε′ = ε_neg′ + w·(ε_pos − ε_neg′), in eps space; written for D[pos] as base. The singular vector is
    a·ε_pos + b·ε_neg, where (a, b) is the leading eigenvector of the 2 × 2 Gram matrix: an angle, in closed form.
    Published: StableDiffusion at w = 5; no further parameter.

    diffusers' guider is the same formula on raw outputs (of an eps model the same), and so is ComfyUI's node.
    """

    kind: Literal["tcfg"] = field(default="tcfg", kw_only=True, repr=False)

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ′ = σ·(ε_neg′ − ε_pos)."""
        eps_pos, eps_neg = step.x - pos, step.x - neg  # σ·ε
        twice = torch.atan2(2 * dot(eps_pos, eps_neg), dot(eps_pos, eps_pos) - dot(eps_neg, eps_neg))  # the angle
        leading = (twice / 2).cos() * eps_pos + (twice / 2).sin() * eps_neg
        return along(eps_neg, leading) - eps_pos
