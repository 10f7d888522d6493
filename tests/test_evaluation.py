"""Evaluation: Fréchet distances in closed form, feature distances, attributes, edges, and their small networks."""

import math

import pytest
import scipy.linalg
import torch

from experiments.mini.export import export_attributes, export_vision
from segresearch.errors import CheckpointError
from segresearch.metrics import (
    Attributes,
    Gaussian,
    Moments,
    Namer,
    Vision,
    VisionTower,
    agreement,
    distances,
    feature_distance,
    features_of,
    frechet_distance,
    gaussian,
    load_namer,
    load_vision,
    named,
    of_objects,
    of_scenes,
    resamples,
)
from segresearch.metrics.attributes import loss_of
from segresearch.metrics.edge_agreement import contrast, edge_agreement
from segresearch.metrics.frechet import parts_of, root
from segresearch.scenes.captions import COLORS, SHAPES
from segresearch.scenes.scenes import scenes


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(mean, cov):
    return Gaussian(torch.as_tensor(mean).double(), torch.as_tensor(cov).double(), 1000)


def covariance(dim, seed):
    a = normal(dim, dim + 3, seed=seed)
    return a @ a.T / dim


def test_equal_shifted_and_scaled_gaussians():
    cov, mean = covariance(6, 0), normal(6)
    a, b = of(mean, cov), of(mean + 2, cov)
    assert sum(parts_of(a, a)) == pytest.approx(0, abs=1e-10)
    assert parts_of(a, b) == pytest.approx((24.0, 0.0), abs=1e-10)
    assert parts_of(a, of(mean, 9 * cov))[1] == pytest.approx(4 * cov.trace().item())  # (3 − 1)² tr S


def test_commuting_covariances_and_the_general_case():
    basis = torch.linalg.qr(normal(5, 5)).Q
    p, q = torch.tensor([0.0, 1, 2, 3, 4]).double(), torch.tensor([5.0, 0, 2, 1, 9]).double()
    a, b = (of(torch.zeros(5), (basis * z) @ basis.T) for z in (p, q))  # singular: eigenvalues 0
    assert parts_of(a, b)[1] == pytest.approx((p.sqrt() - q.sqrt()).square().sum().item())
    a, b = (of(normal(7, seed=s), covariance(7, s)) for s in (1, 2))
    expected = (a.cov + b.cov).trace() - 2 * scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real.trace()
    assert parts_of(a, b)[1] == pytest.approx(expected.item())
    assert sum(parts_of(a, b)) == pytest.approx(sum(parts_of(b, a)))
    torch.testing.assert_close(root(a.cov) @ root(a.cov), a.cov)


def test_moments_in_parts_are_those_of_the_whole():
    x = normal(50, 4) + 1e4  # far from zero: sums of squares would lose digits
    whole = gaussian(x)
    parts = gaussian(iter(x.split(7)))
    torch.testing.assert_close(parts.mean, x.mean(0))
    torch.testing.assert_close(parts.cov, torch.cov(x.T))
    torch.testing.assert_close(whole.cov, parts.cov)
    assert parts.count == 50
    empty = Moments(4)
    empty.add(x[:0])
    assert empty.count == 0


def test_too_few_or_broken_features_are_refused():
    x = normal(5, 5)
    with pytest.raises(ValueError, match="5 pictures for 5 features"):
        gaussian(x)
    assert gaussian(x, force=True).count == 5
    with pytest.raises(ValueError, match="1 pictures"):
        gaussian(x[:1], force=True)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        gaussian(x, force=True)
    with pytest.raises(ValueError, match="no features"):
        gaussian(iter(()))
    with pytest.raises(ValueError, match="4 numbers after some of 5"):
        gaussian(iter((normal(9, 5), normal(9, 4))))
    with pytest.raises(ValueError, match="5 and 4 features"):
        parts_of(of(torch.zeros(5), torch.eye(5)), of(torch.zeros(4), torch.eye(4)))


def test_result_states_n_and_has_errors():
    reference = gaussian(normal(4000, 3, seed=1))
    x = normal(400, 3, seed=2)
    found = frechet_distance(x, reference, draws=40, groups=4)
    assert (found.n, found.n_reference, found.dim, len(found.groups), len(found.draws)) == (400, 4000, 3, 4, 40)
    assert found.distance == pytest.approx(found.mean_part + found.cov_part)
    assert 0 < found.error < 0.1 and abs(found.extrapolated) < found.distance  # the truth is 0, the bias upwards
    assert sum(found.groups) / 4 > found.distance
    assert "N = 400 against 4000" in str(found)
    again = frechet_distance(x, reference, draws=40)
    assert again.draws == found.draws and again.groups == ()
    assert torch.equal(resamples(10, 3, seed=1), resamples(10, 3, seed=1))
    with pytest.raises(ValueError, match="200 groups of 2 pictures"):
        frechet_distance(x, reference, groups=200)
    assert math.isnan(frechet_distance(x[:6], reference).extrapolated)


