"""Tangential Amplifying Guidance: a longer step across x, an unchanged one along it."""

import math
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step, along


@dataclass(frozen=True)
class TAG:
    """TAG, arXiv 2510.04533, Algorithm 1: D′ = x + (P + η·(I − P))(D − x), where P projects on x.

    The paper amplifies the part of a DDIM step across x. A step of any ODE sampler goes along D − x here, and the part
    across x is the same but for a factor in the paper's scaled coordinates, so an Euler step of D′ is that step.
    eta: η, 1 changes nothing. Published: 1.05 to 1.15 for the Stable Diffusion models; ComfyUI's node has `t_scale`
    for η and 1 for the radial part. TAG's form for CFG (its eq. 26) is not here.

    Raises InputError for an eta that is negative or not finite.
    """

    kind: Literal["tag"] = field(default="tag", kw_only=True, repr=False)
    eta: NonNegative = 1.15

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise InputError(f"TAG eta must be a finite number >= 0, got {self.eta!r}")

    def __call__(self, guided: Latents, step: Step) -> Latents:
        """D′."""
        move = guided - step.x
        return guided + (self.eta - 1) * (move - along(move, step.x))
