"""Pipelines of diffusers in memory, and guided denoisers in the place of their UNet."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)
from make_families import make_family, write_family
from make_models import make_controlnet, make_pipeline

from segresearch.checkpoints.resolve import MINI, resolve_model
from segresearch.errors import InputError
from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.methods.momentum import Momentum
from segresearch.guidance.methods.zigzag import ZSampling
from segresearch.models import from_diffusers, load_model, to_diffusers
from segresearch.models.controlnet import controlled
from segresearch.sampling import initial_noise, sample

PROMPTS, SIZE, STEPS = ["a red cup", "two cubes"], (8, 16), 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random pipeline; it as a StableDiffusion; and that loaded from its folder."""
    folder = tmp_path_factory.mktemp("bridge") / "tiny"
    pipe = make_pipeline(folder)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, from_diffusers(pipe), load_model(folder)


def fresh(made, kind=StableDiffusionXLPipeline, **changes):
    """A pipeline of another class, or with other parts, over the same weights."""
    parts = {k: v for k, v in made[0].components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = kind(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, noise, **options):
    options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "output_type": "pt"} | options
    return pipe(PROMPTS, latents=noise, **options).images


def ours(sd, terms, noise, control=None):
    guided = terms if not isinstance(terms, dict) else GuidedDenoiser(sd.denoiser, terms)
    x0 = sample(guided, noise, steps=STEPS, conds=sd.encode(PROMPTS, size=SIZE), control=control)
    return sd.decode(x0).div(2).add(0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def noise():
    return initial_noise([3, 4], (4, SIZE[0] // 2, SIZE[1] // 2))


# --- in ---------------------------------------------------------------------------------------------


def test_parameters_are_the_pipelines_own(made):
    pipe, sd, _ = made
    for own, theirs in ((sd.unet, pipe.unet), (sd.vae, pipe.vae), (sd.text.encoders[0], pipe.text_encoder),
                        (sd.text.encoders[1], pipe.text_encoder_2)):  # fmt: skip
        places = {p.data_ptr() for p in theirs.parameters()}
        assert {p.data_ptr() for p in own.parameters()} == places
        assert not own.training and not any(p.requires_grad for p in own.parameters())
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_it_is_the_model_of_the_folder(made, noise):
    _, sd, loaded = made
    for key, cond in loaded.encode(PROMPTS, size=SIZE).items():
        assert sd.encode(PROMPTS, size=SIZE)[key].equals(cond)
    terms = {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(), 2.0)}
    assert torch.equal(ours(sd, terms, noise), ours(loaded, terms, noise))
    assert sd.zero_negative and sd.default_size == loaded.default_size
    with pytest.raises(InputError, match="in memory: no such file"):
        resolve_model(sd.name)


@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline,
                                  StableDiffusionXLPAGPipeline])  # fmt: skip
def test_siblings(made, kind):
    sd = from_diffusers(fresh(made, kind))
    assert sd.unet.conv_in.weight.data_ptr() == made[0].unet.conv_in.weight.data_ptr()
    assert kind.__name__ in sd.name


def test_dtype_scheduler_and_negative_come_along(made, tmp_path):
    pipe = make_pipeline(tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True).to(torch.float16)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    sd = from_diffusers(pipe)
    assert sd.unet.conv_in.weight.dtype == sd.text.encoders[0].dtype == torch.float16
    assert sd.vae.decoder.conv_in.weight.dtype == torch.float32  # which diffusers casts at each call
    assert sd.denoiser.prediction == "v_prediction" and sd.denoiser.sigma_max > 4000 and not sd.zero_negative


def test_fused_projections_and_compiled_modules(made, noise, tmp_path):
    pipe = make_pipeline(tmp_path)
    with torch.no_grad():
        pipe.fuse_qkv_projections()
    pipe.unet = torch.compile(pipe.unet)
    terms = {"cfg": cfg(4.0)}
    assert torch.equal(ours(from_diffusers(pipe), terms, noise), ours(made[1], terms, noise))


def test_controlnets_come_along(made, noise):
    nets = [make_controlnet(made[0], seed) for seed in (0, 1)]
    image = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    one = from_diffusers(fresh(made, StableDiffusionXLControlNetPipeline, controlnet=nets[0]))
    assert list(one.controlnets) == ["controlnet"]
    pipe = fresh(made, StableDiffusionXLControlNetPipeline, controlnet=MultiControlNetModel(nets))
    sd = from_diffusers(pipe)
    assert list(sd.controlnets) == ["controlnet_0", "controlnet_1"]
    assert sd.controlnets["controlnet_1"].conv_in.weight.data_ptr() == nets[1].conv_in.weight.data_ptr()
    control = [controlled(net, image) for net in sd.controlnets.values()]
    expected = images(pipe, noise, image=[image, image], guidance_scale=4.0)
    assert (ours(sd, {"cfg": cfg(4.0)}, noise, control) - expected).abs().max() < 2 / 255


class Strange:
    def __call__(self, attn, hidden_states, *others, **more):
        return hidden_states


class Wrapped(torch.nn.Linear):
    pass


