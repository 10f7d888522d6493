from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative, Whole
from segresearch.guidance.perturbations import freeze, on_heads
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site


@dataclass(frozen=True)
class AttentionTemperature:
    """Attention at another temperature: softmax(β·Q Kᵀ/√d) V.

    beta: 1 is plain attention, 0 the uniform map; above 1 the map is sharper. It is 1/τ of HeadHunter's
        softmax(log A/τ) (arXiv 2506.10978, eq. 11), and τ of ERG (arXiv 2504.13987) at its K = α = γ = 1.
    where: "mid" and beta 0.5 are this project's choice: HeadHunter shows τ from 0.01 to 100 on SD3, ERG searches τ on a
        grid for DiTs; neither has a value for SDXL.

    Raises InputError for a negative or infinite beta.
    """

    kind: Literal["temperature"] = field(default="temperature", kw_only=True, repr=False)
    beta: NonNegative = 0.5
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"beta of an attention temperature must be >= 0 and finite, got {self.beta!r}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """Attention of β·q."""
        return attend(on_heads(self.heads, self.beta * q, q, site), k, v, site)
