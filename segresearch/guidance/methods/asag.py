from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F

from segresearch.errors import InputError
from segresearch.fields import NonNegative, Whole
from segresearch.guidance.methods.attention_maps import image_by_image, logits, wide
from segresearch.guidance.perturbations import else_plain, freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site


@dataclass(frozen=True)
class ASAG:
    """Adversarial Sinkhorn Attention Guidance, arXiv 2511.07499: the map is a transport plan with a cost on likeness.

    Map = Sinkhorn(Q Kᵀ/√d − λ·cos(q_i, k_j)), per head: exp of it, then columns and rows brought to sum to one,
    `iterations` times, rows last. So the pairs most alike lose most, and every token is attended to alike in sum.

    Unchecked: the paper could not be read, and there is no code of the author. Formula and signs are those of a
    summary, which gives neither λ (1 here) nor the sites ("mid" here), and 5 to 10 iterations (5 here). By it λ falls
    over the run, in a way not known; here it is constant. It stands beside CFG: D[c] + s·(D[c] − D[c~asag]).

    iterations: 0 is softmax over the keys; then cost 0 is plain attention. The map is this class's own, whatever
    perturbation comes before it at the site. Raises InputError for a negative or infinite cost or iterations below 0.
    """

    kind: Literal["asag"] = field(default="asag", kw_only=True, repr=False)
    cost: NonNegative = 1.0
    iterations: Whole = 5
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.cost < float("inf") or self.iterations < 0:
            raise InputError(f"cost must be >= 0 and finite, iterations >= 0; got {self}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """The transport plan times v."""
        out = image_by_image(self._transported, q, k, v)
        return else_plain(self.heads, out, q, k, v, site, attend)

    def _transported(self, q: Heads, k: Heads, v: Heads) -> Heads:
        cosine = F.normalize(wide(q), dim=-1) @ F.normalize(wide(k), dim=-1).mT
        scores = logits(q, k) - self.cost * cosine
        for _ in range(self.iterations):
            scores = scores.log_softmax(dim=-2).log_softmax(dim=-1)  # columns, then rows
        return (scores.softmax(dim=-1) @ wide(v)).to(v.dtype)
