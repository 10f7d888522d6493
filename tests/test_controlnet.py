"""ControlNets: against diffusers' network and pipelines, under every guidance, and where nothing may be computed."""

import math
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers_unets import THREE_LEVELS, TWO_LEVELS, WIDE_STEP, inputs
from guidance_models import control_image, control_net, denoiser, noisy
from make_models import make_controlnet, make_pipeline

from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.models import load_model
from segresearch.models.controlnet import ControlNet, ControlNetConfig, controlled
from segresearch.models.denoiser import Denoiser
from segresearch.models.unet import ControlResiduals, UNetConfig
from segresearch.sampling import ALWAYS, initial_noise, sample, sigmas, step_interval

# --- the network ------------------------------------------------------------------------------------

ENCODER = {k: v for k, v in TWO_LEVELS.items() if k not in ("up_block_types", "sample_size")}
PLAIN = {
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "conditioning_embedding_out_channels": (4, 8),
    "controlnet_conditioning_channel_order": "bgr",
}
NETWORKS = {
    "two levels": ENCODER | {"conditioning_embedding_out_channels": (4, 8)},
    "three levels": {k: v for k, v in THREE_LEVELS.items() if k in ENCODER}
    | {"conditioning_embedding_out_channels": (4, 6, 8)},
    "no attention, bgr": {k: v for k, v in THREE_LEVELS.items() if k in ENCODER} | PLAIN,
    "more layers": ENCODER
    | {k: WIDE_STEP[k] for k in ("layers_per_block", "attention_head_dim")}
    | {"conditioning_embedding_out_channels": (4, 8)},
}


@lru_cache
def pair(name, dtype=torch.float32):
    """The same random weights, none of them zero, in diffusers' ControlNet and in ours."""
    config = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = ControlNetModel(**config)
        for p in theirs.parameters():
            p.data += 0.05 * torch.randn_like(p)
    ours = ControlNet(ControlNetConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype).eval(), ours.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("grid", [(8, 8), (8, 20), (9, 13)])
@torch.no_grad()
def test_network_matches_diffusers(name, grid):
    theirs, ours = pair(name)
    x, t, cond = inputs(3, *grid)
    g = torch.Generator().manual_seed(3)
    image = torch.rand(3, 3, *(ours.config.image_factor * n for n in grid), generator=g)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    hint = ours.embed_image(image)
    for guess, scale in ((False, 1.0), (True, 0.6)):
        down, mid = theirs(
            x, t, cond.context, image, scale, added_cond_kwargs=added, guess_mode=guess, return_dict=False
        )
        own = ours(x, t, cond, hint, guess).each(lambda residual, scale=scale: residual * scale)
        assert mid.abs().max() > 0.1 and len(own.down) == len(down)
        for a, b in zip([*own.down, own.mid], [*down, mid], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_full_size_matches_sdxl():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig())
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=UNetConfig.down_block_types,
            up_block_types=UNetConfig.up_block_types,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        theirs = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert net.config == ControlNetConfig.from_dict(dict(theirs.config))
    assert net.config.image_factor == 8 and len(net.controlnet_down_blocks) == 9


