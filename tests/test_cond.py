"""Conditionings with further channels and an embedded guidance weight: rows, methods that make others, networks."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers_unets import TWO_LEVELS, inputs

from segresearch.guidance import Branch, GuidedDenoiser, Term, cfg, perturbed
from segresearch.guidance.methods.cads import CADS
from segresearch.guidance.methods.icg import ICG
from segresearch.guidance.methods.image_size import ImageSize
from segresearch.guidance.methods.swg import SWG
from segresearch.guidance.methods.tsg import TSG
from segresearch.guidance.perturbations import SEG
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet, UNetConfig
from segresearch.sampling import initial_noise, sample
from segresearch.sampling.loop import one_row


def network(**changes) -> tuple[UNet2DConditionModel, UNet]:
    """The same random weights in diffusers' UNet and in ours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = UNet2DConditionModel(**TWO_LEVELS, **changes).eval()
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def inpainting() -> Denoiser:
    return Denoiser(network(in_channels=9)[1], alphas_cumprod({}))


@pytest.fixture(scope="module")
def lcm() -> tuple[UNet2DConditionModel, Denoiser]:
    theirs, ours = network(time_cond_proj_dim=20)
    return theirs, Denoiser(ours, alphas_cumprod({}))


def full(rows: int = 3, extra: int = 5) -> tuple[torch.Tensor, Cond]:
    """x and a conditioning with an image, each row its own."""
    x, _, cond = inputs(rows, 8, 12)
    return x, replace(cond, image=torch.randn(rows, extra, 8, 12, generator=torch.Generator().manual_seed(3)))


def test_rows_are_chosen_joined_and_moved_with_all_they_have():
    _, cond = full()
    cond = replace(cond, guidance=torch.tensor([1.0, 7.5, 8.0]))
    for some in (cond[1:], cond[torch.tensor([1, 2])], one_row({"c": (cond,)}, 1, 3)["c"][0]):
        assert torch.equal(some.image[0], cond.image[1]) and some.guidance[0] == 7.5
    both = Cond.cat([cond, cond[:1].expand(2)])
    assert both.rows == 5 and torch.equal(both.image[3:], cond.image[[0, 0]]) and both.guidance[3:].tolist() == [1, 1]
    half = cond.to(dtype=torch.bfloat16)
    assert half.context.dtype == torch.bfloat16 and half.image.dtype == half.guidance.dtype == torch.float32
    assert cond.equals(replace(cond)) and not cond.equals(replace(cond, guidance=None))
    assert not cond.equals(replace(cond, image=cond.image + 1))
    for name in ("image", "guidance"):
        with pytest.raises(ValueError, match=f"with and without `{name}`"):
            Cond.cat([cond, replace(cond, **{name: None})])


@torch.no_grad()
def test_further_channels_stand_beside_the_scaled_latents(inpainting):
    x, cond = full()
    sigma = torch.tensor([0.5, 3.0, 9.0])
    z = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
    eps = inpainting.unet(torch.cat([z, cond.image], dim=1), inpainting.sigma_to_t(sigma), cond)
    assert eps.shape == x.shape
    torch.testing.assert_close(inpainting(x, sigma, cond), x - sigma[:, None, None, None] * eps)
    assert torch.equal(inpainting(x, sigma, cond.projected(inpainting.unet)), inpainting(x, sigma, cond))


def test_channels_that_do_not_fit_are_named(inpainting):
    (x, cond), sigma = full(), torch.ones(3)
    plain = Denoiser(network()[1], alphas_cumprod({}))
    for model, wrong, match in (
        (inpainting, replace(cond, image=None), "takes 9 channels, the latents are 4: give cond.image the other 5"),
        (inpainting, replace(cond, image=cond.image[:, :4]), r"\(3, 4, 8, 12\), .* need \(3, 5, 8, 12\)"),
        (inpainting, replace(cond, image=cond.image[..., :6]), r"\(3, 5, 8, 6\)"),
        (plain, cond, r"\(3, 5, 8, 12\), .* need \(3, 0, 8, 12\)"),
        (plain, replace(cond, image=None, guidance=sigma), "embeds no guidance weight"),
    ):
        with pytest.raises(ValueError, match=match):
            model(x, sigma, wrong)


