"""Every saving against the plain path, fp64: the same values, from fewer operations."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guidance_models import CONFIG, control_image, control_net, denoiser, noisy
from torch.utils.flop_counter import FlopCounterMode

from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.perturbations import head_mask
from segresearch.guidance.row_layout import BranchAttention, row_index
from segresearch.models.attention import Context, Fork, Site, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import controlled
from segresearch.sampling import sample

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
TEXT, DIM = 5, CONFIG.cross_attention_dim


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def steering(rows: int):
    net = control_net()
    return net, controlled(net, control_image(rows, 8, 12))


def text_flops(net) -> int:
    """Of the keys and values of one row of text, by counting channels; of the sizes and the pooled text."""
    channels = [block.attn2.to_k.out_features for block in net.transformer_blocks]
    width = 4 * CONFIG.block_out_channels[0]
    return sum(2 * 2 * TEXT * DIM * c for c in channels) + 2 * width * (
        CONFIG.projection_class_embeddings_input_dim + width
    )


# --- once a prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", [None, Fork(MID, torch.tensor([0, 1, 0, 0, 1]))])
def test_a_projected_conditioning_gives_the_same_and_saves_just_the_projections(fork):
    inner = denoiser()
    x, sigma, conds = noisy(2)
    cond = conds["cond"]
    made = cond.projected(inner.unet)

    def call(cond):
        return inner(x, sigma, cond=cond, fork=fork)

    assert torch.equal(call(made), call(cond))
    assert flops(lambda: call(cond)) - flops(lambda: call(made)) == 2 * text_flops(inner.unet)


def test_rows_of_a_projected_conditioning():
    """Chosen, repeated and joined rows bring their projections; a move or a cast leaves them behind."""
    net = denoiser().unet
    conds = noisy(3)[2]
    a, b = (c.projected(net) for c in conds.values())

    def same(made: Cond, plain: Cond):
        assert set(made.projections) == {net} and not plain.projections
        mine, its = made.projections[net], net.project(plain)
        close(mine.added, its.added)
        assert list(mine.text) == list(its.text) == [block.attn2.name for block in net.transformer_blocks]
        for name, pair in its.text.items():
            for z, w in zip(mine.text[name], pair, strict=True):
                close(z, w)

    same(a[1:], conds["cond"][1:])
    same(a[[2, 0]], conds["cond"][[2, 0]])
    same(a[:1].expand(4), conds["cond"][[0] * 4])
    same(Cond.cat([a, b]), Cond.cat(list(conds.values())))
    assert not Cond.cat([a, conds["uncond"]]).projections
    assert not a.to(dtype=torch.float32).projections
    assert a.equals(conds["cond"]) and not a.equals(b) and not a.equals(a[:1])


def test_another_network_does_not_take_a_projection_for_its_own():
    net, other = denoiser().unet, denoiser(torch.float32).unet
    cond = noisy(1)[2]["cond"].projected(net)
    assert cond.for_network(other) is cond and cond.for_network(net) is cond.projections[net]
    with pytest.raises(ValueError, match="7 wide"):
        Cond(torch.zeros(1, 5, 7), cond.pooled, cond.time_ids).projected(net)


@pytest.mark.parametrize("options", [{}, {"s_churn": 1.0}])  # all images in a batch; one at a time
def test_sampling_projects_the_texts_once_whatever_the_steps(options, monkeypatch):
    inner = denoiser()
    _, _, conds = noisy(2)
    noise = noisy(2, sigma=1.0)[0]
    net, control = steering(2)
    projected = []
    for one in (inner.unet, net):
        project = one.project
        monkeypatch.setattr(one, "project", lambda cond, project=project: projected.append(cond) or project(cond))
    model = GuidedDenoiser(inner, {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(math.inf), 2.0)})
    x = sample(model, noise, "euler", steps=3, conds=conds, control=[control], options=options)
    assert len(projected) == 4  # two texts, two networks
    monkeypatch.setattr(GuidedDenoiser, "prepare", lambda self, arguments, run: arguments)
    close(x, sample(model, noise, "euler", steps=3, conds=conds, control=[control], options=options))
    assert len(projected) >= 4 + 2 * 3


def test_the_plain_denoiser_and_sag_prepare_too():
    inner = denoiser()
    _, _, conds = noisy(1)
    assert inner.prepare({"cond": conds["cond"]})["cond"].projections.keys() == {inner.unet}
    assert inner.prepare({}) == {}
    made = SelfAttentionGuidance(inner).prepare({"conds": conds, "more": 1})
    assert made["more"] == 1 and all(c.projections.keys() == {inner.unet} for c in made["conds"].values())
    assert made["conds"]["cond"] is not conds["cond"] and not conds["cond"].projections  # the caller's stay


# --- rows that are equal ----------------------------------------------------------------------------


def spied(model, calls):
    inner = model.denoiser

    class Spy:
        def __getattr__(self, name):
            return getattr(inner, name)

        def __call__(self, x, *args, fork=None, **kwargs):
            calls.append((len(x), None if fork is None else len(fork.index)))
            return inner(x, *args, fork=fork, **kwargs)

    spy = GuidedDenoiser(Spy(), model.terms, rescale=model.rescale, fork=model.fork)
    return spy


@pytest.mark.parametrize("fork", [True, False])
def test_names_of_one_conditioning_share_its_rows(fork):
    x, sigma, conds = noisy(2)
    conds = {"cond": conds["cond"], "uncond": conds["cond"][:], "other": conds["uncond"]}
    terms = {
        "cfg": cfg(4.0),
        "other": cfg(2.0, neg="other"),
        "seg": perturbed("seg", SEG(1.0), 2.0),
        "twin": perturbed("seg", SEG(1.0), 3.0, base="uncond"),
    }
    calls: list = []
    model = spied(GuidedDenoiser(denoiser(), terms, fork=fork), calls)
    plain = model(x, sigma, conds)
    merged = model(x, sigma, model.prepare({"conds": conds})["conds"])
    close(merged, plain)
    assert calls == ([(6, 10), (4, 6)] if fork else [(10, None), (6, None)])  # of cond, uncond, other and two ~seg


def test_a_guessing_controlnet_keeps_equal_conditionings_apart():
    """It steers the base alone, so an equal `uncond` is another branch."""
    x, sigma, conds = noisy(1)
    twins = {"cond": conds["cond"], "uncond": conds["cond"][:]}
    _, control = steering(1)
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(4.0)})
    guess = dataclasses.replace(control, guess=True)
    prepared = model.prepare({"conds": twins, "control": [guess]})["conds"]
    assert prepared["cond"] is prepared["uncond"]
    plain = model(x, sigma, twins, [guess])
    close(model(x, sigma, prepared, [guess]), plain)
    assert not torch.allclose(plain, model(x, sigma, prepared, [control]))


# --- attention --------------------------------------------------------------------------------------


def test_pag_computes_no_attention():
    inner = denoiser()
    x, sigma, conds = noisy(1)
    mid = [s for s in inner.unet.sites if s.startswith("mid")]
    tokens = (8 // 4) * (12 // 4)
    heads = tuple(range(inner.unet.site_heads[mid[0]]))
    short = GuidedDenoiser(inner, {"pag": perturbed("pag", PAG(), 3.0), "cfg": cfg(3.0)})
    long = GuidedDenoiser(inner, {"pag": perturbed("pag", PAG(heads=heads), 3.0), "cfg": cfg(3.0)})
    close(short(x, sigma, conds), long(x, sigma, conds))
    attention = 2 * 2 * tokens**2 * CONFIG.block_out_channels[-1] * len(mid)
    saved = flops(lambda: long(x, sigma, conds)) - flops(lambda: short(x, sigma, conds))
    assert saved == attention


def test_pag_under_and_over_another_perturbation():
    """With and without a choice of heads, and forked or not, the results agree."""
    inner = denoiser()
    x, sigma, conds = noisy(2)
    every_head = PAG(heads=(0, 1, 2, 3))
    for pair, same in (((SEG(1.0), PAG()), (SEG(1.0), every_head)), ((PAG(), SEG(1.0)), (every_head, SEG(1.0)))):
        results = [
            GuidedDenoiser(inner, {"t": perturbed("t", ps, 2.0)}, fork=fork)(x, sigma, conds)
            for ps in (pair, same)
            for fork in (True, False)
        ]
        for result in results[1:]:
            close(result, results[0])


def test_an_infinite_blur_on_all_heads_is_that_on_each():
    inner = denoiser()
    x, sigma, conds = noisy(1)
    q = torch.randn(2, 4, 6, 16, dtype=torch.float64)
    first = inner.unet.sites[0]
    site = Site(first, (2, 3))
    close(SEG()(q, q, q, site, sdpa), SEG(heads=(0, 1, 2, 3))(q, q, q, site, sdpa))
    heads = (None, (0, 1))
    models = [GuidedDenoiser(inner, {"seg": perturbed("seg", SEG(where=first), 2.0, heads=h)}) for h in heads]
    close(models[0](x, sigma, conds), models[1](x, sigma, conds))


def test_the_fork_is_at_the_first_perturbed_site_and_costs_no_more_than_what_follows_it():
    """Flops of a forked batch = one row up to the site, all rows after it."""
    inner = denoiser()
    x, sigma, conds = noisy(1)
    cond = conds["cond"].projected(inner.unet)
    one = flops(lambda: inner(x, sigma, cond=cond))
    costs = []
    for site in inner.unet.sites[::5]:
        fork = Fork(site, torch.tensor([0, 0, 0]))
        three = flops(lambda fork=fork: inner(x, sigma, cond=cond, fork=fork))
        costs.append((three - one) / 2)  # of what follows the fork
    assert all(a > b for a, b in zip(costs, costs[1:])) and one > costs[0] and costs[-1] > 0


# --- nothing for nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_sigma_is_read_once_a_step(rows, monkeypatch):
    """Each read makes a GPU's host wait; `tolist` is the only one there is."""
    x, sigma, conds = noisy(rows)
    _, control = steering(1)
    terms = {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(1.0, heads=(0,)), 2.0), "pag": perturbed("pag", PAG(), 1.0)}
    model = GuidedDenoiser(denoiser(), terms, rescale=0.7)
    sag = SelfAttentionGuidance(model, 1.0)
    plain = model(x, sigma, conds, [control])
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def read(self, *args, original=original, name=name):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    assert torch.equal(model(x, sigma, conds, [control]), plain)
    assert reads == ["tolist"]
    reads.clear()
    sag(x, sigma, conds, [control])
    assert reads == ["tolist"]


