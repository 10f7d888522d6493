"""Unions of ControlNets against diffusers' ControlNetUnionModel and its pipeline, on random weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetUnionModel, StableDiffusionXLControlNetUnionPipeline
from guidance_models import control_net
from make_models import make_pipeline
from safetensors.torch import save_file

from segresearch.config import ControlConfig
from segresearch.control_images.identify import IdentifiedControl, control_records
from segresearch.control_images.prepare import controlled_batch
from segresearch.errors import ConfigError, InputError
from segresearch.guidance import SEG, GuidedDenoiser, cfg, perturbed
from segresearch.models import from_diffusers, load_model
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import controlled
from segresearch.sampling import initial_noise, sample, sigmas

SIZE, STEPS, KIND = (8, 16), 3, 3


def make_union(pipe, kinds=6, layers=1):
    """A random union that fits the pipeline, none of it zero."""
    keys = ("down_block_types", "block_out_channels", "transformer_layers_per_block", "attention_head_dim",
            "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim", "use_linear_projection",
            "projection_class_embeddings_input_dim")  # fmt: skip
    sizes = {key: pipe.unet.config[key] for key in keys}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = ControlNetUnionModel(
            **sizes, conditioning_embedding_out_channels=(8, 12), num_control_type=kinds, num_trans_channel=32,
            num_proj_channel=32, num_trans_layer=layers,
        )  # fmt: skip
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out,
                      net.spatial_ch_projs):  # fmt: skip
            layer.weight.data.normal_(0, 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("union")
    pipe = make_pipeline(root / "sdxl")
    net = make_union(pipe)
    pipe.save_pretrained(root / "sdxl")
    net.save_pretrained(root / "sdxl" / "controlnet" / "union")
    save_file(net.state_dict(), root / "union.safetensors")
    return root, pipe, net, load_model(root / "sdxl", controlnet=["union", root / "union.safetensors"])


def picture(rows, seed=0):
    return torch.rand(rows, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [0, 5])
@pytest.mark.parametrize("guess", [False, True])
@torch.no_grad()
def test_residuals_of_diffusers(made, kind, guess):
    _, _, theirs, sd = made
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(1, *s, generator=generator) for s in ((4, 4, 8), (5, 192), (40,)))
    ids, image = torch.tensor([[8.0, 16, 0, 0, 8, 16]]), picture(1)
    chosen = torch.zeros(1, 6)
    chosen[0, kind] = 1
    expected = theirs(
        x, torch.tensor(321), context, [image], chosen, [kind], 1.0, guess_mode=guess,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}, return_dict=False,
    )  # fmt: skip
    for union in sd.controlnets.values():
        net, cond = union.of_kind(kind), Cond(context, pooled, ids)
        for given in (cond, cond.projected(net).for_network(net)):
            ours = net(x, torch.tensor([321.0]), given, net.embed_image(image), guess)
            for a, b in zip((*ours.down, ours.mid), (*expected[0], expected[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_image_of_diffusers(made):
    _, pipe, net, sd = made
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    theirs = StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    noise = initial_noise([3], (4, 4, 8))
    expected = theirs(
        ["a red cup"], control_image=[picture(1)], control_mode=[KIND], latents=noise, height=SIZE[0], width=SIZE[1],
        num_inference_steps=STEPS, guidance_scale=4.0, controlnet_conditioning_scale=0.7, output_type="latent",
    ).images  # fmt: skip
    control = [controlled(sd.controlnets["union"].of_kind("canny"), picture(1), 0.7)]
    guided, conds = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0)}), sd.encode(["a red cup"], size=SIZE)
    x0 = sample(guided, noise, steps=STEPS, conds=conds, control=control)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
    other = [controlled(sd.controlnets["union"].of_kind("depth"), picture(1), 0.7)]
    assert (x0 - sample(guided, noise, steps=STEPS, conds=conds, control=other)).abs().max() > 1e-3
    carried = from_diffusers(theirs).controlnets["controlnet"].of_kind(KIND)
    assert torch.equal(carried.embed_image(picture(1)), control[0].net.embed_image(picture(1)))


@torch.no_grad()
def test_images_do_not_depend_on_the_batch(made):
    sd = made[3]
    union = sd.controlnets["union"]
    noise, sigma = initial_noise([3, 4], (4, 4, 8)) * 3, torch.full((2,), 3.0)
    model = GuidedDenoiser(sd.denoiser, {"cfg": cfg(4.0), "seg": perturbed("seg", SEG(), 2.0)})
    conds, image = sd.encode(["a red cup", "two cubes"], size=SIZE), picture(2)

    def run(rows):
        control = [controlled(union.of_kind(0), image[rows]), controlled(union.of_kind(1), picture(1, 5), 0.5)]
        return model(noise[rows], sigma[rows], {k: c[rows] for k, c in conds.items()}, control)

    both = run(slice(0, 2))
    for i in (0, 1):
        torch.testing.assert_close(both[[i]], run(slice(i, i + 1)), rtol=1e-4, atol=1e-4)


def test_a_kind_is_needed_and_named(made):
    union = made[3].controlnets["union"]
    for kind in ("tile", 6, -1, "lines"):
        with pytest.raises(InputError, match="has openpose, depth, scribble, .*segment, or a number below 6"):
            union.of_kind(kind)
    with pytest.raises(InputError, match="needs the kind of the image: openpose, depth"):
        controlled(union, picture(1))
    with pytest.raises(InputError, match="needs the kind of the image"):
        union(picture(1))
    assert not {key for key in union.state_dict() if key.startswith(("kinds", "union"))}


def test_promax_sizes(tmp_path):
    """Eight kinds, two layers; in bf16 the hint is of that dtype."""
    pipe = make_pipeline(tmp_path / "sdxl")
    pipe.save_pretrained(tmp_path / "sdxl")
    save_file(make_union(pipe, 8, 2).state_dict(), tmp_path / "promax.safetensors")
    sd = load_model(tmp_path / "sdxl", torch.bfloat16, controlnet=tmp_path / "promax.safetensors")
    net = sd.controlnets[str(tmp_path / "promax.safetensors")]
    assert net.config.kinds == 8 and len(net.transformer_layes) == 2
    assert net.of_kind("repaint").embed_image(picture(1)).dtype == torch.bfloat16


def test_a_kind_in_the_settings_of_a_run(made):
    control = ControlConfig(net="union", image="scene:0", preprocess="canny", kind="canny")
    levels = sigmas(made[3].denoiser, "leading", 4)

    def hint(**changes):
        one = replace(control, **changes)
        return controlled_batch(made[3], {"edges": one}, [("scene:0",)], (16, 32), levels)[0].hint

    assert not torch.equal(hint(), hint(kind="depth")) and torch.equal(hint(), hint(kind=3))
    for kind, match in ((None, "controls.edges: a union of ControlNets needs the kind"), ("tile", "kind='tile': this")):
        with pytest.raises(ConfigError, match=match):
            hint(kind=kind)
    plain = replace(made[3], controlnets={"union": control_net()})
    with pytest.raises(ConfigError, match="controls.edges.kind: 'canny' is for a union of ControlNets, and union is"):
        controlled_batch(plain, {"edges": control}, [("scene:0",)], (16, 32), levels)
    assert identified(control).identity(["scene:0"])["kind"] == "canny"
    unset = identified(replace(control, kind=None))
    assert "kind" not in unset.identity(["scene:0"])
    assert "kind" not in control_records({"edges": unset}, ["scene:0"])["controls"]["edges"]


def identified(control):
    return IdentifiedControl(control, "net", {"scene:0": "digest"}, None)
