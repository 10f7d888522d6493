"""Batch rendering of layouts: exact ray intersection per object, 3 x 3 supersampling, shadows, exact depth and edges.

Every object is intersected in its own frame, where its radius is one and its centre the origin: x to its right, y up, z
towards the camera. Rays are `camera + t * direction`, the direction having length one along the optical axis. Only the
window of the picture that can hold an object is tested, and objects of one shape and window size are tested together.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from segresearch.data.captions import SHAPES
from segresearch.data.layout import FOCAL, HEIGHTS, SLOTS, Layout

SUB = 3
"""Samples per pixel and axis; odd, so that the middle sample is the pixel's centre."""
_BOX = ((1.02, 1.02, 0.34), (0.82, 0.82, 0.82), (0.95, 1.0, 0.95), (1.0, 1.0, 0.29), (1.12, 1.12, 0.34))
"""Half the sides of a box, in the object's frame, that hides the shape from any camera of the layouts."""
_GLOSS = (0.55, 0.12, 0.15, 0.45, 0.15)
_CUBE, _CONE, _TORUS, _TUBE = 0.82, 0.475, 0.71, 0.29
_TIP, _NOTCH, _THICK = 1.12, 0.52, 0.34
_INF = math.inf


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


_OUTLINE = [((_NOTCH if k % 2 else _TIP) * math.sin(k * math.pi / 5), (_NOTCH if k % 2 else _TIP) * math.cos(k * math.pi / 5),
             0.0) for k in range(10)]  # the star's corners, clockwise from the upper tip


