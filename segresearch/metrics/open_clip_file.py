"""A CLIP of transformers from a file in OpenCLIP's layout, such as HPSv2's: q, k and v in one matrix, projections
transposed. The sizes are read from the tensors; heads are 64 wide in the text tower and 80 in the other, as in
ViT-H/14."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segresearch.checkpoints.key_maps import open_clip_map
from segresearch.checkpoints.tensors import Source
from segresearch.errors import CheckpointError
from segresearch.pretrained import Device, load_pretrained

HEADS = {"text": 64, "vision": 80}  # width of a head
ENDS = {"bos_token_id": 49406, "eos_token_id": 49407}  # of CLIP's vocabulary
_VISION = {  # names of transformers -> of OpenCLIP, before those that both towers share
    "vision_model.": "", "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post",
}  # fmt: skip


def load_open_clip(file: Path, tensors: Mapping[str, Tensor], ends: Mapping[str, int], device: Device = "cpu") -> Any:
    """CLIPModel with these tensors, in fp32, frozen. file: for messages. ends: the tokens at the begin and the end of a
    text, bos_token_id and eos_token_id. CheckpointError for tensors that are not all those of one CLIP."""
    from transformers import CLIPConfig, CLIPModel  # imports for seconds

    try:
        config = CLIPConfig(
            text_config=_sizes("text", tensors) | dict(ends),
            vision_config=_sizes("vision", tensors) | _picture(tensors),
            projection_dim=tensors["text_projection"].shape[1],
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: not a CLIP in OpenCLIP's layout: no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: not a CLIP in OpenCLIP's layout: tensors of other shapes") from error
    with torch.device("meta"):
        sources = {name: _source(name) for name in CLIPModel(config).state_dict()}
    if missing := sorted({source.key for source in sources.values()} - tensors.keys()):
        raise CheckpointError(f"{file}: the CLIPModel misses {len(missing)} weights, such as {missing[0]}")
    if unknown := sorted(tensors.keys() - {source.key for source in sources.values()} - {"attn_mask"}):
        raise CheckpointError(f"{file}: {len(unknown)} weights that the CLIPModel has not, such as {unknown[0]}")
    state = {name: _taken(tensors[source.key], source) for name, source in sources.items()}
    return load_pretrained(CLIPModel, file, device, config=config, state_dict=state)


def _sizes(tower: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the blocks of a tower say of it; gelu, as in OpenCLIP's own models."""
    blocks = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks."
    inner, width = tensors[f"{blocks}0.mlp.c_fc.weight"].shape
    if width % HEADS[tower]:
        raise ValueError
    return {
        "hidden_size": width, "intermediate_size": inner, "hidden_act": "gelu",
        "num_hidden_layers": sum(key.startswith(blocks) and key.endswith(".ln_1.weight") for key in tensors),
        "num_attention_heads": width // HEADS[tower],
        **({"vocab_size": len(tensors["token_embedding.weight"]),
            "max_position_embeddings": len(tensors["positional_embedding"])} if tower == "text" else {}),
    }  # fmt: skip


def _picture(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sides of an image and of its patches, in pixels."""
    patch, tokens = tensors["visual.conv1.weight"].shape[-1], len(tensors["visual.positional_embedding"])
    return {"patch_size": patch, "image_size": round((tokens - 1) ** 0.5) * patch}


def _source(name: str) -> Source:
    """Where a parameter of CLIPModel lies in OpenCLIP's layout."""
    if name == "visual_projection.weight":
        return Source("visual.proj", transpose=True)
    if not name.startswith("vision_model."):
        return open_clip_map(name, prefix="")
    for part, original in _VISION.items():
        name = name.replace(part, original)
    return open_clip_map(name, prefix="visual.")


def _taken(stored: Tensor, source: Source) -> Tensor:
    part = stored if source.third is None else stored.chunk(3)[source.third]
    return (part.T if source.transpose else part).contiguous()
