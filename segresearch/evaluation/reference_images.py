"""Real images, the reference of distances: procedural scenes, or a folder of files. Their features are computed once
for the same images and the same network, whatever the run, and kept beside the runs."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from segresearch import runs
from segresearch.config.expand import HELD_OUT, SCENE, scene_numbers
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation import shards
from segresearch.metrics.features import Extractor
from segresearch.progress import Bar
from segresearch.scenes.scenes import scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SCENES = 500  # rendered together
FEATURES = "features"
CONTENTS = "contents.json"  # of files: path -> [bytes, time of change in ns, SHA-256]


@dataclass(frozen=True)
class Reference:
    """Real images: indices of scenes, or files by name. text: the config's name for them."""

    text: str
    scenes: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.scenes or self.files)

    def identity(self) -> str:
        """A digest of what the images are, by which a run is named; of files their names and sizes, not their bytes."""
        folder = Path(self.text).expanduser()
        files = [[str(path.relative_to(folder)), path.stat().st_size] for path in self.files]
        return runs.digest(["scenes", *self.scenes] if self.scenes else files)

    def content(self, out: str | Path) -> str:
        """A digest of the images themselves, in their order; of files their bytes, whatever they and their folder are
        called. out: where the digest of each file is kept, by its size and time of change."""
        return runs.digest(_digests(self.files, Path(out) / "reference" / CONTENTS)) if self.files else self.identity()

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


def extracted(images: Reference, extractor: Extractor, at: str, bar: Bar) -> Float[Tensor, "n dim"]:
    """Of each image, in batches. at: what names the images in a ConfigError."""
    parts = []
    for batch in images.batches():
        try:
            parts.append(extractor.of(batch).float())
        except InputError as error:
            raise ConfigError(f"{at}: {error}") from error
        bar.add(len(batch))
    return torch.cat(parts)


def features(images: Reference, extractor: Extractor, out: str | Path) -> Float[Tensor, "n dim"]:
    """Of each image, from <out>/reference where those of the same images are kept, else computed and kept there. Raises
    ConfigError."""
    digest = runs.digest([extractor.name, extractor.weights, images.content(out)])
    path = Path(out) / "reference" / f"{extractor.name}-{digest}.safetensors"
    if shards.producers(path).get(FEATURES) == extractor.weights:
        return torch.from_numpy(shards.load(path, FEATURES))
    with Bar(len(images)) as bar:
        bar.describe(f"reference, {extractor.name}")
        values = extracted(images, extractor, f"reference: {images.text}", bar)
    shards.write(path, {FEATURES: shards.Array(values.numpy(), extractor.weights)})
    return values


def _digests(files: Sequence[Path], kept: Path) -> list[str]:
    """The SHA-256 of each file. A file is read where `kept` has none of its size and time of change. ConfigError for a
    file that cannot be read."""
    known: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(kept.read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    entries, digests = dict(known), []
    for path in files:
        try:
            name, stat = str(path.resolve()), path.stat()
            entry = known.get(name)
            if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == [stat.st_size, stat.st_mtime_ns]):
                with path.open("rb") as file:
                    entry = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise ConfigError(f"reference: {path}: {error.strerror}") from error
        entries[name] = entry
        digests.append(str(entry[2]))
    if entries != known:
        runs.write(kept, json.dumps(entries))
    return digests
