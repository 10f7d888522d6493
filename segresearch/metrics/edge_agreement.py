"""Whether the contrasts of an image lie on given edges: how well an image follows its control image."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.threads import one_thread


def contrast(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Length of the Sobel gradient, the largest of the three channels."""
    smooth, step = torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([smooth.outer(step), step.outer(smooth)]).to(images)
    x = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]  # (b, 3, h, w) -> (b·3, 1, h+2, w+2)
    slopes = F.conv2d(x, kernels[:, None])  # -> (b·3, 2, h, w)
    return slopes.square().sum(1).sqrt().unflatten(0, images.shape[:2]).amax(1)  # -> (b, h, w)


@one_thread
def edge_agreement(images: Float[Tensor, "b 3 h w"], edges: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Area under the ROC curve of `contrast` as a detector of the exact edges: 1 is perfect, 0.5 chance.

    It needs no threshold, so overall contrast plays no part. InputError for an image with edges nowhere or everywhere.
    """
    edges = edges.flatten(1)
    positive, n = edges.sum(1), edges.shape[1]
    if not ((positive > 0) & (positive < n)).all():
        raise InputError("edge agreement needs images with some edges, and not edges everywhere")
    ranks = contrast(images).flatten(1).argsort(dim=1).argsort(dim=1).double() + 1
    above = (ranks * edges).sum(1) - positive * (positive + 1) / 2  # Mann-Whitney
    return (above / (positive * (n - positive))).float()
