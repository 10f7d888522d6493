"""From settings to images: methods, prompts, seeds, control images. Light: no torch, but for captions of scenes."""

import collections
import dataclasses
import itertools
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.config.inputs import STRENGTH, InitConfig
from segresearch.config.method import GuidanceConfig, TermConfig
from segresearch.config.prompt_sets import SUFFIXES, from_set, parsed
from segresearch.config.schema import SCENE, ControlConfig, GenerateConfig, PanelConfig, RunConfig
from segresearch.config.validate import refuse_broken_text
from segresearch.errors import ConfigError

HELD_OUT = 10_000_000  # scene:0 is the procedural scene of this index; below it are those of the training
TITLES = {  # of methods whose name is not their kind in capitals
    "soft_pag": "SoftPAG", "temperature": "temperature", "blurred_map": "blurred map", "s2": "S²", "weak": "AG",
    "cfg_zero": "CFG-Zero*", "mambo": "MAMBO-G", "mimic": "mimic", "threshold": "threshold", "momentum": "momentum",
    "higs": "HiGS", "cfg++": "CFG++", "schedule": "schedule", "perp_neg": "Perp-Neg", "rescale": "rescale",
    "sg_prev": "SG-prev", "smc": "SMC", "swg_mask": "mask", "projected": "projected",
}  # fmt: skip
LONGEST = 100  # letters of a file's name
COCO = {"id": (int, "a whole number"), "image_id": (int, "a whole number"), "caption": (str, "text")}  # an annotation


@dataclass(frozen=True)
class ImageSpec:
    """One row of a panel: a prompt ("" is unconditional), the seed of its noise, an image for each control.

    init: the image that it starts from, and the mask of what is made anew if there is one; () starts from noise.
    negative: its negative prompt, None for none. size: where the images of a panel have several, else None.
    """

    prompt: str
    seed: int
    images: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    negative: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Panel:
    """rows × methods images; `methods` maps a column's label to its guidance, `controls` are of all of them.

    negative: the one of all rows; None where they have none, or each its own. in_full: the prompts and negatives of the
    config, those of files read.
    """

    title: str
    negative: str | None
    rows: tuple[ImageSpec, ...]
    methods: dict[str, GuidanceConfig]
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    init: InitConfig = InitConfig()
    in_full: Mapping[str, Any] = field(default_factory=dict)


def panels(config: GenerateConfig) -> tuple[Panel, ...]:
    """The panels of `config`; without `panels` one: the methods of `compare`, then `guidance` if not among them."""
    tables = {f"panels.{i}.": panel for i, panel in enumerate(config.panels)}
    tables = tables or {"": PanelConfig(compare=(*config.compare, config.guidance))}
    return tuple(_panel(config, table, at) for at, table in tables.items())


def _panel(config: GenerateConfig, panel: PanelConfig, at: str) -> Panel:
    names = ("prompts", "negative", "sizes", "seeds", "pairing", "controls", "init")
    run = dataclasses.replace(config, **{n: getattr(panel, n) for n in names if getattr(panel, n) is not None})
    seeds = parse_seeds(run.seeds, at + "seeds")
    prompts = read_prompts(run.prompts, at + "prompts", len(seeds))
    images = dict(zip(seeds, control_rows(run.controls, len(seeds)) or [()] * len(seeds)))
    starts = dict(zip(seeds, init_rows(run, len(seeds), at) or [()] * len(seeds)))
    if len(set(map(slug, run.controls))) < len(run.controls):
        raise ConfigError(f"controls: {', '.join(run.controls)}: too alike to tell their files apart; rename one")
    if run.pairing == "zip" and len(prompts) > len(seeds):
        text = f"zip gives each seed one prompt, so the first {len(seeds)} of {len(prompts)} prompts are taken"
        warnings.warn(f"{at}pairing: {text}; give as many seeds for all", stacklevel=2)
    product = run.pairing == "product"
    numbers = range(len(prompts))
    pairs = list(itertools.product(numbers, seeds) if product else zip(itertools.cycle(numbers), seeds))
    if len({(prompts[i], seed) for i, seed in pairs}) < len(pairs):
        raise ConfigError(f"{at}prompts: the same prompt is given twice")
    negative, negatives = read_negatives(run.negative, len(prompts), f"{at}negative")
    if run.sizes is not None and len(run.sizes) != len(prompts):
        raise ConfigError(f"{at}sizes: {len(run.sizes)} for {len(prompts)} prompts; give one [height, width] for each")
    rows = tuple(
        ImageSpec(
            prompts[i], seed, images[seed], starts[seed], negatives[i] if negatives else negative,
            run.sizes[i] if run.sizes else None,
        )
        for i, seed in pairs
    )  # fmt: skip
    columns = methods(panel.compare or (run.guidance,), at)
    in_full = {"prompts": prompts, "negative": negatives or negative}
    return Panel(panel.title, negative, rows, columns, run.controls, run.init, in_full)


