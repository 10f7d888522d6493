"""Procedural scenes: keyed, exact in depth, truthfully captioned."""

import math
import re

import pytest
import torch

from segresearch.scenes.captions import COLORS, FLOORS, SHAPES, SIZES, SKIES, VOCABULARY, Thing, relations
from segresearch.scenes.layout import FOCAL, layout, uniform
from segresearch.scenes.scenes import captions, scenes
from segresearch.scenes.shapes import hit, normal

KIND = {"ball": "sphere", "box": "cube", "hoop": "ring"}
NUMBER = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
NOUN = r"\b(a|an|two|three|four) (?:(small|little|large|big) )?(?:({}) )?({})".format(
    "|".join(COLORS), "|".join((*SHAPES, *KIND)))  # fmt: skip
SIDES = {"left of": (1, 0), "right of": (-1, 0), "behind": (0, -1), "in front of": (0, 1),
         "further away than": (0, -1), "closer than": (0, 1)}


@pytest.fixture(scope="module")
def batch():
    return scenes(range(200))


@pytest.fixture(scope="module")
def drawn():
    return layout(torch.arange(200))


@pytest.fixture(scope="module")
def objects(drawn):
    """The objects of each scene of `batch`."""
    radius = FOCAL * drawn.radius / drawn.distance
    return [
        [Thing(SHAPES[drawn.shape[i, k]], COLORS[drawn.color[i, k]], SIZES[drawn.size[i, k]],
               drawn.u[i, k].item(), drawn.distance[i, k].item(), radius[i, k].item())
         for k in range(4) if drawn.present[i, k]] for i in range(200)
    ]  # fmt: skip


def mentions(caption):
    """(count, size or None, colour or None, shape) of every noun phrase about objects."""
    size = {"little": "small", "big": "large"}
    return [(NUMBER[n], size.get(s, s) or None, c or None, KIND.get(k, k)) for n, s, c, k in re.findall(NOUN, caption)]


def fits(thing, mention):
    _, size, color, shape = mention
    return thing.shape == shape and color in (None, thing.color) and size in (None, thing.size)


def camera_points(index, h=64, w=64, seed=0):
    """Drawn layout and unit directions (h, w, 3) in world axes, float64."""
    drawn = layout(torch.tensor([index]), seed)
    p = drawn.pitch.item()
    f = min(h, w) / 2 * FOCAL
    u = ((torch.arange(w).double() + 0.5) - w / 2) / f
    v = -((torch.arange(h).double() + 0.5) - h / 2) / f
    v, u = torch.meshgrid(v, u, indexing="ij")
    d = torch.stack([u, v * math.cos(p) - math.sin(p), math.cos(p) + v * math.sin(p)], -1)
    return drawn, d / d.norm(dim=-1, keepdim=True)


def test_keyed_by_seed_and_index(batch):
    some = [3, 77, 12, 199]
    for picked in (scenes(some), scenes([77])):
        rows = [some.index(77)] if len(picked.captions) == 4 else [0]
        for row in rows:
            assert torch.equal(picked.images[row], batch.images[77])
            assert torch.equal(picked.depth[row], batch.depth[77])
            assert torch.equal(picked.edges[row], batch.edges[77])
            assert picked.captions[row] == batch.captions[77]
    other = scenes([77], seed=1)
    assert not torch.equal(other.images[0], batch.images[77])
    assert captions(range(200)) == batch.captions
    assert captions([5], seed=2**40, variant=1) != captions([5], seed=2**40 + 1, variant=1)


def test_leaves_global_random_state():
    state = torch.get_rng_state()
    scenes(range(3))
    assert torch.equal(state, torch.get_rng_state())


def test_uniform_numbers():
    draws = uniform(torch.arange(4000), 5, 0, 8)
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.03 and (draws.var(0) - 1 / 12).abs().max() < 0.01
    streams = torch.cat([draws, uniform(torch.arange(4000), 5, 1, 8), uniform(torch.arange(4000), 6, 0, 8)], 1)
    assert (torch.corrcoef(streams.T) - torch.eye(24)).abs().max() < 0.08
    assert not torch.equal(draws[:, 1:], draws[:, :-1])


def test_counts_and_visibility(batch, drawn, objects):
    assert {len(things) for things in objects} == {1, 2, 3, 4}
    every = [thing for things in objects for thing in things]
    x, y, z = drawn.position.movedim(-1, 0)
    cos, sin, rise = drawn.pitch.cos()[:, None], drawn.pitch.sin()[:, None], y - drawn.height[:, None]
    v = FOCAL * (rise * cos + z * sin) / (z * cos - rise * sin)
    disc = FOCAL * 1.12 * drawn.radius / (z * cos - rise * sin)
    apart = torch.hypot(*(p[:, :, None] - p[:, None] for p in (drawn.u, v))) / (disc[:, :, None] + disc[:, None])
    both = drawn.present[:, :, None] & drawn.present[:, None] & ~torch.eye(4, dtype=torch.bool)
    assert apart[both].min() >= 0.7  # one hides about a fifth of an equal one
    assert max(drawn.u[drawn.present].abs().max(), v[drawn.present].abs().max()) < 1
    assert {thing.shape for thing in every} == set(SHAPES) and {thing.color for thing in every} == set(COLORS)
    assert {thing.size for thing in every} == set(SIZES)
    shown = 0
    for i, (thing, *others) in enumerate(objects):  # the named place shows the named colour
        if not others and thing.shape == "sphere" and thing.color == "red":
            k = int(drawn.present[i].nonzero())
            red, green, blue = batch.images[i, :, int(32 - 32 * v[i, k]), int(32 + 32 * thing.x)].tolist()
            assert red > 1.5 * max(green, blue)
            shown += 1
    assert shown


