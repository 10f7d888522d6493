"""The UNet against diffusers' own, and the fork against separate forwards."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers_unets import THREE_LEVELS, TWO_LEVELS, WIDE_STEP, inputs

from segresearch.models.attention import KINDS, Fork, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.unet import ControlResiduals, UNet, UNetConfig


def pair(config: dict, dtype=torch.float32) -> tuple[UNet2DConditionModel, UNet]:
    """The same random weights in diffusers' UNet and in ours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = UNet2DConditionModel(**config).to(dtype).eval()
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("config", [TWO_LEVELS, THREE_LEVELS, WIDE_STEP])
@pytest.mark.parametrize("grid", [(16, 16), (8, 20), (9, 13)])
@torch.no_grad()
def test_parity_with_diffusers(config, grid):
    theirs, ours = pair(config)
    x, t, cond = inputs(3, *grid)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    expected = theirs(x, t, cond.context, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_control_residuals_match_diffusers():
    theirs, ours = pair(TWO_LEVELS)
    x, t, cond = inputs(2, 8, 12)
    g = torch.Generator().manual_seed(2)
    shapes = [(32, 8, 12), (32, 8, 12), (32, 4, 6), (64, 4, 6)]
    down = tuple(torch.randn(2, *s, generator=g) for s in shapes)
    mid = torch.randn(2, 64, 4, 6, generator=g)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    expected = theirs(
        x,
        t,
        cond.context,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    torch.testing.assert_close(ours(x, t, cond, residuals=ControlResiduals(down, mid)), expected, rtol=0, atol=1e-5)
    index = torch.tensor([0, 1, 1])
    forked = ours(x, t, cond, residuals=ControlResiduals(down, mid), fork=Fork(ours.sites[1], index))
    torch.testing.assert_close(forked, expected[index], rtol=0, atol=1e-5)


@torch.no_grad()
def test_fork_equals_separate_forwards_at_every_site():
    _, ours = pair(THREE_LEVELS, torch.float64)
    x, t, cond = inputs(2, 8, 12, torch.float64)
    index = torch.tensor([0, 1, 0, 1, 1])

    def scaled(q, k, v, site):  # another pattern for the copies alone, so that a mix-up of rows would show
        out = sdpa(q, k, v, site)
        return torch.cat([out[:2], 0.5 * out[2:]]) if q.shape[0] == 5 else out

    def wrapped(call, h, site):
        out = call(h)
        return torch.cat([out[:2], 0.5 * out[2:]]) if h.shape[0] == 5 else out

    plain = ours(x, t, cond)
    for i, site in [*enumerate(ours.all_sites)][1::3]:  # of every kind: they repeat every fourth
        later = set(ours.all_sites[i:])
        halved = ours(
            x, t, cond,
            attend=lambda q, k, v, s, later=later: sdpa(q, k, v, s) * (0.5 if s.name in later else 1),
            wrap=lambda call, h, s, later=later: call(h) * (0.5 if s.name in later else 1),
        )  # fmt: skip
        forked = ours(x, t, cond, attend=scaled, wrap=wrapped, fork=Fork(site, index))
        torch.testing.assert_close(forked, torch.cat([plain, halved[index[2:]]]), rtol=0, atol=1e-10)


@torch.no_grad()
def test_sites_are_met_in_order_with_their_grid():
    _, ours = pair(THREE_LEVELS)
    x, t, cond = inputs(1, 9, 13)
    met = []

    def spy(q, k, v, site):
        assert q.shape[2] == site.grid[0] * site.grid[1]
        assert q.shape[1] == ours.sites_by_kind[site.kind][site.name]
        met.append(site)
        return sdpa(q, k, v, site)

    def wrapped(call, h, site):
        met.append(site)
        return call(h)

    ours(x, t, cond, attend=spy, wrap=wrapped)
    assert tuple(s.name for s in met) == ours.all_sites
    assert tuple(s.name for s in met if s.kind == "self") == ours.sites
    assert {k: [s.name for s in met if s.kind == k] for k in KINDS} == {k: [*s] for k, s in ours.sites_by_kind.items()}
    assert {s.name: s.grid for s in met}["mid_block.attentions.0.transformer_blocks.1.attn1"] == (3, 4)
    assert set(ours.sites) <= {name.removesuffix(".to_q.weight") for name in ours.state_dict()}


def test_full_size_matches_sdxl():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert len(unet.sites) == 70 and sum(s.startswith("mid_block") for s in unet.sites) == 10


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "SimpleCrossAttn"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"block_out_channels": [30, 64]}, "30"),
        ({"transformer_layers_per_block": [1, 2, 3]}, r"\[1, 2, 3\]"),
        ({"transformer_layers_per_block": [1, [2]]}, "reverse_transformer_layers_per_block is missing"),
        ({"reverse_transformer_layers_per_block": [[1], 1]}, r"has \[1\] for a block of 2 layers"),
        ({"down_block_types": None}, "down_block_types=None must be a list"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim is missing"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "ip_image_proj"),
        ({"time_cond_proj_dim": 0}, "time_cond_proj_dim=0"),
        ({"projection_class_embeddings_input_dim": 48}, "48"),
    ],
)
def test_other_architectures_are_refused_by_name(change, match):
    with pytest.raises(ValueError, match=match):
        UNetConfig.from_dict(TWO_LEVELS | change)


@torch.no_grad()
def test_wrong_inputs_are_named():
    _, ours = pair(TWO_LEVELS)
    x, t, cond = inputs(2, 8, 8)
    with pytest.raises(ValueError, match="2 rows of x but 1"):
        ours(x, t, cond[:1])
    with pytest.raises(ValueError, match="unknown site 'mid'"):
        ours(x, t, cond, fork=Fork("mid", torch.tensor([0, 1, 1])))
    with pytest.raises(ValueError, match="turn 2 into 2"):
        ours(x, t, cond, fork=Fork(ours.sites[0], torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="5 channels"):
        ours(torch.zeros(2, 5, 8, 8), t, cond)
    with pytest.raises(ValueError, match="3 wide"):
        ours(x, t, Cond(torch.zeros(2, 7, 3), cond.pooled, cond.time_ids))


def test_cond_rows():
    _, _, cond = inputs(3, 8, 8)
    assert Cond.cat([cond, cond[:1]]).rows == 4
    assert torch.equal(cond[torch.tensor([2, 0])].pooled, cond.pooled[[2, 0]])
    with pytest.raises(ValueError, match="text lengths"):
        Cond.cat([cond, Cond(cond.context[:, :3], cond.pooled, cond.time_ids)])
    assert cond.to(dtype=torch.bfloat16).time_ids.dtype == torch.float32
