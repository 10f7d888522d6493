"""The vision tower of `mini`'s two CLIPs: features for distances between pictures, embeddings to match with texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from segresearch.checkpoints.resolve import resolve_model
from segresearch.errors import CheckpointError
from segresearch.threads import one_thread

SIDE = 64  # pixels
Module = TypeVar("Module", bound=nn.Module)


class Vision(nn.Module):
    """Strided convolutions, 64 px to a 4×4 grid, all of which the last layer sees: it can tell left from right."""

    def __init__(self, width: int = 32, features: int = 256):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width)
        pairs = zip((3, *widths), widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in widths)
        self.residuals = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[1:])
        self.head = nn.Linear(16 * widths[-1], features)

    def stages(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """The feature maps of the four stages, at half, a quarter, an eighth and a sixteenth of the pixels.

        images: in [−1, 1], of sides that are multiples of 16.
        """
        x, found = images, []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))  # (b, c, h, w) -> (b, c', h/2, w/2)
            if i:
                x = x + F.silu(self.residuals[i - 1](x))
            found.append(x)
        return found

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b features"]:
        """Features of pictures in [−1, 1]."""
        return F.silu(self.head(self.stages(images)[-1].flatten(1)))


class VisionTower(nn.Module):
    """The trunk and its two projections, into the spaces of the two text encoders."""

    def __init__(self, width: int = 32, features: int = 256, projections: tuple[int, ...] | list[int] = (64, 96)):
        super().__init__()
        self.vision = Vision(width, features)
        self.vision_projections = nn.ModuleList(nn.Linear(features, p, bias=False) for p in projections)

    def project(self, features: Float[Tensor, "b features"], which: int = 1) -> Float[Tensor, "b projection"]:
        """Unit embeddings; `which` = 1 is comparable with SDXL's pooled text, `sdxl.encode(texts)["cond"].pooled`."""
        return F.normalize(self.vision_projections[which](features), dim=-1)


def unit_range(images: Tensor) -> Tensor:
    """uint8 pictures as fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def filled(path_or_name: str | Path, part: str, build: Callable[..., Module]) -> Module:
    """`build(**config)` with the weights of <model folder>/<part>/{config.json, model.safetensors}, fp32, evaluating.

    Raises CheckpointError where the part is missing or does not fit.
    """
    folder = resolve_model(path_or_name) / part
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no readable config.json and model.safetensors ({error}); this model brings no {part} weights, "
            'use "mini", or export them (experiments/mini)'
        ) from error
    try:
        module = build(**config)
        module.load_state_dict({name: value.float() for name, value in weights.items()})
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: weights and config.json do not fit: {' '.join(str(error).split())}"
        ) from error
    return module.eval().requires_grad_(False)


def load_vision(path_or_name: str | Path = "mini") -> VisionTower:
    """The vision tower shipped in a model folder's vision/. Raises CheckpointError where there is none."""
    return filled(path_or_name, "vision", VisionTower)


@one_thread
@torch.inference_mode()
def features_of(
    tower: VisionTower, images: Tensor, batch: int = 250
) -> tuple[Float[Tensor, "b features"], Float[Tensor, "b projection"]]:
    """Features and CLIP 2 embeddings of uint8 pictures (b, 3, 64, 64), fp32, where the tower lies."""
    device = tower.vision.head.weight.device
    features = torch.cat([tower.vision(unit_range(part.to(device))) for part in images.split(batch)])
    return features, tower.project(features)
