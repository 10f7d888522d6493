"""What is in a picture of the embedded model, named by a small classifier, against what its scene holds.

The classifier says how many objects there are and, for every (shape, colour), whether there is such an object, among
colours whether any object has it, likewise shapes. It reads 64×64 pictures and was trained on rendered scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from segresearch.metrics.mini_vision import filled, unit_range
from segresearch.scenes.captions import COLORS, SHAPES
from segresearch.scenes.layout import SLOTS, layout
from segresearch.scenes.scenes import SceneObject
from segresearch.threads import one_thread


@dataclass(frozen=True)
class Attributes:
    """Of each picture: the number of objects, and which shapes, colours and pairs of both occur among them."""

    count: Int[Tensor, " b"]
    shapes: Bool[Tensor, "b 5"]
    colors: Bool[Tensor, "b 8"]
    pairs: Bool[Tensor, "b 5 8"]

    def __getitem__(self, rows: Tensor | slice) -> "Attributes":
        return Attributes(self.count[rows], self.shapes[rows], self.colors[rows], self.pairs[rows])

    def __len__(self) -> int:
        return len(self.count)


def _held(count: Tensor, pairs: Tensor) -> Attributes:
    return Attributes(count, pairs.any(2), pairs.any(1), pairs)


def of_scenes(indices: Sequence[int] | range, seed: int = 0) -> Attributes:
    """What `scenes(indices, seed)` hold, and so what their captions say, without rendering them."""
    drawn = layout(torch.as_tensor(list(indices), dtype=torch.int64), seed)
    pairs = torch.zeros(len(indices), len(SHAPES), len(COLORS), dtype=torch.bool)
    row, slot = drawn.present.nonzero(as_tuple=True)
    pairs[row, drawn.shape[row, slot], drawn.color[row, slot]] = True
    return _held(drawn.present.sum(1), pairs)


def of_objects(objects: Sequence[Sequence[SceneObject]]) -> Attributes:
    """What the objects of scenes are, by `Scenes.objects`."""
    pairs = torch.zeros(len(objects), len(SHAPES), len(COLORS), dtype=torch.bool)
    for row, things in enumerate(objects):
        for thing in things:
            pairs[row, SHAPES.index(thing.shape), COLORS.index(thing.color)] = True
    return _held(torch.tensor([len(things) for things in objects]), pairs)


class Namer(nn.Module):
    """Convolutions to an 8×8 grid, then, for each place, evidence for each name; the largest of the picture decides.

    The count alone comes from sums over places.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        widths, strides = (3, w, 2 * w, 2 * w, 4 * w, 4 * w), (2, 2, 1, 2, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.names = nn.Conv2d(4 * w, len(SHAPES) * len(COLORS) + len(SHAPES) + len(COLORS), 1)
        self.places = nn.Conv2d(4 * w, 2 * w, 1)
        self.count = nn.Sequential(nn.Linear(6 * w, 4 * w), nn.SiLU(), nn.Linear(4 * w, SLOTS))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b slots"], Float[Tensor, "b names"]]:
        """Logits of the counts 1 to 4, and of the names: pairs (shape by shape), then shapes, then colours."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = F.silu(norm(conv(x)))  # (b, c, h, w) -> (b, c', h', w')
            x = x + y if x.shape == y.shape else y
        said = self.names(x).flatten(2).amax(2)  # (b, names, h, w) -> (b, names)
        held = F.softplus(self.places(x)).flatten(2)
        return self.count(torch.cat([held.mean(2), x.flatten(2).amax(2)], dim=1)), said


def loss_of(count: Tensor, names: Tensor, truth: Attributes) -> Tensor:
    """Cross entropy of the count, plus that of the names with a weight for their number."""
    target = torch.cat([truth.pairs.flatten(1), truth.shapes, truth.colors], dim=1).float()
    return F.cross_entropy(count.float(), truth.count - 1) + 12 * F.binary_cross_entropy_with_logits(
        names.float(), target
    )


def load_namer(path_or_name: str | Path = "mini") -> Namer:
    """The classifier shipped in a model folder's attributes/. Raises CheckpointError where there is none."""
    return filled(path_or_name, "attributes", Namer)


@one_thread
@torch.inference_mode()
def named(namer: Namer, images: Tensor, batch: int = 250) -> Attributes:
    """What the classifier sees in uint8 pictures (b, 3, 64, 64), sent to where it lies."""
    device = namer.names.weight.device
    outputs = [namer(unit_range(part.to(device))) for part in images.split(batch)]
    count, names = (torch.cat(z) for z in zip(*outputs, strict=True))
    shapes, colors = len(SHAPES), len(COLORS)
    pairs, of_shape, of_color = (names > 0).split([shapes * colors, shapes, colors], dim=1)
    return Attributes(count.argmax(1) + 1, of_shape, of_color, pairs.unflatten(1, (shapes, colors)))


@one_thread
def agreement(seen: Attributes, said: Attributes) -> dict[str, Float[Tensor, " b"]]:
    """How far each picture agrees with what was asked, each in [0, 1].

    count: the number of objects is right. colors, shapes: no colour (shape) of an object is missing or added.
    objects: share of the asked (shape, colour) that are there. exact: number and all (shape, colour) right.
    """
    right = seen.count == said.count
    wanted = said.pairs.flatten(1)
    found = (seen.pairs.flatten(1) & wanted).sum(1) / wanted.sum(1).clamp(min=1)
    exact = right & (seen.pairs == said.pairs).flatten(1).all(1)
    return {
        "count": right.float(),
        "colors": (seen.colors == said.colors).all(1).float(),
        "shapes": (seen.shapes == said.shapes).all(1).float(),
        "objects": found.float(),
        "exact": exact.float(),
    }
