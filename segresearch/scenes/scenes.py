"""Procedural captioned scenes: objects on a checkered floor under a coloured sky, with exact depth and edge maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from segresearch.errors import InputError
from segresearch.scenes.captions import COLORS, DRAWS, FLOORS, SHAPES, SIZES, SKIES, VOCABULARY, Thing, caption
from segresearch.scenes.layout import FOCAL, Layout, layout, uniform
from segresearch.scenes.rendering import render
from segresearch.threads import one_thread

__all__ = ["COLORS", "SHAPES", "SIZES", "VOCABULARY", "Scenes", "captions", "depth_image", "edge_image", "scenes"]

_CHUNK = 64 * 64 * 128  # pixels rendered together: a balance of cache misses and calls
_WORDING = 16  # stream of the first caption variant


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. depth: exact distance from the camera at each pixel's centre in world units, infinite in the
    sky; edges: pixels crossed by an outline, a crease between flat faces, or the horizon."""

    images: UInt8[Tensor, "b 3 h w"]
    captions: list[str]
    depth: Float[Tensor, "b h w"]
    edges: Bool[Tensor, "b h w"]


def _indices(indices: Sequence[int]) -> Int[Tensor, "b"]:
    if not len(indices):
        raise InputError("no scene indices: give at least one")
    return torch.tensor(list(indices), dtype=torch.int64)


def _captions(scene: Layout, indices: Int[Tensor, "b"], seed: int, variant: int) -> list[str]:
    slots = (scene.present, scene.shape, scene.color, scene.size, scene.u, scene.distance,
             FOCAL * scene.radius / scene.distance)
    words = uniform(indices, seed, _WORDING + variant, DRAWS)
    texts = []
    for floor, sky, draws, *columns in zip(*(z.tolist() for z in (scene.floor, scene.sky, words, *slots)), strict=True):
        things = [Thing(SHAPES[shape], COLORS[color], SIZES[size], *rest)
                  for present, shape, color, size, *rest in zip(*columns, strict=True) if present]
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
    images, depth, edges = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scenes(images, _captions(scene, rows, seed, 0), depth, edges)


def edge_image(edges: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Edges white (1) on black (0) in the three channels, as SDXL's canny ControlNets take them."""
    return edges.float()[:, None].repeat(1, 3, 1, 1)  # (b, h, w) -> (b, 3, h, w)


def depth_image(depth: Float[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Inverse distance, scaled for each image from 0 (its farthest finite pixel) to 1 (its nearest); the sky is 0.

    That is what depth estimators give and SDXL's depth ControlNets take. depth: distances in any unit, infinite where
    there is nothing. An image without two finite distances is 0 throughout. Raises ValueError for a distance that is
    not positive.
    """
    if not (depth > 0).all():
        raise InputError(f"depth: distances must be positive, the smallest is {depth.min().item():g}")
    inverse = depth.double().reciprocal()  # infinite -> 0
    near = inverse.amax(dim=(1, 2), keepdim=True)
    far = inverse.where(inverse > 0, near).amin(dim=(1, 2), keepdim=True)
    span = (near - far).where(near > far, 1.0)
    scaled = ((inverse - far) / span).clamp(0, 1).where(inverse > 0, 0.0)
    return scaled.to(depth.dtype)[:, None].repeat(1, 3, 1, 1)  # (b, h, w) -> (b, 3, h, w)
