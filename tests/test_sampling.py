"""Sampling against analytic Gaussian data on SDXL's noise levels, diffusers' Euler schedule and golden numbers."""

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from gaussian import SHAPE, Gaussian

from segresearch.errors import NotFinite
from segresearch.sampling import SAMPLERS, SCHEDULES, initial_noise, k_diffusion, sample, sigmas, start_scale
from segresearch.sampling.loop import ANCESTRAL, CONSISTENCY, SDE
from segresearch.sampling.noise import brownian_noise, checked_seed, image_key, white_noise

ODE = tuple(name for name in SAMPLERS if name not in (*ANCESTRAL, *SDE, *CONSISTENCY))
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def noise():
    return initial_noise(range(8), SHAPE)


# --- schedules ------------------------------------------------------------------------------------------------------


def test_leading_golden_numbers():
    levels = sigmas(Gaussian(), "leading", 25)
    assert levels.shape == (26,) and levels.dtype == torch.float32
    wanted = torch.tensor([11.67604627, 9.33807608, 7.56238795, 0.20179319, 0.04131441, 0.0])
    torch.testing.assert_close(levels[[0, 1, 2, -3, -2, -1]], wanted, rtol=2e-6, atol=0)
    assert start_scale(levels, "leading") == pytest.approx(11.71879, abs=1e-5)
    ten = sigmas(Gaussian(), "leading", 10)
    assert float(ten[0]) == pytest.approx(8.39068699, rel=2e-6)
    assert start_scale(ten, "leading") == pytest.approx(8.45006657, rel=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25, 50, 333, 999])
@pytest.mark.parametrize("schedule", ["leading", "linspace", "trailing", "karras", "exponential"])
def test_schedules_are_those_of_diffusers(schedule, steps):
    if schedule == "linspace" and steps == 1:
        assert sigmas(Gaussian(), schedule, 1).tolist() == [float(Gaussian().sigma_max), 0.0]  # diffusers: t = 0
        return
    spacing = schedule if schedule in ("leading", "linspace", "trailing") else "linspace"
    options = {f"use_{schedule}_sigmas": True} if spacing != schedule else {}
    reference = EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1, **options)
    if options and steps == 1:
        reference = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", **options)  # its linspace starts at 0
    reference.set_timesteps(steps)
    model = Gaussian()
    levels = sigmas(model, schedule, steps)
    torch.testing.assert_close(levels, reference.sigmas, rtol=3e-5, atol=0)
    assert start_scale(levels, schedule) == pytest.approx(float(reference.init_noise_sigma), rel=3e-5)

    alphas = 1 / (1 + model.sigmas.double() ** 2)
    t = k_diffusion().external.DiscreteEpsDDPMDenoiser(None, alphas, quantize=False).sigma_to_t(levels[:-1].double())
    exact = schedule in ("leading", "trailing")  # linspace: sigma is linear between two t, t is linear in log sigma
    torch.testing.assert_close(t, reference.timesteps.double(), rtol=0, atol=2e-2 if exact else 0.1)


def test_k_diffusion_own_schedules():
    model = Gaussian()
    for schedule in ("karras", "exponential", "polyexponential"):
        levels = sigmas(model, schedule, 12)
        assert float(levels[0]) == pytest.approx(14.61464, rel=1e-5)
        assert float(levels[-2]) == pytest.approx(float(model.sigma_min), rel=1e-5)
        assert start_scale(levels, schedule) == float(levels[0])
    torch.testing.assert_close(
        sigmas(model, "polyexponential", 12), sigmas(model, "exponential", 12), rtol=1e-5, atol=0
    )
    assert (sigmas(model, "polyexponential", 12, rho=2.0)[1:-2] < sigmas(model, "exponential", 12)[1:-2]).all()
    assert (sigmas(model, "karras", 12, rho=2.0)[1:-2] > sigmas(model, "karras", 12)[1:-2]).all()


def test_align_your_steps():
    published = torch.tensor([14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0])
    torch.testing.assert_close(sigmas(Gaussian(), "align-your-steps", 10), published, rtol=1e-6, atol=0)
    twenty = sigmas(Gaussian(), "align-your-steps", 20)
    torch.testing.assert_close(twenty[:-1:2], published[:-1], rtol=1e-6, atol=0)
    assert float(twenty[1]) == pytest.approx(math.sqrt(14.615 * 6.315), rel=1e-6)  # log-linear between


# --- every sampler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES[1:])  # the first is auto
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_every_schedule(sampler, schedule, noise):
    for steps in (1, 2, 3, 9):
        x0 = sample(Gaussian(), noise[:2], sampler, schedule, steps)
        assert x0.shape == noise[:2].shape and x0.dtype == torch.float32
        assert x0.isfinite().all()
    assert float(x0.abs().max()) < 20
    if sampler in ODE:  # the probability-flow ODE of Gaussian data: x0 = x s / sqrt(s^2 + sigma^2)
        model, steps = Gaussian(), 50 if schedule == "lcm" else 60
        levels = sigmas(model, schedule, steps)
        start = noise[:2] * start_scale(levels, schedule)
        exact = start * (model.variance / (model.variance + levels[0] ** 2)) ** 0.5
        x0 = sample(model, noise[:2], sampler, schedule, steps)
        allowed = {"euler": 0.08, "dpm_adaptive": 0.05}.get(sampler, 0.02)
        assert float((x0 - exact).norm() / exact.norm()) < allowed


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", *SDE])
def test_stochastic_samplers_reach_the_data_distribution(sampler):
    noise = initial_noise(range(4), (4, 40, 40))
    x0 = sample(Gaussian(), noise, sampler, "karras", 60)
    assert float(x0.std()) == pytest.approx(0.8, rel=0.06)  # Euler's own error at 60 steps is 5 %
    deterministic = sample(Gaussian(), noise, "heun", "karras", 60)
    correlation = float((x0 * deterministic).mean() / (x0.std() * deterministic.std()))
    assert abs(correlation) < 0.1  # the noise of the steps is not the initial noise again


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_does_not_depend_on_its_batch(sampler, seeded, noise):
    variances = torch.linspace(0.2, 2.0, 8)

    def run(rows, options=None):
        conds, seeds = {"cond": variances[rows]}, list(range(8))[rows] if seeded else None
        return sample(Gaussian(), noise[rows], sampler, steps=6, conds=conds, seeds=seeds, options=options)

    churns = [{}, {"s_churn": 4.0}] if sampler in ("euler", "heun", "dpm_2") else [{}]
    for options in churns:
        whole = run(slice(0, 8), options)
        assert torch.equal(run(slice(2, 5), options), whole[2:5])
        assert torch.equal(run(slice(7, 8), options), whole[7:])
    if len(churns) > 1:
        assert not torch.equal(whole, run(slice(0, 8)))


