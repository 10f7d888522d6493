"""Sampling from an image: img2img and inpainting, against diffusers' pipelines and at their limits."""

import math

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from segresearch.errors import InputError
from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models import load_model
from segresearch.sample_images import to_uint8
from segresearch.sampling import SAMPLERS, ImageStart, initial_noise, sample, sigmas, start_scale
from segresearch.sampling.loop import SDE

SEEDS, STEPS = (3, 4), 10
PROMPTS = ["a red cube", "two cones"]
PIPELINES = {False: StableDiffusionXLImg2ImgPipeline, True: StableDiffusionXLInpaintPipeline}


@pytest.fixture(scope="module", params=["tiny", "mini"])
def models(request, folder):
    """(the project's model, a diffusers pipeline of the same weights, the size of images)"""
    from segresearch.checkpoints.resolve import resolve_model

    path, size = (folder, (24, 16)) if request.param == "tiny" else (resolve_model("mini"), (64, 64))
    pipeline = StableDiffusionXLPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return load_model(path), pipeline, size


@pytest.fixture(scope="module")
def image(models):
    """(images in [-1, 1], a mask of pixels)"""
    _, _, (h, w) = models
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    images = torch.stack([torch.stack([x, y, x * y]), torch.stack([(9 * x).sin(), y, -x])])
    mask = (x + 0.3 * y > 0.1).float()[None, None]
    return images, mask


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def diffused(models, image, strength, masked, scheduler=EulerDiscreteScheduler, weight=4.0):
    """Images in 8 bits of diffusers' pipeline, from the latents of `image`."""
    sd, pipeline, (h, w) = models
    own = PIPELINES[masked].from_pipe(pipeline, scheduler=scheduler.from_config(pipeline.scheduler.config))
    own.set_progress_bar_config(disable=True)
    more = {"mask_image": image[1].repeat(2, 1, 1, 1), "height": h, "width": w} if masked else {}
    sizes = {"original_size": (h, w), "target_size": (h, w)}
    out = own(
        PROMPTS, image=sd.encode_images(image[0]), strength=strength, num_inference_steps=STEPS, guidance_scale=weight,
        generator=generators(), output_type="np", **more, **sizes,
    )  # fmt: skip
    return torch.from_numpy(out.images).permute(0, 3, 1, 2).mul(255).round()


def ours(models, image, strength, masked, sampler="euler", weight=4.0):
    sd, _, size = models
    start = ImageStart(sd.encode_images(image[0]), strength, sd.latent_mask(image[1]) if masked else None)
    model = GuidedDenoiser(sd.denoiser, {"cfg": cfg(weight)} if weight > 1 else {})
    conds = sd.encode(PROMPTS, size=size)
    return sample(model, initial_noise(SEEDS, sd.latent_shape(size)), sampler, steps=STEPS, conds=conds, start=start)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpainting"])
def test_equal_to_diffusers(models, image, masked, strength):
    sd = models[0]
    with torch.no_grad():
        pixels = to_uint8(sd.decode(ours(models, image, strength, masked))).float()
    expected = diffused(models, image, strength, masked)
    assert (pixels - expected).abs().max() <= 1
    assert expected.std() > 10


@pytest.mark.parametrize("models", ["tiny"], indirect=True)
def test_heun_sees_the_kept_part_as_in_diffusers(models, image):
    with torch.no_grad():
        pixels = to_uint8(models[0].decode(ours(models, image, 0.6, True, "heun"))).float()
    assert (pixels - diffused(models, image, 0.6, True, HeunDiscreteScheduler)).abs().max() <= 1


class Gaussian:
    """The exact denoiser of Gaussian data of deviation 1 around 0, on the schedule of a real one."""

    def __init__(self, denoiser):
        self.denoiser, self.seen = denoiser, []

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __call__(self, x, sigma):
        self.seen.append((float(sigma[0]), x.clone()))
        return x / (1 + sigma[:, None, None, None] ** 2)


