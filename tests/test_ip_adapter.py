"""IP-Adapters against diffusers', on random weights: base and plus, SDXL's shape, whole images."""

from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline
from make_families import make_family
from make_models import make_pipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from segresearch import runs
from segresearch.checkpoints.ip_adapter_file import check_context, load_ip_adapter
from segresearch.config.build import build_guidance
from segresearch.config.expand import describe
from segresearch.config.method import GuidanceConfig
from segresearch.config.validate import typed
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.guidance import PAG, SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models import from_diffusers, load_model
from segresearch.records import with_networks
from segresearch.sampling import initial_noise, sample

PROMPTS, SIZE, STEPS, CONTEXT, WIDTH, SIDE = ["a red cup", "two cubes"], (8, 16), 3, 192, 24, 28
TOWER = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=14,
    projection_dim=WIDTH,
)  # fmt: skip


def random(*shape):
    return torch.randn(*shape) * shape[-1] ** -0.5


def image_proj(kind, context=CONTEXT):
    """The weights of an image projection under the published names."""
    if kind == "base":
        return {"proj.weight": random(4 * context, WIDTH), "proj.bias": 0.1 * random(4 * context),
                "norm.weight": 1 + random(context), "norm.bias": random(context)}  # fmt: skip
    inner, heads = 96, 2
    weights = {"latents": random(1, 5, inner), "proj_in.weight": random(inner, 32), "proj_in.bias": random(inner),
               "proj_out.weight": random(context, inner), "proj_out.bias": random(context),
               "norm_out.weight": 1 + random(context), "norm_out.bias": random(context)}  # fmt: skip
    for i in range(4):
        at = f"layers.{i}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            weights |= {f"{at}.{norm}.weight": 1 + random(inner), f"{at}.{norm}.bias": random(inner)}
        weights |= {
            f"{at}.0.to_q.weight": random(64 * heads, inner), f"{at}.0.to_kv.weight": random(128 * heads, inner),
            f"{at}.0.to_out.weight": random(inner, 64 * heads), f"{at}.1.1.weight": random(4 * inner, inner),
            f"{at}.1.3.weight": random(inner, 4 * inner),
        }  # fmt: skip
    return weights


def adapter_weights(unet, kind, context=CONTEXT):
    """As published: image_proj.* and ip_adapter.<n>.*, n counted over diffusers' attention processors."""
    weights = {f"image_proj.{key}": weight for key, weight in image_proj(kind, context).items()}
    for number, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{number}.{key}.weight"] = 2 * random(width, context)
    return weights


