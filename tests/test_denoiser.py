import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from segresearch.models.attention import Fork, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.preconditioning import Preconditioning
from segresearch.models.unet import UNet, UNetConfig
from segresearch.sampling import k_diffusion

CONFIG = UNetConfig(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=(1, 1),
    transformer_layers_per_block=(1, 1),
    heads=(1, 2),
    cross_attention_dim=12,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 10,
    norm_num_groups=4,
)


def conditioning(rows, generator):
    ids = torch.tensor([[16.0, 24, 0, 0, 16, 24]]).expand(rows, 6)
    return Cond(torch.randn(rows, 5, 12, generator=generator), torch.randn(rows, 10, generator=generator), ids)


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def inputs():
    """x (non-square), cond: three rows."""
    generator = torch.Generator().manual_seed(1)
    return 10 * torch.randn(3, 4, 8, 12, generator=generator), conditioning(3, generator)


class Recorder(UNet):
    """A UNet that answers with what it was given to say, and keeps what it was asked."""

    def __init__(self, answer=0.5):
        super().__init__(CONFIG)
        self.answer, self.asked = answer, []

    def forward(self, x, t, cond=None, **extra):
        self.asked.append((x, t))
        return torch.zeros_like(x) + self.answer


def schedule(**config):
    return alphas_cumprod(config)


# --- the noise schedule ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"num_train_timesteps": 400},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_schedule_is_that_of_diffusers(unet, config):
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    expected = EulerDiscreteScheduler(**(sd | config)).alphas_cumprod
    sigmas = Denoiser(unet, schedule(**config)).sigmas
    torch.testing.assert_close(sigmas, ((1 - expected) / expected).sqrt(), rtol=1e-4, atol=1e-5)


def test_golden_sigmas(unet):
    denoiser = Denoiser(unet, schedule())
    golden = torch.tensor([11.67604627, 9.33807608, 7.56238795, 0.20179319, 0.04131441])
    torch.testing.assert_close(denoiser.sigmas[[961, 921, 881, 41, 1]], golden, rtol=1e-7, atol=1e-7)
    assert math.isclose(denoiser.sigma_max, 14.61464, rel_tol=1e-6) and denoiser.steps_offset == 1
    assert denoiser.unet is unet and not denoiser.sigmas.requires_grad


def test_t_and_sigma_are_inverse(unet):
    denoiser = Denoiser(unet, schedule())
    t = torch.arange(1000, dtype=torch.float32)
    assert torch.equal(denoiser.t_to_sigma(t), denoiser.sigmas)
    assert torch.equal(denoiser.sigma_to_t(denoiser.sigmas), t)  # the leading schedule's integers, exactly
    between = torch.tensor([0.25, 17.5, 998.9], dtype=torch.float64)
    assert torch.allclose(denoiser.sigma_to_t(denoiser.t_to_sigma(between)), between, rtol=0, atol=1e-9)
    assert denoiser.sigma_to_t(torch.tensor([0.0, 1e-9, 1e9, math.inf])).tolist() == [0, 0, 999, 999]
    assert denoiser.sigma_to_t(denoiser.sigmas[7]).shape == ()
    assert denoiser.sigma_to_t(denoiser.t_to_sigma(between), quantize=True).tolist() in ([0, 17, 999], [0, 18, 999])


def test_sigma_to_t_is_k_diffusions_interpolation(unet):
    external = k_diffusion().external
    denoiser = Denoiser(unet, schedule())
    assert isinstance(denoiser, external.DiscreteEpsDDPMDenoiser)
    theirs = external.DiscreteEpsDDPMDenoiser(unet, schedule(), quantize=False)
    sigma = torch.logspace(-1.5, 1.1, 50, dtype=torch.float64)
    torch.testing.assert_close(denoiser.sigma_to_t(sigma), theirs.sigma_to_t(sigma), rtol=0, atol=1e-4)
    torch.testing.assert_close(denoiser.get_sigmas(9).double(), theirs.get_sigmas(9).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "match, config",
    [
        ("beta_schedule='sigmoid'", {"beta_schedule": "sigmoid"}),
        ("beta_start=0.1, beta_end=0.01", {"beta_start": 0.1, "beta_end": 0.01}),
        ("rescale_betas_zero_snr=true makes the largest sigma infinite", {"rescale_betas_zero_snr": True}),
    ],
)
def test_schedules_that_are_not_supported(match, config):
    with pytest.raises(ValueError, match=match):
        schedule(**config)


