"""Whole pictures against diffusers' own pipelines, from the same folder, prompts and latents."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)

from segresearch.checkpoints.resolve import MINI
from segresearch.guidance import PAG, GuidedDenoiser, cfg, perturbed
from segresearch.models import load_model
from segresearch.models.controlnet import controlled
from segresearch.sampling import initial_noise, sample
from segresearch.scenes.scenes import depth_image, edge_image, scenes

PROMPTS = ["a red cup", "two cubes"]


def theirs(folder, noise, height, width, *, weight=1.0, pag=None, steps=4, output="latent"):
    kind = StableDiffusionXLPipeline if pag is None else StableDiffusionXLPAGPipeline
    pipe = kind.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    extra = {} if pag is None else {"pag_scale": pag}
    return pipe(
        PROMPTS, latents=noise, height=height, width=width, num_inference_steps=steps, guidance_scale=weight,
        output_type=output, **extra,
    ).images  # fmt: skip


def ours(sd, noise, height, width, *, weight=1.0, pag=None, steps=4):
    terms = {"cfg": cfg(weight)}
    if pag is not None:
        terms["pag"] = perturbed("pag", PAG(where="mid"), scale=pag)
    conds = sd.encode(PROMPTS, size=(height, width))
    return sample(GuidedDenoiser(sd.denoiser, terms), noise, steps=steps, conds=conds)


METHODS = [{}, {"weight": 4.0}, {"pag": 2.0}, {"weight": 4.0, "pag": 2.0}]


@pytest.mark.parametrize("method", METHODS)
def test_euler_loop_of_a_random_model(folder, method):
    sd = load_model(folder)
    factor, channels = sd.vae.config.factor, sd.vae.config.latent_channels
    noise = initial_noise([3, 4], (channels, 8, 12))
    size = (8 * factor, 12 * factor)
    expected = theirs(folder, noise, *size, **method)
    torch.testing.assert_close(ours(sd, noise, *size, **method), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_mini_gives_diffusers_pictures(method):
    sd = load_model("mini")
    noise = initial_noise([3, 4], (4, 16, 16))
    expected = torch.from_numpy(theirs(MINI, noise, 64, 64, **method, output="np")).permute(0, 3, 1, 2)  # in [0, 1]
    with torch.no_grad():
        pictures = sd.vae.decode(ours(sd, noise, 64, 64, **method)).clamp(-1, 1) / 2 + 0.5
    assert (pictures - expected).abs().max() <= 2 / 255


@pytest.mark.parametrize("weight", [1.0, 4.0])
@pytest.mark.parametrize("name", ["canny", "depth"])
def test_mini_under_its_controlnets_gives_diffusers_pictures(name, weight):
    held = scenes([10_000_004, 10_000_011])
    image = edge_image(held.edges) if name == "canny" else depth_image(held.depth)
    noise = initial_noise([3, 4], (4, 16, 16))
    net = ControlNetModel.from_pretrained(MINI / "controlnet" / name, dtype=torch.float32)
    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(MINI, controlnet=net, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS, image=image, latents=noise, height=64, width=64, num_inference_steps=4, guidance_scale=weight,
        controlnet_conditioning_scale=1.0, output_type="np",
    ).images  # fmt: skip
    sd = load_model("mini", controlnet=name)
    guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(weight)})
    with torch.no_grad():
        control = [controlled(sd.controlnets[name], image)]
        x0 = sample(guided, noise, steps=4, conds=sd.encode(PROMPTS), control=control)
        pictures = sd.vae.decode(x0).clamp(-1, 1) / 2 + 0.5
    apart = (pictures - torch.from_numpy(expected).permute(0, 3, 1, 2)).abs().max()
    assert apart <= 2 / 255
