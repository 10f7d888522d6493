"""The one way from seeds and prompts to images: `sample_images`, and its halves for callers that look on between."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from segresearch.config.inputs import InitConfig
from segresearch.config.schema import RunConfig
from segresearch.errors import ConfigError, InputError, NotFinite
from segresearch.init_images import InitImages, strength
from segresearch.models.attention import Attend
from segresearch.models.controlnet import ActiveControlNet
from segresearch.models.prompt_syntax import equal_lengths
from segresearch.models.text_settings import AS_IT_IS, TextSettings
from segresearch.sampling import initial_noise, sample, sigmas
from segresearch.sampling.loop import Callback
from segresearch.sampling.start import last_steps

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

Latents = Float[Tensor, "rows channels h w"]


def sample_images(
    sd: "StableDiffusion", model: Any, seeds: Sequence[int], prompts: Sequence[str], config: RunConfig,
    negative: str | Sequence[str] | None = None, control: Sequence[ActiveControlNet] = (), attend: Attend | None = None,
    init: InitImages | None = None, callback: Callback | None = None,
) -> UInt8[Tensor, "rows 3 h w"]:  # fmt: skip
    """One image for each seed and its prompt, on the model's device.

    model: a guided denoiser of `sd`. config: of which sampler, schedule, steps and size are read. negative: as in
    `sd.encode`. attend: the innermost attention. init: the images that these start from. callback: of `sample`.
    Raises NotFinite, and what `sd.encode` and `sample` raise.
    """
    conds = encode_conds(sd, model, prompts, negative, config.size, config.text)
    pixels = decode_images(sd, sample_latents(sd, model, seeds, conds, config, control, attend, init, callback))
    return pixels if init is None else init.paste(pixels)


def encode_conds(
    sd: "StableDiffusion",
    model: Any,
    prompts: Sequence[str],
    negative: str | Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    settings: TextSettings = AS_IT_IS,
) -> dict[str, Any]:
    """All conditionings that a guided denoiser needs: cond, uncond, and those that it makes from texts. settings:
    as of `sd.encode`."""
    conds = sd.encode(prompts, negative, size, settings)
    makers = {n: make for n, make in getattr(model, "inner", model).conditionings.items() if hasattr(make, "encode")}
    others = {name: make.encode(sd, prompts, negative, size, settings) for name, make in makers.items()}
    return equal_lengths(conds | others)


@torch.no_grad()
def sample_latents(
    sd: "StableDiffusion", model: Any, seeds: Sequence[int], conds: Mapping[str, Any], config: RunConfig,
    control: Sequence[ActiveControlNet] = (), attend: Attend | None = None, init: InitImages | None = None,
    callback: Callback | None = None,
) -> Latents:  # fmt: skip
    """Latents from the noise of each seed; conds: of `encode_conds`. Raises NotFinite, which names the seeds, and
    ConfigError for a model that reads an image where there is none."""
    if sd.extra_channels and init is None:
        raise ConfigError("init.image: missing; this model reads an image beside the latents (a mask too to inpaint)")
    conds = conds if init is None else init.conds(sd, conds)
    schedule = config.schedule.name if config.schedule.rho is None else run_sigmas(sd, config)
    noise = initial_noise(seeds, sd.latent_shape(config.size))
    with sd.arithmetic():
        latents = sample(
            model, noise, sampler=config.sampler.name, schedule=schedule, steps=config.steps, conds=conds, seeds=seeds,
            options=config.sampler.options, control=control, attend=attend, callback=callback,
            start=None if init is None else init.start(sd, seeds),
        )  # fmt: skip
    finite = latents.isfinite().flatten(1).all(1).tolist()  # (rows, channels, h, w) -> (rows)
    if failed := [seed for seed, row_is_finite in zip(seeds, finite, strict=True) if not row_is_finite]:
        raise NotFinite(f"the latents of seeds {failed} are not finite{broken_weights(sd)}")
    return latents


@torch.no_grad()
def decode_images(sd: "StableDiffusion", latents: Latents, rows: int | None = None) -> UInt8[Tensor, "rows 3 H W"]:
    """8-bit images, decoded `rows` latents at a time (None: all at once). Raises NotFinite."""
    return torch.cat([to_uint8(finite_images(sd, part)) for part in latents.split(rows or len(latents))])


def finite_images(sd: "StableDiffusion", latents: Latents) -> Float[Tensor, "rows 3 H W"]:
    """Decoded images, not clamped. Where the VAE overflows in a half precision (SDXL's own does in fp16) they are
    decoded again in fp32, with a warning. Raises NotFinite where that is no help."""
    images, dtype = sd.decode(latents), next(sd.vae.parameters()).dtype
    if not images.isfinite().all() and dtype in (torch.float16, torch.bfloat16):
        text = f"the VAE gave values that are not finite in {dtype}, so it decodes again in fp32"
        warnings.warn(f"{text}; load it in fp32 (vae_dtype) to spare this", stacklevel=3)
        images = replace(sd, vae=copy.deepcopy(sd.vae).float()).decode(latents)
    if not images.isfinite().all():
        raise NotFinite(f"the VAE decoded latents that are finite to values that are not{broken_weights(sd)}")
    return images


def broken_weights(sd: "StableDiffusion") -> str:
    """What a message of values that are not finite adds where a weight of the model is not finite either; else "".

    Not looked for while weights are read: it would take a tenth of that time.
    """
    encoders = {f"text encoder {i}": encoder for i, encoder in enumerate(sd.text.encoders, 1)}
    for name, network in ({"UNet": sd.unet, "VAE": sd.vae} | encoders | dict(sd.controlnets)).items():
        for key, weight in network.named_parameters():
            if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
                return f"; {name} holds NaN or inf in {key}: fetch the model again, or load it in float32"
    return ""


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images in [−1, 1] as 8-bit values: rounded to the nearest, clamped where they overshoot."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def run_sigmas(sd: "StableDiffusion", config: RunConfig, init: InitConfig | None = None) -> Float[Tensor, "sigmas"]:
    """The sigmas of a run's schedule, with its rho; the last is 0. init: where it has an image, those that are left."""
    values = sigmas(sd.denoiser, config.schedule.name, config.steps, config.schedule.rho)
    return values if init is None or init.image is None else last_steps(values, strength(init, sd))


def to_pil(images: UInt8[Tensor, "rows 3 H W"]) -> list[Image.Image]:
    """The 8-bit images of `decode_images` or `sample_images` as Pillow's."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (rows, 3, H, W) -> (rows, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


def save_images(
    images: UInt8[Tensor, "rows 3 H W"], folder: str | Path, seeds: Sequence[int] | None = None
) -> list[Path]:
    """Write them as <folder>/seed<seed>.png, by default numbered from 0, without records. The paths."""
    numbers = list(range(len(images))) if seeds is None else list(seeds)
    if len(set(numbers)) != len(images):
        raise InputError(f"seeds: {len(images)} images need as many different seeds, not {numbers}")
    paths = [Path(folder) / f"seed{number}.png" for number in numbers]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, to_pil(images), strict=True):
        image.save(path)
    return paths
