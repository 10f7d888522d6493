"""Generate end to end on a tiny random model: nothing twice, resumable, the same in any batch, recorded in each PNG."""

import dataclasses
import errno
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import contents
from omegaconf import OmegaConf
from PIL import Image

from segresearch import cli, records, runs
from segresearch.config import GenerateConfig, settings, typed
from segresearch.generate import generate

module = sys.modules["segresearch.generate"]  # the package has a function of that name

SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}


@pytest.fixture
def config(folder, tmp_path):
    given = {
        "model": {"name": "tiny", "path": str(folder)},
        "sampler": {"name": "euler_ancestral"},
        "schedule": {"name": "leading"},
        "compare": [{"terms": {"cfg": {"kind": "cfg", "weight": 3}, "seg": SEG}}],
        "guidance": {"label": "SAG", "sag": {"scale": 0.75}},
        "prompts": ["", "red"],
        "seeds": "0-1",
        "steps": 2,
        "batch_size": 3,
        "device": "cpu",
        "out": str(tmp_path / "runs"),
    }
    return typed(GenerateConfig, given)


def test_twice_does_nothing_twice_and_does_not_load_the_model(config, model, monkeypatch):
    first = generate(config, model)
    assert (first.sampled, first.existing) == (8, 0) and first.grid.is_file() and "images/s" in str(first)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    assert len(before) == 8 + 3  # the grid, the page and config.yaml
    monkeypatch.setattr("segresearch.generate.configured_model", None)
    second = generate(config)
    assert (second.sampled, second.existing) == (0, 8) and second.folder == first.folder
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}


def test_the_same_command_twice_at_once_samples_each_image_once(config, model, monkeypatch):
    """The second waits until the first has ended, and finds all its images."""
    sampled, ended, second = [], [], threading.Event()
    sample_missing = module.sample_missing
    thread = threading.Thread(target=lambda: ended.append(generate(config, model)))

    def noting(run, missing, *rest):
        sampled.append(len(missing))
        if len(sampled) > 1:
            second.set()
        else:
            thread.start()
            second.wait(60)
        return sample_missing(run, missing, *rest)

    monkeypatch.setattr(module, "sample_missing", noting)
    monkeypatch.setattr(runs, "print", lambda *_, **__: second.set(), raising=False)  # that it waits
    first = generate(config, model)
    thread.join(60)
    assert sampled == [8] and second.is_set() and (ended[0].sampled, ended[0].existing) == (0, 8)
    assert ended[0].folder == first.folder


def test_a_finished_run_is_shown_where_nothing_can_be_written(config, model, monkeypatch):
    first = generate(config, model)

    def locked(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    for owner, name in ((os, "replace"), (Path, "mkdir"), (Path, "unlink"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, locked)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(module, "configured_model", None)
    again = generate(config)
    assert (again.sampled, again.existing, again.folder) == (0, 8, first.folder)
    with pytest.raises(PermissionError):  # before a model is loaded
        generate(dataclasses.replace(config, seeds="0-2"))


def test_each_png_says_how_it_was_made(config, model):
    run = generate(config, model)
    path = run.folder / "images" / "cfg-3-seg-2-sigma-inf" / "prompt1-seed1.png"
    said = records.read_record(path)
    expected = {
        "prompt": "red",
        "seed": 1,
        "negative": None,
        "steps": 2,
        "method": "CFG 3 + SEG 2 σ=∞",
        "run": run.folder.name,
    }
    assert expected.items() <= said.items()
    assert (
        said["guidance"]["terms"]["seg"]["perturbation"]["sigma"] == "inf"
        and said["sampler"]["name"] == "euler_ancestral"
    )
    assert len(said["model"]["fingerprint"]) == 12 and said["code"]
    again = typed(GenerateConfig, {
        **{key: said[key] for key in ("sampler", "schedule", "steps", "size", "guidance", "negative")},
        "prompts": [said["prompt"]],
        "seeds": said["seed"], "device": "cpu", "out": str(run.folder.parent / "again"),
        "model": {key: value for key, value in said["model"].items() if key != "fingerprint"},
    })  # fmt: skip
    alone = generate(again, model)
    (made,) = (alone.folder / "images").rglob("*.png")
    assert np.abs(np.asarray(Image.open(made)).astype(int) - np.asarray(Image.open(path)).astype(int)).max() <= 1


def test_config_yaml_of_a_run_is_the_run(config, model, tmp_path):
    run = generate(config, model)
    text = (run.folder / "config.yaml").read_text()
    given = settings(OmegaConf.create(text))
    again = generate(dataclasses.replace(given, out=config.out), model)
    assert again.folder == run.folder and again.sampled == 0 and (run.folder / "config.yaml").read_text() == text


def test_images_do_not_depend_on_the_batch(config, model, tmp_path):
    runs = [generate(dataclasses.replace(config, batch_size=n, out=str(tmp_path / str(n))), model) for n in (1, 3, 4)]
    assert len({run.folder.name for run in runs}) == 1  # one identity
    images = [
        np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((run.folder / "images").rglob("*.png"))])
        for run in runs
    ]
    assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() <= 1
    rows = images[0].reshape(len(images[0]), -1)
    assert len(np.unique(rows, axis=0)) == len(rows)  # no two images alike


