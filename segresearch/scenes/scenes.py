"""Procedural captioned scenes: objects on a checkered floor under a coloured sky, with exact depth and edge maps.

Rendering intersects rays exactly with each object, 3 x 3 samples a pixel. Rays are `camera + t * direction`, the
direction having length one along the optical axis. An object is tested only in the window of the image that can hold
it; objects of one shape and window size are tested together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from segresearch.errors import InputError
from segresearch.scenes.captions import COLORS, DRAWS, FLOORS, SHAPES, SIZES, SKIES, Thing, caption
from segresearch.scenes.layout import FOCAL, HEIGHTS, SLOTS, Layout, layout, uniform
from segresearch.scenes.shapes import BOX, GLOSS, hit, normal, shadow
from segresearch.threads import one_thread

SUB = 3  # samples per pixel and axis; odd, so that the middle sample is the pixel's centre
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


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _ground(scene: dict[str, Tensor], u: Tensor, v: Tensor, pixel: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Floor colour (checkers box-filtered over the pixel's footprint, no shadows), t, and floor x and z per pixel."""
    cos, sin = scene["pitch"].cos()[:, None, None], scene["pitch"].sin()[:, None, None]
    down = (sin - v * cos).clamp(min=1e-3)
    t = scene["height"][:, None, None] / down  # (b, h, 1)
    x, z = t * u, (t * (cos + v * sin)).expand(-1, -1, u.shape[-1])
    stretch = t / down
    wx, wz = pixel * (t + stretch * cos * u.abs()), pixel * stretch
    turn, side, shift_x, shift_z = scene["tiling"].T[..., None, None]
    c, s = turn.cos() / side, turn.sin() / side

    def signs(p: Tensor, width: Tensor) -> Tensor:  # mean over the footprint of the square wave of period 2
        def triangle(q: Tensor) -> Tensor:
            return (q - q.floor() - 0.5).abs()

        p, width = p / 2, width / 2
        return (triangle(p - width / 2) - triangle(p + width / 2)) / width

    stripes = signs(c * x + s * z + shift_x, c.abs() * wx + s.abs() * wz)
    stripes = stripes * signs(c * z - s * x + shift_z, s.abs() * wx + c.abs() * wz)
    mix = (0.5 + 0.5 * stripes)[:, None]
    light, dark = scene["tones"][:, 0, :, None, None], scene["tones"][:, 1, :, None, None]
    return dark + (light - dark) * mix, t, x, z


def _floor(scene: dict[str, Tensor], v: Float[Tensor, "1 h 1"]) -> Float[Tensor, "b h 1"]:
    """t of the floor in each row of pixels, infinite in the sky."""
    fall = scene["pitch"].sin()[:, None, None] - v * scene["pitch"].cos()[:, None, None]
    return torch.where(fall > 0, scene["height"][:, None, None] / fall, math.inf)


class _Objects(NamedTuple):
    """The objects of all scenes in one row, as rendering needs them."""

    image: Int[Tensor, "n"]
    slot: Int[Tensor, "n"]
    kind: Int[Tensor, "n"]
    x: Float[Tensor, "n"]
    z: Float[Tensor, "n"]
    radius: Float[Tensor, "n"]
    facing: Float[Tensor, "2 n"]  # cosine and sine of the yaw
    tilt: Float[Tensor, "2 n"]  # cosine and sine of the camera's pitch
    eye: Float[Tensor, "3 n"]  # the camera, in the object's frame
    lamp: Float[Tensor, "3 n"]  # direction of the light, in the object's frame
    palette: Float[Tensor, "9 n"]  # red, green and blue under full light of lamp, sky and floor
    left: Int[Tensor, "n"]  # the window, in pixels
    top: Int[Tensor, "n"]
    side: Int[Tensor, "n"]


