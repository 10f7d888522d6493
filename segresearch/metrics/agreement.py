"""How far an image agrees with its scene: what it holds, by the attribute classifier of the embedded model, and where
its edges lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.metrics.mini_vision import unit_range
from segresearch.scenes.captions import COLORS, SHAPES
from segresearch.scenes.layout import SLOTS, layout
from segresearch.threads import one_thread

LOGITS = (len(SHAPES) * len(COLORS), len(SHAPES), len(COLORS))  # of pairs (shape by shape), shapes, colours


@dataclass(frozen=True)
class Attributes:
    """Of each image: the number of objects, and which shapes, colours and pairs of both occur among them."""

    count: Int[Tensor, " b"]
    shapes: Bool[Tensor, "b 5"]
    colors: Bool[Tensor, "b 8"]
    pairs: Bool[Tensor, "b 5 8"]

    def __getitem__(self, rows: Tensor | slice) -> "Attributes":
        return Attributes(self.count[rows], self.shapes[rows], self.colors[rows], self.pairs[rows])


def scene_attributes(indices: Sequence[int] | range, seed: int = 0) -> Attributes:
    """What `scenes(indices, seed)` hold, and so what their captions say, without rendering them."""
    objects = layout(torch.as_tensor(list(indices), dtype=torch.int64), seed)
    pairs = torch.zeros(len(indices), len(SHAPES), len(COLORS), dtype=torch.bool)
    row, slot = objects.present.nonzero(as_tuple=True)
    pairs[row, objects.shape[row, slot], objects.color[row, slot]] = True
    return Attributes(objects.present.sum(1), pairs.any(2), pairs.any(1), pairs)


class AttributeClassifier(nn.Module):
    """What 64×64 images hold. Convolutions to an 8×8 grid, then evidence for every attribute at every place; an image
    has the largest. The count alone comes from sums over places. The names of layers are those of the weight file."""

    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        widths, strides = (3, w, 2 * w, 2 * w, 4 * w, 4 * w), (2, 2, 1, 2, 1)
        layers = [nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths, widths[1:], strides)]
        self.convs = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.names = nn.Conv2d(4 * w, sum(LOGITS), 1)
        self.places = nn.Conv2d(4 * w, 2 * w, 1)
        self.count = nn.Sequential(nn.Linear(6 * w, 4 * w), nn.SiLU(), nn.Linear(4 * w, SLOTS))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b slots"], Float[Tensor, "b logits"]]:
        """Logits of the counts 1 to 4, and of the attributes: pairs (shape by shape), then shapes, then colours."""
        x = images
        for conv, norm in zip(self.convs, self.norms):
            y = F.silu(norm(conv(x)))  # (b, c, h, w) -> (b, c', h', w')
            x = x + y if x.shape == y.shape else y
        attributes = self.names(x).flatten(2).amax(2)  # (b, logits, h, w) -> (b, logits)
        amounts = F.softplus(self.places(x)).flatten(2).mean(2)
        return self.count(torch.cat([amounts, x.flatten(2).amax(2)], dim=1)), attributes


def attribute_loss(count: Tensor, attributes: Tensor, truth: Attributes) -> Tensor:
    """Cross entropy of the count, plus that of the attributes with a weight for their number."""
    target = torch.cat([truth.pairs.flatten(1), truth.shapes, truth.colors], dim=1).float()
    entropy = F.binary_cross_entropy_with_logits(attributes.float(), target)
    return F.cross_entropy(count.float(), truth.count - 1) + 12 * entropy


@one_thread
@torch.inference_mode()
def classify(classifier: AttributeClassifier, images: UInt8[Tensor, "b 3 64 64"], batch: int = 250) -> Attributes:
    """The attributes of uint8 images as the classifier predicts them, on its device."""
    device = classifier.names.weight.device
    outputs = [classifier(unit_range(part.to(device))) for part in images.split(batch)]
    count, attributes = map(torch.cat, zip(*outputs))
    pairs, shapes, colors = (attributes > 0).split(LOGITS, dim=1)
    return Attributes(count.argmax(1) + 1, shapes, colors, pairs.unflatten(1, (len(SHAPES), len(COLORS))))


@one_thread
def agreement(predicted: Attributes, expected: Attributes) -> dict[str, Float[Tensor, " b"]]:
    """Of each image, numbers in [0, 1]. count: the number of objects is right. colors, shapes: no colour (shape) is
    missing or added. objects: share of the expected (shape, colour) that are there. exact: count and pairs right."""
    count = predicted.count == expected.count
    pairs = expected.pairs.flatten(1)
    objects = (predicted.pairs.flatten(1) & pairs).sum(1) / pairs.sum(1).clamp(min=1)
    return {
        "count": count.float(),
        "colors": (predicted.colors == expected.colors).all(1).float(),
        "shapes": (predicted.shapes == expected.shapes).all(1).float(),
        "objects": objects.float(),
        "exact": (count & (predicted.pairs == expected.pairs).flatten(1).all(1)).float(),
    }


def contrast(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Length of the Sobel gradient, the largest of the three channels."""
    smooth, step = torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([smooth.outer(step), step.outer(smooth)]).to(images)
    x = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]  # (b, 3, h, w) -> (b·3, 1, h+2, w+2)
    slopes = F.conv2d(x, kernels[:, None])  # -> (b·3, 2, h, w)
    return slopes.square().sum(1).sqrt().unflatten(0, images.shape[:2]).amax(1)  # -> (b, h, w)


@one_thread
def edge_agreement(images: Float[Tensor, "b 3 h w"], edges: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Area under the ROC curve of `contrast` as a detector of the exact edges: 1 is perfect, 0.5 chance. It needs no
    threshold, so overall contrast plays no part. InputError for an image with edges nowhere or everywhere."""
    edges = edges.flatten(1)
    positive, n = edges.sum(1), edges.shape[1]
    if not ((positive > 0) & (positive < n)).all():
        raise InputError("edge agreement needs images with some edges, and not edges everywhere")
    ranks = contrast(images).flatten(1).argsort(dim=1).argsort(dim=1).double() + 1
    above = (ranks * edges).sum(1) - positive * (positive + 1) / 2  # Mann-Whitney
    return (above / (positive * (n - positive))).float()