@pytest.fixture(scope="module", params=["base", "plus"])
def made(request, tmp_path_factory):
    """The adapter's file and tower, the pipeline without it and with it, and the model with the loaded adapter."""
    root = tmp_path_factory.mktemp("adapter")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe = make_pipeline(root)
        tower = CLIPVisionModelWithProjection(TOWER).eval()
        weights = adapter_weights(pipe.unet, request.param)
    save_file(weights, root / "adapter.safetensors")
    tower.save_pretrained(root / "tower")
    pipe.save_pretrained(root / "sdxl")
    sd = load_model(root / "sdxl")
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    processor = CLIPImageProcessor(size=SIDE, crop_size=SIDE)
    pipe = StableDiffusionXLPipeline(**parts, image_encoder=tower, feature_extractor=processor)
    pipe.load_ip_adapter(str(root), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return root, pipe, sd, load_ip_adapter(root / "adapter.safetensors", root / "tower", sd.unet)


@pytest.fixture(scope="module")
def picture():
    generator = torch.Generator().manual_seed(1)
    return Image.fromarray(torch.randint(0, 255, (40, 33, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def noise():
    return initial_noise([3, 4], (4, SIZE[0] // 2, SIZE[1] // 2))


def images(pipe, noise, picture, scale, **options):
    pipe.set_ip_adapter_scale(scale)
    options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "output_type": "latent"} | options
    return pipe(PROMPTS, latents=noise, ip_adapter_image=picture, **options).images


def ours(sd, terms, noise, every):
    guided = GuidedDenoiser(sd.denoiser, terms, every=every)
    return sample(guided, noise, steps=STEPS, conds=sd.encode(PROMPTS, size=SIZE))


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_images_of_diffusers(made, noise, picture, scale, weight):
    _, pipe, sd, prompter = made
    out = ours(sd, {"cfg": cfg(weight)}, noise, prompter.every([picture], scale))
    torch.testing.assert_close(out, images(pipe, noise, picture, scale, guidance_scale=weight), rtol=1e-4, atol=1e-4)
    assert (out - ours(sd, {"cfg": cfg(weight)}, noise, {})).abs().max() > 0.05


def test_images_of_diffusers_with_pag(made, noise, picture):
    _, pipe, sd, prompter = made
    parts = {k: v for k, v in pipe.components.items()}
    theirs = StableDiffusionXLPAGPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    expected = images(theirs, noise, picture, 0.7, guidance_scale=4.0, pag_scale=2.0)
    terms = {"cfg": cfg(4.0), "pag": perturbed("pag", PAG(where="mid"), 2.0)}
    torch.testing.assert_close(ours(sd, terms, noise, prompter.every([picture], 0.7)), expected, rtol=1e-4, atol=1e-4)


def test_no_scale_is_no_adapter_and_the_fork_changes_nothing(made, noise, picture):
    _, _, sd, prompter = made
    terms = {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(), 2.0)}
    torch.testing.assert_close(ours(sd, terms, noise, prompter.every([picture], 0.0)), ours(sd, terms, noise, {}))
    every, conds = prompter.every([picture], 0.8), sd.encode(PROMPTS, size=SIZE)
    x, sigma = noise * 3, torch.full((2,), 3.0)
    forked, plain = (GuidedDenoiser(sd.denoiser, terms, every=every, fork=f)(x, sigma, conds) for f in (True, False))
    torch.testing.assert_close(forked, plain, rtol=1e-5, atol=1e-5)


def test_an_image_for_each_row_and_for_some_sites(made, noise, picture):
    _, _, sd, prompter = made
    other, terms = picture.rotate(90), {"cfg": cfg(4.0)}
    both = ours(sd, terms, noise, prompter.every([picture, other]))
    for i, one in enumerate((picture, other)):
        alone = ours(sd, terms, noise, prompter.every([one]))
        torch.testing.assert_close(both[i], alone[i], rtol=1e-4, atol=1e-4)
    partial = ours(sd, terms, noise, prompter.every([picture], where="up"))
    assert (partial - both).abs().max() > 1e-3 < (partial - ours(sd, terms, noise, {})).abs().max()
    with pytest.raises(InputError, match="3 images for 2 rows"):
        ours(sd, {}, noise, {"cond": prompter.every([picture] * 3)["cond"]})
    with pytest.raises(InputError, match="scale=inf: a finite number"):
        prompter.every([picture], float("inf"))


def refused(match, *arguments):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_ip_adapter(*arguments)
    assert "\n" not in str(caught.value)


def test_other_files_are_named(made, tmp_path):
    root, pipe, sd, prompter = made
    file, tower = root / "adapter.safetensors", root / "tower"
    refused("no such file; give the adapter", root / "none.safetensors", tower, sd.unet)
    (tmp_path / "a.bin").write_bytes(b"PK")
    refused("pickle", tmp_path / "a.bin", tower, sd.unet)
    for keys, match in (
        (["image_proj.proj.0.weight", "image_proj.norm.weight"], "of the kind FaceID: only base and plus"),
        (["image_proj.proj.3.weight", "image_proj.proj.0.weight"], "of the kind full"),
        (["image_proj.perceiver_resampler.proj_in.weight"], "of the kind FaceID Plus"),
        (["lora_unet_x.alpha"], "no IP-Adapter .its first key is 'lora_unet_x.alpha'"),
        (["image_proj.latents"], "sizes cannot be told"),
    ):
        save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "other.safetensors")
        refused(match, tmp_path / "other.safetensors", tower, sd.unet)
    torch.manual_seed(0)
    sizes = TOWER.to_dict() | {"hidden_size": 16, "projection_dim": 8}
    small = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes))
    small.save_pretrained(tmp_path / "small")
    refused("it gives (8|16) numbers, the adapter adapter.safetensors reads (24|32)", file, tmp_path / "small", sd.unet)
    refused("no such folder", file, tmp_path / "nowhere", sd.unet)
    cut = {k: v for k, v in prompter.adapter.state_dict().items() if not k.startswith("ip_adapter.3.")}
    save_file(cut, tmp_path / "cut.safetensors")
    refused("2 missing keys .ip_adapter.3.to_k_ip.weight", tmp_path / "cut.safetensors", tower, sd.unet)
    with pytest.raises(CheckpointError, match="tokens are 192 wide, this model's text is 64"):
        check_context(192, 64, file)
    with pytest.raises(InputError, match="has an IP-Adapter .*unload_ip_adapter"):
        from_diffusers(pipe)
    with pytest.raises(CheckpointError, match="an IP-Adapter.*guidance.ip_adapter.path"):
        load_model(file)


def test_an_image_prompt_in_the_settings_of_a_run(made, noise, picture, tmp_path):
    root, _, sd, prompter = made
    picture.save(tmp_path / "prompt.png")
    adapter = {"path": str(root / "adapter.safetensors"), "image_encoder": str(root / "tower"), "scale": 0.6,
               "image": str(tmp_path / "prompt.png")}  # fmt: skip
    config = typed(GuidanceConfig, {"terms": {"cfg": {"kind": "cfg", "weight": 4.0}}, "ip_adapter": adapter})
    assert describe(config) == "CFG 4 + image 0.6"
    x0 = sample(build_guidance(config, sd), noise, steps=STEPS, conds=sd.encode(PROMPTS, size=SIZE))
    torch.testing.assert_close(x0, ours(sd, {"cfg": cfg(4.0)}, noise, prompter.every([picture], 0.6)))

    plain = replace(config, ip_adapter=None)
    assert "ip_adapter" not in runs.plain(plain) and "ip_adapter" in runs.plain(config)
    known = with_networks(config, root)
    assert with_networks(known, root) == known != config
    picture.rotate(180).save(tmp_path / "prompt.png")
    with pytest.raises(ConfigError, match="guidance.ip_adapter: its weights and its image are .*, not"):
        with_networks(known, root)
    for key, match in (("path", "guidance.ip_adapter.path: .*none: no safetensors weights"),
                       ("image_encoder", "ip_adapter.image_encoder: "), ("image", "ip_adapter.image: .*no such file")):
        with pytest.raises(ConfigError, match=match):
            with_networks(replace(config, ip_adapter=replace(config.ip_adapter, **{key: str(tmp_path / "none")})), root)
    with pytest.raises(ConfigError, match="guidance.ip_adapter: ip_adapter.path=.*no such file"):
        build_guidance(replace(config, ip_adapter=replace(config.ip_adapter, path="none.safetensors")), sd)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_of_sd15(kind, tmp_path, picture):
    """Without size embeddings, eight heads, cross-attentions on three levels."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe = make_family("sd15", tmp_path)
        tower = CLIPVisionModelWithProjection(TOWER).eval()
        weights = adapter_weights(pipe.unet, kind, 64)
    save_file(weights, tmp_path / "adapter.safetensors")
    tower.save_pretrained(tmp_path / "tower")
    sd = from_diffusers(pipe)
    pipe.register_modules(image_encoder=tower, feature_extractor=CLIPImageProcessor(size=SIDE, crop_size=SIDE))
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    prompter = load_ip_adapter(tmp_path / "adapter.safetensors", tmp_path / "tower", sd.unet)
    noise = initial_noise([3, 4], (4, 8, 8))
    pipe.set_ip_adapter_scale(0.8)
    expected = pipe(
        PROMPTS, latents=noise, ip_adapter_image=picture, height=16, width=16, num_inference_steps=STEPS,
        guidance_scale=4.0, output_type="latent",
    ).images  # fmt: skip
    guided = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)}, every=prompter.every([picture], 0.8))
    x0 = sample(guided, noise, schedule="leading", steps=STEPS, conds=sd.encode(PROMPTS, size=(16, 16)))
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