REFUSED = [
    ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
    ({"_class_name": "ControlNetUnionModel"}, "_class_name='ControlNetUnionModel'"),
    ({"num_control_type": 6}, "num_control_type=6"),
    ({"global_pool_conditions": True}, "global_pool_conditions=True"),
    ({"conditioning_channels": 1}, "conditioning_channels=1"),
    ({"encoder_hid_dim": 64}, "encoder_hid_dim=64"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
    ({"controlnet_conditioning_channel_order": "hsv"}, "'hsv'"),
    ({"conditioning_embedding_out_channels": [4, 0]}, r"\[4, 0\]"),
    ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
    ({"block_out_channels": [30, 64]}, "controlnet config: width 30"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED)
def test_other_architectures_are_refused_by_name(change, match):
    with pytest.raises(ValueError, match=match):
        ControlNetConfig.from_dict(ENCODER | change)


# --- under guidance ---------------------------------------------------------------------------------


class Steered(Denoiser):
    """Residuals computed within every evaluation, for each of its rows: what the shared ones must equal."""

    def __init__(self, control):
        inner = denoiser()
        super().__init__(inner.unet, 1 / (1 + inner.sigmas.double() ** 2))
        self.controls = control

    def forward(self, x, sigma, cond, attend=None, wrap=None, residuals=None, fork=None):
        assert residuals is None
        total = None
        for one in self.controls:
            hint = one.hint.repeat(len(x) // one.rows, 1, 1, 1)
            own = self.residuals(x, sigma, cond, one.net, hint, one.guess)
            scales = torch.tensor([one.scale_at(s) for s in sigma.tolist()], dtype=x.dtype)[:, None, None, None]
            own = ControlResiduals(tuple(r * scales for r in own.down), own.mid * scales)
            if total is not None:
                own = ControlResiduals(tuple(a + b for a, b in zip(own.down, total.down)), own.mid + total.mid)
            total = own
        return super().forward(x, sigma, cond, attend, wrap, total, fork)


SEG_TERM, PAG_TERM = perturbed("seg", SEG(), 3.0), perturbed("pag", PAG(where="up"), 1.0)
GUIDANCES = {
    "plain": {},
    "cfg": {"cfg": cfg(5.0)},
    "seg": {"seg": SEG_TERM},
    "cfg, seg, pag": {"cfg": cfg(5.0), "seg": SEG_TERM, "pag": PAG_TERM},
    "seg of uncond": {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(2.0, where="down"), 3.0, base="uncond")},
}


@pytest.mark.parametrize("terms", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("sag", [False, True])
@torch.no_grad()
def test_shared_residuals_equal_those_of_every_row(terms, sag):
    x, sigma, conds = noisy(2, 4, 8)
    control = [
        controlled(control_net(0), control_image(2), scale=0.7),
        controlled(control_net(1), control_image(1, seed=8), scale=-0.4, interval=(2.0, 4.0)),
        controlled(control_net(2), control_image(2, seed=7), interval=(4.0, math.inf)),
    ]

    def guided(inner, fork=True):
        model = GuidedDenoiser(inner, terms, fork=fork, rescale=0.5)
        return SelfAttentionGuidance(model, 0.75) if sag else model

    expected = guided(Steered(control))(x, sigma, conds=conds)
    assert (expected - guided(denoiser())(x, sigma, conds=conds)).abs().max() > 1e-2
    for fork in (True, False):
        out = guided(denoiser(), fork)(x, sigma, conds=conds, control=control)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert guided(denoiser())(x, sigma, conds=conds, control=[]).equal(guided(denoiser())(x, sigma, conds=conds))


@torch.no_grad()
def test_forwards_of_a_step():
    """One forward for each net, with a row for each image and conditioning: none for perturbed copies."""
    x, sigma, conds = noisy(2, 4, 8)
    both = {"cfg": cfg(5.0), "seg": SEG_TERM}
    for terms, fork, sag, guess, expected in (
        ({"seg": SEG_TERM}, True, False, False, [2]),
        (both, True, False, False, [4]),
        (both | {"pag": PAG_TERM}, False, False, False, [4]),
        (both, True, False, True, [2]),
        ({"seg": SEG_TERM}, True, True, True, [2, 2]),
        (both, False, True, False, [4, 2]),
        (both, True, True, True, [2]),  # SAG's second forward is then of the negative branch, which has none of a guess
    ):
        one, other = control_net(0), control_net(1)
        control = [controlled(one, control_image(), guess=guess), controlled(other, control_image(1), guess=guess)]
        model = GuidedDenoiser(denoiser(), terms, fork=fork)
        model = SelfAttentionGuidance(model) if sag else model
        model(x, sigma, conds=conds, control=control)
        assert one.rows_seen == other.rows_seen == expected


@torch.no_grad()
def test_nothing_is_computed_where_nothing_acts():
    x, sigma, conds = noisy(2, 4, 8)
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(5.0), "seg": SEG_TERM})
    plain = model(x, sigma, conds=conds)
    for options in ({"scale": 0.0}, {"interval": (0.0, 2.9)}, {"interval": (3.1, math.inf)}):
        quiet = control_net()
        assert torch.equal(model(x, sigma, conds=conds, control=[controlled(quiet, control_image(), **options)]), plain)
        assert not hasattr(quiet, "rows_seen")
    zero = control_net(zero=True)
    assert torch.equal(model(x, sigma, conds=conds, control=[controlled(zero, control_image())]), plain)
    assert zero.rows_seen == [4]


@torch.no_grad()
def test_rows_on_both_sides_of_an_interval():
    x, _, conds = noisy(2, 4, 8)
    sigma = torch.tensor([3.0, 1.0], dtype=x.dtype)
    control = [controlled(control_net(), control_image(), scale=0.5, interval=(2.0, 4.0))]
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0), "seg": SEG_TERM})
    both = model(x, sigma, conds=conds, control=control)
    for i, own in enumerate(([control[0][[0]]], None)):
        rows = slice(i, i + 1)
        alone = model(x[rows], sigma[rows], conds={k: c[[i]] for k, c in conds.items()}, control=own)
        torch.testing.assert_close(both[rows], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"s_churn": 5.0}])
