"""Measure the effects of guidance on mini: several evaluations, whose tables and figures go into docs/effects.md.

    python -m experiments.mini.effects                    # 300 images per setting; resumes a stopped run
    python -m experiments.mini.effects --only control     # some parts; the tables of the others stay
"""

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.docs import marks
from experiments.mini.common import replace_file
from segresearch.checkpoints.resolve import MINI
from segresearch.config.expand import HELD_OUT
from segresearch.config.inputs import InitConfig
from segresearch.evaluation.frame import METRICS
from segresearch.evaluation.image_metrics import psnr
from segresearch.init_images import init_images, pixels
from segresearch.metrics.features import load_extractor
from segresearch.metrics.frechet import frechet_distance, gaussian
from segresearch.metrics.mini_vision import load_vision, perceptual_distances
from segresearch.models import load_model
from segresearch.sample_images import to_uint8
from segresearch.scenes.scenes import scenes

SCRIPT = Path(__file__).resolve().parents[1] / "evaluate.py"
REFERENCE = range(HELD_OUT + 100_000, HELD_OUT + 110_000)  # as in conf/metrics/mini.yaml
COLUMNS = {"fd-mini": "FD", "fd_to_baseline-mini": "− baseline", "fd_means-mini": "means", "variance-mini": "variance",
           "precision-mini": "precision", "recall-mini": "recall", "distance-mini": "distance",
           "text_alignment-mini": "cosine", "count": "count", "colors": "colours", "shapes": "shapes",
           "objects": "objects", "objects_chance": "(chance)", "exact": "exact", "edges": "edges", "cost": "cost",
           "saturation": "saturation", "contrast": "contrast", "psnr": "PSNR", "distance_to_truth-mini": "to truth",
           "sharpness": "sharpness", "objects_held": "objects in it", "pairs_held": "different objects"}  # fmt: skip


Cells = Mapping[tuple[str, str], Mapping[str, str]]  # rows of metrics.csv, by method and metric


@dataclass(frozen=True)
class Part:
    """One evaluation: its name on the page and its overrides. rank: one row a method, at its best scale, the lowest
    distance first. columns: metrics of the table, in place of all of COLUMNS that were measured. images: of a setting,
    in place of --count."""

    name: str
    overrides: tuple[str, ...]
    rank: bool = False
    columns: tuple[str, ...] = tuple(COLUMNS)
    images: int | None = None

    def command(self, count: int) -> list[str]:
        return [*self.overrides, "preset=quick", f"images={self.images or count}"]


SHORT = ("fd-mini", "fd_to_baseline-mini", "precision-mini", "recall-mini", "distance-mini", "sharpness",
         "objects_held", "pairs_held", "text_alignment-mini", "objects", "exact", "cost")  # fmt: skip
RESTORED = ("psnr", "distance_to_truth-mini", "fd-mini", "fd_to_baseline-mini", "precision-mini", "recall-mini",
            "sharpness", "cost")  # fmt: skip
PARTS = (
    Part("methods", ("experiment=methods",), rank=True, columns=SHORT),
    Part("methods_again", ("experiment=methods_again",), rank=True, columns=SHORT, images=500),
    Part("methods_text", ("experiment=methods_text",), rank=True, columns=SHORT),
    Part("branches", ("experiment=branches", "diagnostics.images=100", "diagnostics.scenes=100"), columns=SHORT),
    Part("fig6", ("experiment=fig6",)),
    Part("fig15", ("experiment=fig15",)),
    Part("control-canny", ("experiment=control", "controlnet=canny")),
    Part("control-depth", ("experiment=control", "controlnet=depth")),
    Part("super_resolution", ("experiment=super_resolution",), columns=RESTORED),
    Part("restoration", ("experiment=restoration",), columns=RESTORED),
)


def evaluate(part: Part, count: int, workers: int, out: str, n_bootstrap: int) -> Path:
    """The folder of the part's results. The workers sample shards in parallel; one process reduces them."""
    call = [sys.executable, str(SCRIPT), *part.command(count), f"out={out}", "wandb.mode=off"]
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)} for rank in range(workers)]
    processes = [subprocess.Popen([*call, "stage=shards"], env=e, stdout=subprocess.DEVNULL) for e in environments]
    if any([process.wait() for process in processes]):
        raise SystemExit(f"{part.name}: not all shards were sampled; complete shards are kept")
    reduce = [*call, "stage=reduce", f"n_bootstrap={n_bootstrap}"]
    done = subprocess.run(reduce, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.split("page: ")[1].strip()).parent


