"""Shapes of terms, post-processors and scales: the published code or its formula, limits, conventions, batches, dtypes.

A shape is called with bare tensors, as `c + s·shape(c, u)`, s = w − 1, in denoised space or, at x and σ, in eps.
"""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    TangentialClassifierFreeGuidance,
)
from guidance_models import denoiser, noisy

from segresearch.errors import InputError
from segresearch.guidance import GuidedDenoiser
from segresearch.guidance.frequencies import high_pass
from segresearch.guidance.methods.adaptive_stop import AdaptiveStop
from segresearch.guidance.methods.adg import ADG
from segresearch.guidance.methods.apg import APG
from segresearch.guidance.methods.cfg_zero import CFGZero
from segresearch.guidance.methods.cfgpp import PlusPlus
from segresearch.guidance.methods.fdg import FDG
from segresearch.guidance.methods.higs import HiGS
from segresearch.guidance.methods.mambo import MamboG
from segresearch.guidance.methods.mimic import Mimic
from segresearch.guidance.methods.momentum import Momentum
from segresearch.guidance.methods.perp_neg import PerpNeg
from segresearch.guidance.methods.rescaled import Rescale
from segresearch.guidance.methods.sg_prev import SGPrev
from segresearch.guidance.methods.smc import SMC
from segresearch.guidance.methods.tag import TAG
from segresearch.guidance.methods.tcfg import TCFG
from segresearch.guidance.methods.thresholding import Threshold, quantile
from segresearch.guidance.methods.tsr import TSR
from segresearch.guidance.methods.weight_schedules import SHAPES, Schedule
from segresearch.guidance.methods.zigzag import ZSampling
from segresearch.guidance.postprocess import Projected, rescale
from segresearch.guidance.step import Step
from segresearch.guidance.terms import cfg
from segresearch.sampling import sample
from segresearch.sampling.memory import Past, Run
from segresearch.sampling.schedules import sigmas as schedule_sigmas
from segresearch.sampling.schedules import start_scale

W = 5.0
SIGMAS = (10.0, 4.0, 2.0, 1.0, 0.0)
SHAPES_OF_TERMS = (
    APG(norm=3.0), CFGZero(), TCFG(), FDG(), MamboG(), ADG(), Mimic(mimic=2.0, percentile=0.9), SMC(gain=0.05),
    SMC(switch="unit"), PerpNeg(), AdaptiveStop(cosine=0.5), SGPrev(),
)  # fmt: skip
POSTS = (Rescale(), Rescale(space="eps"), TAG(), TSR(), Momentum(), HiGS(), Threshold())