def _folded(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The plane folded into a wedge of 36 degrees right of the star's upper tip."""
    x = x.abs()
    for sign in (1, -1):
        kx, ky = sign * math.cos(math.pi / 5), -math.sin(math.pi / 5)
        over = 2 * (kx * x + ky * y).clamp(min=0)
        x, y = x - over * kx, y - over * ky
    return x.abs(), y


_RISE, _RUN = _TIP - _NOTCH * math.cos(math.pi / 5), _NOTCH * math.sin(math.pi / 5)
_EDGE_X, _EDGE_Y = _RISE / math.hypot(_RISE, _RUN), _RUN / math.hypot(_RISE, _RUN)  # outward normal of a folded edge


def _hit(shape: str, o: Float[Tensor, "3 n 1 1"], d: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "n h w"]:
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
            return torch.where(inside > 0, t, _INF)
        other = (-b + root) / a
        t, other = (torch.where((inside > 0) & (s > 0) & ((oy + s * dy).abs() <= 1), s, _INF) for s in (t, other))
        return t.minimum(other)
    if shape == "cube":
        near, far = None, None
        for origin, step in ((ox, dx), (oy, dy), (oz, dz)):
            middle, half = -origin / step, (_CUBE / step).abs()
            near = middle - half if near is None else near.maximum(middle - half)
            far = middle + half if far is None else far.minimum(middle + half)
        return torch.where(near < far, near, _INF)
    if shape == "ring":  # meets the sphere around the nearest point of the tube's middle line, and finds that point anew
        square = dx * dx + dy * dy + dz * dz
        t = (0.5 * _TUBE - oz) / dz
        for _ in range(4):
            x, y = ox + t * dx, oy + t * dy
            shrink = _TORUS / _length(x, y)
            x, y = ox - x * shrink, oy - y * shrink
            b = x * dx + y * dy + oz * dz
            inside = b * b - square * (x * x + y * y + (oz * oz - _TUBE**2))
            t = (-b - inside.clamp(min=0).sqrt()) / square
        return torch.where(inside > 0, t, _INF)
    # The star: its ten front facets, all in view from where layouts put the camera, so none hides another. A ray crosses
    # the facet whose three sides it passes on the inner hand: side . direction, which is linear in the direction.
    origin = torch.stack([ox, oy, oz]).flatten(1).T[:, None]  # (n, 1, 3)
    corners, point = (torch.tensor(part, dtype=torch.float32, device=ox.device) for part in (_OUTLINE, (0.0, 0.0, _THICK)))
    following = corners.roll(-1, 0)
    rims = torch.linalg.cross(corners - origin, following - origin, dim=-1)
    spokes = torch.linalg.cross((point - origin).expand(-1, 10, -1), corners - origin, dim=-1)
    facets = torch.linalg.cross(corners - point, following - point, dim=-1)
    facets = facets / (facets * (point - origin)).sum(-1, keepdim=True)
    # direction = column part + row part
    first = (dx[:, :1, :1], dy[:, :1], dz[:, :1, :1])
    columns = (dx[:, :1] - first[0], dz[:, :1] - first[2])
    rows = (dx[:, :, :1], dy, dz[:, :, :1])

    def across(normals: Tensor) -> tuple[Tensor, Tensor]:  # (n, 10, 3) -> (n, 10, 1, w), (n, 10, h, 1)
        x, y, z = normals.movedim(-1, 0)[..., None, None]
        return x * columns[0][:, None] + z * columns[1][:, None], x * rows[0][:, None] + y * rows[1][:, None] + z * rows[2][:, None]

    spoke_column, spoke_row = across(spokes)
    rim_column, rim_row = across(rims)
    facet_column, facet_row = across(facets)
    left = [spoke_column[:, k] > -spoke_row[:, k] for k in range(10)]
    inverse = torch.zeros_like(dx)
    for k in range(10):
        crossed = (left[k] > left[(k + 1) % 10]) & (rim_column[:, k] > -rim_row[:, k])
        inverse += crossed * (facet_column[:, k] + facet_row[:, k])
    return torch.where(inverse > 0, 1 / inverse, _INF)


def _normal(shape: str, p: Float[Tensor, "3 m"]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | int]:
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
        wedge = (torch.atan2(x, y) * (5 / math.pi)).floor()
        face = (wedge + 5).to(torch.uint8)
        # a facet's steepest line points along its edge's normal, mirrored in every other wedge
        odd = wedge - 2 * (wedge / 2).floor()
        tip = (wedge + odd) * (math.pi / 5)
        slope = _THICK / (_EDGE_Y * _TIP)
        ex, ey, sin, cos = slope * _EDGE_X * (1 - 2 * odd), slope * _EDGE_Y, tip.sin(), tip.cos()
        x, y, z = ex * cos + ey * sin, ey * cos - ex * sin, torch.ones_like(z)
    shorten = (x * x + y * y + z * z).rsqrt()
    return (x * shorten, y * shorten, z * shorten), face


def _shade(shape: str, g: tuple[Tensor, Tensor], s: tuple[Tensor, Tensor]) -> Float[Tensor, "n h w"]:
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
        return torch.where(along * cos > across * sin, across * cos + (along - tip) * sin, _length(along, across) - base)
    if shape == "cube":  # a square swept along the shadow's direction: a hexagon
        x, z = x - _CUBE * sx, z - _CUBE * sz
        return (x.abs() - _CUBE * (1 + sx.abs())).maximum(z.abs() - _CUBE * (1 + sz.abs())).maximum(
            across.abs() - _CUBE * (ax.abs() + az.abs()))
    tall = z / sz  # upright flat shapes: which point of the plane z = 0 casts its shadow here
    x, y = x - tall * sx, tall - HEIGHTS[SHAPES.index(shape)]
    if shape == "ring":
        return (_length(x, y) - _TORUS).abs() - _TUBE
    x, y = _folded(x, y)
    return x * _EDGE_X + (y - _TIP) * _EDGE_Y


def _contact(x: Tensor, z: Tensor) -> Tensor:
    """How much of the sky the unit object hides from floor points around it."""
    return 0.5 / (1 + (x * x + z * z)).square()


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _ground(scene: dict[str, Tensor], u: Tensor, v: Tensor, pixel: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Floor colour without shadows (checkers box-filtered over the pixel's footprint), t, and floor x and z per pixel."""
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

    mix = signs(c * x + s * z + shift_x, c.abs() * wx + s.abs() * wz) * signs(c * z - s * x + shift_z, s.abs() * wx + c.abs() * wz)
    mix = (0.5 + 0.5 * mix)[:, None]
    light, dark = scene["tones"][:, 0, :, None, None], scene["tones"][:, 1, :, None, None]
    return dark + (light - dark) * mix, t, x, z


def render(layout: Layout, size: tuple[int, int]) -> tuple[
    UInt8[Tensor, "b 3 h w"], Float[Tensor, "b h w"], Bool[Tensor, "b h w"], Float[Tensor, "b 4"]
]:
    """Pictures, distance from the camera at the pixels' centres (world units, infinite in the sky), edges, and the
    fraction of each object's outline that is visible."""
    h, w = size
    scene = {name: value.float() for name, value in vars(layout).items() if value.is_floating_point()}
    b, device, scale = len(layout.pitch), layout.pitch.device, min(h, w) / 2

    def rays(n: int, sub: int) -> Tensor:  # direction per picture coordinate at sample centres, u rightwards
        return ((torch.arange(n * sub, device=device) + 0.5) / sub - n / 2) / (scale * FOCAL)

    u, v = rays(w, 1)[None, None], -rays(h, 1)[None, :, None]
    floor, t, floor_x, floor_z = _ground(scene, u, v, 1 / (scale * FOCAL))

    image, slot = layout.present.nonzero(as_tuple=True)
    kind = layout.shape[image, slot]
    centre, radius, yaw = scene["position"][image, slot], scene["radius"][image, slot], scene["yaw"][image, slot]
    cy, sy = yaw.cos(), yaw.sin()
    cp, sp = (f(scene["pitch"])[image] for f in (torch.cos, torch.sin))
    # picture window: bounds of the corners of the box around the object
    rise, ahead = centre[:, 1] - scene["height"][image], centre[:, 2]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=device).T
    bx, by, bz = torch.tensor(_BOX, device=device)[kind].T[:, :, None] * radius[:, None] * signs[:, None]  # each (n, 8)
    by, bx, bz = rise[:, None] + by, bx * cy[:, None] + bz * sy[:, None], ahead[:, None] + bx * sy[:, None] - bz * cy[:, None]
    depth = bz * cp[:, None] - by * sp[:, None]
    reach = scale * FOCAL * (centre[:, :1] + bx) / depth
    tall = -scale * FOCAL * (by * cp[:, None] + bz * sp[:, None]) / depth
    left, top = (reach.amin(1) + w / 2).floor().long(), (tall.amin(1) + h / 2).floor().long()
    right, bottom = (reach.amax(1) + w / 2).ceil().long(), (tall.amax(1) + h / 2).ceil().long()
    step = max(2, int(scale / 4))
    window = (((right - left).maximum(bottom - top) + step - 1) // step * step)
    left, top = (left.clamp(min=0)).minimum(w - window).clamp(min=0), (top.clamp(min=0)).minimum(h - window).clamp(min=0)

    light = scene["light"][image]
    lamp = torch.stack([light[:, 0] * cy + light[:, 2] * sy, light[:, 1], light[:, 0] * sy - light[:, 2] * cy])
    cast = -lamp / lamp[1]
    eye = torch.stack([-centre[:, 0], -rise, -centre[:, 2]])
    eye = torch.stack([eye[0] * cy + eye[2] * sy, eye[1], eye[0] * sy - eye[2] * cy]) / radius
    # what lamp, sky and floor add to the colour of a fully lit point
    half = F.normalize(lamp + F.normalize(eye, dim=0), dim=0)
    albedo = scene["albedo"][image, slot]
    palette = torch.stack([0.66 * albedo, albedo * (0.30 + 0.12 * scene["heavens"][:, 1])[image],
                           albedo * (0.22 + 0.25 * scene["tones"].mean(1))[image]]).transpose(1, 2).flatten(0, 1)  # (9, objects)
    corner = (image * (h * SUB) + top * SUB) * (w * SUB) + left * SUB  # of the window, among samples and among pixels
    corner_pixel = (image * 4 * h + top) * w + left
    thirds = torch.arange(max(h, w) * SUB, device=device) // SUB
    first_label, whole = (2 + slot * 24).to(torch.uint8), torch.zeros(len(image), dtype=torch.long, device=device)
    shadow = torch.zeros(b, h, w, device=device)
    us, vs = rays(w, SUB), -rays(h, SUB)
    found: list[tuple[Tensor, ...]] = []
    for number, shape in enumerate(SHAPES):
        same = (kind == number).nonzero()[:, 0]
        if not len(same):
            continue
        c, s, r = (value[same, None, None] for value in (cy, sy, radius))
        gx, gz = floor_x[image[same]] - centre[same, 0, None, None], floor_z[image[same]] - centre[same, 2, None, None]
        gx, gz = (gx * c + gz * s) / r, (gx * s - gz * c) / r
        outline = _shade(shape, (gx, gz), (cast[0, same, None, None], cast[2, same, None, None]))
        dark = _smooth(0.5 - outline / 0.36) * 0.62
        dark = dark.maximum(_contact(gx, gz))
        for k in range(SLOTS):
            rows = slot[same] == k
            where = image[same[rows]]
            shadow[where] = shadow[where].maximum(dark[rows])
        for side in window[same].unique().tolist():
            some = same[window[same] == side]
            height, width = min(side, h) * SUB, min(side, w) * SUB
            columns = us[left[some, None] * SUB + torch.arange(width, device=device)][:, None]  # (n, 1, width)
            lines = vs[top[some, None] * SUB + torch.arange(height, device=device)][:, :, None]
            c, s, cos, sin = (value[some, None, None] for value in (cy, sy, cp, sp))
            forward = cos + lines * sin
            d = (columns * c + forward * s, lines * cos - sin, columns * s - forward * c)
            origin = eye[:, some, None, None]
            hit = _hit(shape, origin, d)
            n, row, column = (hit < _INF).nonzero(as_tuple=True)
            flat = (n * height + row) * width + column
            which = some.index_select(0, n)
            p = torch.stack([torch.addcmul(o, hit, step).view(-1).index_select(0, flat) for o, step in zip(origin, d, strict=True)])
            near = (hit * radius[some, None, None]).view(-1).index_select(0, flat)
            place = corner.index_select(0, which) + row * (w * SUB) + column
            pixel = (corner_pixel.index_select(0, which) + (thirds * w).index_select(0, row)
                     + thirds.index_select(0, column))
            (nx, ny, nz), face = _normal(shape, p)
            lx, ly, lz, hx, hy, hz, *colors = (value.index_select(0, which) for value in (*lamp, *half, *palette))
            open_sky = 0.62 + 0.38 * _smooth((p[1] + HEIGHTS[number]) / 0.7)
            shine = (nx * hx + ny * hy + nz * hz).clamp(min=0).square().square().square().square().square()
            up = (0.5 + 0.5 * ny) * open_sky
            diffuse, shine = (nx * lx + ny * ly + nz * lz).clamp(min=0), _GLOSS[number] * shine
            down = open_sky - up
            for channel, (by_lamp, by_sky, by_floor) in enumerate(zip(colors[:3], colors[3:6], colors[6:], strict=True)):
                color = torch.addcmul(torch.addcmul(torch.addcmul(shine, diffuse, by_lamp), up, by_sky), down, by_floor)
                colors[channel] = color.clamp_(0, 1)
            label = first_label.index_select(0, which) + face
            found.append((which, place, pixel, near, label, *colors[:3]))
            whole.index_add_(0, some, (hit < _INF).flatten(1).sum(1))
    which, place, pixel, near, label, *color = (torch.cat(part) for part in zip(*found, strict=True))
    nearest = torch.full((b * h * w * SUB * SUB,), _INF, device=device).scatter_reduce_(0, place, near, "amin")
    hidden = (nearest.index_select(0, place) < near).nonzero()[:, 0]
    visible = torch.ones(b, SLOTS, device=device)
    visible[image, slot] -= torch.bincount(which[hidden], minlength=len(image)) / whole.clamp(min=1)

    # hidden samples go to a cell of their own, past the end
    place, pixel = place.index_fill(0, hidden, b * h * w * SUB * SUB), pixel.index_fill(0, hidden, 4 * b * h * w)
    total = torch.zeros(4 * b * h * w + 4 * h * w, device=device)
    for channel, value in enumerate((*color, torch.ones_like(near))):
        total[channel * h * w :].index_add_(0, pixel, value)
    total = total[: 4 * b * h * w].view(b, 4, h, w) / SUB**2

    sin, cos = (f(scene["pitch"])[:, None, None] for f in (torch.sin, torch.cos))
    horizon = scene["heavens"][:, 1, :, None, None]
    haze = (1 - torch.exp(-0.035 * (t - 3).clamp(min=0)))[:, None]
    floor = floor * (1.06 - shadow[:, None])
    floor = floor + (horizon - floor) * haze
    climb = ((v * cos - sin) / 0.55).clamp(0, 1).sqrt()[:, None]
    sky = horizon + (scene["heavens"][:, 0, :, None, None] - horizon) * climb
    below = ((sin - v * cos) / cos * (scale * FOCAL) + 0.5).clamp(0, 1)[:, None]  # the floor's share of the pixel
    back = sky + (floor - sky) * below
    picture = torch.addcmul(total[:, :3], 1 - total[:, 3:], back)
    picture = picture.clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8)

    middle = nearest.view(b, h, SUB, w, SUB)[:, :, SUB // 2, :, SUB // 2]
    ground_t = torch.where(v * cos < sin, t, _INF)
    distances = middle.minimum(ground_t) * (1 + u * u + v * v).sqrt()

    labels = torch.empty(b * h * w * SUB * SUB + 1, dtype=torch.uint8, device=device)
    labels[:-1].view(b, h * SUB, w * SUB).copy_(vs[None, :, None] * cos < sin)
    labels = labels.index_copy_(0, place, label)[:-1].view(b, h * SUB, w * SUB)
    apart = torch.zeros(b, h * SUB, w * SUB, dtype=torch.bool, device=device)
    apart[:, :, :-1] = labels[:, :, 1:] != labels[:, :, :-1]
    apart[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    apart = apart.view(b, h, SUB, w * SUB)
    apart = (apart[:, :, 0] | apart[:, :, 1] | apart[:, :, 2]).view(b, h, w, SUB)
    edges = apart[..., 0] | apart[..., 1] | apart[..., 2]
    return picture, distances, edges, visible
