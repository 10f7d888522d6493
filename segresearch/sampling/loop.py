"""`sample()`: from unit noise to latents with any k-diffusion sampler, its traps wrapped, and those of LCM and TCD.

Deviations from calling k-diffusion directly, each for a reason:
- Noise drawn at steps is keyed per image; k-diffusion draws one global stream for the whole batch.
- euler, heun and dpm_2 draw (and throw away) global noise at every step: the global generators are set back
  afterwards. With churn (`s_churn` above 0) that noise is used, drawn on the model's device: images run one at a time,
  each from its own key.
- dpm_adaptive chooses one step size for the whole batch: images run one at a time.
- dpm_fast and dpm_adaptive stop at the lowest sigma with its noise left in; here one denoised evaluation ends them, as
  in all the others, so that `steps` evaluations make a dpm_fast image too.
- dpmpp_2m_sde and dpmpp_3m_sde fail on a single step (they keep a step size that they never computed). One step to zero
  is the denoised image whatever the sampler, so a single step of these, or of the two above, runs as euler.
"""

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from segresearch.errors import InputError, NotFinite
from segresearch.sampling import schedules
from segresearch.sampling.consistency import sample_lcm, sample_tcd
from segresearch.sampling.kdiffusion import k_diffusion
from segresearch.sampling.memory import Run
from segresearch.sampling.noise import brownian_noise, image_key, noise_keys, white_noise
from segresearch.sampling.schedules import checked_sigmas, choose, start_scale
from segresearch.sampling.start import ImageStart

ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
END_TO_END = ("dpm_fast", "dpm_adaptive")  # take the two ends of a schedule, not its sigmas
CONSISTENCY: dict[str, Callable[..., Tensor]] = {"lcm": sample_lcm, "tcd": sample_tcd}  # ours, of distilled models
SAMPLERS = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", *ANCESTRAL, *SDE, *END_TO_END, *CONSISTENCY)

OURS = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable", "noise_sampler"}
OURS |= {"return_info", "table"}
SIGNED, POSITIVE = ("pcoeff", "icoeff", "dcoeff"), ("r", "h_init", "accept_safety")  # options that are numbers
LARGEST = 1e6  # of an option
ADAPTIVE_LIMIT = 10_000  # evaluations for one image; a model that returns NaN would otherwise never end

Callback = Callable[[dict[str, Any]], None]


