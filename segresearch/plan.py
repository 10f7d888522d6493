"""From a composed config to the images to be made: which method, prompt, seed and control image.

Light: no torch, except where prompts are the captions of scenes.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segresearch.config import (
    CFGTerm,
    ControlConfig,
    EvaluateConfig,
    GenerateConfig,
    GuidanceConfig,
    PAGConfig,
    PerturbedTerm,
    RampConfig,
    Seeds,
    SEGConfig,
    conf_dir,
)
from segresearch.errors import ConfigError
from segresearch.prompts import from_coco, from_text
from segresearch.typed import nearest, typed

SCENE = "scene:"  # what names of procedural scenes begin with, where others are files
HELD_OUT = 10_000_000  # scene:0 is the procedural scene of this index; below it are those of the training


@dataclass(frozen=True)
class Row:
    """One row of a panel: a prompt ("" is unconditional), the seed of its noise, an image for each control."""

    prompt: str
    seed: int
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """rows × methods images; `methods` maps a column's label to its guidance, `controls` are of all of them."""

    title: str
    negative: str | None
    rows: tuple[Row, ...]
    methods: dict[str, GuidanceConfig]
    controls: dict[str, ControlConfig] = field(default_factory=dict)


def settings(config: Mapping[str, Any], sources: Sequence[Path] = (), kind: Any = GenerateConfig) -> Any:
    """The typed settings of a composed config: interpolations resolved, names in `compare` replaced by their guidance,
    a panel's `controlnet` (a name or several) by their controls, with those of its `controls` merged in.

    `sources` are folders searched for guidance/NAME.yaml after which come the project's own. `kind` is GenerateConfig
    or EvaluateConfig: an experiment's file may hold settings of both, and each takes its own. Raises ConfigError.
    """
    root = config.copy() if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    OmegaConf.set_struct(root, False)
    folders = [*sources, conf_dir()]
    given = OmegaConf.to_container(root, resolve=True)
    assert isinstance(given, dict)
    for key in ("hydra", "defaults"):  # Hydra's own, still there where the mapping was not composed by it
        given.pop(key, None)
    panels = given.get("panels")
    holders = [("", given), *((f"panels.{i}.", p) for i, p in enumerate(panels if isinstance(panels, list) else []))]
    for at, holder in holders:
        if isinstance(holder, dict) and isinstance(holder.get("compare"), list):
            entries = enumerate(holder["compare"])
            holder["compare"] = [_guidance(entry, root, folders, f"{at}compare.{i}") for i, entry in entries]
        if isinstance(holder, dict) and at and "controlnet" in holder:
            names = holder.pop("controlnet")
            names = [names] if isinstance(names, str) else names
            parts = [_named(name, folders, f"{at}controlnet", "controlnet") for name in names]
            holder["controls"] = _resolved("controls", OmegaConf.merge(*parts, holder.get("controls") or {}), root)
    for other in (GenerateConfig, EvaluateConfig):
        for key in {f.name for f in dataclasses.fields(other)} - {f.name for f in dataclasses.fields(kind)}:
            if given.pop(key, None) and key == "panels":
                raise ConfigError(f"{key}: for generate.py; evaluate.py takes the settings of one table, in compare")
    return typed(kind, given)


def _guidance(entry: Any, root: Any, folders: Sequence[Path], at: str) -> dict[str, Any]:
    """One entry of `compare` in full: a name, a list of names (their terms together), or a mapping with overrides.

    The mapping may name one or more under `guidance`.
    """
    inline = dict(entry) if isinstance(entry, Mapping) else {"guidance": entry}
    names = inline.pop("guidance", [])
    parts = [_named(name, folders, at) for name in ([names] if isinstance(names, str) else names)]
    return _resolved("guidance", OmegaConf.merge(*parts, inline), root)


def _resolved(key: str, node: Any, root: Any) -> dict[str, Any]:
    """`node` in the place `key` below `root`, so that its ${model...} resolves."""
    holder = root.copy()
    holder[key] = node
    whole: Any = OmegaConf.to_container(holder[key], resolve=True)
    return whole


