"""Z-Sampling: a step forward with guidance, back without, and forward again."""

from collections.abc import Mapping
from typing import Any

import torch

from segresearch.errors import InputError
from segresearch.guidance.guided_denoiser import Conds, Control, GuidedDenoiser
from segresearch.guidance.step import Latents, Sigma
from segresearch.guidance.terms import ALWAYS, Branch, Interval
from segresearch.models.attention import Attend
from segresearch.sampling.intervals import check_interval
from segresearch.sampling.memory import Run

BETWEEN = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")  # samplers


class ZSampling:
    """Zigzag diffusion sampling, arXiv 2412.10891, as the D with which an Euler step from σ to σ′ is the zigzag's.

    x′ = D + r·(x − D), r = σ′/σ, is the guided step, x″ = D_b + (x′ − D_b)/r with D_b = D[base](x′, σ′) its inversion,
    and D″ = D(x″, σ) the prediction of the step that counts: D_eff = D″ + (x″ − x)·r/(1 − r). The last step is plain.

    base: the conditioning of the inversion. None: the negative one where CFG is on (the published inversion guidance
        0), else the inner's base. interval: (low, high) in σ where it acts. Published for SDXL: guidance 5.5, every
        step of 50 but the last. It costs a second guided forward, and one of one row an image. The authors' code
        evaluates the inversion at σ, not at the σ′ of x′ [by a third party's reading].

    Raises InputError without a run, or at a σ that is not of its schedule.
    """

    def __init__(self, inner: Any, base: str | None = None, interval: Interval = ALWAYS):
        check_interval(interval, "Z-sampling")
        if hasattr(inner, "inner"):
            raise InputError(f"Z-sampling is around a GuidedDenoiser or a plain denoiser, not {type(inner).__name__}")
        self.inner = inner if isinstance(inner, GuidedDenoiser) else GuidedDenoiser(inner, {})
        self.denoiser, self.base, self.interval = self.inner.denoiser, base, interval

    __getattr__ = GuidedDenoiser.__getattr__  # the schedule of `self.denoiser`

    def prepare(self, arguments: Mapping[str, Any], run: Run | None = None) -> dict[str, Any]:
        """As of GuidedDenoiser. InputError for a sampler that evaluates between the sigmas of the schedule."""
        if run is not None and run.sampler in BETWEEN:
            raise InputError(f"Z-sampling: {run.sampler} evaluates between the sigmas; take euler or dpmpp_2m")
        return self.inner.prepare(arguments, run)

    def __call__(
        self, x: Latents, sigma: Sigma, conds: Conds, control: Control = None, attend: Attend | None = None,
        run: Run | None = None,
    ) -> Latents:  # fmt: skip
        """D_eff; arguments and errors as for GuidedDenoiser."""
        now, after = self._steps(sigma, run)
        guided: Any = lambda z: self.inner(z, sigma, conds, control, attend, run)  # noqa: E731
        first = guided(x)
        if after == 0 or not self.interval[0] <= now <= self.interval[1]:
            return first
        ratio = after / now
        forward = first + ratio * (x - first)
        values, lower = [after] * len(x), torch.full_like(sigma, after)
        base = self.inner.negative(now, run) if self.base is None else Branch(self.base)
        plain = self.inner.evaluate(forward, lower, [base], conds, control, attend, values, run)[base]
        back = plain + (forward - plain) / ratio
        return guided(back) + (back - x) * (ratio / (1 - ratio))

    def _steps(self, sigma: Sigma, run: Run | None) -> tuple[float, float]:
        if run is None:
            raise InputError("Z-sampling depends on the next sigma, which only a run knows: call `sample`")
        sigmas, values = run.schedule("Z-sampling"), set(sigma.tolist())
        if len(values) > 1 or not values <= set(sigmas[:-1]):
            raise InputError(f"Z-sampling: sigma {min(values):g} is not of the schedule; take euler or dpmpp_2m")
        now = values.pop()
        return now, sigmas[sigmas.index(now) + 1]

    def __repr__(self) -> str:
        base = self.base or f"the negative where CFG is on, else {self.inner.base}"
        return f"{self.inner!r}\n  zigzag: back with {base}, and a second guided forward"
