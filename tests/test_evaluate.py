"""Evaluation end to end on a tiny random model: the same bytes whatever workers, interruptions and damage."""

import dataclasses
import errno
import inspect
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluations import COUNT, SEG, empty_plots, shard, study
from helpers import contents

from segresearch import cli, runs, sample_images
from segresearch.config import GuidanceConfig, conf_dir, typed
from segresearch.config.compose import written_config
from segresearch.evaluation import evaluate as run
from segresearch.evaluation import sample_shards as module
from segresearch.evaluation import shards
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import LATE, Worker

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
HELD = 10_000_000
METHODS = 2


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


def test_a_run_holds_all_it_should_and_the_same_command_makes_nothing(base, whole, monkeypatch):
    frame = whole.result.frame
    assert (whole.sampled, whole.existing) == (6, 0) and frame.methods == ("vanilla", "SEG")
    names = {"index.html", "table.md", "metrics.csv", "table.tex", "metrics.jsonl", "config.yaml", "results.json"}
    found, everything = contents(whole.folder), contents(base.out)
    assert names <= set(found) and "figures/quality.png" in found
    assert len([n for n in everything if n.endswith(".safetensors")]) == METHODS * COUNT + 1  # and the reference
    assert frame["vanilla", "distance-mini"].value is None and frame["SEG", "distance-mini"].value > 0
    assert {"text_alignment-mini", "exact", "saturation", "kd-mini", "precision-mini", "fd_to_baseline-mini"} <= {
        metric.name for metric in frame.metrics()
    }
    assert frame["SEG", "fd-mini"].value > 0 and frame["SEG", "fd_to_baseline-mini"].error > 0
    assert len(whole.result.norms["SEG"]) == 2 and min(whole.result.norms["SEG"]) > 0
    assert not any(whole.result.norms["vanilla"])
    assert frame["vanilla", "cost"].value == 1 < frame["SEG", "cost"].value < 2
    assert frame["SEG", "operations"].value > frame["vanilla", "operations"].value > 1e6
    lines = [json.loads(line) for line in found["metrics.jsonl"].decode().splitlines()]
    kept = [(line["method"], line["metric"], line["value"], line["error"]) for line in lines]
    assert kept == [(row.method, row.metric, row.value, row.error) for row in frame.rows]
    page = found["index.html"].decode()
    assert page.count("<img") == 1 + 2 * METHODS and "http" not in page
    monkeypatch.setattr(run, "configured_model", None)
    monkeypatch.setattr(run.results, "aggregate", None)
    again = evaluate(base, part=Worker())
    assert (again.sampled, again.existing) == (0, 6) and again.result == whole.result
    assert contents(base.out) == everything


@pytest.mark.slow
def test_the_cost_of_a_picture_is_that_of_its_rows(config, model):
    """Whatever the workers; with CFG twice, each interval its steps; steps cost alike."""
    cfg = {"kind": "cfg", "weight": 3.0}
    half = cfg | {"interval": [1.0, math.inf]}
    terms = {"CFG": {"cfg": cfg}, "half": {"cfg": half}, "none": {"seg": SEG | {"scale": 0}}}
    guided = tuple(typed(GuidanceConfig, {"label": key, "terms": given}) for key, given in terms.items())
    asked = dataclasses.replace(config, compare=(config.compare[0], *guided))
    frame = evaluate(asked, model, Worker()).result.frame
    costs = {method: frame[method, "cost"].value for method in frame.methods}
    assert costs["none"] == 1 and costs["CFG"] == pytest.approx(2, abs=0.02) and 1 < costs["half"] < costs["CFG"]