def _named(name: str, folders: Sequence[Path], at: str, group: str = "guidance") -> Any:
    """conf/`group`/NAME.yaml, with the files in its defaults list merged before it."""
    files = {f.stem: f for folder in reversed(folders) for f in sorted((folder / group).glob("*.yaml"))}
    if name not in files:
        choices = ", ".join(sorted(files))
        raise ConfigError(f"{at}: no {group} {name!r}{nearest(str(name), files)} (choices: {choices})")
    node = OmegaConf.load(files[name])
    assert isinstance(node, DictConfig)
    before = [_named(parent, folders, at, group) for parent in node.pop("defaults", []) if parent != "_self_"]
    merged = OmegaConf.merge(*before, node)
    assert isinstance(merged, DictConfig)
    return merged


def parse_seeds(seeds: Seeds, at: str = "seeds") -> tuple[int, ...]:
    """5, "0-15", "1,4,7-9" or a list of such, in the order given. Raises ConfigError: not of this form, twice, none."""
    parts = [p for item in ([seeds] if isinstance(seeds, int | str) else seeds) for p in str(item).split(",")]
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f'{at}: {part!r} is not a seed or a rising range; write 3, "0-15", "1,4,7-9" or [1, 4]')
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63 or last - first >= 1_000_000:
            raise ConfigError(f"{at}: {part!r}: seeds go up to 2^63 - 1, a range holds at most a million")
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) < len(numbers):
        again = next(n for i, n in enumerate(numbers) if n in numbers[:i])
        raise ConfigError(f"{at}: seed {again} is given twice")
    return tuple(numbers)


def scene_numbers(text: str, count: int, at: str) -> tuple[int, ...] | None:
    """The scenes of "scene:12", "scene:0-7", "scene:1,4" or "scene:5-" (`count` of them); None for other text."""
    if not text.startswith(SCENE):
        return None
    given = text.removeprefix(SCENE).strip()
    first = re.fullmatch(r"(\d+)\s*-", given)
    try:
        numbers = tuple(range(int(first[1]), int(first[1]) + count)) if first else parse_seeds(given, at)
    except ConfigError:
        numbers = ()
    if not numbers or max(numbers) >= 2**31:
        forms = 'write "scene:12", "scene:0-7", "scene:1,4" or "scene:0-" (one for each seed), with numbers below 2^31'
        raise ConfigError(f"{at}: {text!r} names no scenes; {forms}")
    return numbers


def control_images(image: str | tuple[str, ...], count: int, at: str) -> tuple[str, ...]:
    """A file or a scene ("scene:12") for each of `count` seeds: those that `image` names, repeating in turn."""
    found: list[str] = []
    for item in (image,) if isinstance(image, str) else image:
        numbers = scene_numbers(item, count, at)
        found += [item] if numbers is None else [f"{SCENE}{number}" for number in numbers]
    if not found or "" in found:
        raise ConfigError(f'{at}: no image; give a file, a list of files, or scenes such as "scene:0-7"')
    if len(found) > count:
        counts = f"{len(found)} images, {count} seeds"
        raise ConfigError(f"{at}: each seed takes one image, so some would be left: {counts}; give as many seeds")
    return tuple(found[i % len(found)] for i in range(count))


def read_prompts(prompts: str | tuple[str, ...], at: str = "prompts", count: int = 1) -> tuple[str, ...]:
    """A list of prompts as it is; text ending in .txt is a file of one prompt a line, in .json one of COCO's captions;
    "scene:0-7" are the captions of these scenes, and "scene:0-" of `count`; other text is one prompt."""
    if isinstance(prompts, tuple):
        found = prompts
    elif numbers := scene_numbers(prompts, count, at):
        from segresearch.scenes.scenes import captions

        found = tuple(captions([HELD_OUT + number for number in numbers]))
    elif prompts.lower().endswith((".txt", ".json")):
        found = (from_text if prompts.lower().endswith(".txt") else from_coco)(Path(prompts), at)
    elif os.sep in prompts and Path(prompts).expanduser().exists():
        raise ConfigError(f"{at}: {prompts} is not a .txt or .json file; a text that is meant as one goes into a list")
    else:
        found = (prompts,)
    if not found:
        raise ConfigError(f'{at}: no prompt in {prompts!r}; "" is the one for images without a prompt')
    return found


