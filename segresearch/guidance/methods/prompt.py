"""Conditionings of a fixed text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from segresearch.models.conditioning import Cond
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text_settings import AS_IT_IS, TextSettings


@dataclass(frozen=True)
class Prompt:
    """A further text, the same for all images: for composed prompts (arXiv 2206.01714) and Perp-Neg (2304.04968).

    text: None is the negative prompt of the run, or "" where that has none (SDXL's zeros are no text).

    A term with it as `pos` adds the text, s·(D[text] − D[uncond]); as `neg` it takes the text away.
    """

    kind: Literal["prompt"] = field(default="prompt", kw_only=True, repr=False)
    text: str | None = ""

    def encode(
        self, sd: StableDiffusion, prompts: Sequence[str], negative: Any = None, size: Any = None,
        settings: TextSettings = AS_IT_IS,
    ) -> Cond:  # fmt: skip
        """The text, one row a prompt."""
        texts = (negative or "") if self.text is None else self.text
        cond = sd.encode([texts] if isinstance(texts, str) else texts, None, size, settings)["cond"]
        return cond.expand(len(prompts)) if cond.rows == 1 else cond
