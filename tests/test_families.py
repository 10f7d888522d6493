"""Every family against diffusers: networks, texts, conditionings, on random models in the folder layout."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPAGPipeline,
)
from helpers import composed
from make_families import FAMILIES, make_family, write_family
from make_models import make_controlnet

from segresearch.config.build import build_guidance
from segresearch.errors import CheckpointError
from segresearch.guidance import PAG, SEG, Branch, GuidedDenoiser, SelfAttentionGuidance, Term, cfg, perturbed
from segresearch.models import load_model
from segresearch.models.controlnet import controlled
from segresearch.models.text_settings import TextSettings
from segresearch.sample_images import encode_conds
from segresearch.sampling import ImageStart, initial_noise, sample

PROMPTS = ["a red cube", "", "Two cubes, left!"]
SD = [name for name, family in FAMILIES.items() if not family.sized]
XL = [name for name in FAMILIES if name not in SD]
MODELS: dict[str, tuple] = {}


@pytest.fixture
def made(request, tmp_path_factory):
    """(diffusers pipeline, the same loaded here) of the family that the test names; made once."""
    name = request.param
    if name not in MODELS:
        folder = tmp_path_factory.mktemp(name) / "folder"
        MODELS[name] = write_family(name, folder), load_model(folder)
    return MODELS[name]


def of(*names):
    return pytest.mark.parametrize("made", names or list(FAMILIES), indirect=True)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@of()
@torch.no_grad()
def test_the_unet_is_that_of_diffusers(made):
    pipeline, sd = made
    theirs, c = pipeline.unet, sd.unet.config
    x, t = draw(1, 3, c.in_channels, 8, 12), torch.tensor([1.0, 340.5, 961.0])
    cond = sd.encode(PROMPTS, settings=TextSettings(guidance=7.5 if c.time_cond_proj_dim else None))["cond"]
    extra = {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.time_ids}} if c.size_ids else {}
    if c.time_cond_proj_dim:
        w = torch.full((3,), 6.5)
        extra["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=20)
    expected = theirs(x, t, cond.context, **extra).sample
    assert sd.unet.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(sd.unet(x, t, cond), expected, rtol=0, atol=2e-5)
    one = sd.unet(x[1:2], t[1:2], cond[1:2])
    torch.testing.assert_close(one, expected[1:2], rtol=0, atol=2e-5)


@of()
@torch.no_grad()
def test_the_autoencoder_is_that_of_diffusers(made):
    pipeline, sd = made
    c = pipeline.vae.config
    latents, images = draw(2, 2, 4, 6, 10), draw(3, 2, 3, 12, 20).clamp(-1, 1)
    mean, std = ((torch.tensor(v)[:, None, None] if v else d) for v, d in ((c.latents_mean, 0), (c.latents_std, 1)))
    expected = pipeline.vae.decode(latents * std / c.scaling_factor + mean).sample
    torch.testing.assert_close(sd.decode(latents), expected, rtol=0, atol=1e-5)
    expected = (pipeline.vae.encode(images).latent_dist.mean - mean) * c.scaling_factor / std
    torch.testing.assert_close(sd.encode_images(images), expected, rtol=0, atol=1e-5)
    assert sd.vae.config.scaling_factor == c.scaling_factor


@of(*SD)
@pytest.mark.parametrize("clip_skip", [None, 0, 1, 3])
@torch.no_grad()
def test_texts_of_one_encoder(made, clip_skip, monkeypatch):
    pipeline, sd = made
    conds = sd.encode(PROMPTS, negative=["blue", "", "a"], settings=TextSettings(clip_skip=clip_skip))
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers finds the final norm in it, transformers 5.6 has dropped it
        monkeypatch.setitem(encoder.__dict__, "text_model", encoder)
    if "InstructPix2Pix" in type(pipeline).__name__:  # joined: prompts, negatives, negatives
        if clip_skip:
            return
        expected, negative, _ = pipeline._encode_prompt(PROMPTS, "cpu", 1, True, ["blue", "", "a"]).chunk(3)
    else:
        expected, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, ["blue", "", "a"], clip_skip=clip_skip)
    torch.testing.assert_close(conds["cond"].context, expected, rtol=1e-5, atol=1e-5)
    if not clip_skip:  # diffusers does not skip layers of the negative prompt
        torch.testing.assert_close(conds["uncond"].context, negative, rtol=1e-5, atol=1e-5)
    assert conds["cond"].pooled.shape == conds["cond"].time_ids.shape == (3, 0)


@of(*SD)
@torch.no_grad()
def test_without_a_negative_prompt_the_empty_text_is_encoded(made):
    sd = made[1]
    conds = sd.encode(["a", "b"])
    torch.testing.assert_close(conds["uncond"].context, sd.encode([""])["cond"].context.expand(2, -1, -1))
    assert conds["uncond"].context.abs().max() > 0.1


@of(*XL)
@pytest.mark.parametrize("negative", [None, ["blue", "", "a"]])
@torch.no_grad()
def test_texts_of_the_sdxl_families(made, negative):
    pipeline, sd = made
    skip = {} if "InstructPix2Pix" in type(pipeline).__name__ else {"clip_skip": 1}
    conds = sd.encode(PROMPTS, negative=negative, settings=TextSettings(**skip))
    context, uncond, pooled, uncond_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=negative, **skip)
    for ours, theirs in (
        (conds["cond"].context, context), (conds["cond"].pooled, pooled),
        (conds["uncond"].context, uncond), (conds["uncond"].pooled, uncond_pooled),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@of("refiner")
def test_the_refiner_reads_aesthetic_scores(made):
    pipeline, sd = made
    conds = sd.encode(["a", "b"], negative="c", size=(24, 16), settings=TextSettings(aesthetic_score=7.0))
    args = ((24, 16), (0, 0), (24, 16), 7.0, 2.5, (24, 16), (0, 0), (24, 16), torch.float32, 40)
    for cond, ids in zip(conds.values(), pipeline._get_add_time_ids(*args), strict=True):
        assert torch.equal(cond.time_ids, ids.expand(2, 5))
    assert sd.encode(["a"])["cond"].time_ids[0, -1] == 6 and sd.encode(["a"])["uncond"].time_ids[0, -1] == 2.5


@of("sd15")
def test_only_lcm_embeds_a_guidance_weight(made):
    with pytest.raises(ValueError, match="guidance=7.5: this model embeds no guidance weight"):
        made[1].encode(["a"], settings=TextSettings(guidance=7.5))


# --- whole loops -------------------------------------------------------------------------------------


def in_diffusers(pipeline, kind, noise, steps=3, **options):
    """Latents of diffusers' pipeline of this kind, with the parts of `pipeline`, by Euler steps."""
    parts = {k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor")}
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    more = {"pag_applied_layers": options.pop("layers")} if "layers" in options else {}
    if "controlnet" in options:
        more["controlnet"] = options.pop("controlnet")
    if "safety_checker" in parts:
        more |= {"feature_extractor": None, "requires_safety_checker": False}
    processors = pipeline.unet.attn_processors
    pipe = kind(**parts | {"scheduler": scheduler} | more)
    pipe.set_progress_bar_config(disable=True)
    height, width = (2 * side for side in noise.shape[2:])
    size = {} if "image_guidance_scale" in options else {"height": height, "width": width}
    try:
        return pipe(
            PROMPTS[::2], latents=noise, **size, num_inference_steps=steps, output_type="latent", **options
        ).images
    finally:
        pipeline.unet.set_attn_processor(processors)


def here(sd, noise, terms, steps=3, control=()):
    size = tuple(2 * side for side in noise.shape[2:])
    guided = GuidedDenoiser(sd.denoiser, terms)
    conds = sd.encode(PROMPTS[::2], size=size)
    return sample(guided, noise, schedule="leading", steps=steps, conds=conds, control=list(control))


@of("sd15", "sd21", "sd21v")
@pytest.mark.parametrize("pag", [None, 2.0])
def test_euler_with_cfg_and_pag(made, pag):
    pipeline, sd = made
    noise, options, terms = initial_noise([3, 4], (4, 8, 12)), {"guidance_scale": 4.0}, {"cfg": cfg(4.0)}
    kind = StableDiffusionPipeline
    if pag is not None:
        kind, terms["pag"] = StableDiffusionPAGPipeline, perturbed("pag", PAG(where="mid"), pag)
        options |= {"pag_scale": pag, "layers": ["mid"]}
    expected = in_diffusers(pipeline, kind, noise, **options)
    torch.testing.assert_close(here(sd, noise, terms), expected, rtol=1e-4, atol=1e-4)


@of("pix2pix")
def test_instruct_pix2pix_is_three_branches(made):
    pipeline, sd = made
    image, noise = draw(7, 2, 3, 16, 24).clamp(-1, 1), initial_noise([3, 4], (4, 8, 12))
    options = {"guidance_scale": 4.0, "image_guidance_scale": 1.5, "image": image / 2 + 0.5}
    expected = in_diffusers(pipeline, type(pipeline), noise, **options)
    with torch.no_grad():
        latents = sd.encode_images(image) / sd.vae.config.scaling_factor
    conds = {name: replace(cond, image=latents) for name, cond in sd.encode(PROMPTS[::2]).items()}
    conds |= {"image": conds["uncond"], "uncond": replace(conds["uncond"], image=0 * latents)}
    text, edit = Term(Branch("cond"), Branch("image"), 4.0), Term(Branch("image"), Branch("uncond"), 1.5)
    guided = GuidedDenoiser(sd.denoiser, {"text": text, "edit": edit}, base="uncond")
    ours = sample(guided, noise, schedule="leading", steps=3, conds=conds)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@of("sdxl", "koala1b")
def test_euler_with_cfg_and_pag_of_sdxl_families(made):
    pipeline, sd = made
    noise, options = initial_noise([3, 4], (4, 8, 12)), {"guidance_scale": 4.0, "pag_scale": 2.0, "layers": ["mid"]}
    expected = in_diffusers(pipeline, StableDiffusionXLPAGPipeline, noise, **options)
    terms = {"cfg": cfg(4.0), "pag": perturbed("pag", PAG(where="mid"), 2.0)}
    torch.testing.assert_close(here(sd, noise, terms), expected, rtol=1e-4, atol=1e-4)


@of("refiner")
def test_the_refiner_refines(made):
    """Its pipeline is image to image: the last three of four steps, from latents and one noise."""
    pipeline, sd = made
    latents, noise = draw(1, 2, 4, 8, 12), torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    pipe = type(pipeline)(**pipeline.components, requires_aesthetics_score=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS[::2], negative_prompt=["", ""], image=latents, strength=0.75, num_inference_steps=4, guidance_scale=4.0,
        output_type="latent", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    conds = sd.encode(PROMPTS[::2], negative=["", ""], size=(16, 24))
    guided, start = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)}), ImageStart(latents, 0.75)
    ours = sample(guided, noise, schedule="leading", steps=4, conds=conds, start=start)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@of("ssd1b", "vega", "koala700m")
