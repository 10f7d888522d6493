"""Train mini's autoencoder on the scenes, then fix its latent scale: scaling_factor = 1 / std of the latents.

    python -m experiments.mini.train_vae

Loss: L1 + gradient weight · L1 of the horizontal and vertical differences at two scales + kl weight · KL to the unit
Gaussian (means over elements). The KL weight makes the latents smooth, and is small enough to keep images sharp. With
--decoder-of vae.pt the encoder of that VAE and its latent scale are kept and only the decoder is trained, so existing
latents stay valid. Writes <out>/checkpoint.pt, loss.jsonl, vae.pt ({"config", "weights", "measured"}).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mini.common import Plan, arguments, batch_indices, generator, load_state, save_state, train
from experiments.mini.render import SHARD, open_images, take
from segresearch.cli import one_line_errors
from segresearch.models.vae import VAE, VAEConfig
from segresearch.scenes.scenes import scenes

HELD_OUT = 10_000_000  # training uses scenes below this index only

CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def reconstruction_loss(output: Tensor, target: Tensor, gradient: float) -> Tensor:
    """L1 of the pixels, plus `gradient` times L1 of their differences along x and y at full and half size."""
    loss = F.l1_loss(output, target)
    for scale in (1, 2):
        a, b = (F.avg_pool2d(z, scale) if scale > 1 else z for z in (output, target))
        loss = loss + gradient * (F.l1_loss(a.diff(dim=-1), b.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2)))
    return loss


@torch.no_grad()
def measure(vae: VAE, count: int) -> dict[str, Any]:
    """On held-out scenes: std and mean of the raw latents, PSNR (dB, of peak 1) and mean absolute error (of 255)."""
    images = scenes(range(HELD_OUT, HELD_OUT + count)).images.float() / 127.5 - 1
    mean, logvar = vae.moments(images)
    decoded = vae.decode(vae.encode(images)).clamp(-1, 1)
    error = (decoded - images) / 2
    return {
        "latent_std": mean.std().item(),
        "latent_mean": mean.mean(dim=(0, 2, 3)).tolist(),
        "latent_std_by_channel": mean.std(dim=(0, 2, 3)).tolist(),
        "posterior_std": (0.5 * logvar).exp().mean().item(),
        "psnr": (-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean().item(),
        "mae_255": 255 * error.abs().mean().item(),
    }


def finish(out: Path, weights: Mapping[str, Tensor], scaling_factor: float | None, count: int) -> dict[str, Any]:
    """Measure the averaged weights on held-out scenes and write vae.pt; scaling_factor: None to measure it."""
    vae = VAE(VAEConfig.from_dict(CONFIG)).eval()
    vae.load_state_dict(weights)
    measured = measure(vae, count)
    config = {**CONFIG, "scaling_factor": scaling_factor or round(1 / measured["latent_std"], 5)}
    packed = {"config": json.dumps(config), "weights": dict(weights), "measured": json.dumps(measured)}
    save_state(out / "vae.pt", packed)
    return measured


def load_vae(path: Path) -> tuple[VAE, dict[str, Any]]:
    """The trained VAE and its diffusers config."""
    packed = load_state(path)
    config = json.loads(packed["config"])
    vae = VAE(VAEConfig.from_dict(config)).eval()
    vae.load_state_dict(packed["weights"])
    return vae, config


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("runs/mini/scenes"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini/vae"))
    parser.add_argument("--images", type=int, default=4 * SHARD, help="scenes 0 … are trained on")
    parser.add_argument("--gradient", type=float, default=0.5)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--weights", type=Path, help="a vae.pt to start from, instead of random weights")
    parser.add_argument("--decoder-of", type=Path, help="a vae.pt to start from, whose encoder is kept")
    args = arguments(parser, steps=2400, batch=16, peak=2e-3)
    shards = open_images(args.scenes, args.images)
    torch.manual_seed(args.seed)
    vae = VAE(VAEConfig.from_dict(CONFIG))
    scaling_factor = None
    if args.weights is not None:
        vae.load_state_dict(load_vae(args.weights)[0].state_dict())
    if args.decoder_of is not None:
        source, config = load_vae(args.decoder_of)
        scaling_factor = config["scaling_factor"]
        vae.load_state_dict(source.state_dict())
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae.to(args.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = take(shards, batch_indices(args.images, args.batch, step, args.seed)).to(args.device)
        if step % 2:
            images = images.flip(-1)
        with torch.autocast(images.device.type, torch.bfloat16):
            mean, logvar = (z.float() for z in vae.moments(images))
            noise = torch.randn(mean.shape, generator=generator(args.seed, 102, step)).to(images.device)
            output = vae.decode(mean + (0.5 * logvar).exp() * noise)  # scaling_factor is still 1
        reconstruction = reconstruction_loss(output.float(), images, args.gradient)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = F.mse_loss(output.detach().float(), images)
        return reconstruction + args.kl * kl, {"kl": kl.detach(), "mse": mse}

    plan = Plan.of(args, warmup=100, hold=0.3, decay=0.998, save_every=250)
    metadata = {"config": CONFIG, **{k: str(v) for k, v in vars(args).items()}}
    weights = train(args.out, vae, loss_of, plan, metadata)
    print(json.dumps(finish(args.out, weights, scaling_factor, min(512, args.images)), indent=1))


if __name__ == "__main__":
    main()
