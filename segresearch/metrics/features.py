"""Features of images for distances between sets of them: uint8 (b, 3, h, w) in, float (b, dim) out.

    extractor = load_extractor("inception")        # or "dinov2", "clip", "mini"
    features  = extractor.of(images)               # on the CPU, in batches
    print(extractor)                               # inception (2048 features, weights 6726825d...)

Each resizes and scales images as its papers do: docs/metrics.md.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch import pretrained
from segresearch.checkpoints.resolve import resolve_model
from segresearch.errors import InputError, PackageError
from segresearch.metrics.mini_vision import load_vision, unit_range
from segresearch.models.compute import arithmetic
from segresearch.pretrained import Asset, Device
from segresearch.threads import one_thread

TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION = Asset("weights-inception-2015-12-05-6726825d.pth", TORCH_FIDELITY, "6726825d")
DINOV2 = "facebook/dinov2-large"  # ViT-L/14, 1024 features (arXiv 2304.07193)
CLIP_336 = "openai/clip-vit-large-patch14-336"  # 768 features (arXiv 2103.00020)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Extractor:
    """A frozen network from images to features of `dim` numbers; weights: SHA-256 of the file they come from. classes:
    of Inception the weights (1008, dim) of its last layer, for the inception score."""

    name: str
    dim: int
    weights: str
    network: Callable[[Tensor], Tensor] = field(repr=False)  # uint8 (b, 3, h, w) -> (b, dim)
    device: torch.device = torch.device("cpu")
    classes: Tensor | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.dim} features, weights {self.weights[:8]}...)"

    @torch.inference_mode()
    def of(self, images: UInt8[Tensor, "n 3 h w"], batch: int = 64) -> Float[Tensor, "n dim"]:
        """Features, on the CPU; fp32 products in fp32, whatever else computes on the device. InputError for none."""
        if not len(images):
            raise InputError("no images to take features of")
        with arithmetic("exact", self.device):
            return torch.cat([self.network(part.to(self.device)).cpu() for part in images.split(batch)])


def normalized_squares(
    images: UInt8[Tensor, "b 3 h w"], side: int, normal: tuple[tuple[float, ...], tuple[float, ...]], crop: bool = False
) -> Float[Tensor, "b 3 side side"]:
    """Bicubic with antialiasing to a square, as Pillow does it; less the mean and over the deviation of `normal`. crop:
    the middle square, rounded to whole numbers afterwards (CMMD); else all of it, squeezed, not rounded (FD-DINOv2)."""
    if crop:
        h, w = images.shape[2:]
        least = min(h, w)
        images = images[:, :, (h - least) // 2 :, (w - least) // 2 :][:, :, :least, :least]
    x = images.float()
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)  # (b, 3, h, w) -> (b, 3, side, side)
        x = (x.round() if crop else x).clamp(0, 255)
    mean, std = torch.tensor(normal, dtype=x.dtype, device=x.device)[:, :, None, None]  # (2, 3) -> 2 of (3, 1, 1)
    return (x / 255 - mean) / std


def load_extractor(
    name: str, path: str | Path | None = None, sha256: str | None = None, device: Device = "cpu"
) -> Extractor:
    """A network of EXTRACTORS, with weights from `path` or from the local cache; nothing is fetched.
    path: the weight file of "inception"; a folder or hub id with config.json and weights for "dinov2" and "clip"; a
    model folder with vision/ for "mini". sha256: of the weights, where not the published one is meant. InputError for
    an unknown name, CheckpointError for weights that are missing or others, PackageError without torch-fidelity."""
    if name not in EXTRACTORS:
        raise InputError(f"features {name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](path, sha256, torch.device(device))


def _inception(path: str | Path | None, sha256: str | None, device: torch.device) -> Extractor:
    """TensorFlow's network of December 2015, by torch-fidelity. Not torchvision's: average pools leave the border out
    of their count, the last block pools by maximum, and images are resized as TensorFlow 1 did it (corners of pixels at
    whole numbers, no antialiasing)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise PackageError(f"features of inception need torch-fidelity: {pretrained.INSTALL}") from error
    weights, digest = pretrained.load_tensors(INCEPTION, path, sha256)
    file = io.BytesIO()  # torch-fidelity opens a path by the reader that runs a pickle's code, so it gets these tensors
    torch.save(weights, file)
    file.seek(0)
    with pretrained.fitting("inception"), torch.random.fork_rng(devices=[]):
        module = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    module = pretrained.frozen(module, device)
    classes = module.fc.weight
    return Extractor("inception", module.fc.in_features, digest, lambda images: module(images)[0], device, classes)


def _dinov2(path: str | Path | None, sha256: str | None, device: torch.device) -> Extractor:
    from transformers import Dinov2Model  # imports for seconds, so only where it is used

    folder, digest = pretrained.hub_weights(path or DINOV2, sha256)
    model = pretrained.load_pretrained(Dinov2Model, folder, device)
    return Extractor(
        "dinov2", model.config.hidden_size, digest, device=device,  # (b, tokens, dim) -> (b, dim), the class token
        network=lambda images: model(pixel_values=normalized_squares(images, 224, IMAGENET)).last_hidden_state[:, 0],
    )  # fmt: skip


def _clip(path: str | Path | None, sha256: str | None, device: torch.device) -> Extractor:
    model, digest = clip_tower(path or CLIP_336, sha256, device)

    def network(images: Tensor) -> Tensor:
        pixels = normalized_squares(images, model.config.image_size, OPENAI, crop=True)
        return F.normalize(model(pixel_values=pixels).image_embeds, dim=-1)

    return Extractor("clip", model.config.projection_dim, digest, network, device)


def clip_tower(path: str | Path, sha256: str | None, device: torch.device) -> tuple[Any, str]:
    """The vision tower of a CLIP of transformers with its projection, and the SHA-256 of its file."""
    from transformers import AutoConfig, CLIPVisionModelWithProjection

    folder, digest = pretrained.hub_weights(path, sha256)
    with pretrained.reading(folder, "no config.json of CLIP"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    width = config.projection_dim  # a whole CLIP has it beside its towers, a vision tower among its own sizes
    return pretrained.load_pretrained(CLIPVisionModelWithProjection, folder, device, projection_dim=width), digest


def _mini(path: str | Path | None, sha256: str | None, device: torch.device) -> Extractor:
    vision = pretrained.frozen(load_vision(path or "mini"), device).vision
    digest = pretrained.digest(resolve_model(path or "mini") / "vision" / "model.safetensors", sha256)
    network = one_thread(lambda images: vision(unit_range(images)))
    return Extractor("mini", vision.head.out_features, digest, network, device)


EXTRACTORS = {"inception": _inception, "dinov2": _dinov2, "clip": _clip, "mini": _mini}
