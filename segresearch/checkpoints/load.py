"""load_model: from a path or a name to a ready model, whatever its family and its layout on disk."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig

from segresearch.checkpoints.additions import Embedding, Embeddings, Lora, Loras, as_embeddings, as_loras
from segresearch.checkpoints.controlnets import Names, open_controlnets
from segresearch.checkpoints.folder import Checkpoint, building, naming_path, open_model_folder
from segresearch.checkpoints.lora_merge import merges, with_loras
from segresearch.checkpoints.own_schedule import scheduler_of
from segresearch.checkpoints.part_files import Paths, is_whole, open_part, open_parts
from segresearch.checkpoints.parts import part_weights, unet_sizes
from segresearch.checkpoints.resolve import resolve_model, resolve_network
from segresearch.checkpoints.single_file import open_model_file
from segresearch.checkpoints.tensors import Weights, as_stored, fill
from segresearch.checkpoints.textual_inversion import extended, open_embeddings
from segresearch.errors import CheckpointError, InputError
from segresearch.models.calls import pin
from segresearch.models.compute import PLAIN, Compute
from segresearch.models.controlnet import ControlNet
from segresearch.models.denoiser import Denoiser, scheduled
from segresearch.models.network_configs import ControlNetConfig, UNetConfig
from segresearch.models.scheduler import overridden
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text import TextEncoders, check_tokens
from segresearch.models.unet import UNet
from segresearch.models.vae import VAEConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path_or_name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    controlnet: Names = None,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: Paths = None,
    vae_dtype: torch.dtype | None = None,
    prediction: str | None = None,
    loras: Loras = None,
    embeddings: Embeddings = None,
    compute: Compute = PLAIN,
) -> StableDiffusion:
    """A Stable Diffusion model: a diffusers folder, a .safetensors file in the original layout, "mini", or a hub id in
    the local cache. Which families there are: docs/models.md.

    controlnet: one or several, each a name in the folder's own controlnet/, a diffusers ControlNet folder, a file of
        one, or a hub id in the local cache; `.controlnets` is keyed by these names, in order, each in the UNet's dtype
        and on its device
    variant: of the weights in a folder, e.g. "fp16"; None takes the plain files, else fp16 if only that is there
    config: for a single file, a folder with configs of the diffusers layout, all or some (unet/config.json, ...,
        scheduler/scheduler_config.json, model_index.json, tokenizers), where shapes do not tell (heads not 64 wide)
    tokenizer: for a single file, a folder with tokenizer/ and tokenizer_2/, or with one tokenizer for both encoders;
        None takes them from `config` or the local transformers cache
    vae, unet, text_encoder: parts in place of the model's own, which may then be missing: a component's folder, a file
        of it alone in either layout, another model that has it, or a hub id in the local cache. Several text encoders
        are a list; each takes the place of the one of its width. The scaling of latents stays the model's; what a UNet
        declares of its training (prediction, noise) comes with it
    vae_dtype: None is `dtype`, but float32 for a VAE that overflows in float16 (SDXL's own; config force_upcast)
    prediction: what the network's output stands for, "epsilon", "v_prediction" or "sample"; None: as the model declares
    loras: merged into the weights: files, or (file, scale), (file, scale of the UNet, scale of the text encoders)
    embeddings: textual inversions, {token of the prompt: file, or a file for each text encoder}, or a list of files
    compute: how the model computes; with offload, text encoders and VAE stay on the CPU between calls of its methods

    Nothing is fetched from a network. CheckpointError, of one line, for anything that is not a complete model.
    """
    for argument, kind in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
        if kind not in DTYPES:
            raise InputError(f"{argument}={kind!r}: the networks run in torch.float32, bfloat16, float16 or float64")
    device = torch.device(device)
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device={str(device)!r} cannot run the networks here: give another, such as 'cpu'")
    if not isinstance(compute, Compute):
        raise InputError(f"compute={compute!r}: give Compute(precision=..., graph=..., ...)")
    path = resolve_model(path_or_name)
    given = open_parts(unet, vae, text_encoder, variant)
    if path.is_dir():
        for argument, value in (("config", config), ("tokenizer", tokenizer)):
            if value is not None:
                raise InputError(f"{argument}={str(value)!r} is for a single file: the folder {path} brings its own")
        checkpoint = open_model_folder(path, variant, given)
    else:
        if variant is not None:
            raise InputError(f"variant={variant!r} is for a folder: {path} is a single file")
        folders = [Path(folder) if folder else None for folder in (config, tokenizer)]
        checkpoint = open_model_file(path, folders[0], folders[1], given)
    opened = open_controlnets(controlnet, path, variant, checkpoint.networks[0].config)
    return filled(
        checkpoint, opened, str(path_or_name), device, compute, dtype=dtype, vae_dtype=vae_dtype, prediction=prediction,
        loras=as_loras(loras), embeddings=as_embeddings(embeddings),
    )  # fmt: skip


def filled(
    checkpoint: Checkpoint,
    opened: Mapping[str, tuple[ControlNet, Weights]],
    name: str,
    device: torch.device,
    compute: Compute,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
    prediction: str | None,
    loras: Sequence[Lora],
    embeddings: Sequence[Embedding],
) -> StableDiffusion:
    """The model of an opened checkpoint and its opened ControlNets, checked, with its weights read. Arguments as of
    `load_model`; name: what the model was loaded by."""
    controlnets = {key: net for key, (net, _) in opened.items()}
    encoders: list[Any]
    unet, vae, *encoders = checkpoint.networks
    with naming_path(Path(name)):
        text = TextEncoders(checkpoint.tokenizers, tuple(encoders))
        check_tokens(text)
    refuse_mixture(unet.config, vae.config, [encoder.config for encoder in encoders])
    for key, net in controlnets.items():
        check_fit(key, net.config, unet.config, vae.config.factor)
    merge = dict(zip((unet, *encoders), merges(loras, unet, encoders), strict=True))
    words = open_embeddings(embeddings, text)
    try:
        scheduler = overridden(checkpoint.scheduler, prediction)
        denoiser = scheduled(unet, scheduler, compute, device)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    if vae_dtype is None:
        vae_dtype = torch.float32 if dtype == torch.float16 and checkpoint.force_upcast else dtype
    resting = torch.device("cpu") if compute.offload else device  # of what is offloaded
    for module, weights in zip((unet, vae, *encoders), checkpoint.weights, strict=True):
        where = device if module is unet else resting
        fill(module, weights, vae_dtype if module is vae else dtype, where, merge.get(module, as_stored))
    for net, weights in opened.values():
        fill(net, weights, dtype, device)
    for encoder in encoders:
        number_positions(encoder, resting)
    text = extended(text, words) if words else text
    if compute.offload and device.type == "cuda":
        for module in (vae, *encoders):
            pin(module)
    return StableDiffusion(unet, vae, text, denoiser, name, checkpoint.zero_negative, controlnets, compute)


def number_positions(encoder: Any, device: torch.device) -> None:
    """Make the one buffer of a text encoder that checkpoints do not hold: position_ids."""
    embeddings = getattr(encoder, "text_model", encoder).embeddings
    embeddings.position_ids = torch.arange(encoder.config.max_position_embeddings, device=device)[None]


@lru_cache(maxsize=4)
def load_network(
    name: str | None,
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    denoiser: Denoiser,
    loras: tuple[Lora, ...] = (),
) -> Denoiser:
    """A further network as a denoiser that may stand beside `denoiser`: a UNet's folder or file, with the schedule and
    the prediction of `denoiser`, or the UNet of a whole model, with that model's own; each with the UNet part of
    `loras`. None is the UNet of `denoiser`, with the `loras` added to its weights and those that none of them changes
    shared. model: the path or name of the one that has `denoiser`.

    CheckpointError for a network that cannot read the same latents and conditionings.
    """
    if name is None:
        return denoiser.of_network(with_loras(denoiser.unet, loras))
    path = resolve_network(name, resolve_model(model))
    (part,), own = open_part("unet", path), denoiser.unet.config
    known = {**vars(own), "attention_head_dim": own.heads}
    with building(path):
        unet = UNet(UNetConfig.from_dict(unet_sizes(part, known, own.pooled_dim if own.size_ids else None)))
    widths = [(net.cross_attention_dim, net.pooled_dim, net.out_channels) for net in (unet.config, own)]
    if widths[0] != widths[1]:
        its, models = ("text {}, pooled text {}, latents {} wide".format(*sizes) for sizes in widths)
        raise CheckpointError(f"{path}: {its}; those of the model: {models}: it belongs to another model")
    fill(unet, part_weights(part, unet), dtype, device, *merges(loras, unet, ()))
    if not is_whole(path):
        return denoiser.of_network(unet)
    with naming_path(path):
        return scheduled(unet, scheduler_of(path), denoiser.run.compute, device)


def refuse_mixture(unet: UNetConfig, vae: VAEConfig, texts: Sequence[CLIPTextConfig]) -> None:
    """CheckpointError, naming both sides, for a model whose networks do not fit each other."""
    if unet.in_channels < unet.out_channels:
        channels = f"{unet.in_channels} input channels for {unet.out_channels} of output"
        raise CheckpointError(f"the UNet has {channels}: it predicts more than the noise, which is not supported")
    pooled = texts[-1].projection_dim if unet.size_ids else 0
    for quantity, part, value, unets in (
        ("text width", "text encoders", sum(text.hidden_size for text in texts), unet.cross_attention_dim),
        ("pooled text width", "last text encoder", pooled, unet.pooled_dim),
        ("latent channels", "VAE", vae.latent_channels, unet.out_channels),
    ):
        if value != unets:
            sides = f"{value} in the {part}, {unets} in the UNet"
            raise CheckpointError(f"{quantity}: {sides}: parts of different models are mixed")


def check_fit(name: str, net: ControlNetConfig, unet: UNetConfig, vae_factor: int) -> None:
    """CheckpointError, naming both values, for a ControlNet made for another model than this one."""
    for quantity, value, other, others in (
        ("latent channels", net.in_channels, "UNet", unet.out_channels),
        ("level widths", net.block_out_channels, "UNet", unet.block_out_channels),
        ("layers per level", net.layers_per_block, "UNet", unet.layers_per_block),
        ("text width", net.cross_attention_dim, "UNet", unet.cross_attention_dim),
        ("pooled text width", net.pooled_dim, "UNet", unet.pooled_dim),
        ("image pixels per latent pixel", net.image_factor, "VAE", vae_factor),
    ):
        if value != others:
            sides = f"{value} in the ControlNet, {others} in the {other}"
            raise CheckpointError(f"controlnet {name!r}: {quantity}: {sides}: it was made for another model")