def control_rows(controls: Mapping[str, ControlConfig], count: int) -> tuple[tuple[str, ...], ...]:
    """Of each of `count` images a file or a scene for each control; () where there is no control."""
    names = [control_images(control.image, count, f"controls.{key}.image") for key, control in controls.items()]
    return tuple(zip(*names))


def init_rows(config: RunConfig, count: int, at: str = "") -> tuple[tuple[str, ...], ...]:
    """Of each of `count` images the file or scene that it starts from, and its mask if there are any; () where all
    start from noise. ConfigError for a strength that leaves no step."""
    init = config.init
    if init.image is None:
        return ()
    if not init.steps(config.steps):
        text = f"{init.strength or STRENGTH:g} of {config.steps} steps leaves no step to sample"
        raise ConfigError(f"{at}init.strength: {text}; {1 / config.steps:.3g} is one step")
    names = [control_images(init.image, count, f"{at}init.image")]
    if init.mask is not None:
        names.append(control_images(init.mask, count, f"{at}init.mask"))
    return tuple(zip(*names))


def methods(compare: Sequence[GuidanceConfig], at: str = "") -> dict[str, GuidanceConfig]:
    """The methods of `compare` by label; the last is left out if it is among the others. ConfigError: two alike."""
    by_label: dict[str, GuidanceConfig] = {}
    for method in compare:
        others = [dataclasses.replace(other, label=None) for other in by_label.values()]
        if method is compare[-1] and dataclasses.replace(method, label=None) in others:
            continue
        label = method.label or describe(method)
        if label in by_label:
            raise ConfigError(f"{at}compare: two methods are called {label!r}; give one of them a label")
        if alike := [other for other in by_label if slug(other) == slug(label)]:
            text = f"the files of {alike[0]!r} and {label!r} have one name"
            raise ConfigError(f"{at}compare: {text}; give one of them another label")
        by_label[label] = method
    return by_label


def describe(guidance: GuidanceConfig) -> str:
    """A short name of a method: "CFG 5 + SEG σ=∞", "SAG 0.75", "vanilla"."""
    words = [_describe_term(name, term) for name, term in guidance.terms.items()]
    words += [title(entry.perturbation, name) for name, entry in guidance.every.items()]
    words += [title(post, name) for name, post in guidance.post.items()]
    words += [title(maker, name) for name, maker in guidance.conditionings.items() if name in ("cond", "uncond")][:1]
    words += ["rescale"] * bool(guidance.rescale) + ["APG on all"] * (guidance.apg is not None)
    if guidance.sag is not None:
        words.append(f"SAG {_number(guidance.sag.scale)}")
    if guidance.ip_adapter is not None:
        words.append(f"image {guidance.ip_adapter.scale:g}")
    return " + ".join(words + ["Z-sampling"] * (guidance.zigzag is not None)) or "vanilla"


def title(method: Any, name: str) -> str:
    """The name of a method by its kind; `name` for a custom one."""
    kind = str(getattr(method, "kind", name))
    if kind == "custom":
        return name
    return TITLES.get(kind, kind.replace("_", " ") if "_" in kind else kind.upper())


def _number(scale: Any) -> str:
    if isinstance(scale, float | int):
        return f"{scale:g}"
    if getattr(scale, "kind", "ramp") == "ramp":
        return f"{scale.start:g}→{scale.stop:g}"
    return title(scale, "") + (f" {scale.strength:g}" if hasattr(scale, "strength") else "")