def lora(pipe):
    Wrapped.__module__ = "peft.tuners.lora.layer"
    pipe.unet.mid_block.attentions[0].proj_in = Wrapped(128, 128)


def quantised(pipe):
    layer = pipe.unet.mid_block.attentions[0].proj_in
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def hooked(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.text_encoder, ModelHook())


def without(name):
    return lambda pipe: setattr(pipe, name, None)


REFUSED = {
    "lora": (lora, "pipe.unet.mid_block.attentions.0.proj_in is a Wrapped of peft, a LoRA adapter .* pipe.fuse_lora"),
    "processor": (lambda pipe: pipe.unet.set_attn_processor(Strange()), "has the attention processor Strange"),
    "quantised": (quantised, "mid_block.*Parameter of torch.float8_e4m3fn: quantised weights"),
    "hook": (hooked, r"pipe.text_encoder has offloading or another hook: call pipe.remove_all_hooks"),
    "freeu": (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), "has FreeU.*disable_freeu"),
    "unet": (without("unet"), "has no unet: load it whole"),
    "vae": (lambda pipe: setattr(pipe, "vae", torch.nn.Linear(1, 1)), "pipe.vae is a Linear, not a AutoencoderKL"),
    "meta": (lambda pipe: pipe.vae.to("meta"), r"pipe.vae\.\S+ is on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_is_named(case, tmp_path):
    pipe, (change, match) = make_pipeline(tmp_path), REFUSED[case]
    change(pipe)
    with pytest.raises(InputError, match=match) as caught:
        from_diffusers(pipe)
    assert "\n" not in str(caught.value)


def test_an_ip_adapter_is_named(tmp_path):
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    pipe = make_pipeline(tmp_path)
    width = {name: pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
             for name in pipe.unet.attn_processors}  # fmt: skip
    pipe.unet.set_attn_processor({
        name: IPAdapterAttnProcessor2_0(width[name], 192) if ".attn2" in name else AttnProcessor2_0() for name in width
    })  # fmt: skip
    with pytest.raises(InputError, match="has an IP-Adapter .*unload_ip_adapter"):
        from_diffusers(pipe)


@pytest.mark.parametrize("name", ["sd15", "sd21v", "ssd1b", "koala700m", "refiner", "pix2pix", "lcm", "playground"])
def test_other_families(name, tmp_path):
    """What `load_model` makes of their folders."""
    pipe = write_family(name, tmp_path)
    sd, loaded = from_diffusers(pipe), load_model(tmp_path)
    assert sd.unet.config == loaded.unet.config and sd.vae.config == loaded.vae.config
    assert sd.zero_negative == loaded.zero_negative
    for key in ("preconditioning", "schedule", "steps_offset"):
        assert getattr(sd.denoiser, key) == getattr(loaded.denoiser, key), key
    for key, cond in loaded.encode(["a red cup"]).items():
        assert sd.encode(["a red cup"])[key].equals(cond)
    for own, theirs in zip((sd.unet, sd.vae, *sd.text.encoders), (loaded.unet, loaded.vae, *loaded.text.encoders)):
        weights = theirs.state_dict()
        assert all(torch.equal(w, weights[key]) for key, w in own.state_dict().items())


def test_what_is_no_pipeline():
    with pytest.raises(InputError, match="takes a pipeline of diffusers in memory, got str"):
        from_diffusers("stabilityai/sdxl")


# --- out --------------------------------------------------------------------------------------------

SEG_TERM, PAG_TERM = {"seg": perturbed("seg", SEG(), 3.0)}, {"pag": perturbed("pag", PAG(where="mid"), 2.0)}


@pytest.mark.parametrize("terms", [SEG_TERM, PAG_TERM, {}], ids=["seg", "pag", "plain"])
def test_guided_by_the_pipelines_scale_and_by_our_own(made, noise, terms):
    """CFG as the pipeline's guidance_scale, as a term of ours, and as in `sample`: one image."""
    _, sd, _ = made
    expected = ours(sd, {"cfg": cfg(4.0)} | terms, noise)
    pipe = fresh(made, unet=None)
    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, terms))
    assert (images(pipe, noise, guidance_scale=4.0) - expected).abs().max() < 2 / 255
    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)} | terms))
    for scale in (1.5, 9.0):
        assert (images(pipe, noise, guidance_scale=scale) - expected).abs().max() < 2 / 255
    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, terms), negative=False)
    assert (images(pipe, noise, guidance_scale=1.0) - ours(sd, terms, noise)).abs().max() < 2 / 255


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_pag_of_diffusers_under_its_schedulers(made, noise, scheduler):
    theirs = fresh(made, StableDiffusionXLPAGPipeline, scheduler=scheduler.from_config(made[0].scheduler.config))
    pipe = fresh(made, scheduler=theirs.scheduler, unet=to_diffusers(GuidedDenoiser(made[1].denoiser, PAG_TERM)))
    out = images(pipe, noise, guidance_scale=4.0)
    expected = images(theirs, noise, guidance_scale=4.0, pag_scale=2.0)
    assert (out - expected).abs().max() < 1e-3 < (out - images(made[0], noise, guidance_scale=4.0)).abs().max()