def test_outside_every_interval_only_the_base_is_computed():
    inner = denoiser()
    x, sigma, conds = noisy(1)  # sigma 3
    terms = {"cfg": cfg(4.0, interval=(0, 1)), "seg": perturbed("seg", SEG(1.0), 2.0, interval=(5, 9))}
    _, control = steering(1)
    control = dataclasses.replace(control, interval=(0, 1))
    guided, plain = GuidedDenoiser(inner, terms), inner(x, sigma, cond=conds["cond"])
    assert torch.equal(guided(x, sigma, conds, [control]), plain)
    assert flops(lambda: guided(x, sigma, conds, [control])) == flops(lambda: inner(x, sigma, cond=conds["cond"]))


def test_index_and_mask_are_made_once():
    cpu = torch.device("cpu")
    assert row_index((0, 1, 0), 2, cpu) is row_index((0, 1, 0), 2, cpu)
    assert row_index((0, 1, 0), 2, cpu).tolist() == [0, 1, 2, 3, 0, 1]
    assert head_mask((1,), 3, "site", cpu) is head_mask((1,), 3, "site", cpu)
    assert head_mask((1,), 3, "site", cpu).flatten().tolist() == [False, True, False]


def test_a_tap_that_is_off_is_not_there():
    handed = []

    def perturbation(q, k, v, site, attend):
        handed.append(attend)
        return attend(q, k, v, site)

    q = torch.randn(2, 1, 4, 8)
    plan = {"there": {(perturbation,): [1], (): [0]}}
    attend = BranchAttention(plan, 1, (("a", "b"),), (("a",), ("b",)), sdpa)
    attend(q, q, q, Site("there", (2, 2)))
    assert handed == [sdpa]
    off = flops(lambda: attend(q, q, q, Site("elsewhere", (2, 2))))
    assert off == flops(lambda: sdpa(q, q, q, Site("elsewhere", (2, 2))))


