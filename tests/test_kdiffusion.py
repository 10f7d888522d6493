"""The door to k-diffusion: the installed files are those that are wrapped, and nothing else is imported."""

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segresearch.sampling import SAMPLERS, k_diffusion
from segresearch.sampling.kdiffusion import CONTENT, PRIVATE, VERSION
from segresearch.sampling.loop import CONSISTENCY


def test_door_opens_without_executing_the_package():
    package = k_diffusion()
    assert package is k_diffusion() and package.__name__ == PRIVATE
    assert package.external.sampling is package.sampling
    assert issubclass(package.external.DiscreteEpsDDPMDenoiser, torch.nn.Module)
    assert "k_diffusion" not in sys.modules


def test_every_sampler_of_the_pinned_version_is_listed():
    found = {name.removeprefix("sample_") for name in dir(k_diffusion().sampling) if name.startswith("sample_")}
    assert found == {*SAMPLERS} - {*CONSISTENCY} and len(found) == 13


def test_what_is_wrapped_is_what_is_installed():
    folder = Path(k_diffusion().__path__[0])
    assert {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in CONTENT} == CONTENT
    assert importlib.metadata.version("k-diffusion") == VERSION == "0.0.16"  # the one that leaves numpy free


def test_nothing_is_imported_for_k_diffusion_that_is_not_called():
    code = "import sys; from segresearch.sampling import k_diffusion; k_diffusion(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    absent = {"k_diffusion", "clip", "cleanfid", "kornia", "jsonmerge", "skimage", "accelerate", "resize_right"}
    assert not absent & set(modules) and "torchsde" in modules


def test_absent_or_other_content_is_one_line(monkeypatch, tmp_path):
    door = k_diffusion.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"^k-diffusion is not installed; install it with: pip install k-dif\S+$"):
            door()
    copy = tmp_path / "k_diffusion"
    shutil.copytree(k_diffusion().__path__[0], copy)
    other = importlib.machinery.ModuleSpec("k_diffusion", None, is_package=True)
    other.submodule_search_locations = [str(copy)]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: other)
        patch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
        source = (copy / "external.py").read_text()
        for text in (source + "\n", None):  # changed, absent
            (copy / "external.py").write_text(text) if text else (copy / "external.py").unlink()
            with pytest.raises(ImportError, match=r"^k-diffusion 0\.1\.2 has another external\.py than 0\.0\.16, .*$"):
                door()
    assert sys.modules[PRIVATE] is k_diffusion()


def test_another_version_of_the_same_content_opens(monkeypatch, tmp_path):
    copy = tmp_path / "k_diffusion"
    shutil.copytree(k_diffusion().__path__[0], copy)
    (copy / "sampling.py").write_bytes((copy / "sampling.py").read_bytes().replace(b"\n", b"\r\n"))
    other = importlib.machinery.ModuleSpec("k_diffusion", None, is_package=True)
    other.submodule_search_locations = [str(copy)]
    for name in [name for name in sys.modules if name.partition(".")[0] == PRIVATE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.1.post1")
    package = k_diffusion.__wrapped__()
    assert package.__path__ == [str(copy)] and package is not k_diffusion()
