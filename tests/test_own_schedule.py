"""What a model's own scheduler says: its noise, its prediction and its schedule are those of diffusers."""

import json
import math
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.tensors import Entry
from segresearch.errors import InputError
from segresearch.models.denoiser import Denoiser, alphas_cumprod, scheduled
from segresearch.models.scheduler import CONSISTENCY, TABLES, OwnSchedule, folder_scheduler, overridden, own_schedule
from segresearch.sampling import sigmas, start_scale
from segresearch.sampling.schedules import named

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with numpy 2
NET = torch.nn.Identity()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 4, 25)


def written(scheduler, **options):
    """A scheduler's config as it is saved."""
    kind = getattr(diffusers, scheduler) if isinstance(scheduler, str) else scheduler
    return json.loads(kind(**options).to_json_string())


def noises(seed=0):
    """Betas and counts of timesteps."""
    draws = np.random.default_rng(seed)
    for total in (1000, 500):
        start = float(draws.uniform(1e-4, 1e-3))
        for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            ends = {"beta_start": start, "beta_end": start * float(draws.uniform(10, 25))}
            yield {**ends, "beta_schedule": schedule, "num_train_timesteps": total}


def same_as_euler(config, steps):
    """Sigmas, timesteps and the scale of the first noise are those of an EulerDiscreteScheduler with this config."""
    model, reference = scheduled(NET, config), EulerDiscreteScheduler.from_config(config)
    torch.testing.assert_close(model.alphas.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-6)
    reference.alphas_cumprod = model.alphas  # in fp64: what is left is its set_timesteps
    reference.set_timesteps(steps)
    levels = sigmas(model, "auto", steps)
    torch.testing.assert_close(levels, reference.sigmas, rtol=1e-5, atol=1e-6)
    scale = start_scale(levels, named(model, "auto"))
    assert scale == pytest.approx(float(reference.init_noise_sigma), rel=1e-5)
    exact = config.get("timestep_spacing", "linspace") != "linspace"
    between = 1e-2 if exact else 0.1  # sigma is linear between two t there, log sigma here
    t = model.sigma_to_t(levels[:-1].double())
    torch.testing.assert_close(t, reference.timesteps.double(), rtol=0, atol=between)