def test_pictures_do_not_depend_on_the_batch(options):
    _, _, conds = noisy(3, 4, 8)
    noise = initial_noise([1, 2, 3], (4, 4, 8)).double()
    model = GuidedDenoiser(denoiser(), {"cfg": cfg(3.0), "seg": SEG_TERM})
    nets = control_net(0), control_net(1)

    def run(rows, own, shared):
        control = [controlled(nets[0], own[rows]), controlled(nets[1], shared, scale=0.5)]
        own_conds = {k: c[rows] for k, c in conds.items()}
        return sample(model, noise[rows], steps=2, conds=own_conds, control=control, seeds=[5, 6, 7][rows],
                      options=options)  # fmt: skip

    images, shared = control_image(3), control_image(1, seed=4)
    together = run(slice(0, 3), images, shared)
    repeated = run(slice(0, 3), images, shared.repeat(3, 1, 1, 1))  # one hint row serves every image
    torch.testing.assert_close(together, repeated, rtol=0, atol=1e-10)
    for i in range(3):
        torch.testing.assert_close(together[[i]], run(slice(i, i + 1), images, shared), rtol=0, atol=1e-10)


@torch.no_grad()
def test_wrong_inputs_are_named():
    x, sigma, conds = noisy(3, 4, 8)
    one, model = control_net(), GuidedDenoiser(denoiser(), {})
    with pytest.raises(ValueError, match="8×12 pixels, the image 8×16"):
        model(x, sigma, conds=conds, control=[controlled(one, control_image(1, 4, 6))])
    with pytest.raises(ValueError, match="2 control images for 3 images; it needs 3 or 1"):
        model(x, sigma, conds=conds, control=[controlled(one, control_image(2))])
    for image, match in (
        (control_image()[..., 1:], "8×15 pixels; its sides must be positive multiples of 2"),
        (control_image()[:, :1], r"RGB in \[0, 1\], \(rows, 3, h, w\); got \(2, 1, 8, 16\)"),
        (control_image() * 255, r"reach from [\d.]+ to 25\d"),
        (control_image() * 2 - 1, "reach from -"),
        (control_image() * math.nan, "reach from nan"),
    ):
        with pytest.raises(ValueError, match=match):
            controlled(one, image)
    with pytest.raises(ValueError, match="scale of a ControlNet must be finite, got inf"):
        controlled(one, control_image(), scale=math.inf)
    with pytest.raises(ValueError, match=r"interval of a ControlNet .* got \(3.0, 2.0\)"):
        controlled(one, control_image(), interval=(3.0, 2.0))
    _, ours = pair("two levels", torch.float64)
    with pytest.raises(ValueError, match="the ControlNet belongs to another model"):
        model(x, sigma, conds=conds, control=[controlled(ours, control_image(1))])


@torch.no_grad()
def test_control_is_any_iterable_of_what_controlled_makes():
    x, sigma, conds = noisy(2, 4, 8)
    model, one = GuidedDenoiser(denoiser(), {}), controlled(control_net(), control_image(1))
    asked = {"conds": conds}
    listed = model(x, sigma, **model.prepare(asked | {"control": [one]}))
    prepared = model.prepare(asked | {"control": (c for c in [one])})
    for _ in range(2):  # not used up by the first step
        torch.testing.assert_close(model(x, sigma, **prepared), listed, rtol=0, atol=0)
    plain = model(x, sigma, **model.prepare(asked | {"control": None}))
    assert (plain - listed).abs().max() > 1e-6
    two = [one, control_net()]
    for wrong, match in ((one, r"write control=\[controlled"), (two, "got a Counted in it"), (3, "int")):
        with pytest.raises(ValueError, match=match):
            model.prepare(asked | {"control": wrong})


