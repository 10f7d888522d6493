"""Guidance on a GPU that is not there: every config and perturbation, SAG, post-processors; devices, values, reads."""

import dataclasses
import math

import pytest
import torch
from fake_cuda import (
    DTYPES,
    MODE,
    check_same,
    fake_cuda,
    fake_denoiser,
    on_the_cpu,
    real_denoiser,
    real_inputs,
    sent,
)
from helpers import every_method

from segresearch.config import conf_dir
from segresearch.config.build import build_guidance
from segresearch.guidance import (
    PAG,
    SEG,
    At,
    GuidedDenoiser,
    Projected,
    Ramp,
    SelfAttentionGuidance,
    cfg,
    perturbations,
    perturbed,
)
from segresearch.guidance.blur import BOUNDARIES, blur
from segresearch.guidance.postprocess import rescale
from segresearch.guidance.row_layout import row_index
from segresearch.guidance.sag import attention_received
from segresearch.models.attention import Site, sdpa
from segresearch.sampling.memory import Run

SITE = Site("mid_block.attentions.0.transformer_blocks.0.attn1", (3, 4))
ROUNDING = {torch.float16: 1e-1, torch.bfloat16: 6e-1, torch.float32: 2e-5}  # of guided sums, scales up to 7.5


def keep_values(q, k, v, site, attend):
    """A perturbation of one's own, made on the neighbours' device."""
    return v * torch.ones(len(v), 1, 1, 1, dtype=v.dtype, device=v.device)


def from_the_cpu(q, k, v, site, attend):
    """The same with its tensor on the CPU: what must never pass."""
    return v * torch.ones(len(v), 1, 1, 1, dtype=v.dtype)


@pytest.fixture(scope="module")
def methods():
    sites = [f"model.sites.{method}=[mid]" for method in ("tpg", "ssg", "slg", "s2")]
    return every_method("model=mini", *sites, custom="test_fake_cuda_guidance.keep_values")


def step(model, rows: int = 2, dtype: torch.dtype = torch.float32, sigma=3.0, **more):
    """One call on the device."""
    x, levels, conds = sent(real_inputs(rows, dtype))
    levels = torch.tensor(sigma, device="cuda") if isinstance(sigma, list) else levels
    return model(x, levels, conds, **more)


def both(build, dtype: torch.dtype = torch.float32, rows: int = 2, sigma: float = 3.0):
    """(on the device, on the CPU): one call of build(denoiser)."""
    with on_the_cpu():
        x, levels, conds = real_inputs(rows, dtype, sigma)
        expected = build(real_denoiser(dtype))(x, levels, conds)
    model, given = build(fake_denoiser(dtype)), sent((x, levels, conds))
    MODE.reads, MODE.sends = [], []
    return model(*given), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "guidance").glob("*.yaml")))
