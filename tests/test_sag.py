"""Self-Attention Guidance against its published form in eps space, written out by hand, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from guidance_models import denoiser, noisy

from segresearch.guidance import SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.sag import attention_received
from segresearch.models.attention import sdpa

SEG_TERM = {"seg": perturbed("seg", SEG(1.0), 3.0)}
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mask_of(inner, x, sigma, cond, threshold):
    """From the whole probability map of a plain forward: mean over heads, sum over queries."""
    maps = {}

    def attend(q, k, v, site):
        maps[site.name] = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1), site.grid
        return sdpa(q, k, v, site)

    inner(x, sigma, cond=cond, attend=attend)
    pattern, (h, w) = maps[MID]
    return (pattern.mean(1).sum(1) > threshold).reshape(-1, 1, h, w)


def blurred(z):
    taps = torch.tensor([math.exp(-0.5 * i * i) for i in range(-4, 5)], dtype=z.dtype)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    return F.conv2d(F.pad(z, (4, 4, 4, 4), mode="reflect"), kernel.expand(4, 1, 9, 9), groups=4)


def published(x, sigma, conds, base, scale, guided_eps, threshold=1.0):
    """eps + s·(eps_base − eps_base(x̃)), x̃ = masked blur of the predicted x0, noised again with the same eps."""
    inner, s = denoiser(), sigma[:, None, None, None]
    eps = (x - inner(x, sigma, cond=conds[base])) / s
    x0 = x - s * eps
    mask = F.interpolate(mask_of(inner, x, sigma, conds[base], threshold).to(x.dtype), x.shape[2:])
    degraded = blurred(x0) * mask + x0 * (1 - mask)
    noised = degraded + s * eps
    eps_degraded = (noised - inner(noised, sigma, cond=conds[base])) / s
    assert 0 < mask.mean() < 1 and (eps - eps_degraded).abs().max() > 1e-3
    return x - s * (guided_eps + scale * (eps - eps_degraded))


@pytest.mark.parametrize("sigma", [0.05, 3.0, 12.0])
@pytest.mark.parametrize("grid", [(8, 12), (24, 8)])
@torch.no_grad()
def test_alone(sigma, grid):
    x, sigma, conds = noisy(3, *grid, sigma=sigma)
    eps = (x - denoiser()(x, sigma, cond=conds["cond"])) / sigma[:, None, None, None]
    expected = published(x, sigma, conds, "cond", 0.75, eps)
    out = SelfAttentionGuidance(denoiser())(x, sigma, conds={"cond": conds["cond"]})
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_with_cfg_the_unconditional_branch_is_degraded():
    x, sigma, conds = noisy(2)
    s = sigma[:, None, None, None]
    eps_c, eps_u = ((x - denoiser()(x, sigma, cond=conds[name])) / s for name in ("cond", "uncond"))
    expected = published(x, sigma, conds, "uncond", 1.0, eps_u + 5.0 * (eps_c - eps_u))
    inner = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0)})
    torch.testing.assert_close(SelfAttentionGuidance(inner, 1.0)(x, sigma, conds=conds), expected, rtol=0, atol=1e-10)
    expected = published(x, sigma, conds, "cond", 1.0, eps_u + 5.0 * (eps_c - eps_u))
    out = SelfAttentionGuidance(inner, 1.0, base="cond")(x, sigma, conds=conds)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    outside = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0, interval=(5.0, 9.0))})  # no CFG at this sigma
    expected = published(x, sigma, conds, "cond", 1.0, eps_c)
    torch.testing.assert_close(SelfAttentionGuidance(outside, 1.0)(x, sigma, conds=conds), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "terms", [SEG_TERM, SEG_TERM | {"cfg": cfg(5.0)}, {"seg": perturbed("seg", SEG(where="*"), 2.0)}]
)
@torch.no_grad()
def test_inner_terms_stay(terms):
    """The map is of the base's own rows, whatever the other rows of that forward are put under."""
    x, sigma, conds = noisy(2)
    s = sigma[:, None, None, None]
    inner = GuidedDenoiser(denoiser(), terms)
    base = "uncond" if "cfg" in terms else "cond"
    expected = published(x, sigma, conds, base, 0.5, (x - inner(x, sigma, conds=conds)) / s)
    torch.testing.assert_close(SelfAttentionGuidance(inner, 0.5)(x, sigma, conds=conds), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_limits():
    x, sigma, conds = noisy(2)
    inner = GuidedDenoiser(denoiser(), SEG_TERM)
    plain = inner(x, sigma, conds=conds)
    for model in (
        SelfAttentionGuidance(inner, 0.0),
        SelfAttentionGuidance(inner, interval=(5.0, math.inf)),
        SelfAttentionGuidance(inner, lambda sigma: 0.0),
    ):
        assert torch.equal(model(x, sigma, conds=conds), plain)
    for model in (SelfAttentionGuidance(inner, threshold=1e9), SelfAttentionGuidance(inner, blur_sigma=0.0)):
        torch.testing.assert_close(model(x, sigma, conds=conds), plain, rtol=0, atol=1e-12)  # nothing is degraded
    x, sigma, conds = noisy(2, sigma=1e-6)
    assert SelfAttentionGuidance(inner)(x, sigma, conds=conds).isfinite().all()


@torch.no_grad()
def test_images_do_not_depend_on_the_batch():
    model = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(5.0)}))
    x, sigma, conds = noisy(3)
    together = model(x, sigma, conds=conds)
    for i in range(3):
        alone = model(x[i : i + 1], sigma[:1], conds={name: c[[i]] for name, c in conds.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_sigma_per_row():
    x, sigma, conds = noisy(2)
    sigma = torch.tensor([3.0, 1.0], dtype=x.dtype)
    model = SelfAttentionGuidance(GuidedDenoiser(denoiser(), SEG_TERM), interval=(2.0, 9.0))
    together = model(x, sigma, conds=conds)
    for i in range(2):
        alone = model(x[i : i + 1], sigma[i : i + 1], conds={name: c[[i]] for name, c in conds.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)
    inner = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0, interval=(2.0, 9.0))})
    with pytest.raises(ValueError, match="both sides of the interval"):
        SelfAttentionGuidance(inner)(x, sigma, conds=conds)


