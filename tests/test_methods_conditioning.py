"""Conditionings made from others, and weak branches that are no attention in the guided denoiser."""

import copy
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from fake_cuda import check_same, fake_cuda, sent
from guidance_models import CONFIG, denoiser, noisy
from layer_calls import KEYS

from segresearch.errors import InputError
from segresearch.guidance import GuidedDenoiser, cfg, perturbed, select_sites
from segresearch.guidance.methods.cads import CADS, time
from segresearch.guidance.methods.cdg import CDG
from segresearch.guidance.methods.erg_text import ERGText
from segresearch.guidance.methods.icg import ICG
from segresearch.guidance.methods.icg_text import ICGText
from segresearch.guidance.methods.image_size import ImageSize
from segresearch.guidance.methods.prompt import Prompt
from segresearch.guidance.methods.s2_guidance import S2
from segresearch.guidance.methods.self_guidance import SelfGuidance
from segresearch.guidance.methods.slg import SLG
from segresearch.guidance.methods.ssg import SSG
from segresearch.guidance.methods.swg import SWG, Overlap
from segresearch.guidance.methods.tpg import TPG
from segresearch.guidance.methods.tsg import TSG
from segresearch.guidance.methods.weak import Weak
from segresearch.guidance.step import Step
from segresearch.models import load_model
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet
from segresearch.sampling import draws, initial_noise, sample
from segresearch.sampling.memory import Run

PROMPTS = ["a red sphere left of a blue cube", "", "two green cones"]


# --- conditionings ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return load_model("mini")


def test_cdg_replaces_the_words_and_keeps_padding_and_pooled(mini):
    conds = mini.encode(PROMPTS, negative="")
    degraded = CDG().encode(mini, PROMPTS)
    tokenizer = mini.text.tokenizers[0]
    for i, prompt in enumerate(PROMPTS):
        content = len(tokenizer(prompt).input_ids)  # begin, words, end
        assert torch.equal(degraded.context[i, :content], conds["uncond"].context[i, :content])
        assert torch.equal(degraded.context[i, content:], conds["cond"].context[i, content:])
    assert torch.equal(degraded.pooled, conds["cond"].pooled) and torch.equal(degraded.time_ids, conds["cond"].time_ids)
    assert not torch.equal(degraded.context, conds["cond"].context)
    torch.testing.assert_close(degraded.context[1], conds["cond"].context[1])  # of "" nothing changes
    torch.testing.assert_close(CDG().encode(mini, PROMPTS[:1]).context, degraded.context[:1])
    other = CDG().encode(mini, PROMPTS[:1], negative="two green cones")
    assert not torch.equal(other.context, degraded.context[:1])


def test_cdg_of_a_prompt_without_padding_is_the_empty_text(mini):
    prompt = ["red " * 60]
    with pytest.warns(UserWarning, match="cut off"):
        degraded = CDG().encode(mini, prompt)
    assert torch.equal(degraded.context, mini.encode([""])["cond"].context)


def test_a_prompt_of_its_own_and_another_size(mini):
    cond = Prompt("a blue cube").encode(mini, PROMPTS, size=(64, 96))
    expected = mini.encode(["a blue cube"], size=(64, 96))["cond"].expand(3)
    assert cond.equals(expected)
    small = ImageSize(factor=0.5)({"cond": cond})
    assert small.time_ids[0].tolist() == [32, 48, 0, 0, 64, 96] and cond.time_ids[0].tolist() == [64, 96, 0, 0, 64, 96]
    assert torch.equal(small.context, cond.context)
    assert ImageSize(factor=1)({"cond": cond}).equals(cond)


@torch.no_grad()
def test_erg_multiplies_the_logits_of_the_text_encoders(mini):
    before = [p.clone() for encoder in mini.text.encoders for p in encoder.parameters()]
    cond = mini.encode(PROMPTS)["cond"]
    tempered = ERGText(0.4).encode(mini, PROMPTS)
    assert all(map(torch.equal, before, (p for encoder in mini.text.encoders for p in encoder.parameters())))
    changed = copy.deepcopy(mini.text)
    for encoder in changed.encoders:
        for name, module in encoder.named_modules():
            if name.endswith("self_attn"):
                module.scale = 0.4 * module.scale  # the encoder's own factor on the logits
    expected = replace(mini, text=changed).encode(PROMPTS)["cond"]
    torch.testing.assert_close(tempered.context, expected.context)
    torch.testing.assert_close(tempered.pooled, expected.pooled)
    assert (tempered.context - cond.context).abs().max() > 1e-2
    assert ERGText(1.0).encode(mini, PROMPTS).equals(cond)
    offloaded = replace(mini, compute=replace(mini.compute, offload=True))
    assert ERGText(0.4).encode(offloaded, PROMPTS).equals(tempered)