def _describe_term(name: str, term: TermConfig) -> str:
    shape = "" if term.shape is None else f" ({title(term.shape, 'custom')})"
    if term.kind == "cfg":
        noun = "CFG" if (term.pos, term.neg) == ("cond", "uncond") else name.replace("_", " ").upper()
        return f"{noun} {_number(term.weight)}{shape}"
    if term.kind == "difference":
        return f"{name} {_number(term.scale)}{shape}"
    p, scale = term.perturbation, _number(term.scale) + shape
    if isinstance(p, tuple) or p.kind == "custom":
        return f"{name} {scale}"
    if p.kind == "pag":
        return f"PAG {scale}" + (f" τ={p.tau:g}" if p.tau != 1 else "")
    if p.kind != "seg":
        return f"{title(p, name)} {scale}"
    sigma = "∞" if p.sigma == math.inf else format(p.sigma, "g")
    return f"SEG {scale} σ={sigma}" + ("" if p.on == "q" else f" ({p.on})")


def slug(text: str) -> str:
    """`text` as a file name: "SEG σ=∞" is "seg-sigma-inf". Of a long one the beginning and a digest."""
    whole = text
    for sign, word in (("σ", "sigma "), ("τ", "tau "), ("∞", "inf"), ("++", "pp"), ("²", "2")):
        text = text.lower().replace(sign, word)
    name = re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or f"x-{runs.digest(whole)[:6]}"
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}-{runs.digest(whole)}"


def parse_seeds(seeds: Any, at: str = "seeds") -> tuple[int, ...]:
    """5, "0-15", "1,4,7-9" or a list of such, in the order given. Raises ConfigError: not of this form, twice, none."""
    parts = [part for item in ([seeds] if isinstance(seeds, int | str) else seeds) for part in str(item).split(",")]
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f'{at}: {part!r} is not a seed or a rising range; write 3, "0-15", "1,4,7-9" or [1, 4]')
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63 or last - first >= 1_000_000:
            raise ConfigError(f"{at}: {part!r}: seeds go up to 2^63 - 1, a range holds at most a million")
        numbers.extend(range(first, last + 1))
    if not numbers:
        raise ConfigError(f'{at}: no seed; write 3, "0-15", "1,4,7-9" or [1, 4]')
    for seed, count in collections.Counter(numbers).most_common(1):
        if count > 1:
            raise ConfigError(f"{at}: seed {seed} is given twice")
    return tuple(numbers)


def scene_numbers(text: str, count: int, at: str) -> tuple[int, ...] | None:
    """The scenes of "scene:12", "scene:0-7", "scene:1,4" or "scene:5-" (`count` of them); None for other text."""
    if not text.startswith(SCENE):
        return None
    numerals = text.removeprefix(SCENE).strip()
    first = re.fullmatch(r"(\d+)\s*-", numerals)
    try:
        numbers = tuple(range(int(first[1]), int(first[1]) + count)) if first else parse_seeds(numerals, at)
    except ConfigError:
        numbers = ()
    if not numbers or max(numbers) >= 2**31:
        forms = 'write "scene:12", "scene:0-7", "scene:1,4" or "scene:0-" (one for each seed), with numbers below 2^31'
        raise ConfigError(f"{at}: {text!r} names no scenes; {forms}")
    return numbers


def control_images(image: str | tuple[str, ...], count: int, at: str) -> tuple[str, ...]:
    """A file or a scene ("scene:12") for each of `count` seeds: those that `image` names, repeating in turn."""
    names: list[str] = []
    for item in (image,) if isinstance(image, str) else image:
        numbers = scene_numbers(item, count, at)
        names += [item] if numbers is None else [f"{SCENE}{number}" for number in numbers]
    if not names or "" in names:
        raise ConfigError(f'{at}: no image; give a file, a list of files, or scenes such as "scene:0-7"')
    if len(names) > count:
        raise ConfigError(f"{at}: each seed takes one image: {len(names)} images, {count} seeds; give as many seeds")
    return tuple(names[i % len(names)] for i in range(count))