def test_every_config(methods, gpu, name, dtype, monkeypatch):
    """One step of a run. Conditionings of texts are stand-ins, and the weak network is the network itself."""
    networks = lambda config, model: dict.fromkeys(config.networks, model)  # noqa: E731
    monkeypatch.setattr("segresearch.config.build.build_networks", networks)
    sigma = 6.0 if name.endswith("swg") else 3.0
    with on_the_cpu():
        guidance = methods[name]
        x, sigmas, conds = real_inputs(2, dtype, sigma)
        others = [n for n, make in guidance.conditionings.items() if hasattr(make, "encode")]
        conds |= {n: conds["cond" if i else "uncond"] for i, n in enumerate(others)}
        keys = torch.tensor([5, 9])
        run = Run(keys, "euler", (sigma, 1.0, 0.0))
        expected = build_guidance(guidance, real_denoiser(dtype))(x, sigmas, conds, run=run)
    model, (x, sigmas, conds, keys) = build_guidance(guidance, fake_denoiser(dtype)), sent((x, sigmas, conds, keys))
    MODE.reads, MODE.sends = [], []
    guided = model(x, sigmas, conds, run=Run(keys, "euler", (sigma, 1.0, 0.0)))
    check_same(guided, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert set(gpu.reads) == {"tolist"} and (len(gpu.reads) == 1 or name == "zigzag")  # sigma, once an evaluation


def heads_of(dtype):
    with on_the_cpu():
        generator = torch.Generator().manual_seed(3)
        return tuple(torch.randn(2, 2, 12, 4, generator=generator).to(dtype) for _ in range(3))


PERTURBATIONS = [
    *(SEG(sigma, on=on, boundary=b) for b in BOUNDARIES for on in ("q", "k", "qk") for sigma in (0, 1.0, math.inf)),
    SEG(math.inf),
    SEG(1.0, heads=[1]),
    SEG(math.inf, heads=[0]),
    PAG(),
    PAG(tau=0.5),
    PAG(heads=[1]),
    PAG(tau=0.5, heads=[0]),
    At(keep_values),
    At(keep_values, heads=[1]),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_perturbation(gpu, dtype):
    real = heads_of(dtype)
    fake = sent(real)
    assert {type(p) for p in PERTURBATIONS} == {SEG, PAG, At}
    for perturbation in PERTURBATIONS:
        with on_the_cpu():
            expected = perturbation(*real, SITE, sdpa)
        found = perturbation(*fake, SITE, sdpa)
        check_same(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert not gpu.reads


@pytest.mark.parametrize("perturbation", [At(from_the_cpu), At(from_the_cpu, heads=[0])], ids=str)
def test_a_perturbation_that_builds_on_the_cpu_fails(gpu, perturbation):
    model = GuidedDenoiser(fake_denoiser(), {"own": perturbed("own", perturbation, 1.0)})
    with pytest.raises(RuntimeError, match="same device"):
        step(model)


def test_an_index_on_the_cpu_fails(gpu):
    with pytest.raises(RuntimeError, match="an index on the cpu"):
        torch.zeros(3, device="cuda")[torch.tensor([0, 1])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sag(gpu, dtype):
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0), 2.0)}
    found, expected = both(lambda d: SelfAttentionGuidance(GuidedDenoiser(d, terms, rescale=0.7), 0.75), dtype)
    check_same(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert gpu.reads == ["tolist"]


def test_parts_of_sag(gpu):
    model = SelfAttentionGuidance(fake_denoiser(), blur_sigma=0.0)
    with on_the_cpu():
        q, k, _ = heads_of(torch.bfloat16)
        expected = attention_received(q, k, block=5)
    check_same(attention_received(*sent((q, k)), block=5), expected)
    plain = torch.randn(2, 4, 6, 8, device="cuda")
    assert model.degrade(plain, torch.ones(2, 3, 4, device="cuda") > 0) is plain
    with on_the_cpu():
        mask = torch.arange(24).reshape(2, 3, 4) % 3 == 0
        blurred = SelfAttentionGuidance(real_denoiser(), blur_sigma=1.0).degrade(plain.worth, mask)
    model = SelfAttentionGuidance(fake_denoiser(), blur_sigma=1.0)
    check_same(model.degrade(plain, mask.to("cuda")), blurred)
    mask = mask.to("cuda")
    gpu.sends.clear()
    model.degrade(plain, mask)
    assert not gpu.sends  # its matrices are there already


POSTS = [Projected(), Projected(0.5, 3.0), lambda guided, step: rescale(guided, step.plain, step.x, 0.5)]


@pytest.mark.parametrize("fork", [True, False])
def test_terms_together(gpu, fork):
    terms = {
        "cfg": cfg(Ramp(3.0, 1.0), interval=(1.0, 9.0)),
        "seg": perturbed("seg", [SEG(1.0), PAG(where=-1, tau=0.5)], 2.0),
        "pag": perturbed("pag", PAG(), Ramp(1.0, 2.0), base="uncond"),
    }
    found, expected = both(lambda d: GuidedDenoiser(d, terms, rescale=0.7, post=POSTS, fork=fork), rows=1)
    check_same(found, expected)


def test_rows_on_both_sides_of_an_interval(gpu):
    terms = {"cfg": cfg(3.0, interval=(2.0, 9.0)), "seg": perturbed("seg", SEG(), lambda sigma: sigma)}
    model = GuidedDenoiser(fake_denoiser(), terms, rescale=0.7)
    found = step(model, sigma=[3.0, 1.0])
    with on_the_cpu():
        x, _, conds = real_inputs()
        expected = GuidedDenoiser(real_denoiser(), terms, rescale=0.7)(x, torch.tensor([3.0, 1.0]), conds)
    check_same(found, expected)
    again = SelfAttentionGuidance(GuidedDenoiser(fake_denoiser(), {}), lambda sigma: sigma / 4)
    assert step(again, sigma=[3.0, 1.0]).device.type == "cuda"  # a factor for each row


def test_merged_and_prepared_conditionings(gpu):
    model = GuidedDenoiser(fake_denoiser(), {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(), 2.0)})
    x, sigma, conds = sent(real_inputs())
    same = {"cond": conds["cond"], "uncond": conds["cond"][:]}
    prepared = model.prepare({"conds": same})["conds"]
    assert prepared["cond"] is prepared["uncond"]
    merged = model(x, sigma, prepared)
    with on_the_cpu():
        x, sigma, conds = real_inputs()
        plain = GuidedDenoiser(real_denoiser(), {"seg": perturbed("seg", SEG(), 2.0)})
        expected = plain(x, sigma, conds)
    check_same(merged, expected)
    one = {name: cond[:1] for name, cond in sent(real_inputs()[2]).items()}
    assert step(lambda x, sigma, conds: model(x, sigma, one)).device.type == "cuda"  # one row for all


@pytest.mark.parametrize("dtype", DTYPES)
def test_blur(gpu, dtype):
    q = heads_of(dtype)[0]
    for boundary in BOUNDARIES:
        with on_the_cpu():
            expected = blur(q, (3, 4), 2.0, boundary)
        fake = q.to("cuda")
        check_same(blur(fake, (3, 4), 2.0, boundary), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        gpu.sends.clear()
        blur(fake, (3, 4), 2.0, boundary)
        assert not gpu.sends  # the matrices lie there already


def test_a_step_reads_and_sends_nothing(gpu):
    """Given the value of sigma, no step brings a value to the host; from the second on nothing is sent there either."""
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0, heads=[1]), 2.0), "pag": perturbed("pag", PAG(), 1.0)}
    model = GuidedDenoiser(fake_denoiser(), terms, rescale=0.7, post=[Projected(0.5, 3.0)])
    x, sigma, conds = sent(real_inputs())

    def once():
        denoised = model.evaluate(x, sigma, model.branches(3.0), conds, values=[3.0, 3.0])
        return model.combine(x, sigma, denoised, values=[3.0, 3.0])

    first = once()
    assert not gpu.reads
    gpu.sends.clear()
    second = once()
    assert not gpu.reads and not gpu.sends and torch.equal(first.worth, second.worth)
    assert row_index((0, 1), 2, x.device).device.type == "cuda"


def test_caches_leave_nothing_behind():
    with fake_cuda():
        blur(torch.ones(1, 1, 12, 2, device="cuda"), (3, 4), 1.0)
        blur(torch.ones(1, 1, 12, 2), (3, 4), 1.0)
    assert type(blur(torch.ones(1, 1, 12, 2), (3, 4), 1.0)) is torch.Tensor


def test_every_perturbation_is_in_the_table():
    classes = [c for c in vars(perturbations).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    assert {c for c in classes if "where" in c.__dataclass_fields__} == {type(p) for p in PERTURBATIONS}