def test_a_stopped_run_resumes_to_the_same_bytes(config, model, tmp_path, monkeypatch):
    whole = generate(dataclasses.replace(config, out=str(tmp_path / "whole")), model)
    save, calls = records.save_png, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # in the middle of the second batch
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr("segresearch.generate.save_png", interrupted)
    with pytest.raises(KeyboardInterrupt, match="^stopped: 4 of 8 images sampled, and kept$"):
        generate(config, model)
    monkeypatch.setattr("segresearch.generate.save_png", save)
    resumed = generate(config, model)
    assert (resumed.sampled, resumed.existing) == (4, 4)
    assert contents(resumed.folder) == contents(whole.folder)
    damaged = next((resumed.folder / "images").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert generate(config, model).sampled == 1 and contents(resumed.folder) == contents(whole.folder)


def test_the_identity_is_of_what_images_depend_on(config, model, folder, tmp_path):
    def place(**changes) -> str:
        return generate(dataclasses.replace(config, **{"seeds": "0", "compare": (), **changes}), model).folder.name

    base = place()
    renamed = dataclasses.replace(config.model, name="other")
    assert base == place(batch_size=1) == place(out=str(tmp_path / "b")) == place(model=renamed)
    assert (
        len({base, place(steps=3), place(seeds="1"), place(prompts=("",)), place(size=(16, 8)), place(negative="blue")})
        == 6
    )


def test_images_that_are_not_square_and_panels_in_one_grid(config, model):
    panels = typed(GenerateConfig.__annotations__["panels"], [
        {"title": "Plain", "prompts": [""], "compare": [{}]},
        {"title": "Perturbed", "pairing": "zip", "seeds": [4, 5], "compare": [{}, {"terms": {"seg": SEG}}]},
    ], "panels")  # fmt: skip
    run = generate(dataclasses.replace(config, size=(16, 24), panels=panels), model)
    assert run.sampled == 2 + 4
    assert {Image.open(path).size for path in (run.folder / "images").rglob("*.png")} == {(24, 16)}
    assert sorted(os.listdir(run.folder / "images")) == ["1-plain", "2-perturbed"]
    grid = Image.open(run.grid)
    assert grid.width > 3 * 144 and grid.height > 3 * 96


def test_the_grid_alone_is_drawn_anew_where_only_its_look_changes(config, model):
    run = generate(config, model)
    old = run.grid.read_bytes()
    again = generate(dataclasses.replace(config, grid=dataclasses.replace(config.grid, cell=64, rows=2)), model)
    assert again.sampled == 0 and again.folder == run.folder and again.grid.read_bytes() != old


def test_what_the_model_cannot_do_is_said_before_an_image_is_made(config, model):
    for change in (
        {"size": (15, 16)},
        {
            "guidance": typed(
                type(config.guidance), {"terms": {"a": {**SEG, "perturbation": {"kind": "seg", "where": "middle"}}}}
            )
        },
        {"device": "cuda:99"},
    ):
        with pytest.raises(ValueError) as caught:
            generate(dataclasses.replace(config, **change), None if "device" in change else model)
        code, line = cli.explained(caught.value)
        assert code == 2 and "\n" not in line
    assert not list(Path(config.out, "generate").iterdir())  # not even a folder is left


def test_a_full_disk_and_a_locked_folder_are_one_line(config, model, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x.png")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError) as caught:
        generate(config, model)
    code, line = cli.explained(caught.value)
    assert code == 5 and "free some room" in line
    assert not [p for p in Path(config.out).rglob("*") if p.name.endswith((".tmp", ".png"))]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        generate(dataclasses.replace(config, out=str(tmp_path / "file")), model)
    code, line = cli.explained(caught.value)
    assert code == 2 and line