def test_icg_text_is_random_and_keyed_by_the_prompt(mini):
    cond = ICGText().encode(mini, PROMPTS)
    torch.testing.assert_close(ICGText().encode(mini, PROMPTS[2:]).context, cond.context[2:])
    assert not torch.equal(cond.context[0], cond.context[1])
    assert not torch.equal(ICGText(seed=1).encode(mini, PROMPTS).context, cond.context)
    assert not torch.equal(mini.encode(PROMPTS)["cond"].context, cond.context)
    assert cond.pooled.isfinite().all() and cond.time_ids.shape == (3, 6)


def made(rows: int = 3, dtype=torch.float32) -> Cond:
    cond = noisy(rows)[2]["cond"]
    return Cond(2 * cond.context.to(dtype) + 1, 3 * cond.pooled.to(dtype), cond.time_ids)


def test_icg_is_noise_of_the_texts_spread():
    cond, sigma = made(), torch.full((3,), 2.0)
    random = ICG()({"cond": cond}, sigma, KEYS)
    for i in range(3):
        n = draws.normal(KEYS[i : i + 1], sigma[:1], "icg/context", cond.context[0].numel())
        torch.testing.assert_close(random.context[i].flatten(), n[0] * cond.context[i].std())
        n = draws.normal(KEYS[i : i + 1], sigma[:1], "icg/pooled", 16)
        torch.testing.assert_close(random.pooled[i], n[0] * cond.pooled[i].std())
    assert torch.equal(random.time_ids, cond.time_ids)


def gamma_of(t: float) -> float:
    return min(1.0, max(0.0, (0.9 - t) / 0.3))


def test_cads_is_the_papers_formula():
    cond = made(3, torch.float64)
    sigma = denoiser().t_to_sigma(torch.tensor([650.0, 850.0, 990.0]))
    torch.testing.assert_close(time(sigma), torch.tensor([0.65, 0.85, 0.99]), rtol=0, atol=1e-5)
    for psi in (0.0, 0.7, 1.0):
        noised = CADS(psi=psi)({"cond": cond}, sigma, KEYS)
        for name in ("context", "pooled"):
            for i, t in enumerate((0.65, 0.85, 0.99)):
                c = getattr(cond, name)[i]
                n = draws.normal(KEYS[i : i + 1], sigma[i : i + 1], f"cads/cond/{name}", c.numel()).view(c.shape)
                gamma = gamma_of(t)
                y = math.sqrt(gamma) * c + 0.25 * math.sqrt(1 - gamma) * n
                rescaled = (y - y.mean()) / y.std() * c.std() + c.mean()
                expected = psi * rescaled + (1 - psi) * y
                torch.testing.assert_close(getattr(noised, name)[i], expected, rtol=0, atol=1e-4)


def test_cads_leaves_the_text_alone_late_in_a_run():
    cond = made()
    late = denoiser().t_to_sigma(torch.tensor([600.0, 300.0, 0.0])) * 0.9999
    noised = CADS()({"cond": cond}, late, KEYS)
    assert torch.equal(noised.context, cond.context) and torch.equal(noised.pooled, cond.pooled)
    assert CADS(s=0, psi=0)({"cond": cond}, late, KEYS).equals(cond)
    zeros = Cond(0 * cond.context, 0 * cond.pooled, cond.time_ids)
    assert CADS()({"cond": zeros}, torch.full((3,), 14.0), KEYS).equals(zeros)


