"""from_diffusers: a pipeline of diffusers in memory as a StableDiffusion, whose parameters are the pipeline's own.

diffusers itself is not imported: whoever has a pipeline has it. What a pipeline may carry beside its weights and this
code would lose (LoRA adapters, attention processors, hooks, ...) is refused by name.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segresearch.checkpoints.controlnets import built, read_config
from segresearch.checkpoints.folder import build_networks, building, has_sizes
from segresearch.checkpoints.load import DTYPES, check_fit, number_positions, refuse_mixture
from segresearch.checkpoints.parts import text_entries, vae_key
from segresearch.checkpoints.tensors import Entry, Weights, listed
from segresearch.errors import CheckpointError, InputError
from segresearch.models.compute import PLAIN, Compute
from segresearch.models.controlnet import ControlNet
from segresearch.models.denoiser import scheduled
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text import TextEncoders, check_tokens

PARTS = {  # of a pipeline, with the classes that they may have
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers")  # whose modules compute what their names say
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor",
              "FusedAttnProcessor2_0")  # fmt: skip
FUSE = "fuse it with pipe.fuse_lora(), then pipe.unload_lora_weights()"
HINTS = {"peft": f"a LoRA adapter that is not fused: {FUSE}", "bitsandbytes": "quantised: load it in fp16 or fp32"}


def from_diffusers(pipe: Any, compute: Compute = PLAIN) -> StableDiffusion:
    """A StableDiffusionXLPipeline or StableDiffusionPipeline (or its image-to-image, inpainting, ControlNet or PAG
    sibling) as a StableDiffusion. No weight is copied: a change of the pipeline's weights in place is one of both.

    Device and dtypes are the pipeline's. Its scheduler's config, whether an empty negative prompt means zeros, and its
    ControlNets come along, these as "controlnet", or "controlnet_0", "controlnet_1", ... of several. One exception: a
    VAE in float16 that overflows there (config force_upcast) is copied in float32, as diffusers casts it at each call.

    InputError, of one line, for what is no such pipeline and for what cannot be carried: LoRA adapters that are not
    fused, IP-Adapters, attention processors of another kind, quantised layers, hooks (offloading), FreeU, T2I-Adapters.
    """
    if not any(kind.__name__ == "DiffusionPipeline" for kind in type(pipe).__mro__):
        raise InputError(f"from_diffusers takes a pipeline of diffusers in memory, got {type(pipe).__name__}")
    name = f"{type(pipe).__name__} in memory"
    present = [part for part in PARTS if getattr(pipe, part, None) is not None]
    modules = {part: plain_module(pipe, part, PARTS[part]) for part in present}
    if missing := [part for part in ("unet", "vae") if part not in modules] or ["text_encoder"] * (len(modules) < 3):
        raise InputError(f"from_diffusers: the {type(pipe).__name__} has no {missing[0]}: load it whole")
    if getattr(pipe, "adapter", None) is not None:
        raise InputError("pipe.adapter: a T2I-Adapter is not supported: use a pipeline without it")
    device, configs = one_device(modules), [config_of(module) for module in modules.values()]
    sized = has_sizes(configs[0])
    if sized and len(configs) == 3:
        configs[0]["size_ids"] = 5  # the refiner's aesthetic score in place of a size
    networks = build_networks(configs, name)
    for network, (part, module) in zip(networks, modules.items(), strict=True):
        weights = module.state_dict()
        if part == "vae":
            weights = {vae_key(key): weight for key, weight in weights.items()}
            if module.dtype == torch.float16 and configs[1].get("force_upcast", True):
                weights = {key: weight.float() for key, weight in weights.items()}
        share(network, text_entries(network, weights) if part.startswith("text") else weights, f"pipe.{part}")
    unet, vae, *encoders = networks
    for encoder in encoders:
        number_positions(encoder, device)
    if getattr(modules["vae"], "use_tiling", False):
        warnings.warn("pipe.vae tiles its images; here compute=Compute(vae_tile=...) does", stacklevel=2)
    tokenizers = tuple(getattr(pipe, part.replace("text_encoder", "tokenizer")) for part in list(modules)[2:])
    for tokenizer in tokenizers:
        added = tokenizer.get_added_vocab()
        if several := [token for token in added if f"{token}_1" in added]:
            raise InputError(f"pipe: the textual inversion {several[0]!r} has several vectors: give it to load_model")
    controlnets = {key: shared_controlnet(pipe, key, net) for key, net in nets_of(pipe).items()}
    refuse_mixture(unet.config, vae.config, [encoder.config for encoder in encoders])
    for key, net in controlnets.items():
        check_fit(key, net.config, unet.config, vae.config.factor)
    try:
        denoiser = scheduled(unet, config_of(pipe.scheduler), compute, device)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"pipe.scheduler: {error}") from error
    zero_negative = sized and bool(pipe.config.get("force_zeros_for_empty_prompt", True))
    text = TextEncoders(tokenizers, tuple(encoders))  # type: ignore[arg-type]
    check_tokens(text)
    return StableDiffusion(unet, vae, text, denoiser, name, zero_negative, controlnets, compute)


def config_of(part: Any) -> dict[str, Any]:
    """The config of a part of diffusers or of transformers, with its class."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return {**config, "_class_name": type(part).__name__}


