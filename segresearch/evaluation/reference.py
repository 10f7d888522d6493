"""Features of real pictures: procedural scenes, or a folder of image files. Computed once, kept beside the runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from segresearch import runs
from segresearch.config import EvaluateConfig
from segresearch.config.parse import HELD_OUT, SCENE, scene_numbers
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation import shards
from segresearch.metrics.features import Extractor

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SCENES = 500  # rendered together
FEATURES = "features"


def sources(config: EvaluateConfig) -> tuple[int, ...] | tuple[Path, ...]:
    """Indices of scenes, or the files of a folder in the order of their names. ConfigError: neither, or too few."""
    text = config.reference
    found: tuple[Any, ...]
    if text.startswith(SCENE):
        numbers = scene_numbers(text, 0, "reference")
        assert numbers is not None
        found = tuple(HELD_OUT + n for n in numbers)
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ConfigError(f'reference: {text}: no such folder; give one of real pictures, or "scene:100000-109999"')
        found = tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in KINDS and p.is_file()))
        if not found:
            raise ConfigError(f"reference: {text}: no pictures in it ({', '.join(KINDS)})")
    if len(found) < 2:
        raise ConfigError(f"reference: {text}: one picture; a distance needs many")
    return found


def identity(config: EvaluateConfig, found: tuple[int, ...] | tuple[Path, ...]) -> str:
    """A digest of what the reference is; of files their names and sizes, not their bytes."""
    if isinstance(found[0], int):
        return runs.digest(["scenes", *found])
    folder = Path(config.reference).expanduser()
    return runs.digest([[str(p.relative_to(folder)), p.stat().st_size] for p in found if isinstance(p, Path)])


def _scenes(found: tuple[int, ...]) -> Iterator[Tensor]:
    from segresearch.scenes.scenes import scenes

    for i in range(0, len(found), SCENES):
        yield scenes(found[i : i + SCENES]).images


def _files(found: tuple[Path, ...]) -> Iterator[Tensor]:
    for path in found:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a picture that can be read"
            raise ConfigError(f"reference: {path}: {reason}") from error
        yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w)


def features(config: EvaluateConfig, extractor: Extractor) -> Tensor:
    """Features (n, dim) of the reference, from `out`/reference where they are whole, else computed and put there.

    Files keep their own size: the extractor brings them to its own. Raises ConfigError.
    """
    found = sources(config)
    digest = runs.digest([extractor.name, extractor.weights, identity(config, found)])
    folder = Path(config.out) / "reference" / f"{extractor.name}-{digest}"
    if shards.held(folder).get(FEATURES) == extractor.weights:
        return torch.from_numpy(shards.load(folder, FEATURES))
    parts = []
    images = _scenes(found) if isinstance(found[0], int) else _files(found)  # type: ignore[arg-type]
    with tqdm(total=len(found), unit="image", desc=f"reference, {extractor.name}", disable=None, leave=False) as bar:
        for part in images:
            try:
                parts.append(extractor.of(part).float())
            except InputError as error:
                raise ConfigError(f"reference: {config.reference}: {error}") from error
            bar.update(len(part))
    whole = torch.cat(parts)
    shards.commit(folder, {FEATURES: shards.Array(whole.numpy(), extractor.weights)})
    return whole
