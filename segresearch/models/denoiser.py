"""The UNet as k-diffusion sees it: model(x, sigma) -> denoised."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError, shown
from segresearch.models.attention import Attend, Fork, Wrap, plain, sdpa
from segresearch.models.calls import Runner
from segresearch.models.compute import PLAIN, Compute
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ControlNet
from segresearch.models.preconditioning import Preconditioning
from segresearch.models.scheduler import (
    MOST_STEPS,
    SPACINGS,
    OwnSchedule,
    beta_numbers,
    edm_numbers,
    is_edm,
    own_schedule,
    positive,
    prediction_of,
    scheduler_class,
    steps_offset,
    whole,
)  # fmt: skip
from segresearch.models.unet import ControlResiduals, UNet
from segresearch.sampling import k_diffusion

POWERS = {"scaled_linear": 2, "linear": 1}  # beta_schedule -> p, where β^(1/p) is linear in t
COSINE = "squaredcos_cap_v2"  # arXiv 2102.09672, eq. (17); it has no start and end


def alphas_cumprod(config: Mapping[str, Any]) -> Float[Tensor, " steps"]:
    """ᾱ_t of the training schedule in float64, from a diffusers `scheduler_config.json`; missing values are SDXL's.

    With rescale_betas_zero_snr the betas are shifted as in arXiv 2305.08891, algorithm 1, so that ᾱ ends at 0. σ would
    be infinite there, so the last ᾱ is 2⁻²⁴ (σ = 4096, as in diffusers); this needs v- or x0-prediction, since eps
    says nothing at zero signal. InputError, naming key and value, for a schedule that is not supported.
    """
    start, end, schedule = beta_numbers(config)
    steps, offset = config.get("num_train_timesteps", 1000), steps_offset(config)
    if not (whole(steps) and whole(offset) and 2 <= steps <= MOST_STEPS and 0 <= offset < steps):
        numbers = f"num_train_timesteps={shown(steps)} and steps_offset={shown(offset)}"
        limits = f"2 to {MOST_STEPS} timesteps, and an offset from 0 to below that"
        raise InputError(f"scheduler config: {numbers} must be integers, {limits}")
    if not (positive(start) and positive(end) and start <= end < 1):
        given = f"beta_start={shown(start)}, beta_end={shown(end)}"
        raise InputError(f"scheduler config: {given}: numbers, 0 < start <= end < 1")
    if schedule not in (*POWERS, COSINE):
        known = ", ".join((*POWERS, COSINE))
        raise InputError(f"scheduler config: beta_schedule={shown(schedule)} is not supported, only {known}")
    if schedule == COSINE:
        cosines = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        pairs = zip(cosines[1:], cosines[:-1], strict=True)
        betas = torch.tensor([min(1 - after / before, 0.999) for after, before in pairs], dtype=torch.float64)
    else:
        power = POWERS[schedule]
        betas = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
    alphas = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise InputError(
                "scheduler config: rescale_betas_zero_snr=true makes the largest sigma infinite, where an "
                "eps-prediction says nothing: set it to false, or prediction=v_prediction if the network was trained so"
            )
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        alphas[-1] = 2.0**-24
    return alphas


def interpolated_t(table: Float[Tensor, " steps"], log_sigma: Float[Tensor, " *rows"]) -> Float[Tensor, " *rows"]:
    """Timestep of each log σ in a rising table of them, linear between its entries and clamped to its ends."""
    high = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
    low = high - 1
    return low + ((log_sigma - table[low]) / (table[high] - table[low])).clamp(0, 1)


def further_channels(net: Any, x: Float[Tensor, "rows c h w"], cond: Any) -> Float[Tensor, "rows extra h w"] | None:
    """What the network reads beside x: `cond.image`, or None for a network that reads x alone.

    A ControlNet reads the latents alone, whatever the UNet reads. InputError for a UNet that needs channels that cond
    lacks, or the reverse, and for an image of another size or number of rows than x.
    """
    image, c = getattr(cond, "image", None), cast(Any, getattr(net, "config", None))
    needed = 0 if c is None else c.in_channels - x.shape[1]
    if image is None:
        if needed > 0:
            text = f"{c.network}: takes {c.in_channels} channels, the latents are {x.shape[1]}"
            raise InputError(f"{text}: give cond.image the other {needed} (mask and image of an inpainting model)")
        return None
    if needed == 0 and c is not None and c.network != "unet":
        return None
    if image.shape[1] != needed or image.shape[2:] != x.shape[2:] or len(image) != len(x):
        expected = (len(x), needed, *x.shape[2:])
        raise InputError(f"cond.image is {tuple(image.shape)}, this model and these latents need {expected}")
    return image


class Denoiser(k_diffusion().external.DiscreteEpsDDPMDenoiser):  # type: ignore[misc]
    """A UNet under k-diffusion's contract: x is signal + sigma · unit noise, the result is the estimate of the signal.

    x, sigma and the result are fp32 (fp64 stays fp64); the network runs in its own dtype. What its input and output
    stand for is a `Preconditioning`.

    alphas_cumprod: ᾱ = 1/(1 + σ²) of the training steps, falling; of an EDM model those of its smallest and largest σ.
    steps_offset: the first timestep of the `leading` schedule (SDXL: 1). compute: how the network's calls are made
    (arithmetic, compiled, CUDA graphs). schedule: what `auto` is.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Float[Tensor, " steps"],
        prediction: str | Preconditioning = "epsilon",
        steps_offset: int = 1,
        compute: Compute = PLAIN,
        schedule: OwnSchedule | None = None,
    ):
        scalings = prediction if isinstance(prediction, Preconditioning) else Preconditioning(prediction)
        if not ((alphas_cumprod > 0) & (alphas_cumprod < 1)).all():
            raise InputError("alphas_cumprod must lie strictly between 0 and 1: at 0 sigma is infinite, at 1 it is 0")
        super().__init__(unet, alphas_cumprod.double(), quantize=False)
        self.sigmas: Tensor = self.sigmas.float()
        self.log_sigmas = self.sigmas.double().log()  # of the rounded sigmas: each gives its integer t exactly
        self.alphas = alphas_cumprod.double()
        self.preconditioning = scalings
        self.steps_offset = steps_offset
        self.schedule = schedule or OwnSchedule("leading" if scalings.sigma_data is None else "edm-karras")
        self.run = Runner(compute)

    def of_network(self, unet: nn.Module) -> "Denoiser":
        """Another network under the same noise, prediction and arithmetic."""
        own = (self.preconditioning, self.steps_offset, self.run.compute, self.schedule)
        return Denoiser(unet, self.alphas, *own)

    @property
    def prediction(self) -> str:
        return self.preconditioning.prediction

    @property
    def timesteps(self) -> int | None:
        """How many timesteps the network was trained at; None for EDM, which has none."""
        return len(self.sigmas) if self.preconditioning.sigma_data is None else None

    @property
    def unet(self) -> UNet:
        return self.inner_model

    def sigma_to_t(self, sigma: Float[Tensor, " *rows"], quantize: bool | None = None) -> Float[Tensor, " *rows"]:
        """What the network is given at each sigma: the timestep, interpolated linearly in log sigma in float64 and
        clamped to the schedule's ends; of EDM ln(σ)/4."""
        log_sigma = sigma.double().log()
        t = log_sigma / 4 if self.timesteps is None else interpolated_t(self.log_sigmas, log_sigma)
        t = t.round() if quantize else t
        return t.to(torch.promote_types(sigma.dtype, torch.float32))

    def t_to_sigma(self, t: Float[Tensor, " *rows"]) -> Float[Tensor, " *rows"]:
        """Sigma of each timestep, the inverse of sigma_to_t; exactly `sigmas[t]` at integers."""
        if self.timesteps is None:
            return (4 * t.double()).exp().to(torch.promote_types(t.dtype, torch.float32))
        exact = t.double().clamp(0, len(self.sigmas) - 1)
        low = exact.floor().long()
        high, weight = exact.ceil().long(), exact.frac()
        log_sigma = (1 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[high]
        return log_sigma.exp().to(torch.promote_types(t.dtype, torch.float32))

    def forward(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        cond: Cond,
        attend: Attend = sdpa,
        wrap: Wrap = plain,
        residuals: ControlResiduals | None = None,
        fork: Fork | None = None,
    ) -> Float[Tensor, "rows_out c h w"]:
        """Denoised x at noise level sigma; with a fork it has the rows of `fork.index`, x and sigma copied along."""
        image, own = further_channels(self.unet, x, cond), cond.for_network(self.unet)
        return self.run(self._denoised, self.unet, x, sigma, own, attend, wrap, residuals, fork, image)

    def _denoised(
        self, net: Any, x: Tensor, sigma: Tensor, cond: Any, attend: Attend, wrap: Wrap, residuals: Any,
        fork: Fork | None, image: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = self._network(net, x, sigma, image, cond=cond, attend=attend, wrap=wrap, residuals=residuals, fork=fork)
        out = out.to(x.dtype)
        if fork is not None:
            x, sigma = x[fork.index], sigma[fork.index]  # rows -> rows_out
        t = self.sigma_to_t(sigma)[:, None, None, None]
        return self.preconditioning.denoised(out, x, sigma[:, None, None, None], t)

    def _network(self, net: Any, x: Tensor, sigma: Tensor, image: Tensor | None, *args: Any, **extra: Any) -> Any:
        """The network's own output. image: further channels of its input, which are not scaled."""
        z = self.preconditioning.scaled(x, sigma[:, None, None, None])
        z = z if image is None else torch.cat([z, image.to(z.dtype)], dim=1)  # c -> c + extra
        return net(z, self.sigma_to_t(sigma), *args, **extra)

    def prepare(self, arguments: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The arguments of calls, with the keys, values and embedding of `cond` computed now; `sample` calls this."""
        cond = arguments.get("cond")
        return dict(arguments) if cond is None else {**arguments, "cond": cond.projected(self.unet)}

    def residuals(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        cond: Cond,
        net: ControlNet,
        hint: Float[Tensor, "hint_rows d hint_h hint_w"],
        guess: bool = False,
    ) -> ControlResiduals:
        """What a ControlNet adds at noise level sigma, for `forward`; arguments and errors as of `ControlNet`."""
        image = further_channels(net, x, cond)
        return self.run(self._network, net, x, sigma, image, cond.for_network(net), hint, guess)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **extra: Any) -> Float[Tensor, " rows"]:
        """Mean squared error of the network's own output at input + sigma · noise, one value a row."""
        s = sigma[:, None, None, None]
        x = input + noise * s
        target = self.preconditioning.target(input, noise, s)
        image = further_channels(self.unet, x, extra.get("cond"))
        out = self._network(self.inner_model, x, sigma, image, **extra).to(x.dtype)
        return (out - target).pow(2).flatten(1).mean(1)


def scheduled(
    unet: nn.Module, config: Mapping[str, Any], compute: Compute = PLAIN, device: torch.device | str = "cpu"
) -> Denoiser:
    """The denoiser of a network whose scheduler's config this is; the tables lie on `device`.

    config: a diffusers `scheduler_config.json`; {} is SDXL's. InputError, of one line, for what is not supported.
    """
    kind, prediction, schedule = scheduler_class(config), prediction_of(config), own_schedule(config)
    if is_edm(config):
        low, high, data = edm_numbers(config)
        if schedule.name in SPACINGS:
            text = "timestep_type='continuous' is supported with use_karras_sigmas or use_exponential_sigmas"
            raise InputError(f"scheduler config: {text}, not on {schedule.name} timesteps")
        alphas = 1 / (1 + torch.tensor([low, high], dtype=torch.float64) ** 2)
        return Denoiser(unet, alphas.to(device), Preconditioning(prediction, data), 0, compute, schedule)
    scaling = config.get("timestep_scaling", 10.0) if kind == "LCMScheduler" else None
    if kind == "LCMScheduler" and not (isinstance(scaling, float | int) and scaling > 0):
        raise InputError(f"scheduler config: timestep_scaling={scaling!r} must be a positive number")
    alphas = alphas_cumprod(config).to(device)
    scalings = Preconditioning(prediction, timestep_scaling=scaling)
    return Denoiser(unet, alphas, scalings, steps_offset(config), compute, schedule)
