"""The geometry of the five shapes, each in its own frame: where a ray meets it, its normals, and its shadow's outline.

In an object's frame its radius is one and its centre the origin: x to its right, y up, z towards the camera. Rays are
`origin + t * direction`; directions need not have unit length, and may be given with axes of size one where constant.
"""

import math
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.scenes.captions import SHAPES
from segresearch.scenes.layout import HEIGHTS

Parts = tuple[Tensor, Tensor, Tensor]  # x, y and z
# half the sides of a box, in the object's frame, that hides the shape from any camera of the layouts
BOX = ((1.02, 1.02, 0.34), (0.82, 0.82, 0.82), (0.95, 1.0, 0.95), (1.0, 1.0, 0.29), (1.12, 1.12, 0.34))
GLOSS = (0.55, 0.12, 0.15, 0.45, 0.15)
_CUBE, _CONE, _TORUS, _TUBE = 0.82, 0.475, 0.71, 0.29
_TIP, _NOTCH, _THICK = 1.12, 0.52, 0.34
_CORNER = math.pi / 5
_OUTLINE = [(r * math.sin(k * _CORNER), r * math.cos(k * _CORNER), 0.0) for k, r in enumerate((_TIP, _NOTCH) * 5)]
_RISE, _RUN = _TIP - _NOTCH * math.cos(_CORNER), _NOTCH * math.sin(_CORNER)
_EDGE_X, _EDGE_Y = _RISE / math.hypot(_RISE, _RUN), _RUN / math.hypot(_RISE, _RUN)  # outward normal of a folded edge


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _fold(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The plane folded into a wedge of 36 degrees right of the star's upper tip."""
    x = x.abs()
    for sign in (1, -1):
        kx, ky = sign * math.cos(_CORNER), -math.sin(_CORNER)
        over = 2 * (kx * x + ky * y).clamp(min=0)
        x, y = x - over * kx, y - over * ky
    return x.abs(), y


def _star_hit(o: Parts, d: Parts) -> Float[Tensor, "n h w"]:
    """The star's ten front facets, all in view from wherever layouts put the camera, so that none hides another.

    A ray crosses the facet whose three sides it passes on the inner hand: side . direction > 0. That is linear in the
    direction, so each of an image's rows and columns gives its part once.
    """
    dx, dy, dz = d
    origin = torch.stack(o).flatten(1).T[:, None]  # (3, n, 1, 1) -> (n, 1, 3)
    corners, point = (torch.tensor(part, device=dx.device) for part in (_OUTLINE, (0.0, 0.0, _THICK)))
    following = corners.roll(-1, 0)
    rims = torch.linalg.cross(corners - origin, following - origin, dim=-1)
    spokes = torch.linalg.cross((point - origin).expand(-1, 10, -1), corners - origin, dim=-1)
    facets = torch.linalg.cross(corners - point, following - point, dim=-1)
    facets = facets / (facets * (point - origin)).sum(-1, keepdim=True)
    rows = torch.stack([dx[:, :, :1], dy[:, :, :1], dz[:, :, :1]], 1)  # (n, 3, h, 1)
    columns = torch.stack([dx[:, :1] - dx[:, :1, :1], dz[:, :1] - dz[:, :1, :1]], 1)  # (n, 2, 1, w); added to a row

    def across(normals: Tensor) -> tuple[Tensor, Tensor]:  # (n, 10, 3) -> (n, 10, 1, w), (n, 10, h, 1)
        x, y, z = normals.movedim(-1, 0)[..., None, None]
        return x * columns[:, :1] + z * columns[:, 1:], x * rows[:, :1] + y * rows[:, 1:2] + z * rows[:, 2:]

    (spoke_column, spoke_row), (rim_column, rim_row), (facet_column, facet_row) = map(across, (spokes, rims, facets))
    left = [spoke_column[:, k] > -spoke_row[:, k] for k in range(10)]
    inverse = torch.zeros_like(dx)
    for k in range(10):
        crossed = (left[k] > left[(k + 1) % 10]) & (rim_column[:, k] > -rim_row[:, k])
        inverse += crossed * (facet_column[:, k] + facet_row[:, k])
    return torch.where(inverse > 0, 1 / inverse, math.inf)


def hit(shape: str, o: Float[Tensor, "3 n 1 1"], d: Parts) -> Float[Tensor, "n h w"]:
    """The smallest t > 0 where each ray meets the unit shape, infinite where it misses."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    if shape in ("sphere", "cone"):
        if shape == "sphere":
            a = dx * dx + dy * dy + dz * dz
            b = ox * dx + oy * dy + oz * dz
            c = ox * ox + oy * oy + oz * oz - 1
        else:  # x^2 + z^2 = k^2 (1 - y)^2 with -1 <= y <= 1
            k = _CONE**2
            a = dx * dx + dz * dz - k * dy * dy
            b = ox * dx + oz * dz + k * (1 - oy) * dy
            c = ox * ox + oz * oz - k * (1 - oy) ** 2
        inside = b * b - a * c
        root = inside.clamp(min=0).sqrt()
        t = (-b - root) / a
        if shape == "sphere":
            return torch.where(inside > 0, t, math.inf)
        other = (-b + root) / a
        t, other = (torch.where((inside > 0) & (s > 0) & ((oy + s * dy).abs() <= 1), s, math.inf) for s in (t, other))
        return t.minimum(other)
    if shape == "cube":
        middle = [-origin / step for origin, step in ((ox, dx), (oy, dy), (oz, dz))]
        half = [(_CUBE / step).abs() for step in d]
        near = reduce(torch.maximum, (m - h for m, h in zip(middle, half)))
        far = reduce(torch.minimum, (m + h for m, h in zip(middle, half)))
        return torch.where(near < far, near, math.inf)
    if shape == "ring":  # meets the sphere around the nearest point of the tube's middle line, then repeats from there
        square = dx * dx + dy * dy + dz * dz
        t = (0.5 * _TUBE - oz) / dz
        for _ in range(4):
            x, y = ox + t * dx, oy + t * dy
            shrink = _TORUS / _length(x, y)
            x, y = ox - x * shrink, oy - y * shrink
            b = x * dx + y * dy + oz * dz
            inside = b * b - square * (x * x + y * y + (oz * oz - _TUBE**2))
            t = (-b - inside.clamp(min=0).sqrt()) / square
        return torch.where(inside > 0, t, math.inf)
    return _star_hit((ox, oy, oz), d)


def normal(shape: str, p: Float[Tensor, "3 m"]) -> tuple[Parts, Tensor | int]:
    """Outward unit normals at points of the unit shape, and the number of the flat face they lie on (0 if curved)."""
    x, y, z = p
    if shape == "sphere":
        return (x, y, z), 0
    if shape == "cube":
        ax, ay, az = p.abs()
        on_x = (ax > ay) & (ax > az)
        on_y = ~on_x & (ay > az)
        on_z = ~(on_x | on_y)
        return (on_x * x.sign(), on_y * y.sign(), on_z * z.sign()), on_y.to(torch.uint8) + 2 * on_z.to(torch.uint8)
    face: Tensor | int = 0
    if shape == "cone":
        y = _CONE**2 * (1 - y)
    elif shape == "ring":
        shrink = 1 - _TORUS / _length(x, y)
        x, y = x * shrink, y * shrink
    else:
        wedge = (torch.atan2(x, y) * (1 / _CORNER)).floor()
        face = (wedge + 5).to(torch.uint8)
        # a facet's steepest line points along its edge's normal, mirrored in every other wedge
        odd = wedge - 2 * (wedge / 2).floor()
        tip, slope = (wedge + odd) * _CORNER, _THICK / (_EDGE_Y * _TIP)
        ex, ey, sin, cos = slope * _EDGE_X * (1 - 2 * odd), slope * _EDGE_Y, tip.sin(), tip.cos()
        x, y, z = ex * cos + ey * sin, ey * cos - ex * sin, torch.ones_like(z)
    shorten = (x * x + y * y + z * z).rsqrt()
    return (x * shorten, y * shorten, z * shorten), face


def shadow(shape: str, g: tuple[Tensor, Tensor], s: tuple[Tensor, Tensor]) -> Float[Tensor, "n h w"]:
    """Signed distance (about) from floor points g to the outline of the unit shape's shadow; s: where a point at height
    one casts its shadow. Everything in the object's frame, with the floor point below its centre as origin."""
    (x, z), (sx, sz) = g, s
    length = _length(sx, sz)
    ax, az = sx / length, sz / length
    along, across = x * ax + z * az, x * az - z * ax
    if shape == "sphere":
        return _length((along - length) / (1 + length**2).sqrt(), across) - 1
    if shape == "cone":
        base, tip = 2 * _CONE, 2 * length
        sin = (base / tip).clamp(max=1)
        cos, across = (1 - sin**2).sqrt(), across.abs()
        beside = along * cos > across * sin
        return torch.where(beside, across * cos + (along - tip) * sin, _length(along, across) - base)
    if shape == "cube":  # a square swept along the shadow's direction: a hexagon
        x, z = x - _CUBE * sx, z - _CUBE * sz
        return (x.abs() - _CUBE * (1 + sx.abs())).maximum(z.abs() - _CUBE * (1 + sz.abs())).maximum(
            across.abs() - _CUBE * (ax.abs() + az.abs()))
    tall = z / sz  # upright flat shapes: which point of the plane z = 0 casts its shadow here
    x, y = x - tall * sx, tall - HEIGHTS[SHAPES.index(shape)]
    if shape == "ring":
        return (_length(x, y) - _TORUS).abs() - _TUBE
    x, y = _fold(x, y)
    return x * _EDGE_X + (y - _TIP) * _EDGE_Y
