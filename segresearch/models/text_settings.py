"""How prompts are read, and what a model is given beside them: the settings `text` of a run. Light: no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from segresearch.fields import Count, Number, Whole, within


@dataclass(frozen=True)
class TextSettings:
    """How `StableDiffusion.encode` reads prompts, and what it gives the model beside them.

    syntax: "weighted" reads weights and BREAK (`prompt_syntax`), "plain" the text as it is, with a warning where it
    holds such. clip_skip: as in diffusers, for the prompts only. original_size, crop, target_size: what SDXL reads of
    the image in place of its size, (0, 0) and its size. aesthetic_score, negative_aesthetic_score: of SDXL's refiner,
    which reads them in place of the target size. guidance: the weight that an LCM UNet embeds, as diffusers'
    guidance_scale; None: 8.
    """

    syntax: Literal["plain", "weighted"] = "plain"
    clip_skip: Annotated[int, within(0, 100, whole=True)] | None = None
    original_size: tuple[Count, Count] | None = None
    crop: tuple[Whole, Whole] = (0, 0)
    target_size: tuple[Count, Count] | None = None
    aesthetic_score: Number = 6.0
    negative_aesthetic_score: Number = 2.5
    guidance: Number | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not what they are by default, by name."""
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return {name: value for name, value, default in fields if value != default}


AS_IT_IS = TextSettings()
