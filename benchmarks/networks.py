"""Full-size SDXL with random weights, shared by ours and diffusers' networks, and the operations of a step."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segresearch.guidance import PAG, SEG, GuidedDenoiser, Term, cfg, perturbed
from segresearch.models.compute import PLAIN, Compute
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ActiveControlNet, ControlNet, ControlNetConfig
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.unet import UNet, UNetConfig

SIGMA = 3.0  # of the step that is measured
TEXT = 77  # tokens
SHARED: dict[str, Any] = {  # SDXL's sizes, in the terms of a diffusers config.json
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UP: dict[str, Any] = {"sample_size": 128, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
TINY: dict[str, Any] = SHARED | {  # the same structure in miniature, to test the scripts
    "block_out_channels": (32, 64, 128), "cross_attention_dim": 64, "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16,
}  # fmt: skip
SIZES = {"full": SHARED, "tiny": TINY}


def terms(method: str) -> dict[str, Term]:
    """The guidance of a row of the tables: unguided, SEG, PAG, CFG, or two of them with a + between."""
    choices = {
        "SEG": perturbed("seg", SEG(sigma=math.inf, where="mid"), 3.0),
        "PAG": perturbed("pag", PAG(where="mid"), 3.0),
        "CFG": cfg(5.0),
    }
    return {name: choices[name] for name in method.split("+") if name in choices}


def filled(net: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Gives a network on the meta device weights: variance 1/fan-in, from one repeated block; norms 1, biases 0."""
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))  # odd: rows do not repeat
    block = block.to(device)
    for name, parameter in list(net.named_parameters()):
        if parameter.ndim == 1:
            value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
        else:
            scale = parameter[0].numel() ** -0.5
            value = (block * scale).to(dtype).repeat(parameter.numel() // len(block) + 1)[: parameter.numel()]
        value = value.to(device=device, dtype=dtype).reshape(parameter.shape)
        owner, _, last = name.rpartition(".")
        setattr(net.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    return net.eval().requires_grad_(False)


def our_networks(dtype: torch.dtype, device: str, control: bool, size: str = "full") -> tuple[UNet, ControlNet | None]:
    """A UNet, and with `control` a ControlNet, of SDXL's size (or "tiny"). On device "meta" they have no weights."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(SIZES[size] | UP))
        net = ControlNet(ControlNetConfig.from_dict(SIZES[size])) if control else None
    if device == "meta":
        return unet.to(dtype).eval(), net and net.to(dtype).eval()
    return filled(unet, dtype, device), net and filled(net, dtype, device)


def their_networks(unet: UNet, control: ControlNet | None, size: str = "full") -> tuple[Any, Any]:
    """diffusers' UNet and ControlNet with the same tensors."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        sizes = SIZES[size]
        nets: list[Any] = [UNet2DConditionModel(**sizes, **UP), ControlNetModel(**sizes) if control else None]
    for net, own in zip(nets, (unet, control), strict=True):
        if net is not None:
            net.load_state_dict(own.state_dict(), assign=True)  # type: ignore[union-attr]
            net.eval().requires_grad_(False)
    return nets[0], nets[1]


def inputs(
    px: int, dtype: torch.dtype, device: str, batch: int = 1, size: str = "full"
) -> tuple[Tensor, Tensor, dict[str, Cond], Tensor]:
    """x, sigma, conds and a control image for `batch` images of px × px pixels."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes, b = SIZES[size], batch
    ids = torch.tensor([[float(px), float(px), 0, 0, float(px), float(px)]] * b)
    width, pooled = sizes["cross_attention_dim"], sizes["projection_class_embeddings_input_dim"]
    pooled -= 6 * sizes["addition_time_embed_dim"]
    conds = {n: Cond(draw(b, TEXT, width), draw(b, pooled), ids).to(device, dtype) for n in ("cond", "uncond")}
    image = torch.rand(b, 3, px, px, generator=generator)
    x, sigma = SIGMA * draw(b, 4, px // 8, px // 8), torch.tensor([SIGMA] * b)
    return x.to(device), sigma.to(device), conds, image.to(device)


def unguided_denoiser(unet: Any, compute: Compute = PLAIN) -> Denoiser:
    return Denoiser(unet, alphas_cumprod({}), compute=compute)


@lru_cache
def steps_flops(
    px: int, method: str, dtype: torch.dtype = torch.bfloat16, batch: int = 1, size: str = "full"
) -> dict[str, int]:
    """Floating-point operations of one guided step at full size, counted on the meta device without computing.

    step: with the keys and values of the text already cached. text: computing these, once per image.
    """
    unet, net = _meta(dtype, size)
    net = net if "ControlNet" in method else None
    denoiser = unguided_denoiser(unet).to("meta")
    x, sigma, conds, _ = inputs(px, dtype, "meta", batch, size)
    hint = torch.empty(batch, SIZES[size]["block_out_channels"][0], px // 8, px // 8, dtype=dtype, device="meta")
    control = [ActiveControlNet(net, hint)] if net is not None else []
    model = GuidedDenoiser(denoiser, terms(method))
    branches, nets = model.branches(SIGMA), [n for n in (unet, net) if n is not None]
    needed = {branch.conditioning: conds[branch.conditioning] for branch in branches}
    with torch.no_grad():
        projected: dict[str, Cond] = {}
        text = flops(lambda: projected.update({n: c.projected(*nets) for n, c in needed.items()}))
        step = flops(lambda: model.evaluate(x, sigma, branches, projected, control, values=[SIGMA] * batch))
    return {"step": step, "text": text}


@lru_cache
def _meta(dtype: torch.dtype, size: str) -> tuple[UNet, ControlNet | None]:
    return our_networks(dtype, "meta", True, size)


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def guided(
    method: str, unet: Any, net: Any, px: int, dtype: torch.dtype, device: str, batch: int = 1,
    denoiser: Denoiser | None = None, size: str = "full",
) -> Any:  # fmt: skip
    """A call that takes one guided step as `sample` does, after `prepare`."""
    x, sigma, conds, image = inputs(px, dtype, device, batch, size)
    model = GuidedDenoiser(denoiser or unguided_denoiser(unet).to(device), terms(method))
    arguments: dict[str, Any] = {"conds": {n: conds[n] for n in ("cond", "uncond") if n == "cond" or "CFG" in method}}
    if "ControlNet" in method:
        with torch.no_grad():
            arguments["control"] = [ActiveControlNet(net, net.embed_image(image.to(dtype)))]
    with torch.no_grad():
        arguments = model.prepare(arguments)

    @torch.no_grad()
    def call() -> Tensor:
        return model(x, sigma, **arguments)

    return call


def rows_of_diffusers(rows: int, unet: Any, px: int, dtype: torch.dtype, device: str, size: str = "full") -> Any:
    """A call of diffusers' UNet alone, on `rows` rows."""
    x, _, conds, _ = inputs(px, dtype, device, size=size)
    cond = conds["cond"][[0] * rows]
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    z, t = x.to(dtype).repeat(rows, 1, 1, 1), torch.full((rows,), 500.0, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return unet(z, t, cond.context, added_cond_kwargs=added).sample

    return call


def pipeline_step(
    method: str, unet: Any, net: Any, px: int, dtype: torch.dtype, device: str, batch: int = 1, size: str = "full"
) -> Any:
    """A call of diffusers' PAG pipeline (for a method with ControlNet, its ControlNet pipeline): one step, to latents.

    It runs a row for every branch from the first layer on, as a SEG pipeline of this kind would.
    """
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLControlNetPAGPipeline,
        StableDiffusionXLPAGPipeline,
    )

    x, _, conds, image = inputs(px, dtype, device, batch, size)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**betas, steps_offset=1)
    parts: dict[str, Any] = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    )
    parts |= {"unet": unet, "scheduler": scheduler, "pag_applied_layers": ["mid"], "add_watermarker": False}
    cond, uncond = conds["cond"], conds["uncond"]
    texts = {
        "prompt_embeds": cond.context, "pooled_prompt_embeds": cond.pooled,
        "negative_prompt_embeds": uncond.context, "negative_pooled_prompt_embeds": uncond.pooled,
    }  # fmt: skip
    call: dict[str, Any] = texts | {
        "height": px, "width": px, "num_inference_steps": 1, "latents": x.to(dtype), "output_type": "latent",
        "guidance_scale": 5.0 if "CFG" in method else 0.0, "pag_scale": 3.0,
    }  # fmt: skip
    if "ControlNet" in method:
        pipeline: Any = StableDiffusionXLControlNetPAGPipeline(**parts, controlnet=net)
        call |= {"image": image.to(dtype)}
    else:
        pipeline = StableDiffusionXLPAGPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    processors = unet.attn_processors

    @torch.no_grad()
    def step() -> Tensor:
        try:
            return pipeline(**call).images
        finally:
            unet.set_attn_processor(dict(processors))  # the pipeline sets processors on the network

    return step
