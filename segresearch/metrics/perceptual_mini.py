"""Perceptual distance in the manner of LPIPS (arXiv 1801.03924), on the vision tower of `mini`.

LPIPS scales each channel by a weight fitted to human judgements. There are none of 64×64 scenes, so every channel
counts alike here: numbers compare with each other, not with those of lpips.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.metrics.mini_vision import Vision, unit_range
from segresearch.threads import one_thread


def feature_distance(vision: Vision, a: Float[Tensor, "b 3 h w"], b: Tensor) -> Float[Tensor, " b"]:
    """Distance of each picture of `a` to the one of `b` in its place, in [0, 4]; pictures in [−1, 1].

    At each stage the channels of every place are scaled to unit length; squared differences are summed over channels,
    averaged over places, then over stages.
    """
    if a.shape != b.shape:
        raise InputError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
    stages = []
    for x, y in zip(vision.stages(a), vision.stages(b), strict=True):
        apart = F.normalize(x, dim=1) - F.normalize(y, dim=1)
        stages.append(apart.square().sum(dim=1).mean(dim=(1, 2)))  # (b, c, h, w) -> (b,)
    return torch.stack(stages).mean(0)


@one_thread
@torch.inference_mode()
def distances(vision: Vision, a: Tensor, b: Tensor, batch: int = 200) -> Float[Tensor, " b"]:
    """`feature_distance` of uint8 pictures, in batches, sent to where the network lies."""
    device = vision.head.weight.device
    pairs = zip(a.split(batch), b.split(batch), strict=True)
    return torch.cat([feature_distance(vision, unit_range(x.to(device)), unit_range(y.to(device))) for x, y in pairs])