def read_prompts(prompts: str | tuple[str, ...], at: str = "prompts", count: int = 1) -> tuple[str, ...]:
    """A list of prompts as it is; text ending in .txt is a file of one prompt a line, in .json one of COCO's captions;
    in .tsv, .csv or .jsonl one of a published set (`prompt_sets`); "scene:0-7" are the captions of these scenes, and
    "scene:0-" of `count`; other text is one prompt."""
    if isinstance(prompts, tuple):
        texts = prompts
    elif numbers := scene_numbers(prompts, count, at):
        from segresearch.scenes.scenes import captions

        texts = tuple(captions([HELD_OUT + number for number in numbers]))
    elif prompts.lower().endswith((".txt", ".json")):
        texts = (from_text if prompts.lower().endswith(".txt") else from_coco)(Path(prompts).expanduser(), at)
    elif prompts.lower().endswith(SUFFIXES):
        texts = from_set(Path(prompts), _text(Path(prompts).expanduser(), at), at)
    elif os.sep in prompts and Path(prompts).expanduser().exists():
        raise ConfigError(f"{at}: {prompts} is not a .txt or .json file; a text that is meant as one goes into a list")
    else:
        texts = (prompts,)
    refuse_broken_text(list(texts), at)
    if not texts:
        raise ConfigError(f'{at}: no prompt in {prompts!r}; "" is the one for images without a prompt')
    return texts


def read_negatives(
    negative: str | tuple[str, ...] | None, count: int, at: str = "negative"
) -> tuple[str | None, tuple[str, ...]]:
    """The negative prompt of all (None for none) and (), or None and one for each of `count` prompts: those of a list
    or of a .txt file with one a line."""
    if isinstance(negative, str) and not negative.lower().endswith(".txt"):
        if negative.lower().endswith((".json", *SUFFIXES)) or os.sep in negative and Path(negative).exists():
            raise ConfigError(f"{at}: {negative} is not a .txt file; a text that is meant as one goes into a list")
    if negative is None or isinstance(negative, str) and not negative.lower().endswith(".txt"):
        return negative, ()
    texts = negative if isinstance(negative, tuple) else from_text(Path(negative).expanduser(), at)
    if len(texts) != count:
        raise ConfigError(f"{at}: {len(texts)} for {count} prompts; give one text, or one for each prompt")
    return None, texts


def from_text(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """One prompt a line, UTF-8; blank lines are left out. ConfigError with the number of the line that is wrong."""
    lines = [line.strip() for line in _text(path, at).split("\n")]
    for number, line in enumerate(lines, 1):
        if control := re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line):
            raise ConfigError(f"{at}: {path}, line {number}: holds the control character {control[0]!r}")
    return tuple(filter(None, lines))


def from_coco(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """Captions of a COCO file (captions_val2014.json): the first of each image by image id, then the second of each,
    and so on, "first" by annotation id. ConfigError has the line or the annotation that is wrong."""
    try:
        entries = list(parsed(_text(path, at), f"{at}: {path}")["annotations"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{at}: {path}: no list `annotations` in it, which COCO's captions_*.json have") from error
    for i, entry in enumerate(entries):
        for key, (kind, noun) in COCO.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ConfigError(f"{at}: {path}: annotations.{i}: no {key}, or it is not {noun}")
        if not entry["caption"].strip():
            raise ConfigError(f"{at}: {path}: annotations.{i}: the caption is empty")
    by_image = collections.defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry["id"]):
        by_image[entry["image_id"]].append(" ".join(entry["caption"].split()))
    turns = itertools.zip_longest(*(by_image[image] for image in sorted(by_image)))
    return tuple(caption for turn in turns for caption in turn if caption)


def _text(path: Path, at: str) -> str:
    """The text of a UTF-8 file. ConfigError with the line and the byte in it that is wrong."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{at}: cannot read {path}: not a file")  # a pipe would never end
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{at}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        *lines, last = error.object[: error.start + 1].splitlines()
        raise ConfigError(f"{at}: {path}, line {len(lines) + 1}: not UTF-8 text (byte {len(last)})") from error
