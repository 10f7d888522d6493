from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import Fraction, NonNegative, Whole, one_of
from segresearch.guidance.methods.attention_maps import (
    attention_map,
    between,
    image_by_image,
    target_map,
    target_query,
    wide,
)
from segresearch.guidance.perturbations import else_plain, freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Attend, Heads, Site

TARGETS = ("identity", "uniform", "mean_query", "temperature", "max")
PATHS = ("linear", "log_linear", "chord", "slerp")


@dataclass(frozen=True)
class SoftPAG:
    """SoftPAG and the perturbations of HeadHunter, arXiv 2506.10978: the map A at `tau` on a path to a target A′.

    target (Appendix C): "identity" is PAG's I; "uniform" 1/n; "mean_query" softmax(q̄ Kᵀ/√d), SEG at σ = ∞;
        "temperature" softmax(log A / temperature); "max" one-hot at the largest logit, its limit at 0.
    tau: u of the paper; 0 is plain attention, 1 the target. Published: scale 3, and u = 0.25 for general quality (SD3).
    path: "linear" (1−τ)·A + τ·A′, the paper's; the code has the others for the identity: "log_linear", "slerp"
        (the geodesic of Fisher and Rao) and "chord", which it calls fisher_rao; see `between`.
    heads: the paper selects single heads of SD3 and FLUX; it has no numbers for SDXL.

    Where a map is formed ("max", and paths other than "linear" but for the log-linear ones of a query), attention is
    that of this class, whatever perturbation comes before it at the site. Raises InputError for values out of range.
    """

    kind: Literal["soft_pag"] = field(default="soft_pag", kw_only=True, repr=False)
    tau: Fraction = 0.25
    target: Annotated[str, one_of(*TARGETS)] = "identity"
    path: Annotated[str, one_of(*PATHS)] = "linear"
    temperature: NonNegative = 2.0
    where: Where = "mid"
    heads: Sequence[Whole] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1 or self.target not in TARGETS or self.path not in PATHS or not self.temperature > 0:
            raise InputError(f"tau in [0, 1], temperature > 0, a target of {TARGETS}, a path of {PATHS}; got {self}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """Attention with the map at tau."""
        if self.tau == 0:
            return attend(q, k, v, site)
        out = self._changed(q, k, v, site, attend)
        return else_plain(self.heads, out, q, k, v, site, attend)

    def _changed(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        query = target_query(q, self.target, self.temperature)
        if query is not None and self.path == "log_linear":  # logits (1 − τ)·S + τ·S′
            return attend(torch.lerp(q, query, self.tau), k, v, site)
        if self.target == "max" or (self.tau < 1 and self.path != "linear"):
            return image_by_image(self._dense, q, k, v)
        end = v if query is None else attend(query, k, v, site)
        return end if self.tau == 1 else torch.lerp(attend(q, k, v, site), end, self.tau)

    def _dense(self, q: Heads, k: Heads, v: Heads) -> Heads:
        path = "linear" if self.tau == 1 else self.path
        end = target_map(q, k, self.target, self.temperature)
        return (between(attention_map(q, k), end, self.tau, path) @ wide(v)).to(v.dtype)