def floor(count: int) -> list[str]:
    """A markdown table of FD for `count` real held-out scenes, and for the same scenes through the VAE."""
    extractor, held = load_extractor("mini"), scenes(range(HELD_OUT, HELD_OUT + count)).images
    parts = [extractor.of(scenes(REFERENCE[i : i + 500]).images) for i in range(0, len(REFERENCE), 500)]
    real = gaussian(torch.cat(parts))
    vae = load_model("mini").vae
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part.float() / 127.5 - 1)) for part in held.split(25)])
    through = to_uint8(decoded)
    lines = ["| images | FD | means | variance |", "| --- | ---: | ---: | ---: |"]
    for name, images in (("real held-out scenes", held), ("the same through the VAE", through)):
        features = torch.cat([extractor.of(part) for part in images.split(500)])
        d = frechet_distance(features, real, 100)
        variance = float(features.double().var(0).sum() / real.cov.diagonal().sum())
        lines.append(f"| {name} | {d.distance:.2f} ± {d.error:.2f} | {d.mean_part:.2f} | {variance:.3f} |")
    return lines


def unrestored(count: int) -> list[str]:
    """A markdown table of what restored images are compared with: the reduced scenes as they are, and the masked part
    of scenes through the VAE; `count` scenes of the evaluations."""
    vision, vae = load_vision(MINI).vision, load_model("mini").vae
    names, size = [f"scene:{i}" for i in range(count)], (64, 64)
    numbers: dict[str, list[torch.Tensor]] = {"enlarged, not sampled": [], "the scene through the VAE": []}
    for part in (names[i : i + 25] for i in range(0, count, 25)):
        truth, anew = pixels(part, size), pixels(part, size, masks=True) >= 128
        enlarged = init_images(InitConfig(image="scene:0-", reduce=4), [(name,) for name in part], size)
        assert enlarged is not None
        with torch.no_grad():
            decoded = to_uint8(vae.decode(vae.encode(truth.float() / 127.5 - 1)))
        for label, images, where in zip(numbers, (to_uint8(enlarged.images), decoded), (None, anew)):
            pair = psnr(images, truth, where), perceptual_distances(vision, images, truth)
            numbers[label].append(torch.stack(pair, dim=1))  # (b, 2)
    lines = ["| images | PSNR | to truth |", "| --- | ---: | ---: |"]
    for label, values in numbers.items():
        error, mean = torch.std_mean(torch.cat(values), dim=0)
        texts = [f"{m:.{d}f} ± {e / count**0.5:.{d}f}" for m, e, d in zip(mean, error, (2, 3), strict=True)]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return lines


