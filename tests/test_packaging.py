"""The package as it is installed: a light import, one version everywhere, pins that are names and versions only."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import segresearch
from segresearch.sampling.kdiffusion import MODULES, VERSION

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*(ROOT / "experiments").glob("*.py")]  # a script finds its neighbours as modules, and benchmarks/ these
LINUX = {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64", "platform_system": "Linux",
         "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip


def test_import_is_light():
    heavy = "import sys, segresearch; print(sorted({'torch', 'numpy', 'transformers', 'hydra'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A new environment with the wheel in it: the folder of its programs. Other packages are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, ROOT], check=True)
    (built,) = folder.glob("segresearch-*-py3-none-any.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, built], check=True)
    (site,) = (folder / "env").glob("lib/python3*/site-packages")
    others = sysconfig.get_path("purelib")  # behind the wheel; no .pth in it is read, so no editable install either
    (site / "others.pth").write_text(f"{others}\n")
    return python.parent


@pytest.mark.slow
def test_the_wheel_works_in_a_new_environment_outside_the_repository(wheel, tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words):
        done = subprocess.run([wheel / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, said, error = run("python", "-c", "import segresearch; print(segresearch.__file__)")
    assert Path(said.strip()).is_relative_to(wheel.parent), error
    assert Path(said.strip()).with_name("py.typed").is_file()
    code, said, error = run("segresearch", "generate", "experiment=demo", "seeds=0", "steps=1", "device=cpu")
    assert code == 0, error
    (grid,) = tmp_path.glob("runs/demo/*/grid.png")
    assert len([*grid.parent.glob("images/*/*/*.png")]) > 5 and (tmp_path / "runs" / "latest" / "grid.png").is_file()
    assert run("segresearch", "generate", "experiment=demo", "seeds=0", "steps=1", "device=cpu")[1].startswith("all ")
    code, said, error = run("segresearch", "models")
    assert code == 0 and "  mini " in said, error
    assert run("segresearch", "--help")[1] == run("python", "-m", "segresearch", "--help")[1] != ""
    for command in ("generate", "evaluate", "analyze"):
        code, said, error = run("segresearch", command, "--help")
        assert code == 0 and f"segresearch {command} " in said and "python experiments/" not in said, error
    code, said, error = run("segresearch", "train-mini", "nothing")
    assert code == 2 and "train_unet" in error and "effects" not in error and error.count("\n") == 1
    quick = ("--images", "64", "--steps", "2", "--batch", "8", "--runs", "trained")
    code, said, error = run("segresearch", "train-mini", "train", *quick)
    assert code == 0 and (tmp_path / "trained" / "exported" / "model_index.json").is_file(), error


def test_one_version():
    assert re.search(rf"^version: {re.escape(segresearch.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_constraints_pin_every_dependency_once_on_every_python():
    text = (ROOT / "constraints.txt").read_text()
    pins = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)) and not (pin.url or pin.extras) for pin in pins)
    assert {str(pin.specifier) for pin in pins if pin.name == "k-diffusion"} == {f"=={VERSION}"}
    wanted = declared("test", "metrics", "notebooks", "dashboards", "dev") - {"segresearch"}
    for minor in range(11, 15):
        for patch in (0, 9):
            python = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.{patch}"}
            names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(LINUX | python)]
            assert len(names) == len(set(names)) and wanted <= set(names)


def test_every_import_is_a_dependency_and_every_dependency_is_imported():
    k_diffusion = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    opened = [k_diffusion / f"{module}.py" for module in MODULES]
    package = [path for folder in ("segresearch", "experiments") for path in (ROOT / folder).rglob("*.py")]
    optional = {  # a file that imports packages of an extra, and names it where they are absent -> them
        "dashboard.py": ("dashboards", {"wandb-workspaces"}),
        "metrics/features.py": ("metrics", {"torch-fidelity"}),
        "metrics/lpips.py": ("metrics", {"lpips"}),
        "../experiments/docs/notebooks.py": ("notebooks", {"nbclient", "nbconvert", "jupytext", "pygments"}),
    }
    files = [(ROOT / "segresearch" / name).resolve() for name in optional]
    needed = distributions([path for path in package if path not in files] + opened)
    assert needed == declared() - {"k-diffusion"}  # the door opens it without importing it by name
    for file, (extra, packages) in zip(files, optional.values(), strict=True):
        assert distributions([file], optional=True) - needed == packages <= declared(extra)
    assert distributions([*(ROOT / "benchmarks").rglob("*.py")]) <= declared("test")


@pytest.mark.parametrize("version", ["3.9.2", "3.10.14"])
def test_make_refuses_an_older_python(tmp_path, version):
    script(tmp_path / "old", f'[ "$1" = --version ] && echo Python {version}')
    code, said = make(tmp_path, "PYTHON=./old")
    assert code == 2 and not (tmp_path / ".venv").exists()
    assert said.startswith("Python 3.11 or newer, with its venv module, was not found. Looked at:\n  ./old: Python")
    assert f"  ./old: Python {version}\n" in said


def test_make_takes_the_newest_python_that_suits(tmp_path):
    script(tmp_path / "python3.14", "exit 1")
    for name in ("python3.13", "python3.12", "python3"):
        script(tmp_path / name, f'[ "$1" = -c ] || {{ echo {name} $* >&2; exit 1; }}')
    assert make(tmp_path)[1].startswith("python3.13 -m venv --clear .venv\n")


def script(path: Path, lines: str) -> None:
    """A shell script that stands for a Python."""
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def make(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and standard error of `make demo` in a folder with nothing but what make reads, and its scripts."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    own = {"PATH": f"{folder}:{os.environ['PATH']}"}
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "demo", *words], cwd=folder, env=outer | own, capture_output=True, text=True)
    return done.returncode, done.stderr


def declared(*extras: str) -> set[str]:
    """The names of the distributions that pyproject.toml requires, with those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return {canonicalize_name(Requirement(line).name) for line in lines}


def distributions(paths: list[Path], optional: bool = False) -> set[str]:
    """The distributions whose modules these files import anywhere, Python's own and the files' own left out. optional:
    they need not be installed; one that is not has the name of its module."""
    tops = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                tops.add(node.module.partition(".")[0])
    neighbours = [path for path in [*paths, *SCRIPTS] if not path.is_relative_to(ROOT / "segresearch")]
    tops -= {*sys.stdlib_module_names, "segresearch", "experiments", *(path.stem for path in neighbours)}
    installed = importlib.metadata.packages_distributions()
    assert optional or tops <= installed.keys()
    return {canonicalize_name(installed.get(top, [top])[0]) for top in tops}
