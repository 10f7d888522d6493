"""From the pictures of every setting to the table of effects: scores, reduction, markdown, csv, json."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.mini.common import replace_file
from experiments.mini.effects import FIRST, Place, Setting, batches, complete, stored
from segresearch.data.scenes import captions, scenes
from segresearch.evaluation.attributes import agreement, load_namer, named, of_scenes
from segresearch.evaluation.distance import distances
from segresearch.evaluation.edges import edge_agreement
from segresearch.evaluation.frechet import Frechet, Gaussian, frechet_distance, gaussian
from segresearch.evaluation.vision import features_of, load_vision, unit_range
from segresearch.models import load_sdxl
from segresearch.models.locate import located
from segresearch.runs import digest, fingerprint

REFERENCE = range(FIRST + 100_000, FIRST + 110_000)  # real scenes that no picture was made from
GROUP = 50  # captions among which the right one is looked for
ATTRIBUTES = ("count", "colors", "shapes", "objects", "exact")
BEGIN, END = "<!-- effects: begin -->", "<!-- effects: end -->"
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One line of the table. Every *_error is one standard error; chances are those of captions of other pictures."""

    group: str
    guidance: str
    n: int
    frechet: float
    frechet_error: float
    frechet_groups: float  # standard deviation over disjoint groups of seeds
    frechet_extrapolated: float
    against_vanilla: float  # difference of the Fréchet distances
    against_vanilla_error: float
    distance: float  # of features, to the vanilla picture of the same seed
    distance_error: float
    caption: float  # own caption first of GROUP
    caption_error: float
    count: float
    colors: float
    shapes: float
    objects: float
    exact: float
    objects_chance: float
    edges: float
    seconds: float  # of one CPU core, per picture


class Judges:
    """The networks that look at pictures, and what they are compared with."""

    def __init__(self, place: Place, count: int):
        folder = located(place.model)
        self.vision, self.namer, self.count = load_vision(folder), load_namer(folder), count
        weights = {part: fingerprint(folder / part) for part in ("vision", "attributes", "text_encoder_2")}
        self.seen_by = weights["vision"]
        self.digest = digest({"weights": weights, "count": count, "group": GROUP, "first": FIRST})
        index = range(FIRST, FIRST + count)
        self.held, self.said = scenes(index), of_scenes(index)
        model = load_sdxl(folder)
        parts = [captions(range(FIRST + r.start, FIRST + r.stop)) for r in batches(count)]
        self.texts = torch.cat([model.encode(part)["cond"].pooled for part in parts])  # (count, projection)
        self.texts = torch.nn.functional.normalize(self.texts, dim=-1)
        self.model = model

    def reference(self, cache: Path) -> Gaussian:
        path = cache / f"reference-{digest({'vision': self.seen_by, 'scenes': [REFERENCE.start, len(REFERENCE)]})}.npz"
        if not path.exists():
            parts = [scenes(REFERENCE[i : i + 500]).images for i in range(0, len(REFERENCE), 500)]
            found = np.concatenate([features_of(self.vision, part)[0].numpy() for part in parts])
            replace_file(path, lambda file: np.savez(file, features=found))
        return gaussian(torch.from_numpy(np.load(path)["features"]))

    def scores(self, images: Tensor, vanilla: Tensor | None) -> Scores:
        """Numbers of each picture, by name; `features` are many."""
        features, seen = features_of(self.vision, images)
        n = self.count // GROUP * GROUP
        match = torch.full((len(images),), math.nan)
        if n:
            pairs = seen[:n].unflatten(0, (-1, GROUP)) @ self.texts[:n].unflatten(0, (-1, GROUP)).mT
            match[:n] = (pairs.argmax(-1) == torch.arange(GROUP)).float().flatten()  # (groups, g, g) -> (n,)
        found = named(self.namer, images)
        other = agreement(found, self.said[torch.arange(len(images)).roll(1)])["objects"]
        parts = zip(images.split(250), self.held.edges.split(250), strict=True)
        edges = torch.cat([edge_agreement(unit_range(a), b) for a, b in parts])
        zero = torch.zeros(len(images))
        apart = zero if vanilla is None else distances(self.vision.vision, images, vanilla)
        result = {"features": features, "caption": match, "objects_chance": other, "edges": edges, "distance": apart}
        return {k: v.numpy() for k, v in {**result, **agreement(found, self.said)}.items()}


