"""The scripts on the device, each in a process of its own: the demo, table1, analyze, ControlNet."""

import json
import os
import subprocess
import sys

import numpy as np
from gpu_models import DEVICE, REAL, ROOT, Clock, apart, gpu, note
from PIL import Image

pytestmark = gpu
LIMIT = 100 if REAL else 600  # seconds a script


def script(name: str, out, *arguments: str) -> tuple[str, float]:
    """What experiments/`name`.py printed, and its seconds. AssertionError, with the end of its errors, if it failed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *arguments]
    with Clock() as clock:
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=LIMIT,
                              env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    assert done.returncode == 0, f"{name}.py ended with {done.returncode}: {last}\n{done.stderr[-2000:]}"
    note(f"seconds of {name}.py {' '.join(arguments)}", round(clock.seconds, 1), said=done.stdout[-300:])
    return done.stdout, clock.seconds


def run_of(out, name: str):
    (folder,) = (p for p in (out / "runs" / name).iterdir() if p.is_dir())
    return folder


def few(*arguments: str) -> tuple[str, ...]:
    """Arguments of the small run that a CPU makes of it."""
    return () if REAL else arguments


def test_the_demo(tmp_path):
    said, _ = script("generate", tmp_path, "experiment=demo", f"device={DEVICE}", *few("steps=1"))
    folder = run_of(tmp_path, "demo")
    made = sorted((folder / "images").rglob("*.png"))
    assert len(made) == 80 and f"{len(made)} images made" in said
    assert (folder / "grid.png").is_file() and all(np.asarray(Image.open(p)).std() > 1 for p in made)
    again, _ = script("generate", tmp_path, "experiment=demo", f"device={DEVICE}", *few("steps=1"))
    assert f"all {len(made)} images were there already" in again


def test_under_a_controlnet_the_device_gives_the_pictures_of_the_cpu(tmp_path):
    given = ("controlnet=canny", "guidance=seg_cfg", "prompts=[a red ring]", "seeds=0-1", "steps=4")
    pictures = {}
    for place, device in (("here", "cpu"), ("there", DEVICE)):
        script("generate", tmp_path, *given, f"device={device}", f"out={tmp_path / place}", "compute.precision=exact")
        paths = sorted((tmp_path / place / "generate").rglob("seed*.png"))
        pictures[place] = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    assert len(pictures["here"]) == 4  # two pictures, two control images
    largest = apart(pictures["here"], pictures["there"])
    note("CPU against device, of 255: generate.py controlnet=canny", largest)
    assert largest <= 1


def test_table1(tmp_path):
    """`experiment=table1 pace=quick images=100`, whole: features of 10,000 real pictures, table, figures, page.

    100 pictures are fewer than the features have dimensions, hence `force`."""
    small = few("images=12", "shard=6", "batch_size=6", "steps=2", "reference=scene:100000-100149", "draws=10",
                "subsets=2")  # fmt: skip
    script("evaluate", tmp_path, "experiment=table1", "pace=quick", "images=100", "force=true", f"device={DEVICE}", "wandb.mode=off",
           *small)  # fmt: skip
    folder = run_of(tmp_path, "table1")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert (folder / "index.html").is_file() and (folder / "table.md").is_file()
    assert len({row["setting"] for row in rows}) == 5
    note("table1", (folder / "table.md").read_text()[:2000])


def test_analyze(tmp_path):
    small = few("at=[0]", "steps=2", "where=mid", "seeds=0", 'prompts=[""]')
    _, seconds = script("analyze", tmp_path, f"device={DEVICE}", *small)
    folder = run_of(tmp_path, "analyze")
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) > 10 and (folder / "verdicts.csv").is_file() and (folder / "index.html").is_file()
    assert not REAL or seconds < 90
