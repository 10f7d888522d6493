"""Features of real images: procedural scenes, or a folder of image files. Computed once, kept beside the runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from segresearch import runs
from segresearch.config.parse import HELD_OUT, SCENE, scene_numbers
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation import shards
from segresearch.metrics.features import Extractor
from segresearch.scenes.scenes import scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SCENES = 500  # rendered together
FEATURES = "features"


@dataclass(frozen=True)
class Reference:
    """Real images: indices of scenes, or files by name. text: the config's name for them."""

    text: str
    scenes: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.scenes or self.files)

    def identity(self) -> str:
        """A digest of what the images are; of files their names and sizes, not their bytes."""
        folder = Path(self.text).expanduser()
        files = [[str(path.relative_to(folder)), path.stat().st_size] for path in self.files]
        return runs.digest(["scenes", *self.scenes] if self.scenes else files)

    def batches(self) -> Iterator[Tensor]:
        """uint8 (b, 3, h, w): scenes by the hundred, files one by one in their own size. Raises ConfigError."""
        for i in range(0, len(self.scenes), SCENES):
            yield scenes(self.scenes[i : i + SCENES]).images
        for path in self.files:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "not an image that can be read"
                raise ConfigError(f"reference: {path}: {reason}") from error
            yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)


def reference(text: str) -> Reference:
    """The images of "scene:100000-109999" or of a folder. ConfigError: neither, or fewer than two."""
    if text.startswith(SCENE):
        images = Reference(text, tuple(HELD_OUT + n for n in scene_numbers(text, 0, "reference") or ()))
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ConfigError(f'reference: {text}: no such folder; give one of real images, or "scene:100000-109999"')
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise ConfigError(f"reference: {text}: no images in it ({', '.join(SUFFIXES)})")
        images = Reference(text, files=tuple(files))
    if len(images) < 2:
        raise ConfigError(f"reference: {text}: one image; a distance needs many")
    return images


def features(images: Reference, extractor: Extractor, out: str | Path) -> Float[Tensor, "n dim"]:
    """Of each image, from <out>/reference where they are kept, else computed and kept there. Raises ConfigError."""
    digest = runs.digest([extractor.name, extractor.weights, images.identity()])
    path = Path(out) / "reference" / f"{extractor.name}-{digest}.safetensors"
    if shards.producers(path).get(FEATURES) == extractor.weights:
        return torch.from_numpy(shards.load(path, FEATURES))
    parts = []
    with tqdm(total=len(images), unit="image", desc=f"reference, {extractor.name}", disable=None, leave=False) as bar:
        for batch in images.batches():
            try:
                parts.append(extractor.of(batch).float())
            except InputError as error:
                raise ConfigError(f"reference: {images.text}: {error}") from error
            bar.update(len(batch))
    values = torch.cat(parts)
    shards.write(path, {FEATURES: shards.Array(values.numpy(), extractor.weights)})
    return values