# --- the part of the steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["leading", "karras", "align-your-steps"])
@pytest.mark.parametrize("n", [1, 4, 7, 25])
def test_step_interval_switches_on_diffusers_steps(schedule, n):
    levels = sigmas(denoiser(), schedule, n)
    fractions = [0.0, 0.1, 0.25, 0.3, 0.5, 0.62, 0.8, 1.0]
    assert step_interval(levels, 0.0, 1.0) == ALWAYS
    for start in fractions:
        for end in (f for f in fractions if f > start):
            low, high = step_interval(levels, start, end)
            for i, (sigma, below) in enumerate(pairwise(levels.tolist())):
                on = not (i / n < start or (i + 1) / n > end)
                assert (low <= sigma <= high) == on
                middle = math.sqrt(sigma * below)  # dpm_2's own evaluation of the step
                assert middle == 0 or (low <= middle <= high) == on
    for start, end in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            step_interval(levels, start, end)


# --- whole pictures ------------------------------------------------------------------------------------

PROMPTS = ["a red cup", "two cubes"]
STEPS, HEIGHT, WIDTH = 4, 8, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random pipeline with two ControlNets of different depths, one with a "bgr" image; and its folder."""
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    pipeline = make_pipeline(folder)
    nets = {
        "first": make_controlnet(pipeline, 1),
        "second": make_controlnet(
            pipeline, 2, transformer_layers_per_block=(1, 2, 1), controlnet_conditioning_channel_order="bgr"
        ),
    }
    pipeline.save_pretrained(folder)
    for name, one in nets.items():
        one.save_pretrained(folder / "controlnet" / name)
    return pipeline, nets, load_model(folder, controlnet=["first", "second"])


FIRST = {"first": {}}
BOTH = {"first": {"scale": 0.7}, "second": {"scale": 0.4, "start": 0.2, "end": 0.9}}
PICTURES = {
    "plain": {"control": FIRST},
    "cfg": {"control": FIRST, "weight": 4.0},
    "part": {"control": {"first": {"scale": 0.8, "start": 0.25, "end": 0.7}}, "weight": 4.0},
    "guess": {"control": {"first": {"scale": 0.9}}, "guess": True},
    "guess, cfg": {"control": {"first": {"scale": 0.9}}, "weight": 4.0, "guess": True},
    "two, cfg": {"control": BOTH, "weight": 4.0},
    "two, cfg, guess": {"control": BOTH, "weight": 4.0, "guess": True},
    "pag": {"control": FIRST, "pag": 2.0},
    "two, cfg, pag": {"control": BOTH, "weight": 4.0, "pag": 2.0},
    "one image for all": {"control": FIRST, "weight": 4.0, "images": 1},
}


@pytest.mark.parametrize("case", PICTURES.values(), ids=PICTURES)
def test_pictures_of_diffusers_pipelines(model, case):
    pipeline, nets, sd = model
    used, guess, weight, pag = case["control"], case.get("guess", False), case.get("weight", 1.0), case.get("pag")
    images = {name: control_image(case.get("images", 2), seed=i).float() for i, name in enumerate(used)}
    noise = initial_noise([3, 4], (4, HEIGHT // 2, WIDTH // 2))

    kind = StableDiffusionXLControlNetPipeline if pag is None else StableDiffusionXLControlNetPAGPipeline
    parts = {k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor")}
    one = len(used) == 1
    pipe = kind(**parts, controlnet=nets["first"] if one else MultiControlNetModel([nets[name] for name in used]))
    pipe.set_progress_bar_config(disable=True)
    options = {name: {"scale": 1.0, "start": 0.0, "end": 1.0} | given for name, given in used.items()}
    lists = {key: [o[key] for o in options.values()] for key in ("scale", "start", "end")}
    expected = pipe(
        PROMPTS,
        image=images["first"] if one else list(images.values()),
        latents=noise,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=weight,
        controlnet_conditioning_scale=lists["scale"][0] if one else lists["scale"],
        control_guidance_start=lists["start"][0] if one else lists["start"],
        control_guidance_end=lists["end"][0] if one else lists["end"],
        output_type="latent",
        **({"guess_mode": guess} if pag is None else {"pag_scale": pag}),
    ).images

    levels = sigmas(sd.denoiser, "leading", STEPS)
    control = [
        controlled(sd.controlnets[name], images[name], o["scale"], step_interval(levels, o["start"], o["end"]), guess)
        for name, o in options.items()
    ]
    terms = {"cfg": cfg(weight)} | ({} if pag is None else {"pag": perturbed("pag", PAG(where="mid"), pag)})
    conds = sd.encode(PROMPTS, size=(HEIGHT, WIDTH))
    guided = GuidedDenoiser(sd.denoiser, terms)
    x0 = sample(guided, noise, steps=STEPS, conds=conds, control=control)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
    assert (x0 - sample(guided, noise, steps=STEPS, conds=conds)).abs().max() > 0.05
