"""The package as it is installed: a light import, one version everywhere, pins that are names and versions only."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import segresearch

ROOT = Path(__file__).resolve().parents[1]


def test_import_is_light():
    heavy = "import sys, segresearch; print(sorted({'torch', 'numpy', 'transformers', 'hydra'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_version():
    assert re.search(rf"^version: {re.escape(segresearch.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_constraints_pin_every_dependency_by_name_and_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines) and pinned["k-diffusion"] == "0.1.1.post1"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.split(r"[^A-Za-z0-9-]", name)[0].lower() for name in wanted} - {"segresearch"}
    assert names <= pinned.keys()
