"""Methods that change attention maps, against dense references written from their formulas, and their limits."""

import math

import entmax
import pytest
import torch
from fake_cuda import check_same, fake_cuda, sent
from torchvision.transforms.functional import gaussian_blur

from segresearch.errors import InputError
from segresearch.guidance.methods.asag import ASAG
from segresearch.guidance.methods.emag import EMAG
from segresearch.guidance.methods.erg import ERG
from segresearch.guidance.methods.map_ablations import BlurredMap, DroppedMap, NoisyMap
from segresearch.guidance.methods.nag import NAG
from segresearch.guidance.methods.pladis import PLADIS
from segresearch.guidance.methods.soft_pag import PATHS, TARGETS, SoftPAG
from segresearch.guidance.methods.temperature import AttentionTemperature
from segresearch.guidance.perturbations import PAG, SEG
from segresearch.models.attention import Site, sdpa
from segresearch.sampling.memory import Past, Run

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1"
SITE = Site(NAME, (3, 5))
KEYED = SITE._replace(keys=torch.tensor([7, 11]), sigma=torch.tensor([3.0, 3.0]))
TEXTS = [torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]
CROSS = Site(f"{NAME[:-1]}2", (3, 5), "cross", texts={"uncond": tuple(TEXTS)})


def heads(rows=2, count=4, tokens=15, dim=8, keys=None, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(0)
    sizes = (tokens, keys or tokens, keys or tokens)
    q, k, v = (torch.randn(rows, count, n, dim, generator=g, dtype=torch.float64) for n in sizes)
    return [z.to(dtype) for z in (scale * q, scale * k, v)]


def map_of(q, k, site, perturbation):
    """The map that a perturbation leaves, read off by values of the identity: `dim` must be `tokens`."""
    return perturbation(q, k, torch.eye(q.shape[2], dtype=q.dtype).expand_as(q), site, sdpa)


def scores(q, k):
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def close(out, expected, atol=1e-12):
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)


def never(q, k, v, site):
    raise AssertionError("attention was computed")


# --- SoftPAG ------------------------------------------------------------------------------------------


def target(q, k, name, temperature=2.0):
    """The target maps of arXiv 2506.10978, Appendix C."""
    dense = scores(q, k).softmax(-1)
    n = dense.shape[-1]
    return {
        "identity": torch.eye(n, dtype=q.dtype).expand_as(dense),
        "uniform": torch.full_like(dense, 1 / n),
        "mean_query": scores(q.mean(2, keepdim=True), k).softmax(-1).expand_as(dense),
        "temperature": (dense.log() / temperature).softmax(-1),
        "max": (dense == dense.amax(-1, keepdim=True)).to(q.dtype),
    }[name]


def path_of(a, b, tau, name):
    """Paths between two maps; where one has zeros both are kept from 0, as in the authors' code."""
    if name == "linear":
        return (1 - tau) * a + tau * b
    if name == "log_linear":
        full = b if (b > 0).all() else b * (1 - 1e-6 * (b.shape[-1] - 1)) + 1e-6
        return ((1 - tau) * (a.clamp_min(1e-12) if full is not b else a).log() + tau * full.log()).softmax(-1)
    if name == "chord":
        mixed = ((1 - tau) * a.sqrt() + tau * b.sqrt()) ** 2
        return mixed / mixed.sum(-1, keepdim=True)
    angle = torch.acos((a * b).sqrt().sum(-1, keepdim=True))
    return ((torch.sin((1 - tau) * angle) * a.sqrt() + torch.sin(tau * angle) * b.sqrt()) / torch.sin(angle)) ** 2


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TARGETS)
def test_soft_pag_is_the_path_to_its_target(name, path, tau):
    q, k, v = heads()
    dense, end = scores(q, k).softmax(-1), target(q, k, name)
    expected = {0.0: dense, 1.0: end}.get(tau)
    expected = path_of(dense, end, tau, path) if expected is None else expected
    close(SoftPAG(tau, name, path)(q, k, v, SITE, sdpa), expected @ v, atol=1e-7)
    half = SoftPAG(tau, name, path, heads=[1, 3])(q, k, v, SITE, sdpa)
    close(half[:, 1::2], (expected @ v)[:, 1::2], atol=1e-7)
    assert torch.equal(half[:, ::2], sdpa(q, k, v, SITE)[:, ::2])


