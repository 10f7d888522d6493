"""Fixtures of several test files. Every test computes on one thread, and so does every process that a test starts,
whatever OMP_NUM_THREADS says."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each subprocess compiles the package, which takes a second

import shutil  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import typecheck  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    typecheck.begin()


@pytest.fixture(scope="session", autouse=True)
def small_figures():
    """Figures of a quarter of the pixels."""
    from segresearch import plot_style

    plot_style.DPI = 80


@pytest.fixture
def unchecked():
    """Shapes are not checked, which takes a third of the time: for further runs of what another test runs checked."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def gpu():
    """`fake_cuda.fake_cuda` for the whole test."""
    from fake_cuda import fake_cuda

    with fake_cuda() as mode:
        yield mode


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model in the diffusers folder layout; no test may change it."""
    from make_models import write_folder

    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def model(folder):
    """The model of `folder`, loaded."""
    from segresearch.models import load_model

    return load_model(folder)


@pytest.fixture
def copied_folder(folder, tmp_path):
    """A copy of `folder` that a test may break."""
    return shutil.copytree(folder, tmp_path / "sdxl")


@pytest.fixture(scope="session")
def controlled_folder(tmp_path_factory):
    """A tiny random model with two ControlNets of its own, canny and depth; no test may change it."""
    from make_models import make_controlnet, make_pipeline

    folder = tmp_path_factory.mktemp("controlled") / "tiny"
    pipeline = make_pipeline(folder)
    pipeline.save_pretrained(folder)
    for seed, name in enumerate(("canny", "depth")):
        make_controlnet(pipeline, seed).save_pretrained(folder / "controlnet" / name)
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Runs a main with arguments in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def called(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr()

    return called
