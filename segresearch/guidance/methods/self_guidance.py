"""Self-Guidance."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site


@dataclass(frozen=True)
class SelfGuidance:
    """Self-Guidance, arXiv 2412.05827: the network is told that x is noisier than it is, timestep t + delta.

    D = D[c] + s·(D[c] − D[c~sg]), the same in every space. x and its scaling 1/√(σ²+1) stay; only the timestep's
    embedding is another. Published: delta 10, s 3. t + delta is kept at or below the last timestep, so at the first
    steps of a run the shift is smaller, and at t = last the term adds nothing. What the official code does there was
    not checked. The paper's SG-prev, which takes the prediction of the step before, is a shape with memory and not
    this.

    delta: in timesteps. last: the last timestep that the network knows. where: the one embedding.
    """

    kind: Literal["self_guidance"] = field(default="self_guidance", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "embedding"
    in_timesteps: ClassVar[bool] = True
    where: Where = "*"
    delta: NonNegative = 10.0
    last: NonNegative = 999.0

    def __post_init__(self) -> None:
        if not (self.delta >= 0 and self.last >= 0):
            raise InputError(f"SelfGuidance delta and last must be >= 0, got {self}")
        freeze(self)

    def __call__(self, h: Float[Tensor, " rows"], site: Site, call: Call) -> Float[Tensor, "rows e"]:
        """The embedding of t + delta."""
        return call((h + self.delta).clamp(max=self.last))
