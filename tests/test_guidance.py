"""Terms and branches in one forward with a shared prefix: golden combinations, exactness, limits, errors, diffusers."""

import math
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from guidance_models import CONFIG, denoiser, noisy

from segresearch.guidance import (
    PAG,
    SEG,
    Branch,
    GuidedDenoiser,
    Projected,
    Ramp,
    SelfAttentionGuidance,
    Term,
    cfg,
    perturbed,
    rescale,
)
from segresearch.guidance.step import Step
from segresearch.models.attention import Site, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet, UNetConfig
from segresearch.sampling import initial_noise, sample

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


class Scalars:
    """A denoiser whose answer is one number: cond 2, uncond 1, and whatever the attention makes of it."""

    class unet:
        all_sites = (MID,)
        sites_by_kind = {"self": {MID: 1}}

    sigmas = "the inner sigmas"

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, cond, attend=sdpa, wrap=None, residuals=None, fork=None):
        value = cond.pooled[:, :1, None, None]  # (rows, 1, 1, 1)
        self.calls.append((x.shape[0], fork))
        if fork is not None:
            value = value[fork.index]
        value = attend(value, value, value, Site(MID, (1, 1)))
        return value.expand(-1, *x.shape[1:])


def three_quarters(q, k, v, site, attend):
    return 0.75 * v


def scalars(terms, sigma=2.0, **options):
    inner = Scalars()
    cond = {
        n: Cond(torch.zeros(1, 2, 3), torch.full((1, 1), u), torch.zeros(1, 6))
        for n, u in (("cond", 2.0), ("uncond", 1.0))
    }
    model = GuidedDenoiser(inner, terms, **options)
    rows = len(sigma) if isinstance(sigma, list) else 1
    out = model(torch.zeros(rows, 1, 2, 2), torch.tensor(sigma).reshape(-1), conds=cond)
    assert torch.equal(out, out[:, :, :1, :1].expand_as(out))
    return out[:, 0, 0, 0].tolist(), inner.calls


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize(
    "terms, expected",
    [
        ({}, 2.0),
        ({"cfg": cfg(5.0)}, 6.0),
        ({"cfg": cfg(5.0), "seg": perturbed("seg", three_quarters, 3.0)}, 7.5),  # official: u + g(c − u) + s(c − c̃)
        ({"cfg": cfg(5.0), "seg": perturbed("seg", three_quarters, 3.0, base="uncond")}, 6.75),  # the paper's eq. (10)
        ({"seg": perturbed("seg", three_quarters, 3.0)}, 3.5),  # official without CFG
        ({"seg": perturbed("seg", three_quarters, 3.0 - 1)}, 3.0),  # the paper's eq. (9), γ = 3: s = γ − 1
        ({"t": Term(Branch("uncond"), Branch("cond"), 0.5)}, 1.5),
    ],
)
def test_golden_combinations(terms, expected, fork):
    assert scalars(terms, fork=fork)[0] == pytest.approx([expected], abs=1e-6)


def test_base_uncond():
    assert scalars({"seg": perturbed("seg", three_quarters, 2.0, base="uncond")}, base="uncond")[0] == [1.5]


def test_rows_are_not_evaluated_twice_or_for_nothing():
    seg, pag = perturbed("seg", three_quarters, 3.0), perturbed("pag", PAG(), 1.0)
    assert scalars({"cfg": cfg(1.0)})[1] == [(1, None)]
    assert scalars({"cfg": cfg(5.0)})[1] == [(2, None)]
    ((rows, fork),) = scalars({"cfg": cfg(5.0), "seg": seg, "pag": pag})[1]
    assert rows == 2 and fork.site == MID and fork.index.tolist() == [0, 1, 0, 0]
    ((rows, fork),) = scalars({"seg": seg, "again": perturbed("other name, same content", three_quarters, 1.0)})[1]
    assert rows == 1 and fork.index.tolist() == [0, 0]
    assert scalars({"seg": perturbed("seg", three_quarters, 0.0)})[1] == [(1, None)]
    assert scalars({"cfg": cfg(5.0), "seg": seg}, fork=False)[1] == [(3, None)]
    assert scalars({"none": Term(Branch("uncond"), Branch("uncond"), 3.0)})[1] == [(1, None)]


