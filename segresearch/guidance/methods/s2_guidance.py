"""S²-Guidance."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Flag, Fraction
from segresearch.guidance.methods.keyed import keys_and_sigma
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site
from segresearch.sampling.draws import chosen


@dataclass(frozen=True)
class S2:
    """S²-Guidance, arXiv 2508.12880: a random subset of the transformer blocks left out, another at each evaluation.

    D = CFG + s·(D[c] − D[c~s2]), the same in every space, which is equation 4 of version 3 on. Versions 1 and 2 have
    −s·D[c~s2] alone, which is not affine. Published: s 0.25, about 10 % of the blocks, never the first, the middle 80 %
    of the run (SD3, SD3.5, Wan); there are no values for SDXL. The paper leaves out a fixed number of blocks. Here each
    block is left out with probability `share`, as a block knows of no other; so the number varies, and where it is 0
    the term adds nothing. No official code exists; the published values are second-hand, from notes on the paper.

    where: the transformer blocks of which some are left out; the default has none of the down path, so never the first
    block. share: the probability. shared: one subset for all images, whatever their seeds; without it the subset is
    keyed by the image. The blocks are computed for all rows in either case.
    """

    kind: Literal["s2"] = field(default="s2", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "block"
    where: Where = ("mid", "up")
    share: Fraction = 0.1
    shared: Flag = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"S2 share must be in [0, 1], got {self.share!r}")
        freeze(self)

    def __call__(self, h: Float[Tensor, "rows tokens c"], site: Site, call: Call) -> Float[Tensor, "rows tokens c"]:
        """The block's output, or h for the images that skip it."""
        skipped = chosen(*keys_and_sigma(site, h, self.shared), f"{site.name}/s2", float(self.share))  # (rows,)
        return torch.where(skipped[:, None, None], h, call(h))