def test_soft_pag_meets_pag_seg_and_temperature():
    q, k, v = heads(dtype=torch.float32)
    for tau in (0.0, 0.3, 1.0):
        assert torch.equal(SoftPAG(tau)(q, k, v, SITE, sdpa), PAG(tau=tau)(q, k, v, SITE, sdpa))
    assert SoftPAG(1.0)(q, k, v, SITE, never) is v
    assert torch.equal(SoftPAG(1.0, "mean_query")(q, k, v, SITE, sdpa), SEG(math.inf)(q, k, v, SITE, sdpa))
    cold = AttentionTemperature(0.25)(q, k, v, SITE, sdpa)
    assert torch.equal(SoftPAG(1.0, "temperature", temperature=4.0)(q, k, v, SITE, sdpa), cold)
    sharp = SoftPAG(1.0, "temperature", temperature=1e-3)(*heads(), SITE, sdpa)
    close(sharp, SoftPAG(1.0, "max")(*heads(), SITE, sdpa), atol=1e-6)


def test_a_path_that_starts_at_its_end_stays():
    """Equal maps: one token has one map, and the angle between both is 0."""
    q, k, v = heads(tokens=1)
    for path in PATHS:
        for name in TARGETS:
            close(SoftPAG(0.4, name, path)(q, k, v, Site(NAME, (1, 1)), sdpa), v)


# --- temperature, ERG, ASAG, EMAG ---------------------------------------------------------------------


def test_temperature():
    q, k, v = heads()
    for beta in (0.0, 0.5, 3.0):
        close(AttentionTemperature(beta)(q, k, v, SITE, sdpa), (beta * scores(q, k)).softmax(-1) @ v)
    assert torch.equal(AttentionTemperature(1.0)(q, k, v, SITE, sdpa), sdpa(q, k, v, SITE))
    some = AttentionTemperature(0.5, heads=[2])(q, k, v, SITE, sdpa)
    assert torch.equal(some[:, [0, 1, 3]], sdpa(q, k, v, SITE)[:, [0, 1, 3]])
    assert not torch.equal(some[:, 2], sdpa(q, k, v, SITE)[:, 2])


@pytest.mark.parametrize(("tau", "alpha", "gamma", "iterations"), [(0.5, 1, 1, 1), (0.7, 1.2, 0.3, 4), (2, 0.5, 1, 2)])
def test_erg_steps_on_the_energy(tau, alpha, gamma, iterations):
    q, k, v = heads()
    state = q
    for _ in range(iterations):
        state = state - gamma * (state - alpha * (tau * scores(state, k)).softmax(-1) @ v)
    close(ERG(tau, alpha, gamma, iterations)(q, k, v, SITE, sdpa), state)
    some = ERG(tau, alpha, gamma, iterations, heads=[0])(q, k, v, SITE, sdpa)
    close(some[:, :1], state[:, :1])
    assert torch.equal(some[:, 1:], sdpa(q, k, v, SITE)[:, 1:])


def test_erg_limits():
    q, k, v = heads(dtype=torch.float32)
    assert torch.equal(ERG(1.0, 1.0, 1.0, 1)(q, k, v, SITE, sdpa), sdpa(q, k, v, SITE))
    assert torch.equal(ERG(0.5)(q, k, v, SITE, sdpa), AttentionTemperature(0.5)(q, k, v, SITE, sdpa))
    assert torch.equal(ERG(0.5, gamma=0.0, iterations=3)(q, k, v, SITE, sdpa), q)


