"""Shapes of terms, post-processors and scales: the published code or its formula, limits, conventions, batches, dtypes.

A shape is called with bare tensors, as `c + s·shape(c, u)`, s = w − 1, in denoised space or, at x and σ, in eps.
"""

import math
from dataclasses import replace

import pytest
import torch
from combinations import POSTS, SHAPES_OF_TERMS, SIGMAS, W, branches, guided, latents, plain_cfg, run_of, step_of
from guidance_models import denoiser, noisy

from segresearch.errors import InputError
from segresearch.guidance import GuidedDenoiser
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
from segresearch.guidance.methods.thresholding import Threshold
from segresearch.guidance.methods.tsr import TSR
from segresearch.guidance.methods.weight_schedules import SHAPES, Schedule
from segresearch.guidance.methods.zigzag import ZSampling
from segresearch.guidance.terms import cfg
from segresearch.sampling import sample
from segresearch.sampling.memory import Past, Run
from segresearch.sampling.schedules import sigmas as schedule_sigmas
from segresearch.sampling.schedules import start_scale

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
