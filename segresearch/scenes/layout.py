"""Objects and places of a procedural scene, from a counter-based hash: scene (seed, index) depends on no batch.

World: x right, y up, z forward, floor at y = 0, camera above the origin; a large object's radius is 0.9 units.
Image coordinates (u, v): u right, v up, the shorter side of the image spans -1 to 1.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from segresearch.scenes.captions import COLORS, FLOORS, SHAPES, SKIES
from segresearch.threads import one_thread

SLOTS = 4
FOCAL = 2.15  # focal length in units of half the shorter image side: a field of view of 50 degrees
_RADII = (0.44, 0.64, 0.90)  # small, medium, large; give or take 6 %, and less in a crowd
_CROWD = (1.0, 1.0, 0.88, 0.76)
_NEAR, _FAR = 3.5, 5.8
HEIGHTS = (1.0, 0.82, 1.0, 1.0, 0.906)  # of the centre above the floor, by shape, in units of the object's radius
_COLORS = {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.70, 0.16), "blue": (0.12, 0.26, 0.95),
           "yellow": (0.98, 0.86, 0.08), "purple": (0.60, 0.14, 0.80), "cyan": (0.08, 0.82, 0.88),
           "orange": (1.00, 0.50, 0.04), "white": (0.97, 0.97, 0.97)}
_FLOORS = {"grey": (0.52, 0.52, 0.54), "brown": (0.52, 0.36, 0.24), "green": (0.34, 0.50, 0.34),
           "blue": (0.32, 0.42, 0.62), "purple": (0.48, 0.36, 0.58), "beige": (0.76, 0.68, 0.54),
           "pink": (0.74, 0.50, 0.56), "teal": (0.26, 0.50, 0.50)}
_SKIES = {"blue": (0.36, 0.56, 0.84), "purple": (0.48, 0.36, 0.66), "pink": (0.86, 0.58, 0.68),
          "grey": (0.58, 0.60, 0.64), "teal": (0.26, 0.54, 0.56), "orange": (0.84, 0.54, 0.34),
          "beige": (0.84, 0.78, 0.64), "dark": (0.10, 0.11, 0.18)}


def _as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN, _MIX1, _MIX2 = (_as_int64(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on int64 with wrap-around; its shifts are logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(indices: Int[Tensor, "b"], seed: int, stream: int, count: int) -> Float[Tensor, "b {count}"]:
    """`count` numbers in [0, 1), float64, for every index: a pure function of (seed, index, stream, position)."""
    start = _mix(torch.tensor(_as_int64(seed), device=indices.device) * _GOLDEN + _as_int64(stream + 1))
    key = _mix(_mix(indices + start) + start)[:, None]
    draws = _mix(key + torch.arange(1, count + 1, device=indices.device) * _GOLDEN)
    return ((draws >> 11) & (2**53 - 1)).double() * 2.0**-53


@dataclass(frozen=True)
class Layout:
    """The parameters of b scenes of up to four objects: radians, colours in [0, 1], lengths in world units."""

    shape: Int[Tensor, "b 4"]
    color: Int[Tensor, "b 4"]
    size: Int[Tensor, "b 4"]
    present: Bool[Tensor, "b 4"]
    position: Float[Tensor, "b 4 3"]  # the object's centre
    radius: Float[Tensor, "b 4"]
    yaw: Float[Tensor, "b 4"]
    albedo: Float[Tensor, "b 4 3"]
    floor: Int[Tensor, "b"]
    sky: Int[Tensor, "b"]
    tones: Float[Tensor, "b 2 3"]  # the floor's two colours
    tiling: Float[Tensor, "b 4"]  # turn of the checkers, tile side, offsets
    heavens: Float[Tensor, "b 2 3"]  # the sky at the zenith and at the horizon
    height: Float[Tensor, "b"]  # of the camera
    pitch: Float[Tensor, "b"]  # of the camera, downwards
    light: Float[Tensor, "b 3"]  # unit vector towards the light
    u: Float[Tensor, "b 4"]  # image coordinate of the centres
    distance: Float[Tensor, "b 4"]  # camera to centre

    def __getitem__(self, rows: slice) -> "Layout":
        return Layout(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _places(draws: Float[Tensor, "b n"], radius: Float[Tensor, "b 4"], y: Float[Tensor, "b 4"],
            height: Float[Tensor, "b 1"], pitch: Float[Tensor, "b 1"]) -> Float[Tensor, "7 b 4"]:
    """x, z, u, v, depth along the optical axis, disc radius and whether it fits, of the slots one after the other.

    A slot takes the first of its candidates that is clear of the slots before it: bounding discs in the image at
    least 0.7 of their touching distance apart (one then hides about a fifth of an equal one) and footprints on the
    floor disjoint. A slot without a clear candidate does not fit and is left empty.
    """
    draws = draws.unflatten(1, (SLOTS, 2, -1))  # (b, n) -> (b, slots, 2, tries)
    cos, sin, order = pitch.cos(), pitch.sin(), 1e-6 * torch.arange(draws.shape[3], device=draws.device)
    slots: list[Tensor] = []
    for slot in range(SLOTS):
        r, rise = radius[:, slot, None], y[:, slot, None] - height
        z = _NEAR * (_FAR / _NEAR) ** draws[:, slot, 0]
        ahead = z * cos - rise * sin
        disc = FOCAL * 1.12 * r / ahead
        u = (draws[:, slot, 1] * 2 - 1) * (0.97 - disc)
        v = FOCAL * (rise * cos + z * sin) / ahead
        x = u * ahead / FOCAL
        clear = torch.ones_like(u)
        for other, (x0, z0, u0, v0, _, disc0, fits0) in enumerate(slots):
            seen = torch.hypot(u - u0, v - v0) / (0.7 * (disc + disc0))
            floor = torch.hypot(x - x0, z - z0) / (1.18 * (r + radius[:, other, None]))
            clear = torch.where(fits0 > 0, clear.minimum(seen).minimum(floor), clear)
        best = (clear - order).argmax(1, keepdim=True)
        candidates = torch.stack([x, z, u, v, ahead, disc, (clear >= 1).double()])  # (7, b, tries)
        slots.append(candidates.gather(2, best.expand(7, -1, -1)))  # (7, b, 1)
    return torch.cat(slots, 2)


@one_thread
def layout(indices: Int[Tensor, "b"], seed: int = 0) -> Layout:
    """The scenes (seed, index), one to four objects each, in float64 (so that rounding never reaches the pixels)."""
    device = indices.device
    scene, of_slot, placing = (uniform(indices, seed, stream, count) for stream, count in ((0, 32), (1, 32), (2, 256)))
    of_slot = of_slot.unflatten(1, (SLOTS, 8))

    def table(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    def between(low: float, high: float, draw: Tensor) -> Tensor:
        return low + (high - low) * draw

    count = 1 + (scene[:, 0, None] > table((0.28, 0.70, 0.89))).sum(1)
    shape, color = (of_slot[..., 0] * len(SHAPES)).long(), (of_slot[..., 1] * len(COLORS)).long()
    large = torch.where(count > 2, 0.85, 0.70)  # fewer large ones in a crowd
    size = (of_slot[..., 2] > 0.28).long() + (of_slot[..., 2] > large[:, None])
    radius = table(_RADII)[size] * between(0.94, 1.06, of_slot[..., 3]) * table(_CROWD)[count - 1, None]
    y = radius * table(HEIGHTS)[shape]
    height, pitch = between(1.5, 2.1, scene[:, 1]), torch.deg2rad(between(7.0, 13.0, scene[:, 2]))
    x, z, u, v, ahead, _, fits = _places(placing, radius, y, height[:, None], pitch[:, None])

    side = torch.where(scene[:, 3] < 0.5, -1.0, 1.0)
    azimuth = side * torch.deg2rad(between(25.0, 62.0, scene[:, 4]))
    elevation = torch.deg2rad(between(38.0, 60.0, scene[:, 5]))
    light = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), -azimuth.cos() * elevation.cos()], 1)
    # flat shapes turn a little towards the light, cubes any way; u / FOCAL makes the turn relative to the line of sight
    turn = torch.where(shape == SHAPES.index("cube"), torch.deg2rad(between(10.0, 80.0, of_slot[..., 4])),
                       side[:, None] * torch.deg2rad(between(-12.0, 30.0, of_slot[..., 4])))
    floor, sky = (scene[:, 6] * len(FLOORS)).long(), (scene[:, 7] * len(SKIES)).long()
    tone = table([_FLOORS[name] for name in FLOORS])[floor] + between(-0.03, 0.03, scene[:, 8:11])
    zenith = table([_SKIES[name] for name in SKIES])[sky] + between(-0.03, 0.03, scene[:, 11:14])
    tones = torch.stack([tone * between(1.0, 1.12, scene[:, 14:15]), tone * between(0.55, 0.72, scene[:, 15:16])], 1)
    tiling = torch.stack([torch.deg2rad(between(-40.0, 40.0, scene[:, 16])), between(0.8, 1.3, scene[:, 17]),
                          scene[:, 18] * 10, scene[:, 19] * 10], 1)
    # the sky pales towards the horizon
    heavens = torch.stack([zenith * 0.86, zenith + (1 - zenith) * between(0.12, 0.32, scene[:, 20:21])], 1)
    albedo = table([_COLORS[name] for name in COLORS])[color] + between(-0.03, 0.03, of_slot[..., 5:8])
    return Layout(
        shape=shape, color=color, size=size, position=torch.stack([x, y, z], 2), radius=radius,
        present=(torch.arange(SLOTS, device=device) < count[:, None]) & (fits > 0), yaw=turn - torch.atan(u / FOCAL),
        albedo=albedo.clamp(0, 1), floor=floor, sky=sky, tones=tones.clamp(0, 1), tiling=tiling,
        heavens=heavens.clamp(0, 1), height=height, pitch=pitch, light=light, u=u,
        distance=ahead * (1 + (u**2 + v**2) / FOCAL**2).sqrt())