def table(folder: Path, rank: bool = False, columns: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """Metrics of the run's metrics.csv as markdown, one row per method; with `rank` as `Part` says."""
    with (folder / "metrics.csv").open(newline="") as file:
        cells = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    methods = list(dict.fromkeys(method for method, _ in cells))
    names = [name for name in columns if any((method, name) in cells for method in methods)]
    lines = [f"| method | {' | '.join(COLUMNS[name] for name in names)} |", f"| --- |{' ---: |' * len(names)}"]
    for method in ranked(cells, methods) if rank else methods:
        texts = [method]
        for name in names:
            value, error = cells[method, name]["value"], cells[method, name]["error"]
            digits = 1 if METRICS[name].kind.startswith("fd") else {"sharpness": 4, "psnr": 2}.get(name, 3)
            text = f"{float(value):.{digits}f}" + (f" ± {float(error):.{digits}f}" if error else "") if value else "–"
            texts.append(text.replace("-", "−"))
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def ranked(cells: Cells, methods: Sequence[str]) -> list[str]:
    """The baseline, which is the first, then of each method its best scale ("PAG ×0.5" is one of "PAG"), the lowest
    Fréchet distance first."""
    distance = {method: float(cells[method, "fd-mini"]["value"]) for method in methods}
    best: dict[str, str] = {}
    for method in sorted(methods[1:], key=distance.__getitem__):
        best.setdefault(method.split(" ×")[0], method)
    return [methods[0], *best.values()]


def attention_table(folder: Path) -> list[str]:
    """What attention does at the mid sites without a perturbation, by level; mean over the sites."""
    labels = {"keys": "effective keys, of 64", "near": "mass on the 3×3 around the query",
              "own": "mass on the own token", "position": "query variance common to all images",
              "varying": "output energy that differs between tokens"}  # fmt: skip
    rows = [row for row in diagnostics(folder) if not row["method"] and row["site"].startswith("mid")]
    levels = list(dict.fromkeys(row["sigma"] for row in rows))
    lines = [f"| | {' | '.join(f'σ_t {float(sigma):.3g}' for sigma in levels)} |", f"| --- |{' ---: |' * len(levels)}"]
    for quantity, label in labels.items():
        means = [mean(rows, quantity, sigma) for sigma in levels]
        lines.append(f"| {label} | {' | '.join(f'{value:.1f}' if value > 9 else f'{value:.3f}' for value in means)} |")
    return lines


def direction_table(folder: Path) -> list[str]:
    """Of each branch: the change of attention's output, size and shares of the direction, and its angle to the error,
    each at three levels."""
    labels = {"change": "change of attention", "size": "size of Δ", "common": "common share", "dc": "DC share",
              "cosine": "cosine with the error"}  # fmt: skip
    rows = [row for row in diagnostics(folder) if row["method"]]
    every = list(dict.fromkeys(row["sigma"] for row in rows))
    levels = [every[0], every[len(every) // 2], every[-1]]
    at = ", ".join(f"{float(sigma):.3g}" for sigma in levels)
    lines = [f"| branch, at σ_t {at} | {' | '.join(labels.values())} |", f"| --- |{' ---: |' * len(labels)}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_it = [row for row in rows if row["method"] == method]
        texts = [", ".join("–" if (value := mean(of_it, name, sigma)) != value else f"{value:.2f}".replace("-", "−")
                           for sigma in levels) for name in labels]  # fmt: skip
        lines.append(f"| {method.removesuffix(' alone')} | {' | '.join(texts)} |")
    return lines


def diagnostics(folder: Path) -> list[dict[str, str]]:
    with (folder / "diagnostics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean(rows: Sequence[Mapping[str, str]], quantity: str, sigma: str) -> float:
    """Over the sites; nan where nothing acts."""
    chosen = [row["value"] for row in rows if (row["quantity"], row["sigma"]) == (quantity, sigma)]
    values = [float(value) for value in chosen if value]
    return sum(values) / len(values) if values else float("nan")


def replaced(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with `lines` between the markers of `name`."""
    if name not in marks.texts(text):
        raise ValueError(f"no <!-- {name}: begin --> … <!-- {name}: end --> to write between")
    return marks.written(text, {name: "\n".join(lines)})


def begun(text: str) -> list[str]:
    """The part of this name, else those whose names begin so."""
    names = [part.name for part in PARTS]
    return [text] if text in names else [name for name in names if name.startswith(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="images per setting")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="parts, by the start of a name: " + ", ".join(p.name for p in PARTS))
    parser.add_argument("--n-bootstrap", type=int, default=100, help="bootstrap samples")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    page, figures = args.docs / "effects.md", args.docs / "effects"
    figures.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if args.only is None or any(p.name in begun(o) for o in args.only)]
    if not parts:
        parser.error(f"no part begins with {args.only}; there are {', '.join(p.name for p in PARTS)}")
    if args.only is None:
        for name, measure in {"floor": floor, "unrestored": unrestored}.items():
            replace_file(page, replaced(page.read_text(), name, measure(args.count)).encode())
    for part in parts:
        folder = evaluate(part, args.count, args.workers, args.out, args.n_bootstrap)
        words = shlex.join([*part.command(args.count), f"n_bootstrap={args.n_bootstrap}"])
        call = f"`python experiments/evaluate.py {words}`"
        lines = {part.name: [call, "", *table(folder, part.rank, part.columns)]}
        if part.name == "branches":
            lines |= {"attention": attention_table(folder), "directions": direction_table(folder)}
        for name, section in lines.items():
            replace_file(page, replaced(page.read_text(), name, section).encode())
        figure = next(path for name in ("ranking", "quality") if (path := folder / "figures" / f"{name}.png").exists())
        shutil.copyfile(figure, figures / f"{part.name}.png")
        print(f"{part.name}: {folder}", flush=True)


if __name__ == "__main__":
    main()
