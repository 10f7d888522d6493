"""From weights on disk to pictures on a GPU that is not there: what `make demo` does, on the embedded model."""

import pytest
import torch
from fake_cuda import (
    check_same,
    on_the_cpu,
)
from safetensors import safe_open
from safetensors.torch import save_file

from segresearch.checkpoints.additions import Lora
from segresearch.checkpoints.controlnets import open_controlnets
from segresearch.checkpoints.load import load_network
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


@pytest.mark.slow
def test_loras_and_embeddings_on_the_device(gpu, monkeypatch, tmp_path):
    """Merged weights and enlarged matrices lie there and are those of the CPU; so are a further network's."""
    layer, word = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v", "<toy>"
    with on_the_cpu():
        plain = load_model("mini")
        width = plain.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight.shape[0]
        factors = {f"{layer}.lora_down.weight": torch.randn(4, width), f"{layer}.lora_up.weight": torch.randn(width, 4)}
        save_file(factors, tmp_path / "lora.safetensors")
        widths = [encoder.config.hidden_size for encoder in plain.text.encoders]
        keys = dict(zip(("clip_l", "clip_g"), (torch.randn(2, width) for width in widths)))
        save_file(keys, tmp_path / "toy.safetensors")
        lora, words = Lora(str(tmp_path / "lora.safetensors"), 0.5), {word: tmp_path / "toy.safetensors"}
        one = load_model("mini", loras=[lora], embeddings=words)
        expected = one.encode([word])["cond"].context, one.unet.state_dict()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sd = load_model("mini", device="cuda", loras=[lora], embeddings=words)
    other = load_network(None, "mini", torch.float32, sd.device, load_model("mini", device="cuda").denoiser, (lora,))
    check_same(sd.encode([word])["cond"].context, expected[0], rtol=1e-4, atol=1e-4)
    for unet in (sd.unet, other.unet):
        assert {weight.device.type for weight in unet.parameters()} == {"cuda"}
        check_same(dict(unet.state_dict()), dict(expected[1]))