def _objects(layout: Layout, scene: dict[str, Tensor], h: int, w: int) -> _Objects:
    image, slot = layout.present.nonzero(as_tuple=True)
    kind, device, scale = layout.shape[image, slot], image.device, min(h, w) / 2 * FOCAL
    radius, yaw, albedo = (scene[name][image, slot] for name in ("radius", "yaw", "albedo"))
    x, y, z = scene["position"][image, slot].T
    cy, sy, rise = yaw.cos(), yaw.sin(), y - scene["height"][image]
    tilt = torch.stack([scene["pitch"].cos(), scene["pitch"].sin()])[:, image]

    # the window bounds the corners of the box around the object, in the image
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=device).T
    box = torch.tensor(BOX, device=device)[kind].T[:, :, None] * radius[:, None] * signs[:, None]  # (3, n, 8)
    (bx, by, bz), c, s = box, cy[:, None], sy[:, None]
    bx, by, bz = x[:, None] + bx * c + bz * s, rise[:, None] + by, z[:, None] + bx * s - bz * c
    c, s = tilt[..., None]
    depth = bz * c - by * s
    across, down = scale * bx / depth + w / 2, h / 2 - scale * (by * c + bz * s) / depth
    left, top = across.amin(1).floor().long(), down.amin(1).floor().long()
    side = (across.amax(1).ceil().long() - left).maximum(down.amax(1).ceil().long() - top)
    step = max(2, min(h, w) // 8)
    side = (side + step - 1) // step * step
    left, top = (start.clamp(min=0).minimum(n - side).clamp(min=0) for start, n in ((left, w), (top, h)))

    lx, ly, lz = scene["light"][image].T
    palette = torch.stack([0.66 * albedo, albedo * (0.30 + 0.12 * scene["heavens"][:, 1])[image],
                           albedo * (0.22 + 0.25 * scene["tones"].mean(1))[image]])  # (3, n, 3)
    return _Objects(
        image, slot, kind, x, z, radius, torch.stack([cy, sy]), tilt, left=left, top=top, side=side,
        eye=torch.stack([-x * cy - z * sy, -rise, z * cy - x * sy]) / radius,
        lamp=torch.stack([lx * cy + lz * sy, ly, lx * sy - lz * cy]), palette=palette.transpose(1, 2).flatten(0, 1))


def _shadows(objects: _Objects, floor_x: Float[Tensor, "b h w"], floor_z: Float[Tensor, "b h w"]
             ) -> Float[Tensor, "b h w"]:
    """How dark the floor is: soft shadows of the lamp, and of the sky close to objects; the darkest object counts."""
    dark = torch.zeros_like(floor_x)
    cast = -objects.lamp / objects.lamp[1]
    for number, shape in enumerate(SHAPES):
        same = (objects.kind == number).nonzero()[:, 0]
        image, slot = objects.image[same], objects.slot[same]
        c, s, r = (value[same, None, None] for value in (*objects.facing, objects.radius))
        gx, gz = floor_x[image] - objects.x[same, None, None], floor_z[image] - objects.z[same, None, None]
        gx, gz = (gx * c + gz * s) / r, (gx * s - gz * c) / r
        outline = shadow(shape, (gx, gz), (cast[0, same, None, None], cast[2, same, None, None]))
        darkness = (_smooth(0.5 - outline / 0.36) * 0.62).maximum(0.5 / (1 + (gx * gx + gz * gz)).square())
        for k in range(SLOTS):  # an image has one object per slot
            rows = slot == k
            dark[image[rows]] = dark[image[rows]].maximum(darkness[rows])
    return dark


def _samples(objects: _Objects, us: Float[Tensor, "columns"], vs: Float[Tensor, "lines"]) -> tuple[Tensor, ...]:
    """Every sample that meets an object: its place in the batch's sample grid, its pixel in (images, 4 channels,
    pixels), its depth t, its label (object and flat face), and its red, green and blue."""
    h, w = len(vs) // SUB, len(us) // SUB
    half = F.normalize(objects.lamp + F.normalize(objects.eye, dim=0), dim=0)
    corner = (objects.image * (h * SUB) + objects.top * SUB) * (w * SUB) + objects.left * SUB
    corner_pixel = (objects.image * 4 * h + objects.top) * w + objects.left
    thirds = torch.arange(max(h, w) * SUB, device=us.device) // SUB
    label = (2 + objects.slot * 24).to(torch.uint8)
    groups = (objects.kind * 4096 + objects.side).unique().tolist()
    samples = []
    for number, side in (divmod(group, 4096) for group in groups):
        some = ((objects.kind == number) & (objects.side == side)).nonzero()[:, 0]
        height, width = min(side, h) * SUB, min(side, w) * SUB
        span = torch.arange(max(height, width), device=us.device)
        u = us[objects.left[some, None] * SUB + span[:width]][:, None]  # (n, 1, width)
        v = vs[objects.top[some, None] * SUB + span[:height]][:, :, None]  # (n, height, 1)
        c, s, cos, sin = (value[some, None, None] for value in (*objects.facing, *objects.tilt))
        forward = cos + v * sin
        d = (u * c + forward * s, v * cos - sin, u * s - forward * c)
        o = objects.eye[:, some, None, None]
        t = hit(SHAPES[number], o, d)
        n, row, column = (t < math.inf).nonzero(as_tuple=True)
        flat, which = (n * height + row) * width + column, some.index_select(0, n)
        p = torch.stack([torch.addcmul(a, t, b).view(-1).index_select(0, flat) for a, b in zip(o, d, strict=True)])
        (nx, ny, nz), face = normal(SHAPES[number], p)
        constants = (*objects.lamp, *half, *objects.palette)
        lx, ly, lz, hx, hy, hz, *colors = (value.index_select(0, which) for value in constants)
        open_sky = 0.62 + 0.38 * _smooth((p[1] + HEIGHTS[number]) / 0.7)  # less light close to the floor
        up = (0.5 + 0.5 * ny) * open_sky
        diffuse, down = (nx * lx + ny * ly + nz * lz).clamp(min=0), open_sky - up
        shine = (nx * hx + ny * hy + nz * hz).clamp(min=0).square().square().square().square().square() * GLOSS[number]
        color = [torch.addcmul(torch.addcmul(torch.addcmul(shine, diffuse, lamp), up, sky), down, floor).clamp_(0, 1)
                 for lamp, sky, floor in zip(colors[:3], colors[3:6], colors[6:], strict=True)]
        samples.append((
            corner.index_select(0, which) + row * (w * SUB) + column,
            corner_pixel.index_select(0, which) + (thirds * w).index_select(0, row) + thirds.index_select(0, column),
            (t * objects.radius[some, None, None]).view(-1).index_select(0, flat),
            label.index_select(0, which) + face, *color))
    return tuple(torch.cat(part) for part in zip(*samples, strict=True))


def render(
    layout: Layout, size: tuple[int, int]
) -> tuple[UInt8[Tensor, "b 3 h w"], Float[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
    """Images, distance from the camera at the pixels' centres (world units, infinite in the sky), and edges."""
    h, w = size
    scene = {name: value.float() for name, value in vars(layout).items() if value.is_floating_point()}
    b, device, scale = len(layout.pitch), layout.pitch.device, min(h, w) / 2 * FOCAL

    def rays(n: int, sub: int) -> Tensor:  # directions of sample centres
        return ((torch.arange(n * sub, device=device) + 0.5) / sub - n / 2) / scale

    u, v = rays(w, 1)[None, None], -rays(h, 1)[None, :, None]
    us, vs = rays(w, SUB), -rays(h, SUB)
    floor, t, floor_x, floor_z = _ground(scene, u, v, 1 / scale)
    objects = _objects(layout, scene, h, w)
    dark = _shadows(objects, floor_x, floor_z)
    place, pixel, near, label, *color = _samples(objects, us, vs)
    nearest = torch.full((b * h * w * SUB**2,), math.inf, device=device).scatter_reduce_(0, place, near, "amin")
    hidden = (nearest.index_select(0, place) < near).nonzero()[:, 0]

    # objects' light and coverage; hidden samples go to a cell of their own, past the end
    place, pixel = place.index_fill(0, hidden, b * h * w * SUB**2), pixel.index_fill(0, hidden, 4 * b * h * w)
    total = torch.zeros(4 * (b + 1) * h * w, device=device)
    for channel, value in enumerate((*color, torch.ones_like(near))):
        total[channel * h * w :].index_add_(0, pixel, value)
    total = total[: 4 * b * h * w].view(b, 4, h, w) / SUB**2

    sin, cos = (f(scene["pitch"])[:, None, None] for f in (torch.sin, torch.cos))
    zenith, horizon = scene["heavens"][..., None, None].unbind(1)
    floor = floor * (1.06 - dark[:, None])
    floor = floor + (horizon - floor) * (1 - torch.exp(-0.035 * (t - 3).clamp(min=0)))[:, None]  # haze
    sky = horizon + (zenith - horizon) * ((v * cos - sin) / 0.55).clamp(0, 1).sqrt()[:, None]
    below = ((sin - v * cos) / cos * scale + 0.5).clamp(0, 1)[:, None]  # the floor's share of the pixel
    images = torch.addcmul(total[:, :3], 1 - total[:, 3:], sky + (floor - sky) * below)
    images = images.clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8)

    middle = nearest.view(b, h, SUB, w, SUB)[:, :, SUB // 2, :, SUB // 2]
    distance = middle.minimum(_floor(scene, v)) * (1 + u * u + v * v).sqrt()

    labels = torch.empty(b * h * w * SUB**2 + 1, dtype=torch.uint8, device=device)
    labels[:-1].view(b, h * SUB, w * SUB).copy_(vs[None, :, None] * cos < sin)
    labels = labels.index_copy_(0, place, label)[:-1].view(b, h * SUB, w * SUB)
    crossed = torch.zeros_like(labels, dtype=torch.bool)  # samples whose label differs from the next one's
    crossed[:, :, :-1] = labels[:, :, 1:] != labels[:, :, :-1]
    crossed[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    return images, distance, crossed.view(b, h, SUB, w, SUB).any(4).any(2)  # (b, h·SUB, w·SUB) -> (b, h, w)


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


@one_thread
def object_masks(
    indices: Sequence[int], seed: int = 0, size: int | tuple[int, int] = 64, margin: int = 0
) -> Bool[Tensor, "b h w"]:
    """Pixels whose centre shows an object of these scenes, and those within `margin` pixels of one on each axis."""
    depth = scenes(indices, seed, size).depth
    (h, w), scene = depth.shape[1:], layout(_indices(indices), seed)
    u, v = (((torch.arange(n) + 0.5) - n / 2) / (min(h, w) / 2 * FOCAL) for n in (w, h))
    u, v = u[None, None], -v[None, :, None]
    floor = _floor({"pitch": scene.pitch.float(), "height": scene.height.float()}, v) * (1 + u * u + v * v).sqrt()
    near = (depth < floor * (1 - 1e-6)).float()[:, None]  # (b, 1, h, w)
    return F.max_pool2d(near, 2 * margin + 1, stride=1, padding=margin)[:, 0].bool()


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
