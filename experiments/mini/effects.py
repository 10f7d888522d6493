"""Measure the effects of guidance on mini: several evaluations, whose tables and figures go into docs/effects.md.

    python -m experiments.mini.effects                    # 2,000 images per method; resumes a stopped run
    python -m experiments.mini.effects --only control     # some parts; the tables of the others stay
"""

import argparse
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.mini.common import replace_file
from segresearch.config.expand import HELD_OUT
from segresearch.evaluation.frame import METRICS
from segresearch.metrics.features import load_extractor
from segresearch.metrics.frechet import frechet_distance, gaussian
from segresearch.models import load_model
from segresearch.sample_images import to_uint8
from segresearch.scenes.scenes import scenes

SCRIPT = Path(__file__).resolve().parents[1] / "evaluate.py"
REFERENCE = range(HELD_OUT + 100_000, HELD_OUT + 110_000)  # as in conf/metrics/mini.yaml
COLUMNS = {"fd-mini": "FD", "fd_to_baseline-mini": "− baseline", "fd_means-mini": "means", "variance-mini": "variance",
           "precision-mini": "precision", "recall-mini": "recall", "distance-mini": "distance",
           "text_alignment-mini": "cosine", "count": "count", "colors": "colours", "shapes": "shapes",
           "objects": "objects", "objects_chance": "(chance)", "exact": "exact", "edges": "edges", "cost": "cost",
           "saturation": "saturation", "contrast": "contrast"}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One evaluation: its name on the page, its overrides, and whether it takes half the images (the wider sweeps)."""

    name: str
    overrides: tuple[str, ...]
    half: bool = False

    def command(self, count: int) -> list[str]:
        return [*self.overrides, "preset=quick", f"images={count // 2 if self.half else count}"]


PARTS = (
    Part("table1", ("experiment=table1",)),
    Part("table2", ("experiment=table2",)),
    Part("fig15", ("experiment=fig15",)),
    Part("cfg2", ("guidance=seg_cfg", "guidance.terms.cfg.weight=2", "prompts=scene:0-", "name=cfg2",
                  "compare=[{guidance:cfg,terms:{cfg:{weight:2}}}]")),
    Part("cfg4", ("guidance=seg_cfg", "guidance.terms.cfg.weight=4", "prompts=scene:0-", "name=cfg4",
                  "compare=[{guidance:cfg,terms:{cfg:{weight:4}}}]")),
    Part("control-canny", ("experiment=control", "controlnet=canny")),
    Part("control-canny-text", ("experiment=control", "controlnet=canny", "prompts=scene:0-", "name=control_text")),
    Part("control-depth", ("experiment=control", "controlnet=depth")),
    Part("control-depth-text", ("experiment=control", "controlnet=depth", "prompts=scene:0-", "name=control_text")),
    Part("intervals", ("experiment=intervals",), half=True),
    Part("fig6", ("experiment=fig6",)),
    Part("fig12", ("experiment=fig12",), half=True),
)  # fmt: skip


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


def table(folder: Path) -> list[str]:
    """The metrics of COLUMNS, from the run's metrics.csv, as markdown, one row per method."""
    with (folder / "metrics.csv").open(newline="") as file:
        cells = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    methods = dict.fromkeys(method for method, _ in cells)
    names = [name for name in COLUMNS if any((method, name) in cells for method in methods)]
    lines = [f"| method | {' | '.join(COLUMNS[name] for name in names)} |", f"| --- |{' ---: |' * len(names)}"]
    for method in methods:
        texts = [method]
        for name in names:
            value, error = cells[method, name]["value"], cells[method, name]["error"]
            digits = 1 if METRICS[name].kind.startswith("fd") else 3
            text = f"{float(value):.{digits}f}" + (f" ± {float(error):.{digits}f}" if error else "") if value else "–"
            texts.append(text.replace("-", "−"))
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def replaced(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with `lines` between the markers of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {begin} … {end} to write between")
    return pattern.sub(lambda _: "\n".join([begin, *lines, end]), text, count=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="images per method; half as many in the wider sweeps")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="parts, by the start of a name: " + ", ".join(p.name for p in PARTS))
    parser.add_argument("--n-bootstrap", type=int, default=100, help="bootstrap samples")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    page, figures = args.docs / "effects.md", args.docs / "effects"
    figures.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if args.only is None or any(p.name.startswith(o) for o in args.only)]
    if not parts:
        parser.error(f"no part begins with {args.only}; there are {', '.join(p.name for p in PARTS)}")
    if args.only is None:
        replace_file(page, replaced(page.read_text(), "floor", floor(args.count)).encode())
    for part in parts:
        folder = evaluate(part, args.count, args.workers, args.out, args.n_bootstrap)
        words = shlex.join([*part.command(args.count), f"n_bootstrap={args.n_bootstrap}"])
        call = f"`python experiments/evaluate.py {words}`"
        replace_file(page, replaced(page.read_text(), part.name, [call, "", *table(folder)]).encode())
        shutil.copyfile(folder / "figures" / "quality.png", figures / f"{part.name}.png")
        print(f"{part.name}: {folder}", flush=True)


if __name__ == "__main__":
    main()
