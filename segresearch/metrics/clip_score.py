"""Agreement of pictures with their texts: the cosine of their CLIP embeddings (arXiv 2103.00020).

Papers print it in three scales: the cosine itself (0.271 in Table 2 of SEG, arXiv 2408.00760), 100·max(cos, 0), and
2.5·max(cos, 0) (CLIPScore, arXiv 2104.08718). The CLIP it is measured by is a part of the result.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch.errors import CheckpointError, InputError
from segresearch.metrics import weight_files
from segresearch.metrics.mini_vision import VisionTower, features_of
from segresearch.threads import one_thread

CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP with their tokenizer and image processor; weights: SHA-256 of their file."""

    name: str
    weights: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    processor: Any = field(repr=False)

    @property
    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    @torch.inference_mode()
    def of_images(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b dim"]:
        """Unit embeddings; pictures resized and cut to the middle square as the model's own processor does it."""
        pixels = self.processor(images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt")[
            "pixel_values"
        ]
        seen = self.model.vision_model(pixel_values=pixels.to(self._weight))
        return F.normalize(self.model.visual_projection(seen.pooler_output), dim=-1)

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Float[Tensor, "b dim"]:
        """Unit embeddings; texts longer than the model reads (77 tokens) are cut, with a warning."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
        if tokens.input_ids.shape[1] > limit:
            warnings.warn(f"CLIP reads {limit} tokens; longer texts among the {len(texts)} are cut", stacklevel=3)
            tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = (tokens[key].to(self._weight.device) for key in ("input_ids", "attention_mask"))
        read = self.model.text_model(input_ids=ids, attention_mask=mask)
        return F.normalize(self.model.text_projection(read.pooler_output), dim=-1)


def load_clip(
    path: str | Path = CLIP,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """A CLIP of transformers from a local folder, or a hub id that is in the local cache; nothing is fetched.

    Raises CheckpointError where files are missing, or the weights have another SHA-256.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # imports for seconds

    folder, known = weight_files.hub_folder(path, sha256)
    model = weight_files.frozen(weight_files.pretrained(CLIPModel.from_pretrained, folder), device, dtype)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{folder}: tokenizer or image processor: {' '.join(str(error).split())[:300]}"
        ) from error
    return Clip(str(path), known, model, tokenizer, processor)


def _paired(images: Tensor, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or len(images) != len(texts):
        count = "one string" if isinstance(texts, str) else len(texts)
        raise InputError(f"{len(images)} pictures and {count} as texts: give a list with one text for each picture")
    if not len(texts):
        raise InputError("no pictures and texts to compare")


def cosines(clip: Clip, images: UInt8[Tensor, "n 3 h w"], texts: Sequence[str], batch: int = 64) -> Float[Tensor, " n"]:
    """Cosine of each picture with the text in its place, in [−1, 1]. ValueError for unequal numbers or none."""
    _paired(images, texts)
    found = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        found.append((clip.of_images(images[part]) * clip.of_texts(texts[part])).sum(1).cpu())  # (b, dim) -> (b,)
    return torch.cat(found)


@one_thread
def mini_cosines(
    tower: VisionTower, text: Any, images: UInt8[Tensor, "n 3 64 64"], texts: Sequence[str], batch: int = 250
) -> Float[Tensor, " n"]:
    """The same by the embedded model's second CLIP, with its vision tower (`load_vision`) and its `sdxl.text`.

    The first has no projection of its text, as in SDXL, so nothing of it can be compared with a picture.
    """
    _paired(images, texts)
    starts = range(0, len(texts), batch)
    pooled = torch.cat([text.encode(list(texts[i : i + batch]))[1] for i in starts])  # -> (n, projection)
    seen = features_of(tower, images, batch)[1]
    return (seen * F.normalize(pooled.to(seen), dim=-1)).sum(1)


def clip_score(cosine: Float[Tensor, " n"], scale: float = 100.0) -> Float[Tensor, " n"]:
    """scale·max(cos, 0) of each picture: 100 as most print it, 2.5 for arXiv 2104.08718."""
    return scale * cosine.clamp(min=0)