@pytest.mark.parametrize("cost", [0.0, 1.0, 4.0])
def test_asag_is_sinkhorn_of_the_scores_with_a_cost(cost):
    q, k, v = heads()
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    plan = torch.exp(scores(q, k) - cost * cosine)
    for _ in range(5):
        plan = plan / plan.sum(-2, keepdim=True)
        plan = plan / plan.sum(-1, keepdim=True)
    close(ASAG(cost)(q, k, v, SITE, sdpa), plan @ v, atol=1e-10)


def test_asag_is_doubly_stochastic_in_the_limit_and_softmax_at_none():
    q, k, v = heads(dim=15)
    plan = map_of(q / 2, k / 2, SITE, ASAG(1.0, iterations=3000))
    for axis in (-1, -2):
        close(plan.sum(axis), torch.ones_like(plan.sum(axis)), atol=1e-6)
    close(ASAG(0.0, iterations=0)(q, k, v, SITE, never), sdpa(q, k, v, SITE))
    assert torch.equal(ASAG(heads=[1])(q, k, v, SITE, sdpa)[:, 0], sdpa(q, k, v, SITE)[:, 0])


def test_asag_lowers_likeness():
    """What the cost is for: the mean cosine under the map falls with it."""
    q, k, _ = heads(dim=15)
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    costs = [(map_of(q, k, SITE, ASAG(cost)) * cosine).sum().item() for cost in (0.0, 1.0, 2.0, 5.0)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_emag_averages_queries_over_the_levels(strength):
    sigmas = (9.0, 4.0, 1.0, 0.0)
    run = Run(torch.tensor([3, 4]), sigmas=sigmas)
    average = None
    for level, sigma in enumerate(sigmas[:-1]):
        q, k, v = heads(scale=1.0 + level)
        average = q if average is None else 0.9 * average + 0.1 * q
        site = SITE._replace(past=Past(run, "emag", sigma))
        expected = sdpa(strength * average + (1 - strength) * q, k, v, SITE)
        for _ in range(2):  # a second evaluation at a level starts from the state before that level
            close(EMAG(0.9, strength)(q, k, v, site, sdpa), expected)
    some = EMAG(0.9, heads=[3])(q, k, v, site, sdpa)
    assert torch.equal(some[:, :3], sdpa(q, k, v, SITE)[:, :3])
    assert not torch.equal(some[:, 3], sdpa(q, k, v, SITE)[:, 3])


def test_emag_limits():
    q, k, v = heads(dtype=torch.float32)
    run = Run(torch.tensor([3, 4]), sigmas=(9.0, 4.0, 0.0))
    first, second = (SITE._replace(past=Past(run, "emag", sigma)) for sigma in (9.0, 4.0))
    assert EMAG.remembers
    assert torch.equal(EMAG()(q, k, v, SITE, sdpa), sdpa(q, k, v, SITE))  # without a run nothing is remembered
    assert torch.equal(EMAG()(q, k, v, first, sdpa), sdpa(q, k, v, SITE))
    assert torch.equal(EMAG()(-q, k, v, second, lambda q, *rest: q), torch.lerp(-q, q, 0.988))
    assert torch.equal(EMAG(strength=0.0)(-q, k, v, second, sdpa), sdpa(-q, k, v, SITE))
    assert torch.equal(EMAG(beta=0.0)(-q, k, v, second, sdpa), sdpa(-q, k, v, SITE))


def test_scales_of_emag_and_nag_convert():
    u, c, weak, w, theirs = 1.0, 2.0, 1.5, 7.0, 1.5
    mixed = weak + theirs * (c - weak)
    assert u + w * (mixed - u) == pytest.approx(c + (w - 1) * (c - u) + w * (theirs - 1) * (c - weak))
    assert c * theirs - u * (theirs - 1) == c + (theirs - 1) * (c - u)  # nag_scale: the paper's scale plus 1


# --- ablations of PAG ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "taps", "grid"), [(0.8, 5, (3, 5)), (2.0, 7, (2, 6)), (0.5, 3, (4, 1))])
def test_blurred_map_is_the_blur_of_the_map_as_an_image(sigma, taps, grid):
    """torchvision's gaussian_blur is what the code of PAG calls."""
    q, k, v = heads(tokens=grid[0] * grid[1])
    expected = gaussian_blur(scores(q, k).softmax(-1), [taps, taps], [sigma, sigma]) @ v
    close(BlurredMap(sigma, taps)(q, k, v, Site(NAME, grid), sdpa), expected, atol=1e-6)  # its taps are fp32
    assert torch.equal(BlurredMap(0.0)(q, k, v, SITE, sdpa), sdpa(q, k, v, SITE))
    assert torch.equal(BlurredMap(heads=[0])(q, k, v, SITE, sdpa)[:, 1:], sdpa(q, k, v, SITE)[:, 1:])


def test_dropped_map_drops_and_renormalizes():
    q, k, _ = heads(dim=15)
    dense, diagonal = scores(q, k).softmax(-1), torch.eye(15, dtype=torch.bool)
    dropout = map_of(q, k, KEYED, DroppedMap(0.6, keep_diagonal=False, renormalize=False))
    gone = dropout == 0
    close(dropout, dense.masked_fill(gone, 0.0))  # what is left is as it was
    assert abs(gone.double().mean().item() - 0.6) < 0.05
    masked = map_of(q, k, KEYED, DroppedMap(0.6))
    close(
        masked, scores(q, k).masked_fill(gone & ~diagonal, -math.inf).softmax(-1)
    )  # the same draw, before the softmax
    anywhere = map_of(q, k, KEYED, DroppedMap(0.6, keep_diagonal=False))
    close(anywhere, scores(q, k).masked_fill(gone, -math.inf).softmax(-1).nan_to_num(0.0))


def test_dropped_map_limits():
    q, k, v = heads()
    assert torch.equal(DroppedMap(0.0)(q, k, v, KEYED, sdpa), sdpa(q, k, v, SITE))
    close(DroppedMap(1.0)(q, k, v, KEYED, sdpa), v)
    assert not DroppedMap(1.0, keep_diagonal=False)(q, k, v, KEYED, sdpa).any()
    some = DroppedMap(0.5, heads=[2])(q, k, v, KEYED, sdpa)
    assert torch.equal(some[:, :2], sdpa(q, k, v, SITE)[:, :2])


def test_noisy_map_adds_unit_noise_to_the_map():
    q, k, v = heads(dim=15)
    noise = (map_of(q, k, KEYED, NoisyMap(0.3)) - scores(q, k).softmax(-1)) / 0.3
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1
    close(NoisyMap(0.3)(q, k, v, KEYED, sdpa), (scores(q, k).softmax(-1) + 0.3 * noise) @ v)
    assert torch.equal(NoisyMap(0.0)(q, k, v, KEYED, sdpa), sdpa(q, k, v, SITE))
    assert torch.equal(NoisyMap(heads=[1])(q, k, v, KEYED, sdpa)[:, 0], sdpa(q, k, v, SITE)[:, 0])


@pytest.mark.parametrize("perturbation", [DroppedMap(0.5), NoisyMap(0.3)])
def test_draws_belong_to_an_image_a_level_and_a_site(perturbation):
    q, k, v = heads(rows=4)
    out = perturbation(q, k, v, KEYED, sdpa)  # two parts of two images
    whole = KEYED._replace(keys=torch.tensor([7, 11, 7, 11]), sigma=torch.full((4,), 3.0))
    assert torch.equal(out, perturbation(q, k, v, whole, sdpa))
    alike = [z[:1].expand(4, -1, -1, -1) for z in (q, k, v)]
    first, second, third, _ = perturbation(*alike, KEYED, sdpa)
    assert torch.equal(first, third) and not torch.equal(first, second)
    at = {"sigma": torch.tensor([2.0, 2.0]), "name": "another", "keys": torch.tensor([8, 11])}
    for field, value in at.items():
        assert not torch.equal(perturbation(*alike, KEYED._replace(**{field: value}), sdpa)[0], first), field
    assert torch.isfinite(perturbation(q, k, v, SITE, sdpa)).all()  # without a run


# --- cross-attention ----------------------------------------------------------------------------------


def nag_processor(positive, negative, nag_scale, tau, alpha):
    """The formula of the authors' processor, on outputs with heads side by side, for their nag_scale."""
    positive, negative = (z.transpose(1, 2).flatten(2) for z in (positive, negative))
    guidance = positive * nag_scale - negative * (nag_scale - 1)
    ratio = guidance.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    guidance = guidance * torch.minimum(ratio, torch.full_like(ratio, tau)) / ratio
    return (guidance * alpha + positive * (1 - alpha)).unflatten(2, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(2.0, 2.5, 0.5), (10.0, 1.3, 0.8), (0.5, 0.0, 1.0)])