def cached(path: Path, make: Callable[[], Scores]) -> Scores:
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, **made))
    with np.load(path) as file:
        return {k: file[k] for k in file.files}


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, of the values that are there."""
    there = values[~np.isnan(values)].astype(np.float64)
    if not len(there):
        return math.nan, math.nan
    return float(there.mean()), float(there.std(ddof=1) / math.sqrt(len(there))) if len(there) > 1 else math.nan


def row(group: str, guidance: str, scores: Mapping[str, np.ndarray], d: Frechet, plain: Frechet | None) -> Row:
    apart = spread = math.nan
    if plain is not None and plain is not d:
        apart = d.distance - plain.distance
        spread = float(np.std(np.subtract(d.draws, plain.draws), ddof=1)) if len(d.draws) > 1 else math.nan
    means = {name: mean_error(scores[name])[0] for name in (*ATTRIBUTES, "objects_chance", "edges")}
    distance, caption = mean_error(scores["distance"]), mean_error(scores["caption"])
    if plain is d or plain is None:
        distance = (math.nan, math.nan)
    groups = float(np.std(d.groups, ddof=1)) if len(d.groups) > 1 else math.nan
    seconds = float(np.mean(scores["seconds"])) if "seconds" in scores else math.nan
    return Row(group, guidance, d.n, d.distance, d.error, groups, d.extrapolated, apart, spread,
               *distance, *caption, **means, seconds=seconds)  # fmt: skip


def reduce(place: Place, settings: Sequence[Setting], count: int, draws: int) -> list[Row]:
    """A row for each setting whose pictures are all there, after those of real scenes and of the VAE alone."""
    judges, cache = Judges(place, count), place.runs / "effects"
    cache.mkdir(parents=True, exist_ok=True)
    reference = judges.reference(cache)
    groups = min(4, count // (reference.dim + 1))

    def frechet(scores: Scores) -> Frechet:
        return frechet_distance(torch.from_numpy(scores["features"]), reference, draws, groups if groups > 1 else 0)

    def through_vae() -> Tensor:
        with torch.no_grad():
            vae = judges.model.vae
            parts = [vae.decode(vae.encode(unit_range(part))) for part in judges.held.images.split(25)]
        return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    vae = fingerprint(located(place.model) / "vae")
    real = {
        "held-out scenes": cached(cache / f"real-{judges.digest}.npz", lambda: judges.scores(judges.held.images, None)),
        "through the VAE": cached(
            cache / f"vae-{vae}-{judges.digest}.npz", lambda: judges.scores(through_vae(), judges.held.images)
        ),
    }
    rows = [row("real", name, scores, frechet(scores), None) for name, scores in real.items()]
    plain: dict[str, tuple[Tensor, Frechet]] = {}
    first = sorted(settings, key=lambda s: s != s.vanilla)  # the vanilla of each group before the others of it
    found: dict[Setting, Row] = {}
    for setting in first:
        folder = place.folder(setting)
        if not complete(folder, count):
            continue
        parts = list(stored(folder, count))
        images = torch.cat([part for part, _ in parts])
        vanilla, plain_distance = plain.get(setting.group, (None, None))

        def make(images: Tensor = images, vanilla: Tensor | None = vanilla) -> Scores:
            return judges.scores(images, vanilla)

        against = "alone" if vanilla is None else place.folder(setting.vanilla).name.rsplit("-", 1)[1]
        scores = cached(folder / f"scores-{judges.digest}-{against}.npz", make)
        scores["seconds"] = np.array([seconds[1] / len(part) for part, seconds in parts])
        d = frechet(scores)
        if setting == setting.vanilla:
            plain[setting.group] = images, d
        found[setting] = row(setting.group, setting.guidance, scores, d, plain.get(setting.group, (None, None))[1])
    rows += [found[s] for group in dict.fromkeys(s.group for s in settings) for s in order(settings, group, found)]
    return rows


def order(settings: Sequence[Setting], group: str, found: Mapping[Setting, Row]) -> list[Setting]:
    """The settings of a group by method, then by scale and blur."""
    some = [s for s in settings if s.group == group and s in found]
    return sorted(some, key=lambda s: (s != s.vanilla, s.weight, s.seg > 0, s.pag > 0, s.sag, s.seg, s.pag, s.sigma))


def number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def with_error(value: float, error: float, digits: int = 2) -> str:
    return number(value, digits) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def markdown(rows: Sequence[Row]) -> str:
    heads = ("", "guidance", "Fréchet", "− vanilla", "4 groups", "N → ∞", "distance", "caption", "count", "colours",
             "shapes", "objects (chance)", "exact", "edges", "CPU s")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    last = ""
    for r in rows:
        cells = [
            r.group if r.group != last else "", r.guidance, with_error(r.frechet, r.frechet_error),
            with_error(r.against_vanilla, r.against_vanilla_error), number(r.frechet_groups),
            number(r.frechet_extrapolated), with_error(r.distance, r.distance_error, 3),
            with_error(r.caption, r.caption_error, 3), number(r.count), number(r.colors), number(r.shapes),
            f"{number(r.objects)} ({number(r.objects_chance)})", number(r.exact), number(r.edges, 3),
            number(r.seconds),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        last = r.group
    return "\n".join(lines)


def check_page(page: Path) -> tuple[str, str]:
    """The text before and after the marks. Raises ValueError if they are missing."""
    before, found, rest = page.read_text().partition(BEGIN)
    if not found or END not in rest:
        raise ValueError(f"{page}: the marks {BEGIN} and {END} are missing")
    return before, rest.partition(END)[2]


def write_table(place: Place, settings: Sequence[Setting], count: int, draws: int, docs: Path) -> str:
    """<docs>/effects/{effects.csv,effects.json,effects.png,samples.png}, and the table between the marks of
    <docs>/effects.md."""
    from experiments.mini.effects_figure import draw, samples

    page = docs / "effects.md"
    if page.exists():
        check_page(page)  # before the work
    rows = reduce(place, settings, count, draws)
    text, folder = markdown(rows), docs / "effects"
    folder.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) for r in rows)
    replace_file(folder / "effects.csv", lines.getvalue().encode())
    facts: dict[str, Any] = {
        "pictures": count, "reference": len(REFERENCE), "steps": place.steps, "unet": place.dtype,
        "weights": place.identity(Setting())["weights"], "draws": draws,
    }  # fmt: skip
    values = [{k: None if v != v else v for k, v in asdict(r).items()} for r in rows]
    replace_file(folder / "effects.json", (json.dumps({**facts, "rows": values}, indent=1) + "\n").encode())
    draw(rows, folder / "effects.png")
    samples(place, settings, count, folder / "samples.png")
    weights = ", ".join(f"{part} `{value}`" for part, value in facts["weights"].items())
    note = (
        f"{count} pictures a setting against {len(REFERENCE)} real scenes; {place.steps} Euler steps, UNet in "
        f"{place.dtype}; {draws} bootstrap resamples. Weights: {weights}."
    )
    if page.exists():
        before, after = check_page(page)
        replace_file(page, f"{before}{BEGIN}\n\n{text}\n\n{note}\n\n{END}{after}".encode())
    return f"{text}\n\n{note}"