def test_euler_with_cfg_and_pag_without_attention_in_the_middle(made):
    pipeline, sd = made
    noise = initial_noise([3, 4], (4, 8, 12))
    options = {"guidance_scale": 4.0, "pag_scale": 2.0, "layers": ["up_blocks.0"]}
    expected = in_diffusers(pipeline, StableDiffusionXLPAGPipeline, noise, **options)
    terms = {"cfg": cfg(4.0), "pag": perturbed("pag", PAG(where="up.0"), 2.0)}
    torch.testing.assert_close(here(sd, noise, terms), expected, rtol=1e-4, atol=1e-4)
    assert (here(sd, noise, {"cfg": cfg(4.0)}) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="'mid' matches no self-attention site of this model; use a group .down, up.,"):
        GuidedDenoiser(sd.denoiser, {"seg": perturbed("seg", SEG(where="mid"), 1.0)})
    with pytest.raises(ValueError, match="mid-block self-attention, and this model has none"):
        SelfAttentionGuidance(sd.denoiser, 1.0)


@of("sd15", "sd21v")
def test_seg_in_the_middle(made):
    sd, noise = made[1], initial_noise([3, 4], (4, 16, 24))
    plain = here(sd, noise, {})
    blurred = here(sd, noise, {"seg": perturbed("seg", SEG(where="mid", sigma=10.0), 3.0)})
    assert blurred.isfinite().all() and (blurred - plain).abs().max() > 1e-4
    sharp = here(sd, noise, {"seg": perturbed("seg", SEG(where="mid", sigma=1e-3), 3.0)})
    torch.testing.assert_close(sharp, plain, rtol=1e-4, atol=1e-4)


