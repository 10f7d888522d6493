"""From the settings of a run to its images: which method, prompt, seed and control image. Light: no torch."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from segresearch.config.parse import SCENE, control_images, parse_seeds, read_prompts
from segresearch.config.schema import AnalyzeConfig, ControlConfig, GenerateConfig, GuidanceConfig, PerturbedTerm, Scale
from segresearch.errors import ConfigError


@dataclass(frozen=True)
class ImageSpec:
    """One row of a panel: a prompt ("" is unconditional), the seed of its noise, an image for each control."""

    prompt: str
    seed: int
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """rows × methods images; `methods` maps a column's label to its guidance, `controls` are of all of them."""

    title: str
    negative: str | None
    rows: tuple[ImageSpec, ...]
    methods: dict[str, GuidanceConfig]
    controls: dict[str, ControlConfig] = field(default_factory=dict)


def panels(config: GenerateConfig) -> tuple[Panel, ...]:
    """The panels of `config`; without `panels` one: the methods of `compare`, then `guidance` if not among them."""
    if not config.panels:
        return (_panel(config, "", ""),)
    blocks = []
    for i, panel in enumerate(config.panels):
        names = ("prompts", "negative", "seeds", "pairing", "controls")
        changes = {name: getattr(panel, name) for name in names if getattr(panel, name) is not None}
        guidance = panel.compare[-1] if panel.compare else config.guidance
        whole = dataclasses.replace(config, compare=panel.compare, guidance=guidance, **changes)
        blocks.append(_panel(whole, panel.title, f"panels.{i}."))
    return tuple(blocks)


def _panel(config: GenerateConfig, title: str, at: str) -> Panel:
    seeds = parse_seeds(config.seeds, at + "seeds")
    prompts = read_prompts(config.prompts, at + "prompts", len(seeds))
    columns = []
    for name, control in config.controls.items():
        columns.append(control_images(control.image, len(seeds), f"controls.{name}.image"))
        checked_control(control, f"controls.{name}")
    if len(set(map(slug, config.controls))) < len(config.controls):
        raise ConfigError(f"controls: {', '.join(config.controls)}: too alike to tell their files apart; rename one")
    images = dict(zip(seeds, zip(*columns, strict=True) if columns else [()] * len(seeds), strict=True))
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if config.pairing == "zip":
        if len(prompts) > len(seeds):
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds"
            raise ConfigError(f"{at}pairing: zip gives each seed one prompt, so some would be left: {counts}")
        pairs = [(prompts[i % len(prompts)], seed) for i, seed in enumerate(seeds)]
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"{at}prompts: the same prompt is given twice")
    rows = tuple(ImageSpec(prompt, seed, images[seed]) for prompt, seed in pairs)
    return Panel(title, config.negative, rows, methods(config.compare, config.guidance, at), config.controls)


def methods(compare: Sequence[GuidanceConfig], guidance: GuidanceConfig, at: str = "") -> dict[str, GuidanceConfig]:
    """The methods of `compare` by their labels, then `guidance` if it is not among them. ConfigError: two alike."""
    by_label: dict[str, GuidanceConfig] = {}
    for method in (*compare, guidance):
        bare = dataclasses.replace(method, label=None)
        if method is guidance and any(dataclasses.replace(m, label=None) == bare for m in by_label.values()):
            continue
        label = method.label or describe(method)
        if slug(label) in map(slug, by_label):
            raise ConfigError(f"{at}compare: two methods are called {label!r}; give one of them a label")
        by_label[label] = method
    return by_label


def checked_control(control: ControlConfig, at: str) -> None:
    """ConfigError for settings of a control that cannot be, whatever its images."""
    if control.start >= control.end:
        raise ConfigError(f"{at}.start: {control.start:g} is not below end, {control.end:g}: it would never act")
    if control.low > control.high:
        raise ConfigError(f"{at}.low: {control.low:g} is above high, {control.high:g}")
    if not math.isfinite(control.scale):
        raise ConfigError(f"{at}.scale: {control.scale:g} is not finite; 1 is the ControlNet as it was trained")
    images = (control.image,) if isinstance(control.image, str) else control.image
    files = [image for image in images if not image.startswith(SCENE)]
    if control.preprocess == "depth" and files and not control.depth_model:
        hint = "name one (a folder or a cached hub id), or set preprocess=none where the image is a depth map itself"
        raise ConfigError(f"{at}.depth_model: missing, and {files[0]} needs one; {hint}")


def measured_steps(config: AnalyzeConfig) -> tuple[int, ...]:
    """The measured steps as numbers from 0, rising."""
    return tuple(sorted({step % config.steps for step in config.measured_steps}))


def describe(guidance: GuidanceConfig) -> str:
    """A short name of a method: "CFG 5 + SEG σ=∞", "SAG 0.75", "vanilla"."""
    words = [
        f"CFG {_number(term.weight)}" if term.kind == "cfg" else _perturbed(name, term)
        for name, term in guidance.terms.items()
    ]
    if guidance.sag is not None:
        words.append(f"SAG {_number(guidance.sag.scale)}")
    return " + ".join(words) or "vanilla"


def _number(scale: Scale) -> str:
    return f"{scale:g}" if isinstance(scale, float | int) else f"{scale.start:g}→{scale.stop:g}"


def _perturbed(name: str, term: PerturbedTerm) -> str:
    p, scale = term.perturbation, _number(term.scale)
    if isinstance(p, tuple) or p.kind == "custom":
        return f"{name} {scale}"
    if p.kind == "pag":
        return f"PAG {scale}" + (f" τ={p.tau:g}" if p.tau != 1 else "")
    sigma = "∞" if p.sigma == math.inf else format(p.sigma, "g")
    return f"SEG {scale} σ={sigma}" + ("" if p.on == "q" else f" ({p.on})")


def slug(text: str) -> str:
    """`text` as a file name: "SEG σ=∞" is "seg-sigma-inf"."""
    spelled = text.lower().replace("σ", "sigma ").replace("τ", "tau ").replace("∞", "inf")
    return re.sub(r"[^a-z0-9.]+", "-", spelled).strip("-.") or "x"
