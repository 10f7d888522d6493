"""Frequency-Decoupled Guidance: one weight for each level of a Laplacian pyramid."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Number
from segresearch.guidance.frequencies import grown, halved
from segresearch.guidance.step import Latents, Step


@dataclass(frozen=True)
class FDG:
    """FDG, arXiv 2506.19713: Δ′ = Σ_ℓ gain_ℓ·(level ℓ of the Laplacian pyramid of Δ). Linear, so alike in every space.

    gains: factors on the term's scale, the finest level first; all 1 is Δ. With CFG's weight w for the coarsest level,
        the paper's w_high is 1 + (w − 1)·gain. Published for SDXL: w_high 10 and w_low 5, which are gains (2.25, 1)
        at weight 5. pamparamm's `strength_high` is w_high (12), with w_low the sampler's cfg.

    The pyramid is that of kornia (which diffusers and pamparamm call): equal where the sides are powers of two. For
    other sides those pad up to a power of two, and diffusers does not cut the result back; here a level has half the
    side, rounded down, and the size is kept. The paper's projection inside a level is not here (its default is off).

    Raises InputError for no gains or a side below 2^(levels − 1).
    """

    kind: Literal["fdg"] = field(default="fdg", kw_only=True, repr=False)
    gains: Sequence[Number] = (2.25, 1.0)

    def __post_init__(self) -> None:
        if not self.gains:
            raise InputError("FDG needs at least one gain")
        object.__setattr__(self, "gains", tuple(self.gains))

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """Δ′."""
        delta = pos - neg
        levels = [delta.to(torch.promote_types(delta.dtype, torch.float32))]
        for _ in self.gains[1:]:
            if min(levels[-1].shape[2:]) < 2:
                raise InputError(f"FDG: {tuple(delta.shape[2:])} is too small for {len(self.gains)} levels")
            levels.append(halved(levels[-1]))
        out = self.gains[-1] * levels[-1]
        for gain, fine, coarse in zip(self.gains[-2::-1], levels[-2::-1], levels[:0:-1], strict=True):
            out = grown(out, fine.shape[2:]) + gain * (fine - grown(coarse, fine.shape[2:]))
        return out
