"""The other attention maps that PAG (arXiv 2403.17377, Table 9) was compared with, as in its code for ADM.

FID there by a summary, 5k images: identity 32.3, off the diagonal masked 39.5, masked at random 40.2, noise 62.8. The
code has no rates or widths, and the paper's could not be read: the defaults here are this project's. All stand beside
CFG: D[c] + s·(D[c] − D[c~p]). The pooled map of that code is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Count, Flag, Fraction, NonNegative, Whole
from segresearch.guidance.blur import CPU, constant, fold_taps, gaussian_taps
from segresearch.guidance.methods.attention_maps import attention_map, image_by_image, wide
from segresearch.guidance.methods.keyed import keys_and_sigma
from segresearch.guidance.perturbations import else_plain, freeze, on_heads
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site
from segresearch.sampling.draws import normal, uniform


@constant
def taps_matrix(n: int, sigma: float, taps: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "{n} {n}"]:
    where = device if torch.compiler.is_compiling() else CPU  # fp64, which some devices lack
    return fold_taps(gaussian_taps(sigma, taps, where), n, "reflect").to(device=device, dtype=dtype)


@dataclass(frozen=True)
class BlurredMap:
    """The map after its softmax, blurred as an image whose rows are the queries and whose columns the keys: B A Bᵀ V.

    B is the Gaussian of `taps` (odd) samples with reflected ends, over tokens as they are flattened, row by row. No map
    is formed, since it is B·(A·(Bᵀ V)). sigma: in tokens; 0 is plain attention. taps: the code's 5.
    Raises InputError for a negative or infinite sigma or an even number of taps.
    """

    kind: Literal["blurred_map"] = field(default="blurred_map", kw_only=True, repr=False)
    sigma: NonNegative = 1.0
    taps: Count = 5
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf") or self.taps % 2 == 0:
            raise InputError(f"sigma must be >= 0 and finite, and taps odd; got {self}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """B times the attention to Bᵀ v."""
        if self.sigma == 0:
            return attend(q, k, v, site)
        b = taps_matrix(v.shape[2], float(self.sigma), self.taps, wide(v).dtype, v.device)
        out = (b @ wide(attend(q, k, (b.mT @ wide(v)).to(v.dtype), site))).to(v.dtype)
        return else_plain(self.heads, out, q, k, v, site, attend)


@dataclass(frozen=True)
class DroppedMap:
    """Entries of the map are dropped at random, each with probability `rate`, anew at each level, site and image.

    keep_diagonal, renormalize: with both it is the code's mask before the softmax, where a token's own entry is kept;
    without keep_diagonal the mask is anywhere (a row that loses all gives 0); without both it is the code's dropout
    after the softmax.
    rate: 0 is plain attention; 1 with the diagonal kept and renormalized is PAG.
    The map is this class's own, whatever perturbation comes before it. Raises InputError for a rate outside [0, 1].
    """

    kind: Literal["dropped_map"] = field(default="dropped_map", kw_only=True, repr=False)
    rate: Fraction = 0.75
    keep_diagonal: Flag = True
    renormalize: Flag = True
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise InputError(f"rate must be in [0, 1], got {self.rate!r}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """The map that is left times v."""
        if self.rate == 0:
            return attend(q, k, v, site)

        def dropped(q: Heads, k: Heads, v: Heads, key: Tensor, sigma: Tensor) -> Heads:
            weights = attention_map(q, k)
            kept = uniform(key, sigma, f"{site.name}/dropped", weights.numel()).view_as(weights) >= self.rate
            if self.keep_diagonal:
                kept = kept | torch.eye(weights.shape[-1], dtype=torch.bool, device=q.device)
            weights = weights * kept
            if self.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
            return (weights @ wide(v)).to(v.dtype)

        out = image_by_image(dropped, q, k, v, *keys_and_sigma(site, q))
        return else_plain(self.heads, out, q, k, v, site, attend)


@dataclass(frozen=True)
class NoisyMap:
    """The map after its softmax plus `scale` times unit noise in each entry: rows no longer sum to one.

    The noise is anew at each level, site and image. scale: 0 is plain attention. An output is wrong by about
    scale·√n·|v|. Raises InputError for a negative or infinite scale.
    """

    kind: Literal["noisy_map"] = field(default="noisy_map", kw_only=True, repr=False)
    scale: NonNegative = 0.01
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"scale must be >= 0 and finite, got {self.scale!r}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """Attention plus the noise times v."""
        plain = attend(q, k, v, site)
        if self.scale == 0:
            return plain

        def noise(v: Heads, key: Tensor, sigma: Tensor) -> Tensor:
            _, heads, tokens, _ = v.shape
            draw = normal(key, sigma, f"{site.name}/noise", heads * tokens * tokens)
            return draw.view(1, heads, tokens, tokens).to(wide(v).dtype) @ wide(v)

        out = (wide(plain) + self.scale * image_by_image(noise, v, *keys_and_sigma(site, v))).to(v.dtype)
        return on_heads(self.heads, out, plain, site)
