"""What the weak branch of a method changes, without sampling a guided image.

Along trajectories of the baseline, and on real images with noise, at some levels σ of the schedule:

    Δ = D[base] − D[branch]    its size, its mean colour, what is the same in all images, its angle to the error x₀ − D
    attention                  at the perturbed sites of the base branch, and what the perturbation makes of it

All methods are measured on the same x. Nothing is recorded: of every image a few numbers are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch.analysis.attention_diagnostics import (
    Share,
    attention_shares,
    common_share,
    estimate,
    mean_of,
    near_chance,
    relative_change,
)
from segresearch.config.build import build_guidance
from segresearch.config.method import CFGTerm, GuidanceConfig
from segresearch.config.schema import DiagnosticsConfig, RunConfig
from segresearch.errors import ConfigError
from segresearch.guidance import GuidedDenoiser
from segresearch.guidance.perturbations import site_kind
from segresearch.guidance.row_layout import Perturbed, compose, past_of, perturbed_sites, remembers
from segresearch.guidance.step import wide
from segresearch.models.attention import Site, sdpa
from segresearch.models.controlnet import ActiveControlNet
from segresearch.sample_images import encode_conds, run_sigmas
from segresearch.sampling import initial_noise, sample
from segresearch.sampling.loop import END_TO_END
from segresearch.sampling.memory import Run
from segresearch.sampling.noise import noise_keys

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

Latents = Float[Tensor, "rows c h w"]
Negative = str | Sequence[str] | None
SEEDS = 2_000_000_000  # the noise of real image i is that of this seed and i, so that no sampled image starts from it
ATTENTION = ("keys", "near", "own", "position", "varying")
DIRECTION = ("rms", "size", "dc", "common")
ALIGNMENT = ("cosine", "best_scale")


@dataclass(frozen=True)
class Number:
    """One estimate. method: "" for what attention does without a perturbation. site: "" for what is of the whole
    network. step: of the schedule, from 0; sigma: its level. value: None where nothing acts there. count: images."""

    method: str
    site: str
    quantity: str
    step: int
    sigma: float
    value: float | None
    error: float | None
    count: int


@dataclass(frozen=True)
class Real:
    """Images of the model's size, and a prompt for each, on which the model's error is measured."""

    images: UInt8[Tensor, "n 3 h w"]
    texts: Sequence[str]


def difference_alone(guidance: GuidanceConfig) -> GuidanceConfig | None:
    """The one difference of a method, at scale 1 and without post-processors; None where there is none or several.

    Classifier-free guidance beside a perturbed term is left out; alone it is the difference.
    """
    others = {name: term for name, term in guidance.terms.items() if not isinstance(term, CFGTerm)}
    kept = GuidanceConfig(
        base=guidance.base, every=guidance.every, conditionings=guidance.conditionings, networks=guidance.networks
    )
    if guidance.sag is not None:
        return None if others else dataclasses.replace(kept, sag=dataclasses.replace(guidance.sag, scale=1.0))
    if len(others) == 1:
        ((name, term),) = others.items()
        return dataclasses.replace(kept, terms={name: dataclasses.replace(term, scale=1.0)})
    if not others and len(guidance.terms) == 1:
        return dataclasses.replace(kept, terms={
            name: dataclasses.replace(term, weight=2.0) if isinstance(term, CFGTerm) else term  # w − 1 = 1
            for name, term in guidance.terms.items()
        })  # fmt: skip
    return None


@dataclass(frozen=True)
class Subject:
    """A method whose difference is measured.

    guided: a guided denoiser with that difference alone, at scale 1, whose last post-processor appends D[base] to
    `plain`. sites: its perturbations of self-attention, by site. steady: whether it must see every step, since it
    remembers.
    """

    name: str
    guided: Any
    plain: list[Latents]
    sites: Perturbed
    steady: bool

    def difference(self, x: Latents, sigma: Tensor, arguments: Mapping[str, Any]) -> tuple[Latents, Latents]:
        """D[base], and D[base] − D[branch] in the method's own form."""
        guided = wide(self.guided(x, sigma, **arguments))
        plain = wide(self.plain.pop())
        return plain, guided - plain


def subject(name: str, guidance: GuidanceConfig, sd: Any) -> Subject:
    """The subject of a `difference_alone`. Raises InputError for what does not fit the model."""
    plain: list[Latents] = []

    def note(guided: Latents, at: Any) -> Latents:
        plain.append(at.plain)
        return guided

    model = build_guidance(guidance, sd, [note])
    terms = getattr(model, "inner", model).terms.values()
    perturbations = [p for term in terms for p in (*term.pos.perturbations, *term.neg.perturbations)]
    attention = tuple(dict.fromkeys(p for p in perturbations if site_kind(p) == "self"))
    steady = any(term.shape is not None for term in terms) or any(map(remembers, perturbations))
    return Subject(name, model, plain, perturbed_sites(attention, sd.unet.sites_by_kind), steady)


