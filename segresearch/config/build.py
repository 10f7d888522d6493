"""From settings to the objects that run: the model and its guidance. Torch is imported when one is made."""

import ctypes
import dataclasses
import functools
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from segresearch.config.schema import GuidanceConfig, ModelConfig, PerturbationConfig, RunConfig
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError
from segresearch.models.compute import PLAIN, Compute

if TYPE_CHECKING:
    from segresearch.models import SDXL

Run = TypeVar("Run", bound=RunConfig)
EVERYWHERE = (0.0, float("inf"))


def device_kind(device: str) -> str:
    """"cuda", "cpu", ... that `device` is here: "auto" is the first GPU if there is one, else the CPU.

    Torch, which takes a second to import, is asked only where a driver is installed or torch is built for ROCm.
    """
    if device != "auto":
        return device.partition(":")[0]
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        if "rocm" not in version("torch"):
            return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved(config: Run, model: "SDXL | None" = None) -> Run:
    """`config` with a number for batch_size="auto", which is the model's own for the kind of its device.

    A `model` that is loaded already decides `compute`, and the device where that is "auto".
    """
    if model is not None:
        device = str(model.device) if config.device == "auto" else config.device
        config = dataclasses.replace(config, device=device, compute=model.compute)
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
        raise ConfigError(f"device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def load_model(
    config: ModelConfig, device: str = "auto", controlnets: Sequence[str] = (), compute: Compute = PLAIN
) -> "SDXL":
    """The model on `device` ("auto": see `device_kind`), with `controlnets`. ValueError: see `load_sdxl`."""
    import torch

    from segresearch.models import load_sdxl

    vae_dtype = config.vae_dtype and getattr(torch, config.vae_dtype)
    return load_sdxl(
        config.path, getattr(torch, config.dtype), usable_device(device), list(controlnets), variant=config.variant,
        config=config.config, tokenizer=config.tokenizer, vae_dtype=vae_dtype, compute=compute,
    )  # fmt: skip


def build_guidance(config: GuidanceConfig, denoiser: Any, post: Sequence[Callable[..., Any]] = ()) -> Any:
    """`config` around `denoiser`: a GuidedDenoiser, in a SelfAttentionGuidance if it has `sag`; `post` comes last.

    ValueError (ConfigError among them) for what the types cannot see: no such site or head, no such function.
    """
    from segresearch.guidance import GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed

    terms = {}
    for name, term in config.terms.items():
        interval = term.interval or EVERYWHERE
        if term.kind == "cfg":
            terms[name] = cfg(term.weight, interval=interval)
            continue
        several = term.perturbation if isinstance(term.perturbation, tuple) else (term.perturbation,)
        built = [build_perturbation(p, f"guidance.terms.{name}.perturbation") for p in several]
        terms[name] = perturbed(name, built, term.scale, base=term.base, interval=interval)
    apg = [config.apg] if config.apg else []
    model = GuidedDenoiser(denoiser, terms, rescale=config.rescale, post=[*apg, *post])
    if (sag := config.sag) is None:
        return model
    interval = sag.interval or EVERYWHERE
    return SelfAttentionGuidance(model, sag.scale, sag.blur_sigma, sag.threshold, base=sag.base, interval=interval)


def build_perturbation(config: PerturbationConfig, at: str = "perturbation") -> Callable[..., Any]:
    """SEG and PAG as they are; of a CustomConfig the function or class behind `target`, with its place."""
    from segresearch.guidance import At

    if config.kind != "custom":
        return config
    function = imported(config.target, at)
    try:
        if isinstance(function, type):
            function = function(**config.options)
        else:
            function = functools.partial(function, **config.options) if config.options else function
            inspect.signature(function).bind(*"qkvsa")  # q, k, v, site, attend
    except TypeError as error:
        raise ConfigError(f"{at}: {config.target} cannot be called as (q, k, v, site, attend): {error}") from error
    return At(function, where=config.where, heads=config.heads)


def imported(target: str, at: str) -> Callable[..., Any]:
    """The function or class called `target`, package.module.name."""
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        hint = "write package.module.function"
        raise ConfigError(f"{at}.target: {target!r} cannot be imported ({error}); {hint}") from error
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"{at}.target: {module_name} has no {name!r}{nearest(name, names)}")
    if not callable(function):
        raise ConfigError(f"{at}.target: {target} is not a function or a class but {type(function).__name__}")
    return function


def refuse_foreign(target: str, at: str) -> None:
    """ConfigError for a `target` of Python or of an installed package, no matter which module it is imported through.

    For settings of unknown origin: they may name functions of segresearch, or of files of the user's own.
    """
    home = str(getattr(imported(target, at), "__module__", None) or target.rpartition(".")[0])
    file = getattr(sys.modules.get(home), "__file__", None)  # None of what is built into Python
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    foreign = file is None or any(Path(file).resolve().is_relative_to(folder) for folder in installed)
    if foreign and home.partition(".")[0] != "segresearch":
        hint = "write a function in one that calls it"
        raise ConfigError(f"{at}.target: {target} is not a part of segresearch or a file of your own; {hint}")