@pytest.fixture
def start(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 6, 4, generator=generator)
    return latents, (torch.rand(1, 1, 6, 4, generator=generator) > 0.5).float()


@pytest.mark.parametrize("strength", [0.3, 0.58, 0.75, 0.999, 1.0])
def test_the_last_steps_are_those_of_diffusers(model, start, strength):
    scheduler = EulerDiscreteScheduler.from_config({
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
        "timestep_spacing": "leading",
    })  # fmt: skip
    for steps in (7, 25, 50):
        scheduler.set_timesteps(steps)
        begin = max(steps - min(int(steps * strength), steps), 0)
        left = ImageStart(start[0], strength).left(sigmas(model.denoiser, "leading", steps))
        torch.testing.assert_close(left, scheduler.sigmas[begin:])


def test_the_noise_is_added_once(model, start):
    spy, noise = Gaussian(model.denoiser), initial_noise(SEEDS, (4, 6, 4))
    sample(spy, noise, steps=10, start=ImageStart(start[0], 0.5))
    assert len(spy.seen) == 5
    sigma, x = spy.seen[0]
    assert sigma == float(sigmas(model.denoiser, "leading", 10)[5])
    assert torch.equal(x, start[0] + sigma * noise)  # not the scale of `leading`


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_what_is_masked(model, start, sampler):
    """Each evaluation sees the kept part at its noise level; the result has it to the bit."""
    latents, mask = start
    spy, noise = Gaussian(model.denoiser), initial_noise(SEEDS, (4, 6, 4))
    x0 = sample(spy, noise, sampler, steps=6, seeds=SEEDS, start=ImageStart(latents, 0.7, mask))
    anew = mask.bool().expand_as(latents)
    assert torch.equal(x0[~anew], latents[~anew]) and (x0[anew] - latents[anew]).abs().min() > 0
    if len(spy.seen[0][1]) == 2:  # not one image at a time
        for sigma, x in spy.seen:
            torch.testing.assert_close(x[~anew], (latents + sigma * noise)[~anew], rtol=1e-5, atol=1e-5)


def test_euler_re_noises_after_every_step(model, start):
    """The loop of diffusers written out, on a model whose result depends on every pixel."""
    latents, mask = start
    noise = initial_noise(SEEDS, (4, 6, 4))

    class Mixed(Gaussian):
        def __call__(self, x, sigma):
            return super().__call__(x, sigma) + 0.2 * x.mean((2, 3), keepdim=True)

    for strength in (0.6, 1.0):
        model_, levels = Mixed(model.denoiser), sigmas(model.denoiser, "leading", 10)
        left = ImageStart(latents, strength).left(levels)
        x = latents + left[0] * noise if strength < 1 else noise * start_scale(levels, "leading")
        for now, after in zip(left[:-1], left[1:]):
            x = x + (x - model_(x, now.expand(2))) / now * (after - now)
            x = (1 - mask) * (latents + after * noise) + mask * x
        found = sample(Mixed(model.denoiser), noise, steps=10, start=ImageStart(latents, strength, mask))
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "dpm_adaptive", *SDE])
def test_one_image_as_in_a_batch(model, start, sampler):
    latents, mask = start
    mask = torch.cat([mask, 1 - mask])
    noise = initial_noise(SEEDS, (4, 6, 4))
    options = {"s_churn": 2.0} if sampler == "euler" else {}  # images one by one too
    for own in (options, {}):
        both = sample(Gaussian(model.denoiser), noise, sampler, steps=6, seeds=SEEDS, options=own,
                      start=ImageStart(latents, 0.7, mask))  # fmt: skip
        for i in range(2):
            alone = sample(Gaussian(model.denoiser), noise[i : i + 1], sampler, steps=6, seeds=SEEDS[i : i + 1],
                           options=own, start=ImageStart(latents[i : i + 1], 0.7, mask[i : i + 1]))  # fmt: skip
            torch.testing.assert_close(alone[0], both[i], rtol=1e-5, atol=1e-5)
    shared = sample(Gaussian(model.denoiser), noise, start=ImageStart(latents[:1], 0.7, mask[:1]))
    each = sample(Gaussian(model.denoiser), noise, start=ImageStart(latents[[0, 0]], 0.7, mask[[0, 0]]))
    assert torch.equal(shared, each)


