"""The one function that samples and decodes: the same as its steps by hand, and an error that names what is broken."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from segresearch.config.schema import GenerateConfig, ModelConfig, SamplerConfig, ScheduleConfig
from segresearch.errors import Ended, InputError, NotFinite
from segresearch.guidance import GuidedDenoiser, cfg
from segresearch.models import load_model
from segresearch.models.vae import VAE
from segresearch.sample_images import decode_images, sample_images, sample_latents, save_images, to_pil, to_uint8
from segresearch.sampling import initial_noise, sample, sigmas

SEEDS, PROMPTS = [3, 5, 8], ["red", "", "blue"]


def config(schedule="leading", rho=None, size=None) -> GenerateConfig:
    sampler = SamplerConfig("euler_ancestral", {"eta": 0.5})
    return GenerateConfig(ModelConfig("tiny", "tiny"), sampler, ScheduleConfig(schedule, rho), steps=2, size=size)


@pytest.mark.parametrize(("schedule", "rho", "size"), [("leading", None, (16, 24)), ("karras", 5.0, None)])
def test_it_is_its_steps_by_hand(model, schedule, rho, size):
    settings, guided = config(schedule, rho, size), GuidedDenoiser(model.denoiser, {"cfg": cfg(3.0)})
    images = sample_images(model, guided, SEEDS, PROMPTS, settings, negative="green")
    latents = sample(
        guided, initial_noise(SEEDS, model.latent_shape(size)), "euler_ancestral",
        schedule if rho is None else sigmas(model.denoiser, schedule, 2, rho), steps=2,
        conds=model.encode(PROMPTS, "green", size), seeds=SEEDS, options={"eta": 0.5},
    )  # fmt: skip
    assert images.dtype == torch.uint8 and torch.equal(images, to_uint8(model.decode(latents)))
    parts = decode_images(model, latents, rows=2)
    assert (parts.int() - images.int()).abs().max() <= 1
    alone = sample_images(model, guided, SEEDS[1:2], PROMPTS[1:2], settings, negative="green")
    assert (alone[0].int() - images[1].int()).abs().max() <= 1


def test_8_bits_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]


def test_latents_that_are_not_finite_are_named_by_their_seeds(model):
    def broken(guided, step):
        return torch.cat([guided[:1], guided[1:2] * float("nan"), guided[2:]])

    guided = GuidedDenoiser(model.denoiser, {"cfg": cfg(3.0)}, post=[broken])
    with pytest.raises(NotFinite, match=r"the latents of seeds \[5\] are not finite") as caught:
        sample_latents(model, guided, SEEDS, model.encode(PROMPTS), config())
    assert isinstance(caught.value, Ended) and caught.value.code == 4 and "holds" not in str(caught.value)


@pytest.mark.parametrize(("part", "name", "key"), [
    ("unet", "UNet", "conv_out.weight"), ("text_encoder_2", "text encoder 2", "text_projection.weight"),
    ("vae", "VAE", "decoder.conv_in.bias"),
])  # fmt: skip
def test_weights_that_are_not_finite_are_named(folder, tmp_path, part, name, key):
    copied = shutil.copytree(folder, tmp_path / "model")
    path = next((copied / part).glob("*.safetensors"))
    weights = load_file(path)
    weights[key].view(-1)[0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    sd = load_model(copied)
    guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(3.0)})
    with pytest.raises(NotFinite, match=f"; {name} holds NaN or inf in {key}: fetch the model again"):
        sample_images(sd, guided, SEEDS, PROMPTS, config())


class Overflowing(VAE):
    """A VAE that overflows in fp16, as SDXL's own does."""

    def decode(self, latents, tile=None):
        images = super().decode(latents, tile)
        return images * torch.inf if self.dtype == torch.float16 else images


class Stuck(VAE):
    """A VAE that overflows in every precision."""

    def decode(self, latents, tile=None):
        return torch.full((len(latents), 3, 64, 64), torch.inf)


def in_half(model, kind):
    vae = copy.deepcopy(model.vae).half()
    vae.__class__ = kind
    return dataclasses.replace(model, vae=vae)


def test_a_vae_that_overflows_in_half_precision_decodes_again_in_fp32(model):
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="not finite in torch.float16, so it decodes again in fp32"):
        images = decode_images(in_half(model, Overflowing), latents)
    assert (images.int() - decode_images(model, latents).int()).abs().max() <= 4  # weights were rounded to fp16
    with pytest.raises(NotFinite, match="values that are not"), pytest.warns(UserWarning):
        decode_images(in_half(model, Stuck), latents)


def test_images_as_files_and_as_pillows(tmp_path):
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    first, second = to_pil(images)
    assert first.size == (5, 4) and second.getpixel((1, 0)) == tuple(images[1, :, 0, 1].tolist())
    paths = save_images(images, tmp_path / "new", seeds=[3, 9])
    assert [path.name for path in paths] == ["seed3.png", "seed9.png"]
    assert np.array_equal(np.asarray(Image.open(paths[1])), np.asarray(second))
    with pytest.raises(InputError, match="as many different seeds"):
        save_images(images, tmp_path, seeds=[1, 1])
