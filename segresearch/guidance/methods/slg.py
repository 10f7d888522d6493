"""Skip-layer guidance and spatiotemporal skip guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import one_of
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site

LAYERS = ("attn1", "attn2", "ff")


@dataclass(frozen=True)
class SLG:
    """A transformer block, or some of its layers, left out: the layer adds nothing, its output bias included.

    D = D[c] + s·(D[c] − D[c~slg]), the same in every space. All three layers: skip-layer guidance (SLG, Stable
    Diffusion 3.5) and STG-R of arXiv 2411.18664, where the block's output is its input. `layers=["attn1"]`: STG-A.
    Published: s 2.8 to 3 (SD3.5), layers 7 to 9 of 24, the first 1 to 20 % of the steps; there are no values for SDXL.
    diffusers' hook with the whole block skipped is the same branch. Its "skip attention only" is another: there the
    attention gives its normed input, so h + norm1(h). STG's own code was not looked at; that STG-A means a zero
    residual is second-hand.

    where: transformer blocks. layers: those left out, any of attn1, attn2 and ff.
    """

    kind: Literal["slg"] = field(default="slg", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "block"
    where: Where = "mid"
    layers: Sequence[Annotated[str, one_of(*LAYERS)]] = LAYERS

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers or not set(self.layers) <= set(LAYERS):
            raise InputError(f"SLG layers must be a list of any of {', '.join(LAYERS)}, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        freeze(self)

    def __call__(self, h: Float[Tensor, "rows tokens c"], site: Site, call: Call) -> Float[Tensor, "rows tokens c"]:
        """The block's output without the layers."""
        return h if set(self.layers) == set(LAYERS) else call(h, without=self.layers)
