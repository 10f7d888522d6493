"""From settings to the objects that run: the model and its guidance. Torch is imported when one is made."""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from segresearch.checkpoints.additions import identified_additions
from segresearch.checkpoints.own_schedule import schedule_of
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config.inputs import IPAdapterConfig
from segresearch.config.method import CustomConfig, GuidanceConfig, PerturbationConfig
from segresearch.config.schema import ModelConfig, RunConfig
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError, InputError
from segresearch.models.compute import PLAIN, Compute

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

Run = TypeVar("Run", bound=RunConfig)
EVERYWHERE = (0.0, float("inf"))


def device_kind(device: str) -> str:
    """"cuda", "cpu", ... that `device` is here: "auto" is the first GPU if there is one, else the CPU."""
    if device != "auto":
        return device.partition(":")[0]
    try:  # torch takes a second to import, so a driver is looked for first
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        if "rocm" not in version("torch"):
            return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved(config: Run, model: "StableDiffusion | None" = None) -> Run:
    """`config` with the model's own schedule by its name where that is "auto", its own number for batch_size="auto",
    for the kind of its device, and the fingerprints of its LoRAs and embeddings. A `model` that is loaded already
    decides `compute`, and the device where that is "auto"."""
    if added := identified_additions(config.model):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **added))  # type: ignore[arg-type]
    if model is not None:
        device = str(model.device) if config.device == "auto" else config.device
        config = dataclasses.replace(config, device=device, compute=model.compute)
    if config.schedule.name == "auto" and config.schedule.rho is None:
        folder = None if config.model.config is None else Path(config.model.config)
        loaded = getattr(getattr(model, "denoiser", None), "schedule", None)
        name = loaded.name if loaded else schedule_of(resolve_model(config.model.path), folder, config.model.unet)
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, name=name))
    if config.batch_size == "auto":
        gpu = config.model.batch_size_cuda if device_kind(config.device) == "cuda" else None
        config = dataclasses.replace(config, batch_size=gpu or config.model.batch_size)
    return config


