"""The VAE in windows against the VAE of whole pictures."""

from pathlib import Path

import pytest
import torch

from segresearch.models import load_model, tiles
from segresearch.models.vae import VAE, VAEConfig
from segresearch.scenes.scenes import scenes

CONFIG = VAEConfig(block_out_channels=(16, 32, 48, 48), norm_num_groups=8, layers_per_block=1)
# largest difference to whole pictures, of random weights with outputs up to 5 (decoded) and 0.2 (encoded)
ERRORS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}


def small(dtype: torch.dtype, config: VAEConfig = CONFIG) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(config).to(dtype).eval().requires_grad_(False)


def inputs(vae: VAE, rows: int = 1, size: tuple[int, int] = (48, 80)) -> tuple[torch.Tensor, torch.Tensor]:
    g, f = torch.Generator().manual_seed(1), vae.config.factor
    return torch.rand(rows, 3, *size, generator=g) * 2 - 1, torch.randn(
        rows, 4, size[0] // f, size[1] // f, generator=g
    )


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("tile", [36, 52])  # no divisor of the sides; cutting one axis only
def test_windows_give_the_whole(dtype, tile):
    vae = small(dtype)
    images, latents = inputs(vae)
    whole, parts = vae.decode(latents), vae.decode(latents, tile=tile)
    assert parts.shape == whole.shape == images.shape and parts.dtype == whole.dtype
    torch.testing.assert_close(parts, whole, rtol=0, atol=ERRORS[dtype])
    torch.testing.assert_close(vae.encode(images, tile=tile), vae.encode(images), rtol=0, atol=ERRORS[dtype] / 10)


def test_a_batch_is_computed_picture_by_picture():
    vae = small(torch.float32, VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1))
    images, latents = inputs(vae, 3, (16, 24))
    decoded, encoded = vae.decode(latents, tile=14), vae.encode(images, tile=14)
    for i in range(3):
        assert torch.equal(vae.decode(latents[i : i + 1], tile=14)[0], decoded[i])
        assert torch.equal(vae.encode(images[i : i + 1], tile=14)[0], encoded[i])


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(block_out_channels=(16, 32), norm_num_groups=8),
        VAEConfig(block_out_channels=(16,), norm_num_groups=8, mid_block_add_attention=False),
        VAEConfig(block_out_channels=(32, 32, 32), norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False),
    ],
)
def test_other_shapes(config):
    vae = small(torch.float64, config)
    images, latents = inputs(vae, 1, (24, 20))
    torch.testing.assert_close(vae.decode(latents, tile=14), vae.decode(latents), rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.encode(images, tile=14), vae.encode(images), rtol=0, atol=1e-12)


def test_a_picture_within_a_tile_is_whole(monkeypatch):
    vae = small(torch.float32)
    images, latents = inputs(vae)
    monkeypatch.setattr(tiles, "decoded", None)
    monkeypatch.setattr(tiles, "encoded", None)
    assert torch.equal(vae.decode(latents, tile=80), vae.decode(latents))
    assert torch.equal(vae.encode(images, tile=512), vae.encode(images))


def test_no_seams_in_real_pictures():
    """Mini's VAE: differences are those of rounding, at the seams as elsewhere; tiles decoded alone differ visibly."""
    vae = load_model("mini").vae
    pictures = scenes(range(6)).images.float() / 127.5 - 1
    images = torch.cat([torch.cat(list(pictures[:3]), dim=2), torch.cat(list(pictures[3:]), dim=2)], dim=1)[None]
    latents, side = vae.encode(images), images.shape[2] // 2
    tile = side * 3 // 4
    whole, parts = vae.decode(latents), vae.decode(latents, tile=tile)
    torch.testing.assert_close(vae.encode(images, tile=tile), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    error = (parts - whole).abs().amax((0, 1))  # (H, W)
    seam = torch.zeros_like(error, dtype=torch.bool)
    for start in range(tile, max(error.shape), tile):
        seam[start - 1 : start + 1] = True
        seam[:, start - 1 : start + 1] = True
    assert error[seam].mean() < 2 * error[~seam].mean()
    step = tile // vae.config.factor
    alone = torch.cat([vae.decode(part) for part in latents.split(step, dim=3)], dim=3)
    assert (alone - whole).abs().max() > 0.02


@pytest.mark.slow
def test_windows_save_memory(monkeypatch):
    """Counted on the meta device: two activations of the highest grid and a quarter, and a window."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import counted

    with torch.device("meta"):
        vae = VAE(CONFIG)
        latents, images = torch.empty(1, 4, 32, 32), torch.empty(1, 3, 256, 256)
    one = 4 * 16 * 256 * 256  # bytes of an activation of the highest grid; the last upsampling has twice its channels
    before = [*vae.parameters(), latents, images]
    assert 6 * one < counted(lambda: vae.decode(latents), before) < 6.1 * one
    assert 2 * one < counted(lambda: vae.decode(latents, tile=32), before) < 2.8 * one
    assert 4 * one <= counted(lambda: vae.encode(images), before) < 4.1 * one
    assert 2 * one < counted(lambda: vae.encode(images, tile=32), before) < 2.2 * one


def test_windows_cover_the_grid_once():
    count = torch.zeros(1, 1, 7, 11)
    for window in tiles.windows((7, 11), 4):
        tiles.cut(count, window).add_(1)
        assert tiles.cut(count, tiles.around(window, (7, 11))).shape[2] <= 6
    assert torch.equal(count, torch.ones_like(count))


def test_wrong_tiles_are_named():
    vae = small(torch.float32)
    images, latents = inputs(vae, 1)
    for tile in (4, 0, -8):
        with pytest.raises(ValueError, match=rf"tile={tile} must be a whole number of image pixels, at least 8"):
            vae.decode(latents, tile=tile)
    with pytest.raises(ValueError, match="no gradients through tiles of 40 pixels"):
        vae.encode(images.requires_grad_(), tile=40)
