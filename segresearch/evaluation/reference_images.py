"""Real images, the reference of distances: procedural scenes, or a folder of files. Their features are computed once
for the same images and the same network, whatever the run, and kept beside the runs."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch import runs
from segresearch.config.expand import HELD_OUT, SCENE, scene_numbers
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation import shards
from segresearch.image_files import open_image
from segresearch.metrics.features import Extractor
from segresearch.progress import Bar
from segresearch.scenes.scenes import scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHERS = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2")  # of images that are not read
SCENES = 500  # rendered together
FEATURES = "features"
READING = "upright, on white"  # how files become pixels, on which their features depend
CONTENTS = "contents.json"  # of files: path -> [bytes, ctime in ns, SHA-256]; a copied mtime hides a change


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
        if not self.files:
            return self.identity()
        return runs.digest([READING, *_digests(self.files, Path(out) / "reference" / CONTENTS)])

    def batches(self) -> Iterator[tuple[str, UInt8[Tensor, "b 3 h w"]]]:
        """What names a batch, and its images: scenes by the hundred, files one by one in their own size, read as
        `open_image` reads them. InputError for a file that cannot be read."""
        for i in range(0, len(self.scenes), SCENES):
            yield self.text, scenes(self.scenes[i : i + SCENES]).images
        for path in self.files:
            pixels = np.asarray(open_image(path))
            yield str(path), torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)


def reference(text: str) -> Reference:
    """The images of "scene:100000-109999" or of a folder. ConfigError: neither, or fewer than two."""
    if text.startswith(SCENE):
        images = Reference(text, tuple(HELD_OUT + n for n in scene_numbers(text, 0, "reference") or ()))
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ConfigError(f'reference: {text}: no such folder; give one of real images, or "scene:100000-109999"')
        alike = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES + OTHERS)
        files = [path for path in alike if path.suffix.lower() in SUFFIXES and path.is_file()]
        if files and (left := [path for path in alike if path not in set(files) and not path.is_dir()]):
            readable = f"readable {', '.join(SUFFIXES)} alone count"
            warnings.warn(f"{folder}: {left[0].name} is left out, of {len(left)} files; {readable}", stacklevel=2)
        if not files:
            raise ConfigError(f"reference: {text}: no images in it ({', '.join(SUFFIXES)})")
        images = Reference(text, files=tuple(files))
    if len(images) < 2:
        raise ConfigError(f"reference: {text}: one image; a distance needs many")
    return images


def measured(images: Reference, of: Callable[[Tensor, int], Tensor], bar: Bar) -> Float[Tensor, "n *of"]:
    """`of` each batch and the number of its first image, joined. InputError, with the name of the image."""
    values: list[Tensor] = []
    first = 0
    for name, batch in images.batches():
        try:
            values.append(of(batch, first).float())
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        first += len(batch)
        bar.add(len(batch))
    return torch.cat(values)


def features(images: Reference, extractor: Extractor, out: str | Path) -> Float[Tensor, "n dim"]:
    """Of each image, from <out>/reference where those of the same images are kept, else computed and kept there. Raises
    ConfigError."""
    digest = runs.digest([extractor.name, extractor.weights, images.content(out)])
    path = Path(out) / "reference" / f"{extractor.name}-{digest}.safetensors"
    try:
        shards.drop_damaged(path)
        if shards.producers(path).get(FEATURES) == extractor.weights:
            return torch.from_numpy(shards.load(path, FEATURES))
    except shards.Damaged as error:
        shards.drop(error)
    with Bar(len(images)) as bar:
        bar.describe(f"reference, {extractor.name}")
        values = measured(images, lambda batch, _: extractor.of(batch), bar)
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
            if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == [stat.st_size, stat.st_ctime_ns]):
                with path.open("rb") as file:
                    entry = [stat.st_size, stat.st_ctime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise ConfigError(f"reference: {path}: {error.strerror}") from error
        entries[name] = entry
        digests.append(str(entry[2]))
    if entries != known:
        with contextlib.suppress(OSError):  # a finished run in a folder that cannot be written is shown all the same
            runs.write(kept, json.dumps(entries))
    return digests