def usable_device(device: str) -> Any:
    """The torch.device that `device` is here, "auto" by `device_kind`. ConfigError where torch cannot use it."""
    import torch

    try:
        chosen = torch.device(device_kind(device) if device == "auto" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # all devices that torch has a name for
            reason = "give auto, cpu, cuda, cuda:1 or mps"
        raise ConfigError(f"device: {device[:40]!r} cannot be used here: {reason}") from error
    return chosen


def configured_model(
    config: ModelConfig, device: str = "auto", controlnets: Sequence[str] = (), compute: Compute = PLAIN
) -> "StableDiffusion":
    """The model on `device` ("auto": see `device_kind`), with `controlnets`. ValueError: see `load_model`."""
    import torch

    from segresearch.models import load_model

    vae_dtype = config.vae_dtype and getattr(torch, config.vae_dtype)
    return load_model(
        config.path, getattr(torch, config.dtype), usable_device(device), list(controlnets), variant=config.variant,
        config=config.config, tokenizer=config.tokenizer, vae_dtype=vae_dtype, prediction=config.prediction,
        compute=compute, loras=config.loras, embeddings=config.embeddings,
    )  # fmt: skip


def build_guidance(config: GuidanceConfig, model: Any, post: Sequence[Callable[..., Any]] = ()) -> Any:
    """`config` around the denoiser of `model`, or around a plain denoiser where there are no further networks:
    a GuidedDenoiser, in a SelfAttentionGuidance or a ZSampling if it has these; `post` comes last.
    InputError for what the types cannot see: no such site or head, no such function."""
    from segresearch.guidance import Branch, GuidedDenoiser, SelfAttentionGuidance, Term, cfg, perturbed
    from segresearch.guidance.methods.zigzag import ZSampling

    terms: dict[str, Any] = {}
    every: dict[str, tuple[Any, ...]] = {}
    for name, term in config.terms.items():
        at, interval = f"guidance.terms.{name}", term.interval or EVERYWHERE
        shape = build_custom(term.shape, f"{at}.shape", "pos, neg, step")
        with naming(at):
            if term.kind == "cfg":
                terms[name] = cfg(term.weight, interval, term.pos, term.neg, shape)
            elif term.kind == "difference":
                terms[name] = Term(Branch(term.pos), Branch(term.neg), term.scale, interval, shape)
            else:
                several = term.perturbation if isinstance(term.perturbation, tuple) else (term.perturbation,)
                built = [build_perturbation(p, f"{at}.perturbation") for p in several]
                terms[name] = perturbed(name, built, term.scale, base=term.base, interval=interval, shape=shape)
    for name, entry in config.every.items():
        own = build_perturbation(entry.perturbation, f"guidance.every.{name}.perturbation")
        every[entry.conditioning] = (*every.get(entry.conditioning, ()), own)
    if config.ip_adapter is not None:
        for name, prompt in build_image_prompts(config.ip_adapter, model).items():
            every[name] = (*prompt, *every.get(name, ()))
    makers = {
        name: build_custom(maker, f"guidance.conditionings.{name}", "conds, sigma, keys")
        for name, maker in config.conditionings.items()
    }
    own_post = [build_custom(p, f"guidance.post.{name}", "guided, step") for name, p in config.post.items()]
    guided = GuidedDenoiser(
        getattr(model, "denoiser", model), terms, config.base, config.rescale,
        [*filter(None, [config.apg]), *own_post, *post],
        every=every, conditionings=makers, networks=build_networks(config, model),
    )  # fmt: skip
    if config.zigzag is not None:
        return ZSampling(guided, config.zigzag.base, config.zigzag.interval or EVERYWHERE)
    if (sag := config.sag) is None:
        return guided
    interval = sag.interval or EVERYWHERE
    return SelfAttentionGuidance(guided, sag.scale, sag.blur_sigma, sag.threshold, base=sag.base, interval=interval)


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """An InputError within its block becomes a ConfigError that begins with the key."""
    try:
        yield
    except InputError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{key}: {error}") from error


def build_networks(config: GuidanceConfig, sd: Any) -> dict[str, Any]:
    """The further networks of a method as denoisers, in the dtype of the model and on its device."""
    if not config.networks:
        return {}
    from segresearch.checkpoints.load import load_network

    weight = sd.unet.conv_in.weight
    return {
        name: load_network(network.path, sd.name, weight.dtype, weight.device, sd.denoiser, network.loras)
        for name, network in config.networks.items()
    }


def build_image_prompts(config: IPAdapterConfig, sd: Any) -> dict[str, Any]:
    """The image of an IP-Adapter as perturbations of the conditionings that it goes with."""
    from segresearch.checkpoints.ip_adapter_file import load_ip_adapter
    from segresearch.image_files import open_image

    with naming("guidance.ip_adapter"):
        prompter = load_ip_adapter(config.path, config.image_encoder, sd.unet)
        return prompter.every([open_image(config.image)], config.scale, config.where)


def build_perturbation(config: PerturbationConfig, at: str = "perturbation") -> Any:
    """A perturbation as it is; of a CustomConfig the function or class behind `target`, with its place."""
    from segresearch.guidance import At

    if config.kind != "custom":
        return config
    attention = config.site_kind in ("self", "cross")
    function = build_custom(config, at, "q, k, v, site, attend" if attention else "h, site, call")
    return At(function, where=config.where, heads=config.heads, site_kind=config.site_kind)


def build_custom(config: Any, at: str, signature: str) -> Any:
    """A method as it is; of a CustomConfig the function or class behind `target`, which must take these arguments."""
    if not isinstance(config, CustomConfig):
        return config
    function = imported(config.target, at)
    try:
        if isinstance(function, type):
            return function(**config.options)
        function = functools.partial(function, **config.options) if config.options else function
        inspect.signature(function).bind(*signature.split(", "))
    except (TypeError, ValueError) as error:  # of a partial with an option that the function lacks: a ValueError
        reason = f"its options are {', '.join(config.options)}" if isinstance(error, ValueError) else error
        raise ConfigError(f"{at}: {config.target} cannot be called as ({signature}): {reason}") from error
    return function


def imported(target: str, at: str) -> Callable[..., Any]:
    """The function or class called `target`, package.module.name."""
    module_name, _, name = target.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a file of the user's own, last: it hides no package
    if not all(target.split(".")) or not module_name:
        raise ConfigError(f"{at}.target: {target!r} names no function; write package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name == error.name or module_name.startswith(f"{error.name}."):
            raise ConfigError(f"{at}.target: {target!r}: there is no module {error.name}") from error
        raise ConfigError(f"{at}.target: {target!r}: {module_name} itself imports {error.name}, not here") from error
    except ImportError as error:
        raise ConfigError(f"{at}.target: {target!r} cannot be imported ({error})") from error
    function = getattr(module, name, None)
    if function is None:
        own = [key for key, item in vars(module).items() if getattr(item, "__module__", "") == module_name]
        raise ConfigError(f"{at}.target: {module_name} has no {name!r}{nearest(name, own)}")
    if not callable(function):
        raise ConfigError(f"{at}.target: {target} is not a function or a class but {type(function).__name__}")
    return function


def refuse_foreign(target: str, at: str) -> None:
    """ConfigError for a `target` of Python or of an installed package, no matter which module it is imported through:
    settings of unknown origin may name functions of segresearch, or of files of the user's own."""
    home = str(getattr(imported(target, at), "__module__", None) or target.rpartition(".")[0])
    file = getattr(sys.modules.get(home), "__file__", None)  # None of what is built into Python
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    foreign = file is None or any(Path(file).resolve().is_relative_to(folder) for folder in installed)
    if foreign and home.partition(".")[0] != "segresearch":
        hint = "write a function in one that calls it"
        raise ConfigError(f"{at}.target: {target} is not a part of segresearch or a file of your own; {hint}")
