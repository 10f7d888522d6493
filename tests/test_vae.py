"""The VAE against diffusers' own, both ways."""

import pytest
import torch
from diffusers import AutoencoderKL

from segresearch.models.vae import VAE, VAEConfig

SMALL = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.13025,
}
OTHER = SMALL | {"layers_per_block": 2, "latent_channels": 8, "use_quant_conv": False, "use_post_quant_conv": False}
PLAIN = SMALL | {"mid_block_add_attention": False, "scaling_factor": 0.7, "shift_factor": 0.3}


@pytest.mark.parametrize("config", [SMALL, OTHER, PLAIN])
@torch.no_grad()
def test_parity_with_diffusers(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = AutoencoderKL(**config).eval()
    ours = VAE(VAEConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    g = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 48, generator=g) * 2 - 1
    expected = theirs.encode(images).latent_dist
    mean, logvar = ours.moments(images)
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=1e-5)
    scale, shift = config["scaling_factor"], config.get("shift_factor", 0.0)
    torch.testing.assert_close(ours.encode(images), (expected.mean - shift) * scale, rtol=0, atol=1e-5)
    latents = torch.randn(2, config["latent_channels"], 8, 12, generator=g)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / scale + shift).sample, rtol=0, atol=2e-5)


def test_full_size_matches_sdxl():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert vae.config.factor == 8


def test_wrong_inputs_are_named():
    with torch.device("meta"):
        vae = VAE(VAEConfig.from_dict(SMALL))
    with pytest.raises(ValueError, match=r"\(30, 32\) must be multiples of 4"):
        vae.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="latents_mean"):
        VAEConfig.from_dict(SMALL | {"latents_mean": [0.0]})
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        VAEConfig.from_dict(SMALL | {"down_block_types": ["AttnDownEncoderBlock2D"] * 3})
