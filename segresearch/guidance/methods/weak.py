"""Autoguidance."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from segresearch.errors import InputError


@dataclass(frozen=True)
class Weak:
    """Autoguidance, arXiv 2406.02507: the branch is computed by another, weaker network of the same kind.

    D = D[c] + (w − 1)·(D[c] − D_weak[c]), the same in every space; the term's scale is w − 1. With CFG of weight w_cfg
    beside it, w_cfg = (1 − a)(w − 1) + 1 and w_weak = a(w − 1) + 1 are the paper's mixture of total weight w
    (second-hand). There are no published values for SDXL. The weak network is smaller or trained for less time, on the
    same data, with the same text encoders and VAE. diffusers' "AutoGuidance" has dropout or skipped layers of one
    network instead.

    network: the name it is loaded by, a key of the config's `networks`.
    """

    kind: Literal["weak"] = field(default="weak", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "network"
    network: str = "weak"

    def __post_init__(self) -> None:
        if not self.network:
            raise InputError("Weak needs the name of a network, got an empty text")
