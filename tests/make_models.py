"""Random, tiny SDXL-shaped models, written by diffusers in the folder layout, and the same weights in one file.

Heads are 64 channels wide as in SDXL, so that the sizes of the single file can be read from its shapes.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.checkpoints import key_maps
from segresearch.checkpoints.tensors import Source
from segresearch.models.network_configs import UNetConfig

LENGTH = 16  # tokens
VOCABULARY = 2 * 256 + 3 + 2


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with three merges."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(extra))]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "u")]
    tokens = (
        letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    )
    assert len(tokens) == VOCABULARY
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), pad_token=pad, model_max_length=LENGTH)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def randomize(module: nn.Module) -> None:
    """Norms and biases away from 1 and 0, so that a swapped one shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
            elif "embedding.weight" in name and "position" in name:
                p.normal_(0, 0.5)


def make_pipeline(folder: Path, seed: int = 0, **scheduler) -> StableDiffusionXLPipeline:
    """A diffusers pipeline of random networks; `folder` keeps its tokenizers."""
    text = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 2),
            cross_attention_dim=192,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025,
            sample_size=16,
            force_upcast=True,
        )
        first = CLIPTextModel(CLIPTextConfig(**text, hidden_size=64, num_attention_heads=1, hidden_act="quick_gelu"))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(**text, hidden_size=128, num_attention_heads=2, hidden_act="gelu", projection_dim=40)
        )
        for module in (unet, vae, first, second):
            randomize(module)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=first.eval(),
        text_encoder_2=second.eval(),
        tokenizer=write_tokenizer(folder / "tokenizer"),
        tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad="!"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading", **scheduler),
        add_watermarker=False,
    )


def write_folder(folder: Path, seed: int = 0, *, variant: str | None = None, shard: str = "10GB", **scheduler) -> Path:
    """A random model in the diffusers folder layout."""
    make_pipeline(folder, seed, **scheduler).save_pretrained(folder, variant=variant, max_shard_size=shard)
    return folder


def original_layout(pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """The pipeline's weights under the names and in the forms of the original SDXL file."""
    unet, vae = pipeline.unet, pipeline.vae
    maps = (
        (unet, key_maps.unet_map(UNetConfig.from_dict(unet.config))),
        (vae, key_maps.vae_map(len(vae.config.block_out_channels))),
        (pipeline.text_encoder, key_maps.clip_map),
        (pipeline.text_encoder_2, key_maps.open_clip_map),
    )
    out: dict[str, Tensor] = {}
    for module, source_of in maps:
        sources = {key: source_of(key) for key in module.state_dict()}
        out |= to_original(module.state_dict(), sources)
    out["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return out


def to_original(weights: dict[str, Tensor], sources: dict[str, Source]) -> dict[str, Tensor]:
    """The inverse of loading: thirds stacked, transposed back, attention of the VAE as 1×1 convolutions."""
    out: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, (name, third, transpose) in sources.items():
        weight = weights[key].T.contiguous() if transpose else weights[key]
        if ".mid.attn_1." in name and weight.ndim == 2:
            weight = weight[:, :, None, None]
        if third is None:
            assert name not in out, f"{name} is named twice"
            out[name] = weight.contiguous()
        else:
            thirds.setdefault(name, {})[third] = weight
    return out | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}


def write_single(
    file: Path, pipeline: StableDiffusionXLPipeline, dtype: torch.dtype = torch.float32, **more: Tensor
) -> Path:
    """The pipeline in one file in the original layout, with `more` keys beside it."""
    save_file({k: v.to(dtype).contiguous() for k, v in (original_layout(pipeline) | more).items()}, file)
    return file


def make_controlnet(pipeline: StableDiffusionXLPipeline, seed: int = 0, **changes) -> ControlNetModel:
    """A random diffusers ControlNet that fits the pipeline (VAE factor 2), none of it zero.

    changes: to its config, as in transformer_layers_per_block.
    """
    with torch.random.fork_rng():
        torch.manual_seed(100 + seed)
        like = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 12))
        net = ControlNetModel.from_config({**like.config, **changes})
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            layer.weight.data.normal_(0, 0.2)
    return net.eval()
