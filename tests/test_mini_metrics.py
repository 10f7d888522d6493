"""What is measured by mini's small networks, and agreement with edges: limit cases, and what is shipped."""

import pytest
import torch

from experiments.mini.export import export_attributes, export_vision
from segresearch.errors import CheckpointError
from segresearch.metrics.agreement import (
    AttributeClassifier,
    Attributes,
    agreement,
    attribute_loss,
    classify,
    contrast,
    edge_agreement,
    scene_attributes,
)
from segresearch.metrics.mini_vision import (
    Vision,
    VisionTower,
    load_part,
    load_vision,
    perceptual_distances,
    unit_range,
)
from segresearch.scenes.captions import COLORS, SHAPES
from segresearch.scenes.layout import layout
from segresearch.scenes.scenes import scenes


def test_shipped_parts_come_back_as_trained(tmp_path):
    torch.manual_seed(0)
    tower, classifier = VisionTower(8, 32, [4, 6]), AttributeClassifier(8)
    weights = {**tower.state_dict(), "text_encoder.weight": torch.zeros(1)}
    torch.save({"weights": weights}, tmp_path / "clip.pt")
    torch.save({"weights": classifier.state_dict(), "config": '{"width": 8}'}, tmp_path / "namer.pt")
    with pytest.raises(CheckpointError, match="brings no vision weights"):
        load_vision(tmp_path)
    export_vision(tmp_path, tmp_path / "clip.pt")
    export_attributes(tmp_path, tmp_path / "namer.pt")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    before = torch.get_rng_state()
    again, loaded = load_vision(tmp_path), load_part(tmp_path, "attributes", AttributeClassifier)
    assert torch.equal(before, torch.get_rng_state())
    a, b = ((t.vision(unit_range(images)), t.embed(unit_range(images))) for t in (tower, again))
    assert a[0].shape == (3, 32) and a[1].shape == (3, 6)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(b[1].norm(dim=1), torch.ones(3))
    assert classify(loaded, images, batch=2).pairs.shape == (3, 5, 8)
    (tmp_path / "vision" / "config.json").write_text('{"width": 8, "features": 16}')
    with pytest.raises(CheckpointError, match="do not fit"):
        load_vision(tmp_path)


def test_perceptual_distance_is_zero_only_for_equal_images_and_reads_each_alone():
    vision = Vision(8, 16)
    a, b = torch.randint(0, 256, (2, 3, 3, 32, 48), dtype=torch.uint8)
    assert perceptual_distances(vision, a, a).eq(0).all()
    found = perceptual_distances(vision, a, b, batch=2)
    assert found.shape == (3,) and (found > 0).all() and (found < 4).all()
    torch.testing.assert_close(perceptual_distances(vision, a[1:2], b[1:2]), found[1:2])
    torch.testing.assert_close(perceptual_distances(vision, b, a), found)
    with pytest.raises(ValueError, match="one by one"):
        perceptual_distances(vision, a, b[:2])


def test_stages_halve_the_image():
    images = torch.zeros(2, 3, 32, 48)
    assert [tuple(s.shape[2:]) for s in Vision(8, 16).stages(images)] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_attributes_of_scenes_are_those_of_their_objects():
    index = range(10_200_000, 10_200_020)
    attributes, drawn = scene_attributes(index), layout(torch.tensor(index))
    assert attributes.count.tolist() == drawn.present.sum(1).tolist()
    for row in range(len(index)):
        expected = {(SHAPES[drawn.shape[row, k]], COLORS[drawn.color[row, k]]) for k in drawn.present[row].nonzero()}
        assert {(SHAPES[i], COLORS[j]) for i, j in attributes.pairs[row].nonzero().tolist()} == expected
        assert {SHAPES[i] for i in attributes.shapes[row].nonzero()} == {shape for shape, _ in expected}
        assert {COLORS[j] for j in attributes.colors[row].nonzero()} == {color for _, color in expected}
    assert all(value.eq(1).all() for value in agreement(attributes, attributes).values())
    assert torch.equal(attributes[:3].pairs, attributes.pairs[:3])


def test_agreement_counts_what_is_missing_and_what_is_added():
    def row(count, *names):
        pairs = torch.zeros(1, 5, 8, dtype=torch.bool)
        for color, shape in names:
            pairs[0, SHAPES.index(shape), COLORS.index(color)] = True
        return Attributes(torch.tensor([count]), pairs.any(2), pairs.any(1), pairs)

    expected = row(2, ("red", "cube"), ("blue", "cone"))
    swapped = {k: v.item() for k, v in agreement(row(2, ("blue", "cube"), ("red", "cone")), expected).items()}
    assert swapped == {"count": 1, "colors": 1, "shapes": 1, "objects": 0, "exact": 0}
    more = {k: v.item() for k, v in agreement(row(3, ("red", "cube"), ("red", "ring")), expected).items()}
    assert more == {"count": 0, "colors": 0, "shapes": 0, "objects": 0.5, "exact": 0}


def test_the_classifier_learns_from_its_loss():
    torch.manual_seed(0)
    classifier, truth = AttributeClassifier(8), scene_attributes(range(8))
    images = scenes(range(8)).images.float() / 127.5 - 1
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = attribute_loss(*classifier(images), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert sum(p.numel() for p in AttributeClassifier().parameters()) < 300_000


def test_the_shipped_classifier_knows_held_out_scenes():
    index = range(10_200_000, 10_200_100)
    predicted = classify(load_part("mini", "attributes", AttributeClassifier), scenes(index).images)
    found = agreement(predicted, scene_attributes(index))
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
    images_of_noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = edge_agreement(images_of_noise, edges.new_ones(1, 64, 64).tril())
    assert abs(noise.item() - 0.5) < 0.05
    with pytest.raises(ValueError, match="some edges"):
        edge_agreement(images, torch.zeros(2, 16, 24, dtype=torch.bool))