def test_shipped_parts_come_back_as_trained(tmp_path):
    torch.manual_seed(0)
    tower, namer = VisionTower(8, 32, [4, 6]), Namer(8)
    weights = {**tower.state_dict(), "text_encoder.weight": torch.zeros(1)}
    torch.save({"weights": weights}, tmp_path / "clip.pt")
    torch.save({"weights": namer.state_dict(), "config": '{"width": 8}'}, tmp_path / "namer.pt")
    with pytest.raises(CheckpointError, match="brings no vision weights"):
        load_vision(tmp_path)
    export_vision(tmp_path, tmp_path / "clip.pt")
    export_attributes(tmp_path, tmp_path / "namer.pt")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    again, names = load_vision(tmp_path), load_namer(tmp_path)
    a, b = (features_of(t, images, batch=2) for t in (tower, again))
    assert a[0].shape == (3, 32) and a[1].shape == (3, 6)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(b[1].norm(dim=1), torch.ones(3))
    assert named(names, images, batch=2).pairs.shape == (3, 5, 8)
    (tmp_path / "vision" / "config.json").write_text('{"width": 8, "features": 16}')
    with pytest.raises(CheckpointError, match="do not fit"):
        load_vision(tmp_path)


def test_feature_distance_is_zero_only_for_equal_pictures_and_reads_each_alone():
    vision = Vision(8, 16)
    a, b = torch.randint(0, 256, (2, 3, 3, 32, 48), dtype=torch.uint8)
    assert distances(vision, a, a).eq(0).all()
    found = distances(vision, a, b, batch=2)
    assert found.shape == (3,) and (found > 0).all() and (found < 4).all()
    torch.testing.assert_close(distances(vision, a[1:2], b[1:2]), found[1:2])
    torch.testing.assert_close(distances(vision, b, a), found)
    with pytest.raises(ValueError, match="one by one"):
        feature_distance(vision, a.float(), b[:2].float())


def test_stages_end_in_the_forward():
    vision = Vision(8, 16)
    x = normal(2, 3, 64, 64).float()
    stages = vision.stages(x)
    assert [s.shape[-1] for s in stages] == [32, 16, 8, 4]
    torch.testing.assert_close(vision(x), torch.nn.functional.silu(vision.head(stages[-1].flatten(1))))


def test_attributes_of_scenes_are_those_of_their_objects():
    index = range(10_200_000, 10_200_020)
    by_layout, by_objects = of_scenes(index), of_objects(scenes(index, size=16).objects)
    for name in ("count", "shapes", "colors", "pairs"):
        assert torch.equal(getattr(by_layout, name), getattr(by_objects, name))
    assert all(value.eq(1).all() for value in agreement(by_layout, by_objects).values())
    assert len(by_layout[:3]) == 3


def test_agreement_counts_what_is_missing_and_what_is_added():
    def row(count, *names):
        pairs = torch.zeros(1, 5, 8, dtype=torch.bool)
        for color, shape in names:
            pairs[0, SHAPES.index(shape), COLORS.index(color)] = True
        return Attributes(torch.tensor([count]), pairs.any(2), pairs.any(1), pairs)

    said = row(2, ("red", "cube"), ("blue", "cone"))
    swapped = {k: v.item() for k, v in agreement(row(2, ("blue", "cube"), ("red", "cone")), said).items()}
    assert swapped == {"count": 1, "colors": 1, "shapes": 1, "objects": 0, "exact": 0}
    more = {k: v.item() for k, v in agreement(row(3, ("red", "cube"), ("red", "ring")), said).items()}
    assert more == {"count": 0, "colors": 0, "shapes": 0, "objects": 0.5, "exact": 0}


def test_the_namer_learns_from_its_loss():
    torch.manual_seed(0)
    namer, truth = Namer(8), of_scenes(range(8))
    images = scenes(range(8)).images.float() / 127.5 - 1
    optimizer = torch.optim.Adam(namer.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(*namer(images), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert sum(p.numel() for p in Namer().parameters()) < 300_000


def test_the_shipped_namer_knows_held_out_scenes():
    index = range(10_200_000, 10_200_100)
    found = agreement(named(load_namer("mini"), scenes(index).images), of_scenes(index))
    assert found["count"].mean() > 0.9 and found["objects"].mean() > 0.9


def test_edges_are_found_where_they_are():
    images = torch.full((2, 3, 16, 24), -1.0)
    images[:, :, :, 12:] = 1
    edges = torch.zeros(2, 16, 24, dtype=torch.bool)
    edges[0, :, 11:13] = True  # where the step is
    edges[1, :, :4] = True  # where nothing is
    slope = contrast(images)
    assert slope.shape == (2, 16, 24) and slope[:, :, 5].eq(0).all() and slope[0, 0, 11] == 1
    found = edge_agreement(images, edges)
    assert found[0] == 1 and found[1] < 0.5
    noise = edge_agreement(normal(1, 3, 64, 64).float(), edges.new_ones(1, 64, 64).tril())
    assert abs(noise.item() - 0.5) < 0.05
    with pytest.raises(ValueError, match="some edges"):
        edge_agreement(images, torch.zeros(2, 16, 24, dtype=torch.bool))
