"""Time-step guidance."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.methods.keyed import keys_and_sigma
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site
from segresearch.sampling.draws import normal


@dataclass(frozen=True)
class TSG:
    """Time-Step Guidance, arXiv 2407.02687: noise on the embedding e of the timestep, e + strength·t^α·std(e)·n.

    D = D[c] + s·(D[c] − D[c~tsg]), the same in every space; s is the paper's w − 1. n is new at each evaluation and
    keyed by the image. Published for Stable Diffusion: with a prompt w 4, strength 3, α 0.25 at timesteps 400 to 1000;
    without one w 3, strength 1.25, α 0 at timesteps 100 to 900. There is no official code. The paper's text was not at
    hand: that t is counted in [0, 1] (else the published strengths are far too large), and that e is what the resnets
    add, before the part of the sizes and the pooled text, are conclusions of others. The paper's variant for the first
    layers only is not here.

    strength: the paper's s. alpha: the power of t. where: the one embedding.
    """

    kind: Literal["tsg"] = field(default="tsg", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "embedding"
    in_timesteps: ClassVar[bool] = True
    where: Where = "*"
    strength: NonNegative = 3.0
    alpha: NonNegative = 0.25

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and self.alpha >= 0):
            raise InputError(f"TSG strength and alpha must be >= 0, got {self}")
        freeze(self)

    def __call__(self, h: Float[Tensor, " rows"], site: Site, call: Call) -> Float[Tensor, "rows e"]:
        """The embedding of t with noise."""
        e = call(h)
        wide = e.to(torch.promote_types(e.dtype, torch.float32))
        noise = normal(*keys_and_sigma(site, h), f"{site.name}/tsg", e.shape[1]) * wide.std(dim=1, keepdim=True)
        return (wide + self.strength * (h[:, None].to(wide.dtype) / 1000) ** self.alpha * noise).to(e.dtype)
