"""Train every part of mini within a given time: scenes, VAE, CLIPs, UNets, ControlNets, classifier, and the export.

    python -m experiments.mini.train --device cuda --minutes 9         # one GPU, and all cores to render the scenes
    python -m experiments.mini.train --device cpu --hours 6            # at low priority, beside other work
    python -m experiments.mini.train --images 64 --steps 2 --batch 8   # the short form, as a test

Parts run side by side where cores are free and what they need is there (`parts`). A training takes its share of the
time: it measures its speed on its first steps and then keeps to the number of steps that follows (`common.Plan`). The
same command resumes a stopped run, to the same weights once that number is there. Each part has a log in
<runs>/parts, and a file that says it is done.

The weights go to <runs>/exported, in the layout of segresearch/weights/mini, each file below 17 MB.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from experiments.mini.common import read_json, replace_file
from experiments.mini.render import SHARD
from segresearch.cli import one_line_errors

# Share of the time that each training gets. VAE and CLIPs run side by side, and so do the last four, after the UNet.
SHARES = {"vae": 0.15, "clip": 0.15, "unet": 0.48, "unet_weak": 0.2, "canny": 0.2, "depth": 0.2, "attributes": 0.2}
IMAGES = {"cpu": 40 * SHARD, "cuda": 72 * SHARD}
# rows and highest learning rate of a training on a GPU; on a CPU those of its script
LARGE = {"vae": (64, 2e-3), "clip": (512, 1.5e-3), "unet": (2048, 2e-3), "unet_weak": (1024, 2e-3),
         "canny": (256, 1.5e-3), "depth": (256, 1.5e-3), "attributes": (256, 3e-3)}  # fmt: skip
FORK = multiprocessing.get_context("fork")  # a part starts at once, with all imported; nothing here touches a GPU


@dataclass(frozen=True)
class Part:
    """A script of this folder with its arguments. processes: of it, which share its work."""

    name: str
    script: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    processes: int = 1


def parts(args: argparse.Namespace) -> list[Part]:
    """All parts, each after those that it needs."""
    runs, images, cores = args.runs, str(args.images), args.cores
    few = str(min(args.images, 4 * SHARD))
    maps = str(min(args.images, 32 * SHARD))
    workers = cores if args.device == "cpu" else 1

    def training(name: str, script: str, *arguments: str, needs: Sequence[str], processes: int = 1) -> Part:
        amount = ["--steps", str(args.steps)] if args.steps else ["--seconds", f"{SHARES[name] * args.seconds:.0f}"]
        batch, peak = LARGE[name] if args.device != "cpu" else (None, None)
        options = {"--device": args.device, "--batch": args.batch or batch, "--peak": peak}
        more = [text for key, value in options.items() if value is not None for text in (key, str(value))]
        return Part(name, script, (*arguments, *amount, *more), tuple(needs), processes)

    def shared(name: str, script: str, *arguments: str, needs: Sequence[str] = ()) -> list[Part]:
        """One part for each core, of every n-th shard."""
        n = min(cores, -(-args.images // SHARD))
        return [Part(f"{name}-{k}", script, (*arguments, "--part", f"{k}/{n}"), tuple(needs)) for k in range(n)]

    render = shared("render", "render", "--out", f"{runs}/scenes", "--images", images, "--maps", maps)
    tokens = shared("tokens", "encode", "tokens", "--runs", runs, "--images", images, needs=["tokenizer"])
    latents = shared(
        "latents", "encode", "latents", "--runs", runs, "--images", images, "--device", args.device, needs=["vae"]
    )
    scenes, texts, encoded = ([part.name for part in group] for group in (render, tokens, latents))
    folder = ["--runs", runs, "--images"]
    return [
        Part("tokenizer", "tokenizer", ("--out", f"{runs}/tokenizers")),
        *render,
        *tokens,
        training("vae", "train_vae", "--scenes", f"{runs}/scenes", "--out", f"{runs}/vae", "--images", few,
                 needs=scenes),
        training("clip", "train_clip", *folder, images, "--out", f"{runs}/clip", needs=[*scenes, *texts]),
        *latents,
        training("unet", "train_unet", *folder, images, "--out", f"{runs}/unet", needs=["clip", *encoded],
                 processes=workers),
        training("unet_weak", "train_unet", *folder, maps, "--out", f"{runs}/unet_weak", "--width", "32",
                 "--depth", "2", needs=["unet"]),
        *(training(kind, "train_controlnet", kind, *folder, maps, needs=["unet"]) for kind in ("canny", "depth")),
        training("attributes", "train_attributes", "--scenes", f"{runs}/scenes", "--out", f"{runs}/attributes",
                 "--images", maps, needs=["unet"]),
        Part("export", "export", ("--runs", runs, "--out", f"{runs}/exported"),
             ("unet_weak", "canny", "depth", "attributes")),
    ]  # fmt: skip


def run_script(script: Callable[[], None], part: Part, rank: int, port: int, log: Path) -> None:
    """In a process of its own: the script, with its output in the log."""
    sys.argv = [part.script, *part.arguments]
    file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    if part.processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(part.processes), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    script()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(every: Sequence[Part], runs: Path, cores: int) -> None:
    """Run the parts that are not done, side by side where cores are free. SystemExit, with the end of its log, for one
    that fails; the others are stopped, and resume with the next call. Ended(4) for a damaged file of a part."""
    folder = runs / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    commands = {part.name: [text.replace(str(runs), "<runs>") for text in part.arguments] for part in every}
    done = {name for name, command in commands.items() if _content(folder / f"{name}.json") == command}
    left = [part for part in every if part.name not in done]
    scripts = {part.script: importlib.import_module(f"experiments.mini.{part.script}") for part in left}  # then fork
    running: dict[str, list[Any]] = {}
    start = time.monotonic()
    try:
        while left or running:
            for part in list(left):
                busy = sum(map(len, running.values()))
                if done.issuperset(part.needs) and busy + part.processes <= max(cores, part.processes):
                    left.remove(part)
                    port, log = free_port(), folder / f"{part.name}.log"
                    workers = range(part.processes)
                    running[part.name] = [
                        FORK.Process(target=run_script, args=(scripts[part.script].main, part, k, port, log))
                        for k in workers
                    ]
                    for process in running[part.name]:
                        process.start()
                    print(f"[{time.monotonic() - start:7.1f} s] {part.name}", flush=True)
            wait([process.sentinel for some in running.values() for process in some])
            for name, some in list(running.items()):
                if failed := next((p.exitcode for p in some if p.exitcode), None):
                    text = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
                    raise SystemExit(f"{name} failed (exit code {failed}): {text[-1] if text else 'no output'}; "
                                     f"its log is {folder / f'{name}.log'}")  # fmt: skip
                if all(process.exitcode == 0 for process in some):
                    del running[name]
                    done.add(name)
                    replace_file(folder / f"{name}.json", json.dumps(commands[name]).encode())
    finally:
        for process in (process for some in running.values() for process in some):
            process.terminate()
            process.join()
    print(f"[{time.monotonic() - start:7.1f} s] done", flush=True)


def _content(path: Path) -> Any:
    return read_json(path) if path.exists() else None


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/mini", help="folder of all parts; the same folder resumes")
    parser.add_argument("--device", default="cpu", help="of the trainings")
    parser.add_argument("--minutes", type=float, help="of the whole")
    parser.add_argument("--hours", type=float, help="of the whole, in place of --minutes")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--images", type=int, help=f"scenes; default {IMAGES['cpu']:,}, on a GPU {IMAGES['cuda']:,}")
    parser.add_argument("--steps", type=int, help="of every training, in place of its share of the time")
    parser.add_argument("--batch", type=int, help="rows of every training, in place of each one's own")
    args = parser.parse_args()
    if (args.minutes is None) + (args.hours is None) + (args.steps is None) != 2:
        parser.error("give one of --minutes, --hours and --steps")
    args.images = args.images or IMAGES["cpu" if args.device == "cpu" else "cuda"]
    args.seconds = 60 * (args.minutes or 60 * (args.hours or 0))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.device == "cpu":
        os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command resumes"))
    args.runs = str(Path(args.runs))
    run(parts(args), Path(args.runs), args.cores)


if __name__ == "__main__":
    main()
