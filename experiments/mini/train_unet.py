"""Train mini's UNet on the pre-encoded scenes (eps prediction, SDXL's betas), in one process or several under torchrun.

    torchrun --standalone --nproc-per-node 2 -m experiments.mini.train_unet --steps 6000

--model takes the text encoders of a finished model in place of those in <runs>/clip. --width and --depth make a smaller
UNet of the same kind, such as the weak one of autoguidance (README.md).

Text is dropped for the fraction --drop of the rows. Half of these get zeros (SDXL's negative conditioning), half the
CLIP encoding of "". The loss is weighted by min(SNR, 5) / SNR (arXiv 2303.09556). Each worker runs single-threaded on
its share of the batch, and the gradients are averaged. On a busy machine this is faster than threads, which wait for
each other at every operation.

Writes <out>/checkpoint.pt, loss.jsonl and unet.pt ({"step", "weights", "config"}: the averaged weights).
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.mini.common import (
    Plan,
    arguments,
    batch_indices,
    generator,
    load_state,
    rank,
    save_state,
    train,
    world,
)
from experiments.mini.encode import load_shards
from experiments.mini.render import SHARD
from experiments.mini.tokenizer import LENGTH, second
from experiments.mini.train_clip import BEGIN_ID, END_ID, load_clips
from segresearch.cli import one_line_errors
from segresearch.models import load_model
from segresearch.models.attention import Site, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.unet import UNet, UNetConfig

CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "attention_head_dim": [2, 4],  # diffusers reads the number of heads from this key
    "block_out_channels": [64, 128],
    "center_input_sample": False,
    "cross_attention_dim": 160,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 288,
    "sample_size": 16,
    "transformer_layers_per_block": [1, 4],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def config_of(width: int, depth: int) -> dict[str, Any]:
    """mini's config with `width` channels at the highest resolution (mini: 64) and `depth` transformer blocks in each
    attention (mini: 4). The size of a head and of a group of the norms stays."""
    return {
        **CONFIG,
        "attention_head_dim": [width // 32, width // 16],
        "block_out_channels": [width, 2 * width],
        "norm_num_groups": width // 4,
        "transformer_layers_per_block": [1, depth],
    }


def text_encoders(runs: Path, model: str | None) -> Any:
    """`text_encoder` and `text_encoder_2`: the trained ones in <runs>/clip, or those of a finished model."""
    if model is None:
        return load_clips(runs / "clip" / "clip.pt")[0]
    first, other = load_model(model).text.encoders
    return SimpleNamespace(text_encoder=first, text_encoder_2=other)


SIZE_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)


def alphas_cumprod() -> Tensor:
    """SDXL's: betas linear in their square roots from 0.00085 to 0.012, 1000 steps; computed in fp64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def attention(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """softmax(q kᵀ / √d) v. On a CPU in three operations, whose backward pass is several times faster than fused."""
    if q.device.type != "cpu":
        return sdpa(q, k, v, site)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v


@torch.no_grad()
def conditioning(clips: Any, tokens: Tensor, zero: Tensor) -> Cond:
    """SDXL's conditioning of tokens (rows, 48): penultimate states of both encoders, pooled text of the second.

    Rows where `zero` is true get zeros for both.
    """
    first = clips.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    other = clips.text_encoder_2(second(tokens, END_ID), output_hidden_states=True)
    context = torch.cat([first, other.hidden_states[-2]], dim=-1).masked_fill(zero[:, None, None], 0.0)
    pooled = other.text_embeds.masked_fill(zero[:, None], 0.0)
    return Cond(context, pooled, torch.tensor(SIZE_IDS, device=tokens.device).expand(len(tokens), 6))