def test_with_perturbed_branches(model):
    """SEG and PAG with CFG act where the image is made anew, and a mask of nothing gives the image back."""
    noise, latents = initial_noise(SEEDS, (4, 6, 4)), initial_noise((7, 8), (4, 6, 4))
    conds = model.encode(PROMPTS, size=(12, 8))
    plain = GuidedDenoiser(model.denoiser, {"cfg": cfg(4.0)})
    for perturbation in (SEG(math.inf), PAG()):
        terms = {"cfg": cfg(4.0), "own": perturbed("own", [perturbation], 2.0)}
        guided = GuidedDenoiser(model.denoiser, terms)
        mask = torch.ones(1, 1, 6, 4)
        mask[..., :2] = 0
        found, other = (
            sample(m, noise, steps=6, conds=conds, start=ImageStart(latents, 0.7, mask)) for m in (guided, plain)
        )
        assert torch.equal(found[..., :2], latents[..., :2])
        assert (found - other)[..., 2:].abs().max() > 1e-3
        kept = sample(guided, noise, steps=6, conds=conds, start=ImageStart(latents, 0.7, 0 * mask))
        assert torch.equal(kept, latents)


def test_draws_of_the_posterior(models, image):
    sd, pipeline, _ = models
    images = image[0]
    expected = pipeline.vae.encode(images).latent_dist
    noise = torch.cat([torch.randn(1, *expected.mean.shape[1:], generator=g) for g in generators()])
    drawn = (expected.mean + expected.std * noise) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(sd.encode_images(images, noise), drawn, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sd.encode_images(images), expected.mean * pipeline.vae.config.scaling_factor,
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_mask_of_pixels(model):
    mask = torch.zeros(1, 1, 8, 6)
    mask[..., 2, 4] = 0.5
    mask[..., 4, 2] = 0.49
    mask[..., 7, 5] = 1.0  # not the upper left pixel of its latent
    found = model.latent_mask(mask)
    expected = torch.nn.functional.interpolate((mask >= 0.5).float(), size=(4, 3))
    assert torch.equal(found, expected) and found.sum() == 1 and found[0, 0, 1, 2] == 1
    with pytest.raises(InputError, match="multiples of 2 pixels"):
        model.latent_mask(torch.zeros(1, 1, 7, 6))
    with pytest.raises(InputError, match=r"mask of shape \(1, 3, 8, 6\)"):
        model.latent_mask(torch.zeros(1, 3, 8, 6))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"strength": 1.2}, "strength=1.2: the share of the steps"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": 0.0}, "strength=0 of 25 steps leaves no step to sample: 0.04 is one step"),
        ({"strength": 0.03}, "strength=0.03 of 25 steps leaves no step"),
        ({"mask": torch.ones(1, 1, 12, 8)}, r"mask of shape \(1, 1, 12, 8\)"),
        ({"mask": torch.full((1, 1, 6, 4), 0.5)}, "must hold 0 .kept. and 1"),
        ({"mask": torch.ones(3, 1, 6, 4)}, "start.mask has 3 rows for 2 images"),
        ({"latents": torch.zeros(3, 4, 6, 4)}, r"start.latents of shape \(3, 4, 6, 4\) do not fit"),
        ({"latents": torch.zeros(2, 4, 6, 6)}, "do not fit noise of shape"),
    ],
)
def test_errors(model, start, arguments, words):
    with pytest.raises(InputError, match=words):
        sample(Gaussian(model.denoiser), initial_noise(SEEDS, (4, 6, 4)),
               start=ImageStart(**{"latents": start[0], **arguments}))  # fmt: skip
