"""EDM, LCM, TCD, Turbo and zero terminal SNR: loops of diffusers' schedulers against `sample`, on a tiny network."""

import warnings

import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from guidance_models import CONFIG, control_image, control_net, noisy

from segresearch.errors import InputError
from segresearch.guidance import PAG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.methods.cads import CADS
from segresearch.guidance.methods.self_guidance import SelfGuidance
from segresearch.guidance.methods.tsg import TSG
from segresearch.models.denoiser import scheduled
from segresearch.models.scheduler import OwnSchedule
from segresearch.models.unet import UNet
from segresearch.sampling import SAMPLERS, initial_noise, sample, sigmas
from segresearch.sampling.noise import noise_keys, white_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with numpy 2
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SHAPE = (4, 4, 8)  # not square


class Says(UNet):
    """A UNet that answers with a function of its input."""

    def __init__(self, answer):
        super().__init__(CONFIG)
        self.answer = answer

    def forward(self, z, t, cond=None, **extra):
        return self.answer(z)


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def conds():
    return {name: cond.to("cpu", torch.float32) for name, cond in noisy(2, *SHAPE[1:])[2].items()}


def config_of(scheduler):
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


def loop(scheduler, unet, cond, noise, steps, weight=None, negative=None):
    """x0 of a pipeline's loop, as its schedulers count: x times its own scale."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            z, at = scheduler.scale_model_input(x, t), t.float().expand(len(x))
            out = unet(z, at, cond)
            if weight is not None:
                plain = unet(z, at, negative)
                out = plain + weight * (out - plain)
            x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("curve", ["karras", "exponential"])
@pytest.mark.parametrize(
    "options",
    [{}, COSXL, {"sigma_data": 0.7, "sigma_max": 50.0, "rho": 5.0}, {"prediction_type": "v_prediction"}],
    ids=["playground", "cosxl", "other", "v"],
)
def test_edm_is_that_of_diffusers(unet, conds, options, curve):
    reference = EDMEulerScheduler(**options, sigma_schedule=curve)
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    for steps in (2, 4, 25):
        reference.set_timesteps(steps)
        levels = sigmas(model, "auto", steps)
        torch.testing.assert_close(levels, reference.sigmas, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.sigma_to_t(levels[:-1]), reference.timesteps, rtol=1e-5, atol=1e-5)
    assert sigmas(model, "auto", 1).tolist() == [pytest.approx(float(model.sigma_max), rel=1e-5), 0.0]
    torch.testing.assert_close(model.t_to_sigma(model.sigma_to_t(levels[:-1])), levels[:-1], rtol=1e-5, atol=0)
    for weight in (None, 4.0):
        expected = loop(reference, unet, conds["cond"], noise, 4, weight, conds["uncond"])
        terms = {} if weight is None else {"cfg": cfg(weight)}
        found = sample(GuidedDenoiser(model, terms), noise, steps=4, conds=conds)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    alone = sample(model, noise[1:], steps=4, cond=conds["cond"][1:])
    plain = sample(model, noise, steps=4, cond=conds["cond"])
    torch.testing.assert_close(alone, plain[1:], rtol=1e-4, atol=1e-4)


def test_playground_under_its_own_solver_is_dpmpp_2m(unet, conds):
    reference = EDMDPMSolverMultistepScheduler()  # the values of Playground v2.5
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    assert model.schedule == OwnSchedule("edm-karras") and model.preconditioning.sigma_data == 0.5
    expected = loop(reference, unet, conds["cond"], noise, 6)
    torch.testing.assert_close(
        sample(model, noise, "dpmpp_2m", steps=6, cond=conds["cond"]), expected, rtol=1e-3, atol=1e-3
    )


def test_continuous_timesteps_of_euler_are_edm(unet, conds):
    reference = EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", steps_offset=1,
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=120.0,
    )  # fmt: skip
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    assert model.timesteps is None and model.schedule.name == "leading-karras"
    expected = loop(reference, unet, conds["cond"], noise, 4)
    torch.testing.assert_close(sample(model, noise, steps=4, cond=conds["cond"]), expected, rtol=1e-4, atol=1e-4)


def test_edm_network_and_controlnet_see_the_same(unet, conds):
    model = scheduled(unet, {"_class_name": "EDMEulerScheduler"})
    x, sigma = 3 * initial_noise([1, 2], SHAPE), torch.tensor([3.0, 0.01])
    seen = []

    class Spy(type(control_net())):
        def forward(self, z, t, *rest, **extra):
            seen.append((z, t))
            return super().forward(z, t, *rest, **extra)

    net = control_net().float()
    net.__class__ = Spy
    residuals = model.residuals(x, sigma, conds["cond"], net, net.embed_image(control_image().float()))
    ((z, t),) = seen
    scale = (sigma**2 + 0.25).sqrt()[:, None, None, None]
    torch.testing.assert_close(z, x / scale)
    torch.testing.assert_close(t, sigma.log() / 4)
    out = unet(z, t, conds["cond"], residuals=residuals)
    s = sigma[:, None, None, None]
    expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / scale * out
    found = model(x, sigma, cond=conds["cond"], residuals=residuals)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    back = model.preconditioning.output(found, x, s, t[:, None, None, None])
    torch.testing.assert_close(back, out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.preconditioning.unscaled(z, s), x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_edm_vanishes_for_the_truth(prediction):
    clean, noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3)).unbind()
    sigma = torch.tensor([0.01, 1.0, 60.0])
    s = sigma[:, None, None, None]
    sign = 1 if prediction == "epsilon" else -1  # arXiv 2206.00364, eq. (8): F = (y − c_skip·x)/c_out
    truth = sign * (clean - 0.25 / (s**2 + 0.25) * (clean + s * noise)) / (0.5 * s / (s**2 + 0.25).sqrt())

    model = scheduled(Says(lambda z: truth), {"_class_name": "EDMEulerScheduler", "prediction_type": prediction})
    cond = noisy(3, *SHAPE[1:])[2]["cond"].to("cpu", torch.float32)
    assert float(model.loss(clean, noise, sigma, cond=cond).max()) < 1e-8
    torch.testing.assert_close(model(clean + s * noise, sigma, cond=cond), clean, rtol=1e-3, atol=1e-3)


def test_what_needs_timesteps_is_refused_for_edm(unet, conds):
    model = scheduled(unet, {"_class_name": "EDMEulerScheduler"})
    noise = initial_noise([1, 2], SHAPE)
    for schedule in ("leading", "linspace", "trailing", "align-your-steps", "lcm", "leading-karras"):
        with pytest.raises(InputError, match=f"^schedule {schedule} needs timesteps, and an EDM"):
            sigmas(model, schedule, 4)
    for method in (TSG(), SelfGuidance()):
        with pytest.raises(InputError, match="is in timesteps, and an EDM model has none"):
            GuidedDenoiser(model, {"x": perturbed("x", method, 1.0)})
    with pytest.raises(InputError, match="sampler tcd steps in timesteps, and an EDM model has none"):
        sample(model, noise, "tcd", steps=2, cond=conds["cond"])
    for schedule in ("karras", "exponential", "polyexponential"):
        assert sigmas(model, schedule, 4).tolist()[0] == pytest.approx(80.0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "tcd"])
def test_every_sampler_runs_edm(unet, conds, sampler):
    model = scheduled(unet, {"_class_name": "EDMEulerScheduler", **COSXL, "sigma_schedule": "exponential"})
    guided = GuidedDenoiser(model, {"cfg": cfg(2.0), "pag": perturbed("pag", PAG(), 1.0)}, rescale=0.5)
    options = {"rtol": 0.5, "atol": 0.5} if sampler == "dpm_adaptive" else {}
    x0 = sample(guided, initial_noise([1, 2], SHAPE), sampler, steps=3, conds=conds, options=options)
    assert x0.isfinite().all()


def test_methods_of_noise_levels_are_defined_for_edm(unet, conds):
    """SAG's input and CADS's noise are of σ; a term of weight 0 leaves the plain prediction."""
    model, noise = scheduled(unet, {"_class_name": "EDMEulerScheduler"}), initial_noise([1, 2], SHAPE)
    plain = sample(model, noise, steps=3, cond=conds["cond"])
    for scale, same in ((0.0, True), (1.0, False)):
        found = sample(SelfAttentionGuidance(model, scale), noise, steps=3, conds=conds)
        assert found.isfinite().all() and torch.allclose(found, plain, rtol=1e-4, atol=1e-4) == same
    cads = GuidedDenoiser(model, {}, conditionings={"cond": CADS()})
    x, low, high = noise, torch.full((2,), 0.01), torch.full((2,), 70.0)
    assert torch.equal(cads(x, low, conds), model(x, low, cond=conds["cond"]))  # no noise at low levels
    assert not torch.allclose(cads(x, high, conds), model(x, high, cond=conds["cond"]))


# --- models of few steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo_is_the_loop_of_diffusers(unet, conds, steps):
    reference = EulerDiscreteScheduler(**SD, timestep_spacing="trailing", steps_offset=1)
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    expected = loop(reference, unet, conds["cond"], noise, steps)
    torch.testing.assert_close(sample(model, noise, steps=steps, cond=conds["cond"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4])
def test_lcm_is_the_loop_of_diffusers(unet, conds, steps, prediction, monkeypatch):
    reference = LCMScheduler(prediction_type=prediction)
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    draw = white_noise(noise, noise_keys(noise, [5, 6], "steps"))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *shape, **options: draw(noise, noise))
    expected = loop(reference, unet, conds["cond"], noise, steps)
    found = sample(model, noise, "lcm", steps=steps, seeds=[5, 6], cond=conds["cond"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    alone = sample(model, noise[1:], "lcm", steps=steps, seeds=[6], cond=conds["cond"][1:])
    torch.testing.assert_close(alone, found[1:], rtol=1e-4, atol=1e-4)


def test_the_boundary_of_lcm_keeps_the_input_at_timestep_0(unet, conds):
    model = scheduled(unet, {"_class_name": "LCMScheduler"})
    plain, x = scheduled(unet, {"_class_name": "DDIMScheduler", **SD}), initial_noise([1, 2], SHAPE)
    sigma = model.sigmas[[0, 0]]
    torch.testing.assert_close(model(x, sigma, cond=conds["cond"]), x / (sigma[0] ** 2 + 1).sqrt())
    sigma = model.sigmas[[259, 259]]
    a, b = model(x, sigma, cond=conds["cond"]), plain(x, sigma, cond=conds["cond"])
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=1e-6, atol=1e-5)
    s, t = sigma[:, None, None, None], torch.full((2, 1, 1, 1), 259.0)
    given = [net.preconditioning.output(d, x, s, t) for net, d in ((model, a), (plain, b))]
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_is_the_loop_of_diffusers_up_to_its_last_noise(unet, conds, eta, monkeypatch):
    reference, steps = TCDScheduler(), 4
    model, noise = scheduled(unet, config_of(reference)), initial_noise([1, 2], SHAPE)
    draw = white_noise(noise, noise_keys(noise, [5, 6], "steps"))
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *shape, **options: draw(noise, noise))
    reference.set_timesteps(steps)
    z, expected = noise, []
    for t in reference.timesteps:
        expected.append(z)
        out = unet(z, t.float().expand(2), conds["cond"])
        z = reference.step(out, t, z, eta=eta).prev_sample
    found = []
    x0 = sample(
        model, noise, "tcd", steps=steps, seeds=[5, 6], cond=conds["cond"], options={"eta": eta},
        callback=lambda info: found.append(info["x"] / (info["sigma"] ** 2 + 1).sqrt()),
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0, z, rtol=0, atol=0.1 * float(x0.abs().max()))  # noise of σ 0.03 is left there
    with pytest.raises(InputError, match=r"eta must be in \[0, 1\], got 2"):
        sample(model, noise, "tcd", steps=2, cond=conds["cond"], options={"eta": 2})


@pytest.mark.parametrize("schedule", ["auto", "karras"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_warns_at_the_largest_sigma_of_zero_terminal_snr(conds, sampler, schedule):
    model, noise = scheduled(Says(lambda z: 0.5 * z), ZERO_SNR), initial_noise([1, 2], SHAPE)
    assert float(sigmas(model, schedule, 5)[0]) == pytest.approx(4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (2, 5, 25):
            assert sample(model, noise, sampler, schedule, steps, cond=conds["cond"]).isfinite().all()