def test_v_prediction_zero_snr_and_half_precision(tmp_path, noise):
    pipe = make_pipeline(tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    expected, plain = images(pipe, noise, guidance_scale=4.0), pipe.unet
    pipe.unet = to_diffusers(from_diffusers(pipe).denoiser)
    assert pipe.unet.dtype == torch.float32 and pipe.unet.config.in_channels == 4
    assert (images(pipe, noise, guidance_scale=4.0) - expected).abs().max() < 1e-3
    pipe.unet = plain
    pipe.to(torch.bfloat16)
    pipe.unet = to_diffusers(from_diffusers(pipe).denoiser)
    assert pipe.unet(torch.zeros(2, 4, 4, 4, dtype=torch.bfloat16), 500, torch.zeros(2, 3, 192), {
        "text_embeds": torch.zeros(2, 40), "time_ids": torch.zeros(2, 6)
    }).sample.dtype == torch.bfloat16  # fmt: skip


def test_sag_and_controlnets(made, noise):
    _, sd, _ = made
    guided = SelfAttentionGuidance(GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)}), 0.75)
    pipe = fresh(made, unet=to_diffusers(guided))
    assert (images(pipe, noise, guidance_scale=2.0) - ours(sd, guided, noise)).abs().max() < 2 / 255
    controlled_sd = from_diffusers(
        fresh(made, StableDiffusionXLControlNetPipeline, controlnet=make_controlnet(made[0]))
    )
    image = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    control = [controlled(controlled_sd.controlnets["controlnet"], image, 0.7)]
    terms = {"cfg": cfg(4.0)} | SEG_TERM
    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, terms), control)
    assert (images(pipe, noise) - ours(sd, terms, noise, control)).abs().max() < 2 / 255


def test_wrong_uses_are_named(made, noise):
    _, sd, _ = made
    plain = GuidedDenoiser(sd.denoiser, SEG_TERM)
    pipe = fresh(made, unet=to_diffusers(plain))
    with pytest.raises(InputError, match="2 rows without a negative prompt's: set guidance_scale above 1"):
        images(pipe, noise, guidance_scale=1.0)
    pipe.unet = to_diffusers(plain, negative=False)
    with pytest.warns(UserWarning, match="two equal halves: with guidance_scale above 1 give negative=True"):
        images(pipe, noise, guidance_scale=4.0)
    with pytest.raises(InputError, match="cross_attention_kwargs .a LoRA scale"):
        pipe.unet(noise, 500, torch.zeros(2, 3, 192), cross_attention_kwargs={"scale": 0.5})
    for guided, options, match in (
        (ZSampling(plain), {}, "takes a GuidedDenoiser or a SelfAttentionGuidance"),
        (SelfAttentionGuidance(plain), {}, "SAG needs the CFG term within it"),
        (GuidedDenoiser(sd.denoiser, {"cfg": cfg(2.0)}), {"negative": False}, "needs the negative prompt's rows"),
    ):
        with pytest.raises(InputError, match=match):
            to_diffusers(guided, **options)
    remembering = GuidedDenoiser(sd.denoiser, {"cfg": cfg(2.0)}, post=[Momentum()])
    pipe.unet = to_diffusers(remembering)
    with pytest.raises(InputError, match="needs the sigmas of the schedule, and a loop of diffusers"):
        images(pipe, noise, guidance_scale=4.0)


@pytest.mark.parametrize("name", ["sd15", "sd21v"])
def test_other_families_in_a_loop_of_diffusers(name, tmp_path):
    """Their own pipelines with and without PAG, under the model's scheduler and Euler."""
    pipe = make_family(name, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    sd, noise = from_diffusers(pipe), initial_noise([3, 4], (4, 4, 8))
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"requires_safety_checker": False}
    for scheduler in (pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)):
        theirs = StableDiffusionPAGPipeline(**parts | {"scheduler": scheduler}, pag_applied_layers=["mid"])
        theirs.set_progress_bar_config(disable=True)
        expected = images(theirs, noise, guidance_scale=4.0, pag_scale=2.0)
        bridged = StableDiffusionPipeline(**parts | {"scheduler": scheduler, "unet": None})
        bridged.set_progress_bar_config(disable=True)
        bridged.unet = to_diffusers(GuidedDenoiser(sd.denoiser, PAG_TERM))
        assert (images(bridged, noise, guidance_scale=4.0) - expected).abs().max() < 1e-3


def test_mini_in_a_loop_of_diffusers():
    pipe = StableDiffusionXLPipeline.from_pretrained(MINI, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    sd = from_diffusers(pipe)
    terms = SEG_TERM | PAG_TERM
    noise = initial_noise([0], sd.latent_shape())
    guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)} | terms)
    expected = sd.decode(sample(guided, noise, steps=3, conds=sd.encode(["a red circle"])))
    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, terms))
    out = pipe("a red circle", latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="pt").images
    assert (out - expected.div(2).add(0.5).clamp(0, 1)).abs().max() < 2 / 255
