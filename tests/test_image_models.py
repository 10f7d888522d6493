"""Models that read an image beside the latents, and SD 1.5 from an image, against diffusers' pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from make_families import write_family
from PIL import Image

from segresearch.config import GenerateConfig, typed
from segresearch.errors import ConfigError, InputError
from segresearch.generate import generate
from segresearch.guidance import PAG, GuidedDenoiser, cfg, perturbed
from segresearch.models import load_model
from segresearch.models.text_settings import TextSettings
from segresearch.sample_images import to_uint8
from segresearch.sampling import ImageStart, initial_noise, sample

STEPS, SEED, PROMPT, NEGATIVE = 4, 3, "red cube", "blue"
EULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading",
         "steps_offset": 1}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Of a family the model, the pipeline under diffusers' Euler, and an image and a mask of its size."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("families") / name
            pipeline = write_family(name, folder)
            pipeline.scheduler = EulerDiscreteScheduler(**EULER)
            pipeline.set_progress_bar_config(disable=True)
            sd = load_model(folder)
            h, w = 8 * sd.vae.config.factor, 12 * sd.vae.config.factor
            y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
            image = torch.stack([x, y, (7 * x * y).sin()])[None]
            made[name] = sd, pipeline, image, (x + 0.4 * y > 0).float()[None, None]
        return made[name]

    return of


def pixels(sd, latents):
    with torch.no_grad():
        return to_uint8(sd.decode(latents)).float()


def diffused(pipeline, size, **given):
    h, w = size
    size = {} if type(pipeline) is StableDiffusionInstructPix2PixPipeline else {"height": h, "width": w}
    out = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(SEED), **size, **given,
    )  # fmt: skip
    return torch.from_numpy(out.images).permute(0, 3, 1, 2).mul(255).round()


@pytest.mark.parametrize("strength", [0.75, 1.0])
@pytest.mark.parametrize("name", ["sdxl_inpainting", "sd15_inpainting"])
def test_inpainting_networks(family, name, strength):
    sd, pipeline, image, mask = family(name)
    size = tuple(image.shape[2:])
    conds = sd.encode([PROMPT], NEGATIVE, size, image=image, mask=mask)
    start = None if strength == 1 else ImageStart(sd.encode_images(image), strength)
    noise = initial_noise([SEED], sd.latent_shape(size))
    model = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)})
    found = pixels(sd, sample(model, noise, schedule="leading", steps=STEPS, conds=conds, start=start))
    masked = sd.encode_images(image * (mask < 0.5))
    given = image / 2 + 0.5 if strength == 1 else sd.encode_images(image)
    expected = diffused(
        pipeline, size, image=given, mask_image=mask, strength=strength, guidance_scale=4.0,
        masked_image_latents=masked,
    )  # fmt: skip
    assert (found - expected).abs().max() <= 1 and expected.std() > 5


@pytest.mark.parametrize("name", ["pix2pix", "sdxl_pix2pix"])
def test_instruct_pix2pix(family, name):
    sd, pipeline, image, _ = family(name)
    size = tuple(image.shape[2:])
    conds = sd.encode([PROMPT], NEGATIVE, size, image=image)
    terms = {"text": cfg(5.0, pos="cond", neg="image"), "image": cfg(1.5, pos="image", neg="uncond")}
    model = GuidedDenoiser(sd.denoiser, terms)
    noise = initial_noise([SEED], sd.latent_shape(size))
    found = pixels(sd, sample(model, noise, schedule="leading", steps=STEPS, conds=conds))
    expected = diffused(pipeline, size, image=image / 2 + 0.5, guidance_scale=5.0, image_guidance_scale=1.5)
    assert (found - expected).abs().max() <= 1 and expected.std() > 5
    assert not conds["uncond"].image.any() and torch.equal(conds["image"].context, conds["uncond"].context)


@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpainting"])
def test_sd15_from_an_image(family, masked):
    sd, pipeline, image, mask = family("sd15")
    size = tuple(image.shape[2:])
    generator = torch.Generator().manual_seed(SEED)  # diffusers draws the latents first, then the noise
    draw, noise = (torch.randn(1, *sd.latent_shape(size), generator=generator) for _ in range(2))
    start = ImageStart(sd.encode_images(image, draw), 0.75, sd.latent_mask(mask) if masked else None)
    model = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)})
    conds = sd.encode([PROMPT], NEGATIVE, size)
    found = pixels(sd, sample(model, noise, schedule="leading", steps=STEPS, conds=conds, start=start))
    kind = StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline
    parts = {key: value for key, value in pipeline.components.items() if key != "image_encoder"}
    own = kind(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    given = {"mask_image": mask, "height": size[0], "width": size[1]} if masked else {}
    out = own(
        PROMPT, negative_prompt=NEGATIVE, image=image / 2 + 0.5, strength=0.75, num_inference_steps=STEPS,
        guidance_scale=4.0, output_type="np", generator=torch.Generator().manual_seed(SEED), **given,
    )  # fmt: skip
    expected = torch.from_numpy(out.images).permute(0, 3, 1, 2).mul(255).round()
    assert (found - expected).abs().max() <= 1 and expected.std() > 5


def test_perturbed_branches_read_the_image_too(family):
    sd, _, image, mask = family("sdxl_inpainting")
    size = tuple(image.shape[2:])
    conds = sd.encode([PROMPT] * 2, None, size, image=image, mask=mask)
    guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(3.0), "pag": perturbed("pag", [PAG()], 2.0)})
    noise = initial_noise([1, 2], sd.latent_shape(size))
    both = sample(guided, noise, schedule="leading", steps=2, conds=conds)
    alone = sample(guided, noise[1:], schedule="leading", steps=2, conds={n: c[1:] for n, c in conds.items()})
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_run_gives_the_image_to_the_network(family, tmp_path):
    sd, _, image, mask = family("sdxl_inpainting")
    Image.fromarray(to_uint8(image)[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    Image.fromarray((mask[0, 0] * 255).byte().numpy()).save(tmp_path / "mask.png")
    given = {
        "model": {"name": "tiny", "path": sd.name}, "sampler": {"name": "euler"}, "steps": 2, "seeds": SEED,
        "schedule": {"name": "leading"}, "prompts": [PROMPT], "device": "cpu", "out": str(tmp_path / "runs"),
        "size": list(image.shape[2:]), "guidance": {"terms": {"cfg": {"kind": "cfg", "weight": 4.0}}},
    }  # fmt: skip
    init = {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png")}
    run = generate(typed(GenerateConfig, {**given, "init": init}), sd)
    made = np.asarray(Image.open(next((run.folder / "images").rglob("*.png"))))
    rounded = to_uint8(image).float() / 127.5 - 1
    conds = sd.encode([PROMPT], None, tuple(image.shape[2:]), image=rounded, mask=mask)
    noise = initial_noise([SEED], sd.latent_shape(tuple(image.shape[2:])))
    latents = sample(GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)}), noise, schedule="leading", steps=2, conds=conds)
    assert np.abs(made.astype(int) - pixels(sd, latents)[0].permute(1, 2, 0).numpy()).max() <= 1
    with pytest.raises(ConfigError, match="init.image: missing; this model reads an image"):
        generate(typed(GenerateConfig, given), sd)


def test_errors(family, model):
    image, mask = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    with pytest.raises(InputError, match="UNet reads no image beside the latents; start from the image"):
        model.encode(["a"], image=image, mask=mask)
    with pytest.raises(InputError, match="mask without an image"):
        model.encode(["a"], mask=mask)
    sd, *_ = family("sdxl_inpainting")
    with pytest.raises(InputError, match="reads a mask beside the image"):
        sd.encode(["a"], image=image)
    with pytest.raises(InputError, match="image has 2 rows for 3 prompts"):
        sd.encode(["a"] * 3, image=image.repeat(2, 1, 1, 1), mask=mask)
    sd, *_ = family("pix2pix")
    with pytest.raises(InputError, match="reads an image and no mask"):
        sd.encode(["a"], image=image, mask=mask)
    with pytest.raises(InputError, match="crop=.2, 2.: this model reads no crop"):
        sd.encode(["a"], settings=TextSettings(crop=(2, 2)))
    with pytest.raises(InputError, match="original_size=.8, 8.: this model reads no original size"):
        sd.encode(["a"], settings=TextSettings(original_size=(8, 8)))