def panels(config: GenerateConfig) -> tuple[Panel, ...]:
    """What `config` asks for.

    Without `panels` it is one: the methods of `compare`, then `guidance` if it is not among them.
    """
    if config.panels:
        whole = [
            dataclasses.replace(
                config,
                compare=p.compare,
                guidance=p.compare[-1] if p.compare else config.guidance,
                prompts=config.prompts if p.prompts is None else p.prompts,
                negative=config.negative if p.negative is None else p.negative,
                seeds=config.seeds if p.seeds is None else p.seeds,
                pairing=p.pairing or config.pairing,
                controls=config.controls if p.controls is None else p.controls,
            )  # fmt: skip
            for p in config.panels
        ]
        pairs = enumerate(zip(whole, config.panels, strict=True))
        return tuple(_panel(c, p.title, f"panels.{i}.") for i, (c, p) in pairs)
    return (_panel(config, "", ""),)


def _panel(config: GenerateConfig, title: str, at: str) -> Panel:
    seeds = parse_seeds(config.seeds, at + "seeds")
    prompts = read_prompts(config.prompts, at + "prompts", len(seeds))
    columns = [_control(control, len(seeds), f"controls.{name}") for name, control in config.controls.items()]
    if len(set(map(slug, config.controls))) < len(config.controls):
        raise ConfigError(f"controls: {', '.join(config.controls)}: too alike to tell their files apart; rename one")
    images = dict(zip(seeds, zip(*columns, strict=True) if columns else [()] * len(seeds), strict=True))
    if config.pairing == "zip":
        if len(prompts) > len(seeds):
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds"
            raise ConfigError(f"{at}pairing: zip gives each seed one prompt, so some would be left: {counts}")
        rows = [Row(prompts[i % len(prompts)], seed, images[seed]) for i, seed in enumerate(seeds)]
    else:
        rows = [Row(prompt, seed, images[seed]) for prompt in prompts for seed in seeds]
    if len(set(rows)) < len(rows):
        raise ConfigError(f"{at}prompts: the same prompt is given twice")
    return Panel(title, config.negative, tuple(rows), methods(config.compare, config.guidance, at), config.controls)


def methods(compare: Sequence[GuidanceConfig], guidance: GuidanceConfig, at: str = "") -> dict[str, GuidanceConfig]:
    """The methods of `compare` by their labels, then `guidance` if it is not among them. ConfigError: two alike."""
    found: dict[str, GuidanceConfig] = {}
    for method in (*compare, guidance):
        bare = dataclasses.replace(method, label=None)
        if method is guidance and any(dataclasses.replace(m, label=None) == bare for m in found.values()):
            continue
        name = method.label or describe(method)
        if name in found or slug(name) in map(slug, found):
            raise ConfigError(f"{at}compare: two methods are called {name!r}; give one of them a label")
        found[name] = method
    return found


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


def _control(control: ControlConfig, count: int, at: str) -> tuple[str, ...]:
    """The images of one control, one for each seed, where its settings can be."""
    images = control_images(control.image, count, f"{at}.image")
    checked_control(control, at)
    return images


def describe(guidance: GuidanceConfig) -> str:
    """A short name of a method: "CFG 5 + SEG σ=∞", "SAG 0.75", "vanilla"."""
    words = []
    for name, term in guidance.terms.items():
        if isinstance(term, CFGTerm):
            words.append(f"CFG {_strength(term.weight)}")
        else:
            words.append(_describe_term(name, term))
    if guidance.sag is not None:
        words.append(f"SAG {_strength(guidance.sag.scale)}")
    return " + ".join(words) or "vanilla"


def _strength(scale: float | RampConfig) -> str:
    return f"{scale.start:g}→{scale.stop:g}" if isinstance(scale, RampConfig) else f"{scale:g}"


def _describe_term(name: str, term: PerturbedTerm) -> str:
    p, strength = term.perturbation, _strength(term.scale)
    if isinstance(p, PAGConfig):
        return f"PAG {strength}" + (f" τ={p.tau:g}" if p.tau != 1 else "")
    if isinstance(p, SEGConfig):
        sigma = "∞" if p.sigma == math.inf else format(p.sigma, "g")
        return f"SEG {strength} σ={sigma}" + ("" if p.on == "q" else f" ({p.on})")
    return f"{name} {strength}"


def slug(text: str) -> str:
    """`text` as a file name: "SEG σ=∞" is "seg-sigma-inf"."""
    spelled = text.lower().replace("σ", "sigma ").replace("τ", "tau ").replace("∞", "inf")
    return re.sub(r"[^a-z0-9.]+", "-", spelled).strip("-.") or "x"
