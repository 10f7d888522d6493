"""The arguments of `sample`: what is wrong is named, and what it prints."""

import math
import sys
from dataclasses import dataclass

import pytest
import torch
from gaussian import SHAPE, Gaussian

from segresearch.errors import InputError
from segresearch.models.text_settings import TextSettings
from segresearch.sampling import SAMPLERS, initial_noise, sample, sigmas
from segresearch.sampling.loop import one_row


@pytest.fixture
def noise():
    return initial_noise(range(8), SHAPE)


def test_precision_and_arguments(noise):
    x32 = sample(Gaussian(), noise, steps=5)
    x64 = sample(Gaussian(), noise.double(), steps=5)
    assert x64.dtype == torch.float64 and torch.equal(
        sample(Gaussian(), noise.half(), steps=5), sample(Gaussian(), noise.half().float(), steps=5)
    )
    torch.testing.assert_close(x64.float(), x32, rtol=1e-5, atol=1e-6)
    for sampler in ("euler_ancestral", "dpmpp_sde"):  # the same noise in either precision
        low, high = (sample(Gaussian(), n, sampler, steps=5).double() for n in (noise, noise.double()))
        torch.testing.assert_close(low, high, rtol=0, atol=2e-3)
    assert float(sample(Gaussian(), noise, steps=3, gain=0.0).abs().max()) < 1e-6
    given = sample(Gaussian(), noise, schedule=sigmas(Gaussian(), "karras", 5))
    assert torch.equal(given, sample(Gaussian(), noise, schedule="karras", steps=5))
    half_eta = sample(Gaussian(), noise, "euler_ancestral", steps=5, options={"eta": 0.0})
    torch.testing.assert_close(half_eta, x32, rtol=1e-4, atol=1e-5)
    assert not sample(Gaussian(), noise.clone().requires_grad_(), steps=2).requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step(sampler, noise):
    seen = []
    sample(Gaussian(), noise[:2], sampler, "karras", 7, callback=seen.append)
    assert all({"x", "i", "sigma", "denoised", "rows"} <= info.keys() for info in seen)
    for rows in {(info["rows"].start, info["rows"].stop) for info in seen}:
        own = [info for info in seen if info["rows"] == slice(*rows)]
        assert [info["i"] for info in own] == list(range(len(own)))
        assert all(info["denoised"].shape[0] == rows[1] - rows[0] for info in own)
        assert float(own[-1]["sigma"]) == pytest.approx(float(sigmas(Gaussian(), "karras", 7)[-2]), rel=1e-4)
    assert len(seen) == 7 or sampler.startswith("dpm_")
    assert {info["rows"].stop for info in seen} == ({1, 2} if sampler == "dpm_adaptive" else {2})


def test_progress_is_quiet_off_a_terminal(noise, capfd):
    for sampler in SAMPLERS:
        sample(Gaussian(), noise[:2], sampler, steps=3, progress=True)
    assert capfd.readouterr() == ("", "")


def test_bar_counts_images(noise, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for sampler in ("euler", "dpm_fast", "dpm_adaptive"):
        sample(Gaussian(), noise, sampler, steps=6, progress=True)
        text = capfd.readouterr().err
        assert f"{sampler}:   0%" in text and "image/s" in text


def test_wrong_arguments_are_named(noise):
    model = Gaussian()
    cases = [
        (dict(sampler="eular"), "^unknown sampler 'eular': did you mean 'euler'[?] choose one of euler, heun, .*$"),
        (dict(schedule="karas"), "^unknown schedule 'karas': did you mean 'karras'[?] choose one of auto, leading, "),
        (dict(steps=0), "^steps must be a whole number, at least 1, got 0$"),
        (dict(steps=1000), "^schedule leading with 1000 steps: sigmas must strictly fall"),
        (
            dict(schedule=torch.tensor([1.0, 2.0, 0.0])),
            "^schedule: sigmas must strictly fall, but number 0 is 1 and .* 2;",
        ),
        (dict(schedule=torch.tensor([2.0, 1.0])), "^schedule: sigmas must be finite, at least two, and end at 0"),
        (dict(seeds=[1, 2]), "^seeds must be one per image: got 2 seeds for 8 images$"),
        (dict(conds={"cond": torch.ones(3)}), r"^conds\['cond'\] has 3 rows for 8 images of noise"),
        (dict(options={"etta": 1}), "^sampler euler has no option 'etta'; it takes s_churn, s_tmin, s_tmax, s_noise$"),
        (dict(sampler="dpmpp_2m", options={"eta": 1}), "^sampler dpmpp_2m has no option 'eta'; it takes none$"),
        (dict(noise=noise[0]), r"^noise must be \(images, channels, height, width\), got shape \(4, 6, 10\)$"),
        (dict(noise=noise[:0]), r"^noise must be \(images, channels, height, width\), got shape \(0, 4, 6, 10\)$"),
        (dict(noise=noise / 0), "^noise holds values that are not finite$"),
    ]
    for arguments, line in cases:
        with pytest.raises(ValueError, match=line):
            sample(model, **{"noise": noise, **arguments})
    assert model.calls == 0
    with pytest.raises(ValueError, match="^rho must be positive and is only for karras and polyexponential; got rho=2"):
        sigmas(model, "exponential", 5, rho=2.0)
    with pytest.raises(ValueError, match="^initial_noise needs at least one seed$"):
        initial_noise([], SHAPE)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("euler", {"s_noise": "x"}), ("euler", {"s_churn": -1}), ("heun", {"s_tmax": "x"}), ("euler", {"s_tmin": True}),
        ("euler", {"s_noise": 10**30}), ("euler", {"s_noise": math.nan}), ("euler", {"s_churn": math.inf}),
        ("dpm_adaptive", {"rtol": "x"}), ("dpm_adaptive", {"order": 4}), ("dpm_adaptive", {"h_init": 0}),
        ("dpm_adaptive", {"icoeff": "x"}), ("dpmpp_2m_sde", {"eta": "x"}), ("dpmpp_2m_sde", {"solver_type": "euler"}),
        ("dpmpp_sde", {"r": 0.0}), ("lms", {"order": 2.5}), ("lms", {"order": "x"}), ("lms", {"order": 0}),
    ],
)  # fmt: skip
def test_options_that_make_no_step_are_refused_whatever_the_steps(noise, sampler, options):
    (name,) = options
    for steps in (1, 3):
        with pytest.raises(InputError, match=f"^sampler {sampler}: option {name}=.* makes no step; it must be "):
            sample(Gaussian(), noise, sampler, steps=steps, options=options)


