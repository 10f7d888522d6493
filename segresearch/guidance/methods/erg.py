from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import Count, NonNegative, Whole
from segresearch.guidance.perturbations import else_plain, freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site


@dataclass(frozen=True)
class ERG:
    """The image side (I-ERG) of Entropy Rectifying Guidance, arXiv 2504.13987: steps on attention's Hopfield energy.

    `iterations` (K) times Q ← Q − γ·(Q − α·softmax(τ·Q Kᵀ/√d) V), from the query; the output is the last Q, per head.
    K = α = γ = 1 is `AttentionTemperature` with β = τ, and with τ = 1 plain attention. Published: K = γ = 1 (more bring
    little), at chosen layers of DiTs after the step κ (here the interval of the term), with τ found on a grid. It has
    no values for SDXL, so τ 0.5 and "mid" are this project's. The paper's D[c] + (w − 1)·(D[c] − D[c_τ~p]) has scale
    w − 1 and takes the place of CFG; c_τ comes from the text encoder (C-ERG).

    Unchecked: neither the paper nor code of the authors could be read; the update is its Algorithm 2 by a summary.
    Raises InputError for values out of range.
    """

    kind: Literal["erg"] = field(default="erg", kw_only=True, repr=False)
    tau: NonNegative = 0.5
    alpha: NonNegative = 1.0
    gamma: NonNegative = 1.0
    iterations: Count = 1
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not all(0 <= x < float("inf") for x in (self.tau, self.alpha, self.gamma)) or self.iterations < 1:
            raise InputError(f"tau, alpha and gamma must be >= 0 and finite, iterations >= 1; got {self}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """The query after the last step."""
        state = q
        for _ in range(self.iterations):
            state = (1 - self.gamma) * state + self.gamma * self.alpha * attend(self.tau * state, k, v, site)
        return else_plain(self.heads, state, q, k, v, site, attend)
