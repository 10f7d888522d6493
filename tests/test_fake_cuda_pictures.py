"""From weights on disk to pictures on a GPU that is not there: what `make demo` does, on the embedded model."""

import pytest
import torch
from fake_cuda import (
    check_same,
    on_the_cpu,
)
from safetensors import safe_open

from segresearch.checkpoints.controlnets import open_controlnets
from segresearch.checkpoints.resolve import resolve_model
from segresearch.checkpoints.tensors import fill
from segresearch.config.build import configured_model
from segresearch.config.schema import ModelConfig
from segresearch.guidance import SelfAttentionGuidance
from segresearch.models import load_model
from segresearch.models.network_configs import UNetConfig
from segresearch.sampling import initial_noise, sample


class File:
    """safetensors' reader outside the fake mode, which cannot map a file."""

    def __init__(self, path, framework):
        self.file = safe_open(path, framework)

    def __getattr__(self, name):
        def call(*args):
            with on_the_cpu():
                return getattr(self.file, name)(*args)

        return call


@pytest.fixture(autouse=True)
def files(monkeypatch):
    monkeypatch.setattr("segresearch.checkpoints.tensors.safe_open", File)


def pictures(sd):
    """One image of one step, with SAG, and its latents encoded again."""
    conds = sd.encode(["a red cube"], size=(64, 64))
    model = SelfAttentionGuidance(sd.denoiser)
    noise = initial_noise([0], sd.latent_shape((64, 64)))
    latents = sample(model, noise, schedule="trailing", steps=1, conds=conds, seeds=[0])
    images = sd.vae.decode(latents)
    return latents, images, sd.vae.encode(images.clamp(-1, 1))


def test_a_picture_of_mini(gpu, monkeypatch):
    with on_the_cpu():
        expected = pictures(load_model("mini"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sd = configured_model(ModelConfig("mini", "mini"), "cuda")
    held = [*sd.unet.parameters(), *sd.vae.parameters(), *sd.denoiser.buffers()]
    held += [z for encoder in sd.text.encoders for z in (*encoder.parameters(), *encoder.buffers())]
    assert {z.device.type for z in held} == {"cuda"}
    check_same(pictures(sd), expected, rtol=1e-3, atol=1e-3)


def test_weights_are_sent_to_the_device_in_its_dtype(gpu):
    net, weights = open_controlnets("canny", resolve_model("mini"), None, UNetConfig())["canny"]
    fill(net, weights, torch.bfloat16, "cuda")
    assert {(z.device.type, z.dtype) for z in net.parameters()} == {("cuda", torch.bfloat16)}
    assert float(net.conv_in.weight.to("cpu", torch.float32).abs().mean()) > 0
