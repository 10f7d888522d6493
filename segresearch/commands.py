"""What `segresearch COMMAND` and experiments/COMMAND.py run: the functions that read the command line. Light: no torch.

The three of runs are Hydra's (`cli.command`), the others argparse's.
"""

import dataclasses
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from segresearch.cli import Arguments, command, one_line_errors, one_line_usage
from segresearch.errors import ConfigError
from segresearch.run_index import note

MINI = Path("experiments", "mini")  # in the repository; in a wheel below segresearch/training


def _run(config: Any, kind: str, module: str) -> None:
    """Checks the settings, as those of a class of `config.schema`; then makes what is missing of the run, by the
    function of `module` that has its name. A slip shows before anything heavy is imported."""
    from segresearch.config import schema, settings

    run = settings(config, getattr(schema, kind))
    run = dataclasses.replace(run, out=str(Path(run.out).expanduser()))
    done = getattr(import_module(module), module.rpartition(".")[2])(run)
    note(done.folder, run.out)
    print(done)


@command("generate")
def generate(config: Any) -> None:
    """Images and their grid."""
    _run(config, "GenerateConfig", "segresearch.generate")


@command("evaluate")
def evaluate(config: Any) -> None:
    """Images of several methods, measured."""
    _run(config, "EvaluateConfig", "segresearch.evaluation.evaluate")


@command("analyze")
def analyze(config: Any) -> None:
    """The attention of some images, measured."""
    _run(config, "AnalyzeConfig", "segresearch.analysis.analyze")


@one_line_errors()
def overview() -> None:
    parser = Arguments(description="All runs of an experiment in one table; without a name, all runs.")
    parser.add_argument("name", nargs="?", help="the experiment, as the runs' folder is called")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    args = parser.parse_args()
    from segresearch.evaluation import compare_runs

    if not Path(args.out).is_dir():
        raise ConfigError(f"{args.out}: no such folder; --out is where runs lie")
    if args.name is None:
        from segresearch.run_index import lines

        for line in lines(args.out):
            print(f"{args.out}/{line.name}/{line.folder}: {line.words}")
        return
    table = compare_runs.overview(args.name, args.out)
    paths = compare_runs.write(table, args.out)
    print(table.markdown())
    print("\n".join(map(str, paths)))


@one_line_errors()
def reproduce() -> None:
    parser = Arguments(description="Makes a PNG again from the record in it, and compares the two.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", help="the model, where it is not in the recorded place")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write the new image to this file")
    parser.add_argument("--out", type=Path, help="where runs lie: a figure is taken from its run, if that is there")
    parser.add_argument(
        "--trust", action="store_true", help="open the files and call the functions that the record names"
    )
    args = parser.parse_args()

    from segresearch import reproduce as module

    if args.save is not None:
        refuse_place(args.save, args.image)
    record = module.recorded(args.image)  # a slip shows before anything heavy is imported
    if args.device != "auto":
        from segresearch.config.build import usable_device

        usable_device(args.device)
    reproduction = module.reproduce(args.image, args.model, args.device, args.out, args.trust)
    if args.save is not None:
        from segresearch.records import save_png

        save_png(reproduction.image, args.save, record)
    print(reproduction)


def refuse_place(path: Path, image: Path) -> None:
    """ConfigError for a --save that is no .png file, lies in no folder, or is the image itself."""
    for fault, holds in {
        "a folder; give the name of a .png file": path.is_dir(),
        "what is written is a PNG; give a name that ends in .png": path.suffix.lower() != ".png",
        "the image itself; give another name": path.exists() and path.resolve() == image.resolve(),
    }.items():
        if holds:
            raise ConfigError(f"--save {path}: {fault}")


@one_line_errors()
def dashboard() -> None:
    parser = Arguments(description="A W&B workspace or report of an experiment, as code.")
    parser.add_argument("name", help="the experiment, as the runs' folder is called")
    parser.add_argument("--kind", choices=["workspace", "report"], default="workspace")
    parser.add_argument("--out", default="runs", help="where runs lie (default: runs)")
    parser.add_argument("--project", default="segresearch", help="of W&B, as in wandb.project of the runs")
    parser.add_argument("--entity", default="", help="of W&B: a user or a team")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write it to this file instead of printing it")
    parser.add_argument("--publish", action="store_true", help="save it at W&B (needs an account)")
    args = parser.parse_args()

    from segresearch import runs
    from segresearch.dashboard import build, metrics_of, publish, spec

    view = build(args.kind, args.name, metrics_of(args.name, args.out), args.project, args.entity)
    text = json.dumps(spec(view), indent=1, ensure_ascii=False) + "\n"
    if args.save is not None:
        runs.write(args.save, text)
    if args.publish:
        print(publish(view))
    elif args.save is None:
        print(text, end="")


@one_line_errors()
def train_mini() -> None:
    package = Path(__file__).resolve().parent
    root = next((root for root in (package.parent, package / "training") if (root / MINI / "train.py").is_file()), None)
    if root is None:
        raise ConfigError(f"no training scripts in {package.parent / MINI} or {package / 'training' / MINI}")
    scripts = (root / MINI).glob("*.py")
    parts = sorted(path.stem for path in scripts if "def main" in path.read_text(encoding="utf-8"))
    parser = Arguments(description="Trains a part of the embedded model; `train` runs all of them in turn.")
    parser.add_argument("part", choices=parts, help="what to run; PART --help has its options")
    part = parser.parse_args(sys.argv[1:2]).part
    sys.path.insert(0, str(root))
    sys.argv = [f"{parser.prog} {part}", *sys.argv[2:]]
    with one_line_usage():
        runpy.run_module(f"experiments.mini.{part}", run_name="__main__")


@one_line_errors()
def models() -> None:
    parser = Arguments(
        description="The models that can be named here: model=NAME of the configs, and model.path=ID of the hub cache."
    )
    parser.add_argument("--cache", type=Path, help="the folder of the hub cache (default: that of huggingface_hub)")
    args = parser.parse_args()
    if args.cache is not None and not args.cache.is_dir():
        raise ConfigError(f"{args.cache}: no such folder; --cache is the folder `hub` of the hub cache")
    from segresearch.model_list import cached, configured

    print("\n".join([*configured(), *cached(args.cache)]))
