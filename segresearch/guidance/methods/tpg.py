"""Token Perturbation Guidance."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from segresearch.fields import Flag
from segresearch.guidance.methods.keyed import keys_and_sigma
from segresearch.guidance.perturbations import freeze
from segresearch.guidance.sites import Where
from segresearch.models.attention import Call, Site
from segresearch.sampling.draws import permutation


@dataclass(frozen=True)
class TPG:
    """Token Perturbation Guidance, arXiv 2506.10036: a transformer block gets its tokens in random order, h[π].

    D = D[c] + s·(D[c] − D[c~tpg]), the same in every space. π is new at each evaluation and block. It moves the
    residual too and is never undone. Published for SDXL: s 3 at all steps, the blocks d6 to d23 of the down path, in
    the names here down_blocks.2.attentions.0.transformer_blocks.2 and all after it. The ports for ComfyUI count s in
    the same way.

    where: transformer blocks. shared: one π for all images, whatever their seeds (in the official code, for all
    of a batch). Without it π is keyed by the image, so that an image does not depend on its batch.
    """

    kind: Literal["tpg"] = field(default="tpg", kw_only=True, repr=False)
    site_kind: ClassVar[str] = "block"
    where: Where = "mid"
    shared: Flag = False

    def __post_init__(self) -> None:
        freeze(self)

    def __call__(self, h: Float[Tensor, "rows tokens c"], site: Site, call: Call) -> Float[Tensor, "rows tokens c"]:
        """The block's output for permuted tokens."""
        order = permutation(*keys_and_sigma(site, h, self.shared), f"{site.name}/tpg", h.shape[1])  # (rows, tokens)
        return call(h.gather(1, order[:, :, None].expand_as(h)))
