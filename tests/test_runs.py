"""Run folders: identities that depend on content alone, files that are never half there."""

import math
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import save_file

from segresearch import image_grid, records, runs
from segresearch.guidance import SEG


def test_digest_depends_on_content_alone():
    a = {"x": 1.0, "y": [math.inf, None], "p": SEG(2.0)}
    b = {"p": SEG(2.0), "y": (math.inf, None), "x": 1.0}
    assert runs.digest(a) == runs.digest(b)
    assert (
        len({runs.digest(v) for v in (a, {**a, "x": 2.0}, {**a, "p": SEG(3.0)}, {**a, "y": [1.0]})}) == 4
    )


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    runs.write(path, "old")
    with pytest.raises(KeyboardInterrupt), runs.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
    before = path.stat().st_mtime_ns
    runs.write(path, "old")
    assert path.stat().st_mtime_ns == before
    runs.write(path, "new")
    assert path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a loss of power may leave an empty file."""
    steps, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(f"sync {os.fstat(file).st_size}") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("rename") or replace(*names))
    runs.write(tmp_path / "table.md", "text")
    assert steps == ["sync 4", "rename"] and (tmp_path / "table.md").read_text() == "text"


def model(folder: Path, fill: float, size: int = 200_000) -> Path:
    import numpy as np

    folder.mkdir()
    save_file({"w": np.full(size, fill, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"width": 8}')
    return folder


def test_fingerprint_follows_weights_and_configs_but_not_the_place(tmp_path):
    a, b, other = model(tmp_path / "a", 1.0), model(tmp_path / "b", 1.0), model(tmp_path / "c", 2.0)
    assert runs.fingerprint(a) == runs.fingerprint(b) != runs.fingerprint(other)
    assert runs.fingerprint(a / "model.safetensors") == runs.fingerprint(b / "model.safetensors")
    (b / "config.json").write_text('{"width": 9}')
    assert runs.fingerprint(a) != runs.fingerprint(b)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        runs.fingerprint(tmp_path / "empty")


def test_png_settings_read_back_and_a_damaged_file_reads_as_none(tmp_path):
    path, settings = tmp_path / "a.png", {"prompt": "σ “red” cube\n日本", "sigma": math.inf, "seed": 3}
    records.save_png(Image.new("RGB", (8, 4), "red"), path, settings)
    assert records.read_record(path) == {**settings, "sigma": "inf"}
    data = path.read_bytes()
    records.save_png(Image.new("RGB", (8, 4), "red"), path, settings)
    assert path.read_bytes() == data
    path.write_bytes(data[:-20])
    assert records.read_record(path) is None
    assert records.read_record(tmp_path / "none.png") is None
    Image.new("RGB", (8, 4)).save(path)
    assert records.read_record(path) is None


def test_grid_is_drawn_with_every_image_in_its_place(tmp_path):
    colours, paths = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 0)], []
    for i, colour in enumerate(colours):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (48, 32), colour).save(paths[-1])
    captions = [
        ("seed 1", "a very long prompt " * 12),
        ("seed 2", "Donaudampfschifffahrtsgesellschaftskapitänsmützen" * 2),
    ]
    block = image_grid.Block(
        "Title", ["SEG σ=∞", "a head that is far too long for one line"], captions, [paths[:2], paths[2:]]
    )
    sheet = image_grid.draw_grid([block, block], "Two blocks", "A note " * 60, cell=96)
    counts = {colour: sum(n for n, c in sheet.getcolors(1 << 20) if c == colour) for colour in colours}
    assert counts == dict.fromkeys(colours, 2 * 144 * 96)  # whole, unsmoothed, not square, once in each block


def test_a_run_folder_that_cannot_be_made_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        runs.create(runs.run_folder(tmp_path / "file", "x", {"a": 1}))
    folder = runs.run_folder(tmp_path, "x", {"a": 1})
    assert folder == runs.run_folder(tmp_path, "x", {"a": 1}) and folder.parent == tmp_path / "x"