@of("sd15", "lcm", "refiner")
@pytest.mark.parametrize("method", ["cads", "icg", "cdg", "erg_text", "nag", "tsg", "swg"])
def test_methods_that_make_or_read_conditionings(made, method):
    """On one text encoder, without sizes or a pooled text, under a guidance weight: image 1 does not depend on 0."""
    sd, size = made[1], (16, 24)
    model = build_guidance(composed(f"guidance={method}", "model=sd15").guidance, sd)
    noise = initial_noise([3, 4], (4, 8, 12))
    run = {"schedule": "trailing", "steps": 2}
    both = sample(model, noise, conds=encode_conds(sd, model, PROMPTS[::2], size=size), seeds=[3, 4], **run)
    one = sample(model, noise[1:], conds=encode_conds(sd, model, PROMPTS[2:], size=size), seeds=[4], **run)
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-3)
    assert (both - here(sd, noise, {}, steps=2)).abs().max() > 1e-3


@of("sd15")
def test_a_model_without_sizes_has_no_image_size_guidance(made):
    sd = made[1]
    model = build_guidance(composed("guidance=image_size", "model=sd15").guidance, sd)
    with pytest.raises(ValueError, match="this model has no image sizes"):
        sample(model, initial_noise([3], (4, 8, 12)), steps=1, conds=encode_conds(sd, model, ["a"]))