@pytest.mark.parametrize("method", [CADS(), ICG()], ids=lambda m: m.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_made_conditionings_do_not_depend_on_the_batch(method, dtype):
    cond, sigma = made(3, dtype), torch.full((3,), 9.0)
    whole = method({"cond": cond}, sigma, KEYS)
    alone = method({"cond": cond[[1]]}, sigma[1:2], KEYS[1:2])
    assert whole.context.dtype == dtype and whole.context.isfinite().all()
    torch.testing.assert_close(whole.context[1:2], alone.context)
    assert not torch.equal(whole.context, method({"cond": cond}, sigma + 1, KEYS).context)
    one = method({"cond": cond[[0]]}, sigma, KEYS)  # one row for all images
    assert one.rows == 3 and not torch.equal(one.context[0], one.context[1])
    shared = replace(method, shared=True)({"cond": cond[[0]]}, sigma, KEYS)
    assert torch.equal(shared.context[0], shared.context[1])
    assert method({"cond": cond}, sigma, None).equals(replace(method, shared=True)({"cond": cond}, sigma, KEYS))


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SSG(tokens=0.6), r"SSG tokens must be in \[0, 0.5\], got 0.6"),
        (lambda: SLG(layers=[]), r"SLG layers must be a list of any of attn1, attn2, ff, got \[\]"),
        (lambda: SLG(layers="attn1"), "got 'attn1'"),
        (lambda: S2(share=1.5), r"S2 share must be in \[0, 1\], got 1.5"),
        (lambda: TPG(where=True), "where=True: a selector is a text"),
        (lambda: TSG(strength=-1), "TSG strength and alpha must be >= 0"),
        (lambda: SelfGuidance(delta=-1), "SelfGuidance delta and last must be >= 0"),
        (lambda: SWG(0.3, 2), r"SWG\(crop=0.3, per_side=2\): 2 crops a side of 0.3 of it do not cover the image"),
        (lambda: SWG(0.5, 1), "do not cover the image"),
        (lambda: Weak(""), "Weak needs the name of a network"),
        (lambda: CADS(tau1=0.9, tau2=0.6), "CADS needs 0 <= tau1 < tau2"),
        (lambda: ERGText(-1), "ERGText tau must be a finite number >= 0, got -1"),
        (lambda: ImageSize(factor=0), "ImageSize factor must be > 0, got 0"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_equal_methods_compare_and_hash_equal():
    for make in (TPG, SSG, SLG, S2, TSG):
        assert make(where=["mid", "up"]) == make(where=("mid", "up")) and hash(make(where=["mid"])) == hash(
            make(where=("mid",))
        )
    assert SLG(layers=["ff"]) == SLG(layers=("ff",))
    with pytest.raises(FrozenInstanceError):
        TPG().shared = True
    assert repr(SWG()) == "SWG(crop=0.625, per_side=2)" and repr(Weak()) == "Weak(network='weak')"


# --- in the guided denoiser ----------------------------------------------------------------------------------


def guided(perturbation, **options) -> GuidedDenoiser:
    return GuidedDenoiser(denoiser(), {"cfg": cfg(3.0), "m": perturbed("m", perturbation, 2.0)}, **options)


IN_UNET = [
    TPG("down.2"),
    SSG("up.0"),
    SLG(["mid", "up"]),
    SLG("down.0", layers=["attn1"]),
    S2(share=0.5),
    TSG(),
    SelfGuidance(),
]
ALL = [*IN_UNET, SWG()]


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.kind)
@torch.no_grad()
def test_the_fork_is_exact_and_an_image_does_not_depend_on_its_batch(method):
    x, sigma, conds = noisy(3)
    run = Run(KEYS, sigmas=(3.0, 0.0))
    model = guided(method)
    out = model(x, sigma, conds, run=run)
    assert (out - GuidedDenoiser(denoiser(), {"cfg": cfg(3.0)})(x, sigma, conds)).abs().max() > 1e-3
    torch.testing.assert_close(out, guided(method, fork=False)(x, sigma, conds, run=run), rtol=0, atol=1e-10)
    one = Run(KEYS[1:2], sigmas=(3.0, 0.0))
    alone = model(x[1:2], sigma[1:2], {name: cond[[1]] for name, cond in conds.items()}, run=one)
    torch.testing.assert_close(out[1:2], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", IN_UNET, ids=lambda m: m.kind)
@torch.no_grad()
def test_a_branch_is_the_call_of_the_network_under_the_perturbation(method):
    x, sigma, conds = noisy(3)
    net = denoiser()
    chosen = select_sites(method.where, tuple(net.unet.sites_by_kind[method.site_kind]), method.site_kind)

    def wrap(call, h, site):
        return method(h, site._replace(keys=KEYS, sigma=sigma), call) if site.name in chosen else call(h)

    c, u, weak = net(x, sigma, conds["cond"]), net(x, sigma, conds["uncond"]), net(x, sigma, conds["cond"], wrap=wrap)
    out = guided(method)(x, sigma, conds, run=Run(KEYS, sigmas=(3.0, 0.0)))
    torch.testing.assert_close(out, c + 2 * (c - u) + 2 * (c - weak), rtol=0, atol=1e-10)


@torch.no_grad()
def test_swg_is_the_network_on_crops():
    x, sigma, conds = noisy(2, 16, 16)
    net, view, terms = denoiser(), SWG(), {"m": perturbed("m", SWG(), 2.0)}
    crops = [net(part, sigma, conds["cond"]) for part in view.split(x).chunk(4)]
    c, weak = net(x, sigma, conds["cond"]), view.join(torch.cat(crops), x)
    out = GuidedDenoiser(net, terms)(x, sigma, conds)
    torch.testing.assert_close(out, c + 2 * (c - weak), rtol=0, atol=1e-10)
    masked = GuidedDenoiser(net, {"m": replace(terms["m"], shape=Overlap())})(x, sigma, conds)
    inner = torch.zeros(16, 16, dtype=torch.bool)
    inner[6:10], inner[:, 6:10] = True, True
    torch.testing.assert_close(masked, torch.where(inner, out, c), rtol=0, atol=1e-10)


@torch.no_grad()
def test_autoguidance_has_a_second_network():
    x, sigma, conds = noisy(2)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        weak = Denoiser(UNet(CONFIG).double().eval().requires_grad_(False), alphas_cumprod({}))
    model = GuidedDenoiser(denoiser(), {"m": perturbed("m", Weak("small"), 2.0)}, networks={"small": weak})
    c = denoiser()(x, sigma, conds["cond"])
    expected = c + 2 * (c - weak(x, sigma, conds["cond"]))
    torch.testing.assert_close(model(x, sigma, conds), expected, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="no network 'weak' in `networks`; there are 'small'"):
        GuidedDenoiser(denoiser(), {"m": perturbed("m", Weak(), 2.0)}, networks={"small": weak})


@torch.no_grad()
def test_cads_takes_the_place_of_both_conditionings_and_icg_that_of_none():
    x, sigma, conds = noisy(3, sigma=9.0)
    run = Run(KEYS, sigmas=(9.0, 0.0))
    noise = {name: CADS(of=name) for name in ("cond", "uncond")}
    c, u = (denoiser()(x, sigma, make(conds, sigma, KEYS)) for make in noise.values())
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0)}, conditionings=noise)
    torch.testing.assert_close(model(x, sigma, conds, run=run), u + 3 * (c - u), rtol=0, atol=1e-10)
    c, u = (denoiser()(x, sigma, cond) for cond in (conds["cond"], ICG()(conds, sigma, KEYS)))
    model = GuidedDenoiser(denoiser(), {"icg": cfg(3.0, neg="random")}, conditionings={"random": ICG()})
    torch.testing.assert_close(model(x, sigma, conds, run=run), u + 3 * (c - u), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_several_methods_at_once_in_any_sampler(sampler):
    """Block, embedding, view and conditioning together: finite, and an image does not depend on its batch."""
    terms = {"cfg": cfg(3.0)} | {m.kind: perturbed(m.kind, m, 0.5) for m in (TPG(), S2(), TSG(), SWG())}
    model = GuidedDenoiser(denoiser(), terms, conditionings={"cond": CADS(), "uncond": ImageSize(of="uncond")})
    conds, noise = noisy(2)[2], initial_noise([3, 4], (4, 8, 12)).double()
    both = sample(model, noise, sampler=sampler, steps=3, conds=conds, seeds=[3, 4])
    alone = sample(model, noise[1:], sampler=sampler, steps=3, conds={n: c[[1]] for n, c in conds.items()}, seeds=[4])
    assert both.isfinite().all()
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", [CADS(), ICG(), ImageSize()], ids=lambda m: m.kind)
def test_conditionings_and_crops_stay_on_the_device(method):
    cond, sigma, x = made(), torch.full((3,), 9.0), torch.randn(3, 4, 8, 12)
    expected = method({"cond": cond}, sigma, KEYS)
    step = Step(x, sigma, {})
    joined, masked = SWG().join(SWG().split(x), x), Overlap()(x, 0 * x, step)
    with fake_cuda() as mode:
        there, s, keys, z = sent((cond, sigma, KEYS, x))
        method({"cond": there}, s, keys)  # constants are sent once
        mode.reads, mode.sends = [], []
        out = method({"cond": there}, s, keys)
        check_same((out.context, out.pooled, out.time_ids), (expected.context, expected.pooled, expected.time_ids))
        check_same(SWG().join(SWG().split(z), z), joined)
        check_same(Overlap()(z, 0 * z, step), masked)
        assert mode.reads == mode.sends == []
