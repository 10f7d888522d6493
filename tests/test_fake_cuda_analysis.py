"""The analysis on a GPU that is not there: recorder, statistics, curvature, energies, claims, regimes, the table."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

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
    tensors_of,
)

from segresearch.analysis import blur_operator, claims, energy, measurements
from segresearch.analysis import logit_statistics as statistics
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.branch_diagnostics import Real, diagnose
from segresearch.analysis.recorder import Entry, Recorder, Recording
from segresearch.config.method import GuidanceConfig, PerturbedTerm
from segresearch.config.schema import DiagnosticsConfig, ModelConfig, RunConfig, SamplerConfig, ScheduleConfig
from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.blur import BOUNDARIES

GRID = (3, 4)
BLURS = [BlurOperator(GRID, sigma, boundary) for boundary in BOUNDARIES for sigma in (0.0, 1.0, math.inf)]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 1e-5}  # the analysis is in fp32 and fp64


def pair(dtype=torch.float32):
    with on_the_cpu():
        generator = torch.Generator().manual_seed(3)
        return tuple(torch.randn(2, 2, 12, 4, generator=generator).to(dtype) for _ in range(2))


def same_on_both(function, *args, dtype=torch.float32, device="cuda"):
    """Run on the CPU and on the device, with the same values."""
    with on_the_cpu():
        expected = function(*args)
    found = function(*sent(args))
    check_same(found, expected, device, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorder(gpu, dtype):
    """What is kept is copied to the CPU, by design: a recording is larger than a GPU has room for."""
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0), 2.0)}
    guided, sag = GuidedDenoiser(fake_denoiser(dtype), terms), SelfAttentionGuidance(fake_denoiser(dtype))
    for model in (guided, sag) if dtype == torch.float32 else (guided,):
        recorder = Recorder(model.unet.site_heads, heads=[0])
        x, sigma, conds = sent(real_inputs(dtype=dtype))
        out = model(x, sigma, conds, attend=recorder.attend([{"seed": 0}, {"seed": 1}]))
        assert out.device.type == "cuda" and len(recorder.recording)
        for entry in recorder.recording:
            assert {z.device.type for z in (entry.q, entry.k)} == {"cpu"} and entry.q.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", statistics.AXES)
def test_statistics(gpu, monkeypatch, axis, dtype):
    for name in ("BLOCK", "WIDE"):
        monkeypatch.setattr(statistics, name, 40)
    q, k = pair(dtype)
    gpu.reads.clear()
    same_on_both(lambda q, k: statistics.statistics(q, k, axis), q, k, dtype=dtype)
    weights = statistics.end_weights(GRID)
    assert weights.device.type == "cpu"  # by design: of a grid alone, sent by whoever has a device
    same_on_both(lambda q, k, w: statistics.moments(q, k, axis, w), q, k, weights.worth, dtype=dtype)
    same_on_both(lambda q, k, w: statistics.log_sum_exp(q, k, axis, w), q, k, weights.worth, dtype=dtype)
    same_on_both(lambda q, k, i: statistics.columns(q, k, axis, i), q, k, torch.arange(3).worth, dtype=dtype)
    assert not gpu.reads


@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature(gpu, dtype):
    q, k = pair(dtype)
    for blur in BLURS[:2] if dtype != torch.float32 else (*BLURS[:3], *BLURS[-2:]):
        same_on_both(lambda q, k: energy.curvature(q, k, "queries", blur), q, k, dtype=dtype)  # noqa: B023


def test_curvature_of_columns(gpu):
    with on_the_cpu():
        a = statistics.columns(*pair(), "queries", torch.arange(2)).flatten(0, 2)
    blur = BLURS[1]
    for function in (energy.hessian, energy.log_product, energy.log_pseudo_det):
        same_on_both(function, a)
    for function in (energy.entrywise_hessian, energy.chain_hessian, energy.entrywise_log_product):
        same_on_both(lambda a: function(a, blur), a)  # noqa: B023
    for function in (energy.chain_log_pseudo_det, energy.compare_hessians):
        same_on_both(lambda a: function(a, blur), a)  # noqa: B023


def test_the_operator_lies_on_the_cpu_and_acts_where_x_lies(gpu):
    """By design: the factors are small fp64 matrices of a grid, whose determinants are numbers of the host."""
    with on_the_cpu():
        x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    for blur in BLURS:
        for method in (blur.apply, blur.adjoint):
            same_on_both(method, x)
        vectors = (*blur.factors, blur.row_norms_squared)
        assert {z.device.type for z in vectors} == {"cpu"}
        assert isinstance(blur.log_det, float)
    assert blur_operator.log_spectrum(4, 1.0, "exact").device.type == "cpu"


def test_energies(gpu):
    q, k = pair()
    for axis in statistics.AXES:
        same_on_both(lambda q, k: energy.energies(q, k, axis), q, k)  # noqa: B023
    for function in (energy.hopfield_energy, energy.hopfield_update):
        same_on_both(lambda z, patterns: function(z, patterns, 0.5), q, k)  # noqa: B023


def test_landscapes(gpu):
    with on_the_cpu():
        a = statistics.columns(*pair(), "queries", torch.arange(3))[0, 0]
        reach = torch.linspace(-1, 1, 3)
    same_on_both(lambda base, along, s: energy.surface(base, along, s, s), a[0], a[1:], reach)
    same_on_both(energy.gaussian_curvature, a[1:, :2], a[1:, :4].reshape(2, 2, 2))


@pytest.mark.parametrize("blur", BLURS[1:3] + BLURS[4:5], ids=str)
def test_claims(gpu, blur):
    q, k = pair()
    for axis in statistics.AXES:
        results = same_on_both(lambda q, k: claims.check_claims(q, k, axis, blur), q, k)  # noqa: B023
        assert {result.holds.device.type for result in results} == {"cuda"}
        same_on_both(lambda q, k: claims.blur_commutes(q, k, axis, blur), q, k)  # noqa: B023
        if blur.boundary == "reflect":
            same_on_both(lambda q, k: claims.check_weighted(q, k, axis, blur), q, k)  # noqa: B023
    assert isinstance(results[0].fraction, float)


def test_regimes(gpu):
    q, k = pair()
    same_on_both(lambda q, k: claims.limits(q, k, GRID, (0.5, 2.0), "exact"), q, k)
    with on_the_cpu():
        a = statistics.columns(q, k, "queries", torch.arange(2)).flatten(0, 2)
    assert claims.theorem_margins(*sent((a,)), BLURS[1]) == pytest.approx(
        claims.theorem_margins(a, BLURS[1])
    )
    assert claims.white_noise(4).device.type == "cpu"  # by design: for a plot


@pytest.mark.parametrize("dtype", DTYPES)
def test_table(gpu, dtype):
    """Of a recording whose q and k lie on the device: the same rows and the same claims."""
    site = "mid_block.attentions.0.transformer_blocks.0.attn1"

    def measured(q, k):
        held = {"q": q, "k": k}
        entry = Entry(site, GRID, ("cond",), 0, (1.0, 1.0), ({"seed": 0}, {"seed": 1}), (0, 1), lambda: held)
        return measurements.measure(Recording((entry,)), (1.0,), ("reflect", "exact"), (site,))

    q, k = pair(dtype)
    with on_the_cpu():
        expected = measured(q, k)
    rows, summaries = measured(*sent((q, k)))
    assert [one.row().keys() for one in summaries] == [one.row().keys() for one in expected[1]] and len(summaries) > 20
    for ours, theirs in zip(rows, expected[0], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), key
    assert tensors_of(rows) == []


def test_branch_diagnostics(gpu):
    """Of two methods along a trajectory and on images with noise: the numbers of the CPU, none left on the device."""

    def measured(denoiser, conds, truth, device):
        sd = SimpleNamespace(
            denoiser=denoiser, unet=denoiser.unet, device=torch.device(device), vae=denoiser.unet,
            arithmetic=nullcontext, latent_shape=lambda size: (4, 8, 12), encode=lambda *_, **__: conds,
            encode_images=lambda images: truth,
        )  # fmt: skip
        groups = ModelConfig("x", "x"), SamplerConfig("euler"), ScheduleConfig("leading")
        config = RunConfig(*groups, steps=2, batch_size=2)
        kinds = {"seg": SEG(1.0), "pag": PAG()}
        methods = {"none": GuidanceConfig()} | {
            name: GuidanceConfig(terms={name: PerturbedTerm("perturbed", kind, 1.0)}) for name, kind in kinds.items()
        }
        settings = DiagnosticsConfig(images=2, scenes=2, steps=(1,))
        real = Real(torch.zeros(2, 3, 16, 24, dtype=torch.uint8), ["", ""])
        return diagnose(sd, methods, config, settings, lambda rows: [""] * len(rows), real)

    with on_the_cpu():
        _, _, conds = real_inputs()
        truth = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
        expected = measured(real_denoiser(), conds, truth, "cpu")
    found = measured(fake_denoiser(), *sent((conds, truth)), "cuda")
    assert len(found) == len(expected) > 20 and tensors_of(found) == []
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.method, ours.site, ours.quantity) == (theirs.method, theirs.site, theirs.quantity)
        assert ours.value == pytest.approx(theirs.value, rel=1e-3, abs=1e-4), ours
