"""What the tests of tests/gpu share: the device, the mark, mini on it, settings of conf/, notes of what was measured.

SEGRESEARCH_TEST_DEVICE=cpu runs the same code at small sizes without a GPU, which proves the tests, not the device.
SEGRESEARCH_TEST_NOTES=FILE takes a JSON line for every number noted and every test that ended.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from segresearch.config import GenerateConfig, conf_dir, settings
from segresearch.generate import generate
from segresearch.models import StableDiffusion, load_model
from segresearch.models.compute import Compute

DEVICE = os.environ.get("SEGRESEARCH_TEST_DEVICE", "cuda")
REAL = DEVICE.startswith("cuda")
ABSENT = "no GPU here: torch finds no CUDA device"
LIMIT = 120 if REAL else 600  # seconds a script
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red sphere left of a blue cube", "two yellow cubes")

gpu = [pytest.mark.gpu, pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason=ABSENT)]
only_cuda = pytest.mark.skipif(not REAL, reason="of CUDA alone: another device has nothing to capture or count")


def note(name: str, value: Any, **more: Any) -> None:
    """Add a number that was measured to the notes, if they are kept."""
    line = {"name": name, "value": value, **more}
    if path := os.environ.get("SEGRESEARCH_TEST_NOTES"):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def mini(device: str = DEVICE, dtype: torch.dtype = torch.float32, **compute: Any) -> StableDiffusion:
    """mini with its two ControlNets; `compute`: of `Compute`."""
    return load_model("mini", dtype, device, ["canny", "depth"], compute=Compute(**compute))


def composed(*overrides: str) -> GenerateConfig:
    """The typed settings of generate.py under these overrides."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return settings(compose("generate", overrides=list(overrides)))


def pictures(sd: StableDiffusion, out: Path, *overrides: str, steps: int = 4) -> np.ndarray:
    """The pictures (n, h, w, 3) uint8 that generate.py makes with this model: two prompts, a seed each."""
    prompts = "prompts=[" + ",".join(f'"{p}"' for p in PROMPTS) + "]"
    fixed = (f"out={out}", f"steps={steps}", prompts, "seeds=3-4", "pairing=zip")
    run = generate(composed(*fixed, *overrides), sd)
    return np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted((run.folder / "images").rglob("*.png"))])


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two sets of uint8 pictures, of 255."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def conf(group: str, without: Sequence[str] = ()) -> list[str]:
    """The options of a group of conf/."""
    return [name for p in sorted((conf_dir() / group).glob("*.yaml")) if (name := p.stem) not in without]


def wait() -> None:
    """Until the device has done all it was given."""
    if REAL:
        torch.cuda.synchronize()


class Clock:
    """Seconds inside, the device's work included: `with Clock() as clock: ...; clock.seconds`."""

    def __enter__(self) -> "Clock":
        wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        wait()
        self.seconds = time.perf_counter() - self.start


def script(name: str, out: Path, *arguments: str) -> str:
    """What experiments/`name`.py printed; its seconds are noted. AssertionError, with its last errors, if it failed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *arguments]
    with Clock() as clock:
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=LIMIT,
                              env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    assert done.returncode == 0, f"{name}.py ended with {done.returncode}: {last}\n{done.stderr[-2000:]}"
    given = " ".join(a for a in arguments if not a.startswith("out="))
    note(f"seconds of {name}.py {given}", round(clock.seconds, 1), said=done.stdout[-300:])
    return done.stdout


def run_of(out: Path, name: str) -> Path:
    """The one run of that name below `out`."""
    (folder,) = (p for p in (out / "runs" / name).iterdir() if p.is_dir())
    return folder


def few(*arguments: str) -> tuple[str, ...]:
    """Arguments of the small run that a CPU makes of it."""
    return () if REAL else arguments