def test_intervals_and_schedules():
    terms = {
        "cfg": cfg(5.0, interval=[1.0, 3.0]),
        "seg": perturbed("seg", three_quarters, lambda sigma: sigma, interval=(2, 9)),
    }
    expected = {0.5: 2.0, 1.0: 6.0, 2.0: 7.0, 3.0: 7.5, 4.0: 4.0, 10.0: 2.0}
    for sigma, value in expected.items():
        assert scalars(terms, sigma)[0] == pytest.approx([value])
    assert scalars(terms, 0.5)[1] == [(1, None)]
    values, calls = scalars(terms, list(expected))  # a sigma for each row
    assert values == pytest.approx(list(expected.values())) and calls[0][0] == 12
    ramp = Ramp(4.0, 1.0, 10.0, 0.1)
    assert [ramp(s) for s in (50.0, 10.0, 1.0, 0.1, 0.01)] == pytest.approx([4.0, 4.0, 2.5, 1.0, 1.0])
    assert scalars({"cfg": cfg(Ramp(5.0, 1.0, 8.0, 2.0))}, 4.0)[0] == pytest.approx([4.0])
    assert scalars({"cfg": cfg(Ramp(5.0, 1.0, 8.0, 2.0))}, 2.0)[1] == [(1, None)]
    with pytest.raises(ValueError, match="is nan at sigma 4"):
        scalars({"cfg": cfg(lambda sigma: math.nan)}, 4.0)


COMBINATIONS = {
    "mid": {"seg": perturbed("seg", SEG(math.inf), 3.0)},
    "cfg and mid": {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(1.0), 3.0)},
    "down": {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(1.0, where="down"), 3.0)},
    "up": {"cfg": cfg(5.0), "pag": perturbed("pag", PAG(where="up"), 3.0)},
    "one site": {"cfg": cfg(5.0), "pag": perturbed("pag", PAG(where="mid.0.1"), 3.0)},
    "last site": {"pag": perturbed("pag", PAG(where=-1), 3.0)},
    "heads": {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(2.0, heads=[0, 3], on="qk"), 3.0)},
    "both bases": {"c": perturbed("seg", SEG(), 2.0), "u": perturbed("seg", SEG(), 1.0, base="uncond")},
    "no plain uncond": {"t": Term(Branch("cond"), Branch("uncond", (SEG(),), "seg"), 2.0)},
    "two branches": {
        "seg": perturbed("seg", SEG(where="up.0"), 2.0),
        "cfg": cfg(3.0),
        "pag": perturbed("pag", PAG(where="down"), 1.0),
    },
    "two at once": {"both": perturbed("both", (SEG(1.0, where=["mid", "up"]), PAG(where="mid", tau=0.5)), 2.0)},
}


@pytest.mark.parametrize("terms", COMBINATIONS.values(), ids=COMBINATIONS)
@torch.no_grad()
def test_one_forward_equals_separate_forwards(terms):
    """Every branch through its own full forward, with an attention written here: no fork, no grouping of rows."""
    x, sigma, conds = noisy(3)
    inner = denoiser()

    def alone(branch):
        def attend(q, k, v, site):
            call = sdpa
            for p in branch.perturbations:
                wanted = [p.where] if isinstance(p.where, str | int) else p.where
                if site.kind == "self" and any(inside(w, site.name) for w in wanted):
                    call = partial(lambda p, earlier, *qkvs: p(*qkvs, earlier), p, call)
            return call(q, k, v, site)

        return inner(x, sigma, cond=conds[branch.conditioning], attend=attend)

    expected = alone(Branch("cond"))
    for term in terms.values():
        expected = expected + term.scale * (alone(term.pos) - alone(term.neg))
    plain = inner(x, sigma, cond=conds["cond"])
    assert (expected - plain).abs().max() > 1e-3  # the guidance does something
    for fork in (True, False):
        model = GuidedDenoiser(inner, terms, fork=fork)
        torch.testing.assert_close(model(x, sigma, conds=conds), expected, rtol=0, atol=1e-10)


