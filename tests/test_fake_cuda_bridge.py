"""The bridge to diffusers on a GPU that is not there."""

from dataclasses import fields, replace

import torch
from fake_cuda import CONFIG, check_same, fake_denoiser, moved, on_the_cpu, real_denoiser, real_inputs, sent
from make_models import make_pipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

from segresearch.checkpoints.ip_adapter_file import load_ip_adapter
from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models import from_diffusers, load_model, to_diffusers
from segresearch.models.controlnet import controlled
from segresearch.models.controlnet_union import ControlNetUnion, UnionConfig
from segresearch.models.denoiser import Denoiser
from segresearch.models.network_configs import EncoderConfig

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def test_a_pipeline_on_the_device(gpu, tmp_path):
    with on_the_cpu():
        pipe = make_pipeline(tmp_path)
    for part in PARTS:
        object.__setattr__(pipe, part, moved(getattr(pipe, part)))
    sd = from_diffusers(pipe)
    held = [*sd.unet.parameters(), *sd.vae.parameters(), *sd.denoiser.buffers()]
    held += [z for encoder in sd.text.encoders for z in (*encoder.parameters(), *encoder.buffers())]
    assert {z.device.type for z in held} == {"cuda"} and sd.device.type == "cuda"
    assert sd.encode(["a red cup"], size=(8, 8))["cond"].context.device.type == "cuda"


def test_a_guided_unet(gpu):
    def run(denoiser, x, sigma, conds):
        z, t = (x / 3).repeat(2, 1, 1, 1), torch.tensor(500, device=x.device)
        both = [torch.cat([getattr(conds[name], key) for name in ("uncond", "cond")]) for key in
                ("context", "pooled", "time_ids")]  # fmt: skip
        added = {"text_embeds": both[1], "time_ids": both[2]}
        terms = {"seg": perturbed("seg", SEG(1.0), 2.0), "pag": perturbed("pag", PAG(), 1.0)}
        return [
            to_diffusers(GuidedDenoiser(denoiser, more | terms))(z, t, both[0], added_cond_kwargs=added).sample
            for more in ({}, {"cfg": cfg(3.0)})
        ]

    given = real_inputs()
    with on_the_cpu():
        expected = run(real_denoiser(), *given)
    check_same(run(fake_denoiser(), *sent(given)), expected, rtol=1e-3, atol=1e-3)


def test_an_ip_adapter(gpu, tmp_path):
    """Its keys, its tower and its prompts on the device."""
    from test_ip_adapter import PROMPTS, SIZE, TOWER, adapter_weights

    with on_the_cpu():
        pipe, tower = make_pipeline(tmp_path / "sdxl"), CLIPVisionModelWithProjection(TOWER)
        pipe.save_pretrained(tmp_path / "sdxl")
        save_file(adapter_weights(pipe.unet, "base"), tmp_path / "adapter.safetensors")
        tower.save_pretrained(tmp_path / "tower")
        real = load_model(tmp_path / "sdxl")
        prompter = load_ip_adapter(tmp_path / "adapter.safetensors", tmp_path / "tower", real.unet)
    picture, fake = Image.new("RGB", (30, 30), "teal"), from_moved(real, prompter)

    def run(sd, prompter):
        conds = sd.encode(PROMPTS, size=SIZE)
        guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(3.0)}, every=prompter.every([picture], 0.5))
        x = torch.ones(2, 4, 4, 8, device=sd.device)
        return guided(x, torch.full((2,), 3.0, device=sd.device), conds)

    with on_the_cpu():
        expected = run(real, prompter)
    check_same(run(*fake), expected, rtol=1e-3, atol=1e-3)


def from_moved(sd, prompter):
    """The model and the adapter with their networks on the device."""
    text = replace(sd.text, encoders=tuple(map(moved, sd.text.encoders)))
    unet = moved(sd.unet)
    denoiser = Denoiser(unet, sd.denoiser.alphas.to("cuda"))
    adapter = replace(prompter, adapter=moved(prompter.adapter), tower=moved(prompter.tower))
    return replace(sd, unet=unet, text=text, denoiser=denoiser), adapter


def test_a_union_of_controlnets(gpu):
    with on_the_cpu(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {field.name: getattr(CONFIG, field.name) for field in fields(EncoderConfig)}
        union = ControlNetUnion(UnionConfig(**sizes, conditioning_embedding_out_channels=(4, 8), kinds=3)).eval()
        for weight in union.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        union.requires_grad_(False)
    on_device = moved(union)

    def run(denoiser, union, x, sigma, conds):
        control = [controlled(union.of_kind(2), torch.full((1, 3, 12, 16), 0.5, device=x.device))]
        return GuidedDenoiser(denoiser, {"cfg": cfg(3.0)})(x, sigma, conds, control)

    given = real_inputs()
    with on_the_cpu():
        expected = run(real_denoiser(), union, *given)
    check_same(run(fake_denoiser(), on_device, *sent(given)), expected, rtol=1e-3, atol=1e-3)