def test_nag_is_the_processor_of_its_authors(scale, tau, alpha):
    q, k, v = heads(keys=6)
    negative = sdpa(q, *(z.expand(2, -1, -1, -1) for z in TEXTS), CROSS)
    expected = nag_processor(sdpa(q, k, v, CROSS), negative, scale + 1, tau, alpha)
    close(NAG(scale, tau, alpha)(q, k, v, CROSS, sdpa), expected)
    some = NAG(scale, tau, alpha, heads=[1])(q, k, v, CROSS, sdpa)
    close(some[:, 1], expected[:, 1])
    assert torch.equal(some[:, 0], sdpa(q, k, v, CROSS)[:, 0])


def test_nag_limits_and_texts():
    q, k, v = heads(rows=4, keys=6)
    for nothing in (NAG(0.0), NAG(alpha=0.0)):
        assert torch.equal(nothing(q, k, v, CROSS, sdpa), sdpa(q, k, v, CROSS))
    own = CROSS._replace(texts={"uncond": (k, v)})
    close(NAG()(q, k, v, own, sdpa), sdpa(q, k, v, CROSS))  # away from itself
    assert NAG(negative="weak").conditionings == ("weak",) and NAG.site_kind == "cross"
    part = CROSS._replace(texts={"uncond": (k[:2], v[:2])}, branches=(("cond",), ("cond~seg",)))
    every = CROSS._replace(texts={"uncond": (k[:2].repeat(2, 1, 1, 1), v[:2].repeat(2, 1, 1, 1))})
    assert torch.equal(NAG()(q, k, v, part, sdpa), NAG()(q, k, v, every, sdpa))
    assert not NAG()(q, k, 0 * v, CROSS, sdpa).any()  # no norm to compare with: finite


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, -1.0])
def test_pladis_is_entmax_beyond_softmax(scale):
    """Against entmax by bisection; PLADIS itself takes the exact algorithm."""
    q, k, v = heads(keys=7)
    sparse = entmax.entmax_bisect(scores(q, k), alpha=1.5, dim=-1, n_iter=80)
    assert (sparse == 0).any()
    expected = (scale * sparse + (1 - scale) * scores(q, k).softmax(-1)) @ v
    close(PLADIS(scale)(q, k, v, CROSS, sdpa), expected, atol=1e-9)
    some = PLADIS(scale, heads=[0])(q, k, v, CROSS, sdpa)
    assert torch.equal(some[:, 1:], sdpa(q, k, v, CROSS)[:, 1:])


