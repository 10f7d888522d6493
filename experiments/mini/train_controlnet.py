"""Train a ControlNet of mini (arXiv 2302.05543) on the scenes' exact maps, the UNet frozen.

    python -m experiments.mini.train_controlnet canny

canny: half of the rows get the exact edges, half the edges that OpenCV's Canny finds in the image (which include the
squares of the floor). depth: the exact inverse depth. The weights start as the UNet's where names and shapes agree, the
last layers at zero. Text is dropped for half of the rows, so that the ControlNet also works without text.

One deviation from the paper: the embedding of the control image starts with He's scale of weights (arXiv 1502.01852),
and its last layer not at zero. torch's default scale shrinks the image to a thousandth through the layers, and with it
the depth ControlNet had learnt nothing after 650 steps.

Writes <runs>/<name>/checkpoint.pt, loss.jsonl, controlnet.pt ({"step", "weights"}: the averaged weights) and
seen.jsonl (the effect of the control image, see `image_effect`).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.mini.common import Plan, arguments, batch_indices, generator, load_state, save_state, train
from experiments.mini.encode import load_shards
from experiments.mini.render import MAPS, SHARD, open_images, pick
from experiments.mini.tokenizer import LENGTH
from experiments.mini.train_clip import BEGIN_ID, END_ID, load_clips
from experiments.mini.train_unet import CONFIG as UNET_CONFIG
from experiments.mini.train_unet import alphas_cumprod, attention, conditioning, faster_backward
from segresearch.cli import one_line_errors
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ControlNet, ControlNetConfig
from segresearch.models.unet import UNet, UNetConfig

SHARED_KEYS = (
    "act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim", "block_out_channels",
    "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels",
    "layers_per_block", "mid_block_type", "norm_eps", "norm_num_groups", "projection_class_embeddings_input_dim",
    "use_linear_projection",
)  # fmt: skip
CONFIG: dict[str, Any] = {k: UNET_CONFIG[k] for k in SHARED_KEYS} | {
    "_class_name": "ControlNetModel",
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 64],  # two strides of 2, for a VAE of factor 4
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
    "transformer_layers_per_block": [1, 2],
}


class Trained(nn.Module):
    """A ControlNet with its frozen UNet, in one call. Only the ControlNet's weights are parameters of this module."""

    def __init__(self, net: ControlNet, unet: UNet):
        super().__init__()
        self.net = net
        self.frozen = [unet.eval().requires_grad_(False)]  # in a list: no submodule, so neither trained nor saved

    def forward(self, noised: Tensor, t: Tensor, cond: Any, image: Tensor) -> Tensor:
        residuals = self.net(noised, t, cond, self.net.embed_image(image))
        return self.frozen[0](noised, t, cond, attend=attention, residuals=residuals)


def maps(kind: str, shards: list[np.ndarray], index: Tensor, exact: Tensor) -> Tensor:
    """Control images (rows, 3, 64, 64) of scenes `index`, in [0, 1]. canny: exact edges where `exact` is true, else
    Canny's."""
    of_scene = pick(shards, index)
    edges = torch.where(exact, MAPS.index("edges"), MAPS.index("canny"))
    channel = edges if kind == "canny" else torch.full_like(index, MAPS.index("depth"))
    return of_scene[torch.arange(len(index)), channel][:, None].float().div(255).repeat(1, 3, 1, 1)


def initial(unet: UNet, config: Mapping[str, Any]) -> ControlNet:
    """A ControlNet that adds nothing yet, with the UNet's weights wherever both have them."""
    net = ControlNet(ControlNetConfig.from_dict(config))
    source, target = unet.state_dict(), net.state_dict()
    shared = {k: source[k] for k, v in target.items() if k in source and source[k].shape == v.shape}
    assert any(k.startswith("mid_block.attentions") for k in shared)
    net.load_state_dict({**target, **shared})
    with torch.no_grad():
        for last in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            last.weight.zero_()
            last.bias.zero_()
        for conv in net.controlnet_cond_embedding.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return net