def direction_shares(plain: Latents, difference: Latents) -> dict[str, Share]:
    """rms: root mean square of Δ. size: over that of D less its mean of each channel. dc: share of the energy of Δ in
    the means of its channels. common: share of it that is the same in all images."""
    energy = difference.square().sum((1, 2, 3))
    area = difference.shape[2] * difference.shape[3]
    means = difference.mean((2, 3)).square().sum(1) * area
    rms = difference.square().mean((1, 2, 3)).sqrt()
    spread = (plain - plain.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt()
    size, common = Share(rms, spread), common_share(difference)
    return {"rms": mean_of(rms), "size": size, "dc": Share(means, energy), "common": common}


def alignment_shares(truth: Latents, plain: Latents, difference: Latents) -> dict[str, Share]:
    """cosine of Δ with the error x₀ − D, mean over images; best_scale: the s of least |x₀ − D − s·Δ|² over all."""
    error = truth - plain
    product = (error * difference).sum((1, 2, 3))
    square = difference.square().sum((1, 2, 3))
    norms = error.square().sum((1, 2, 3)).sqrt() * square.sqrt()
    return {"cosine": mean_of(product / norms.clamp_min(1e-30)), "best_scale": Share(product, square)}


class Diagnosis:
    """The numbers of all images so far, by method, site, quantity and step."""

    def __init__(self, sd: Any, methods: Mapping[str, GuidanceConfig], config: RunConfig, settings: DiagnosticsConfig):
        self.sd, self.config = sd, config
        self.sigmas = run_sigmas(sd, config)
        self.steps = sorted({step % config.steps for step in settings.steps})
        alone = {name: one for name, method in methods.items() if (one := difference_alone(method)) is not None}
        if not alone:
            raise ConfigError("diagnostics: no method here has one difference to diagnose; compare=[none,pag], say")
        self.subjects = [subject(name, guidance, sd) for name, guidance in alone.items()]
        self.observer = GuidedDenoiser(sd.denoiser, {}, next(iter(methods.values())).base)
        self.sites = {site for s in self.subjects for site in s.sites}
        self.grids: dict[str, tuple[int, int]] = {}
        self.shares: dict[tuple[str, str, str, int], list[Share]] = {}

    def add(self, method: str, site: str, step: int, shares: Mapping[str, Share]) -> None:
        for quantity, share in shares.items():
            self.shares.setdefault((method, site, quantity, step), []).append(share)

    def conds(self, guided: Any, texts: Sequence[str], negative: Negative) -> dict[str, Any]:
        """The conditionings of a guided denoiser."""
        return encode_conds(self.sd, guided, texts, negative, self.config.size, self.config.text)

    def batch(self, seeds: Sequence[int], texts: Sequence[str], negative: Negative, control: Any = ()) -> "Batch":
        """What the subjects need for these images."""
        noise = initial_noise(seeds, self.sd.latent_shape(self.config.size))
        keys = torch.tensor(noise_keys(noise, seeds, "steps"), device=self.sd.device)
        run = Run(keys, self.config.sampler.name, tuple(self.sigmas.tolist()))

        def prepared(guided: Any) -> dict[str, Any]:
            given = {"conds": self.conds(guided, texts, negative), "control": control}
            return guided.prepare(given, dataclasses.replace(run))

        arguments = [prepared(s.guided) for s in self.subjects]
        runs = {s.name: dataclasses.replace(run) for s in self.subjects}
        return Batch(self, noise, arguments, prepared(self.observer), runs)

    def numbers(self) -> list[Number]:
        """Every estimate, in the order of methods and steps, and the chance of `near` at each site. Where a method adds
        nothing to any image there is none."""
        estimates = []
        idle = {(method, step) for (method, _, quantity, step), shares in self.shares.items()
                if quantity == "rms" and estimate(shares).value == 0}  # fmt: skip
        for (method, site, quantity, step), shares in self.shares.items():
            if not site and (method, step) in idle:
                continue
            *numbers, count = estimate(shares)
            value, error = (None if math.isnan(x) else float(f"{x:.6g}") for x in numbers)
            estimates.append(Number(method, site, quantity, step, float(self.sigmas[step]), value, error, count))
        for site, grid in self.grids.items():
            chances = {"tokens": float(grid[0] * grid[1]), "near_chance": float(f"{near_chance(grid):.6g}")}
            estimates += [Number("", site, name, step, float(self.sigmas[step]), value, None, 0)
                      for step in self.steps for name, value in chances.items()]  # fmt: skip
        order = {name: i for i, name in enumerate(["", *(s.name for s in self.subjects)])}
        places = {site: i for i, site in enumerate(["", *self.sd.unet.sites])}
        return sorted(estimates, key=lambda n: (order[n.method], places[n.site], n.step))


@dataclass(frozen=True)
class Batch:
    """Images that are measured together. arguments: of each subject's calls. observed: of the unguided calls."""

    diagnosis: Diagnosis
    noise: Latents
    arguments: Sequence[Mapping[str, Any]]
    observed: Mapping[str, Any]
    runs: Mapping[str, Run]

    def measure(self, step: int, x: Latents, truth: Latents | None = None) -> None:
        """At a step of the schedule: without `truth` (x₀) the direction and the attention, with it the alignment."""
        d, measured = self.diagnosis, step in self.diagnosis.steps
        sigma = torch.full((len(x),), float(d.sigmas[step]), dtype=x.dtype, device=x.device)
        if truth is None and (measured or any(s.steady for s in d.subjects)):
            d.observer(x, sigma, attend=partial(self.attend, step), **self.observed)
        for one, arguments in zip(d.subjects, self.arguments, strict=True):
            if not (measured or one.steady):
                continue
            plain, difference = one.difference(x, sigma, arguments)
            if not measured:
                continue
            if truth is None:
                d.add(one.name, "", step, direction_shares(plain, difference))
            else:
                d.add(one.name, "", step, alignment_shares(truth, plain, difference))

    def attend(self, step: int, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Plain attention, measured at the perturbed sites, with every perturbation of it on the same q, k and v."""
        d, out = self.diagnosis, sdpa(q, k, v, site)
        if site.kind != "self" or site.name not in d.sites:
            return out
        d.grids[site.name] = site.grid
        measured = step in d.steps
        if measured:
            d.add("", site.name, step, attention_shares(q, k, out, site.grid))
        for one in d.subjects:
            perturbations = one.sites.get(site.name, ())
            if not perturbations or not (measured or one.steady):
                continue
            past = past_of(perturbations, self.runs[one.name], float(d.sigmas[step]))
            changed = compose(perturbations, sdpa, past)(q, k, v, site)
            if measured:
                d.add(one.name, site.name, step, {"change": relative_change(changed, out)})
        return out


@torch.no_grad()
def diagnose(
    sd: "StableDiffusion", methods: Mapping[str, GuidanceConfig], config: RunConfig, settings: DiagnosticsConfig,
    texts: Callable[[range], Sequence[str]], real: Real | None = None,
    negative: Callable[[range], Negative] = lambda rows: None,
    control: Callable[[range], Sequence[ActiveControlNet]] = lambda rows: (),
    advance: Callable[[int], object] = lambda count: None,
) -> list[Number]:  # fmt: skip
    """The numbers of every method that has one difference (`difference_alone`).

    methods: by name; trajectories are those of the first. texts, negative, control: of images by their numbers, which
    are their seeds. real: None leaves out the alignment. advance: called with the size of a batch that is done.

    Raises ConfigError for a sampler that does not follow the schedule image by image, and where no method has a
    difference.
    """
    name, options = config.sampler.name, config.sampler.options
    if name in END_TO_END or options.get("s_churn"):
        raise ConfigError(f"diagnostics: {name} with these options chooses its own sigmas; take euler or dpmpp_2m")
    if config.init.image is not None:
        raise ConfigError("diagnostics: of images from noise; leave init.image out")
    diagnosis = Diagnosis(sd, methods, config, settings)
    step = int(config.batch_size)
    baseline = build_guidance(next(iter(methods.values())), sd)
    with sd.arithmetic():
        for rows in batches(settings.images, step):
            prompts, active = list(texts(rows)), control(rows)
            batch = diagnosis.batch(rows, prompts, negative(rows), active)
            conds = diagnosis.conds(baseline, prompts, negative(rows))
            schedule = diagnosis.sigmas if config.schedule.rho is not None else config.schedule.name
            sample(baseline, batch.noise, name, schedule, config.steps, conds, rows, options=options, control=active,
                   callback=lambda info: batch.measure(info["i"], info["x"]))  # noqa: B023  # fmt: skip
            advance(len(rows))
        for rows in batches(0 if real is None else len(real.images), step):
            assert real is not None
            batch = diagnosis.batch([SEEDS + i for i in rows], real.texts[rows.start : rows.stop], negative(rows))
            pixels = real.images[rows.start : rows.stop].to(sd.device).float() / 127.5 - 1
            truth = sd.encode_images(pixels.to(next(sd.vae.parameters()).dtype)).float()
            noise = batch.noise.to(truth)
            for i in range(config.steps):
                batch.measure(i, truth + diagnosis.sigmas[i].to(truth) * noise, truth)
            advance(len(rows))
    return diagnosis.numbers()


def batches(count: int, size: int) -> Iterator[range]:
    """Ranges of at most `size`; the last has two at least where there are two, since pairs need them."""
    starts = [*range(0, max(count - 1, min(count, 1)), size)]
    for start, stop in zip(starts, [*starts[1:], count]):
        yield range(start, stop)