def test_options_of_other_number_types_are_the_same(noise):
    options = ({"s_churn": 2, "s_tmax": math.inf, "s_noise": 1}, {"s_churn": 2.0, "s_tmax": math.inf, "s_noise": 1.0})
    a, b = (sample(Gaussian(), noise[:2], "euler", steps=2, options=each) for each in options)
    assert torch.equal(a, b)


def test_one_row_cuts_what_belongs_to_images():
    @dataclass(frozen=True)
    class Hint:
        image: torch.Tensor
        scale: float
        table: torch.Tensor

    hint = Hint(torch.arange(3.0), 0.5, torch.arange(7.0))
    net = torch.nn.Linear(3, 3)
    value = {"hint": hint, "pair": (torch.arange(3), None), "net": net, "scalar": torch.tensor(2.0)}
    cut = one_row(value, 1, 3)
    assert cut["hint"].image.tolist() == [1.0] and cut["hint"].scale == 0.5 and len(cut["hint"].table) == 7
    assert cut["pair"][0].tolist() == [1] and cut["pair"][1] is None and cut["net"] is net and cut["scalar"] == 2


def test_a_conditioning_of_another_size_than_the_noise_is_warned_of_once(model):
    import warnings

    conds = model.encode(["red"], size=(64, 64))
    for chosen in (conds, {name: cond.expand(1).to(dtype=torch.float32) for name, cond in conds.items()}):
        with pytest.warns(UserWarning, match="the noise is of .* the conditioning tells .* of an image") as said:
            sample(model.denoiser, initial_noise([0], model.latent_shape((32, 64))), steps=1, conds=None,
                   cond=chosen["cond"])  # fmt: skip
        assert len(said) == 1 and str(said[0].message).count("\n") == 0
    told_otherwise = model.encode(["red"], size=(64, 64), settings=TextSettings(target_size=(1024, 1024)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cond in (conds["cond"], told_otherwise["cond"]):  # a size that is told on purpose is no mistake
            sample(model.denoiser, initial_noise([0], model.latent_shape((64, 64))), steps=1, conds=None, cond=cond)


def test_two_calls_share_no_memory_of_a_post_processor(model):
    from segresearch.guidance import GuidedDenoiser, cfg

    class Steady:
        def __call__(self, guided, step):
            before = step.past.read()
            step.past.write(guided)
            return guided if before is None else torch.lerp(guided, before, 0.3)

    class Kept:
        before = None

        def __call__(self, guided, step):
            guided = guided if self.before is None else torch.lerp(guided, self.before, 0.3)
            self.before = guided
            return guided

    conds, noise = model.encode(["red"]), initial_noise([0], model.latent_shape())
    for post, same in ((Steady(), True), (Kept(), False)):
        guided = GuidedDenoiser(model.denoiser, {"cfg": cfg(2.0)}, post=[post])
        first, second = (sample(guided, noise, steps=3, conds=conds) for _ in range(2))
        assert torch.equal(first, second) == same
