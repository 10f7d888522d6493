"""From typed settings to the objects that run: the model and its guidance. Torch is imported when one is made."""

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from segresearch.config import (
    CFGTerm,
    CustomConfig,
    GuidanceConfig,
    ModelConfig,
    PAGConfig,
    PerturbationConfig,
    RampConfig,
)
from segresearch.errors import ConfigError
from segresearch.models.compute import PLAIN, Compute
from segresearch.typed import nearest

if TYPE_CHECKING:
    from segresearch.models import SDXL

Sized = TypeVar("Sized", bound=Any)  # GenerateConfig, EvaluateConfig or AnalyzeConfig
EVERYWHERE = (0.0, float("inf"))


def device_kind(device: str) -> str:
    """"cuda", "cpu", ... that `device` is here: "auto" is the first GPU if there is one, else the CPU.

    Torch, which takes a second to import, is asked only where a driver is installed or torch is built for ROCm.
    """
    if device != "auto":
        return device.partition(":")[0]
    names = {"win32": "nvcuda.dll"}
    try:
        ctypes.CDLL(names.get(sys.platform, "libcuda.so.1"))
    except OSError:
        if "rocm" not in version("torch"):
            return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def with_batch_size(config: Sized) -> Sized:
    """`config` with its `batch_size` as a number: "auto" is the model's own for the kind of its `device`."""
    if config.batch_size != "auto":
        return config
    gpu = config.model.batch_size_cuda if device_kind(config.device) == "cuda" else None
    return dataclasses.replace(config, batch_size=gpu or config.model.batch_size)


def of_model(config: Any, model: "SDXL | None") -> Any:
    """A run's settings with the `compute` of a model that is loaded already, and its device for "auto".

    None changes nothing.
    """
    if model is None:
        return config
    device = str(model.device) if config.device == "auto" else config.device
    return dataclasses.replace(config, device=device, compute=model.compute)


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
    """The model on `device`, with `controlnets`, computing as `compute` says. "auto": see `device_kind`.

    ValueError: see `load_sdxl`.
    """
    import torch

    from segresearch.models import load_sdxl

    with_nets: dict[str, Any] = {"controlnet": list(controlnets)} if controlnets else {}
    return load_sdxl(
        config.path,
        dtype=getattr(torch, config.dtype),
        device=usable_device(device),
        variant=config.variant,
        config=config.config,
        tokenizer=config.tokenizer,
        vae_dtype=config.vae_dtype and getattr(torch, config.vae_dtype),
        compute=compute,
        **with_nets,
    )


def build_guidance(config: GuidanceConfig, denoiser: Any, post: Sequence[Callable[..., Any]] = ()) -> Any:
    """`config` around `denoiser`: a GuidedDenoiser, in a SelfAttentionGuidance if it has `sag`; `post` comes last.

    ValueError (ConfigError among them) for what the types cannot see: no such site or head, no such function.
    """
    from segresearch.guidance import GuidedDenoiser, Projected, SelfAttentionGuidance, cfg, perturbed

    terms = {}
    for name, term in config.terms.items():
        interval = term.interval or EVERYWHERE
        if isinstance(term, CFGTerm):
            terms[name] = cfg(_scale(term.weight), interval=interval)
        else:
            several = term.perturbation if isinstance(term.perturbation, tuple) else (term.perturbation,)
            made = [build_perturbation(p, f"guidance.terms.{name}.perturbation") for p in several]
            terms[name] = perturbed(name, made, _scale(term.scale), base=term.base, interval=interval)
    own = [] if config.apg is None else [Projected(config.apg.eta, config.apg.norm)]
    model = GuidedDenoiser(denoiser, terms, rescale=config.rescale, post=[*own, *post])
    sag = config.sag
    if sag is None:
        return model
    return SelfAttentionGuidance(
        model, _scale(sag.scale), sag.blur_sigma, sag.threshold, base=sag.base, interval=sag.interval or EVERYWHERE
    )


def build_perturbation(config: PerturbationConfig, at: str = "perturbation") -> Callable[..., Any]:
    """SEG, PAG, or the function or class that `target` names, with its place."""
    from segresearch.guidance import PAG, SEG, At

    if isinstance(config, PAGConfig):
        return PAG(where=config.where, heads=config.heads, tau=config.tau)
    if isinstance(config, CustomConfig):
        return At(_custom(config, at), where=config.where, heads=config.heads)
    return SEG(config.sigma, where=config.where, heads=config.heads, on=config.on, boundary=config.boundary)


def _scale(value: float | RampConfig) -> Any:
    if isinstance(value, float):
        return value
    from segresearch.guidance import Ramp

    return Ramp(value.start, value.stop, value.sigma_start, value.sigma_stop)


def _custom(config: CustomConfig, at: str) -> Callable[..., Any]:
    """The call behind `target`: a class is made with `options`, a function takes them as keywords at every call."""
    module_name, _, name = config.target.rpartition(".")
    _refuse_foreign(module_name, config.target, at)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError) as error:
        hint = "write package.module.function"
        raise ConfigError(f"{at}.target: {config.target!r} cannot be imported ({error}); {hint}") from error
    except AttributeError:
        names = [n for n, o in vars(importlib.import_module(module_name)).items() if callable(o) and n[0] != "_"]
        raise ConfigError(f"{at}.target: {module_name} has no {name!r}{nearest(name, names)}") from None
    _refuse_foreign(getattr(found, "__module__", None) or module_name, config.target, at)  # no matter who imports it
    if not callable(found):
        raise ConfigError(f"{at}.target: {config.target} is not a function or a class but {type(found).__name__}")
    try:
        if isinstance(found, type):
            return found(**config.options)
        call = functools.partial(found, **config.options) if config.options else found
        inspect.signature(call).bind(*"qkvsa")  # q, k, v, site, attend
    except TypeError as error:
        raise ConfigError(f"{at}: {config.target} cannot be called as (q, k, v, site, attend): {error}") from error
    return call


def _refuse_foreign(module_name: str, target: str, at: str) -> None:
    """ConfigError for what is part of Python or an installed package: a config names segresearch or files of one's own,
    and so nothing that was not written to be called by it."""
    top = module_name.partition(".")[0]
    if top in ("", "segresearch"):
        return
    foreign = top in sys.stdlib_module_names or top in sys.builtin_module_names
    if not foreign:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return  # importing says why
        places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
        installed = {str(Path(sysconfig.get_path(key)).resolve()) for key in ("purelib", "platlib")}
        foreign = any(str(Path(p).resolve()).startswith(f"{i}{os.sep}") for p in places if p for i in installed)
    if foreign:
        raise ConfigError(f"{at}.target: {target} is not a part of segresearch or a file of your own; write a function "
                          "in one that calls it")  # fmt: skip