@of("sd15", "sd21")
def test_controlnets(made, tmp_path):
    pipeline, _ = made
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    net = make_controlnet(pipeline)
    net.save_pretrained(folder / "controlnet" / "canny")
    sd = load_model(folder, controlnet="canny")
    image, noise = draw(5, 2, 3, 16, 24).sigmoid(), initial_noise([3, 4], (4, 8, 12))
    control = controlled(sd.controlnets["canny"], image, 0.8)
    with torch.no_grad():
        cond, x, t = sd.encode(PROMPTS[::2])["cond"], draw(1, 2, 4, 8, 12), torch.tensor([1.0, 900.0])
        down, mid = net(x, t, cond.context, image, return_dict=False)
        residuals = control.net(x, t, cond, control.hint)
        for ours, theirs in zip((*residuals.down, residuals.mid), (*down, mid), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    options = {"guidance_scale": 4.0, "controlnet_conditioning_scale": 0.8, "controlnet": net, "image": image}
    expected = in_diffusers(pipeline, StableDiffusionControlNetPipeline, noise, **options)
    torch.testing.assert_close(here(sd, noise, {"cfg": cfg(4.0)}, control=[control]), expected, rtol=1e-4, atol=1e-4)
    assert (expected - here(sd, noise, {"cfg": cfg(4.0)})).abs().max() > 1e-2


def test_a_controlnet_of_another_family_is_refused(tmp_path):
    net = make_controlnet(make_family("sdxl", tmp_path / "xl"))
    net.save_pretrained(tmp_path / "net")
    write_family("sd15", tmp_path / "model")
    with pytest.raises(CheckpointError, match="level widths: .* it was made for another model"):
        load_model(tmp_path / "model", controlnet=tmp_path / "net")
