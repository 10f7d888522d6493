"""Random, tiny models of every family, written by diffusers in the folder layout with the keys of the real configs.

Widths and depths are small; the rest (block types, heads, conditioning, which parts there are) is that of the family.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_models import LENGTH, VOCABULARY, randomize, write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SIZED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
FOUR = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "block_out_channels": (32, 64, 64, 64),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
THREE = SIZED | {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "block_out_channels": (32, 64, 64),
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 64 + 96, "projection_class_embeddings_input_dim": 6 * 8 + 40,
}  # fmt: skip
CLIP_L = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3}
OPEN_CLIP = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 3, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Family:
    """What one family's folder holds. unet, vae: changes to the shared configs. texts: configs of the text encoders by
    their folder. schedule: of the scheduler. index: further arguments of the pipeline."""

    pipeline: Any
    unet: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    scheduler: Any = EulerDiscreteScheduler
    schedule: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=lambda: {"scaling_factor": 0.13025})
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def sized(self) -> bool:
        """Whether the UNet reads image sizes and a pooled text."""
        return "addition_embed_type" in self.unet


ONE = {"text_encoder": CLIP_L}
OPEN_ONE = {"text_encoder": OPEN_CLIP | {"hidden_act": "gelu"}}
SECOND = {"text_encoder_2": OPEN_CLIP | {"hidden_act": "gelu", "projection_dim": 40}}
TWO = ONE | SECOND
SD15 = FOUR | {"attention_head_dim": 8, "cross_attention_dim": 64}
SD21 = FOUR | {
    "attention_head_dim": (2, 4, 4, 4), "cross_attention_dim": 96, "use_linear_projection": True,
    "upcast_attention": True,
}  # fmt: skip
DDIM = {"set_alpha_to_one": False, "clip_sample": False}
PNDM = {"skip_prk_steps": True}
SMALL_VAE = {"scaling_factor": 0.18215}
DISTILLED = {
    "transformer_layers_per_block": ((1,), (2, 2), (3, 3)), "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ((3, 3, 4), (2, 1, 1), 1),
}  # fmt: skip
FAMILIES = {
    "sd15": Family(StableDiffusionPipeline, SD15, ONE, PNDMScheduler, PNDM, SMALL_VAE),
    "sd21": Family(StableDiffusionPipeline, SD21, OPEN_ONE, DDIMScheduler, DDIM, SMALL_VAE),
    "sd21v": Family(
        StableDiffusionPipeline, SD21, OPEN_ONE, DDIMScheduler,
        DDIM | {"prediction_type": "v_prediction"}, SMALL_VAE,
    ),
    "sd15_inpainting": Family(
        StableDiffusionInpaintPipeline, SD15 | {"in_channels": 9}, ONE, PNDMScheduler, PNDM, SMALL_VAE
    ),
    "pix2pix": Family(StableDiffusionInstructPix2PixPipeline, SD15 | {"in_channels": 8}, ONE, vae=SMALL_VAE),
    "lcm": Family(LatentConsistencyModelPipeline, SD15 | {"time_cond_proj_dim": 20}, ONE, LCMScheduler, vae=SMALL_VAE),
    "sdxl": Family(StableDiffusionXLPipeline, THREE | {"transformer_layers_per_block": (1, 2, 3)}, TWO),
    "sdxl_inpainting": Family(
        StableDiffusionXLInpaintPipeline, THREE | {"transformer_layers_per_block": (1, 2, 3), "in_channels": 9}, TWO
    ),
    "sdxl_pix2pix": Family(
        StableDiffusionXLInstructPix2PixPipeline, THREE | {"transformer_layers_per_block": (1, 2, 3), "in_channels": 8},
        TWO,
    ),
    "ssd1b": Family(StableDiffusionXLPipeline, THREE | DISTILLED, TWO),
    "vega": Family(
        StableDiffusionXLPipeline,
        THREE | DISTILLED | {
            "transformer_layers_per_block": ((1,), (1, 1), (2, 2)),
            "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
        },
        TWO,
    ),
    "koala700m": Family(
        StableDiffusionXLPipeline,
        THREE | {"transformer_layers_per_block": (0, 2, 5), "layers_per_block": 1, "mid_block_type": None}, TWO,
    ),
    "koala1b": Family(
        StableDiffusionXLPipeline, THREE | {"transformer_layers_per_block": (0, 2, 6), "layers_per_block": 1}, TWO
    ),
    "refiner": Family(
        StableDiffusionXLImg2ImgPipeline,
        SIZED | {
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "block_out_channels": (32, 64, 96, 96), "transformer_layers_per_block": 2,
            "attention_head_dim": (1, 2, 3, 3), "cross_attention_dim": 96,
            "projection_class_embeddings_input_dim": 5 * 8 + 40,
        },
        SECOND, index={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
    "playground": Family(
        StableDiffusionXLPipeline, THREE | {"transformer_layers_per_block": (1, 2, 3)}, TWO,
        EDMDPMSolverMultistepScheduler, {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
        vae={
            "scaling_factor": 0.5, "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        },
    ),
}  # fmt: skip


def make_family(name: str, folder: Path, seed: int = 0) -> DiffusionPipeline:
    """A diffusers pipeline of random networks of this family; `folder` keeps its tokenizers."""
    family = FAMILIES[name]
    shared = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 2}
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer") if family.sized else (), None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts["unet"] = UNet2DConditionModel(
            **{"sample_size": 8, "norm_num_groups": 16, "layers_per_block": 2} | family.unet
        )
        parts["vae"] = AutoencoderKL(
            block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, **family.vae,
        )  # fmt: skip
        for part, config in family.texts.items():
            kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
            parts[part] = kind(CLIPTextConfig(**shared | {"hidden_act": "quick_gelu"} | config))
        for module in parts.values():
            if module is not None:
                randomize(module.eval())
        for key, weight in parts["unet"].named_parameters():  # maps far from uniform, so that perturbing them shows
            if "attn1.to_q" in key or "attn1.to_k" in key:
                weight.data *= 5
    for part, config in family.texts.items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        pad = "!" if config.get("hidden_act") == "gelu" else "<|endoftext|>"
        parts[tokenizer] = write_tokenizer(folder / tokenizer, pad)
    if not family.sized:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    elif family.pipeline is StableDiffusionXLPipeline:
        parts["add_watermarker"] = False
    betas = {} if family.scheduler is EDMDPMSolverMultistepScheduler else BETAS
    scheduler = family.scheduler(**betas | family.schedule)
    return family.pipeline(scheduler=scheduler, **parts, **family.index)


def write_family(name: str, folder: Path, seed: int = 0) -> DiffusionPipeline:
    """The same, written to `folder`; the VAE config of SD 1.5 and 2.1 is without its scaling factor, as theirs are."""
    import json

    pipeline = make_family(name, folder, seed)
    pipeline.save_pretrained(folder)
    if not FAMILIES[name].sized:
        file = folder / "vae" / "config.json"
        config = json.loads(file.read_text())
        del config["scaling_factor"]
        file.write_text(json.dumps(config))
    return pipeline
