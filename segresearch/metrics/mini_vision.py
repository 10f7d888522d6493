"""The vision tower of `mini`'s two CLIPs: features for distances of sets, embeddings, a perceptual distance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from segresearch.checkpoints.resolve import resolve_model
from segresearch.errors import CheckpointError, InputError
from segresearch.pretrained import fitting, frozen
from segresearch.threads import one_thread

Module = TypeVar("Module", bound=nn.Module)


class Vision(nn.Module):
    """Strided convolutions, 64 px to a 4×4 grid, all of which the last layer sees: it can tell left from right."""

    def __init__(self, width: int = 32, features: int = 256):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip((3, *widths), widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in widths)
        self.residuals = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[1:])
        self.head = nn.Linear(16 * widths[-1], features)

    def stages(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """The feature maps of images in [−1, 1] at 1/2, 1/4, 1/8 and 1/16 of their size. InputError for sides that are
        not multiples of 16."""
        h, w = images.shape[2:]
        if h % 16 or w % 16:
            raise InputError(f"images of {h}×{w}: sides must be multiples of 16")
        x, maps = images, []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))  # (b, c, h, w) -> (b, c', h/2, w/2)
            if i:
                x = x + F.silu(self.residuals[i - 1](x))
            maps.append(x)
        return maps

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b features"]:
        """Features of 64×64 images in [−1, 1]. InputError for another size."""
        if images.shape[2:] != (64, 64):
            raise InputError(f"images of {images.shape[2]}×{images.shape[3]}: the features of mini need 64×64")
        return F.silu(self.head(self.stages(images)[-1].flatten(1)))


class VisionTower(nn.Module):
    """The trunk and its two projections, into the spaces of the two text encoders."""

    def __init__(self, width: int = 32, features: int = 256, projections: tuple[int, ...] | list[int] = (64, 96)):
        super().__init__()
        self.vision = Vision(width, features)
        self.vision_projections = nn.ModuleList(nn.Linear(features, p, bias=False) for p in projections)

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b projection"]:
        """Unit embeddings of images in [−1, 1], comparable with SDXL's pooled text (`Cond.pooled`)."""
        return F.normalize(self.vision_projections[1](self.vision(images)), dim=-1)


def unit_range(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def load_part(path_or_name: str | Path, part: str, build: Callable[..., Module]) -> Module:
    """`build(**config)` with the weights of <model folder>/<part>/{config.json, model.safetensors}, in fp32.
    CheckpointError where the part is missing or does not fit."""
    folder = resolve_model(path_or_name) / part
    try:
        config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    except (OSError, ValueError, RecursionError) as error:
        problem = f"no readable config.json and model.safetensors ({error}); this model brings no {part} weights"
        raise CheckpointError(f'{folder}: {problem}, use "mini", or export them (experiments/mini)') from error
    with fitting(folder), torch.device("meta"):  # no random numbers are drawn for what the weights replace
        module = build(**config)
        module.load_state_dict(weights, assign=True)
    return frozen(module)


def load_vision(path_or_name: str | Path = "mini") -> VisionTower:
    """The vision tower shipped in a model folder's vision/. Raises CheckpointError where there is none."""
    return load_part(path_or_name, "vision", VisionTower)


@one_thread
@torch.inference_mode()
def perceptual_distances(
    vision: Vision, a: UInt8[Tensor, "n 3 h w"], b: UInt8[Tensor, "m 3 y x"], batch: int = 200
) -> Float[Tensor, " n"]:
    """Distance in [0, 4] of uint8 images, pair by pair, in the manner of LPIPS (arXiv 1801.03924), on vision's device.
    At each stage the channels of every place are scaled to unit length. Squared differences are summed over channels,
    averaged over places, then over stages. Every channel counts alike, so numbers compare with each other alone."""
    if a.shape != b.shape:
        raise InputError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
    device, parts = vision.head.weight.device, []
    for pair in zip(a.split(batch), b.split(batch)):
        maps = zip(*(vision.stages(unit_range(images.to(device))) for images in pair))
        squares = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square() for x, y in maps]
        parts.append(torch.stack([x.sum(dim=1).mean(dim=(1, 2)) for x in squares]).mean(0))  # (b, c, h, w) -> (b,)
    return torch.cat(parts)