def inside(where, name):
    if isinstance(where, int):
        return name == denoiser().unet.sites[where]
    prefix = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}
    exact = {"mid.0.1": "mid_block.attentions.0.transformer_blocks.1.", "up.0": "up_blocks.0."}
    return name.startswith(exact.get(where) or prefix[where])


@torch.no_grad()
def test_images_do_not_depend_on_the_batch():
    terms = {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(1.0, where=["down.2", "mid"]), 3.0)}
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = GuidedDenoiser(denoiser(dtype), terms, rescale=0.7, post=[Projected(0.5, 50.0)])
        x, sigma, conds = noisy(3, dtype=dtype)
        together = model(x, sigma, conds=conds)
        for i in range(3):
            alone = model(x[i : i + 1], sigma[:1], conds={name: c[[i]] for name, c in conds.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=atol)


@torch.no_grad()
def test_limits():
    x, sigma, conds = noisy()
    plain = denoiser()(x, sigma, cond=conds["cond"])
    for terms in (
        {},
        {"cfg": cfg(1.0)},
        {"seg": perturbed("seg", SEG(), 0.0)},
        {"seg": perturbed("seg", SEG(), 3.0, interval=(5.0, 9.0))},
    ):
        assert torch.equal(GuidedDenoiser(denoiser(), terms)(x, sigma, conds={"cond": conds["cond"]}), plain)
    for perturbation in (SEG(0.0), PAG(tau=0.0), SEG(0.0, on="qk", where="*")):
        model = GuidedDenoiser(denoiser(), {"p": perturbed("p", perturbation, 3.0)})
        torch.testing.assert_close(model(x, sigma, conds=conds), plain, rtol=0, atol=1e-12)
    one = {name: c[[0]] for name, c in conds.items()}  # one row of conditioning serves every image
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0)})
    both = model(x, sigma, conds=one)
    torch.testing.assert_close(both[1:], model(x[1:], sigma[1:], conds=one), rtol=0, atol=1e-12)


@torch.no_grad()
def test_innermost_attention_sees_what_the_softmax_sees():
    x, sigma, conds = noisy()
    seen = []

    def record(q, k, v, site):
        if site.kind == "self":
            seen.append((site.name, q.shape[0], bool((q == q[:, :, :1]).all())))
        return sdpa(q, k, v, site)

    model = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(where="mid.0.1"), 3.0)})
    model(x, sigma, conds=conds, attend=record)
    mid = [(rows, constant) for name, rows, constant in seen if "mid_block" in name]
    assert mid == [(4, False), (4, False), (2, True), (6, False)]  # before the fork; at it, plain and perturbed; after


@torch.no_grad()
def test_nothing_is_left_behind_after_an_exception():
    x, sigma, conds = noisy(dtype=torch.float32)
    inner = denoiser(torch.float32)
    terms = {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(1.0), 3.0)}
    before = GuidedDenoiser(inner, terms)(x, sigma, conds=conds)
    state = {name: (weight.data_ptr(), weight.clone()) for name, weight in inner.unet.named_parameters()}

    def breaks(q, k, v, site, attend):
        raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        GuidedDenoiser(inner, terms | {"bad": perturbed("bad", breaks, 1.0, where="up")})(x, sigma, conds=conds)
    assert torch.equal(GuidedDenoiser(inner, terms)(x, sigma, conds=conds), before)
    after = dict(inner.unet.named_parameters())
    assert all(after[n].data_ptr() == p and torch.equal(after[n], w) for n, (p, w) in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())


