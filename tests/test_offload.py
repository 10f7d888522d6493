"""Networks that lie on the CPU and compute elsewhere."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from segresearch.models import load_model
from segresearch.models.calls import on_device, pin
from segresearch.models.compute import Compute
from segresearch.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)


@pytest.fixture(scope="module")
def mini():
    return load_model("mini")


def homes(module: torch.nn.Module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


@torch.no_grad()
def test_calls_are_the_modules_own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE(CONFIG).eval()
    own, z = homes(vae), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(on_device(vae, "cpu", "decode")(z), vae.decode(z))
    assert torch.equal(on_device(vae, "cpu", "decode")(z, tile=12), vae.decode(z, tile=12))
    assert torch.equal(on_device(vae.decoder, "cpu")(z), vae.decoder(z))
    pin(vae)
    assert homes(vae) == own or torch.cuda.is_available()


@pytest.mark.parametrize("tile", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_vae_of_the_cpu_computes_on_cuda(dtype, tile):
    vae = VAE(CONFIG).to(dtype).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = on_device(vae, "cuda", "decode")(torch.empty(2, 4, 8, 6, device="cuda"), tile=tile)
        latents = on_device(vae, "cuda", "encode")(images, tile=tile)
        assert images.device.type == latents.device.type == "cuda" and images.dtype == torch.float32
        assert images.shape == (2, 3, 16, 12) and latents.shape == (2, 4, 8, 6)
        assert {t.device.type for t in vae.parameters()} == {"cpu"}
        with pytest.raises(RuntimeError, match="device"):
            vae.decode(torch.empty(2, 4, 8, 6, device="cuda"), tile=tile)


def test_text_encoders_of_the_cpu_compute_on_cuda():
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=12, eos_token_id=2,
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        out = on_device(encoder, "cuda")(torch.zeros(3, 8, dtype=torch.long, device="cuda"), output_hidden_states=True)
        assert out.text_embeds.device.type == out.hidden_states[-2].device.type == "cuda"
        assert out.text_embeds.shape == (3, 12) and out.hidden_states[-2].shape == (3, 8, 16)
        assert encoder.device.type == "cpu"


@torch.no_grad()
def test_an_offloaded_sdxl_gives_the_same(mini):
    other = load_model("mini", compute=Compute(vae_tile=64, offload=True))
    assert other.compute.offload and mini.compute == Compute() and other.device.type == "cpu"
    for negative in (None, "grey"):
        one, two = (model.encode(["a red circle"], negative=negative) for model in (mini, other))
        for name in ("cond", "uncond"):
            assert torch.equal(one[name].context, two[name].context) and torch.equal(one[name].pooled, two[name].pooled)
    z = torch.randn(1, *mini.latent_shape(), generator=torch.Generator().manual_seed(0))
    images = mini.decode(z)
    assert torch.equal(images, mini.vae.decode(z)) and torch.equal(images, other.decode(z))  # 64 px: within a tile
    assert torch.equal(mini.encode_images(images), other.encode_images(images))


@torch.no_grad()
def test_a_tile_is_that_of_the_setting(mini):
    tiled = dataclasses.replace(mini, compute=Compute(vae_tile=64))
    z = torch.randn(1, *mini.latent_shape((96, 64)), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiled.decode(z), mini.vae.decode(z, tile=64))
    torch.testing.assert_close(tiled.decode(z), mini.decode(z), rtol=0, atol=1e-5)
    images = mini.decode(z)
    assert torch.equal(tiled.encode_images(images), mini.vae.encode(images, tile=64))
