"""Methods that change the call of a block, of the embedding of t, or the image into crops."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers_unets import TWO_LEVELS, inputs
from fake_cuda import check_same, fake_cuda, sent
from guidance_models import denoiser, noisy
from layer_calls import BLOCK, CALLS, CHOSEN, KEYS, TIME, at, doubled, embedded, tokens

from segresearch.guidance.methods.s2_guidance import S2
from segresearch.guidance.methods.self_guidance import SelfGuidance
from segresearch.guidance.methods.slg import SLG
from segresearch.guidance.methods.ssg import SSG
from segresearch.guidance.methods.swg import SWG, Overlap
from segresearch.guidance.methods.tpg import TPG
from segresearch.guidance.methods.tsg import TSG
from segresearch.guidance.step import Step
from segresearch.models.unet import UNet, UNetConfig
from segresearch.sampling import draws

# --- dense references on a UNet -----------------------------------------------------------------------


def by_hand(block, h, context, without=()):
    """One image through one transformer block, head by head; h (tokens, c), context (text, c2)."""

    def attention(layer, x, y):
        q, k, v = layer.to_q(x), layer.to_k(y), layer.to_v(y)
        width, heads = q.shape[1] // layer.heads, []
        for i in range(layer.heads):
            part = slice(i * width, (i + 1) * width)
            heads.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(dim=1) @ v[:, part])
        return layer.to_out[0](torch.cat(heads, dim=1))

    if "attn1" not in without:
        y = block.norm1(h)
        h = h + attention(block.attn1, y, y)
    if "attn2" not in without:
        h = h + attention(block.attn2, block.norm2(h), context)
    if "ff" not in without:
        hidden, gate = block.ff.net[0].proj(block.norm3(h)).chunk(2, dim=-1)
        h = h + block.ff.net[2](hidden * torch.nn.functional.gelu(gate))
    return h


@torch.no_grad()
def of_unet(perturbation, change, rows: int = 3):
    """(eps with the perturbation, eps with `change(block, h, context, site)` of one image after another), and plain."""
    x, sigma, conds = noisy(rows)
    net, cond = denoiser(), conds["cond"]
    blocks = {block.name: block for block in net.unet.transformer_blocks}

    def perturbed(call, h, site):
        return perturbation(h, at(site, rows), call) if site.name in CHOSEN else call(h)

    def reference(call, h, site):
        if site.name not in CHOSEN:
            return call(h)
        each = [change(blocks[site.name], h[i], cond.context[i], at(site, rows), i) for i in range(rows)]
        return torch.stack(each)

    plain = net(x, sigma, cond)
    out, expected = net(x, sigma, cond, wrap=perturbed), net(x, sigma, cond, wrap=reference)
    assert (plain - expected).abs().max() > 1e-3
    return out, expected


def test_tpg_permutes_the_tokens_of_every_image():
    def change(block, h, context, site, i):
        order = draws.permutation(KEYS[i : i + 1], site.sigma[:1], f"{site.name}/tpg", len(h))[0].tolist()
        return by_hand(block, torch.stack([h[j] for j in order]), context)

    torch.testing.assert_close(*of_unet(TPG(), change))


@pytest.mark.parametrize("layers", [["attn1"], ["attn1", "attn2"], ["ff"], ["attn1", "attn2", "ff"]])
def test_slg_leaves_layers_out(layers):
    torch.testing.assert_close(
        *of_unet(SLG(layers=layers), lambda block, h, context, site, i: by_hand(block, h, context, layers))
    )


@pytest.mark.parametrize("shared", [False, True])
def test_s2_skips_a_subset_of_the_blocks_of_every_image(shared):
    def change(block, h, context, site, i):
        key = torch.zeros(1, dtype=torch.int64) if shared else KEYS[i : i + 1]
        skipped = draws.uniform(key, site.sigma[:1], f"{site.name}/s2", 1).item() < 0.5
        return h if skipped else by_hand(block, h, context)

    torch.testing.assert_close(*of_unet(S2(share=0.5, shared=shared), change))


def test_ssg_exchanges_the_most_dissimilar_pairs():
    def exchanged(z, pairs):
        """Pairs of rows of z, one after another, the least cosine of those left."""
        z, left = z.clone(), set(range(len(z)))
        unit = z / z.norm(dim=1, keepdim=True)
        for _ in range(pairs):
            i, j = min(
                ((i, j) for i in left for j in left if i < j), key=lambda pair: float(unit[pair[0]] @ unit[pair[1]])
            )
            z[[i, j]] = z[[j, i]]
            left -= {i, j}
        return z

    def change(block, h, context, site, i):
        h = exchanged(h, int(0.1 * len(h)))
        return by_hand(block, exchanged(h.T, int(0.05 * h.shape[1])).T, context)

    torch.testing.assert_close(*of_unet(SSG(tokens=0.1, channels=0.05), change))


@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 12)])
@torch.no_grad()
def test_slg_is_the_layer_skip_of_diffusers(rows, columns):
    """Whole blocks; with CFG, as the two rows of a batch whose second the hook would have to leave alone."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = UNet2DConditionModel(**TWO_LEVELS).eval()
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, cond = inputs(2, rows, columns)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    uncond, plain = (theirs(x, t, c, added_cond_kwargs=added).sample for c in (0 * cond.context, cond.context))
    apply_layer_skip(theirs, LayerSkipConfig([0, 2], fqn="mid_block.attentions.0.transformer_blocks"))
    skipped = theirs(x, t, cond.context, added_cond_kwargs=added).sample
    names = [f"mid_block.attentions.0.transformer_blocks.{i}" for i in (0, 2)]

    def wrap(call, h, site):
        return SLG(where=names)(h, site, call) if site.name in names else call(h)

    c, u = ours(x, t, cond), ours(x, t, replace(cond, context=0 * cond.context))
    guided = u + 5 * (c - u) + 3 * (c - ours(x, t, cond, wrap=wrap))
    assert (plain - skipped).abs().max() > 1e-4
    torch.testing.assert_close(guided, uncond + 5 * (plain - uncond) + 3 * (plain - skipped), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", CALLS, ids=lambda m: m.kind)
def test_an_image_does_not_depend_on_its_batch_or_branch(method):
    """The second image alone, and in the second of two parts."""
    h, site = tokens(), at(BLOCK)
    out = method(h, site, doubled)
    alone = method(h[1:2], site._replace(keys=KEYS[1:2], sigma=site.sigma[1:2], branches=(("a",),)), doubled)
    both = method(h.repeat(2, 1, 1), at(BLOCK, parts=2), doubled)
    assert torch.equal(out[1:2], alone)
    assert torch.equal(both, out.repeat(2, 1, 1))


@pytest.mark.parametrize("method", CALLS, ids=lambda m: m.kind)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_no_run_are_finite(method, dtype):
    out = method(tokens(dtype=dtype), BLOCK, doubled)
    assert out.dtype == dtype and out.isfinite().all()


def test_random_choices_are_new_at_each_sigma_and_block_and_can_be_shared():
    h = torch.arange(40.0).reshape(1, 40, 1).expand(3, 40, 2)

    def order(method, site):
        return method(h, site, lambda h: h)[..., 0]

    plain = order(TPG(), at(BLOCK))
    assert not torch.equal(plain[0], plain[1])
    assert not torch.equal(plain, order(TPG(), at(BLOCK, sigma=2.0)))
    assert not torch.equal(plain, order(TPG(), at(BLOCK._replace(name="mid_block.attentions.0.transformer_blocks.0"))))
    shared = order(TPG(shared=True), at(BLOCK))
    assert torch.equal(shared[0], shared[1])
    assert sorted(plain[0].tolist()) == list(range(40))
    many = at(BLOCK)._replace(keys=torch.arange(3000), sigma=torch.ones(3000))
    skipped = S2()(torch.ones(3000, 1, 1), many, doubled) == 1
    assert skipped.double().mean().item() == pytest.approx(0.1, abs=0.02)


def test_where_nothing_is_changed_the_call_is_plain_bit_for_bit():
    h, site = tokens(), at(BLOCK)
    expected = doubled(h)
    for method in (SSG(tokens=0, channels=0), SSG(tokens=0.1, channels=0.1), S2(share=0)):  # ⌊0.1·6⌋ and ⌊0.1·8⌋ are 0
        assert torch.equal(method(h, site, doubled), expected)
    assert torch.equal(S2(share=1)(h, site, doubled), h)
    assert torch.equal(SLG()(h, site, doubled), h)


def test_ssg_pairs_are_disjoint():
    """A token that is most dissimilar to all others is in one pair."""
    h = torch.tensor([[[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [-1.0, 0.0]]])
    out = SSG(tokens=0.5, channels=0)(h, BLOCK, lambda h: h)
    assert torch.equal(out[0], h[0][[3, 2, 1, 0]])


def test_tsg_adds_noise_of_the_embeddings_size():
    t, site = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64), at(TIME)
    out = TSG(strength=3.0, alpha=0.25)(t, site, embedded)
    for i in range(3):
        e = embedded(t)[i]
        noise = draws.normal(KEYS[i : i + 1], site.sigma[:1], "time_embedding/tsg", 4)[0]
        expected = [
            v + 3 * (t[i].item() / 1000) ** 0.25 * e.std().item() * n for v, n in zip(e.tolist(), noise.tolist())
        ]
        torch.testing.assert_close(out[i], torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(TSG(strength=0)(t, site, embedded), embedded(t))
    assert not torch.equal(TSG(alpha=0)(t, site, embedded)[0], embedded(t)[0])  # 0⁰ = 1
    both = TSG()(t.repeat(2), at(TIME, parts=2), embedded)
    assert torch.equal(both[:3], both[3:]) and torch.equal(both[:3], out)
    assert TSG()(t.half(), TIME, embedded).dtype == torch.float16


@torch.no_grad()
def test_self_guidance_shifts_the_timestep():
    t = torch.tensor([0.0, 989.0, 995.5])
    assert torch.equal(SelfGuidance()(t, TIME, embedded), embedded(torch.tensor([10.0, 999.0, 999.0])))
    assert torch.equal(SelfGuidance(delta=0)(t, TIME, embedded), embedded(t))
    x, _, conds = noisy(2)
    unet, t = denoiser().unet, torch.tensor([300.0, 600.0])

    def wrap(call, h, site):
        return SelfGuidance()(h, site, call) if site.kind == "embedding" else call(h)

    torch.testing.assert_close(unet(x, t, conds["cond"], wrap=wrap), unet(x, t + 10, conds["cond"]))


# --- crops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(16, 16), (8, 24), (7, 13)])
def test_swg_splits_into_crops_and_joins_by_averaging(h, w):
    view, rows = SWG(), 2
    x = torch.randn(rows, 4, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(z):
        """Depends on where in its input a latent is."""
        return z * torch.arange(z.shape[3]) + torch.arange(z.shape[2])[:, None]

    ch, cw = math.ceil(0.625 * h), math.ceil(0.625 * w)
    total, count = torch.zeros_like(x), torch.zeros(h, w)
    for top in (0, h - ch):
        for left in (0, w - cw):
            total[:, :, top : top + ch, left : left + cw] += network(x[:, :, top : top + ch, left : left + cw])
            count[top : top + ch, left : left + cw] += 1
    assert view.split(x).shape == (4 * rows, 4, ch, cw)
    torch.testing.assert_close(view.join(network(view.split(x)), x), total / count)
    pos, step = torch.randn_like(x), Step(x, torch.ones(rows), {})
    assert torch.equal(Overlap()(pos, x, step), (pos - x) * (count > 1))
    assert 0 < (count > 1).double().mean() < 1


@pytest.mark.parametrize("view", [SWG(1.0, 1), SWG(1.0, 2)])
def test_crops_of_the_whole_image_are_plain(view):
    x = torch.randn(2, 4, 8, 12)
    assert torch.equal(view.join(3 * view.split(x), x), 3 * x)
    assert view.join(view.split(x.half()), x.half()).dtype == torch.float16


def test_three_crops_a_side_cover_every_latent():
    x = torch.ones(1, 1, 17, 11)
    assert torch.equal(SWG(0.34, 3).join(SWG(0.34, 3).split(x), x), x)


# --- on a device that is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*CALLS, TSG(), SelfGuidance()], ids=lambda m: m.kind)
def test_calls_stay_on_the_device(method):
    h = torch.tensor([3.0, 400.0, 990.0]) if method.site_kind == "embedding" else tokens(dtype=torch.float32)
    site, call = (at(TIME), embedded) if method.site_kind == "embedding" else (at(BLOCK), doubled)
    expected = method(h, site, call)
    with fake_cuda() as mode:
        moved, there = sent(h), site._replace(keys=sent(site.keys), sigma=sent(site.sigma))
        mode.reads, mode.sends = [], []
        out = method(moved, there, call)
        assert mode.reads == mode.sends == []
        check_same(out, expected)
