"""An IP-Adapter on disk: one .safetensors file of `image_proj.*` and `ip_adapter.<n>.*`, and its CLIP vision tower."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from segresearch.checkpoints.resolve import refuse_pickle
from segresearch.checkpoints.tensors import Entry, Weights, fill, open_file
from segresearch.errors import CheckpointError
from segresearch.models.ip_adapter import ImagePrompter, IPAdapter, Linear, Resampler
from segresearch.models.unet import UNet
from segresearch.pretrained import load_pretrained, model_folder

OTHERS = {  # a key -> the kind of adapter
    "image_proj.perceiver_resampler.proj_in.weight": "FaceID Plus", "image_proj.proj.3.weight": "full (face)",
    "image_proj.proj.0.weight": "FaceID", "ip_adapter.0.to_k_lora.down.weight": "FaceID",
}  # fmt: skip


@lru_cache(maxsize=2)
def load_ip_adapter(path: str | Path, image_encoder: str | Path, unet: UNet) -> ImagePrompter:
    """The adapter of a file, base or plus, for this UNet, in its dtype and on its device.

    image_encoder: a folder (or hub id in the local cache) of the CLIP vision tower that it was trained with, which
        stays fp32 (ViT-H for most, ViT-bigG for `ip-adapter_sdxl.safetensors`).
    CheckpointError for another file, an adapter of another kind or model, a tower of another width.
    """
    file = Path(path).expanduser()
    refuse_pickle(file)
    if not file.is_file():
        raise CheckpointError(f"ip_adapter.path={str(path)!r}: no such file; give the adapter's .safetensors file")
    entries, _ = open_file(file)
    image_proj, width = projection(entries, file, unet.config.cross_attention_dim)
    with torch.device("meta"):
        adapter = IPAdapter(unet, image_proj())
    weight = unet.conv_in.weight
    fill(adapter, Weights(f"IP-Adapter {file.name}", entries), weight.dtype, weight.device)
    from transformers import CLIPVisionModelWithProjection

    folder = model_folder(image_encoder, ["config.json"], ["*.safetensors"])
    tower = load_pretrained(CLIPVisionModelWithProjection, folder, weight.device, "CLIP vision tower")
    own = tower.config.projection_dim if adapter.image_proj.pooled else tower.config.hidden_size
    if own != width:
        sides = f"it gives {own} numbers, the adapter {file.name} reads {width}: give the tower of this adapter"
        raise CheckpointError(f"ip_adapter.image_encoder={str(image_encoder)!r}: {sides}")
    return ImagePrompter(adapter, tower)


def projection(entries: Mapping[str, Entry], file: Path, context: int) -> tuple[Any, int]:
    """What makes the image projection of a file, and how wide the images' features are that it reads."""
    shapes = {key: entry.shape for key, entry in entries.items()}
    kind = next((kind for key, kind in OTHERS.items() if key in shapes), None)
    if kind:
        raise CheckpointError(f"{file} is an IP-Adapter of the kind {kind}: only base and plus are supported")
    if not any(key.startswith("image_proj.") for key in shapes):
        raise CheckpointError(f"{file} is no IP-Adapter (its first key is {min(shapes)!r}): image_proj.* is missing")
    try:
        if "image_proj.proj.weight" in shapes:
            out, width = shapes["image_proj.proj.weight"]
            check_context(shapes["image_proj.norm.weight"][0], context, file)
            return lambda: Linear(width, out // context, context), width
        (_, tokens, inner), width = shapes["image_proj.latents"], shapes["image_proj.proj_in.weight"][1]
        check_context(shapes["image_proj.proj_out.weight"][0], context, file)
        depth = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("image_proj.layers."))
        heads = shapes["image_proj.layers.0.0.to_q.weight"][0] // 64
        factor = shapes["image_proj.layers.0.1.1.weight"][0] // inner
        return lambda: Resampler(width, tokens, context, inner, depth, heads, factor), width
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        problem = f"its sizes cannot be told, keys are missing ({error}): fetch it again"
        raise CheckpointError(f"{file}: {problem}") from error


def check_context(own: int, context: int, file: Path) -> None:
    """CheckpointError for an adapter of another text width than the UNet's."""
    if own != context:
        sides = f"its tokens are {own} wide, this model's text is {context}"
        raise CheckpointError(f"{file}: {sides}: it is of another model")
