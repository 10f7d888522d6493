"""Text alignment: the cosine of the CLIP embeddings of an image and of its prompt (arXiv 2103.00020), as in Table 2 of
SEG (arXiv 2408.00760). Other papers print 100·max(cos, 0) or 2.5·max(cos, 0) (CLIPScore, arXiv 2104.08718)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch.errors import InputError
from segresearch.metrics.mini_vision import VisionTower, unit_range
from segresearch.pretrained import Device, hub_weights, load_pretrained, reading
from segresearch.threads import one_thread

CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, repr=False)
class Clip:
    """Both towers of a CLIP with their tokenizer and image processor; weights: SHA-256 of their file."""

    weights: str
    model: Any
    tokenizer: Any
    processor: Any

    def embed_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b dim"]:
        """Unit embeddings. The model's own processor resizes images and cuts them to the middle square."""
        inputs = self.processor(images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt")
        return self.embed_pixels(inputs["pixel_values"])

    def embed_pixels(self, pixels: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b dim"]:
        """Unit embeddings of what the vision tower reads."""
        output = self.model.vision_model(pixel_values=pixels.to(next(self.model.parameters())))
        return F.normalize(self.model.visual_projection(output.pooler_output), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b dim"]:
        """Unit embeddings. Texts longer than the model reads (77 tokens) are cut, with a warning."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
        if tokens.input_ids.shape[1] > limit:
            warnings.warn(f"CLIP reads {limit} tokens; longer texts among the {len(texts)} are cut", stacklevel=3)
            tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        output = self.model.text_model(**tokens.to(next(self.model.parameters()).device))
        return F.normalize(self.model.text_projection(output.pooler_output), dim=-1)


def load_clip(path: str | Path = CLIP, sha256: str | None = None, device: Device = "cpu") -> Clip:
    """A CLIP of transformers from a local folder, or a hub id that is in the local cache; nothing is fetched.
    CheckpointError where files are missing, or the weights have another SHA-256."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # imports for seconds

    folder, digest = hub_weights(path, sha256)
    model = load_pretrained(CLIPModel, folder, device)
    with reading(folder, "no tokenizer or image processor of CLIP"):
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    return Clip(digest, model, tokenizer, processor)


@dataclass(frozen=True)
class MiniClip:
    """The embedded model's second CLIP: its vision tower (`load_vision`) and its `sd.text`. The first CLIP has no
    projection of its text, as in SDXL, so no image can be compared with it."""

    tower: VisionTower
    text: Any

    @one_thread
    def embed_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b dim"]:
        return self.tower.embed(unit_range(images.to(self.tower.vision.head.weight.device)))

    @one_thread
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b dim"]:
        return F.normalize(self.text.encode(list(texts))[1].to(self.tower.vision.head.weight), dim=-1)


def pairs(images: UInt8[Tensor, "n 3 h w"], texts: Sequence[str], noun: str, batch: int) -> list[slice]:
    """The rows of each batch of images with their texts. noun: what a text is. InputError for unequal numbers."""
    if isinstance(texts, str) or len(images) != len(texts):
        count = "one string" if isinstance(texts, str) else len(texts)
        raise InputError(f"{len(images)} images and {count} as {noun}s: give a list with one {noun} for each image")
    return [slice(i, i + batch) for i in range(0, len(texts), batch)]


@torch.inference_mode()
def text_alignment(
    clip: Clip | MiniClip, images: UInt8[Tensor, "n 3 h w"], texts: Sequence[str], batch: int = 64
) -> Float[Tensor, " n"]:
    """Cosine of each image with its text, in [−1, 1], on the CPU. InputError for unequal numbers or none."""
    parts = pairs(images, texts, "text", batch)
    if not parts:
        raise InputError("no images and texts to compare")
    products = [clip.embed_images(images[rows]) * clip.embed_texts(texts[rows]) for rows in parts]
    return torch.cat([product.sum(1).cpu() for product in products])  # (b, dim) -> (b,)