def test_attention_received_is_streamed_exactly():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 50, 8, generator=g, dtype=torch.float64) for _ in range(2))
    whole = (q @ k.mT / math.sqrt(8)).softmax(-1).mean(1).sum(1)
    for block in (1, 7, 50, 256):
        torch.testing.assert_close(attention_received(q, k, block), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.mean(1), torch.ones(2, dtype=torch.float64))


def test_construction():
    model = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(5.0)}), 0.5, interval=(0, 9))
    assert model.sigmas is denoiser().sigmas
    assert repr(model).startswith(
        "D = D[cond] + 4·(D[cond] − D[uncond]) + 0.5·(x̂ − D[base](x̂ + σ·ε)) [σ ≤ 9]\n  SAG: base uncond where CFG is on"
    )
    for options, message in (
        ({"scale": math.nan}, "scale of SAG must be finite"),
        ({"blur_sigma": -1.0}, "sigma must be a number >= 0"),
        ({"threshold": -1.0}, "threshold must be >= 0"),
        ({"interval": (3, 1)}, "interval of SAG"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfAttentionGuidance(denoiser(), **options)


def test_the_negative_of_cfg_is_degraded_whatever_its_name():
    x, sigma, conds = noisy(2, 4, 6)
    renamed = {"cond": conds["cond"], "bad": conds["uncond"]}
    default = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(3.0)}))(x, sigma, conds)
    other = SelfAttentionGuidance(GuidedDenoiser(denoiser(), {"cfg": cfg(3.0, neg="bad")}))(x, sigma, renamed)
    assert torch.equal(default, other)