def faster_backward(device: torch.device) -> AbstractContextManager:
    """On a CPU, cross-attention in unfused operations, as in `attention`; elsewhere no change."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def diffusion_loss(
    unet: Callable[..., Tensor], latents: Tensor, cond: Cond, t: Tensor, noise: Tensor, alphas: Tensor, gamma: float
) -> Tensor:
    """Weighted eps loss at timesteps t (rows,), for noised √ᾱ·latents + √(1−ᾱ)·noise."""
    a = alphas[t]  # (rows,)
    noised = (a.sqrt()[:, None, None, None] * latents + (1 - a).sqrt()[:, None, None, None] * noise).float()
    with torch.autocast(latents.device.type, torch.bfloat16), faster_backward(latents.device):
        eps = unet(noised, t.float(), cond, attend=attention)
    weight = (gamma * (1 - a) / a).clamp(max=1.0).float()  # min(SNR, γ) / SNR
    return (weight * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean()


def run(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    count, device = args.images, torch.device(args.device)
    latents = load_shards(args.runs / "latents", count, axis=0)
    tokens = load_shards(args.runs / "tokens", count, axis=1)
    clips = text_encoders(args.runs, args.model)
    for encoder in (clips.text_encoder, clips.text_encoder_2):
        encoder.requires_grad_(False).to(device)
    config = config_of(args.width, args.depth)
    empty = torch.tensor([BEGIN_ID] + [END_ID] * (LENGTH - 1))
    alphas = alphas_cumprod().to(device)
    torch.manual_seed(args.seed)  # the initial weights, the same in every worker
    unet = UNet(UNetConfig.from_dict(config))
    if args.weights:
        unet.load_state_dict(load_state(args.weights)["weights"])
    unet.to(device)
    share = slice(rank(), None, world())
    call = torch.compile(unet, dynamic=False) if args.compile else unet

    def loss_of(step: int) -> tuple[Tensor, Mapping[str, float]]:
        keyed = generator(args.seed, 104, step)
        index = batch_indices(count, args.batch, step, args.seed)
        variant = torch.randint(len(tokens), (args.batch,), generator=keyed)
        t = torch.randint(1000, (args.batch,), generator=keyed)
        noise = torch.randn((args.batch, *latents.shape[1:]), generator=keyed)
        drop = torch.rand(args.batch, generator=keyed)
        index, variant, t, noise, drop = (z[share] for z in (index, variant, t, noise, drop))
        ids = tokens[variant, index].long()
        ids[drop < args.drop] = empty
        clean, ids, t, noise, drop = (z.to(device) for z in (latents[index].float(), ids, t, noise, drop))
        cond = conditioning(clips, ids, drop < args.drop / 2)
        return diffusion_loss(call, clean, cond, t, noise, alphas, args.gamma), {}

    def keep(step: int, weights: Mapping[str, Tensor]) -> None:
        packed = {"step": step, "weights": dict(weights), "config": json.dumps(config)}
        save_state(args.out / "unet.pt", packed)

    plan = Plan.of(args, warmup=200, hold=args.hold, decay=0.9995, save_every=args.save_every)
    metadata = {"config": config, **{k: str(v) for k, v in vars(args).items()}}
    train(args.out, unet, loss_of, plan, metadata, keep)
    if dist.is_initialized():
        dist.destroy_process_group()


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="folder of latents/, tokens/, clip/")
    parser.add_argument("--out", type=Path, default=Path("runs/mini/unet"))
    parser.add_argument("--weights", type=Path, help="a unet.pt to start from, instead of random weights")
    parser.add_argument("--model", help="of the text encoders, a diffusers folder or mini, instead of <runs>/clip")
    parser.add_argument("--width", type=int, default=CONFIG["block_out_channels"][0])
    parser.add_argument("--depth", type=int, default=CONFIG["transformer_layers_per_block"][-1])
    parser.add_argument("--images", type=int, default=32 * SHARD)
    parser.add_argument("--hold", type=float, default=0.4, help="fraction of the steps at the peak learning rate")
    parser.add_argument("--drop", type=float, default=0.1, help="fraction of rows without text")
    parser.add_argument("--gamma", type=float, default=5.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    parser.add_argument("--save-every", type=int, default=200)
    args = arguments(parser, steps=6000, batch=48, peak=1e-3)
    args.out.mkdir(parents=True, exist_ok=True)
    run(args)


if __name__ == "__main__":
    main()