@torch.no_grad()
def test_made_conditionings_keep_the_image(inpainting):
    x, cond = full()
    conds = {"cond": cond, "uncond": replace(cond, context=0 * cond.context)}
    for make in (CADS(), ICG(), ImageSize()):
        made = make(conds, torch.full((3,), 9.0), torch.tensor([1, 2, 3]))
        assert torch.equal(made.image, cond.image), make
        term = Term(Branch("cond"), Branch("made"), 1.0)
        guided = GuidedDenoiser(inpainting, {"made": term}, conditionings={"made": make})
        assert guided(x, torch.full((3,), 9.0), conds).isfinite().all()


@torch.no_grad()
def test_windows_see_their_part_of_the_image(inpainting):
    x, cond = full()
    sigma, conds = torch.full((3,), 2.0), {"cond": cond, "uncond": replace(cond, context=0 * cond.context)}
    whole = GuidedDenoiser(inpainting, {"cfg": cfg(2.0), "swg": perturbed("swg", SWG(1.0, 1), 1.0)})
    torch.testing.assert_close(whole(x, sigma, conds), GuidedDenoiser(inpainting, {"cfg": cfg(2.0)})(x, sigma, conds))
    swg = SWG(0.75, 2)
    guided = GuidedDenoiser(inpainting, {"swg": perturbed("swg", swg, 1.0)})
    parts = torch.cat([inpainting(x[..., r, c], sigma, replace(cond, image=cond.image[..., r, c])) for r, c in
                       swg.windows(8, 12)])  # fmt: skip
    plain = inpainting(x, sigma, cond)
    torch.testing.assert_close(guided(x, sigma, conds), 2 * plain - swg.join(parts, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_run_one_at_a_time_with_their_own_channels(inpainting):
    _, cond = full(2)
    conds = {"cond": cond, "uncond": replace(cond, context=0 * cond.context)}
    guided = GuidedDenoiser(inpainting, {"cfg": cfg(2.0), "seg": perturbed("seg", SEG(where="mid", sigma=1.0), 1.0)})
    noise = initial_noise([0, 1], (4, 8, 12))
    churn = {"conds": conds, "seeds": [0, 1], "steps": 2, "options": {"s_churn": 1.0}}
    both = sample(guided, noise, **churn)
    alone = {name: c[1:] for name, c in conds.items()}
    torch.testing.assert_close(both[1:], sample(guided, noise[1:], **churn | {"conds": alone, "seeds": [1]}))


@torch.no_grad()
def test_the_guidance_weight_is_embedded_as_in_diffusers(lcm):
    from diffusers import LatentConsistencyModelPipeline

    theirs, model = lcm
    x, t, cond = inputs(3, 8, 12)
    w = torch.tensor([1.0, 7.5, 8.0])
    embedded = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=20)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    expected = theirs(x, t, cond.context, timestep_cond=embedded, added_cond_kwargs=added).sample
    out = model.unet(x, t, replace(cond, guidance=w))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(out[1:], model.unet(x, t, replace(cond, guidance=w.flip(0)))[1:], atol=1e-5)
    with pytest.raises(ValueError, match="cond.guidance must be set"):
        model.unet(x, t, cond)


@torch.no_grad()
def test_perturbed_embeddings_have_the_weight_of_their_rows(lcm):
    x, _, cond = inputs(3, 8, 12)
    conds = {"cond": replace(cond, guidance=torch.tensor([2.0, 7.5, 8.0]))}
    conds["uncond"] = replace(conds["cond"], context=0 * cond.context)
    terms = {"cfg": cfg(2.0), "tsg": perturbed("tsg", TSG(strength=0.0), 1.0)}  # a perturbation that does nothing
    sigma = torch.full((3,), 2.0)
    plain = GuidedDenoiser(lcm[1], {"cfg": cfg(2.0)})(x, sigma, conds)
    torch.testing.assert_close(GuidedDenoiser(lcm[1], terms)(x, sigma, conds), plain)
