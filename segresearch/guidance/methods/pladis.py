from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from entmax import entmax15

from segresearch.errors import InputError
from segresearch.fields import Number, Whole
from segresearch.guidance.methods.attention_maps import image_by_image, logits, wide
from segresearch.guidance.perturbations import freeze, on_heads
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, KeyHeads, Site


@dataclass(frozen=True)
class PLADIS:
    """PLADIS, arXiv 2503.07677: cross-attention beyond the dense map, in the direction of a sparse one.

    (λ·entmax₁.₅(S) + (1 − λ)·softmax(S)) V with S = Q Kᵀ/√d, in every branch and without further rows.

    scale: λ; 2 is the paper's, 1.5 also appears; 0 is plain attention, 1 the sparse map alone.
    where: every cross-attention. By a second-hand account the authors' code takes those of SDXL's down and up paths
        (`["down", "up"]`); it could not be read. The author of a ComfyUI port finds images messy with all of them.

    Raises InputError for a scale that is not finite.
    """

    kind: Literal["pladis"] = field(default="pladis", kw_only=True, repr=False)
    scale: Number = 2.0
    where: Where = "*"
    heads: Sequence[Whole] | None = None
    site_kind: ClassVar[str] = "cross"

    def __post_init__(self) -> None:
        if not abs(self.scale) < float("inf"):
            raise InputError(f"the scale of PLADIS must be finite, got {self.scale!r}")
        freeze(self)

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, site: Site, attend: Attend) -> Heads:
        """Dense attention plus λ times sparse minus dense."""
        plain = attend(q, k, v, site)
        if self.scale == 0:
            return plain
        sparse = image_by_image(lambda q, k, v: entmax15(logits(q, k), dim=-1) @ wide(v), q, k, v)
        out = wide(plain) + self.scale * (sparse - wide(plain))
        return on_heads(self.heads, out.to(v.dtype), plain, site)
