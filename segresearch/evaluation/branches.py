"""The diagnostics of an evaluation (`analysis.branch_diagnostics`): run once and kept in one file beside the shards,
there whole or not at all; their tables on the page."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from segresearch import runs
from segresearch.analysis.branch_diagnostics import Number, Real, diagnose
from segresearch.config.schema import DiagnosticsConfig
from segresearch.control_images.prepare import controlled_batch
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation.frame import Frame
from segresearch.evaluation.reference_images import Reference
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.image_files import fit, open_image
from segresearch.pages import Cell
from segresearch.progress import Bar
from segresearch.sample_images import run_sigmas
from segresearch.scenes.scenes import scenes

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

VERSION = 1  # of what is measured
Numbers = Sequence[Number]


class Question(NamedTuple):
    """A part of the page. text: how to read it. labels: of its quantities, in the order of its rows and panels. sites:
    whether they are of sites, and rows of all sites of a method together."""

    key: str
    title: str
    text: str
    labels: Mapping[str, str]
    sites: bool = False


QUESTIONS = (
    Question(
        "attention", "What does attention do at the perturbed sites?",
        "Of the base branch, without a perturbation; mean over queries and heads, and over the sites, with the lowest "
        "and the highest site in brackets. Effective keys is exp of the entropy of a query's attention. For a blur or "
        "an identity to remove structure, attention must have some: clearly fewer effective keys than tokens, mass "
        "near the query away from its chance, an output that differs between tokens, and queries whose variance is of "
        "the image, not of the position, which all images share. Near the chances attention pools, and its "
        "perturbation removes little.",
        {"keys": "effective keys", "near": "mass on the 3×3 around the query", "own": "mass on the own token",
         "position": "query variance common to all images", "varying": "output energy that differs between tokens"},
        sites=True,
    ),
    Question(
        "change", "How much does the perturbation change attention's output?",
        "|out′ − out| / |out| with the same q, k and v; mean over images and sites, the lowest and the highest site in "
        "brackets. Near 0 the branch is the model itself. Guidance can gain only at levels where it is not. Methods "
        "that perturb no attention have no row.",
        {"change": "relative change"}, sites=True,
    ),
    Question(
        "direction", "How large is Δ = D[base] − D[branch], and what is in it?",
        "On the trajectories of the first method. Relative size: the root mean square of Δ over that of D less its "
        "means. DC share: the part of its energy in the mean of each channel, a colour shift. Common share: the part "
        "that is the same in every image (0 for directions that are unrelated; below 0 by chance). A direction that "
        "repairs images is about each image: both shares would be low. A high common share is a pattern that is added "
        "to all of them, whatever they show.",
        {"rms": "root mean square", "size": "relative size", "dc": "DC share", "common": "common share"},
    ),
    Question(
        "alignment", "Does Δ point to where the model errs?",
        "On real images x₀ with noise, where the error x₀ − D is known. Cosine: of Δ with the error, mean over images. "
        "Best scale: the s of least |x₀ − D − s·Δ|². Where adding s·Δ lowers the squared error, both are above 0 by "
        "more than their error. D is trained to be the mean of what is possible, for which no direction helps. At or "
        "below 0 a gain in quality would have to come from elsewhere: from sharper choices among what is possible, at "
        "the cost of variety.",
        {"cosine": "cosine with the error", "best_scale": "best scale"},
    ),
)  # fmt: skip
ALONE = (
    "Rows at scale −1 are the weak branch alone, sampled like any other method. For guidance away from it to help, it "
    "should lose what the model lacks: worse in distance, precision or sharpness, with the same number of objects and "
    "the same variety. A branch that is as good as the model, or that only holds other numbers of objects, gives a "
    "direction that changes images without repairing them."
)


def file_of(spec: EvaluationSpec, real: Reference) -> Path:
    """The file of the diagnostics of these methods, named by everything that they depend on."""
    settings = spec.config.diagnostics
    named = [[method, folder.name] for method, folder in spec.folders.items()]
    of_images = list(spec.scenes[: settings.scenes]) if settings and spec.scenes else real.content(spec.config.out)
    return Path(spec.config.out) / "shards" / f"diagnostics-{runs.digest([VERSION, named, settings, of_images])}.json"


def read(path: Path) -> tuple[Number, ...]:
    """The numbers of a file; () where it is missing or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        numbers = tuple(Number(**row) for row in content["numbers"])
        return numbers if content["digest"] == runs.digest(content["numbers"]) else ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def write(spec: EvaluationSpec, real: Reference, load: Callable[[Any], "StableDiffusion"], path: Path) -> None:
    """Measure, and write the file. load: the model, in this dtype where it is not None. Raises ConfigError."""
    config, settings = spec.config, spec.config.diagnostics
    assert settings is not None
    if path.exists():
        print(f"{path}: damaged; it is written again", file=sys.stderr, flush=True)
    sd = load(settings.dtype)
    size = config.size or sd.default_size
    images = real_images(spec, settings, real, size)
    sigmas = run_sigmas(sd, config)

    def control(rows: range) -> list[Any]:
        named = [spec.controls[i % len(spec.controls)] for i in rows] if config.controls else []
        return controlled_batch(sd, config.controls, named, size, sigmas) if named else []

    count = settings.images + (0 if images is None else len(images.images))
    with Bar(count) as bar:
        bar.describe("diagnostics")
        numbers = diagnose(sd, spec.methods, config, settings, spec.texts, images, spec.negative, control, bar.add)
    rows = runs.plain([dataclasses.asdict(number) for number in numbers])
    runs.write(path, json.dumps({"digest": runs.digest(rows), "numbers": rows}, indent=0) + "\n")


