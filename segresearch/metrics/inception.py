"""Inception-v3 as the Fréchet inception distance uses it: TensorFlow's network of December 2015, ported.

It differs from the Inception-v3 of arXiv 1512.00567 in torchvision: average pools leave the border out of their count,
the last block pools by maximum, there are 1008 logits, and the input is resized as TensorFlow 1 did it (corners of
pixels at whole numbers, no antialiasing) and scaled as (x − 128) / 128. Names are those of the ported weight file.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segresearch.metrics.weight_files import Asset

WEIGHTS = Asset(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
)
SIDE, FEATURES, LOGITS = 299, 2048, 1008
Conv = tuple[str, int, int | tuple[int, int], int]  # name, channels out, kernel, stride
Chain = list[list[Conv]]  # steps one after another; the convolutions of the last step stand side by side


class Unit(nn.Module):
    """Convolution, batch norm with running statistics, ReLU."""

    def __init__(self, a: int, b: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else 0
        self.conv = nn.Conv2d(a, b, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(b, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _chain(name: str, *steps: tuple | list[tuple]) -> Chain:
    """Steps (channels, kernel[, stride]) named name_1, name_2, ..; a list of two stands side by side as _2a, _2b."""
    chain: Chain = []
    for i, step in enumerate(steps, 1):
        several = step if isinstance(step, list) else [step]
        stem = name if len(steps) == 1 else f"{name}_{i}"
        names = [stem + letter for letter in "ab"] if len(several) > 1 else [stem]
        chain.append([(name, s[0], s[1], s[2] if len(s) > 2 else 1) for name, s in zip(names, several, strict=True)])
    return chain


class Mixed(nn.Module):
    """Chains of convolutions on the same input, and a pool, side by side in the channels.

    pool: "average" or "max", followed by a convolution to `pooled` channels; pooled 0: a max pool of stride 2 alone.
    """

    def __init__(self, channels: int, chains: Sequence[Chain], pooled: int = 0, pool: str = "average"):
        super().__init__()
        self.chains = [[[conv[0] for conv in step] for step in chain] for chain in chains]
        self.pool, self.width = pool, 0
        for chain in chains:
            wide = channels
            for step in chain:
                for name, out, kernel, stride in step:
                    self.add_module(name, Unit(wide, out, kernel, stride, pad=stride == 1))
                wide = step[0][1]
            self.width += sum(conv[1] for conv in chain[-1])
        self.branch_pool = Unit(channels, pooled, 1) if pooled else None
        self.width += pooled or channels

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            y = [x]
            for step in chain:
                y = [self.get_submodule(name)(y[0]) for name in step]
            found += y
        if self.branch_pool is None:
            found.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            found.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            found.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(found, dim=1)  # (b, c, h, w) -> (b, width, h', w')


def _narrow(channels: int, pooled: int) -> Mixed:  # 35×35
    five, three = _chain("branch5x5", (48, 1), (64, 5)), _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return Mixed(channels, [_chain("branch1x1", (64, 1)), five, three], pooled)


def _middle(c: int) -> Mixed:  # 17×17
    row, column = (1, 7), (7, 1)
    single = _chain("branch7x7", (c, 1), (c, row), (192, column))
    double = _chain("branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))
    return Mixed(768, [_chain("branch1x1", (192, 1)), single, double], 192)


def _wide(channels: int, pool: str) -> Mixed:  # 8×8
    both = [(384, (1, 3)), (384, (3, 1))]
    single, double = _chain("branch3x3", (384, 1), both), _chain("branch3x3dbl", (448, 1), (384, 3), both)
    return Mixed(channels, [_chain("branch1x1", (320, 1)), single, double], 192, pool)


class Inception(nn.Module):
    """uint8 pictures of any size to the 2048 features of the last average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _narrow(192, 32), _narrow(256, 64), _narrow(288, 64)
        down = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2))
        self.Mixed_6a = Mixed(288, [_chain("branch3x3", (384, 3, 2)), down])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_middle, (128, 160, 160, 192))
        down = _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
        self.Mixed_7a = Mixed(768, [_chain("branch3x3", (192, 1), (320, 3, 2)), down])
        self.Mixed_7b, self.Mixed_7c = _wide(1280, "average"), _wide(2048, "max")
        self.fc = nn.Linear(FEATURES, LOGITS)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        x = (resized(images.to(self.fc.weight.dtype)) - 128) / 128  # (b, 3, h, w) -> (b, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)  # -> (b, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # -> (b, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # -> (b, 2048, 8, 8)
        return x.mean(dim=(2, 3))  # -> (b, 2048)

    def logits(self, features: Float[Tensor, "b 2048"]) -> Float[Tensor, "b 1008"]:
        """Of the 1008 classes, from features."""
        return self.fc(features)


def resized(images: Float[Tensor, "b c h w"], side: int = SIDE) -> Float[Tensor, "b c side side"]:
    """Bilinear as in TensorFlow 1: output pixel i lies at i·(n/side) of the n input pixels, computed in fp32."""
    x = images
    for axis in (2, 3):
        n = x.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(n / side, dtype=torch.float32)
        low = place.long().clamp(max=n - 1)
        share = (place - low).to(x.dtype)
        if axis == 2:
            share = share[:, None]
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1))
        x = first + (second - first) * share  # one axis after the other: n -> side
    return x