def test_captions_name_every_object(objects):
    for variant in range(3):
        for caption, things in zip(captions(range(200), variant=variant), objects, strict=True):
            found = mentions(caption)
            assert sum(mention[0] for mention in found) == len(things), caption
            left = list(things)
            for mention in sorted(found, key=lambda m: (m[2] is None, m[1] is None)):
                for _ in range(mention[0]):
                    left.remove(next(thing for thing in left if fits(thing, mention)))
            assert not left, caption


def test_captions_tell_true_relations(objects):
    told = set()
    for variant in range(4):
        text = captions(range(200), variant=variant)
        for caption, things in zip(text, objects, strict=True):
            for phrase, (dx, dz) in SIDES.items():
                found = re.search(rf"{NOUN}(?: is)?(?: to the| on the)? {phrase} {NOUN}", caption)
                if not found:
                    continue
                told.add(phrase)
                a, b = mentions(found.group(0))
                assert any(dx * (q.x - p.x) > 0.025 or dz * (q.distance - p.distance) > 0.5
                           for p in things for q in things if p is not q and fits(p, a) and fits(q, b)), caption
            if caption.startswith("from left to right"):
                told.add("order")
                by_x = sorted(things, key=lambda thing: thing.x)
                assert all(fits(*pair) for pair in zip(by_x, mentions(caption), strict=True)), caption
    assert told == {*SIDES, "order"}


def test_captions_tell_floor_and_sky(batch, drawn):
    for caption, i, j in zip(batch.captions, drawn.floor.tolist(), drawn.sky.tolist(), strict=True):
        floor, sky = FLOORS[i], SKIES[j]
        for found in re.findall(r"([a-z]+) (?:checkered |tiled )?(?:floor|ground)|floor is ([a-z]+)", caption):
            assert found[0] in (floor, "the", "") and found[1] in (floor, "")
        for found in re.findall(r"([a-z]+) sky|sky is ([a-z]+)", caption):
            assert found[0] in (sky, "the", "") and found[1] in (sky, "")


def test_vocabulary_is_closed():
    seen = captions(range(1500)) + captions(range(1000), variant=1)
    split = [re.findall(r"[a-z]+|[^\sa-z]", caption) for caption in seen]
    assert {word for caption in split for word in caption} <= set(VOCABULARY) and len(VOCABULARY) < 200
    assert max(map(len, split)) <= 44
    assert all(caption == caption.lower() and "  " not in caption for caption in seen)
    assert not [caption for caption in seen if re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)]
    assert sum(len(caption) <= 4 for caption in split) > 300  # plain ones are common


def test_relations_are_antisymmetric():
    a, b = Thing("cube", "red", "small", -0.4, 4.0, 0.2), Thing("cube", "blue", "small", 0.4, 5.5, 0.2)
    assert relations(a, b) == ["left", "front"] and relations(b, a) == ["right", "behind"]
    assert relations(a, a) == []


def test_floor_depth_follows_the_plane(batch):
    for index in range(20):
        drawn, d = camera_points(index)
        floor = -drawn.height / d[..., 1]  # distance along a unit direction
        bottom = batch.depth[index, -1].double()
        free = bottom > floor[-1] * (1 - 1e-5)
        assert free.any()
        torch.testing.assert_close(bottom[free], floor[-1][free], rtol=1e-4, atol=0)
        assert (batch.depth[index].double() <= torch.where(d[..., 1] < 0, floor, math.inf) * (1 + 1e-3)).all()
        assert torch.isinf(batch.depth[index, 0]).any()


@pytest.mark.parametrize("index", range(12))
def test_depth_is_the_nearest_of_all_objects_without_windows(index, batch):
    """Every object against every pixel's ray in float64: no window cuts anything, the nearest surface wins."""
    drawn, d = camera_points(index)
    nearest = torch.where(d[..., 1] < 0, -drawn.height / d[..., 1], math.inf)
    for slot in drawn.present[0].nonzero()[:, 0].tolist():
        c, s = drawn.yaw[0, slot].cos(), drawn.yaw[0, slot].sin()
        frame = torch.tensor([[c, 0, s], [0, 1, 0], [s, 0, -c]], dtype=torch.float64)
        eye = torch.tensor([0.0, drawn.height.item(), 0.0]).double() - drawn.position[0, slot]
        o, local = frame @ eye / drawn.radius[0, slot], d @ frame.T
        # a camera ray: length one along the optical axis, so that rows and columns separate
        p = drawn.pitch.item()
        local = local / (d[..., 2] * math.cos(p) - d[..., 1] * math.sin(p))[..., None]
        t = hit(SHAPES[drawn.shape[0, slot]], o[:, None, None, None].float(),
                tuple(part[None].float() for part in local.unbind(-1)))[0].double()
        nearest = nearest.minimum(t * local.norm(dim=-1) * drawn.radius[0, slot])
    close = torch.isclose(batch.depth[index].double(), nearest, rtol=2e-3)
    assert (~close).float().mean() < 2e-3  # a pixel's centre may fall on an outline