def real_images(
    spec: EvaluationSpec, settings: DiagnosticsConfig, real: Reference, size: tuple[int, int]
) -> Real | None:
    """The scenes whose captions the prompts are, with these; else the first of `reference`, without prompts. None where
    none are asked for, and under a ControlNet, whose images are not of them."""
    if not settings.scenes or spec.controls:
        return None
    count = settings.scenes
    if spec.scenes:
        indices = spec.scenes[:count]
        return Real(scenes(indices, size=size).images, list(spec.prompts[: len(indices)]))
    if real.scenes:
        images = scenes(real.scenes[:count], size=size).images
    else:
        try:
            fitted = [np.asarray(fit(open_image(path), size)) for path in real.files[:count]]
        except InputError as error:
            raise ConfigError(f"reference: {error}") from error
        images = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # (n, h, w, 3) -> (n, 3, h, w)
    return Real(images, [""] * len(images))


def plain_rows(numbers: Numbers) -> list[dict[str, Any]]:
    """Rows of diagnostics.csv."""
    return [dataclasses.asdict(number) for number in numbers]


class Row(NamedTuple):
    """A line of a table, and of a panel of its figure: a name and, by step, the numbers (one a site, or one)."""

    name: str
    quantity: str
    by_step: Mapping[int, list[Number]]


def rows_of(question: Question, numbers: Numbers) -> list[Row]:
    """The rows of a question: for each method, or where they are of attention alone for each group of sites."""
    by_row: dict[tuple[str, str], dict[int, list[Number]]] = {}
    if question.key == "attention":
        for name, sites in site_groups(numbers).items():
            for quantity in question.labels:
                for number in (n for n in numbers if n.quantity == quantity and not n.method and n.site in sites):
                    by_row.setdefault((name, quantity), {}).setdefault(number.step, []).append(number)
    else:
        for number in (n for n in numbers if n.method and n.quantity in question.labels):
            by_row.setdefault((number.method, number.quantity), {}).setdefault(number.step, []).append(number)
    order = [*question.labels]
    names = list(dict.fromkeys(name for name, _ in by_row))
    return [Row(*key, by_row[key]) for key in sorted(by_row, key=lambda k: (names.index(k[0]), order.index(k[1])))]


def site_groups(numbers: Numbers) -> dict[str, tuple[str, ...]]:
    """The different sets of perturbed sites, by the names of the methods that perturb them."""
    sites: dict[str, dict[str, None]] = {}
    for number in (n for n in numbers if n.quantity == "change"):
        sites.setdefault(number.method, {})[number.site] = None
    methods: dict[tuple[str, ...], list[str]] = {}
    for method, of_it in sites.items():
        methods.setdefault(tuple(of_it), []).append(method)
    tokens = {n.site: n.value for n in numbers if n.quantity == "tokens"}
    return {f"{', '.join(names)} ({len(of_it)} sites, {_span([tokens[site] for site in of_it])} tokens)": of_it
            for of_it, names in methods.items()}  # fmt: skip


def _span(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{value:g}" for value in (min(numbers), max(numbers))))


def table_of(question: Question, numbers: Numbers) -> list[list[Cell]]:
    """Head and rows; a column a level σ."""
    rows = rows_of(question, numbers)
    steps = {n.step: n.sigma for row in rows for of_step in row.by_step.values() for n in of_step}
    chance = next((n.value for n in numbers if n.quantity == "near_chance"), None)
    head = [Cell("sites of" if question.key == "attention" else "method", "method"), Cell("")]
    lines = [[*head, *(Cell(f"σ {steps[step]:.3g}", "number") for step in sorted(steps))]]
    last = ""
    for row in rows:
        label = question.labels[row.quantity]
        if row.quantity == "near" and chance is not None:
            label += f" (chance {chance:.3f})"
        name = Cell(row.name if row.name != last else "", "method" + (" first" if row.name != last else ""))
        if question.key == "attention":
            name = name._replace(kind=name.kind.replace("method", "claim"))
        lines.append([name, Cell(label), *(_cell(row.by_step.get(step, [])) for step in sorted(steps))])
        last = row.name
    return lines


def _cell(numbers: Numbers) -> Cell:
    values = [n.value for n in numbers if n.value is not None]
    if not values:
        return Cell("–", "number")
    mean = float(np.mean(values))
    digits = 1 if abs(mean) >= 10 else 3
    if len(values) > 1:
        text = f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    else:
        error = next((n.error for n in numbers if n.error is not None), None)
        text = f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
    return Cell(text.replace("-", "−"), "number")


def alone_table(frame: Frame, numbers: Numbers) -> list[list[Cell]]:
    """What the run measured of the images of the diagnosed methods and of the baseline."""
    diagnosed = {n.method for n in numbers}
    methods = [m for m in frame.methods if m == frame.methods[0] or m in diagnosed]
    kinds = ("fd", "fd_to_baseline", "precision", "recall", "variance", "sharpness", "saturation", "contrast",
             "objects_held", "pairs_held")  # fmt: skip
    names = {"variance": "variance", "objects_held": "number of objects", "pairs_held": "different objects"}
    metrics = [m for kind in kinds for m in frame.metrics(kind)]
    head = [Cell("method", "method"), *(Cell(m.head or names.get(m.kind, m.kind), "number") for m in metrics)]
    return [head, *([Cell(m, "method"), *(Cell(str(frame[m, k.name]), "number") for k in metrics)] for m in methods)]
