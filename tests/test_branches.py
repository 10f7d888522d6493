"""Branches perturbed anywhere: blocks, feed-forwards, the embedding of t, cross-attention, views, other networks;
conditionings made from others; what methods remember; random choices."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
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
    select_sites,
)  # fmt: skip
from segresearch.guidance.methods.adg import ADG
from segresearch.guidance.methods.cfgpp import PlusPlus
from segresearch.guidance.methods.nag import NAG
from segresearch.models.attention import sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import controlled
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet
from segresearch.sampling import sample
from segresearch.sampling import sigmas as schedule
from segresearch.sampling.draws import bits, chosen, normal, permutation, uniform
from segresearch.sampling.memory import Past, Run

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def halved(h, site, call):
    return 0.5 * call(h)


def without_attention(h, site, call):
    return call(h, without=("attn1",))


def flipped(h, site, call):
    return call(h.flip(1))


def later(t, site, call):
    return call(t + 30.0)


def sharper(q, k, v, site, attend):
    return attend(2 * q, k, v, site)


def doubled(q, k, v, site, attend):
    return 2 * attend(q, k, v, site)


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


def alone(inner, x, sigma, cond, perturbations, **more):
    """One branch through a forward of its own, with no rows shared: its perturbations written as plain wrappers."""
    kinds = inner.unet.sites_by_kind

    def at(site):
        own = [p for p in perturbations if getattr(p, "site_kind", "self") == site.kind]
        return [p for p in own if site.name in select_sites(p.where, tuple(kinds[site.kind]))]

    def attend(q, k, v, site):
        call = sdpa
        for p in at(site):
            call = partial(lambda p, earlier, *arguments: p(*arguments, earlier), p, call)
        return call(q, k, v, site)

    def wrap(call, h, site):
        for p in at(site):
            call = partial(lambda p, earlier, h, **options: p(h, site, partial(earlier, **options)), p, call)
        return call(h)

    return inner(x, sigma, cond=cond, attend=attend, wrap=wrap, **more)


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


@dataclass(frozen=True)
class Scaled:
    """Another conditioning scaled by a factor, or by sigma."""

    of: str
    factor: float | None = None
    calls: ClassVar[list] = []

    @property
    def static(self):
        return self.factor is not None

    def __call__(self, conds, sigma, keys):
        self.calls.append(self.of)
        cond = conds[self.of]
        factor = self.factor or sigma[:, None, None]
        return Cond(cond.context * factor, cond.pooled, cond.time_ids)


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
class Halves:
    """The left and the right half of an image, apart."""

    site_kind: ClassVar[str] = "view"

    def split(self, z):
        return torch.cat(z.chunk(2, dim=3))

    def join(self, denoised, like):
        return torch.cat(denoised.chunk(2), dim=3)


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


@dataclass(frozen=True)
class Other:
    network: str = "weak"
    site_kind: ClassVar[str] = "network"


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


# --- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembered:
    """Notes what it finds of earlier sigmas, and keeps its own sigma."""

    notes: list

    __hash__ = object.__hash__

    def __call__(self, pos, neg, step):
        self.notes.append((step.past.sigma, step.past.read()))
        step.past.write(step.past.sigma)
        return pos - neg


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "dpmpp_2s_ancestral"])
def test_a_state_is_that_of_the_sigma_before_whatever_the_sampler(sampler):
    notes = []
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0, shape=Remembered(notes))})
    noise, _, conds = noisy(2, sigma=1.0)
    for _ in range(2):  # a second run begins empty
        notes.clear()
        sample(model, noise, sampler, steps=4, conds=conds)
        own = schedule(denoiser(), "leading", 4).tolist()
        assert notes[0] == (own[0], None) and {s for s, _ in notes} >= set(own[:-1])
        for i, (sigma, state) in enumerate(notes):
            above = [s for s, _ in notes[:i] if s > sigma and s in own]
            assert state == (min(above) if above else None)


def test_memory_needs_the_sigmas_of_a_schedule_and_images_are_apart():
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0, shape=Remembered([]))})
    noise, _, conds = noisy(2, sigma=1.0)
    for sampler, options in (("dpm_adaptive", {"rtol": 0.5}), ("euler", {"s_churn": 5.0}), ("dpm_fast", {})):
        with pytest.raises(ValueError, match=f"cfg needs the sigmas of the schedule, and {sampler}.*chooses its own"):
            sample(model, noise, sampler, steps=3, conds=conds, options=options)
    run = Run(torch.arange(2), "euler", (3.0, 2.0, 0.0))
    Past(run, "a", 3.0).write("first")
    assert Past(run, "a", 2.0).read() == "first" and Past(run, "b", 2.0).read() is None
    assert Past(replace(run, keys=run.keys[:1]), "a", 2.0).read() is None
    Past(run, "a", 2.5).write("between")
    assert Past(run, "a", 2.0).read() == "first" and Past(None, "a", 2.0).read() is None
    Past(None, "a", 2.0).write("nothing")


@dataclass(frozen=True)
class Averaged:
    """Attention with the mean of the queries of this and the earlier sigma."""

    where: str = "mid"
    remembers: ClassVar[bool] = True

    def __call__(self, q, k, v, site, attend):
        before = site.past.read()
        site.past.write(q)
        return attend(q if before is None else (q + before) / 2, k, v, site)


def test_a_perturbation_remembers_by_site_and_image():
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(2.0), "mean": perturbed("mean", Averaged(), 2.0)})
    noise, _, conds = noisy(3, sigma=1.0)
    together = sample(model, noise, steps=3, conds=conds)
    close(together[1:2], sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}))
    assert (
        together - sample(GuidedDenoiser(denoiser(), {"cfg": cfg(2.0)}), noise, steps=3, conds=conds)
    ).abs().max() > 1e-3


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


# --- random choices --------------------------------------------------------------------------------


def test_draws_are_keyed_by_image_sigma_and_place():
    keys, sigma = torch.tensor([3, 3, 5, 2**62]), torch.tensor([1.0, 2.0, 1.0, 1.0])
    drawn = bits(keys, sigma, "here", 64)
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    assert torch.equal(bits(keys[2:3], sigma[2:3].double(), "here", 64), drawn[2:3])
    assert not torch.equal(bits(keys, sigma, "there", 64), drawn)
    assert torch.equal(bits(keys, sigma, "here", 5), drawn[:, :5])
    u, n = (f(torch.arange(64), torch.ones(64), "x", 4096) for f in (uniform, normal))
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(n.mean()) < 5e-3 and abs(n.var() - 1) < 1e-2 and abs((n[0] * n[1]).mean()) < 0.1
    p = permutation(torch.arange(500), torch.ones(500), "p", 7)
    assert torch.equal(p.sort(1).values, torch.arange(7).expand(500, 7))
    assert abs((p[:, 0] == 3).float().mean() - 1 / 7) < 0.05
    assert abs(chosen(torch.arange(4000), torch.ones(4000), "c", 0.1).float().mean() - 0.1) < 0.02


@dataclass(frozen=True)
class Shuffled:
    """Tokens in a random order before a block."""

    where: str = "mid"
    site_kind: ClassVar[str] = "block"

    def __call__(self, h, site, call):
        order = permutation(site.keys, site.sigma, site.name, h.shape[1]).repeat(len(site.branches), 1)
        return call(h.gather(1, order[:, :, None].expand_as(h)))


def test_a_random_choice_does_not_depend_on_the_batch():
    model = GuidedDenoiser(
        denoiser(), {"s": perturbed("s", Shuffled(), 2.0), "u": perturbed("s", Shuffled(), 1.0, "uncond")}
    )
    noise, _, conds = noisy(3, sigma=1.0)
    together = sample(model, noise, steps=3, conds=conds, seeds=[4, 9, 2])
    close(together[1:2], sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}, seeds=[9]))
    other = sample(model, noise[1:2], steps=3, conds={n: c[[1]] for n, c in conds.items()}, seeds=[8])
    assert (together[1:2] - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: perturbed("t", At(halved, where="middle", site_kind="block"), 1.0), "'middle' matches no transfo"),
        (lambda: perturbed("t", At(halved, where="left", site_kind="ff"), 1.0), "'left' matches no feed-forward"),
        (lambda: perturbed("t", At(sharper, where=99, site_kind="cross"), 1.0), "99 matches no cross-attention site"),
        (lambda: perturbed("t", At(sharper, heads=[9], site_kind="cross"), 1.0), r"no head 9 at mid_block.*attn2"),
        (lambda: perturbed("t", At(halved, site_kind="blocks"), 1.0), "site_kind='blocks': sites are of the kinds em"),
    ],
)  # fmt: skip
def test_errors_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(denoiser(), {"t": build()})


def test_a_wrong_output_of_a_call_is_named():
    x, sigma, conds = noisy(1)
    wrong = At(lambda h, site, call: h[:, :2], where="mid.0.1", site_kind="block")
    with pytest.raises(ValueError, match=r"gave \(1, 2, 64\) at mid_block.attentions.0.transformer_blocks.1, expected"):
        GuidedDenoiser(denoiser(), {"t": perturbed("t", wrong, 1.0)})(x, sigma, conds)


# --- slips, and what depends on who else is there ----------------------------------------------------


def test_a_static_conditioning_is_made_once_where_images_run_one_at_a_time():
    model = GuidedDenoiser(denoiser(), {}, conditionings={"cond": Scaled("cond", 0.5)})
    noise, _, conds = noisy(2, sigma=1.0)
    options = {"options": {"s_churn": 5.0}, "steps": 2}
    both = sample(model, noise, conds=conds, seeds=[1, 2], **options)
    one = sample(model, noise[1:], conds={n: c[[1]] for n, c in conds.items()}, seeds=[2], **options)
    close(both[1:], one)


def test_a_branch_remembers_whatever_other_branches_come_and_go():
    """In every branch, with classifier-free guidance at the middle step alone: cond is as it is without uncond."""
    noise, _, conds = noisy(2, sigma=1.0)
    middle = schedule(denoiser(), "leading", 3)[1].item()
    seen = {}

    def record(q, k, v, site):
        if site.kind == "self" and "mid_block.attentions.0.transformer_blocks.0" in site.name:
            for names, part in zip(site.branches, q.chunk(len(site.branches))):
                seen.setdefault(names[0], []).append(part)
        return sdpa(q, k, v, site)

    calls = []
    for scale in (1e-30, 0.0):
        seen.clear()
        terms = {"cfg": Term(Branch("cond"), Branch("uncond"), scale, (middle * 0.9, middle * 1.1))}
        sample(GuidedDenoiser(denoiser(), terms, every={"*": [Averaged()]}), noise, steps=3, conds=conds, attend=record)
        calls.append(list(seen["cond"]))
    assert len(calls[0]) == len(calls[1]) == 3
    for a, b in zip(*calls):
        close(a, b)


def test_what_sag_evaluates_again_is_not_remembered():
    noise, _, conds = noisy(2, sigma=1.0)
    every = {"*": [Averaged()]}
    plain = GuidedDenoiser(denoiser(), {}, every=every)
    sag = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {}, every=every), scale=1e-30, base="cond")
    close(sample(sag, noise, steps=3, conds=conds), sample(plain, noise, steps=3, conds=conds))


def test_sag_takes_the_negative_of_guidance_that_still_acts():
    small = Term(Branch("cond"), Branch("small"), 1.0)
    model = GuidedDenoiser(denoiser(), {"size": small}, conditionings={"small": Scaled("cond", 0.5)})
    assert model.negative(3.0) == Branch("cond")
    weight = PlusPlus(0.6)  # which needs the run
    noise, _, conds = noisy(1, sigma=1.0)
    sag = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(weight)}))
    assert sample(sag, noise, steps=2, conds=conds).isfinite().all()


@dataclass(frozen=True)
class Placeless:
    site_kind: ClassVar[str] = "block"

    def __call__(self, h, site, call):
        return call(h.flip(1))


@dataclass(frozen=True)
class PlacelessMemory:
    remembers: ClassVar[bool] = True

    def __call__(self, q, k, v, site, attend):
        return v


def test_a_class_without_a_place_keeps_its_kind():
    x, sigma, conds = noisy(1)
    a, b = (
        GuidedDenoiser(denoiser(), {"t": perturbed("t", p, 1.0)})(x, sigma, conds)
        for p in (Placeless(), At(flipped, site_kind="block"))
    )
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="give its class a field `where`"):
        perturbed("t", PlacelessMemory(), 1.0)


def scalar(pos, neg, step):
    return pos[:, :1, :1, :1]


@dataclass(frozen=True)
class Narrow(Halves):
    def join(self, denoised, like):
        return denoised[:1]


@dataclass(frozen=True)
class Torn(Halves):
    def split(self, z):
        return torch.cat([z, z[:1]])


def swapped():
    return {
        "a": perturbed("a", [Halves(), Other()], 1.0),
        "b": perturbed("b", [Other(), Halves()], 1.0),
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: {"every": {"cnod": [SEG()]}}, "conds lacks 'cnod'"),
        (lambda: {"every": {"cond": SEG()}}, "give a list of perturbations"),
        (lambda: {"conditionings": {"x": 3}}, r"conditionings\['x'\] is 3"),
        (lambda: {"conditionings": {"x": Scaled("cnod", 1.0)}}, "conds lacks 'cnod'"),
        (lambda: {"conditionings": {"x": lambda *_: 5}}, r"conditionings\['x'\].*made int, not a Cond"),
        (lambda: {"terms": {"t": cfg(2.0, shape=scalar)}}, r"the shape of terms\['t'\] gave \(2, 1, 1, 1\)"),
        (lambda: {"terms": {"t": cfg(2.0, (200, 800))}}, r"\(200, 800\), and the model's sigmas are 0.02917 to 14.61"),
        (lambda: {"terms": {"t": cfg(2.0, (0, 0.01))}}, "it would never act"),
        (lambda: {"terms": {"t": perturbed("t", Narrow(), 1.0)}}, r"Narrow\(\).join gave \(1, 4, 8, 6\)"),
        (lambda: {"terms": {"t": perturbed("t", Torn(), 1.0)}}, r"Torn\(\).split made 3 rows of 2"),
        (lambda: {"post": [lambda guided, step: guided[:1]]}, r"gave \(1, 4, 8, 12\), expected \(2, 4, 8, 12\)"),
        (lambda: {"terms": {"cfg": cfg(2.0, pos="uncond", neg="cond", shape=ADG())}}, "needs pos='cond', the base"),
        (lambda: {"terms": {"t": perturbed("t", At(flipped, heads=[0], site_kind="block"), 1.0)}}, "has no heads"),
    ],
)
def test_slips_end_in_one_line(build, message):
    x, sigma, conds = noisy(2)
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(denoiser(), **{"terms": {}, **build()})(x, sigma, conds)


def test_texts_of_a_wrong_number_of_rows_are_refused():
    x, sigma, conds = noisy(2)
    conds["uncond"] = conds["uncond"][[0, 1, 0]]
    with pytest.raises(ValueError, match=r"conds\['uncond'\] has 3 rows for 2 images"):
        GuidedDenoiser(denoiser(), {}, every={"*": [NAG()]})(x, sigma, conds)


def test_a_view_of_another_network_in_either_order():
    model = GuidedDenoiser(denoiser(), swapped(), networks={"weak": denoiser()})
    x, sigma, conds = noisy(2)
    assert "rows per image" in str(model) and model(x, sigma, conds).isfinite().all()


def test_a_changed_conditioning_never_keeps_the_keys_of_the_old_text():
    x, sigma, conds = noisy(2)
    inner = denoiser()

    def halved_context(conds, sigma, keys):
        return replace(conds["cond"], context=conds["cond"].context / 2)  # with the cached projections of cond

    model = GuidedDenoiser(inner, {}, conditionings={"cond": halved_context})
    expected = inner(x, sigma, cond=replace(conds["cond"], context=conds["cond"].context / 2))
    close(model(x, sigma, **model.prepare({"conds": conds})), expected)
