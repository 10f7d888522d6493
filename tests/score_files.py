"""Small random weights in the layouts of the published files of scores, and tokenizers for them."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from segresearch.checkpoints.resolve import MINI

TOKENIZER = MINI / "tokenizer"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue cube sphere left of small green cone ring and , !"
Weights = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Weights that keep activations of the order of 1; norms' weights are about 1."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            found[name] = torch.randn(shape, generator=generator) * (1.5 / torch.Size(shape[1:]).numel()) ** 0.5
        else:
            low = 0.8 if name.endswith("weight") else -0.2
            found[name] = low + 0.4 * torch.rand(shape, generator=generator)
    return found


def clip_folder(folder: Path) -> Path:
    """A CLIP of transformers, 24 wide, of 28 pixels and 16 tokens, without a tokenizer; quick_gelu, as OpenAI's."""
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(
        text_config=text, vision_config=tower | {"image_size": 28, "patch_size": 14}, projection_dim=24
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    state = drawn({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict(state | {"logit_scale": torch.tensor(3.0)})
    model.save_pretrained(str(folder))
    return folder


def linear_head(width: int, seed: int = 5) -> Weights:
    """As in LAION's file."""
    sizes = dict(zip((0, 2, 4, 6, 7), zip((1024, 128, 64, 16, 1), (width, 1024, 128, 64, 16))))
    shapes = {f"layers.{i}.weight": shape for i, shape in sizes.items()}
    return drawn(shapes | {f"layers.{i}.bias": shape[:1] for i, shape in sizes.items()}, seed)


def open_clip(layers: int = 2) -> Weights:
    """As OpenCLIP saves ViT-H/14: towers of two heads, 160 and 128 wide, 24 in common, of 28 pixels and 16 tokens."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (16, 128), "text_projection": (128, 24), "token_embedding.weight": (721, 128),
        "visual.class_embedding": (160,), "visual.positional_embedding": (5, 160), "visual.proj": (160, 24),
        "visual.conv1.weight": (160, 3, 14, 14),
    }  # fmt: skip
    for name, width in (("ln_final", 128), ("visual.ln_pre", 160), ("visual.ln_post", 160)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, width in (("", 128), ("visual.", 160)):
        for i in range(layers):
            linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width),
                      "mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}  # fmt: skip
            for name, shape in linear.items():
                shapes[f"{prefix}transformer.resblocks.{i}.{name}weight"] = shape
                shapes[f"{prefix}transformer.resblocks.{i}.{name}bias"] = shape[:1]
            for end in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
                shapes[f"{prefix}transformer.resblocks.{i}.{end}"] = (width,)
    return drawn(shapes) | {"logit_scale": torch.tensor(4.6)}


def hps_file(folder: Path, name: str = "HPS_v2.1_compressed.pt") -> Path:
    torch.save({"epoch": 1, "state_dict": open_clip()}, folder / name)
    return folder / name


def image_reward(layers: int = 2) -> Weights:
    """As in ImageReward's file: a vision tower of three heads, 192 wide, of 32 pixels; BERT of two heads, 128 wide."""
    vision: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 192), "pos_embed": (1, 5, 192), "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,), "norm.weight": (192,), "norm.bias": (192,),
    }  # fmt: skip
    text: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (24, 128), "embeddings.position_embeddings.weight": (40, 128),
        "embeddings.LayerNorm.weight": (128,), "embeddings.LayerNorm.bias": (128,),
    }  # fmt: skip
    for i in range(layers):
        for name, shape in {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (256, 192),
                            "mlp.fc2": (192, 256), "norm1": (192,), "norm2": (192,)}.items():  # fmt: skip
            vision |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        linear = {"intermediate.dense": (200, 128), "output.dense": (128, 200), "output.LayerNorm": (128,)}
        for kind, width in (("attention", 128), ("crossattention", 192)):
            linear |= {f"{kind}.self.query": (128, 128), f"{kind}.self.key": (128, width),
                       f"{kind}.self.value": (128, width), f"{kind}.output.dense": (128, 128),
                       f"{kind}.output.LayerNorm": (128,)}  # fmt: skip
        for name, shape in linear.items():
            text |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
    found = {f"blip.visual_encoder.{key}": value for key, value in drawn(vision, 1).items()}
    found |= {f"blip.text_encoder.{key}": value for key, value in drawn(text, 2).items()}
    found |= {f"mlp.{key}": value for key, value in linear_head(128).items()}
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return found | {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_proj.bias": torch.zeros(2)}


def image_reward_folder(folder: Path) -> Path:
    """With the vocabulary of a BERT beside."""
    torch.save(image_reward(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return folder
