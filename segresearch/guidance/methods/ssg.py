"""Self-Swap Guidance."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import within
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site


@dataclass(frozen=True)
class SSG:
    """Self-Swap Guidance, arXiv 2604.08048: a block gets its most dissimilar tokens, then channels, exchanged in pairs.

    D = D[c] + s·(D[c] − D[c~ssg]), the same in every space. Dissimilar is a low cosine, of tokens over the channels, of
    channels over the tokens. ⌊r·n⌋ pairs of n are exchanged. Published for SDXL: s 3, r 0.1 and 0.1, blocks u0 to u5.
    In the official code a token can be in several pairs (at r 0.1 this is the rule), and what it then becomes depends
    on the order of writes. Here pairs are disjoint: each is the most dissimilar one of what the earlier ones left. Rows
    do not depend on each other, but where two pairs are equally dissimilar to rounding, the choice may be another.

    where: transformer blocks. tokens, channels: the two ratios r, at most 0.5.
    """

    kind: Literal["ssg"] = field(default="ssg", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "block"
    where: Where = "mid"
    tokens: Annotated[float | int, within(0, 0.5)] = 0.1
    channels: Annotated[float | int, within(0, 0.5)] = 0.1

    def __post_init__(self) -> None:
        for name in ("tokens", "channels"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise InputError(f"SSG {name} must be in [0, 0.5], got {getattr(self, name)!r}")
        freeze(self)

    def __call__(self, h: Float[Tensor, "rows tokens c"], site: Site, call: Call) -> Float[Tensor, "rows tokens c"]:
        """The block's output for exchanged tokens and channels."""
        h = exchanged(h, int(self.tokens * h.shape[1]))
        return call(exchanged(h.transpose(1, 2), int(self.channels * h.shape[2])).transpose(1, 2))


def exchanged(z: Float[Tensor, "rows n dim"], pairs: int) -> Float[Tensor, "rows n dim"]:
    """z with its most dissimilar vectors exchanged, in `pairs` disjoint pairs."""
    return z if pairs == 0 else z.gather(1, partners(z, pairs)[:, :, None].expand_as(z))


def partners(z: Float[Tensor, "rows n dim"], pairs: int) -> Int[Tensor, "rows n"]:
    """For each vector the one it is exchanged with, itself for most."""
    (rows, n, _), unit = z.shape, F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=2)
    distance = -(unit @ unit.transpose(1, 2)) - torch.eye(n, dtype=unit.dtype, device=z.device) * 4  # cosines are ≤ 1
    partner = torch.arange(n, device=z.device).repeat(rows, 1)
    for _ in range(pairs):
        most = distance.flatten(1).argmax(dim=1)
        pair = torch.stack([most // n, most % n], dim=1)  # (rows, 2)
        partner = partner.scatter(1, pair, pair.flip(1))
        distance.scatter_(1, pair[:, :, None].expand(-1, -1, n), -torch.inf)
        distance.scatter_(2, pair[:, None].expand(-1, n, -1), -torch.inf)
    return partner