def test_rescale_and_projection():
    g = torch.Generator().manual_seed(3)
    x, plain, guided = (torch.randn(2, 4, 3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([2.0, 0.5], dtype=torch.float64)
    s, step = sigma[:, None, None, None], Step(x, sigma, {"cond": plain})
    eps, eps_c = (x - guided) / s, (x - plain) / s
    for i in range(2):
        whole = eps[i] * eps_c[i].std() / eps[i].std()
        expected = x[i] - sigma[i] * (0.7 * whole + 0.3 * eps[i])
        torch.testing.assert_close(rescale(guided, plain, x, 0.7)[i], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rescale(guided, plain, x, 0.0), guided, rtol=0, atol=1e-14)
    torch.testing.assert_close(Projected(1.0)(guided, step), guided, rtol=0, atol=1e-12)
    delta = Projected(0.0)(guided, step) - plain
    assert (delta * plain).sum((1, 2, 3)).abs().max() < 1e-12
    short = Projected(1.0, norm=0.5)(guided, step) - plain
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(Projected(norm=0.0)(guided, step), plain)


@torch.no_grad()
def test_rescale_acts_only_with_cfg():
    x, sigma, conds = noisy()
    seg = {"seg": perturbed("seg", SEG(), 3.0)}
    for terms, acts in (
        (seg, False),
        (seg | {"cfg": cfg(5.0)}, True),
        (seg | {"cfg": cfg(5.0, interval=(4.0, 9.0))}, False),
    ):
        plain, scaled = (GuidedDenoiser(denoiser(), terms, rescale=phi)(x, sigma, conds=conds) for phi in (0.0, 0.7))
        assert torch.equal(plain, scaled) != acts


def test_print_shows_formula_and_rows():
    model = GuidedDenoiser(
        denoiser(),
        {
            "cfg": cfg(5.0, interval=(0, 8)),
            "seg": perturbed("seg", SEG(), 3.0),
            "pag": perturbed("pag", PAG(), Ramp(2, 0)),
        },
        rescale=0.7,
        post=[Projected()],
    )
    text = repr(model)
    assert text.startswith(
        "D = D[cond] + 4·(D[cond] − D[uncond]) [σ ≤ 8] + 3·(D[cond] − D[cond~seg]) + "
        "(2 → 0 for σ 14.6146 → 0.029167)·(D[cond] − D[cond~pag])\n"
    )
    assert "cond~seg: SEG(sigma=inf, where='mid', heads=None, on='q', boundary='reflect') at 3 of 15 sites" in text
    assert "rescale 0.7: in eps, against D[cond]" in text and "Projected(eta=0.0, norm=inf)" in text
    assert text.endswith(f"rows per image: 2 -> 4 from {MID}")
    assert repr(GuidedDenoiser(denoiser(), {})) == "D = D[cond]\n  rows per image: 1"
    negative = GuidedDenoiser(denoiser(), {"seg": perturbed("seg", SEG(), -2.0), "cfg": cfg(1.0)})
    assert repr(negative).startswith("D = D[cond] − 2·(D[cond] − D[cond~seg]) + 0·(D[cond] − D[uncond])\n")


def test_schedule_of_the_inner_denoiser():
    model = GuidedDenoiser(denoiser(), {})
    assert model.sigmas is denoiser().sigmas and model.steps_offset == 1
    assert model.t_to_sigma(model.sigma_to_t(model.sigma_max)) == pytest.approx(float(model.sigma_max))
    with pytest.raises(AttributeError, match="GuidedDenoiser has no 'sigma_mx'"):
        model.sigma_mx  # noqa: B018


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: {"t": perturbed("t", SEG(where="middle"), 1.0)}, "'middle' matches no self-attention site.*mid_block"),
        (lambda: {"t": perturbed("t", SEG(-1.0), 1.0)}, "sigma must be a number >= 0"),
        (lambda: {"t": perturbed("t", SEG(heads=[4]), 1.0)}, "no head 4 at mid_block.*heads 0 to 3"),
        (lambda: {"t": perturbed("t", SEG(heads=[2], where="*"), 1.0)}, "no head 2 at down_blocks.0.*heads 0 to 1"),
        (
            lambda: {"a": perturbed("t", SEG(1.0), 1.0), "b": perturbed("t", SEG(2.0), 1.0)},
            "two branches are named 't'",
        ),
        (lambda: {"t": perturbed("t", SEG(), math.inf)}, "must be finite, got inf"),
        (lambda: {"t": perturbed("t", SEG(), 1.0, interval=(3, 1))}, r"0 <= low <= high, got \(3, 1\)"),
        (lambda: {"t": perturbed("", SEG(), 1.0)}, "has perturbations and a name, or neither"),
        (lambda: {"t": Term(Branch("cond"), Branch("cond", (three_quarters,), "t"), 1.0)}, "no place; give one: At"),
    ],
)
def test_errors_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(denoiser(), make())


