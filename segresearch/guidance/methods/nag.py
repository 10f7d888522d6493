from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from segresearch.errors import InputError
from segresearch.fields import Fraction, NonNegative, Whole
from segresearch.guidance.methods.attention_maps import wide
from segresearch.guidance.perturbations import freeze, on_heads
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, KeyHeads, Site


@dataclass(frozen=True)
class NAG:
    """Normalized Attention Guidance, arXiv 2505.21179: away from a negative prompt inside the cross-attention.

    z₊, z₋: attention of one query to the text and to the negative's text. z̃ = z₊ + s·(z₊ − z₋), then at each token
    ẑ = z̃·min(r, τ)/r with r = ‖z̃‖₁/‖z₊‖₁, and the output is α·ẑ + (1 − α)·z₊. The L1 norms go over all heads together,
    before the output projection, as in the authors' code. No further row: for the rows of the prompt, at every site.

    scale: s of the paper and of pamparamm's node; the authors' nag_scale is s + 1. SDXL defaults: s 2 (nag_scale 3),
        tau 2.5, alpha 0.5. With 20 or more steps users take nag_scale above 6. 0 is plain attention.
    negative: the conditioning of the negative prompt.

    Raises InputError for values out of range.
    """

    kind: Literal["nag"] = field(default="nag", kw_only=True, repr=False)
    scale: NonNegative = 2.0
    tau: NonNegative = 2.5
    alpha: Fraction = 0.5
    negative: str = "uncond"
    where: Where = "*"
    heads: Sequence[Whole] | None = None
    site_kind: ClassVar[str] = "cross"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf") or not self.tau >= 0 or not 0 <= self.alpha <= 1:
            raise InputError(f"scale and tau must be >= 0, scale finite, alpha in [0, 1]; got {self}")
        freeze(self)

    @property
    def conditionings(self) -> tuple[str, ...]:
        """Whose text it reads."""
        return (self.negative,)

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, site: Site, attend: Attend) -> Heads:
        """Attention to the text, away from the negative's."""
        plain = attend(q, k, v, site)
        if self.scale == 0 or self.alpha == 0:
            return plain
        k, v = (z.repeat(q.shape[0] // z.shape[0], 1, 1, 1) for z in site.texts[self.negative])
        positive, negative = wide(plain), wide(attend(q, k, v, site))
        away = positive + self.scale * (positive - negative)
        before, after = (z.abs().sum(dim=(1, 3), keepdim=True) for z in (positive, away))  # (rows, 1, tokens, 1)
        away = away * (self.tau * before / after.clamp_min(1e-30)).clamp_max(1.0)
        return on_heads(self.heads, (self.alpha * away + (1 - self.alpha) * positive).to(plain.dtype), plain, site)
