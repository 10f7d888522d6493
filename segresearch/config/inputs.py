"""The settings of images that sampling starts from, of images as prompts. Light: no torch."""

from dataclasses import dataclass
from typing import Annotated

from segresearch.config.validate import Record
from segresearch.errors import ConfigError
from segresearch.fields import Flag, Fraction, Number, Whole, within

STRENGTH = 0.6  # where a config has none


@dataclass(frozen=True)
class InitConfig(Record):
    """The images that sampling starts from (img2img), and masks of what of them is made anew (inpainting).

    image, mask: a file, a list of files, or scenes ("scene:0-"), one for each seed, repeating in turn; of a mask white
    is made anew, and a scene's is of its objects. strength: the share of the steps, as of `ImageStart`; None: 0.6.
    reduce: images are made so many times smaller and enlarged again, before anything else. draw: latents drawn from the
    VAE's Gaussian, keyed by the seed, in place of its mean. paste: the kept pixels are put into the finished image.
    """

    image: str | tuple[str, ...] | None = None
    mask: str | tuple[str, ...] | None = None
    strength: Fraction | None = None
    reduce: Annotated[int, within(1, 64, whole=True)] = 1
    draw: Flag = False
    paste: Flag = False

    def __post_init__(self) -> None:
        if self.image is None:
            for key in ("mask", "strength"):
                if getattr(self, key) is not None:
                    raise ConfigError(f"{key}: {getattr(self, key)!r} without an image; give init.image")
        if self.paste and self.mask is None:
            raise ConfigError("paste: there is no mask, so no part is kept; give init.mask, or leave it out")

    def steps(self, steps: int) -> int:
        """How many of `steps` are sampled; `ImageStart` counts the same."""
        if self.image is None:
            return steps
        return min(int(steps * (STRENGTH if self.strength is None else self.strength)), steps)


@dataclass(frozen=True)
class IPAdapterConfig(Record):
    """An image as a prompt beside the text, by an IP-Adapter's file and the folder of its CLIP vision tower (see
    `load_ip_adapter`). where: cross-attentions. fingerprint: of the weights and the image, which a run fills in."""

    path: str
    image: str
    image_encoder: str
    scale: Number = 1.0
    where: str | Whole | tuple[str | Whole, ...] = "*"
    fingerprint: str | None = None