def test_pictures_are_those_of_their_seed_and_prompt(base, whole, model):
    """Any of them from the public calls, without this machinery."""
    from segresearch.config.build import build_guidance
    from segresearch.sampling import initial_noise, sample
    from segresearch.scenes.scenes import captions

    conds = model.encode(captions([HELD + 2]), size=(64, 64))
    latents = sample(build_guidance(base.compare[1], model.denoiser), initial_noise([2], model.latent_shape((64, 64))),
                     sampler="euler_ancestral", steps=2, conds=conds, seeds=[2])  # fmt: skip
    with torch.no_grad():
        alone = model.vae.decode(latents).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    kept = shards.load(shard(base, "0000002-0000003"), "images")
    assert np.abs(kept[0].astype(int) - alone[0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("parts", [[(2, 3), (0, 3), (1, 3)], [(1, 2), (1, 2), (0, 3), (0, 1)]])
def test_the_same_bytes_whatever_the_workers(config, base, whole, model, parts):
    """World sizes 2 and 3 in any order, a change of it in mid-run, a worker that does the same part twice."""
    for rank, world in parts[:-1]:
        early = evaluate(config, model, Worker(rank, world))
        assert early.result is None and "others write" in early.message
    last = evaluate(config, model, Worker(*parts[-1]))
    assert last.result == whole.result and contents(config.out) == contents(base.out)


@pytest.mark.parametrize("spread, shown_after, waits", [(True, 3, 3), (True, 1000, 45), (False, 3, 0)])
def test_the_last_worker_waits_for_shards_that_a_disk_shows_late(
    sampled, base, whole, model, monkeypatch, spread, shown_after, waits
):
    """Shards of another machine look as if they were missing until so many looks later; a clock that is not real."""
    naps, header = [], shards.header

    def late(path):
        if path.stem == "0000001-0000002" and len(naps) < shown_after:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return header(path)

    monkeypatch.setattr(shards, "header", late)
    clock = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr("segresearch.evaluation.sample_shards.time", clock)
    done = evaluate(sampled, model, Worker(0, 2, spread=spread))
    assert len(naps) == waits and sum(naps) <= LATE
    if waits == 3:
        assert done.result == whole.result and contents(sampled.out) == contents(base.out)
    else:
        assert done.result is None and "2 of 6 shards are missing, which others write" in done.message


def test_the_tables_are_made_by_one_worker(sampled, whole, model):
    with runs.locked(sampled.out, f"the tables of {Path(sampled.out, 'study', whole.folder.name)}"):
        other = evaluate(sampled, model, Worker(0, 2))
    assert other.result is None and other.message == "all 6 shards exist; another worker makes the tables"
    assert evaluate(sampled, model, Worker(0, 2)).result == whole.result


def test_methods_that_remember_and_draw_resume_to_the_same_bytes(config, model):
    """A shard that is lost is sampled again, alone, with the same images."""
    tpg = {"kind": "perturbed", "scale": 1.0, "perturbation": {"kind": "tpg", "where": "mid"}}
    apg = {"kind": "cfg", "weight": 3.0, "shape": {"kind": "apg"}}
    mixed = {"label": "mixed", "terms": {"tpg": tpg, "cfg": apg}, "post": {"momentum": {"kind": "momentum"}}}
    config = dataclasses.replace(config, compare=(*config.compare[:1], typed(GuidanceConfig, mixed)))
    evaluate(config, model, Worker())
    shards = sorted(Path(config.out, "shards").glob("tpg*/*.safetensors"))
    before = [path.read_bytes() for path in shards]
    shards[1].unlink()
    assert evaluate(config, model, Worker()).sampled == 1 and [path.read_bytes() for path in shards] == before


@pytest.mark.parametrize("moment", ["a write", "a rename", "the reduction"])
def test_a_stopped_run_resumes_to_the_same_bytes(config, base, whole, model, monkeypatch, moment):
    calls = []

    def stopping(function, count):
        def call(*arguments, **keywords):
            calls.append(arguments)
            if len(calls) == count:
                raise KeyboardInterrupt
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        if moment == "a write":  # and nothing is tidied up, as after kill -9
            patch.setattr(os, "fsync", stopping(os.fsync, 5))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        elif moment == "a rename":
            patch.setattr(os, "replace", stopping(os.replace, 4))
        else:
            patch.setattr(run.outputs, "save", stopping(run.outputs.save, 1))
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, model, Worker())
    (left,) = (p for p in (os.scandir(os.path.join(config.out, "study"))) if p.is_dir())
    assert not os.path.exists(os.path.join(left.path, "index.html"))
    if moment == "the reduction":
        half = Path(left.path, "figures", f".quality.png.{socket.gethostname()}-999999999.tmp")
        half.parent.mkdir()
        half.write_bytes(b"half")
    resumed = evaluate(config, model, Worker())
    assert resumed.result == whole.result and contents(config.out) == contents(base.out)
    assert moment == "the reduction" or 0 < resumed.existing < 6


def test_the_same_command_twice_at_once_shares_the_ranges(config, base, model, monkeypatch):
    """While the first samples range 0, the second samples all others; no image is sampled twice."""
    calls, other, done = [], [], threading.Event()
    sample_range = module.sample_range

    def second():
        other.append(threading.get_ident())
        evaluate(config, model, Worker())

    thread = threading.Thread(target=second)

    def noting(spec, method, rows, *rest):
        calls.append((method, rows.start))
        if threading.get_ident() in other and len(calls) > METHODS * (COUNT - 1):
            done.set()
        if len(calls) == 1:
            thread.start()
            done.wait(60)
        return sample_range(spec, method, rows, *rest)

    monkeypatch.setattr(module, "sample_range", noting)
    evaluate(config, model, Worker())
    thread.join(60)
    assert not thread.is_alive() and done.is_set()
    assert sorted(calls) == sorted((method, i) for method in ("vanilla", "SEG") for i in range(COUNT))
    assert contents(config.out) == contents(base.out)


def test_more_pictures_and_other_metrics_keep_what_is_there(config, base, whole, model, monkeypatch):
    few = dataclasses.replace(config, images=2, distances=(), stage="shards")
    first = evaluate(few, model, Worker())
    assert first.sampled == 4 and first.folder.name != whole.folder.name and first.result is None
    drawn = []
    sampled = sample_images.sample
    monkeypatch.setattr(sample_images, "sample", lambda *a, **k: drawn.append(len(a[1])) or sampled(*a, **k))
    more = evaluate(config, model, Worker())
    assert sum(drawn) == METHODS and more.result == whole.result  # the third picture alone is sampled
    assert contents(config.out) == contents(base.out)


def test_a_run_may_begin_at_another_image_whose_shard_it_shares(config, base, whole, model):
    """Image 1 is what it is in a run from image 0 on; the first shard of a run holds the cost."""
    later = dataclasses.replace(config, first=1, images=2, n_examples=1, keep=1)
    run = evaluate(later, model, Worker())
    assert run.sampled == 4 and run.folder.name != whole.folder.name
    for rows in ("0000001-0000002", "0000002-0000003"):
        kept = shards.producers(shard(config, rows))
        assert ("images" in kept, "cost" in kept) == (rows.startswith("0000001"),) * 2
    one = "0000001-0000002"
    assert (shards.load(shard(config, one), "images") == shards.load(shard(base, one), "images")).all()
    page = (run.folder / "index.html").read_text()
    assert "N = 2 images a method of seeds 1 to 2" in page and page.count("<img") == 1 + METHODS
    assert run.result.frame["SEG", "cost"].value == whole.result.frame["SEG", "cost"].value


def test_runs_that_measure_something_else_have_folders_of_their_own_and_share_pictures(sampled, model):
    one = evaluate(sampled, model, Worker())
    kept = contents(one.folder)
    for change in ({"n_bootstrap": 3}, {"images": 2}, {"reference": "scene:100000-100004"}, {"text_alignment": "none"}):
        other = evaluate(dataclasses.replace(sampled, **change), model, Worker())
        assert other.sampled == 0 and other.folder != one.folder and (other.folder / "index.html").is_file()
    assert contents(one.folder) == kept


def test_pictures_of_another_version_are_used_and_said(config, model, capsys):
    few = dataclasses.replace(config, images=2, distances=())
    found = evaluate(few, model, Worker())
    assert "torch" not in capsys.readouterr().err
    path = sorted(Path(few.out).glob("shards/*/*.safetensors"))[0]
    assert shards.header(path)["versions"] == runs.versions()
    arrays = {name: shards.Array(shards.load(path, name), by) for name, by in shards.producers(path).items()}
    shards.write(path, arrays, {"code": "0.0.9", "torch": "1.2.3"})
    assert evaluate(few, model, Worker()).sampled == 0  # nothing new to say
    (found.folder / "results.json").unlink()
    evaluate(few, model, Worker())
    said = capsys.readouterr().err
    assert "code 0.0.9, torch 1.2.3" in said and said.count("\n") == 1
    assert "code 0.0.9, torch 1.2.3" in (found.folder / "index.html").read_text()
    more = evaluate(dataclasses.replace(few, distances=config.distances, stage="shards"), model, Worker())
    assert more.result is None and shards.header(path)["versions"] == {"code": "0.0.9", "torch": "1.2.3"}


def test_pictures_need_not_be_kept(config, whole, model):
    done = evaluate(dataclasses.replace(config, keep=2), model, Worker())
    assert done.folder.name == whole.folder.name and done.result == whole.result
    paths = Path(config.out, "shards").rglob("*.safetensors")
    assert sum("images" in shards.producers(path) for path in paths) == 2 * METHODS
    shard(config, "0000002-0000003").unlink()  # its distances need pictures that were not kept
    again = evaluate(dataclasses.replace(config, keep=2), model, Worker())
    assert again.sampled == 1 and again.result == whole.result


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "free some room"), (errno.EROFS, "choose another folder")]
)
def test_a_full_disk_and_a_locked_folder_are_one_line_and_leave_no_half(config, model, monkeypatch, number, words):
    sync, count = os.fsync, []

    def full(handle):
        count.append(handle)
        if len(count) > 6:
            raise OSError(number, os.strerror(number))
        return sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        evaluate(config, model, Worker())
    code, line = cli.explained(caught.value)
    assert code == 5 and "\n" not in line and ".safetensors: " in line and words in line
    written = [path for path in Path(config.out, "shards").glob("*/*") if path.is_file()]
    assert written and all(path.suffix == ".safetensors" and shards.verify(path) is None for path in written)