def test_memory_layout_stays_that_of_x():
    """A transposed sum would make the convolution after it convert its input."""
    net = denoiser().unet
    stack = net.mid_block.attentions[0]
    x = torch.randn(2, 64, 4, 6, dtype=torch.float64)
    context = Context(torch.zeros(2, 4), net.project(noisy(2)[2]["cond"]).text, sdpa)
    assert stack(x, context).is_contiguous()
    last = stack(x.to(memory_format=torch.channels_last), context)
    assert last.is_contiguous(memory_format=torch.channels_last)
    close(last, stack(x, context))


# --- torch.compile ----------------------------------------------------------------------------------


COMPILED = """
import dataclasses, math, torch
from torch._dynamo.testing import CompileCounter
from guidance_models import CONFIG, denoiser, noisy
from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models.denoiser import Denoiser
from segresearch.models.unet import UNet

kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "heads": (2, 4), "layers_per_block": (1, 1)}
kinds |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (0, 1)}
unet = UNet(dataclasses.replace(CONFIG, block_out_channels=(32, 64), **kinds)).double().requires_grad_(False)
plain = Denoiser(unet, denoiser().alphas)
x, sigma, conds = noisy(1)
methods = [
    {},
    {"blur": perturbed("blur", SEG(1.0, heads=[0], boundary="exact"), 2.0)},
    {"pag": perturbed("pag", PAG(tau=0.5), 1.0), "cfg": cfg(4.0)},
    {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(math.inf), 2.0), "pag": perturbed("pag", PAG(), 1.0)},
]
for terms in methods:
    counter = CompileCounter()
    compiled = Denoiser(torch.compile(unet, backend=counter, dynamic=False, fullgraph=True), plain.alphas)
    model = GuidedDenoiser(compiled, terms)
    prepared = model.prepare({"conds": conds})["conds"]
    for level in (sigma, sigma / 2, sigma / 3):
        wanted = GuidedDenoiser(plain, terms)(x, level, conds)
        torch.testing.assert_close(model(x, level, prepared), wanted, rtol=0, atol=1e-12)
    assert counter.frame_count == 1, (terms, counter.frame_count)
    torch._dynamo.reset()
"""


@pytest.mark.slow
def test_a_compiled_unet_is_one_graph_for_every_step():
    """Through the attend argument, the fork and the projections. In a process without the checks of types."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
