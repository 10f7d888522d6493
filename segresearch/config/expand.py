"""From the settings of a run to its images: which method, prompt, seed and control image. Light: no torch."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from segresearch.config.parse import control_images, parse_seeds, read_prompts
from segresearch.config.schema import ControlConfig, GenerateConfig, GuidanceConfig, PanelConfig, Scale, TermConfig
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
    tables = {f"panels.{i}.": panel for i, panel in enumerate(config.panels)}
    tables = tables or {"": PanelConfig(compare=(*config.compare, config.guidance))}
    return tuple(_panel(config, table, at) for at, table in tables.items())


def _panel(config: GenerateConfig, panel: PanelConfig, at: str) -> Panel:
    names = ("prompts", "negative", "seeds", "pairing", "controls")
    run = dataclasses.replace(config, **{n: getattr(panel, n) for n in names if getattr(panel, n) is not None})
    seeds = parse_seeds(run.seeds, at + "seeds")
    prompts = read_prompts(run.prompts, at + "prompts", len(seeds))
    images = dict(zip(seeds, control_rows(run.controls, len(seeds)) or [()] * len(seeds)))
    if len(set(map(slug, run.controls))) < len(run.controls):
        raise ConfigError(f"controls: {', '.join(run.controls)}: too alike to tell their files apart; rename one")
    if run.pairing == "zip" and len(prompts) > len(seeds):
        counts = f"{len(prompts)} prompts, {len(seeds)} seeds"
        raise ConfigError(f"{at}pairing: zip gives each seed one prompt, so some would be left: {counts}")
    product = run.pairing == "product"
    pairs = list(itertools.product(prompts, seeds) if product else zip(itertools.cycle(prompts), seeds))
    rows = tuple(ImageSpec(prompt, seed, images[seed]) for prompt, seed in pairs)
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"{at}prompts: the same prompt is given twice")
    return Panel(panel.title, run.negative, rows, methods(panel.compare or (run.guidance,), at), run.controls)


def control_rows(controls: Mapping[str, ControlConfig], count: int) -> tuple[tuple[str, ...], ...]:
    """Of each of `count` images a file or a scene for each control; () where there is no control."""
    names = [control_images(control.image, count, f"controls.{key}.image") for key, control in controls.items()]
    return tuple(zip(*names))


def methods(compare: Sequence[GuidanceConfig], at: str = "") -> dict[str, GuidanceConfig]:
    """The methods of `compare` by label; the last is left out if it is among the others. ConfigError: two alike."""
    by_label: dict[str, GuidanceConfig] = {}
    for method in compare:
        others = [dataclasses.replace(other, label=None) for other in by_label.values()]
        if method is compare[-1] and dataclasses.replace(method, label=None) in others:
            continue
        label = method.label or describe(method)
        if slug(label) in map(slug, by_label):
            raise ConfigError(f"{at}compare: two methods are called {label!r}; give one of them a label")
        by_label[label] = method
    return by_label


def describe(guidance: GuidanceConfig) -> str:
    """A short name of a method: "CFG 5 + SEG σ=∞", "SAG 0.75", "vanilla"."""
    words = [_describe_term(name, term) for name, term in guidance.terms.items()]
    if guidance.sag is not None:
        words.append(f"SAG {_number(guidance.sag.scale)}")
    return " + ".join(words) or "vanilla"


def _number(scale: Scale) -> str:
    return f"{scale:g}" if isinstance(scale, float | int) else f"{scale.start:g}→{scale.stop:g}"


def _describe_term(name: str, term: TermConfig) -> str:
    if term.kind == "cfg":
        return f"CFG {_number(term.weight)}"
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
