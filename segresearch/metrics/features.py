"""Features of pictures for distances between sets of them: uint8 (b, 3, h, w) in, float (b, dim) out.

    extractor = load_extractor("inception")        # or "dinov2", "clip", "mini"
    features  = extractor.of(images)               # on the CPU, in batches
    print(extractor)                               # inception (2048 features, weights 6726825d...)

Each resizes and scales pictures as its papers do: docs/metrics.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch.checkpoints.resolve import resolve_model
from segresearch.errors import InputError
from segresearch.metrics import inception, weight_files
from segresearch.metrics.mini_vision import SIDE, load_vision, unit_range
from segresearch.models.compute import arithmetic
from segresearch.threads import one_thread

DINOV2 = "facebook/dinov2-large"  # ViT-L/14, 1024 features (arXiv 2304.07193)
CLIP = "openai/clip-vit-large-patch14-336"  # 768 features (arXiv 2103.00020)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DINOV2_SIDE = 224


@dataclass(frozen=True)
class Extractor:
    """A frozen network from pictures to features of `dim` numbers; weights: SHA-256 of the file they come from."""

    name: str
    dim: int
    weights: str
    network: Callable[[Tensor], Tensor] = field(repr=False)
    device: torch.device = torch.device("cpu")

    def __str__(self) -> str:
        return f"{self.name} ({self.dim} features, weights {self.weights[:8]}...)"

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b dim"]:
        """Features of one batch, on the extractor's device; fp32 products in fp32, whatever else computes there."""
        with arithmetic("exact", self.device):
            found = self.network(images.to(self.device))
        assert found.shape == (len(images), self.dim), found.shape
        return found

    def of(self, images: UInt8[Tensor, "n 3 h w"], batch: int = 64) -> Float[Tensor, "n dim"]:
        """Features of many pictures, `batch` at a time, on the CPU. ValueError for none."""
        if not len(images):
            raise InputError("no pictures to take features of")
        return torch.cat([self(part).cpu() for part in images.split(batch)])


def squared(
    images: UInt8[Tensor, "b 3 h w"],
    side: int,
    normal: tuple[tuple[float, ...], tuple[float, ...]],
    dtype: torch.dtype = torch.float32,
    crop: bool = False,
) -> Float[Tensor, "b 3 side side"]:
    """Bicubic with antialiasing to a square, as Pillow does it; less the mean and over the deviation of `normal`.

    crop: the middle square of the picture, rounded to whole levels afterwards (CMMD); else all of it, squeezed to a
    square and not rounded (FD-DINOv2).
    """
    if crop:
        h, w = images.shape[2:]
        least = min(h, w)
        images = images[:, :, (h - least) // 2 :, (w - least) // 2 :][:, :, :least, :least]
    x = images.to(torch.promote_types(dtype, torch.float32))  # half precisions would round the pixels
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)  # (b, 3, h, w) -> (b, 3, side, side)
        x = (x.round() if crop else x).clamp(0, 255)
    mean, std = torch.tensor(normal, dtype=x.dtype, device=x.device)[:, :, None, None]  # (2, 3) -> 2 of (3, 1, 1)
    return ((x / 255 - mean) / std).to(dtype)


def load_extractor(
    name: str,
    path: str | Path | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """A network of EXTRACTORS, with weights from `path` or from the local cache; nothing is fetched.

    path: the weight file of "inception"; a folder or hub id with config.json and weights for "dinov2" and "clip"; a
    model folder with vision/ for "mini". sha256: of the weights, where not the published one is meant.
    Raises ValueError for an unknown name, CheckpointError for weights that are missing or not the ones meant.
    """
    if name not in EXTRACTORS:
        raise InputError(f"features {name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](path, sha256, torch.device(device), dtype)


def _inception(path: str | Path | None, sha256: str | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    weights, known = weight_files.tensors(inception.WEIGHTS, path, sha256)
    with torch.device("meta"):
        network = inception.Inception()
    weight_files.put(network, weights, str(path or inception.WEIGHTS.file))
    return Extractor("inception", inception.FEATURES, known, weight_files.frozen(network, device, dtype), device)


def _dinov2(path: str | Path | None, sha256: str | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    from transformers import Dinov2Model  # imports for seconds, so only where it is used

    folder, known = weight_files.hub_folder(path or DINOV2, sha256)
    model = weight_files.frozen(weight_files.pretrained(Dinov2Model.from_pretrained, folder), device, dtype)

    def network(images: Tensor) -> Tensor:
        pixels = squared(images, DINOV2_SIDE, IMAGENET, dtype)
        return model(pixel_values=pixels).last_hidden_state[:, 0]  # (b, tokens, dim) -> (b, dim), the class token

    return Extractor("dinov2", model.config.hidden_size, known, network, device)


def _clip(path: str | Path | None, sha256: str | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    from transformers import AutoConfig, CLIPVisionModelWithProjection

    folder, known = weight_files.hub_folder(path or CLIP, sha256)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hasattr(config, "vision_config"):  # a whole CLIP says above its towers how wide the embeddings are
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    loaded = weight_files.pretrained(CLIPVisionModelWithProjection.from_pretrained, folder, config=config)
    model = weight_files.frozen(loaded, device, dtype)

    def network(images: Tensor) -> Tensor:
        pixels = squared(images, model.config.image_size, OPENAI, dtype, crop=True)
        return F.normalize(model(pixel_values=pixels).image_embeds, dim=-1)

    return Extractor("clip", model.config.projection_dim, known, network, device)


def _mini(path: str | Path | None, sha256: str | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    tower = weight_files.frozen(load_vision(path or "mini"), device, dtype)
    file = resolve_model(path or "mini") / "vision" / "model.safetensors"
    known = weight_files.checked(file, sha256) if sha256 else weight_files.digest(file)

    @one_thread
    def network(images: Tensor) -> Tensor:
        if images.shape[2:] != (SIDE, SIDE):
            raise InputError(
                f"pictures of {images.shape[2]}×{images.shape[3]}: the features of mini need {SIDE}×{SIDE}"
            )
        return tower.vision(unit_range(images).to(dtype))

    return Extractor("mini", tower.vision.head.out_features, known, network, device)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "mini": _mini,
}