def sample(
    model: Any,
    noise: Float[Tensor, "images *latent"],
    sampler: str = "euler",
    schedule: str | Float[Tensor, " sigmas"] | Sequence[float] = "auto",
    steps: int = 25,
    conds: Any = None,
    seeds: Sequence[int] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    options: Mapping[str, Any] | None = None,
    start: ImageStart | None = None,
    **extra: Any,
) -> Float[Tensor, "images *latent"]:
    """Latents x0 from unit Gaussian `noise` (images, channels, height, width).

    The result is fp32 (fp64 where the noise is) and lies on the model's device, where the noise is moved.

    model: k-diffusion's contract, model(x, sigma, **extra) -> denoised, with `.sigmas`, `.sigma_min`, `.sigma_max`,
        `.steps_offset`. `conds`, unless None, and everything in `extra` are handed to each call by name, after
        `model.prepare(arguments, run)`, if there is one, has seen them and the `Run` that these evaluations are.
    sampler, schedule, steps: names in SAMPLERS and SCHEDULES, `auto` is the model's own; `schedule` may be the sigmas
        themselves (strictly falling to 0, noise starts at sigmas[0]), and `steps` is then not read. dpm_fast spends
        `steps` evaluations between the schedule's ends; dpm_adaptive as many as its tolerance needs.
    seeds: one per image, keys of the noise drawn at steps (never equal to the initial noise of that seed). None: each
        image is keyed by its own initial noise. Either way image i does not depend on the batch.
    callback: is given k-diffusion's dict {x, i, sigma, sigma_hat, denoised, ...} at every step, and `rows`, the slice
        of the batch that x covers (one image where images run one at a time).
    progress: a bar with the images per second, silent where the output is not a terminal.
    options: the sampler's own parameters, as k-diffusion names them (eta, s_noise, s_churn, order, rtol, ...).
    start: an image to start from, in the last part of the schedule, and a mask of what is made anew (`ImageStart`).
        Steps, intervals and schedules of scales then count the steps that are left.

    What `conds` and `extra` hold for each image (tensors or objects with `rows`, in mappings, sequences or dataclasses)
    is cut to one image where images run one at a time. The global random state is not touched.

    InputError: unknown sampler, schedule or option, steps below 1, noise that is not 4-d, floating and finite, a count
    of seeds or of rows in `conds` that is not the count of images, or dpm_adaptive that does not end. NotFinite: values
    of the model in dpm_adaptive that are not finite.
    """
    choose(sampler, SAMPLERS, "sampler")
    if isinstance(schedule, str):
        sigmas, schedule = schedules.sigmas(model, schedule, steps), schedules.named(model, schedule)
    else:
        sigmas, schedule = checked_sigmas(torch.as_tensor(schedule), "schedule"), "as given"
    options = checked_options(sampler, options or {})
    if sampler == "tcd":
        if getattr(model, "timesteps", 1) is None:
            raise InputError("sampler tcd steps in timesteps, and an EDM model has none: take euler or dpmpp_2m")
        options["table"] = model.sigmas
    if start is not None:
        sigmas = start.left(sigmas)
    if len(sigmas) == 2 and sampler in (*SDE, *END_TO_END):
        sampler, options = "euler", {}
    check_noise(noise)
    checked_rows("conds", conds, len(noise))
    warn_of_size(conds if isinstance(conds, Mapping) else extra, noise)
    if start is not None:
        start.check(noise)

    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    device = model.sigmas.device
    unit = noise.to(device, dtype)
    x = unit * start_scale(sigmas, schedule) if start is None else start.noised(unit, sigmas, schedule)
    values = tuple(sigmas.to(dtype).tolist())
    sigmas = sigmas.to(device, dtype)
    keys = noise_keys(noise, seeds, "steps")
    arguments = extra if conds is None else {"conds": conds, **extra}
    churn = options.get("s_churn", 0) > 0
    separate = len(x) > 1 and (churn or sampler == "dpm_adaptive")
    groups = [slice(i, i + 1) for i in range(len(x))] if separate else [slice(0, len(x))]

    devices = [device] if device.type == "cuda" else []
    bar = tqdm(
        total=len(x), desc=sampler, unit="image", leave=False, disable=None if progress else True,  # None: by terminal
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}",
    )  # fmt: skip
    with torch.no_grad(), torch.random.fork_rng(devices), bar:
        if hasattr(model, "prepare"):  # work that is the same at every step, done once
            own_sigmas = churn or sampler in END_TO_END
            run = Run(torch.tensor(keys, device=device), sampler, None if own_sigmas else values)
            arguments = model.prepare(arguments, run)
        parts = []
        for rows in groups:
            if churn:
                global_generator(device).manual_seed(image_key(keys[rows.start], "churn"))
            own = one_row(arguments, rows.start, len(x)) if separate else arguments
            report = reporter(callback, bar, sigmas, rows)
            image = one_row(start, rows.start, len(x)) if separate else start
            called = model if image is None else image.around(model, unit[rows], values[0])
            part = integrate(called, x[rows], sampler, sigmas, keys[rows], options, own, report)
            parts.append(part if image is None else image.kept(part))
        return torch.cat(parts)


def integrate(
    model: Any,
    x: Float[Tensor, "images *latent"],
    sampler: str,
    sigmas: Float[Tensor, " sigmas"],
    keys: Sequence[int],
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
    report: Callback | None,
) -> Float[Tensor, "images *latent"]:
    """One call of a k-diffusion sampler on rows that may share it, from sigmas[0] to 0."""
    function = sampler_function(sampler)
    options = dict(options, extra_args=dict(arguments), callback=report, disable=True)
    if sampler in SDE:
        options["noise_sampler"] = brownian_noise(x, keys, sigmas)
    elif "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = white_noise(x, keys)
    if sampler not in END_TO_END:
        return function(model, x, sigmas, **options)

    high, low = float(sigmas[0]), float(sigmas[-2])
    if sampler == "dpm_fast":
        x = function(model, x, low, high, len(sigmas) - 2, **options)
    else:
        x = function(limited(model), x, low, high, **options)
    last = sigmas[-2:]
    return k_diffusion().sampling.sample_euler(model, x, last, extra_args=arguments, callback=report, disable=True)


def sampler_function(name: str) -> Callable[..., Tensor]:
    """The function of a sampler, (model, x, sigmas, ...) -> x0."""
    return CONSISTENCY.get(name) or getattr(k_diffusion().sampling, f"sample_{name}")


