"""Ways to combine branches against published code and against their formulas, written out."""

import math
from dataclasses import replace

import pytest
import torch
from combinations import SIGMAS, W, branches, flat, guided, in_eps, latents, plain_cfg, run_of, step_of
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    TangentialClassifierFreeGuidance,
)

from segresearch.errors import InputError
from segresearch.guidance.frequencies import high_pass
from segresearch.guidance.methods.adg import ADG
from segresearch.guidance.methods.apg import APG
from segresearch.guidance.methods.cfg_zero import CFGZero
from segresearch.guidance.methods.fdg import FDG
from segresearch.guidance.methods.higs import HiGS
from segresearch.guidance.methods.mambo import MamboG
from segresearch.guidance.methods.mimic import Mimic
from segresearch.guidance.methods.momentum import Momentum
from segresearch.guidance.methods.perp_neg import PerpNeg
from segresearch.guidance.methods.rescaled import Rescale
from segresearch.guidance.methods.smc import SMC
from segresearch.guidance.methods.tag import TAG
from segresearch.guidance.methods.tcfg import TCFG
from segresearch.guidance.methods.thresholding import Threshold, quantile
from segresearch.guidance.methods.tsr import TSR
from segresearch.guidance.postprocess import Projected, rescale

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