def test_errors_of_a_call():
    x, sigma, conds = noisy()
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0)})
    with pytest.raises(ValueError, match="conds lacks 'uncond', which the guidance needs; given: 'cond'"):
        model(x, sigma, conds={"cond": conds["cond"]})
    with pytest.raises(ValueError, match=r"conds\['uncond'\] has 3 rows for 2 images; it needs 2 or 1"):
        model(x, sigma, conds=conds | {"uncond": noisy(3)[2]["uncond"]})
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\], got 2"):
        GuidedDenoiser(denoiser(), {}, rescale=2)


@torch.no_grad()
def test_pag_parity_with_diffusers():
    """The network's output for both halves of diffusers' PAG batch, in fp32, on a non-square grid."""
    config = {
        "sample_size": 8,
        "addition_embed_type": "text_time",
        "use_linear_projection": True,
        "attention_head_dim": list(CONFIG.heads),
        "layers_per_block": 1,
        **{
            k: getattr(CONFIG, k)
            for k in ("down_block_types", "up_block_types", "block_out_channels", "norm_num_groups")
        },
        **{k: getattr(CONFIG, k) for k in ("transformer_layers_per_block", "cross_attention_dim")},
        **{k: getattr(CONFIG, k) for k in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")},
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        theirs = UNet2DConditionModel(**config).eval()
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, sigma, conds = noisy(2, dtype=torch.float32)
    inner = Denoiser(ours, alphas_cumprod({}))
    processors = {
        name: PAGIdentitySelfAttnProcessor2_0() if name.startswith("mid_block") and ".attn1." in name else processor
        for name, processor in theirs.attn_processors.items()
    }
    theirs.set_attn_processor(processors)
    cond = Cond.cat([conds["cond"]] * 2)
    z = (x / (sigma[0] ** 2 + 1).sqrt()).repeat(2, 1, 1, 1)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    t = inner.sigma_to_t(sigma).repeat(2)
    eps, eps_perturbed = theirs(z, t, cond.context, added_cond_kwargs=added).sample.chunk(2)
    expected = x - sigma[0] * (eps + 3.0 * (eps - eps_perturbed))
    model = GuidedDenoiser(inner, {"pag": perturbed("pag", PAG(), 3.0)})
    assert (eps - eps_perturbed).abs().max() > 1e-3
    torch.testing.assert_close(model(x, sigma, conds=conds), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde"])
def test_any_sampler_runs_guidance(sampler):
    """CFG, SEG in an interval, and SAG over four steps: finite, and image i does not depend on the batch."""
    terms = {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(), 3.0, interval=(1.0, 20.0))}
    model = SelfAttentionGuidance(GuidedDenoiser(denoiser(), terms), 0.5)
    conds, noise = noisy(2)[2], initial_noise([3, 4], (4, 8, 12)).double()
    both = sample(model, noise, sampler=sampler, steps=4, conds=conds)
    assert both.isfinite().all()
    alone = sample(model, noise[1:], sampler=sampler, steps=4, conds={name: c[[1]] for name, c in conds.items()})
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-8)
    plain = sample(GuidedDenoiser(denoiser(), {}), noise, sampler=sampler, steps=4, conds=conds)
    assert (both - plain).abs().max() > 1e-2
