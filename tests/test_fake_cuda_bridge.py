"""The bridge to diffusers on a GPU that is not there."""

import torch
from fake_cuda import check_same, fake_denoiser, moved, on_the_cpu, real_denoiser, real_inputs, sent
from make_models import make_pipeline

from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models import from_diffusers, to_diffusers

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