@torch.no_grad()
def image_effect(model: Trained, latents: Tensor, own: Tensor, cond: Cond, alphas: Tensor) -> dict[str, float]:
    """Mean squared error of eps at t = 200, 500, 800, for rows under their own control image `own` and under another's.

    The gap between the two is the effect of the control image.
    """
    noise = torch.randn(latents.shape, generator=generator(0, 203)).to(latents.device)
    result = {}
    for t in (200, 500, 800):
        noised = (alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * noise).float()
        times = torch.full((len(latents),), float(t), device=latents.device)
        for name, image in (("own", own), ("other", own.roll(1, 0))):
            eps = model(noised, times, cond, image)
            result[f"{name}_{t}"] = round((eps - noise).square().mean().item(), 6)
    return result


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("canny", "depth"))
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="folder of unet/, clip/, latents/, ...")
    parser.add_argument("--out", type=Path, help="default: <runs>/controlnet_<kind>")
    parser.add_argument("--images", type=int, default=32 * SHARD)
    parser.add_argument("--drop", type=float, default=0.5, help="fraction of rows without text")
    parser.add_argument("--gamma", type=float, default=5.0, help="loss weights min(SNR, gamma) / SNR")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    args = arguments(parser, steps=2000, batch=32, peak=1e-3)
    device = torch.device(args.device)
    out = args.out or args.runs / f"controlnet_{args.kind}"
    latents = load_shards(args.runs / "latents", args.images, axis=0)
    tokens = load_shards(args.runs / "tokens", args.images, axis=1)
    clips, _ = load_clips(args.runs / "clip" / "clip.pt")
    clips.requires_grad_(False).to(device)
    unet = UNet(UNetConfig.from_dict(UNET_CONFIG))
    unet.load_state_dict(load_state(args.runs / "unet" / "unet.pt")["weights"])
    torch.manual_seed(args.seed)
    model = Trained(initial(unet, CONFIG), unet.to(device)).to(device)
    averaged = Trained(initial(unet, CONFIG), unet).to(device)
    call = torch.compile(model, dynamic=False) if args.compile else model
    empty, alphas = torch.tensor([BEGIN_ID] + [END_ID] * (LENGTH - 1)), alphas_cumprod().to(device)
    control = open_images(args.runs / "scenes" / "maps", args.images)
    probe = torch.arange(max(0, args.images - 64), args.images)  # few of very many training scenes
    own = maps(args.kind, control, probe, torch.ones(len(probe), dtype=torch.bool)).to(device)
    no_text = conditioning(
        clips, empty.expand(len(probe), -1).to(device), torch.zeros(len(probe), dtype=torch.bool, device=device)
    )

    def loss_of(step: int) -> tuple[Tensor, Mapping[str, float]]:
        keyed = generator(args.seed, 105, step)
        index = batch_indices(args.images, args.batch, step, args.seed + 1)
        variant = torch.randint(len(tokens), (args.batch,), generator=keyed)
        t = torch.randint(1000, (args.batch,), generator=keyed)
        noise = torch.randn((args.batch, *latents.shape[1:]), generator=keyed)
        drop, exact = torch.rand(args.batch, generator=keyed), torch.rand(args.batch, generator=keyed) < 0.5
        ids = tokens[variant, index].long()
        ids[drop < args.drop] = empty
        clean, image = latents[index].float(), maps(args.kind, control, index, exact)
        clean, image, ids, t, noise, drop = (z.to(device) for z in (clean, image, ids, t, noise, drop))
        cond = conditioning(clips, ids, drop < args.drop / 2)
        a = alphas[t]  # (rows,)
        noised = a.sqrt()[:, None, None, None] * clean + (1 - a).sqrt()[:, None, None, None] * noise
        with torch.autocast(device.type, torch.bfloat16), faster_backward(device):
            eps = call(noised.float(), t.float(), cond, image)
        weight = (args.gamma * (1 - a) / a).clamp(max=1.0).float()
        return (weight * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean(), {}

    def keep(step: int, weights: Mapping[str, Tensor]) -> None:
        averaged.load_state_dict(weights)
        errors = image_effect(averaged, latents[probe].float().to(device), own, no_text, alphas)
        with open(out / "seen.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **errors}) + "\n")
        packed = {"step": step, "weights": {k.removeprefix("net."): v for k, v in weights.items()}}
        save_state(out / "controlnet.pt", packed)

    plan = Plan.of(args, warmup=100, hold=0.5, decay=0.995, save_every=200)
    train(out, model, loss_of, plan, {"config": CONFIG, **{k: str(v) for k, v in vars(args).items()}}, keep)


if __name__ == "__main__":
    main()
