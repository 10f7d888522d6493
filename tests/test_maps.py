"""Control images of exact scene maps."""

import math

import pytest
import torch

from segresearch.scenes.scenes import depth_image, edge_image, scenes


def test_maps_of_scenes_are_normalised_and_near_is_bright():
    batch = scenes(range(4), size=(32, 48))
    depth, edges = depth_image(batch.depth), edge_image(batch.edges)
    assert depth.shape == edges.shape == (4, 3, 32, 48)
    assert (depth.amax(dim=(1, 2, 3)) == 1).all() and (depth.amin(dim=(1, 2, 3)) == 0).all()
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert (depth[:, 0][batch.depth.isinf()] == 0).all()
    one, finite = batch.depth[0].flatten(), batch.depth[0].isfinite().flatten()
    order = one[finite].argsort()
    assert (depth[0, 0].flatten()[finite][order].diff() <= 0).all()  # farther is never brighter


def test_row_of_a_batch_is_the_row_alone():
    depth = scenes(range(3), size=16).depth
    assert torch.equal(depth_image(depth)[1:2], depth_image(depth[1:2]))


def test_flat_and_empty_depth_are_black():
    depth = torch.stack([torch.full((16, 16), 3.0), torch.full((16, 16), math.inf)])
    assert (depth_image(depth) == 0).all()


def test_distance_zero_is_refused():
    with pytest.raises(ValueError, match="smallest is 0"):
        depth_image(torch.zeros(1, 4, 4))
