"""ImageReward v1 (arXiv 2304.05977): BLIP's text encoder reads the prompt with cross-attention to the image; the state
of its first token goes through five linear layers. The number is less a mean and over a deviation, both published.

The file's names of the text encoder are those of transformers' BLIP, the vision tower's are mapped. The sizes are read
from the tensors; heads are 64 wide.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segresearch import pretrained
from segresearch.errors import CheckpointError
from segresearch.metrics.clip_pixels import cropped_squares
from segresearch.pretrained import Device, load_pretrained

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
BERT = "google-bert/bert-base-uncased"  # its tokenizer; the authors' package has it by its old name
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35  # of a prompt, begin and end included
HEAD = 64  # width of a head
EPS = {"vision": 1e-6, "text": 1e-12}  # of the norms
VISION = {  # names of the file -> of BlipVisionModel
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.", "blocks.": "encoder.layers.", ".norm": ".layer_norm",
    ".attn.proj.": ".self_attn.projection.", ".attn.qkv.": ".self_attn.qkv.",
}  # fmt: skip
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's training


class LinearHead(nn.Module):
    """Five linear layers, nothing between them: LAION's aesthetic predictor and ImageReward. Keys layers.0, 2, 4, 6, 7
    of the published files, whose other layers drop out in training."""

    def __init__(self, width: int = 768):
        super().__init__()
        a, b, c, d, e = (nn.Linear(*pair) for pair in zip((width, 1024, 128, 64, 16), (1024, 128, 64, 16, 1)))
        self.layers = nn.Sequential(a, nn.Identity(), b, nn.Identity(), c, nn.Identity(), d, e)

    def forward(self, x: Float[Tensor, "b width"]) -> Float[Tensor, " b"]:
        return self.layers(x).squeeze(1)


def load_image_reward(
    path: str | Path | None = None, tokenizer: str | Path | None = None, sha256: str | None = None,
    device: Device = "cpu",
) -> tuple[Callable[[Tensor, Sequence[str]], Tensor], str]:  # fmt: skip
    """The score of uint8 images (b, 3, h, w) and b prompts, and the SHA-256 of its file. path: of the file, None: in
    the hub's cache. tokenizer: the folder of BERT's, likewise. Prompts longer than 35 tokens are cut, with a warning.
    CheckpointError for what is missing, has another checksum or does not fit."""
    from transformers import BertTokenizer, BlipTextModel, BlipVisionModel  # imports for seconds

    file = pretrained.hub_file(REPO, FILE, path)
    digest = pretrained.hub_digest(file, sha256)
    words = pretrained.hub_file(BERT, "vocab.txt", tokenizer, " tokenizer_config.json").parent
    with pretrained.reading(words, "no tokenizer of BERT"):
        reader = BertTokenizer.from_pretrained(str(words), local_files_only=True)
    tensors = pretrained.read_tensors(file, f"hf download {REPO} {FILE} fetches the published one")
    parts = {
        "vision": {_vision_name(k): v for k, v in _below("blip.visual_encoder.", tensors).items()},
        "text": {k: v for k, v in _below("blip.text_encoder.", tensors).items() if not k.endswith("position_ids")},
        "head": _below("mlp.", tensors),
    }
    known = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.", *UNUSED)
    if unknown := sorted(key for key in tensors if not key.startswith(known)):
        raise CheckpointError(f"{file}: {len(unknown)} weights that ImageReward has not, such as {unknown[0]}")
    try:
        configs = _vision_config(parts["vision"]), _text_config(parts["text"])
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: not ImageReward's: no {error.args[0]}, or of another shape") from error
    tower = load_pretrained(BlipVisionModel, file, device, config=configs[0], state_dict=parts["vision"])
    encoder = load_pretrained(
        BlipTextModel, file, device, config=configs[1], state_dict=parts["text"], add_pooling_layer=False
    )
    with pretrained.fitting(file), torch.device("meta"):
        head = LinearHead(configs[1].hidden_size)
        head.load_state_dict(parts["head"], assign=True)
    head = pretrained.frozen(head, device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = _tokens(reader, prompts).to(device)
        seen = tower(pixel_values=cropped_squares(images, configs[0].image_size)).last_hidden_state
        states = encoder(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (head(states[:, 0]) - MEAN) / STD  # (b, tokens, dim) -> (b,)

    return score, digest


def _tokens(reader: Any, prompts: Sequence[str]) -> Any:
    """Ids and masks, cut to TOKENS, with a warning."""
    longest = max(map(len, reader(list(prompts), verbose=False).input_ids))
    if longest > TOKENS:
        warnings.warn(
            f"ImageReward reads {TOKENS} tokens; longer prompts among the {len(prompts)} are cut", stacklevel=3
        )
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return reader(list(prompts), **options)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _vision_name(key: str) -> str:
    if key.startswith("norm."):
        return f"post_layernorm.{key.removeprefix('norm.')}"
    for name, ours in VISION.items():
        key = key.replace(name, ours)
    return key


def _count(pattern: str, weights: Mapping[str, Tensor]) -> int:
    """How many layers, of which each has one key like `pattern`."""
    return sum(re.fullmatch(pattern, key) is not None for key in weights)


def _vision_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig

    inner, width = weights["encoder.layers.0.mlp.fc1.weight"].shape
    patch, tokens = weights["embeddings.patch_embedding.weight"].shape[-1], weights["embeddings.position_embedding"]
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=width // HEAD, layer_norm_eps=EPS["vision"],
        num_hidden_layers=_count(r"encoder\.layers\.\d+\.layer_norm1\.weight", weights), patch_size=patch,
        image_size=round((tokens.shape[1] - 1) ** 0.5) * patch, hidden_act="gelu",
    )  # fmt: skip


def _text_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipTextConfig

    inner, width = weights["encoder.layer.0.intermediate.dense.weight"].shape
    return BlipTextConfig(
        vocab_size=len(weights["embeddings.word_embeddings.weight"]), hidden_size=width, intermediate_size=inner,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        num_hidden_layers=_count(r"encoder\.layer\.\d+\.intermediate\.dense\.weight", weights),
        num_attention_heads=width // HEAD, layer_norm_eps=EPS["text"], hidden_act="gelu",
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
    )  # fmt: skip