def latents(seed: int, rows: int = 3, h: int = 8, w: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A row is the same whatever the number of rows."""
    parts = [torch.randn(4, h, w, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(rows)]
    return torch.stack(parts).to(dtype)


def branches(rows: int = 3, h: int = 8, w: int = 12, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    cond = latents(1, rows, h, w, dtype)
    return {
        "cond": cond,
        "uncond": cond + 0.3 * latents(2, rows, h, w, dtype),
        "negative": cond + 0.3 * latents(3, rows, h, w, dtype),
    }


def step_of(d: dict[str, torch.Tensor], sigma: float = 2.0, scale: float = W - 1, run: Run | None = None) -> Step:
    cond = d["cond"]
    sigmas = torch.full((len(cond),), sigma, dtype=torch.promote_types(cond.dtype, torch.float32))
    x = cond + sigma * latents(7, *cond.shape[::2], cond.shape[3], cond.dtype)
    return Step(x, sigmas, d, "cond", scale, Past(run, "method", sigma))


def run_of(sampler: str = "euler", sigmas: tuple[float, ...] | None = SIGMAS) -> Run:
    return Run(torch.arange(3), sampler, sigmas)


def guided(shape, d, step: Step) -> torch.Tensor:
    neg = d["cond"] if isinstance(shape, SGPrev) else d["uncond"]
    return d["cond"] + step.scale * shape(d["cond"], neg, step)


def in_eps(shape, c: torch.Tensor, u: torch.Tensor, w: float, sigma: float = 2.0) -> torch.Tensor:
    """The ε that a shape gives for predictions c and u of ε."""
    x = latents(7, len(c), *c.shape[2:], c.dtype)
    d = {"cond": x - sigma * c, "uncond": x - sigma * u}
    step = Step(x, torch.full((len(c),), sigma, dtype=c.dtype), d, "cond", w - 1)
    return step.eps(guided(shape, d, step))


def flat(z: torch.Tensor) -> list[torch.Tensor]:
    return [row.flatten() for row in z]


# published code


def test_apg_is_diffusers_guider_with_its_base():
    d = branches()
    guider = AdaptiveProjectedGuidance(W, adaptive_projected_guidance_momentum=-0.5, eta=0.3,
                                       adaptive_projected_guidance_rescale=3.0)  # fmt: skip
    guider._step = 0
    guider.prepare_inputs({})  # makes the buffer
    run = run_of()
    for i, sigma in enumerate(SIGMAS[:3]):
        d = {name: z + 0.1 * i * latents(10 + i) for name, z in branches().items()}
        d["uncond"] = d["uncond"] + 0.2 * latents(20 + i)
        expected = guider.forward(d["cond"], d["uncond"]).pred  # u + w·Δ′
        delta = APG(eta=0.3, norm=3.0)(d["cond"], d["uncond"], step_of(d, sigma, run=run))
        torch.testing.assert_close(d["uncond"] + W * delta, expected)


def test_apg_without_momentum_is_projected_on_one_term():
    d = branches()
    step = step_of(d)
    out = guided(APG(eta=0.3, momentum=0.0, norm=math.inf), d, step)
    torch.testing.assert_close(out, Projected(eta=0.3)(d["cond"] + 4 * (d["cond"] - d["uncond"]), step))


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_cfg_zero_and_tcfg_are_diffusers_guiders_in_eps(size):
    c = latents(1, 3, *size)
    u = c + 0.3 * latents(2, 3, *size)
    zero = ClassifierFreeZeroStarGuidance(W, zero_init_steps=0)
    zero._step = 0
    expected = zero.forward(c, u).pred  # its α is in fp32
    torch.testing.assert_close(in_eps(CFGZero(), c, u, W), expected, atol=1e-5, rtol=1e-5)
    for near in (0.3, 1e-2, 5.0):  # also where the unconditional one is the longer of the two, or almost the same
        u = c + near * latents(2, 3, *size)
        expected = TangentialClassifierFreeGuidance(W).forward(c.float(), u.float()).pred.double()
        torch.testing.assert_close(in_eps(TCFG(), c, u, W), expected, atol=5e-5, rtol=5e-5)  # an SVD in fp32


@pytest.mark.parametrize(("h", "w"), [(8, 8), (8, 16), (32, 4)])
def test_fdg_is_diffusers_guider_where_sides_are_powers_of_two(h, w):
    d = branches(h=h, w=w)
    for weights in ((10.0, W), (10.0, 7.0, W)):
        if min(h, w) >> (len(weights) - 1) < 2:
            continue
        expected = FrequencyDecoupledGuidance(guidance_scales=list(weights)).forward(d["cond"], d["uncond"]).pred
        gains = tuple((weight - 1) / (W - 1) for weight in weights)
        torch.testing.assert_close(guided(FDG(gains), d, step_of(d)), expected, atol=1e-6, rtol=1e-6)
    assert FDG().gains == (9 / 4, 1.0)  # the default is w_high 10 and w_low 5 at weight 5


@pytest.mark.parametrize(("h", "w"), [(12, 24), (7, 13), (5, 2)])
def test_fdg_keeps_other_sizes_and_refuses_too_small_ones(h, w):
    d = branches(h=h, w=w)
    out = guided(FDG(), d, step_of(d))
    assert out.shape == d["cond"].shape
    torch.testing.assert_close(guided(FDG((1.0, 1.0)), d, step_of(d)), d["cond"] + 4 * (d["cond"] - d["uncond"]))
    with pytest.raises(InputError, match=r"\(7, 1\) is too small for 2 levels"):
        FDG()(torch.zeros(1, 4, 7, 1), torch.zeros(1, 4, 7, 1), step_of(d))


# formulas, written out


def test_mambo_formula():
    c, u = latents(1), latents(1) + 0.3 * latents(2)
    rows = []
    for a, b in zip(flat(c), flat(u), strict=True):
        weight = 1 + (W - 1) * math.exp(-2.0 * float((a - b).norm() / b.norm()))
        rows.append(b + weight * (a - b))
    torch.testing.assert_close(in_eps(MamboG(2.0), c, u, W).flatten(1), torch.stack(rows))


@pytest.mark.parametrize("near", [0.3, 1e-5])
@pytest.mark.parametrize("w", [1.5, 6.0])
def test_adg_formula(near, w):
    d = branches() | {"uncond": latents(1) + near * latents(2)}
    rows = []
    for c, u in zip(flat(d["cond"]), flat(d["uncond"]), strict=True):
        theta = math.acos(min(1.0, float(c @ u / c.norm() / u.norm())))
        turned = min((w - 1) * theta, math.pi / 3)
        e = c - (c @ u) / (u @ u) * u
        ratio = math.sin(turned) / math.sin(theta) if math.sin(theta) > 1e-3 else w - 1
        rows.append(math.cos(turned) * c + ratio * e)
    out = guided(ADG(), d, step_of(d, scale=w - 1))
    torch.testing.assert_close(out.flatten(1), torch.stack(rows), atol=1e-6, rtol=1e-6)
    assert (out.flatten(1).norm(dim=1) <= math.sqrt(2) * d["cond"].flatten(1).norm(dim=1)).all()


def test_mimic_formula():
    d = branches()
    delta = d["cond"] - d["uncond"]
    low, high = d["uncond"] + 2.0 * delta, d["uncond"] + W * delta
    expected = high.clone()
    for i in range(3):
        for j in range(4):
            a = (low[i, j] - low[i, j].mean()).abs().max()
            centred = high[i, j] - high[i, j].mean()
            b = torch.quantile(centred.abs().flatten(), 0.9)
            held = centred.clamp(-max(a, b), max(a, b)) / max(a, b) * a + high[i, j].mean()
            expected[i, j] = 0.75 * held + 0.25 * high[i, j]
    torch.testing.assert_close(guided(Mimic(2.0, 0.9, 0.75), d, step_of(d)), expected)
    torch.testing.assert_close(guided(Mimic(W), d, step_of(d)), high)
    torch.testing.assert_close(guided(Mimic(2.0, phi=0.0), d, step_of(d)), high)


@pytest.mark.parametrize("switch", ["sign", "unit"])
def test_smc_formula(switch):
    run, kept = run_of(), None
    for i, sigma in enumerate(SIGMAS[:3]):
        d = {name: z + 0.3 * latents(10 + i + len(name)) for name, z in branches().items()}
        step = step_of(d, sigma, run=run)
        c, u = step.eps(d["cond"]), step.eps(d["uncond"])
        e = c - u
        kept = e if kept is None else kept
        s = (e - kept) + 5.0 * kept
        kept = e - 0.1 * (s.sign() if switch == "sign" else s / s.flatten(1).norm(dim=1)[:, None, None, None])
        shape = SMC(gain=0.1, switch=switch)
        torch.testing.assert_close(step.eps(guided(shape, d, step)), u + W * kept)


def test_perp_neg_formula():
    d = branches() | {"other": latents(4)}
    shape = PerpNeg(("negative", "other"), 0.5)
    rows = []
    for c, u, *negatives in zip(*map(flat, (d["cond"], d["uncond"], d["negative"], d["other"])), strict=True):
        main = c - u
        total = main
        for n in negatives:
            against = n - u
            total = total - 0.5 * (against - (against @ main) / (main @ main) * main)
        rows.append(u + W * total)
    torch.testing.assert_close(guided(shape, d, step_of(d)).flatten(1), torch.stack(rows))
    along_main = d | {"negative": d["uncond"] + 3 * (d["cond"] - d["uncond"])}  # nothing of it is orthogonal
    torch.testing.assert_close(guided(PerpNeg(), along_main, step_of(along_main)), plain_cfg(d))


def plain_cfg(d: dict[str, torch.Tensor], w: float = W) -> torch.Tensor:
    return d["uncond"] + w * (d["cond"] - d["uncond"])


def test_rescale_in_v_is_comfyuis_formula_and_in_eps_the_existing_one():
    d = branches()
    step = step_of(d, sigma=3.0)
    out = plain_cfg(d)

    def v(denoised):  # of the variance-preserving coordinates, α² + s² = 1
        alpha = 1 / math.sqrt(10)
        return alpha * step.eps(denoised) - 3 * alpha * denoised

    ratio = (v(d["cond"]).flatten(1).std(dim=1) / v(out).flatten(1).std(dim=1))[:, None, None, None]
    expected = v(out) * (0.7 * ratio + 0.3)
    torch.testing.assert_close(v(Rescale(0.7)(out, step)), expected)
    torch.testing.assert_close(Rescale(0.7, "eps")(out, step), rescale(out, d["cond"], step.x, 0.7))
    torch.testing.assert_close(Rescale(0.0)(out, step), out)
    torch.testing.assert_close(Rescale(1.0)(d["cond"], step), d["cond"])


def test_tag_is_its_step_in_the_papers_coordinates():
    d = branches()
    step, sigma, after = step_of(d, 2.0), 2.0, 1.2

    def scaled(x, s):
        return (x / math.sqrt(1 + s * s)).flatten(1)

    def euler(denoised):
        return step.x + (after - sigma) * step.eps(denoised)

    x, moved = scaled(step.x, sigma), scaled(euler(d["cond"]), after)
    radial = ((moved - x) * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
    expected = x + radial + 1.3 * (moved - x - radial)
    torch.testing.assert_close(scaled(euler(TAG(1.3)(d["cond"], step)), after), expected)
    assert torch.equal(TAG(1.0)(d["cond"], step), d["cond"])


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.0])
def test_tsr_formula_and_eps_scaling(sigma):
    d = branches()
    step = step_of(d, sigma)
    alphas = 1 / (1 + sigma**2)  # ᾱ
    ratio = (alphas * 9 + 1 - alphas) / (alphas * 9 / 0.93 + 1 - alphas)  # the official scheduler's
    torch.testing.assert_close(step.eps(TSR(0.93, 3.0)(d["cond"], step)), step.eps(d["cond"]) * ratio)
    torch.testing.assert_close(step.eps(TSR(1 / 1.005, math.inf)(d["cond"], step)), step.eps(d["cond"]) / 1.005)
    assert torch.equal(TSR(1.0)(d["cond"], step), d["cond"])


def test_momentum_formula_and_its_euler_step():
    run, mean = run_of(), None
    for i, sigma in enumerate(SIGMAS[:-1]):
        d = branches() | {"cond": latents(1) + 0.3 * latents(10 + i)}
        step = step_of(d, sigma, run=run)
        v = step.eps(d["cond"])
        mean = v if mean is None else mean
        out = Momentum()(d["cond"], step)
        torch.testing.assert_close(step.eps(out), v + 0.5 * (v - mean))
        mean = 0.4 * v + 0.6 * mean
    outside = step_of(branches(), 0.4, run=replace(run, sigmas=(0.4, 0.0)))
    assert torch.equal(Momentum()(branches()["cond"], outside), branches()["cond"])


def test_higs_formula():
    run, mean = run_of(), torch.zeros(())
    for i, sigma in enumerate(SIGMAS[:-1]):
        d = branches() | {"cond": latents(1) + 0.3 * latents(10 + i)}
        out = HiGS(eta=0.25)(d["cond"], step_of(d, sigma, run=run))
        t = sigma / (1 + sigma)
        rows = []
        for row, one in zip(d["cond"], d["cond"] - mean, strict=True):
            one = one - 0.75 * (one * row).sum() / (row * row).sum() * row
            weight = 1.75 * math.sqrt(max(t - 0.4, 0) / 0.6)
            rows.append(row + weight * high_pass(one[None], 0.05)[0])
        torch.testing.assert_close(out, torch.stack(rows) if i else d["cond"])
        mean = 0.75 * d["cond"] + 0.25 * mean


def test_high_pass_is_a_filter_of_the_dct():
    z = latents(1, 2, 5, 8)

    def dct(n):
        return torch.tensor([
            [math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi / n * (i + 0.5) * k) for i in range(n)]
            for k in range(n)
        ], dtype=torch.float64)  # fmt: skip

    spectrum = torch.einsum("ui,rcij,vj->rcuv", dct(5), z, dct(8))
    for u in range(5):
        for v in range(8):
            spectrum[:, :, u, v] /= 1 + math.exp(-50 * (math.hypot(u / 5, v / 8) - 0.2))
    expected = torch.einsum("ui,rcuv,vj->rcij", dct(5), spectrum, dct(8))
    torch.testing.assert_close(high_pass(z, 0.2), expected)
    torch.testing.assert_close(high_pass(z, -10.0), z)  # all passes, so DCT and its inverse are exact


def test_threshold_formula():
    z = 3 * latents(1)
    step = step_of(branches())
    limits = [max(1.0, float(torch.quantile(row.abs(), 0.9))) for row in flat(z)]
    expected = torch.stack([row.clamp(-t, t) / t for row, t in zip(z, limits, strict=True)])
    torch.testing.assert_close(Threshold(0.9)(z, step), expected)
    assert torch.equal(Threshold(bound=100.0)(z, step), z)
    for p in (0.0, 0.37, 1.0):
        torch.testing.assert_close(quantile(z.flatten(1), p)[:, 0], torch.quantile(z.flatten(1), p, dim=1))


# memory


def test_adaptive_stop_ends_images_one_by_one_and_then_the_term():
    run = run_of()
    shape = AdaptiveStop(cosine=0.9, space="denoised")
    far, near = latents(2), latents(1) + 1e-3 * latents(2)
    uncond = [
        torch.stack([far[0], far[1], near[2]]),
        torch.stack([far[0], near[1], far[2]]),
        torch.stack([near[0], far[1], far[2]]),
        far,
    ]
    moved = []
    for sigma, u in zip(SIGMAS, uncond, strict=False):
        d = {"cond": latents(1), "uncond": u}
        step = step_of(d, sigma, run=run)
        assert shape.stopped(step.past) == (sigma == 1.0)
        delta = shape(d["cond"], u, step)
        assert torch.equal(shape(d["cond"], u, step), delta)  # a second evaluation at a sigma
        difference = d["cond"] - u
        moved.append([torch.equal(a, b) and bool(b.any()) for a, b in zip(delta, difference, strict=True)])
    assert moved == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]
    without = step_of({"cond": latents(1), "uncond": near})
    assert torch.equal(shape(latents(1), near, without), latents(1) - near) and not shape.stopped(without.past)


def test_adaptive_stop_reads_the_cosine_of_eps():
    d = branches()
    step = step_of(d, 10.0, run=run_of())
    c, u = (step.eps(d[name]).flatten(1) for name in ("cond", "uncond"))
    cosine = torch.nn.functional.cosine_similarity(c, u)
    AdaptiveStop(cosine=float(cosine.sort().values[1]) - 1e-9, space="eps")(d["cond"], d["uncond"], step)
    state = Past(step.past.run, "method", 4.0).read()
    assert torch.equal(state.flatten(), cosine >= cosine.sort().values[1])


def test_sg_prev_is_the_change_of_the_prediction():
    run, before = run_of(), None
    for sigma in SIGMAS[:-1]:
        now = latents(1) / (1 + sigma)
        step = step_of({"cond": now}, sigma, run=run)
        delta = SGPrev()(now, now, step)
        assert torch.equal(delta, torch.zeros_like(now) if before is None else now - before)
        before = now


@pytest.mark.parametrize("method", [APG(norm=3.0), SMC(gain=0.05), SGPrev(), Momentum(), HiGS(), AdaptiveStop(0.9)])
def test_a_second_evaluation_at_a_sigma_starts_from_the_same_state(method):
    def outputs(evaluations):
        run, outs = run_of(), []
        for sigma in evaluations:
            d = {name: z + latents(int(sigma) + 30) for name, z in branches().items()}
            step = step_of(d, sigma, run=run)
            outs.append(method(d["cond"], step) if method in POSTS else guided(method, d, step))
        return outs

    once = outputs(SIGMAS[:-1])
    heun = outputs([10.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0])
    between = outputs([10.0, 7.0, 4.0, 3.0, 2.0, 1.5, 1.0])  # what is written between two sigmas is dropped
    for i, expected in enumerate(once):
        torch.testing.assert_close(heun[2 * i], expected)
        torch.testing.assert_close(between[2 * i], expected)


# limits


def test_shapes_with_nothing_to_do_are_cfg():
    d = branches()
    for shape in (
        APG(eta=1.0, norm=math.inf, momentum=0.0), FDG((1.0,)), MamboG(0.0), SMC(gain=0.0), PerpNeg(weight=0.0),
        AdaptiveStop(cosine=1.0),
    ):  # fmt: skip
        torch.testing.assert_close(guided(shape, d, step_of(d, run=run_of())), plain_cfg(d))
    off = APG(eta=1.0, norm=math.inf, momentum=0.0)
    assert torch.equal(off(d["cond"], d["uncond"], step_of(d)), d["cond"] - d["uncond"])


@pytest.mark.parametrize("shape", [*SHAPES_OF_TERMS, SMC(gain=0.0)], ids=repr)
def test_equal_branches_are_the_plain_prediction(shape):
    cond = latents(1)
    d = dict.fromkeys(("cond", "uncond", "negative"), cond)
    out = guided(shape, d, step_of(d, run=run_of()))
    if isinstance(shape, SMC) and shape.switch == "sign":
        assert torch.equal(out, cond)  # sign(0) = 0
    elif not isinstance(shape, Mimic):  # which holds even an equal prediction to the range of its own weight
        torch.testing.assert_close(out, cond)


@pytest.mark.parametrize("shape", SHAPES_OF_TERMS, ids=repr)
def test_a_scale_of_zero_is_the_plain_prediction(shape):
    d = branches()
    scale = torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)[:, None, None, None]
    out = guided(shape, d, replace(step_of(d, run=run_of()), scale=scale))
    assert torch.equal(out[::2], d["cond"][::2])
    torch.testing.assert_close(out[1], guided(shape, d, step_of(d, run=run_of()))[1])
    assert torch.equal(guided(shape, d, step_of(d, scale=0.0, run=run_of())), d["cond"])


def test_cfg_zero_holds_the_first_steps_still():
    shape = CFGZero(zero_steps=2)
    for sigma in SIGMAS[:-1]:
        d = branches()
        step = step_of(d, sigma, run=run_of())
        expected = step.x if sigma >= 4.0 else guided(CFGZero(), d, step)
        torch.testing.assert_close(guided(shape, d, step), expected)
    with pytest.raises(InputError, match="counts the sigmas of a run"):
        guided(shape, branches(), step_of(branches()))


# batches, dtypes


@pytest.mark.parametrize("method", [*SHAPES_OF_TERMS, *POSTS], ids=repr)
def test_an_image_does_not_depend_on_its_batch(method):
    outs = []
    for rows in (1, 3):
        run = replace(run_of(), keys=torch.arange(rows))
        for i, sigma in enumerate((10.0, 4.0)):
            d = {name: z + 0.2 * latents(10 + i + len(name), rows) for name, z in branches(rows).items()}
            step = step_of(d, sigma, run=run)
            out = method(plain_cfg(d), step) if method in POSTS else guided(method, d, step)
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1][:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [*SHAPES_OF_TERMS, *POSTS], ids=repr)
def test_half_precision_is_finite_and_near(method, dtype):
    outs = []
    for d_type in (torch.float64, dtype):
        run = run_of()
        for sigma in (10.0, 4.0):
            d = branches(h=16, w=24, dtype=d_type)
            step = step_of(d, sigma, run=run)
            out = method(plain_cfg(d), step) if method in POSTS else guided(method, d, step)
        outs.append(out)
    assert outs[1].isfinite().all() and outs[1].shape == outs[0].shape
    if dtype == torch.float32:
        torch.testing.assert_close(outs[1].double(), outs[0], atol=2e-4, rtol=2e-4)


def test_sums_of_large_half_precision_images_do_not_overflow():
    d = {name: 3 * z.half() for name, z in branches(1, 128, 128).items()}  # Σ z² is above 65504
    for shape in (APG(), ADG(), TCFG(), CFGZero(), MamboG()):
        assert guided(shape, d, step_of(d)).isfinite().all()


# scales


def test_cfgpp_is_an_euler_step_of_its_published_form():
    x, d = latents(7), branches()
    for sigma, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        term = cfg(PlusPlus(0.6))
        s = term.scale_at(sigma, run_of())
        D = d["cond"] + s * (d["cond"] - d["uncond"])
        euler = x + (after - sigma) * (x - D) / sigma
        guided_0 = d["uncond"] + 0.6 * (d["cond"] - d["uncond"])
        torch.testing.assert_close(euler, guided_0 + (x - d["uncond"]) * after / sigma)
    assert PlusPlus(0.6).in_run(1.0, run_of()) == 0.6
    assert "0.6·σ/(σ − σ′)" in str(cfg(PlusPlus()))


def test_cfgpp_names_what_it_cannot_do():
    with pytest.raises(InputError, match="only a run knows"):
        PlusPlus()(4.0)
    with pytest.raises(InputError, match="this run is heun"):
        PlusPlus().in_run(4.0, run_of("heun"))
    with pytest.raises(InputError, match="sigma 5 is not of the schedule"):
        PlusPlus().in_run(5.0, run_of())
    with pytest.raises(InputError):
        PlusPlus().in_run(4.0, run_of(sigmas=None))


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_stay_in_their_range_and_end_where_they_should(shape):
    schedule = Schedule(shape, high=9.0, low=1.0, exponent=2.0, sigma_max=10.0, sigma_min=0.1)
    sigmas = [10 ** (1 - i / 50) for i in range(101)]  # evenly in log σ, falling
    values = [schedule(s) for s in sigmas]
    assert all(1 - 1e-12 <= v <= 9 + 1e-12 for v in values)
    changes = [b - a for a, b in zip(values, values[1:], strict=False)]
    ends = (values[0], values[50], values[100])
    if shape == "constant":
        assert set(values) == {9.0}
    elif shape in ("beta", "triangle"):
        assert ends == pytest.approx((1, 9, 1))
        assert all(c > 0 for c in changes[:50]) and all(c < 0 for c in changes[50:])
        torch.testing.assert_close(torch.tensor(values), torch.tensor(values[::-1]))
    else:
        falls = shape in ("invlinear", "sine")
        middle = {"power": 3.0, "exponential": 3.0}.get(shape, 5.0)
        assert ends == pytest.approx((9, middle, 1) if falls else (1, middle, 9))
        assert all(c < 0 for c in changes) if falls else all(c > 0 for c in changes)
    assert schedule(1e9) == values[0] and schedule(0.0) == pytest.approx(values[-1])
    flat_one = replace(schedule, high=3.0, low=3.0)
    assert all(flat_one(s) == 3.0 for s in sigmas)


def test_schedules_of_their_papers():
    n = 1000
    evenly = [10 ** (1 - 2 * (i + 0.5) / n) for i in range(n)]

    def mean(schedule):
        return sum(map(schedule, evenly)) / n

    for shape in ("linear", "invlinear", "cosine", "sine", "triangle"):  # the mean stays w
        assert mean(Schedule(shape, 2 * W - 1, 1.0, sigma_max=10.0, sigma_min=0.1)) == pytest.approx(W, rel=1e-4)
    c2fg = Schedule("exponential", W * 2, W, sigma_max=10.0, sigma_min=0.1)
    assert c2fg(1.0) == pytest.approx(W * math.exp(math.log(2) * 0.5))
    assert mean(Schedule("beta", W * 1.5, 0.0, sigma_max=10.0, sigma_min=0.1)) == pytest.approx(W, rel=1e-4)
    assert cfg(Schedule("linear", 9.0, 1.0)).scale_at(1e9) == 0  # so the term costs nothing there
    assert "linear" in str(cfg(Schedule()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: APG(norm=-1), lambda: APG(momentum=1.0), lambda: APG(eta=math.nan), lambda: CFGZero(-1),
        lambda: FDG(()), lambda: MamboG(-1), lambda: ADG(91), lambda: Mimic(percentile=2), lambda: SMC(gain=-1),
        lambda: SMC(switch="both"), lambda: PerpNeg("negative"), lambda: PerpNeg(weight=-1),
        lambda: AdaptiveStop(2), lambda: AdaptiveStop(space="v"), lambda: Rescale(2), lambda: Rescale(space="x"),
        lambda: TAG(-1), lambda: TSR(0), lambda: TSR(spread=0), lambda: Momentum(beta=2), lambda: Momentum(low=30),
        lambda: HiGS(t_min=1.0), lambda: HiGS(weight=math.inf), lambda: Threshold(2), lambda: Threshold(bound=0),
        lambda: PlusPlus(-1), lambda: Schedule("wave"), lambda: Schedule(sigma_min=20.0),
        lambda: Schedule(high=math.inf), lambda: Schedule("exponential", low=0.0), lambda: Schedule(exponent=-1.0),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(make):
    with pytest.raises(InputError):
        make()


# through the guided denoiser and a sampler


def tiny(terms, **options) -> GuidedDenoiser:
    return GuidedDenoiser(denoiser(), terms, **options)


def sampled(model, conds, steps: int = 4, sampler: str = "euler", rows: int = 2) -> torch.Tensor:
    noise = torch.cat([latents(5, rows, 8, 12)])
    return sample(model, noise, sampler, "leading", steps, conds=conds, seeds=list(range(rows)))


@pytest.mark.parametrize("method", [*SHAPES_OF_TERMS, *POSTS], ids=repr)
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_every_combination_samples_and_an_image_does_not_depend_on_its_batch(method, sampler):
    conds = noisy(2)[2] | {"negative": noisy(2)[2]["uncond"]}
    neg = "cond" if isinstance(method, SGPrev) else "uncond"
    shape, post = (None, [method]) if method in POSTS else (method, [])
    model = tiny({"cfg": cfg(W, neg=neg, shape=shape)}, post=post)
    both = sampled(model, conds, 3, sampler)
    one = sampled(model, {name: cond[:1] for name, cond in conds.items()}, 3, sampler, 1)
    assert both.isfinite().all()
    torch.testing.assert_close(one, both[:1], atol=1e-6, rtol=1e-6)
    assert not torch.equal(both, sampled(tiny({"cfg": cfg(W)}), conds, 3, sampler))


def test_cfgpp_sampled_is_its_published_loop():
    _, _, conds = noisy(2)
    out = sampled(tiny({"cfg": cfg(PlusPlus(0.6))}), conds)
    sigmas = schedule_sigmas(denoiser(), "leading", 4).double()
    x = latents(5, 2, 8, 12) * start_scale(sigmas, "leading")
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        c, u = (denoiser()(x, now.expand(2), cond=conds[name]) for name in ("cond", "uncond"))
        x = u + 0.6 * (c - u) + (x - u) * after / now
    torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="this run is heun"):
        sampled(tiny({"cfg": cfg(PlusPlus())}), conds, sampler="heun")


@pytest.mark.parametrize(
    "terms", [{}, {"cfg": cfg(W)}, {"cfg": cfg(W, shape=APG(norm=3.0))}], ids=["plain", "cfg", "apg"]
)
def test_z_sampling_on_euler_is_the_zigzag_written_out(terms):
    _, _, conds = noisy(2)
    out = sampled(ZSampling(tiny(terms)), conds)
    sigmas = schedule_sigmas(denoiser(), "leading", 4).double()
    run = Run(torch.arange(2), "euler", tuple(sigmas.tolist()))
    inner, base = tiny(terms), "uncond" if terms else "cond"
    x = latents(5, 2, 8, 12) * start_scale(sigmas, "leading")
    for now, after in zip(sigmas, sigmas[1:], strict=False):

        def forward(z, now=now, after=after):
            return z + (after - now) * (z - inner(z, now.expand(2), conds, run=run)) / now

        if after > 0:
            lower = forward(x)
            x = lower + (now - after) * (lower - denoiser()(lower, after.expand(2), cond=conds[base])) / after
        x = forward(x)
    torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-6)


def test_z_sampling_names_what_it_needs():
    x, sigma, conds = noisy(2)
    model = ZSampling(tiny({}))
    with pytest.raises(InputError, match="only a run knows"):
        model(x, sigma, conds)
    with pytest.raises(InputError, match="not of the schedule|evaluates between"):
        sampled(model, conds, sampler="dpm_2")
    torch.testing.assert_close(sampled(ZSampling(tiny({}), interval=(99.0, 99.0)), conds), sampled(tiny({}), conds))
    assert "zigzag" in repr(model)