def plain_module(pipe: Any, part: str, kind: str) -> nn.Module:
    """The module of this part. InputError unless it is of this class and computes what its class does."""
    module = getattr(pipe, part)
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if type(module).__name__ != kind:
        raise InputError(f"pipe.{part} is a {type(module).__name__}, not a {kind}: it is not supported")
    refuse_changed(module, f"pipe.{part}")
    return module


def foreign(hook: Any) -> bool:
    """Whether a hook is not one of those with which transformers takes note of hidden states."""
    return not str(getattr(hook, "__module__", None)).startswith("transformers.")


def refuse_changed(module: nn.Module, name: str) -> None:
    """InputError, with place and content, for anything by which a module computes more than its class says."""
    for path, layer in module.named_modules():
        at, kind = f"{name}.{path}".rstrip("."), type(layer).__name__
        package = type(layer).__module__.partition(".")[0]
        processor = type(getattr(layer, "processor", None)).__name__
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        hook = "offloading or another hook: call pipe.remove_all_hooks(), or load it without"
        for fault, holds in {
            f"is a {kind} of {package}, {HINTS.get(package, 'which is not supported')}": package not in PACKAGES,
            f"has an IP-Adapter ({processor}): call pipe.unload_ip_adapter(), and give it here": "IPAdapt" in processor,
            f"has the attention processor {processor}, which cannot be carried: call "
            "unet.set_default_attn_processor()": processor not in (*PROCESSORS, "NoneType"),
            f"has {hook}": "forward" in vars(layer) or any(map(foreign, hooks)),
            "has FreeU, which is not supported: call pipe.disable_freeu()": getattr(layer, "b1", None) is not None,
        }.items():
            if holds:
                raise InputError(f"{at} {fault}")
    for path, weight in module.named_parameters():
        if weight.is_meta:
            raise InputError(f"{name}.{path} is on the meta device: it was offloaded, load the pipeline without that")
        if type(weight).__module__.partition(".")[0] != "torch" or weight.dtype not in DTYPES:
            kind = f"{type(weight).__name__} of {weight.dtype}"
            raise InputError(f"{name}.{path} is a {kind}: quantised weights are not supported, load it in fp16 or fp32")


def one_device(modules: Mapping[str, nn.Module]) -> torch.device:
    """Where all parameters lie. InputError where they lie on several devices."""
    places = {part: {str(weight.device) for weight in module.parameters()} for part, module in modules.items()}
    if len(devices := set().union(*places.values())) > 1:
        raise InputError(f"from_diffusers: the pipeline lies on {', '.join(sorted(devices))}: call pipe.to(...) first")
    return torch.device(devices.pop())


def share(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Give a network that lies on the meta device these parameters themselves, frozen. CheckpointError for others."""
    keys = network.state_dict()
    double = re.compile(r"\.to_(qkv|kv)\.|position_ids$")  # beside to_q, to_k, to_v; numbers
    weights = {key: weight for key, weight in weights.items() if key in keys or not double.search(key)}
    faults = (listed(keys - weights.keys(), "missing key"), listed(weights.keys() - keys, "unexpected key"))
    if fault := " and ".join(filter(None, faults)):
        raise CheckpointError(f"{name}: {fault}: its config and its weights are of different models")
    for key, weight in weights.items():
        if weight.shape != keys[key].shape:
            shapes = f"{key} has shape {tuple(weight.shape)}, expected {tuple(keys[key].shape)}"
            raise CheckpointError(f"{name}: {shapes}: its config and its weights are of different models")
    network.load_state_dict(dict(weights), strict=True, assign=True)
    network.eval().requires_grad_(False)


def nets_of(pipe: Any) -> dict[str, Any]:
    """The ControlNets of a pipeline, by the names that they get here."""
    net = getattr(pipe, "controlnet", None)
    if net is None:
        return {}
    several = getattr(net, "nets", None)
    return {"controlnet": net} if several is None else {f"controlnet_{i}": one for i, one in enumerate(several)}


def shared_controlnet(pipe: Any, name: str, net: Any) -> ControlNet:
    """One of them, with its own parameters."""
    net = getattr(net, "_orig_mod", net)
    refuse_changed(net, f"pipe.{name}")
    config, weights = config_of(net), net.state_dict()
    stored = {key: Entry(Path(f"pipe.{name}"), key, str(w.dtype), tuple(w.shape)) for key, w in weights.items()}
    with building(f"pipe.{name}"):
        own = built(read_config(config), Weights(name, stored))
    share(own, weights, f"pipe.{name}")
    return own
