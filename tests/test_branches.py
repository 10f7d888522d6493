"""Branches perturbed anywhere: blocks, feed-forwards, the embedding of t, cross-attention, views, other networks;
conditionings made from others."""

from dataclasses import dataclass, replace

import pytest
import torch
from branches_alone import (
    Halves,
    Other,
    Scaled,
    alone,
    close,
    doubled,
    flipped,
    halved,
    later,
    sharper,
    without_attention,
)
from guidance_models import CONFIG, control_image, control_net, denoiser, noisy

from segresearch.analysis.recorder import Recorder
from segresearch.guidance import (
    SEG,
    At,
    Branch,
    GuidedDenoiser,
    SelfAttentionGuidance,
    Term,
    cfg,
    perturbed,
)  # fmt: skip
from segresearch.guidance.methods.cfgpp import PlusPlus
from segresearch.models.attention import sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import controlled
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet
from segresearch.sampling import sample

PERTURBATIONS = {
    "block": [At(flipped, where="mid.0.1", site_kind="block")],
    "block, a layer left out": [At(without_attention, where=["down.2", "up.0"], site_kind="block")],
    "feed-forward": [At(halved, where="up", site_kind="ff")],
    "embedding": [At(later, where="*", site_kind="embedding")],
    "cross": [At(sharper, where="mid", site_kind="cross")],
    "cross, a head": [At(doubled, where="down", heads=[1], site_kind="cross")],
    "everything": [
        At(later, where="*", site_kind="embedding"),
        At(flipped, where="mid", site_kind="block"),
        At(halved, where="*", site_kind="ff"),
        At(sharper, where="*", site_kind="cross"),
        SEG(1.0, where="mid"),
    ],
    "two on a block": [
        At(flipped, where="mid", site_kind="block"),
        At(without_attention, where="mid", site_kind="block"),
    ],
}


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("name", PERTURBATIONS)
@torch.no_grad()
def test_a_branch_perturbed_anywhere_is_its_own_forward(name, fork):
    perturbations = PERTURBATIONS[name]
    x, sigma, conds = noisy(3)
    inner = denoiser()
    terms = {"cfg": cfg(3.0), "p": perturbed("p", perturbations, 2.0), "seg": perturbed("seg", SEG(where="up"), 1.0)}
    cond, uncond = (inner(x, sigma, cond=conds[n]) for n in ("cond", "uncond"))
    weak, seg = (alone(inner, x, sigma, conds["cond"], p) for p in (perturbations, [SEG(where="up")]))
    assert (weak - cond).abs().max() > 1e-4
    expected = cond + 2 * (cond - uncond) + 2 * (cond - weak) + (cond - seg)
    close(GuidedDenoiser(inner, terms, fork=fork)(x, sigma, conds=conds), expected)
    close(
        GuidedDenoiser(inner, terms, fork=fork)(x[1:2], sigma[1:2], {n: c[[1]] for n, c in conds.items()}),
        expected[1:2],
    )


@torch.no_grad()
def test_a_perturbed_block_costs_no_rows_that_it_leaves_out():
    rows = []

    def record(q, k, v, site):
        if "mid" in site.name:
            rows.append((site.kind, site.name[-7:-6], len(q), site.branches))
        return sdpa(q, k, v, site)

    x, sigma, conds = noisy(2)
    skip = At(lambda h, site, call: h, where="mid.0.1", site_kind="block")
    GuidedDenoiser(denoiser(), {"skip": perturbed("skip", skip, 1.0)})(x, sigma, conds, attend=record)
    both = (("cond",), ("cond~skip",))
    assert rows == [
        ("self", "0", 2, (("cond", "cond~skip"),)), ("cross", "0", 2, (("cond", "cond~skip"),)),
        ("self", "1", 2, (("cond",),)), ("cross", "1", 2, (("cond",),)),
        ("self", "2", 4, both), ("cross", "2", 4, both),
    ]  # fmt: skip


@torch.no_grad()
def test_every_branch_or_those_of_one_conditioning():
    x, sigma, conds = noisy(2)
    inner, sharp = denoiser(), At(sharper, where="mid", site_kind="cross")
    plain = {n: inner(x, sigma, cond=c) for n, c in conds.items()}
    changed = {n: alone(inner, x, sigma, c, [sharp]) for n, c in conds.items()}
    for name, d in (("*", changed), ("cond", plain | {"cond": changed["cond"]})):
        model = GuidedDenoiser(inner, {"cfg": cfg(3.0)}, every={name: [sharp]})
        close(model(x, sigma, conds), d["cond"] + 2 * (d["cond"] - d["uncond"]))
        assert f"every branch on {name}: sharper" in str(model)
    same = {"cond": conds["cond"], "uncond": conds["cond"]}  # of equal values, but perturbed in different ways
    model = GuidedDenoiser(inner, {"cfg": cfg(3.0)}, every={"cond": [sharp]})
    close(model(x, sigma, **model.prepare({"conds": same})), changed["cond"] + 2 * (changed["cond"] - plain["cond"]))