def test_pladis_limits():
    q, k, v = heads(keys=7)
    assert torch.equal(PLADIS(0.0)(q, k, v, CROSS, sdpa), sdpa(q, k, v, CROSS))
    close(PLADIS()(0 * q, k, v, CROSS, sdpa), v.mean(2, keepdim=True).expand_as(q))  # both maps are uniform
    assert PLADIS.site_kind == "cross"


# --- all of them --------------------------------------------------------------------------------------

SELF = [SoftPAG(), *(SoftPAG(0.5, "max", path) for path in PATHS), SoftPAG(0.5, "mean_query", "slerp"),
        AttentionTemperature(), ERG(0.5, gamma=0.5, iterations=3), ASAG(), EMAG(), BlurredMap(), DroppedMap(),
        NoisyMap()]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("perturbation", [*SELF, NAG(), PLADIS()], ids=repr)
def test_dtypes_and_batches(perturbation, dtype):
    cross = getattr(perturbation, "site_kind", "self") == "cross"
    q, k, v = heads(keys=6 if cross else None, dtype=dtype)
    texts = {"uncond": tuple(z.to(dtype) for z in TEXTS)} if cross else {}
    site = KEYED._replace(kind="cross" if cross else "self", texts=texts)
    out = perturbation(q, k, v, site, sdpa)
    assert out.dtype == dtype and out.shape == q.shape and torch.isfinite(out).all()
    for row in (0, 1):
        alone = site._replace(keys=KEYED.keys[row : row + 1], sigma=KEYED.sigma[row : row + 1])
        one = perturbation(*(z[row : row + 1] for z in (q, k, v)), alone, sdpa)
        close(one.float(), out[row : row + 1].float(), atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("perturbation", [*SELF, NAG(), PLADIS()], ids=repr)
def test_logits_of_a_half_precision_may_be_large(perturbation):
    q, k, v = heads(keys=15, dtype=torch.float16, scale=30.0)
    site = KEYED._replace(texts={"uncond": tuple(z.half() for z in TEXTS)})
    assert torch.isfinite(perturbation(q, k, v, site, sdpa)).all()


@pytest.mark.parametrize("perturbation", [*SELF, NAG(), PLADIS()], ids=repr)
def test_all_is_on_the_device_and_nothing_is_read(perturbation):
    cross = getattr(perturbation, "site_kind", "self") == "cross"
    values = heads(keys=6 if cross else None, dtype=torch.float32)
    texts = tuple(z.float() for z in TEXTS)
    site = KEYED._replace(texts={"uncond": texts})
    expected = perturbation(*values, site, sdpa)
    with fake_cuda() as mode:
        moved, there = sent(values), sent(texts)
        site = SITE._replace(keys=sent(KEYED.keys), sigma=sent(KEYED.sigma), texts={"uncond": there})
        perturbation(*moved, site, sdpa)  # constants are sent once
        mode.reads, mode.sends = [], []
        out = perturbation(*moved, site, sdpa)
        assert mode.reads == mode.sends == []
        check_same(out, expected, rtol=1e-4, atol=1e-4)


def test_equal_values_compare_and_hash_equal():
    assert SoftPAG(heads=[0, 1]) == SoftPAG(heads=(0, 1)) and hash(NAG(where=["mid", 3])) == hash(NAG(where=("mid", 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftPAG(1.5), lambda: SoftPAG(target="other"), lambda: SoftPAG(path="other"),
        lambda: SoftPAG(temperature=0.0), lambda: AttentionTemperature(-1.0), lambda: AttentionTemperature(math.inf),
        lambda: ERG(math.nan), lambda: ERG(gamma=-1.0), lambda: ERG(iterations=0), lambda: ASAG(-1.0),
        lambda: ASAG(iterations=-1), lambda: EMAG(1.1), lambda: EMAG(strength=-0.1), lambda: BlurredMap(taps=4),
        lambda: BlurredMap(math.inf), lambda: DroppedMap(1.1), lambda: NoisyMap(-1.0), lambda: NAG(-1.0),
        lambda: NAG(tau=math.nan), lambda: NAG(alpha=2.0), lambda: PLADIS(math.inf), lambda: PLADIS(heads=[]),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(make):
    with pytest.raises(InputError, match="got|heads"):
        make()
