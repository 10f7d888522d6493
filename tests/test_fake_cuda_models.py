"""The networks on a GPU that is not there: denoiser, ControlNets, VAE, texts, conditionings."""

import warnings
from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch
from fake_cuda import (
    CONFIG,
    DTYPES,
    LEVELS,
    check_same,
    fake_denoiser,
    moved,
    on_the_cpu,
    real_denoiser,
    real_inputs,
    sent,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from segresearch.checkpoints.resolve import resolve_model
from segresearch.guidance import SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.guidance.controlnet_residuals import residuals
from segresearch.guidance.methods.swg import SWG
from segresearch.models import StableDiffusion
from segresearch.models.calls import on_device
from segresearch.models.compute import Compute
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ActiveControlNet, ControlNet, ControlNetConfig, controlled
from segresearch.models.denoiser import Denoiser, alphas_cumprod, scheduled
from segresearch.models.network_configs import EncoderConfig
from segresearch.models.preconditioning import Preconditioning
from segresearch.models.text import TextEncoders, load_tokenizer
from segresearch.models.text_settings import TextSettings
from segresearch.models.vae import VAE, VAEConfig

ROUNDING = {torch.float16: 5e-2, torch.bfloat16: 2e-1, torch.float32: 2e-5}


def random(module: torch.nn.Module) -> torch.nn.Module:
    """Weights away from zero, the same at every call, for evaluation."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:  # biases about 0, norms about 1
            weight.data = 0.1 * noise + (0 if name.endswith("bias") else 1)
        else:
            weight.data = noise * weight[0].numel() ** -0.5
    return module.eval().requires_grad_(False)


# --- the denoiser ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, prediction", [*((d, "epsilon") for d in DTYPES), (torch.float32, "v_prediction")])
def test_denoiser(gpu, dtype, prediction):
    x, sigma, conds = real_inputs(dtype=dtype)
    fake, real = fake_denoiser(dtype, prediction, LEVELS), real_denoiser(dtype, prediction, LEVELS)
    with on_the_cpu():
        expected = real(x, sigma, cond=conds["cond"]), real.loss(x, x.flip(0), sigma, cond=conds["cond"])
    x, sigma, conds = sent((x, sigma, conds))
    gpu.reads.clear()
    prepared = fake.prepare({"cond": conds["cond"]})["cond"]
    found = fake(x, sigma, cond=prepared), fake.loss(x, x.flip(0), sigma, cond=conds["cond"])
    check_same(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert not gpu.reads


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_times_and_levels(gpu, dtype):
    with on_the_cpu():
        sigma, t = torch.tensor([0.05, 1.0, 14.0], dtype=dtype), torch.tensor([0.0, 10.5, 999.0])
        real = real_denoiser()
        expected = [real.sigma_to_t(sigma), real.sigma_to_t(sigma, quantize=True), real.t_to_sigma(t)]
        expected += [real.t_to_sigma(sigma)]
    fake = fake_denoiser()
    gpu.reads.clear()
    sigma, t = sent((sigma, t))
    found = [fake.sigma_to_t(sigma), fake.sigma_to_t(sigma, quantize=True), fake.t_to_sigma(t), fake.t_to_sigma(sigma)]
    check_same(found, expected)
    assert not gpu.reads
    assert fake.sigmas.device.type == fake.log_sigmas.device.type == fake.alphas.device.type == "cuda"


def test_schedules_of_training_are_made_on_the_cpu(gpu):
    """By design: the numbers of a config, in fp64; `load_model` sends them to the device before the denoiser exists."""
    for config in ({}, {"beta_schedule": "linear"}):
        assert alphas_cumprod(config).device.type == "cpu"
    snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert Denoiser(fake_denoiser().unet, alphas_cumprod(snr).to("cuda"), "v_prediction").sigmas.device.type == "cuda"


@pytest.mark.parametrize(
    "scalings",
    [Preconditioning("epsilon", 0.5), Preconditioning("v_prediction", 1.0), Preconditioning("sample"),
     Preconditioning("epsilon", timestep_scaling=10.0)],
    ids=["edm", "edm-v", "x0", "lcm"],
)  # fmt: skip
def test_preconditionings(gpu, scalings):
    with on_the_cpu():
        real, (x, sigma, conds) = real_denoiser(prediction=scalings), real_inputs()
        s, t = sigma[:, None, None, None], real.sigma_to_t(sigma)[:, None, None, None]
        expected = [real(x, sigma, conds["cond"]), real.loss(x, x, sigma, cond=conds["cond"])]
        expected += [scalings.output(expected[0], x, s, t), scalings.unscaled(x, s)]
    fake, (x, sigma, conds) = fake_denoiser(prediction=scalings), sent((x, sigma, conds))
    s, t = sigma[:, None, None, None], fake.sigma_to_t(sigma)[:, None, None, None]
    gpu.reads.clear()
    found = [fake(x, sigma, conds["cond"]), fake.loss(x, x, sigma, cond=conds["cond"])]
    check_same([*found, scalings.output(found[0], x, s, t), scalings.unscaled(x, s)], expected, rtol=1e-3, atol=1e-3)
    assert not gpu.reads


def test_the_tables_of_a_schedulers_config_are_sent(gpu):
    for config in ({}, {"_class_name": "EDMEulerScheduler"}, {"_class_name": "LCMScheduler"}):
        model = scheduled(fake_denoiser().unet, config, device="cuda")
        assert model.sigmas.device.type == model.log_sigmas.device.type == model.alphas.device.type == "cuda"


def test_conditionings(gpu):
    real = real_inputs()[2]
    cond, other = sent(real).values()
    net = fake_denoiser().unet
    both = Cond.cat([cond.projected(net), other.projected(net)])
    assert both.rows == 4 and {z.device.type for z in (both.context, both.pooled, both.time_ids)} == {"cuda"}
    assert both.projections[net].added.device.type == "cuda" and both[1:2].expand(3).rows == 3
    gpu.reads.clear()
    assert cond.equals(cond) and not cond.equals(other)
    assert set(gpu.reads) == {"aten.equal.default"}  # once a conditioning, in `prepare`
    with on_the_cpu():
        expected = Cond.cat([*real.values()])
    check_same([both.context, both.pooled, both.time_ids], [expected.context, expected.pooled, expected.time_ids])


@pytest.mark.parametrize("width", [None, 10])
def test_further_channels_and_an_embedded_guidance_weight(gpu, width):
    config = replace(CONFIG, in_channels=9, time_cond_proj_dim=width)
    x, sigma, conds = real_inputs()
    with on_the_cpu():
        weight = None if width is None else torch.tensor([7.5, 8.0])
        image = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(2))
        conds = {n: replace(c, image=image, guidance=weight) for n, c in conds.items()}
    results = []
    for model in (fake_denoiser(config=config), real_denoiser(config=config)):
        guided = GuidedDenoiser(model, {"cfg": cfg(3.0), "swg": perturbed("swg", SWG(), 1.0)})
        if not results:
            results.append(guided(*sent((x, sigma, conds))))
        else:
            with on_the_cpu():
                results.append(guided(x, sigma, conds))
    check_same(*results)


# --- ControlNets ----------------------------------------------------------------------------------


@lru_cache
def nets(dtype: torch.dtype, order: str = "rgb"):
    """(on the CPU, on the device)."""
    shared = {field.name: getattr(CONFIG, field.name) for field in fields(EncoderConfig)}
    config = ControlNetConfig(
        **shared, conditioning_embedding_out_channels=(4, 8), controlnet_conditioning_channel_order=order
    )
    with on_the_cpu():
        real = random(ControlNet(config)).to(dtype)
    return real, moved(real)


def picture(rows: int = 2):
    with on_the_cpu():
        return torch.rand(rows, 3, 12, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_controlnets(gpu, dtype):
    """Two at once, one with a picture for all and of another channel order, under every kind of guidance."""
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0), 2.0)}

    def run(denoiser, which, image, x, sigma, conds):
        control = [
            controlled(nets(dtype)[which], image, 0.8),
            controlled(nets(dtype, "bgr")[which], image[:1], interval=(0.0, 9.0)),
        ]
        guided = GuidedDenoiser(denoiser, terms)
        arguments = guided.prepare({"conds": conds, "control": control})
        called = SelfAttentionGuidance(guided) if dtype == torch.float32 else guided
        return called(x, sigma, **arguments)

    given = (picture(), *real_inputs(dtype=dtype))
    nets(dtype), nets(dtype, "bgr")
    with on_the_cpu():
        expected = run(real_denoiser(dtype), 0, *given)
    found = run(fake_denoiser(dtype), 1, *sent(given))
    check_same(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype, fork", [*((d, True) for d in DTYPES), (torch.float32, False)])
def test_guess_mode(gpu, dtype, fork):
    terms = {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0), 2.0)}
    _, net = nets(dtype)
    x, sigma, conds = sent(real_inputs(dtype=dtype))
    control = [controlled(net, picture().to("cuda"), guess=True)]
    model = GuidedDenoiser(fake_denoiser(dtype), terms, fork=fork)
    gpu.reads.clear()
    branches = model.branches(3.0)
    denoised = model.evaluate(x, sigma, branches, conds, control, values=[3.0, 3.0])
    assert not gpu.reads and {z.device.type for z in denoised.values()} == {"cuda"}


def test_scales_of_rows_on_both_sides_of_an_interval(gpu):
    real, fake = nets(torch.float32)
    x, _, conds = real_inputs()

    def of(conds):
        return lambda names, rows: Cond.cat([conds[name] for name in names])

    with on_the_cpu():
        sigma = torch.tensor([3.0, 1.0])
        control = controlled(real, picture(), 0.8, interval=(2.0, 9.0))
        expected = residuals(real_denoiser(), x, sigma, tuple(conds), of(conds), "cond", [control])
    x, sigma, conds = sent((x, sigma, conds))
    control = controlled(fake, picture().to("cuda"), 0.8, interval=(2.0, 9.0))
    denoiser = fake_denoiser()  # which reads what it is made of
    gpu.reads.clear()
    found = residuals(denoiser, x, sigma, tuple(conds), of(conds), "cond", [control], values=[3.0, 1.0])
    assert not gpu.reads
    check_same([*found.down, found.mid], [*expected.down, expected.mid])


def test_a_control_image_lies_where_its_net_does(gpu):
    """A picture of the CPU is sent by `embed_image`; its range is looked at before, where it lies."""
    _, net = nets(torch.bfloat16)
    gpu.reads.clear()
    control = controlled(net, picture())
    assert not gpu.reads and control.hint.device.type == "cuda" and control.hint.dtype == torch.bfloat16
    assert isinstance(control[0:1], ActiveControlNet) and control[0:1].rows == 1


# --- VAE ------------------------------------------------------------------------------------------


@lru_cache
def vaes(dtype: torch.dtype):
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    with on_the_cpu():
        real = random(VAE(config)).to(dtype)
    return real, moved(real)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vae_both_ways(gpu, dtype):
    real, fake = vaes(dtype)
    images = picture()
    with on_the_cpu():
        latents = real.encode(images)
        expected = [latents, *real.moments(images), real.decode(latents)]
        tiled = [real.encode(images[:1], tile=8), real.decode(latents[:1], tile=8)]
    images, latents = sent((images, latents))
    found = [fake.encode(images), *fake.moments(images), fake.decode(latents)]
    check_same(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    parts = [fake.encode(images[:1], tile=8), fake.decode(latents[:1], tile=8)]
    check_same(parts, tiled, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert not gpu.reads and found[0].dtype == found[-1].dtype == torch.float32


def test_vae_of_the_cpu_computes_on_the_device(gpu):
    """Offloaded: its weights are sent at each call, and stay where they are."""
    real, _ = vaes(torch.float32)
    with on_the_cpu():
        latents = real.encode(picture())
        expected = real.decode(latents)
    check_same(on_device(real, "cuda", "decode")(latents.to("cuda")), expected)
    assert {z.device.type for z in real.parameters()} == {"cpu"} and len(gpu.sends) > len([*real.parameters()])


# --- texts ----------------------------------------------------------------------------------------

TEXT = {"vocab_size": 721, "intermediate_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 16,
        "bos_token_id": 0, "eos_token_id": 2, "num_attention_heads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def encoders():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_size=4))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_size=8, projection_dim=8))
    return (load_tokenizer(resolve_model("mini") / "tokenizer"),) * 2, tuple(random(model) for model in (first, second))


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts(encoders, gpu, dtype):
    tokenizers, networks = encoders
    vae, vae_there = vaes(dtype)
    with on_the_cpu():
        networks = tuple(network.to(dtype) for network in networks)
        real = StableDiffusion(real_denoiser(dtype).unet, vae, TextEncoders(tokenizers, networks), real_denoiser(dtype))
        skipped = {"negative": ["a cube", "red"], "settings": TextSettings(clip_skip=1), "size": (24, 32)}
        asked = [{}, {"negative": "a cube"}, skipped]
        expected = [real.encode(["a red cube", "cubes"], **more) for more in asked]
        weighted = ["a (red:1.5) cube BREAK cubes", "cubes"]
        expected.append(real.encode(weighted, settings=TextSettings(syntax="weighted")))
    on_gpu = TextEncoders(tokenizers, tuple(map(moved, networks)))
    fake = StableDiffusion(fake_denoiser(dtype).unet, vae_there, on_gpu, fake_denoiser(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [fake.encode(["a red cube", "cubes"], **more) for more in asked]
        found.append(fake.encode(weighted, settings=TextSettings(syntax="weighted")))
    for ours, theirs in zip(found, expected):
        for name in ("cond", "uncond"):
            a, b = ours[name], theirs[name]
            assert (a.context.dtype, a.time_ids.dtype) == (dtype, torch.float32)
            ours_of, theirs_of = ([c.context, c.pooled, c.time_ids] for c in (a, b))
            check_same(ours_of, theirs_of, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("offload", [False, True])
def test_one_text_encoder_and_no_sizes(encoders, gpu, offload):
    """SD 1.5's shape, with LCM's guidance weight; the final norm of a skipped layer is of the device too."""
    none = dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim", "size_ids"), 0)
    config = replace(CONFIG, cross_attention_dim=4, time_cond_proj_dim=10, **none)
    vae, vae_there = vaes(torch.float32)
    with on_the_cpu():
        network = encoders[1][0].float()
        text = TextEncoders(encoders[0][:1], (network,))
        real = StableDiffusion(
            real_denoiser(config=config).unet, vae, text, real_denoiser(config=config), zero_negative=False
        )
        expected = real.encode(["a red cube", "cubes"], settings=TextSettings(clip_skip=1, guidance=7.5))
        x, sigma, _ = real_inputs()
        denoised = GuidedDenoiser(real.denoiser, {"cfg": cfg(3.0)})(x, sigma, expected)
    there = text if offload else TextEncoders(encoders[0][:1], (moved(network),))
    model = fake_denoiser(config=config)
    fake = StableDiffusion(model.unet, vae_there, there, model, "", False, compute=Compute(offload=offload))
    found = fake.encode(["a red cube", "cubes"], settings=TextSettings(clip_skip=1, guidance=7.5))
    check_same([found["uncond"].context, found["cond"].context, found["cond"].guidance],
               [expected["uncond"].context, expected["cond"].context, expected["cond"].guidance])  # fmt: skip
    check_same(GuidedDenoiser(model, {"cfg": cfg(3.0)})(*sent((x, sigma)), found), denoised)


def test_latents_with_a_mean_and_a_deviation(gpu):
    statistics = {"latents_mean": (1.0, 2.0, -1.0, 0.5), "latents_std": (8.0, 6.0, 4.0, 2.0), "scaling_factor": 0.5}
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **statistics)
    with on_the_cpu():
        real = random(VAE(config))
        latents = real.encode(picture())
        expected = [latents, real.decode(latents)]
    fake = moved(real)
    check_same([fake.encode(picture().to("cuda")), fake.decode(latents.to("cuda"))], expected)