def test_denoisers_that_are_not_supported(unet):
    with pytest.raises(ValueError, match="'flow' is not supported"):
        Denoiser(unet, schedule(), "flow")
    with pytest.raises(ValueError, match="'sample' is not supported"):
        Denoiser(unet, schedule(), Preconditioning("sample", sigma_data=0.5))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Denoiser(unet, torch.tensor([0.9, 0.0]))


# --- the denoised ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers(inputs, prediction):
    x, cond = inputs
    denoiser = Denoiser(Recorder(), schedule(), prediction)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(25)
    sigma, t = denoiser.sigmas[[961]], scheduler.timesteps[0]
    expected = scheduler.step(torch.full_like(x, 0.5), t, x).pred_original_sample
    denoised = denoiser(x, sigma.expand(3), cond=cond)
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)
    ((z, asked),) = denoiser.unet.asked
    torch.testing.assert_close(z, x / math.sqrt(float(sigma) ** 2 + 1))
    assert asked.tolist() == [961.0] * 3


def test_the_two_predictions_say_the_same(inputs):
    x, cond = inputs
    sigma = torch.tensor([0.03, 1.0, 14.0])
    s = sigma[:, None, None, None]
    eps = torch.full_like(x, 0.5)
    v = (s**2 + 1).sqrt() * eps - s * (x / (s**2 + 1).sqrt())  # from x = x0 + s·eps, v = (eps − s·x0)/√(s²+1)
    model = Denoiser(Recorder(v), schedule(), "v_prediction")
    torch.testing.assert_close(
        model(x, sigma, cond=cond), Denoiser(Recorder(), schedule())(x, sigma, cond=cond), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_vanishes_for_the_truth_and_has_its_target(inputs, prediction):
    x, cond = inputs
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    s = sigma[:, None, None, None]
    truth = noise if prediction == "epsilon" else (noise - s * x) / (s**2 + 1).sqrt()
    model = Denoiser(Recorder(truth), schedule(), prediction)
    assert float(model.loss(x, noise, sigma, cond=cond).max()) < 1e-10
    torch.testing.assert_close(model(x + s * noise, sigma, cond=cond), x, rtol=1e-4, atol=1e-4)
    model = Denoiser(Recorder(truth + 2.0), schedule(), prediction)
    torch.testing.assert_close(model.loss(x, noise, sigma, cond=cond), torch.full((3,), 4.0), rtol=1e-4, atol=1e-4)


def test_rows_are_independent_and_sigma_small_is_the_identity(unet, inputs):
    x, cond = inputs
    denoiser = Denoiser(unet, schedule())
    sigma = torch.tensor([0.05, 2.0, 14.0])
    together = denoiser(x, sigma, cond=cond)
    alone = torch.cat([denoiser(x[[i]], sigma[[i]], cond=cond[[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    assert torch.equal(denoiser(x, torch.zeros(3), cond=cond), x)


def test_a_fork_equals_separate_forwards(unet, inputs):
    x, cond = inputs
    denoiser = Denoiser(unet, schedule())
    sigma, index = torch.tensor([0.05, 2.0, 14.0]), torch.tensor([0, 1, 2, 2, 0])
    plain = denoiser(x, sigma, cond=cond)
    identity = lambda q, k, v, site: v if "mid" in site.name and site.kind == "self" else sdpa(q, k, v, site)  # noqa: E731
    perturbed = denoiser(x, sigma, cond=cond, attend=identity)

    def attend(q, k, v, site):
        out = sdpa(q, k, v, site)
        if "mid" in site.name and site.kind == "self":
            out = torch.cat([out[:3], v[3:]])
        return out

    site = next(name for name in unet.sites if "mid" in name)
    forked = denoiser(x, sigma, cond=cond, attend=attend, fork=Fork(site, index))
    torch.testing.assert_close(forked, torch.cat([plain, perturbed[[2, 0]]]), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(perturbed, plain, atol=1e-4)


def test_the_network_keeps_its_dtype_and_the_denoised_that_of_x(inputs):
    x, cond = inputs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(UNet(CONFIG).bfloat16().requires_grad_(False), schedule())
    sigma = denoiser.sigmas[[10, 500, 961]]
    assert denoiser(x, sigma, cond=cond).dtype == torch.float32
    assert denoiser(x.double(), sigma.double(), cond=cond).dtype == torch.float64
    assert denoiser.unet.conv_in.weight.dtype == torch.bfloat16 and denoiser.sigmas.dtype == torch.float32