@pytest.mark.parametrize("shape", SHAPES)
def test_hits_lie_on_the_surface(shape):
    v, u = torch.meshgrid(torch.linspace(0.25, -0.25, 80), torch.linspace(-0.25, 0.25, 80), indexing="ij")
    o = torch.tensor([1.5, 1.5, 5.0])
    forward = -o / o.norm()
    right = torch.linalg.cross(forward, torch.tensor([0.0, 1, 0]))
    right = right / right.norm()
    up = torch.linalg.cross(right, forward)
    d = forward + u[..., None] * right + v[..., None] * up
    if shape == "star":  # its rays must separate into rows and columns
        d = torch.stack([u + forward[0], v + forward[1], torch.full_like(u, forward[2].item())], -1)
    t = hit(shape, o[:, None, None, None], tuple(part[None] for part in d.unbind(-1)))[0]
    assert 0.05 < torch.isfinite(t).float().mean() < 0.95
    p = (o + t[..., None] * d)[torch.isfinite(t)].T.contiguous()
    (nx, ny, nz), _ = normal(shape, p)
    ray = d[torch.isfinite(t)].T
    torch.testing.assert_close(nx * nx + ny * ny + nz * nz, torch.ones_like(nx), rtol=1e-3, atol=1e-3)
    assert ((nx * ray[0] + ny * ray[1] + nz * ray[2]) < 1e-3).float().mean() > 0.995  # normals face the camera
    x, y, z = p.double()
    off = {
        "sphere": lambda: (x * x + y * y + z * z).sqrt() - 1,
        "cube": lambda: p.double().abs().amax(0) - 0.82,
        "cone": lambda: (x * x + z * z).sqrt() - 0.475 * (1 - y),
        "ring": lambda: (((x * x + y * y).sqrt() - 0.71) ** 2 + z * z).sqrt() - 0.29,
        "star": lambda: star_gap(x, y, z),
    }[shape]()
    assert off.abs().quantile(0.98) < 2e-3 and off.abs().max() < 0.05


def star_gap(x, y, z):
    """How far the height over the outline's plane is from the pyramid over the five-pointed outline."""
    angle = torch.atan2(x, y) % (2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)  # from the nearest tip
    r = (x * x + y * y).sqrt()
    tip, notch, turn = 1.12, 0.52, math.pi / 5
    rim = tip * notch * math.sin(turn) / (notch * torch.sin(turn - angle) + tip * torch.sin(angle))
    return z - 0.34 * (1 - r / rim)


def test_edges_mark_outlines_and_horizon(batch):
    density = batch.edges.float().mean((1, 2))
    assert density.min() > 0.01 and density.max() < 0.35
    sky = torch.isinf(batch.depth)
    change = (sky[:, 1:] != sky[:, :-1]) & ~batch.edges[:, :-1] & ~batch.edges[:, 1:]
    assert not change.any()
    one, next_one = batch.depth[:, :, :-1], batch.depth[:, :, 1:]
    near, far = one.minimum(next_one), one.maximum(next_one)
    jump = torch.isfinite(far) & (far > 1.3 * near)  # sideways the floor's depth is smooth: this is an outline
    assert jump.any() and not (jump & ~batch.edges[:, :, :-1] & ~batch.edges[:, :, 1:]).any()


@pytest.mark.parametrize("size", [32, (48, 64), (64, 40), 128])
def test_sizes(size, batch):
    h, w = (size, size) if isinstance(size, int) else size
    picked = scenes([0, 5, 9], size=size)
    assert picked.images.shape == (3, 3, h, w) and picked.depth.shape == picked.edges.shape == (3, h, w)
    assert picked.captions == [batch.captions[i] for i in (0, 5, 9)]
    square = torch.nn.functional.interpolate(
        picked.images[:, :, (h - min(h, w)) // 2 :, (w - min(h, w)) // 2 :][:, :, : min(h, w), : min(h, w)].float(),
        size=(64, 64), mode="area" if min(h, w) >= 64 else "bilinear")  # fmt: skip
    assert (square - batch.images[[0, 5, 9]].float()).abs().mean() < (3 if min(h, w) >= 64 else 9)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no scene indices"):
        scenes([])
    with pytest.raises(ValueError, match=r"\(8, 8\).*at least 16"):
        scenes([0], size=8)
