"""Attention perturbations against dense references, their limits, and the selectors of sites and heads."""

import math

import pytest
import torch

from segresearch.guidance import PAG, SEG, At, blur, blur_matrix, perturbed, select_sites
from segresearch.models.attention import Site, sdpa

SITE = Site("mid_block.attentions.0.transformer_blocks.0.attn1", (3, 5))
SITES = (
    *(f"down_blocks.1.attentions.{a}.transformer_blocks.{b}.attn1" for a in (0, 1) for b in (0, 1)),
    *(f"down_blocks.10.attentions.0.transformer_blocks.{b}.attn1" for b in range(11)),
    *(f"mid_block.attentions.0.transformer_blocks.{b}.attn1" for b in range(12)),
    *(f"up_blocks.0.attentions.{a}.transformer_blocks.0.attn1" for a in range(3)),
)


def heads(rows=2, count=4, tokens=15, dim=8, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(0)
    return [scale * torch.randn(rows, count, tokens, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def attend(q, k, v, site):
    """Plain attention by name, but not the default object."""
    return sdpa(q, k, v, site)


def never(q, k, v, site):
    raise AssertionError("attention was computed")


@pytest.mark.parametrize("boundary", ["reflect", "symmetric", "circular", "exact"])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0, 100.0, math.inf])
@pytest.mark.parametrize("on", ["q", "k", "qk"])
def test_seg_is_the_dense_blur_of_the_map(boundary, sigma, on):
    """Proposition 3.1 of arXiv 2408.00760: blurring q (k) blurs the map of logits along its queries (keys)."""
    q, k, v = heads()
    whole = torch.kron(blur_matrix(3, sigma, boundary), blur_matrix(5, sigma, boundary))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    logits = whole @ logits if "q" in on else logits
    logits = logits @ whole.T if "k" in on else logits
    expected = logits.softmax(-1) @ v
    for inner in (sdpa, attend):
        out = SEG(sigma, on=on, boundary=boundary)(q, k, v, SITE, inner)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_seg_limits():
    q, k, v = heads(dtype=torch.float32)
    assert torch.equal(SEG(0.0)(q, k, v, SITE, attend), sdpa(q, k, v, SITE))
    out = SEG(math.inf)(q, k, v, SITE, sdpa)
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    torch.testing.assert_close(out, SEG(math.inf)(q, k, v, SITE, attend), rtol=0, atol=1e-6)
    uniform = SEG(math.inf, on="k")(q, k, v, SITE, sdpa)  # equal keys: every token attends to all alike
    torch.testing.assert_close(uniform, v.mean(2, keepdim=True).expand_as(v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("perturbation", [SEG(1.0), SEG(math.inf), PAG(), PAG(tau=0.3), SEG(1.0, heads=[1])])
def test_rows_do_not_mix(perturbation):
    q, k, v = heads(rows=3)
    together = perturbation(q, k, v, SITE, sdpa)
    for i in range(3):
        alone = perturbation(q[i : i + 1], k[i : i + 1], v[i : i + 1], SITE, sdpa)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-13)


def test_pag():
    q, k, v = heads()
    plain = sdpa(q, k, v, SITE)
    assert PAG()(q, k, v, SITE, never) is v
    assert torch.equal(PAG(tau=0)(q, k, v, SITE, attend), plain)
    mixed = 0.75 * (q @ k.mT / math.sqrt(8)).softmax(-1) + 0.25 * torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(PAG(tau=0.25)(q, k, v, SITE, attend), mixed @ v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [lambda h: SEG(1.5, heads=h), lambda h: PAG(heads=h), lambda h: PAG(heads=h, tau=0.5)])
def test_heads(make):
    q, k, v = heads()
    calls = []

    def counted(q, k, v, site):
        calls.append(q.shape)
        return sdpa(q, k, v, site)

    some, all_ = make([1, 3])(q, k, v, SITE, counted), make(None)(q, k, v, SITE, sdpa)
    assert calls == [q.shape]  # one plain call that saw every head
    torch.testing.assert_close(some[:, [1, 3]], all_[:, [1, 3]], rtol=0, atol=1e-13)
    torch.testing.assert_close(some[:, [0, 2]], sdpa(q, k, v, SITE)[:, [0, 2]], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"no head 4 at mid_block.*heads 0 to 3"):
        make([4])(q, k, v, SITE, sdpa)


def test_plain_function():
    q, k, v = heads()

    def mean_value(q, k, v, site, attend):
        return v.mean(2, keepdim=True).expand_as(v)

    out = At(mean_value, heads=[2])(q, k, v, SITE, sdpa)
    torch.testing.assert_close(out[:, 2], v[:, 2].mean(1, keepdim=True).expand_as(v[:, 2]))
    assert torch.equal(out[:, [0, 1, 3]], sdpa(q, k, v, SITE)[:, [0, 1, 3]])
    assert perturbed("mine", mean_value, 2.0).neg.perturbations == (At(mean_value, "mid"),)
    assert perturbed("mine", mean_value, 2.0, where=["up", -1], heads=[0]).neg.perturbations == (
        At(mean_value, ("up", -1), (0,)),
    )
    assert perturbed("seg", SEG(1.0), 2.0, where="up").neg.perturbations == (SEG(1.0, where="up"),)
    assert repr(At(mean_value, "up.0")) == "mean_value(where='up.0')"
    with pytest.raises(ValueError, match=r"gave \(2, 4, 14, 8\) at mid_block.*expected \(2, 4, 15, 8\)"):
        At(lambda q, k, v, site, attend: v[:, :, 1:])(q, k, v, SITE, sdpa)


def test_lists_of_a_config_compare_equal():
    assert SEG(1.0, where=["mid", "up"], heads=[1]) == SEG(1.0, where=("mid", "up"), heads=(1,))
    assert len({PAG(heads=[0, 1]), PAG(heads=(0, 1))}) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SEG(-1.0), "blur sigma must be a number >= 0"),
        (lambda: SEG(math.nan), "blur sigma must be a number >= 0"),
        (lambda: SEG(1.0, on="v"), 'on="q", "k" or "qk", got \'v\''),
        (lambda: SEG(1.0, boundary="zero"), "must be one of reflect, symmetric, circular, exact, got 'zero'"),
        (lambda: PAG(tau=1.5), r"tau must be in \[0, 1\], got 1.5"),
        (lambda: PAG(heads=[]), r"heads=\[\] perturbs nothing"),
        (lambda: SEG(heads=[-1]), "head indices start at 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "where, expected",
    [
        ("down", SITES[:15]),
        ("mid", SITES[15:27]),
        ("up", SITES[27:]),
        ("down.1", SITES[:4]),
        ("down.10", SITES[4:15]),
        ("down.1.1", SITES[2:4]),
        ("down.10.0.1", SITES[5:6]),
        ("mid.0.1", SITES[16:17]),
        ("up.0.2", SITES[29:]),
        ("*", SITES),
        ("*transformer_blocks.1.*", tuple(s for s in SITES if "transformer_blocks.1." in s)),
        (SITES[7], SITES[7:8]),
        (3, SITES[3:4]),
        (-1, SITES[-1:]),
        (["up.0.0", "mid.0.0", -1], (SITES[15], SITES[27], SITES[29])),
    ],
)
def test_selectors(where, expected):
    assert select_sites(where, SITES) == expected


@pytest.mark.parametrize(
    "where", ["midd", "up.7", "down.0", "mid.1", "down.1.0.0.0", 30, -31, "", ["mid", "up.9"], "MID*"]
)
def test_a_selector_without_match_lists_real_names(where):
    with pytest.raises(
        ValueError, match=r"matches no self-attention site.*mid_block.attentions.0.transformer_blocks.0.attn1"
    ):
        select_sites(where, SITES)


def test_an_empty_selector_is_refused():
    with pytest.raises(ValueError, match=r"^where=\[\]: empty; name a group \(down, mid, up\)"):
        select_sites([], SITES)


def test_heads_of_a_function_that_works_in_place():
    """The other heads keep plain attention even if the function spoils the q it is handed."""
    q, k, v = heads(count=3)
    site = SITE

    def halved(q, k, v, site, attend):
        return attend(q.mul_(0.5), k, v, site)

    expected = sdpa(q, k, v, site)
    expected[:, :1] = sdpa(q[:, :1] / 2, k[:, :1], v[:, :1], site)
    out = At(halved, heads=[0])(q.clone(), k, v, site, sdpa)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_gradients_after_a_blur_in_inference_mode():
    z = torch.randn(1, 1, 35, 2, dtype=torch.float64)
    with torch.inference_mode():
        blur(z, (5, 7), 1.83)
    z.requires_grad_()
    blur(z, (5, 7), 1.83).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("out", [None, torch.zeros(1)])
def test_what_a_function_returns_is_checked(out):
    q = torch.zeros(1, 2, 4, 3)
    with pytest.raises(ValueError, match="gave .* at mid, expected"):
        At(lambda q, k, v, site, attend: out)(q, q, q, Site("mid", (2, 2)), sdpa)


def test_a_truth_value_is_no_place():
    with pytest.raises(ValueError, match="where=True"):
        PAG(where=True)