@pytest.mark.parametrize("sampler", [*ANCESTRAL, *SDE])
def test_seeds_key_the_noise_of_the_steps(sampler, noise):
    first, again, other, unseeded = (
        sample(Gaussian(), noise[:2], sampler, steps=5, seeds=seeds) for seeds in ([5, 6], [5, 6], [5, 7], None)
    )
    assert torch.equal(first, again) and torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1]) and not torch.equal(first, unseeded)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_random_state_is_untouched(sampler, noise):
    before = torch.random.get_rng_state()
    options = {"s_churn": 2.0} if sampler in ("euler", "heun", "dpm_2") else {}
    sample(Gaussian(), noise[:2], sampler, steps=4, options=options)
    assert torch.equal(torch.random.get_rng_state(), before)

    def fail(info):
        raise KeyError("observer")

    with pytest.raises(KeyError, match="observer"):
        sample(Gaussian(), noise[:2], sampler, steps=4, callback=fail)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_one_denoised_evaluation(sampler, noise):
    model = Gaussian()
    x0 = sample(model, noise, sampler, "trailing", steps=1)
    assert model.calls == 1
    torch.testing.assert_close(x0, model(noise * model.sigma_max, model.sigma_max.expand(8)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_the_single_step_trap_is_there(sampler, noise):
    """Raw k-diffusion fails where `sample` does not: once this passes upstream, the wrapper can go."""
    levels = sigmas(Gaussian(), "trailing", 1)
    draw = white_noise(noise, range(8))
    with pytest.raises(UnboundLocalError):
        getattr(k_diffusion().sampling, f"sample_{sampler}")(
            Gaussian(), noise, levels, noise_sampler=draw, disable=True
        )


def test_dpm_fast_spends_steps_evaluations_and_leaves_no_noise(noise):
    for steps in range(1, 9):
        model = Gaussian()
        sample(model, noise, "dpm_fast", steps=steps)
        assert model.calls == steps
    zero = Gaussian(deviation=0.0)  # data at one point: any noise left in would show
    assert float(sample(zero, noise, "dpm_fast", steps=8).abs().max()) < 1e-6
    assert float(sample(zero, noise, "dpm_adaptive").abs().max()) < 1e-6


def test_dpm_adaptive_stops_on_what_is_not_finite(noise):
    with pytest.raises(
        NotFinite, match="^dpm_adaptive: the model returned a value that is not finite at sigma 11.676"
    ):
        sample(Gaussian(), noise[:1], "dpm_adaptive", gain=math.nan)


def test_euler_is_the_loop_of_diffusers(noise):
    model, reference = Gaussian(), EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    reference.set_timesteps(12)
    x = noise.double() * reference.init_noise_sigma
    for i, t in enumerate(reference.timesteps):
        sigma = reference.sigmas[i].double()
        eps = (x - model(x, sigma.expand(8))) / sigma
        x = reference.step(eps, t, x).prev_sample
    torch.testing.assert_close(sample(model, noise.double(), steps=12), x, rtol=1e-5, atol=1e-6)


# --- noise ----------------------------------------------------------------------------------------------------------


def test_initial_noise_is_a_stream_per_image():
    noise = initial_noise([3, 0, 2**63 - 1], SHAPE)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu" and noise.shape == (3, *SHAPE)
    assert torch.equal(noise[0], torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(3))[0])
    assert torch.equal(noise[1:2], initial_noise([0], SHAPE))
    assert abs(float(initial_noise([1], (4, 64, 64)).std()) - 1) < 0.02


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "4", None])
def test_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"^a seed must be an integer from 0 to 2\^63 - 1, got "):
        checked_seed(seed)


def test_keys_differ_by_source_and_stream():
    keys = {image_key(source, stream) for source in (0, 1, 2**40, b"", b"ab") for stream in ("steps", "churn")}
    assert len(keys) == 10 and all(0 <= key < 2**63 for key in keys)
    assert image_key(7, "steps") == image_key(7, "steps")


def test_brownian_noise_is_one_path_per_image(noise):
    levels = sigmas(Gaussian(), "leading", 10)
    draw = brownian_noise(noise[:3], [1, 2, 3], levels)
    a, b, c = levels[2], levels[3], levels[4]
    part, rest, whole = draw(a, b), draw(b, c), draw(a, c)
    assert part.shape == noise[:3].shape and float(part.std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(
        part * (a - b).sqrt() + rest * (b - c).sqrt(), whole * (a - c).sqrt(), rtol=1e-4, atol=1e-4
    )
    alone = brownian_noise(noise[:1], [2], levels)
    assert torch.equal(alone(a, c), whole[1:2])  # whatever the batch, and whatever was asked before
