"""Damaged, misplaced and changed files of an evaluation are named and written again; a finished run is only read."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
from evaluations import empty_plots, shard, study
from helpers import contents

from segresearch import cli
from segresearch.evaluation import evaluate as run
from segresearch.evaluation import shards
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")


@pytest.fixture(scope="module", autouse=True)
def sketched():
    with empty_plots():
        yield


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    return study(folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(base, model):
    """A run without interruption."""
    return evaluate(base, model, Worker())


@pytest.fixture
def config(base, tmp_path, unchecked):
    return dataclasses.replace(base, out=str(tmp_path / "runs"))


@pytest.fixture
def sampled(config, base, whole):
    """`config` in a folder that has the pictures of `whole` and none of its tables."""
    shutil.copytree(base.out, config.out, ignore=shutil.ignore_patterns("study", ".locks"))
    return config


def test_damage_is_found_said_and_mended(config, base, whole, model):
    shutil.copytree(base.out, config.out)
    folder = Path(config.out) / "study" / whole.folder.name
    path = shard(config, "0000001-0000002")
    for harm in ("cut", "gone", "header"):
        data = path.read_bytes()
        path.unlink()
        if harm != "gone":
            path.write_bytes(data[:-40] if harm == "cut" else data.replace(b"producer", b"pruducer", 1))
        with pytest.raises(cli.Ended) as caught:
            evaluate(dataclasses.replace(config, stage="verify"), model)
        assert caught.value.code == 4 and "1 of 6 shards" in str(caught.value) and str(path) in str(caught.value)
        with pytest.raises(cli.Ended, match="1 of 6 shards are missing") as caught:
            evaluate(dataclasses.replace(config, stage="reduce"), model, Worker())
        assert cli.explained(caught.value)[0] == 4
        mended = evaluate(config, model, Worker())
        assert (mended.sampled, mended.existing) == (1, 5) and contents(config.out) == contents(base.out)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7e")  # sizes say nothing
    (folder / "results.json").unlink()
    for stage in ("verify", "reduce"):
        with pytest.raises(cli.Ended, match="not the bytes that were written") as caught:
            evaluate(dataclasses.replace(config, stage=stage), model, Worker())
        assert cli.explained(caught.value)[0] == 4 and str(path) in str(caught.value)
    mended = evaluate(config, model, Worker())
    assert (mended.sampled, mended.existing) == (1, 5) and contents(config.out) == contents(base.out)
    assert "all 6 shards are whole" in str(evaluate(dataclasses.replace(config, stage="verify")))


def flipped(path):
    """The last byte of a file changes."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_shard_that_changes_after_the_results_is_named_and_written_again(config, base, whole, model, capsys):
    shutil.copytree(base.out, config.out)
    assert evaluate(config, model, Worker()).sampled == 0
    path = shard(config, "0000001-0000002")
    flipped(path)
    capsys.readouterr()
    mended = evaluate(config, model, Worker())
    assert mended.sampled == 1 and mended.result == whole.result and contents(config.out) == contents(base.out)
    said = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert len(said) == 1 and said[0].endswith("not the bytes that were written; it is written again")
    with pytest.MonkeyPatch.context() as patch:  # the next call reads none
        patch.setattr(shards, "read", None)
        assert evaluate(config, model, Worker()).sampled == 0


@pytest.mark.parametrize("other", ["another range", "another method"])
def test_a_shard_in_the_place_of_another_is_damage(config, base, whole, model, capsys, other):
    shutil.copytree(base.out, config.out)
    path = shard(config, "0000001-0000002")
    (vanilla,) = (folder for folder in path.parents[1].iterdir() if folder != path.parent and folder.is_dir())
    source = path.with_name("0000002-0000003.safetensors") if other == "another range" else vanilla / path.name
    shutil.copyfile(source, path)
    held = f"{source.parent.name}/{source.stem}"
    with pytest.raises(cli.Ended, match=f"1 of 6 shards are not whole: .*{path.name}: holds {held}") as caught:
        evaluate(dataclasses.replace(config, stage="verify"), model)
    assert caught.value.code == 4
    with pytest.raises(shards.Damaged, match="not what its name says"):
        shards.load(path, "images")
    capsys.readouterr()
    mended = evaluate(config, model, Worker())
    assert mended.sampled == 1 and mended.result == whole.result and contents(config.out) == contents(base.out)
    assert f"{path}: holds {held}, not what its name says; it is written again" in capsys.readouterr().err


def without_places(folder):
    """Shards as an earlier version wrote them."""
    for path in Path(folder).glob("shards/*/*.safetensors"):
        arrays = {name: shards.Array(shards.load(path, name), by) for name, by in shards.producers(path).items()}
        shards.write(path, arrays, shards.header(path)["versions"], placed=False)


def test_shards_of_a_version_without_places_are_used_and_said(config, model, capsys):
    few = dataclasses.replace(config, images=2, distances=())
    done = evaluate(few, model, Worker())
    without_places(few.out)
    remark = "4 shards are of a version that did not note whose images they hold"
    assert remark in evaluate(dataclasses.replace(few, stage="verify")).message
    (done.folder / "results.json").unlink()
    capsys.readouterr()
    again = evaluate(few, model, Worker())
    assert again.sampled == 0 and again.result == done.result
    assert capsys.readouterr().err.count(remark) == 1
    evaluate(dataclasses.replace(few, distances=config.distances, stage="shards"), model, Worker())  # arrays are added
    assert shards.unplaced(Path(few.out).glob("shards/seg-*/*.safetensors")).startswith("2 shards")


def test_kept_features_that_change_are_named_and_computed_again(sampled, base, whole, model, capsys):
    (path,) = Path(sampled.out, "reference").glob("*.safetensors")
    flipped(path)
    assert evaluate(sampled, model, Worker()).result == whole.result and contents(sampled.out) == contents(base.out)
    assert f"{path}: features: not the bytes that were written; it is written again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.csv", "index.html", "figures/quality.png", "table.md", "results.json"])
def test_a_file_of_a_finished_run_that_changes_is_written_again(config, base, whole, model, capsys, name):
    shutil.copytree(base.out, config.out)
    path = Path(config.out) / "study" / whole.folder.name / name
    path.write_bytes(path.read_bytes().replace(b"SEG", b"SAG", 1) if name == "results.json" else b"")
    mended = evaluate(config, model, Worker())
    assert mended.result == whole.result and contents(config.out) == contents(base.out)
    words = "changed or damaged; made again" if name == "results.json" else "changed or missing; 1 such files"
    assert f"{path}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["all", "verify"])
def test_a_finished_run_is_shown_where_nothing_can_be_written(config, base, whole, model, monkeypatch, stage):
    shutil.copytree(base.out, config.out)

    def locked(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    for owner, name in ((os, "replace"), (os, "utime"), (Path, "mkdir"), (Path, "unlink"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, locked)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    done = evaluate(dataclasses.replace(config, stage=stage), model, Worker())
    assert done.result == whole.result if stage == "all" else "all 6 shards are whole" in done.message
    if stage == "all":  # and what is to be written says so before a model is loaded
        monkeypatch.setattr(run, "configured_model", None)
        with pytest.raises(PermissionError):
            evaluate(dataclasses.replace(config, images=4), part=Worker())