def test_pictures_that_are_not_finite_spoil_their_shard_alone(config, model, monkeypatch):
    sampled = sample_images.sample

    def broken(guided, *arguments, **keywords):
        found = sampled(guided, *arguments, **keywords)
        seeds = inspect.signature(sampled).bind(guided, *arguments, **keywords).arguments["seeds"]
        return found * float("nan") if list(seeds) == [1] and guided.terms else found

    monkeypatch.setattr(sample_images, "sample", broken)
    with pytest.raises(cli.Ended, match=r"1 shards could not be written: SEG, 0000001-0000002: .*\[1\]") as caught:
        evaluate(config, model, Worker())
    assert caught.value.code == 4
    monkeypatch.undo()
    assert evaluate(config, model, Worker()).sampled == 1


@pytest.mark.slow
def test_processes_as_torchrun_starts_them_make_the_same_shards(config, base, whole, model, tmp_path):
    """Two at once, by the script, from the config.yaml that a run leaves."""
    (tmp_path / "mine.yaml").write_text(written_config(config, run.outputs.OF_A_CALL))
    script = conf_dir().parent / "experiments" / "evaluate.py"
    call = [sys.executable, str(script), "--config-dir", str(tmp_path), "--config-name", "mine", f"out={config.out}"]
    places = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONWARNINGS": "ignore"} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*call, "stage=shards", "device=cpu"], env=env, **pipes) for env in places]
    ended = [(*process.communicate(), process.returncode) for process in started]
    assert [code for *_, code in ended] == [0, 0] and any("all 6 shards exist" in out for out, *_ in ended), ended
    done = evaluate(config, model, Worker())
    (Path(config.out) / "index.html").unlink()  # of all runs there, which the script writes
    assert done.sampled == 0 and contents(config.out) == contents(base.out)