@torch.no_grad()
def test_conditionings_made_from_others_once_or_at_every_evaluation():
    x, sigma, conds = noisy(2)
    inner = denoiser()
    Scaled.calls.clear()
    makers = {"half": Scaled("cond", 0.5), "noisy": Scaled("cond"), "uncond": Scaled("uncond", 2.0)}
    terms = {"half": Term(Branch("cond"), Branch("half"), 1.0), "n": Term(Branch("cond"), Branch("noisy"), 1.0)}
    model = GuidedDenoiser(inner, {**terms, "cfg": cfg(2.0)}, conditionings=makers)
    d = {"cond": inner(x, sigma, cond=conds["cond"])}
    for name, factor in (("half", 0.5), ("noisy", sigma[:, None, None]), ("uncond", 2.0)):
        cond = conds["uncond" if name == "uncond" else "cond"]
        d[name] = inner(x, sigma, cond=Cond(cond.context * factor, cond.pooled, cond.time_ids))
    expected = 4 * d["cond"] - d["half"] - d["noisy"] - d["uncond"]
    close(model(x, sigma, conds), expected)
    prepared = model.prepare({"conds": conds})
    Scaled.calls.clear()
    close(model(x, sigma, **prepared), expected)
    close(model(x, sigma, **prepared), expected)
    assert Scaled.calls == ["cond", "cond"]  # the one that follows sigma alone
    with pytest.raises(ValueError, match="conds lacks 'weak', which the guidance needs; given: 'cond', 'uncond'"):
        GuidedDenoiser(inner, {"t": Term(Branch("cond"), Branch("weak"), 1.0)})(x, sigma, conds)


@dataclass(frozen=True)
class Whole(Halves):
    def split(self, z):
        return z

    def join(self, denoised, like):
        return denoised


@torch.no_grad()
def test_a_view_is_a_forward_of_its_own():
    x, sigma, conds = noisy(2, w=16)
    inner = denoiser()
    image = control_image(2, 8, 16)
    net = control_net()
    hint = net.embed_image(image)
    halves = [slice(0, 8), slice(8, 16)]

    def crops(cond, perturbations=(), steered=False):
        parts = []
        for half in halves:
            part = x[..., half]
            more = {"residuals": inner.residuals(part, sigma, cond, net, hint[..., half])} if steered else {}
            parts.append(alone(inner, part, sigma, cond, perturbations, **more))
        return torch.cat(parts, dim=3)

    plain = {n: inner(x, sigma, cond=c) for n, c in conds.items()}
    terms = {"view": perturbed("view", Halves(), 2.0), "cfg": cfg(2.0)}
    guided = GuidedDenoiser(inner, terms)
    close(guided(x, sigma, conds), 4 * plain["cond"] - 2 * crops(conds["cond"]) - plain["uncond"])
    assert "rows per image: 2, and 1 in a forward of its own, each Halves()" in str(guided)
    both = GuidedDenoiser(inner, {"view": perturbed("both", [Halves(), SEG(1.0)], 1.0)})
    close(both(x, sigma, conds), 2 * plain["cond"] - crops(conds["cond"], [SEG(1.0)]))
    steered = inner(x, sigma, cond=conds["cond"], residuals=inner.residuals(x, sigma, conds["cond"], net, hint))
    guided = GuidedDenoiser(inner, {"view": perturbed("view", Halves(), 2.0)})
    out = guided(x, sigma, conds, [controlled(net, image)])
    close(out, 3 * steered - 2 * crops(conds["cond"], steered=True))
    whole = GuidedDenoiser(inner, {"view": perturbed("view", Whole(), 2.0)})
    close(whole(x, sigma, conds), plain["cond"])
    with pytest.raises(ValueError, match="two views or two networks"):
        GuidedDenoiser(inner, {"t": perturbed("t", [Halves(), Whole()], 1.0)})


