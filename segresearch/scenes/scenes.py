"""Procedural captioned scenes: objects on a checkered floor under a coloured sky, with exact depth and edge maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from segresearch.errors import InputError
from segresearch.scenes.captions import COLORS, DRAWS, FLOORS, SHAPES, SIZES, SKIES, VOCABULARY, Thing, caption
from segresearch.scenes.layout import FOCAL, SLOTS, Layout, layout, uniform
from segresearch.scenes.rendering import render
from segresearch.threads import one_thread

__all__ = ["COLORS", "FLOORS", "SHAPES", "SIZES", "SKIES", "VOCABULARY", "SceneObject", "Scenes", "captions", "scenes"]

_CHUNK = 64 * 64 * 128  # pixels rendered together: a balance of cache misses and calls
_WORDING = 16  # stream of the first caption variant


@dataclass(frozen=True)
class SceneObject:
    """One object. x, y: its centre in pixels from the image's upper left corner; distance: from the camera to its
    centre, in world units like radius; visible: the fraction of its outline that no other object hides."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    distance: float
    radius: float
    visible: float


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. depth: exact distance from the camera at each pixel's centre in world units, infinite in the
    sky; edges: pixels crossed by an outline, a crease between flat faces, or the horizon."""

    images: UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    depth: Float[Tensor, "b h w"]
    edges: Bool[Tensor, "b h w"]
    objects: list[list[SceneObject]]
    floors: list[str]
    skies: list[str]


def _indices(indices: Sequence[int]) -> Int[Tensor, "b"]:
    if not len(indices):
        raise InputError("no scene indices: give at least one")
    return torch.as_tensor(indices if not isinstance(indices, range) else list(indices), dtype=torch.int64)


def _captions(scene: Layout, indices: Int[Tensor, "b"], seed: int, variant: int) -> list[str]:
    columns = (scene.present, scene.shape, scene.color, scene.size, scene.u, scene.distance,
               FOCAL * scene.radius / scene.distance, scene.floor, scene.sky)
    words = uniform(indices, seed, _WORDING + variant, DRAWS)
    texts = []
    for present, shape, color, size, u, distance, radius, floor, sky, draws in zip(
            *(column.tolist() for column in columns), words.tolist(), strict=True):
        things = [Thing(SHAPES[shape[k]], COLORS[color[k]], SIZES[size[k]], u[k], distance[k], radius[k])
                  for k in range(SLOTS) if present[k]]
        texts.append(caption(things, FLOORS[floor], SKIES[sky], draws))
    return texts


@one_thread
def captions(indices: Sequence[int], seed: int = 0, variant: int = 0) -> list[str]:
    """The captions of `scenes(indices, seed)` without their images; every variant is another true wording, 0 the one
    that `scenes` gives."""
    rows = _indices(indices)
    return _captions(layout(rows, seed), rows, seed, variant)


@one_thread
def scenes(indices: Sequence[int], seed: int = 0, size: int | tuple[int, int] = 64) -> Scenes:
    """The scenes (seed, index), each the same whatever the batch. size: one side or (height, width), in pixels.

    Raises ValueError for no indices, or sides under 16 pixels.
    """
    h, w = (size, size) if isinstance(size, int) else size
    if min(h, w) < 16:
        raise InputError(f"scenes of size {(h, w)}: each side needs at least 16 pixels")
    rows = _indices(indices)
    scene = layout(rows, seed)
    chunk = max(1, _CHUNK // (h * w))
    parts = [render(scene[start : start + chunk], (h, w)) for start in range(0, len(rows), chunk)]
    images, depth, edges, visible = (torch.cat(part) for part in zip(*parts, strict=True))
    scale = min(h, w) / 2
    columns = (scene.present, scene.shape, scene.color, scene.size, w / 2 + scale * scene.u, h / 2 - scale * scene.v,
               scene.distance, scene.radius, visible)
    objects = [[SceneObject(SHAPES[s], COLORS[c], SIZES[z], *rest)
                for there, s, c, z, *rest in zip(*slots, strict=True) if there]
               for slots in zip(*(column.tolist() for column in columns), strict=True)]
    return Scenes(images, _captions(scene, rows, seed, 0), depth, edges, objects,
                  [FLOORS[k] for k in scene.floor.tolist()], [SKIES[k] for k in scene.sky.tolist()])