@pytest.mark.parametrize("kind", TABLES)
def test_schedules_of_every_class_are_those_of_euler(kind):
    own = written(kind)
    assert own["_class_name"] == kind
    spacings = ("leading", "linspace", "trailing") if "timestep_spacing" in own else (None,)
    for i, noise in enumerate(noises()):
        for j, spacing in enumerate(spacings):
            options = {} if spacing is None else {"timestep_spacing": spacing, "steps_offset": 1}
            prediction = ("epsilon", "v_prediction", "sample")[(i + j) % 3]
            config = own | noise | options | {"prediction_type": prediction}
            assert scheduled(NET, config).prediction == prediction
            for steps in STEPS:
                if spacing in ("leading", "trailing") or steps > 1:
                    same_as_euler(config, steps)
                else:  # diffusers starts a single step of linspace at timestep 0
                    model = scheduled(NET, config)
                    assert sigmas(model, "auto", 1)[0] == model.sigma_max


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("curve", ["karras", "exponential", "beta"])
def test_curves_run_between_the_ends_that_the_config_says(curve, spacing):
    for ends in ({}, {"sigma_max": 9.0}, {"sigma_min": 0.1, "sigma_max": 20.0}):
        config = written("EulerDiscreteScheduler", **SD, timestep_spacing=spacing, steps_offset=1, **ends)
        config[f"use_{curve}_sigmas"] = True
        for steps in STEPS:
            if steps > 1 or spacing != "linspace" or ends:
                same_as_euler(config, steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_starts_where_it_says(prediction, spacing):
    config = written(
        "EulerDiscreteScheduler", **SD, timestep_spacing=spacing, steps_offset=1, prediction_type=prediction,
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    same_as_euler(config, 25)
    first = float(sigmas(scheduled(NET, config), "auto", 25)[0])
    assert first == pytest.approx({"leading": 54.6}.get(spacing, 4096.0), rel=1e-3)
    with pytest.raises(InputError, match="rescale_betas_zero_snr=true.*prediction=v_prediction"):
        scheduled(NET, config | {"prediction_type": "epsilon"})


def test_turbo_starts_one_step_at_the_largest_sigma():
    turbo = written("EulerAncestralDiscreteScheduler", **SD, timestep_spacing="trailing", steps_offset=1)
    same_as_euler(turbo, 1)
    model = scheduled(NET, turbo)
    assert sigmas(model, steps=1).tolist() == [pytest.approx(14.6146, rel=1e-5), 0.0]
    with pytest.warns(UserWarning, match=r"^schedule leading with 1 steps starts at sigma 0\.04131, .*auto, trailing"):
        sigmas(model, "leading", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a choice that makes little difference is not spoken of
        for schedule in ("leading", "linspace", "karras", "align-your-steps"):
            sigmas(model, schedule, 25)
        sigmas(scheduled(NET, {}), "karras", 4)


def test_a_file_without_a_class_is_sdxl():
    assert own_schedule({}) == OwnSchedule("leading") and scheduled(NET, {}).steps_offset == 1
    assert own_schedule({"rescale_betas_zero_snr": True}).name == "trailing"
    for key in ("use_karras_sigmas", "rescale_betas_zero_snr", "use_flow_sigmas"):
        with pytest.raises(InputError, match=f"^scheduler config: {key}='false' must be true or false$"):
            own_schedule({key: "false"})
    assert torch.equal(scheduled(NET, {}).sigmas, Denoiser(NET, alphas_cumprod(SD)).sigmas)
    assert named(Denoiser(NET, alphas_cumprod({})), "auto") == "leading"
    sd15 = {  # the file of Stable Diffusion 1.5
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    }  # fmt: skip
    same_as_euler(sd15, 25)
    assert own_schedule(sd15).name == "linspace" and scheduled(NET, sd15).steps_offset == 1


def test_a_file_of_stable_diffusion_1_or_2_is_sampled_as_its_folder():
    path, text = Path("one.safetensors"), "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    sizes = "model.diffusion_model.label_emb.0.0.weight"
    for keys, metadata, schedule in (
        ([text], {}, "linspace"), (["cond_stage_model.model.ln_final.weight"], {}, "linspace"),
        ([text, sizes], {}, "leading"), (["cond_stage_model.logit_scale", sizes], {}, "leading"),
        ([text], {"ss_zero_terminal_snr": "true", "prediction_type": "v"}, "trailing"),
    ):  # fmt: skip
        entries = {key: Entry(path, key, "F16", (4,)) for key in keys}
        assert own_schedule(file_scheduler(path, entries, metadata)).name == schedule


@pytest.mark.parametrize("kind", CONSISTENCY)
def test_lcm_and_tcd_are_at_the_timesteps_of_their_distillation(kind):
    for original, total in ((50, 1000), (40, 1000), (25, 500)):
        config = written(kind, num_train_timesteps=total, original_inference_steps=original)
        model = scheduled(NET, config)
        for steps in (1, 3, 4, 8, original):
            reference = getattr(diffusers, kind).from_config(config)
            reference.set_timesteps(steps)
            levels = sigmas(model, "auto", steps)
            torch.testing.assert_close(model.sigma_to_t(levels[:-1]), reference.timesteps.float(), rtol=0, atol=0)
            scale = start_scale(levels, named(model, "auto"))  # z = x/√(σ² + 1) starts at unit noise
            assert scale / math.sqrt(float(levels[0]) ** 2 + 1) == pytest.approx(reference.init_noise_sigma)
        with pytest.raises(InputError, match=f"schedule lcm has {original} timesteps"):
            sigmas(model, "auto", original + 1)


@pytest.mark.parametrize(
    ("match", "config"),
    [
        ("flow matching .*'FlowMatchEulerDiscreteScheduler'", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("'CMStochasticIterativeScheduler'", {"_class_name": "CMStochasticIterativeScheduler"}),
        ("'CogVideoXDDIMScheduler'", {"_class_name": "CogVideoXDDIMScheduler"}),
        ("use_flow_sigmas .flow matching", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}),
        ("trained_betas", {"trained_betas": [0.1]}),
        ("interpolation_type='log_linear'", {"interpolation_type": "log_linear"}),
        ("timestep_spacing='even'", {"timestep_spacing": "even"}),
        ("timestep_spacing=None", {"timestep_spacing": None}),
        ("use_karras_sigmas and use_beta_sigmas", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        ("sigma_min=-1", {"use_karras_sigmas": True, "sigma_min": -1}),
        ("'flow_prediction' is not supported", {"prediction_type": "flow_prediction"}),
        ("'sample' is not supported for EDM", {"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}),
        ("sigma_min=3, sigma_max=2", {"_class_name": "EDMEulerScheduler", "sigma_min": 3, "sigma_max": 2}),
        ("sigma_schedule='cosine'", {"_class_name": "EDMEulerScheduler", "sigma_schedule": "cosine"}),
        ("original_inference_steps=0", {"_class_name": "LCMScheduler", "original_inference_steps": 0}),
        ("original_inference_steps=1000", {"_class_name": "LCMScheduler", "original_inference_steps": 10**30}),
        ("timestep_scaling='x'", {"_class_name": "LCMScheduler", "timestep_scaling": "x"}),
        ("sigma_min=None", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("not on linspace timesteps", {
            "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction",
            "sigma_min": 0.002, "sigma_max": 700.0,
        }),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(match, config):
    with pytest.raises(InputError, match=match) as caught:
        scheduled(NET, config)
    assert "\n" not in str(caught.value)


def test_the_class_is_that_of_the_index():
    config = written("DDIMScheduler", **SD)
    assert folder_scheduler({"scheduler": ["diffusers", "LCMScheduler"]}, config)["_class_name"] == "LCMScheduler"
    assert folder_scheduler({}, config) == config
    assert folder_scheduler({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, {}) == {}
    with pytest.raises(InputError, match="says EDMEulerScheduler, scheduler_config.json DDIMScheduler"):
        folder_scheduler({"scheduler": ["diffusers", "EDMEulerScheduler"]}, config)
    with pytest.raises(InputError, match="FlowMatchHeunDiscreteScheduler"):
        folder_scheduler({"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, config)


def test_a_prediction_may_be_set_against_what_is_declared():
    config = written("EulerDiscreteScheduler", **SD)
    with pytest.warns(UserWarning, match="^prediction=v_prediction is used, though the model declares epsilon$"):
        changed = overridden(config, "v_prediction")
    assert scheduled(NET, changed).prediction == "v_prediction" and config["prediction_type"] == "epsilon"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert overridden(config, "epsilon") == overridden(config, None) == config
        assert scheduled(NET, overridden({}, "v_prediction")).prediction == "v_prediction"  # nothing was declared
    with pytest.raises(InputError, match="prediction 'x' is not supported"):
        overridden(config, "x")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_image_of_a_prediction_is_that_of_diffusers(prediction):
    config = written("DDIMScheduler", **SD, prediction_type=prediction, clip_sample=False)
    reference, model = DDIMScheduler.from_config(config), scheduled(NET, config)
    generator = torch.Generator().manual_seed(0)
    x, out, clean = (torch.randn(2, 4, 3, 5, generator=generator) for _ in range(3))
    reference.set_timesteps(10)
    for t in reference.timesteps.tolist():
        sigma = model.sigmas[t].expand(2)[:, None, None, None]
        z = x / (sigma**2 + 1).sqrt()
        expected = reference.step(out, t, z).pred_original_sample
        denoised = model.preconditioning.denoised(out, x, sigma, torch.full_like(sigma, t))
        torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)
        target = model.preconditioning.target(clean, out, sigma)  # out is the noise of x here
        back = model.preconditioning.output(denoised, x, sigma, torch.full_like(sigma, t))
        torch.testing.assert_close(back, out, rtol=1e-3, atol=1e-3 / float(sigma.min()))
        again = model.preconditioning.denoised(target, clean + sigma * out, sigma, torch.full_like(sigma, t))
        torch.testing.assert_close(again, clean, rtol=1e-4, atol=1e-4)
