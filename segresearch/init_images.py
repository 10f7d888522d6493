"""Images that sampling starts from, and masks of what is made anew: files or scenes, identified by content, as tensors.
Light, but for the tensors: no torch."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from segresearch.config.expand import HELD_OUT
from segresearch.config.inputs import STRENGTH, InitConfig
from segresearch.config.schema import SCENE
from segresearch.errors import ConfigError, InputError
from segresearch.image_files import fit, open_image, open_map
from segresearch.runs import plain, replacing

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

    from segresearch.models import Cond, StableDiffusion
    from segresearch.sampling import ImageStart

MARGIN = 16  # a scene's mask reaches this part of the shorter side beyond its objects


@dataclass(frozen=True)
class IdentifiedInit:
    """A config's `init` and the digests of its images and masks by their names."""

    init: InitConfig
    digests: Mapping[tuple[str, str], str]

    def contents(self, row: Sequence[str]) -> dict[str, str]:
        """What the names of one image stand for: its image, and its mask if there is one."""
        return {key: self.digests[key, name] for key, name in zip(("image", "mask"), row)}

    def identity(self, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        """What images that start from these depend on: not what things are called or where they lie."""
        settings = {key: value for key, value in plain(self.init).items() if key not in ("image", "mask")}
        return {**settings, "contents": [self.contents(row) for row in rows]}

    def record(self, row: Sequence[str]) -> dict[str, Any]:
        """The part of an image's record: `init` as a config has it, and what its names stand for. {} without one."""
        if not row:
            return {}
        names: dict[str, Any] = dict(zip(("image", "mask"), row))
        return {"init": plain(dataclasses.replace(self.init, **names)), "init_contents": self.contents(row)}


def identify_init(init: InitConfig, rows: Sequence[Sequence[str]], at: str = "init") -> IdentifiedInit:
    """`init` and its images, checked. rows: of each image the name of its image, and of its mask if there is one.
    ConfigError for a file that is no image, and for a mask whose file has another size than its image."""
    digests: dict[tuple[str, str], str] = {}
    for k, key in enumerate(("image", "mask")):
        names = list(dict.fromkeys(row[k] for row in rows if len(row) > k))
        for name in names:
            if not name.startswith(SCENE):
                try:
                    open_image(name) if key == "image" else open_map(name)
                except InputError as error:
                    raise ConfigError(f"{at}.{key}: {error}") from error
                digests[key, name] = hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()[:12]
        if drawn := [name for name in names if name.startswith(SCENE)]:
            pixels = _scenes(tuple(drawn), (64, 64), key == "mask").numpy()
            digests |= {(key, n): hashlib.sha256(one.tobytes()).hexdigest()[:12] for n, one in zip(drawn, pixels)}
    for image, mask in dict.fromkeys((row[0], row[1]) for row in rows if len(row) == 2):
        if not image.startswith(SCENE) and not mask.startswith(SCENE):
            sizes = [open_image(name).size for name in (image, mask)]
            if sizes[0] != sizes[1]:
                (w, h), (mask_w, mask_h) = sizes
                text = f"{mask} has {mask_w}×{mask_h} pixels, its image {image} has {w}×{h}"
                raise ConfigError(f"{at}.mask: {text}; give a mask of the image's size")
    return IdentifiedInit(init, digests)


@functools.lru_cache(maxsize=16)  # the methods of a run go through the same images
def _scenes(names: tuple[str, ...], size: tuple[int, int], masks: bool) -> "UInt8[Tensor, 'b c h w']":
    """Images (3 channels) of held-out scenes, or masks of their objects (1 channel, 0 and 255)."""
    from segresearch.scenes.scenes import object_masks, scenes

    numbers = [HELD_OUT + int(name.removeprefix(SCENE)) for name in names]
    if masks:
        return object_masks(numbers, size=size, margin=min(size) // MARGIN)[:, None].byte() * 255
    return scenes(numbers, size=size).images


def pixels(names: Sequence[str], size: tuple[int, int], masks: bool = False) -> "UInt8[Tensor, 'b c h w']":
    """The images as RGB, or the masks as grey, cut as `fit` does to size = (height, width). InputError: see `fit`,
    `open_image`, `open_map`, `scenes`."""
    import torch

    if all(name.startswith(SCENE) for name in names):
        return _scenes(tuple(names), size, masks)

    def read(name: str) -> "Tensor":
        if name.startswith(SCENE):
            return _scenes((name,), size, masks)
        image = fit(open_map(name) if masks else open_image(name), size)
        if masks and image.mode == "F":
            return torch.from_numpy(np.rint(np.clip(np.array(image), 0, 1) * 255).astype(np.uint8))[None, None]
        values = torch.from_numpy(np.array(image.convert("L" if masks else "RGB")))
        return values[None, None] if masks else values.permute(2, 0, 1)[None]  # (h, w, c) -> (1, c, h, w)

    return torch.cat([read(name) for name in names])


@dataclass(frozen=True, eq=False)
class InitImages:
    """What the images of a batch start from.

    images: in [−1, 1], reduced if the config says so. mask: 1 where an image is made anew, from 0.5 of white on.
    """

    init: InitConfig
    images: "Float[Tensor, 'b 3 h w']"
    mask: "Float[Tensor, 'b 1 h w'] | None" = None

    def conds(self, sd: "StableDiffusion", conds: "Mapping[str, Cond]") -> "Mapping[str, Cond]":
        """The conditionings as the model reads them: with the image where its UNet has channels for it."""
        return sd.with_image(conds, self.images, self.mask) if sd.extra_channels else conds

    def start(self, sd: "StableDiffusion", seeds: Sequence[int]) -> "ImageStart | None":
        """Where sampling starts; None is from noise. A UNet that reads the image starts from noise unless the config
        has a strength below 1, and needs no mask here. seeds: of the images, keys of the draw from the VAE's
        Gaussian."""
        from segresearch.sampling import ImageStart, image_key, initial_noise

        if sd.extra_channels and self.init.strength in (None, 1):
            return None

        noise = None
        if self.init.draw:
            shape = sd.latent_shape((self.images.shape[2], self.images.shape[3]))
            noise = initial_noise([image_key(seed, "latents") for seed in seeds], shape).to(sd.device)
        mask = None if self.mask is None or sd.extra_channels else sd.latent_mask(self.mask)
        return ImageStart(sd.encode_images(self.images, noise), strength(self.init, sd), mask)

    def paste(self, sampled: "UInt8[Tensor, 'b 3 h w']") -> "UInt8[Tensor, 'b 3 h w']":
        """The sampled images with the pixels of the kept part, where the config asks for that."""
        from segresearch.sample_images import to_uint8

        if not self.init.paste or self.mask is None:
            return sampled
        return sampled.where(self.mask.to(sampled.device).bool(), to_uint8(self.images).to(sampled.device))


def strength(init: InitConfig, sd: "StableDiffusion") -> float:
    """The share of the steps that is sampled: by default 0.6, and all where the UNet reads the image."""
    default = 1.0 if sd.extra_channels else STRENGTH
    return default if init.strength is None else float(init.strength)


def init_images(init: InitConfig, rows: Sequence[Sequence[str]], size: tuple[int, int]) -> InitImages | None:
    """Of a batch, at size = (height, width); None where the rows have no image. rows: as of `identify_init`.
    ConfigError for a size that `reduce` does not divide."""
    import torch.nn.functional as F

    if not rows or not rows[0]:
        return None
    images = pixels([row[0] for row in rows], size).float() / 127.5 - 1
    if (factor := init.reduce) > 1:
        if size[0] % factor or size[1] % factor:
            raise ConfigError(f"init.reduce: {factor} does not divide the sides of the images, {size[0]}×{size[1]}")
        small = F.avg_pool2d(images, factor)  # (b, 3, h, w) -> (b, 3, h/r, w/r)
        images = F.interpolate(small, size=size, mode="bicubic", antialias=False).clamp(-1, 1)
    mask = None
    if len(rows[0]) == 2:
        mask = (pixels([row[1] for row in rows], size, masks=True) >= 128).float()
        for row, one in zip(rows, mask):
            if not one.any():
                print(f"{row[1]}: a mask without white, so nothing is made anew", file=sys.stderr)
    return InitImages(init, images, mask)


def save_start(init: InitConfig, row: Sequence[str], size: tuple[int, int], paths: Sequence[Path]) -> None:
    """Write what an image starts from, reduced as the config says, and its mask as PNGs, unless they exist."""
    if all(path.is_file() for path in paths):
        return
    from segresearch.sample_images import to_uint8

    start = init_images(init, [row[:1]], size)
    assert start is not None
    masks = [(pixels([name], size, masks=True) >= 128).byte() * 255 for name in row[1:]]
    images = [to_uint8(start.images), *masks]
    for path, image in zip(paths, images, strict=True):
        values = image[0].permute(1, 2, 0).numpy()
        with replacing(path) as temporary:
            Image.fromarray(values if values.shape[2] == 3 else values[..., 0]).save(temporary, format="png")


def in_words(init: InitConfig) -> str:
    """What images start from, as a page says it."""
    strength = "default strength" if init.strength is None else f"strength {init.strength:g}"
    smaller = f", made {init.reduce} times smaller first" if init.reduce > 1 else ""
    return strength + smaller + ", a mask" * (init.mask is not None)
