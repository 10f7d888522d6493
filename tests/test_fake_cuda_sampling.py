"""Sampling on a GPU that is not there: schedules, noise, intervals, and every sampler's own loop."""

import pytest
import torch
from fake_cuda import (
    DTYPES,
    check_same,
    fake_denoiser,
    on_the_cpu,
    real_denoiser,
    real_inputs,
    sent,
)

from segresearch.guidance import GuidedDenoiser, cfg
from segresearch.sampling import SAMPLERS, ImageStart, initial_noise, sample, sigmas, step_interval
from segresearch.sampling.loop import ANCESTRAL, SDE, global_generator
from segresearch.sampling.noise import brownian_noise, noise_keys, white_noise
from segresearch.sampling.schedules import SCHEDULES


class Shrink:
    """A cheap model of k-diffusion's contract: every level denoises to a part of x. It has the real schedule."""

    def __init__(self, denoiser):
        self.denoiser, self.seen = denoiser, set()

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __call__(self, x, sigma, gain):
        assert sigma.device == x.device == gain.device
        self.seen.add(x.device.type)
        return x * gain / (1 + sigma[:, None, None, None])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(gpu, schedule):
    """Worked out on the CPU in fp64, by design, then sent to the denoiser's device as a whole."""
    with on_the_cpu():
        expected = sigmas(real_denoiser(), schedule, 5)
    fake = fake_denoiser()
    gpu.reads.clear()
    check_same(sigmas(fake, schedule, 5), expected)
    assert len(gpu.reads) <= 3  # the table or its two ends
    assert step_interval(sigmas(fake, schedule, 5), 0.2, 0.8) == step_interval(expected, 0.2, 0.8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(gpu, dtype):
    """Drawn on the CPU, by design, so that a seed is the same picture on every device; then sent to x."""
    with on_the_cpu():
        x, levels = initial_noise([1, 2], (4, 2, 3)).to(dtype), torch.tensor([3.0, 1.0, 0.0])
        keys = noise_keys(x, None, "steps")
        expected = [white_noise(x, keys)(levels[0], levels[1]), brownian_noise(x, keys, levels)(levels[0], levels[1])]
    assert initial_noise([1, 2], (4, 2, 3)).device.type == "cpu"
    x, levels = sent((x, levels))
    assert noise_keys(x, None, "steps") == keys
    found = [white_noise(x, keys)(levels[0], levels[1]), brownian_noise(x, keys, levels)(levels[0], levels[1])]
    check_same(found, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(gpu, sampler):
    options = {"rtol": 0.5, "atol": 0.5} if sampler == "dpm_adaptive" else {}
    with on_the_cpu():
        noise, gain = initial_noise([1, 2], (4, 2, 3)), torch.full((2, 1, 1, 1), 0.5)
        model = Shrink(real_denoiser())
        expected = sample(model, noise, sampler, "karras", 3, seeds=[1, 2], options=options, gain=gain)
    model = Shrink(fake_denoiser())
    seen = []
    found = sample(
        model, noise, sampler, "karras", 3, seeds=[1, 2], options=options, gain=gain.to("cuda"),
        callback=lambda info: seen.append(info["denoised"].device.type),
    )  # fmt: skip
    check_same(found, expected)
    assert model.seen == {"cuda"} and set(seen) == {"cuda"}
    assert {*ANCESTRAL, *SDE} <= set(SAMPLERS)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "dpm_adaptive"])
@pytest.mark.parametrize("there", [False, True], ids=["latents of the CPU", "latents there"])
def test_from_an_image(gpu, sampler, there):
    with on_the_cpu():
        noise, latents = initial_noise([1, 2], (4, 2, 3)), initial_noise([3, 4], (4, 2, 3))
        mask = (torch.arange(6).view(1, 1, 2, 3) % 2).float()
        model, gain = Shrink(real_denoiser()), torch.full((2, 1, 1, 1), 0.5)
        expected = sample(model, noise, sampler, "karras", 4, gain=gain, start=ImageStart(latents, 0.8, mask))
    latents, mask = (latents.to("cuda"), mask.to("cuda")) if there else (latents, mask)
    start, model = ImageStart(latents, 0.8, mask), Shrink(fake_denoiser())
    check_same(sample(model, noise, sampler, "karras", 4, gain=gain.to("cuda"), start=start), expected)


def test_churn_draws_from_the_generator_of_the_device(gpu):
    assert global_generator(torch.device("cuda", 0)) is torch.cuda.default_generators[0]
    noise = initial_noise([1, 2], (4, 2, 3))
    gain = torch.ones(2, 1, 1, 1, device="cuda")
    found = sample(Shrink(fake_denoiser()), noise, "euler", "karras", 3, options={"s_churn": 5.0}, gain=gain)
    assert found.device.type == "cuda" and found.shape == noise.shape


def test_levels_and_noise_of_the_cpu_are_sent(gpu):
    model = Shrink(fake_denoiser())
    gain = torch.ones(1, 1, 1, 1, device="cuda")
    for levels in ([3.0, 1.0, 0.0], torch.tensor([3.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 0.0], device="cuda")):
        assert sample(model, initial_noise([1], (4, 2, 3)), schedule=levels, gain=gain).device.type == "cuda"


def test_a_guided_picture(gpu):
    """Two steps of the real network: a read of sigma a step, one of the schedule, and those of the loop."""

    def run(denoiser, conds):
        model = GuidedDenoiser(denoiser, {"cfg": cfg(3.0)}, rescale=0.7)
        return sample(model, initial_noise([1], (4, 6, 8)), steps=2, conds=conds, seeds=[1])

    with on_the_cpu():
        conds = real_inputs(1)[2]
        expected = run(real_denoiser(), conds)
    fake, conds = fake_denoiser(), sent(conds)
    gpu.reads.clear()
    check_same(run(fake, conds), expected, rtol=1e-4, atol=1e-4)
    assert gpu.reads.count("tolist") == 3 and len(gpu.reads) <= 12, gpu.reads
