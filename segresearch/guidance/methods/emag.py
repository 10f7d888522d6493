from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Fraction, Whole
from segresearch.guidance.methods.attention_maps import wide
from segresearch.guidance.perturbations import freeze, on_heads
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site


@dataclass(frozen=True)
class EMAG:
    """EMAG in its query form (EMAG-Q), arXiv 2512.17303: attention of a moving average of the queries over the steps.

    E ← β·E + (1 − β)·Q at each step, then Q ← λ·E + (1 − λ)·Q. E starts as the first query, so the first step is plain.
    Published (SD3, 28 steps): beta 0.988, strength λ = 1, emag_scale w_e 1.5 beside CFG of weight 7. The authors put
    c′ = c̃ + w_e·(c − c̃) for c into CFG of weight w. So the scale of D[c] − D[c~emag] is w·(w_e − 1), or w_e − 1
    without CFG.

    Deviations: the authors use E from 20 to 80 % of the steps only (here in the interval of the term, where E starts
    too), keep it in fp16, and perturb at each step the one layer of blocks 6 to 8 whose queries differ most from E.
    Here it is fp32, and all of `where` act ("mid", this project's choice for SDXL). A second evaluation at a level
    (heun's) starts from the state before that level. The code was read, not the paper.

    Raises InputError for beta or strength outside [0, 1].
    """

    kind: Literal["emag"] = field(default="emag", kw_only=True, repr=False)
    beta: Fraction = 0.988
    strength: Fraction = 1.0
    where: Where = "mid"
    heads: Sequence[Whole] | None = None
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.beta <= 1 and 0 <= self.strength <= 1):
            raise InputError(f"beta and strength must be in [0, 1], got {self}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """Attention of the averaged query."""
        previous = site.past.read()
        average = wide(q) if previous is None else torch.lerp(wide(q), previous, self.beta)
        site.past.write(average)
        query = torch.lerp(wide(q), average, self.strength).to(q.dtype)
        return attend(on_heads(self.heads, query, q, site), k, v, site)