@torch.no_grad()
def test_a_branch_of_another_network_with_its_own_sites():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        small = UNet(replace(CONFIG, transformer_layers_per_block=(1, 1, 1))).double().eval().requires_grad_(False)
    weak = Denoiser(small, alphas_cumprod({}))
    x, sigma, conds = noisy(2)
    inner = denoiser()
    plain, bad = (net(x, sigma, cond=conds["cond"]) for net in (inner, weak))
    model = GuidedDenoiser(inner, {"ag": perturbed("ag", Other(), 1.5)}, networks={"weak": weak})
    close(model(x, sigma, conds), plain + 1.5 * (plain - bad))
    close(
        sample(model, noisy(2, sigma=1.0)[0], steps=2, conds=conds),
        sample(model, noisy(2, sigma=1.0)[0], steps=2, conds=conds),
    )
    seg = alone(weak, x, sigma, conds["cond"], [SEG(where="mid")])
    model = GuidedDenoiser(inner, {"ag": perturbed("ag", [Other(), SEG()], 1.0)}, networks={"weak": weak})
    close(model(x, sigma, conds), plain + (plain - seg))
    assert "SEG(sigma=inf, where='mid', heads=None, on='q', boundary='reflect') at 1 of" in str(model)
    with pytest.raises(ValueError, match="no network 'weak' in `networks`; there are none"):
        GuidedDenoiser(inner, {"ag": perturbed("ag", Other(), 1.5)})


# --- shapes ----------------------------------------------------------------------------------------


def test_shapes_of_terms():
    x, sigma, conds = noisy(2)
    inner = denoiser()
    plain, uncond = (inner(x, sigma, cond=conds[n]) for n in ("cond", "uncond"))

    def same(pos, neg, step):
        assert step.denoised.keys() == {"cond", "uncond"} and step.plain is pos and step.scale == 2.0
        close(step.x - step.noise_level * step.eps(pos), pos)
        return pos - neg

    close(GuidedDenoiser(inner, {"cfg": cfg(3.0, shape=same)})(x, sigma, conds), plain + 2 * (plain - uncond))
    assert "2·same(D[cond] − D[uncond])" in str(GuidedDenoiser(inner, {"cfg": cfg(3.0, shape=same)}))
    own = Term(Branch("cond"), Branch("cond"), 0.5, shape=lambda pos, neg, step: pos)
    close(GuidedDenoiser(inner, {"own": own})(x, sigma, conds), 1.5 * plain)

    class Stopped:
        conditionings = ("third",)

        def __call__(self, pos, neg, step):
            return step.denoised["third"]

        def stopped(self, past):
            return past.sigma < 1

    conds["third"] = conds["uncond"]
    model = GuidedDenoiser(inner, {"t": Term(Branch("cond"), Branch("cond"), 1.0, shape=Stopped())})
    close(model(x, sigma, conds), plain + uncond)
    low = torch.full_like(sigma, 0.5)
    assert model.branches(0.5) == [Branch("cond")]
    close(model(x, low, conds), inner(x, low, cond=conds["cond"]))


@torch.no_grad()
def test_cross_attention_is_recorded_too():
    x, sigma, conds = noisy(2)
    sites = denoiser().unet.sites_by_kind["cross"]
    recorder = Recorder(sites, where="mid.0.0")
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0)})
    model(x, sigma, conds, attend=recorder.attend([{"seed": 0}, {"seed": 1}]))
    entry = recorder.recording.select(branch="uncond")[0]
    assert entry.site.endswith("attn2") and entry.q.shape == (2, 4, 6, 16) and entry.k.shape == (2, 4, 5, 16)


def test_sag_takes_the_negative_of_guidance_that_still_acts():
    small = Term(Branch("cond"), Branch("small"), 1.0)
    model = GuidedDenoiser(denoiser(), {"size": small}, conditionings={"small": Scaled("cond", 0.5)})
    assert model.negative(3.0) == Branch("cond")
    weight = PlusPlus(0.6)  # which needs the run
    noise, _, conds = noisy(1, sigma=1.0)
    sag = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(weight)}))
    assert sample(sag, noise, steps=2, conds=conds).isfinite().all()


def test_a_changed_conditioning_never_keeps_the_keys_of_the_old_text():
    x, sigma, conds = noisy(2)
    inner = denoiser()

    def halved_context(conds, sigma, keys):
        return replace(conds["cond"], context=conds["cond"].context / 2)  # with the cached projections of cond

    model = GuidedDenoiser(inner, {}, conditionings={"cond": halved_context})
    expected = inner(x, sigma, cond=replace(conds["cond"], context=conds["cond"].context / 2))
    close(model(x, sigma, **model.prepare({"conds": conds})), expected)
