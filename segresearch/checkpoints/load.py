"""load_sdxl: from a path or a name to a ready SDXL, whatever the layout on disk."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import CheckpointError, InputError
from segresearch.models.checkpoint import fill
from segresearch.models.compute import PLAIN, Compute, arithmetic
from segresearch.models.conditioning import Cond
from segresearch.models.control_folder import Asked, check_fit, open_controlnets
from segresearch.models.controlnet import ControlNet
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.layouts import Parts, Weights, from_file, from_folder
from segresearch.models.locate import located
from segresearch.models.offload import on_device, pin
from segresearch.models.text import TextEncoders
from segresearch.models.unet import UNet
from segresearch.models.vae import VAE


@dataclass(frozen=True)
class SDXL:
    """Everything of one loaded model. Frozen: an experiment that wants another behaviour passes another argument.

    name: as it was asked for. zero_negative: no negative prompt means zeros (SDXL), else the encoding of "".
    controlnets: by the names they were asked for by, in that order.
    compute: of the denoiser, and of the methods here; the VAE's own decode and encode compute where and as they are.
    """

    unet: UNet
    vae: VAE
    text: TextEncoders
    denoiser: Denoiser = field(repr=False)
    name: str = "sdxl"
    zero_negative: bool = True
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)
    compute: Compute = PLAIN

    @property
    def device(self) -> torch.device:
        """Of the UNet, where everything is computed."""
        return self.unet.conv_in.weight.device

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return self.vae.config.factor

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side = self.unet.config.sample_size * self.vae_factor
        return (side, side)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of a picture of `size` = (height, width) in pixels, default the model's own.

        Raises ValueError if a side is not a positive multiple of the VAE's factor.
        """
        if size is not None and not (isinstance(size, tuple | list) and len(size) == 2):
            raise InputError(f"size={size!r}: give (height, width) in pixels")
        height, width = size or self.default_size
        factor = self.vae_factor
        if height < factor or width < factor or height % factor or width % factor:
            raise InputError(f"size={(height, width)}: height and width must be positive multiples of {factor} pixels")
        return (self.latent_channels, height // factor, width // factor)

    def encode(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
    ) -> dict[str, Cond]:
        """{"cond": ..., "uncond": ...}, one row a prompt, in the UNet's dtype and on its device.

        negative: one text for all rows or one a row; None means zeros where the model says so (SDXL does), else "".
        size: (height, width) in pixels, default `default_size`; both the original and the target size of the picture,
        uncropped. clip_skip: as in diffusers, for the prompts only. A prompt "" is encoded like any other: that is what
        "unconditional" means. Raises ValueError for an empty list, a bare string, unequal lengths or a size that does
        not fit.
        """
        if isinstance(prompts, str):
            raise InputError(f"prompts must be a list of strings, not the string {prompts!r}: write [{prompts!r}]")
        if not prompts:
            raise InputError('prompts is empty: give at least one, [""] for an unconditional picture')
        for text in (*prompts, *(negative if isinstance(negative, list | tuple) else ())):
            if not isinstance(text, str):
                raise InputError(f"{text!r} among the prompts is not a string")
        self.latent_shape(size)
        height, width = size or self.default_size
        if negative is not None and not isinstance(negative, str) and len(negative) != len(prompts):
            raise InputError(f"negative has {len(negative)} texts for {len(prompts)} prompts: give one text or as many")
        rows, device = len(prompts), self.device
        moved = device if self.compute.offload else None
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device).expand(rows, 6)

        def cond(context: Tensor, pooled: Tensor) -> Cond:
            return Cond(context, pooled, ids).to(device, self.unet.conv_in.weight.dtype)

        def encode(texts: Sequence[str], clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
            with self.arithmetic():
                return self.text.encode(texts, clip_skip, moved)

        positive = cond(*encode(prompts, clip_skip))
        if negative is None and self.zero_negative:
            return {
                "cond": positive,
                "uncond": Cond(torch.zeros_like(positive.context), torch.zeros_like(positive.pooled), ids),
            }
        if negative is None or isinstance(negative, str):
            context, pooled = encode([negative or ""])
            context, pooled = context.expand(rows, -1, -1), pooled.expand(rows, -1)  # (1, ...) -> (rows, ...)
        else:
            context, pooled = encode(negative)
        return {"cond": positive, "uncond": cond(context, pooled)}

    def decode(self, latents: Float[Tensor, "b l h w"]) -> Float[Tensor, "b c H W"]:
        """Images from scaled latents, not clamped: `vae.decode` on the UNet's device, as `compute` says."""
        return self._vae("decode", latents)

    def encode_images(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b l h w"]:
        """Scaled latents of images in [−1, 1]: `vae.encode` on the UNet's device, as `compute` says."""
        return self._vae("encode", images)

    def _vae(self, method: str, x: Tensor) -> Tensor:
        run = on_device(self.vae, self.device, method) if self.compute.offload else getattr(self.vae, method)
        with self.arithmetic():
            return run(x.to(self.device), tile=self.compute.vae_tile)

    def arithmetic(self) -> AbstractContextManager[None]:
        """fp32 products within its block as `compute.precision` says, of networks that are called directly too."""
        return arithmetic(self.compute.resolved(self.device).precision, self.device)


def load_sdxl(
    path_or_name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    controlnet: Asked = None,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    compute: Compute = PLAIN,
) -> SDXL:
    """An SDXL from a diffusers folder, a single .safetensors file in the original layout, "mini", or a hub id in the
    local cache.

    controlnet: one or several, each a name in the folder's own controlnet/, a diffusers ControlNet folder, or a hub id
        in the local cache; `.controlnets` holds them by these names, in the UNet's dtype and on its device.
    variant: of the weights in a folder, e.g. "fp16"; None takes the plain files, else the fp16 variant if only that is
    there. config: for a single file, a folder with the configs of the diffusers layout (all or some: unet/config.json,
    vae/config.json,
        text_encoder/config.json, text_encoder_2/config.json, scheduler/scheduler_config.json, model_index.json,
        tokenizers), where the shapes do not tell the sizes (heads that are not 64 wide, another number of groups).
    tokenizer: for a single file, a folder with tokenizer/ and tokenizer_2/, or with one tokenizer for both encoders;
        None takes them from `config` or the local transformers cache.
    vae_dtype: None is `dtype`, but float32 for a VAE that overflows in float16 (SDXL's own; config force_upcast).
    compute: how the model computes; with offload, text encoders and VAE are left on the CPU, and SDXL's own methods
        bring them to `device` for each call.

    Weights are read one tensor at a time into their place, on the caller's device and in the caller's dtype. Nothing is
    fetched from a network. Raises CheckpointError, a ValueError of one line, for anything that is not a complete SDXL.
    """
    for asked, kind in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
        if kind not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(f"{asked}={kind!r}: the networks run in torch.float32, bfloat16, float16 or float64")
    if torch.device(device).type == "meta" or (torch.device(device).type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device={str(device)!r} cannot run the networks here: give another, such as 'cpu'")
    if not isinstance(compute, Compute):
        raise InputError(f"compute={compute!r}: give Compute(precision=..., graph=..., ...)")
    path = located(path_or_name)
    if path.is_dir():
        for name, value in (("config", config), ("tokenizer", tokenizer)):
            if value is not None:
                raise InputError(f"{name}={str(value)!r} is for a single file: the folder {path} brings its own")
        parts = from_folder(path, variant)
    else:
        if variant is not None:
            raise InputError(f"variant={variant!r} is for a folder: {path} is a single file")
        parts = from_file(
            path, None if config is None else Path(config), None if tokenizer is None else Path(tokenizer)
        )
    nets = open_controlnets(controlnet, path, variant)
    return _built(parts, nets, str(path_or_name), dtype, torch.device(device), vae_dtype, compute)


def _built(
    parts: Parts,
    nets: Mapping[str, tuple[ControlNet, Weights]],
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    vae_dtype: torch.dtype | None,
    compute: Compute,
) -> SDXL:
    if vae_dtype is None:
        vae_dtype = torch.float32 if dtype == torch.float16 and parts.force_upcast else dtype
    unet, vae, text = parts.unet, parts.vae, TextEncoders(parts.tokenizers, parts.encoders)
    _agree(unet, vae, text)
    for own, (net, _) in nets.items():
        check_fit(own, net.config, unet.config, vae.config.factor)
    try:
        schedule, offset = alphas_cumprod(parts.scheduler).to(device), int(parts.scheduler.get("steps_offset", 1))
        denoiser = Denoiser(unet, schedule, parts.scheduler.get("prediction_type", "epsilon"), offset, compute)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    modules = (unet, vae, *text.encoders, *(net for net, _ in nets.values()))
    aside, home = ((vae, *text.encoders), torch.device("cpu")) if compute.offload else ((), device)
    for module, w in zip(modules, (*parts.weights, *(w for _, w in nets.values())), strict=True):
        kind = vae_dtype if module is vae else dtype
        fill(module, w.entries, w.sources, dtype=kind, device=home if module in aside else device, what=w.what)
    for encoder in text.encoders:  # position_ids, the one buffer that checkpoints do not hold
        embeddings: Any = getattr(encoder, "text_model", encoder).embeddings
        embeddings.position_ids = torch.arange(encoder.config.max_position_embeddings, device=home)[None]
    if device.type == "cuda":
        for module in aside:
            pin(module)
    for module in modules:
        assert not any(b.is_meta for b in module.buffers()), (
            f"a buffer of {type(module).__name__} was left on the meta device"
        )
    own_nets = {key: net for key, (net, _) in nets.items()}
    return SDXL(unet, vae, text, denoiser, name, parts.zero_negative, own_nets, compute)


def _agree(unet: UNet, vae: VAE, text: TextEncoders) -> None:
    """The four networks fit each other. Raises CheckpointError, naming both sides of what does not."""
    c, first, second = unet.config, *(e.config for e in text.encoders)
    facts = (
        ("text width", "text encoders", first.hidden_size + second.hidden_size, "UNet", c.cross_attention_dim),
        ("pooled text width", "second text encoder", second.projection_dim, "UNet", c.pooled_dim),
        ("latent channels", "VAE", vae.config.latent_channels, "UNet", c.in_channels),
    )
    if c.in_channels != c.out_channels:
        raise CheckpointError(
            f"the UNet has {c.in_channels} input channels for {c.out_channels} of output: an "
            "inpainting or editing model, not supported; give a text-to-image SDXL"
        )
    for what, one, a, other, b in facts:
        if a != b:
            raise CheckpointError(f"{what}: {a} in the {one}, {b} in the {other}: parts of different models are mixed")
