"""Measure an exported mini on held-out scenes: the UNet's loss, and the agreement of its images with their captions.

    python -m experiments.mini.measure --count 256

The agreement is retrieval by the CLIPs of the training: how often is an image's own caption its best match in a group
of 64 captions? Chance is 1/64. The real images of the captions give the ceiling.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mini.common import generator, replace_file
from experiments.mini.train_clip import TwoCLIPs, load_clips, trim
from experiments.mini.train_unet import alphas_cumprod
from experiments.mini.train_vae import HELD_OUT
from segresearch.config.schema import GenerateConfig, ModelConfig, SamplerConfig, ScheduleConfig
from segresearch.guidance import GuidedDenoiser, cfg
from segresearch.models import load_model
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.sample_images import sample_images
from segresearch.scenes.scenes import scenes

FIRST = HELD_OUT + 100_000
BATCH = 64


def matches(clips: TwoCLIPs, images: Tensor, tokens: Tensor) -> list[float]:
    """For both CLIPs, the fraction of rows whose own text is the best of its group of 64."""
    hits: list[list[float]] = [[], []]
    for group, text in zip(images.split(BATCH), tokens.split(BATCH)):
        for which, (image, caption) in enumerate(clips.embed(group, trim(text))):
            hits[which] += ((image @ caption.T).argmax(1) == torch.arange(len(image))).float().tolist()
    return [round(sum(h) / len(h), 4) for h in hits]


def eps_loss(model: StableDiffusion, latents: Tensor, captions: list[str]) -> float:
    """Unweighted mean squared error of eps in fp32, at one keyed timestep per scene."""
    alphas = alphas_cumprod()
    t = torch.randint(1000, (len(latents),), generator=generator(0, 201))
    noise = torch.randn(latents.shape, generator=generator(0, 202))
    a = alphas[t][:, None, None, None]
    noised = (a.sqrt() * latents + (1 - a).sqrt() * noise).float()
    cond, total = model.encode(captions)["cond"], 0.0
    for start in range(0, len(latents), BATCH):
        rows = slice(start, start + BATCH)
        eps = model.unet(noised[rows], t[rows].float(), cond[rows])
        total += (eps - noise[rows]).square().mean(dim=(1, 2, 3)).sum().item()
    return total / len(latents)


@torch.no_grad()
def measure(folder: Path, clip_file: Path, count: int, steps: int, weights: list[float]) -> dict[str, Any]:
    model, (clips, _) = load_model(str(folder)), load_clips(clip_file)
    held = scenes(range(FIRST, FIRST + count))
    images = held.images.float() / 127.5 - 1
    tokens = model.text.tokens(held.captions, 0)
    latents = torch.cat([model.encode_images(part) for part in images.split(BATCH)])
    decoded = torch.cat([model.decode(part).clamp(-1, 1) for part in latents.split(BATCH)])
    psnr = (-10 * ((decoded - images) / 2).square().mean(dim=(1, 2, 3)).log10()).mean().item()
    result: dict[str, Any] = {"count": count, "steps": steps, "vae_psnr_db": round(psnr, 2)}
    result["latent_std"] = round(latents.std().item(), 4)
    result["eps_mse"] = round(eps_loss(model, latents, held.captions), 5)
    result["own_caption_first_of_64"] = {"real images": matches(clips, images, tokens)}
    config = GenerateConfig(
        ModelConfig("mini", str(folder)), SamplerConfig("euler"), ScheduleConfig("leading"), steps=steps
    )
    for weight in weights:
        guided = GuidedDenoiser(model.denoiser, {"cfg": cfg(weight)} if weight != 1 else {})
        batches = [range(start, min(count, start + BATCH)) for start in range(0, count, BATCH)]
        sampled = torch.cat([sample_images(model, guided, b, held.captions[b.start : b.stop], config) for b in batches])
        shares = matches(clips, sampled.float() / 127.5 - 1, tokens)
        result["own_caption_first_of_64"][f"cfg weight {weight:g}"] = shares
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("segresearch/weights/mini"))
    parser.add_argument("--clip", type=Path, default=Path("runs/mini/clip/clip.pt"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini/measured.json"))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 4.0], help="CFG weights; 1 is no guidance")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.folder, args.clip, args.count, args.steps, args.weights)
    replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