def limited(model: Any) -> Callable[..., Tensor]:
    """`model` for dpm_adaptive, which would never end after a value that is not finite: an error there, or too late."""
    calls = 0

    def call(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        denoised = model(x, sigma, **arguments)
        at = f"at sigma {float(sigma[0]):g}"
        if not denoised.isfinite().all():
            raise NotFinite(f"dpm_adaptive: the model returned a value that is not finite {at}")
        if calls > ADAPTIVE_LIMIT:
            raise InputError(f"dpm_adaptive: no end after {ADAPTIVE_LIMIT} evaluations, {at}; raise rtol or atol")
        return denoised

    return call


def row_count(value: Any) -> int | None:
    """Rows of a tensor with axes or of an object that says so (`rows`); None for anything else."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    rows = getattr(value, "rows", None)
    return rows if isinstance(rows, int) else None


def checked_rows(name: str, value: Any, images: int) -> None:
    """ValueError, with its position in `value`, where something in it has rows that are neither one nor `images`."""
    rows = row_count(value)
    if rows is not None and rows not in (1, images):
        raise InputError(f"{name} has {rows} rows for {images} images of noise; give one row per image, or one for all")
    if rows is None and isinstance(value, Mapping):
        for key, item in value.items():
            checked_rows(f"{name}[{key!r}]", item, images)


def warn_of_size(conds: Mapping[str, Any], noise: Tensor) -> None:
    """A warning where a conditioning tells the model of images of another size than those of the noise."""
    sizes: set[Any] = {getattr(cond, "latent", None) for cond in conds.values()} - {None}
    if other := sorted(sizes - {tuple(noise.shape[2:])}):
        given, expected = (" × ".join(map(str, size)) for size in (noise.shape[2:], other[0]))
        text = f"the noise is of {given} latents, the conditioning tells the model of an image of {expected}"
        hint = "take initial_noise(seeds, sd.latent_shape(size)) and sd.encode(prompts, size=size) of one size"
        warnings.warn(f"{text}; {hint}", stacklevel=3)


def one_row(value: Any, index: int, images: int) -> Any:
    """`value` for image `index` alone: everything in it that has a row per image is cut to that row.

    Descends into mappings, lists, tuples and dataclasses; what has another count of rows, or none, stays as it is.
    """
    if isinstance(value, nn.Module):
        return value
    rows = row_count(value)
    if rows is not None:
        return value[index : index + 1] if rows == images else value
    if isinstance(value, Mapping):
        mapping = {key: one_row(item, index, images) for key, item in value.items()}
        return value.with_rows(mapping) if hasattr(value, "with_rows") else mapping
    if isinstance(value, tuple | list):
        items = [one_row(item, index, images) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.init)
        return dataclasses.replace(value, **{name: one_row(getattr(value, name), index, images) for name in fields})
    return value


def checked_options(sampler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of the types of the sampler's own parameters, numbers as floats. InputError for one that it does not
    take, and for a value with which it makes no step."""
    parameters = inspect.signature(sampler_function(sampler)).parameters
    usual = {name: parameter.default for name, parameter in parameters.items() if name not in OURS}
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in usual:
            raise InputError(f"sampler {sampler} has no option {name!r}; it takes {', '.join(usual) or 'none'}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "solver_type":
            noun, holds = "heun or midpoint", value in ("heun", "midpoint")
        elif name == "order":
            orders = (2, 3) if sampler == "dpm_adaptive" else tuple(range(1, 11))
            noun, holds = f"one of {orders}", type(value) is int and value in orders
        elif name in SIGNED:
            noun, holds = f"from -{LARGEST:g} to {LARGEST:g}", is_number and abs(value) <= LARGEST
        else:
            noun = f"{'above' if name in POSITIVE else 'from'} 0, at most {LARGEST:g}"
            holds = is_number and 0 <= value <= (math.inf if name == "s_tmax" else LARGEST)
            holds = holds and (value > 0 or name not in POSITIVE)
        if not holds:
            raise InputError(f"sampler {sampler}: option {name}={value!r} makes no step; it must be {noun}")
        checked[name] = float(value) if isinstance(usual[name], float) else value
    return checked


def check_noise(noise: Tensor) -> None:
    """ValueError unless `noise` is (images, channels, height, width), floating and finite, with at least one image."""
    if noise.ndim != 4 or not len(noise):
        raise InputError(f"noise must be (images, channels, height, width), got shape {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise InputError(f"noise must be floating point, got {noise.dtype}")
    if not noise.isfinite().all():
        raise InputError("noise holds values that are not finite")


def global_generator(device: torch.device) -> torch.Generator:
    """The generator that torch.randn_like draws from on `device`."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def reporter(callback: Callback | None, bar: Any, sigmas: Float[Tensor, " sigmas"], rows: slice) -> Callback | None:
    """The callback of k-diffusion: the caller's, with `rows` and a running `i`, and the bar, in parts of an image: the
    part of the sigmas that are passed. None where neither is wanted."""
    if callback is None and bar.disable:
        return None
    count = itertools.count()

    def report(info: dict[str, Any]) -> None:
        if callback is not None:
            callback({**info, "i": next(count), "rows": rows})
        if not bar.disable:
            passed = int((sigmas[:-1] >= float(info["sigma"]) * (1 - 1e-6)).sum()) / (len(sigmas) - 1)
            bar.update(max(0.0, rows.start + passed * (rows.stop - rows.start) - bar.n))

    return report
