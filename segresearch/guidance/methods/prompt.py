"""Conditionings of a fixed text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from segresearch.models.conditioning import Cond
from segresearch.models.sdxl import SDXL


@dataclass(frozen=True)
class Prompt:
    """A further text, the same for all images: for composed prompts (arXiv 2206.01714) and Perp-Neg (2304.04968).

    A term with it as `pos` adds the text, s·(D[text] − D[uncond]); as `neg` it takes the text away.
    """

    kind: Literal["prompt"] = field(default="prompt", kw_only=True, repr=False)
    text: str = ""

    def encode(self, sdxl: SDXL, prompts: Sequence[str], negative: Any = None, size: Any = None) -> Cond:
        """The text, one row a prompt."""
        return sdxl.encode([self.text], size=size)["cond"].expand(len(prompts))
