"""Small work runs on one thread, whatever torch was told before, unless the caller states a number."""

import subprocess
import sys

import pytest
import torch

import segresearch.scenes.scenes as scene_module
from segresearch.metrics.frechet import frechet_distance, gaussian
from segresearch.scenes.scenes import scenes
from segresearch.threads import FEW, few_features, one_thread, one_thread_for, threads


@pytest.fixture(autouse=True)
def several():
    """Three threads before the test; one, as in every other test, after it."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@one_thread
def count(fail: bool = False) -> int:
    if fail:
        raise KeyError("broken")
    return torch.get_num_threads()


def test_one_thread_inside_and_as_many_as_before_afterwards():
    assert (count(), torch.get_num_threads()) == (1, 3)
    with pytest.raises(KeyError, match="broken"):
        count(fail=True)
    assert torch.get_num_threads() == 3


def test_a_stated_number_holds_for_small_work_too():
    with threads(2):
        assert (count(), torch.get_num_threads()) == (2, 2)
    assert (count(), torch.get_num_threads()) == (1, 3)
    with pytest.raises(KeyError), threads(2):
        count(fail=True)
    assert (count(), torch.get_num_threads()) == (1, 3)


def test_large_features_keep_their_threads():
    @one_thread_for(few_features)
    def used(features, other=None):
        return torch.get_num_threads()

    assert used(torch.zeros(1, FEW)) == 1
    assert used(torch.zeros(1, FEW + 1), other=2) == 3
    assert used(features=torch.zeros(1, FEW)) == 1


def test_scenes_are_rendered_by_one_thread(monkeypatch):
    render, inside = scene_module.render, []

    def seen(*args):
        inside.append(torch.get_num_threads())
        return render(*args)

    monkeypatch.setattr(scene_module, "render", seen)
    assert len(scenes(range(2), size=16).captions) == 2
    assert inside == [1] and torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="at least one"):
        scenes([])
    assert torch.get_num_threads() == 3


def test_the_bootstrap_is_computed_by_one_thread(monkeypatch):
    inside, eigenvalues = [], torch.linalg.eigvalsh

    def seen(matrix):
        inside.append(torch.get_num_threads())
        return eigenvalues(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", seen)
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert len(frechet_distance(features, gaussian(features), n_bootstrap=2).resamples) == 2
    assert inside == [1] * 5 and torch.get_num_threads() == 3  # the distance, two halves, two resamples


def test_processes_that_tests_start_have_one_thread():
    asked = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "1"
