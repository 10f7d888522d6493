"""Scores of single images by networks fitted to what people prefer: uint8 (b, 3, h, w) and prompts in, float (b,) out.

    scorer = load_scorer("hpsv21")                 # or "aesthetic", "pickscore", "hpsv2", "imagereward"
    values = scorer.of(images, prompts)            # on the CPU, in batches

Each shows an image to its network as its authors' code does: docs/metrics.md. Nothing is fetched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segresearch import pretrained
from segresearch.checkpoints.tokenizer_files import read_tokenizer
from segresearch.errors import InputError
from segresearch.metrics.clip_pixels import cropped_squares, padded_squares
from segresearch.metrics.features import clip_tower
from segresearch.metrics.image_reward import LinearHead, load_image_reward
from segresearch.metrics.open_clip_file import load_open_clip
from segresearch.metrics.text_alignment import CLIP, Clip, pairs
from segresearch.models.compute import arithmetic
from segresearch.pretrained import Asset, Device

LAION = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC = Asset(
    "sac+logos+ava1-l14-linearMSE.pth", LAION, "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
)
PICKSCORE = "yuvalkirstain/PickScore_v1"  # CLIP ViT-H/14 (arXiv 2305.01569)
HPS = "xswu/HPSv2"  # CLIP ViT-H/14 in OpenCLIP's layout (arXiv 2306.09341)
HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv21": "HPS_v2.1_compressed.pt"}
BESIDE = {"aesthetic": "aesthetic_clip", "imagereward": "bert_tokenizer"} | dict.fromkeys(
    ("pickscore", "hpsv2", "hpsv21"), "clip_tokenizer"
)  # of a config's weights, what goes with the network
Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Scorer:
    """A frozen network from images and their prompts to numbers. weights: SHA-256 of the file they come from, of two
    files joined by "+". reads_prompts: whether the prompts matter."""

    name: str
    weights: str
    network: Score = field(repr=False)  # uint8 (b, 3, h, w), b prompts -> (b,)
    device: torch.device = torch.device("cpu")
    reads_prompts: bool = True

    @torch.inference_mode()
    def of(self, images: UInt8[Tensor, "n 3 h w"], prompts: Sequence[str], batch: int = 16) -> Float[Tensor, " n"]:
        """A number of each image, on the CPU; fp32 products in fp32. InputError for unequal numbers or none."""
        parts = pairs(images, prompts, "prompt", batch)
        if not parts:
            raise InputError("no images to score")
        with arithmetic("exact", self.device):
            return torch.cat([self.network(images[rows].to(self.device), prompts[rows]).cpu() for rows in parts])


def load_scorer(
    name: str, path: str | Path | None = None, beside: str | Path | None = None, sha256: str | None = None,
    device: Device = "cpu",
) -> Scorer:  # fmt: skip
    """A network of SCORERS, with weights from `path` or from the local cache; nothing is fetched.
    path: a file, of "pickscore" a folder or hub id. beside: the folder of what goes with it, else the local cache: of
    "aesthetic" its CLIP, of the others a tokenizer. sha256: of the weights, where not the published ones are meant.
    InputError for an unknown name, CheckpointError for weights that are missing or others."""
    if name not in SCORERS:
        raise InputError(f"scores {name!r}: choose one of {', '.join(SCORERS)}")
    return SCORERS[name](path, beside, sha256, torch.device(device))


def _aesthetic(path: str | Path | None, beside: str | Path | None, sha256: str | None, device: torch.device) -> Scorer:
    """LAION's aesthetic predictor V2: a linear function of the unit image embedding."""
    tensors, digest = pretrained.load_tensors(AESTHETIC, path, sha256)
    tower, of_clip = clip_tower(beside or CLIP, None, device)
    with pretrained.fitting("aesthetic"), torch.device("meta"):
        head = LinearHead(tower.config.projection_dim)
        head.load_state_dict(tensors, assign=True)
    head = pretrained.frozen(head, device)

    def network(images: Tensor, prompts: Sequence[str]) -> Tensor:
        embedded = tower(pixel_values=cropped_squares(images, tower.config.image_size)).image_embeds
        return head(nn.functional.normalize(embedded, dim=-1))

    return Scorer("aesthetic", f"{digest}+{of_clip}", network, device, reads_prompts=False)


def _pickscore(path: str | Path | None, beside: str | Path | None, sha256: str | None, device: torch.device) -> Scorer:
    """The logit of CLIP: its scale times the cosine."""
    from transformers import CLIPModel

    folder, digest = pretrained.hub_weights(path or PICKSCORE, sha256)
    model = pretrained.load_pretrained(CLIPModel, folder, device)
    clip = Clip(digest, model, _tokenizer(beside), None)
    side, scale = model.config.vision_config.image_size, model.logit_scale.exp()

    def network(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scale * (clip.embed_pixels(cropped_squares(images, side)) * clip.embed_texts(prompts)).sum(1)

    return Scorer("pickscore", digest, network, device)


def _hps(
    path: str | Path | None, beside: str | Path | None, sha256: str | None, device: torch.device, name: str
) -> Scorer:
    """The cosine."""
    file = pretrained.hub_file(HPS, HPS_FILES[name], path)
    digest = pretrained.hub_digest(file, sha256)
    tokenizer = _tokenizer(beside)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tensors = pretrained.read_tensors(file, f"hf download {HPS} {HPS_FILES[name]} fetches the published one")
    model = load_open_clip(file, tensors, ends, device)
    clip, side = Clip(digest, model, tokenizer, None), model.config.vision_config.image_size

    def network(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (clip.embed_pixels(padded_squares(images, side)) * clip.embed_texts(prompts)).sum(1)

    return Scorer(name, digest, network, device)


def _image_reward(
    path: str | Path | None, beside: str | Path | None, sha256: str | None, device: torch.device
) -> Scorer:
    model, digest = load_image_reward(path, beside, sha256, device)
    return Scorer("imagereward", digest, model, device)


def _tokenizer(folder: str | Path | None) -> Any:
    """CLIP's, of a folder or of OpenAI's ViT-L/14 in the hub's cache: all published CLIPs have one vocabulary."""
    cached = None if folder else pretrained.hub_file(CLIP, "vocab.json", None, " merges.txt tokenizer_config.json")
    return read_tokenizer(cached.parent if cached else Path(str(folder)).expanduser())


SCORERS: dict[str, Callable[..., Scorer]] = {
    "aesthetic": _aesthetic, "pickscore": _pickscore, "hpsv2": partial(_hps, name="hpsv2"),
    "hpsv21": partial(_hps, name="hpsv21"), "imagereward": _image_reward,
}  # fmt: skip
