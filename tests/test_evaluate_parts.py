"""The parts of an evaluation on their own: prompts, workers, shards, the paper's figures, tables, figures."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import socket

import numpy as np
import pytest
from helpers import composed

from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig
from segresearch.config.build import resolved
from segresearch.config.expand import from_coco, from_text
from segresearch.errors import ConfigError
from segresearch.evaluation import paper_numbers, plots, shards
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import METRICS, Frame, Value, latex, markdown, table, to_jsonl
from segresearch.evaluation.sample_shards import Worker, worker
from segresearch.evaluation.shards import Array
from segresearch.evaluation.spec import evaluation_spec, with_folders
from segresearch.pages import to_csv


def evaluation(*overrides: str) -> EvaluateConfig:
    return composed(*overrides, name="evaluate", kind=EvaluateConfig)


def test_prompts_come_from_a_text_file_and_the_wrong_line_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red cube\n\n  two ring\xc3\xa9s  \r\n")
    assert from_text(file) == ("a red cube", "two ringés")
    for content, words in (
        (b"good\nb\xffd\n", r"line 2: not UTF-8 text \(byte 2\)"),
        (b"a\n\nb\0d", "line 3: holds the"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            from_text(file)


def test_captions_come_from_a_coco_file_each_image_once_before_any_twice(tmp_path):
    file = tmp_path / "captions.json"
    entry = [(5, 30, "second of\n30 "), (4, 7, "a"), (2, 30, "b"), (9, 7, "second of 7"), (1, 100, "c")]
    notes = [{"id": i, "image_id": image, "caption": text} for i, image, text in entry]
    file.write_text(json.dumps({"images": [], "annotations": notes}))
    assert from_coco(file) == ("a", "b", "c", "second of 7", "second of 30")
    wrong = [
        ('{"annotations": [\n  {"id": 1,,}]}', "line 2: not JSON"),
        ('{"images": []}', "no list `annotations`"),
        ("[" * 100_000, "not JSON that can be read"),
        (f'{{"annotations": {"9" * 5000}}}', "not JSON that can be read"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": "a"}, {"id": 2}]}', r"annotations\.1: no image_id"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": " "}]}', r"annotations\.0: the caption is empty"),
    ]
    for text, words in wrong:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            from_coco(file)
    with pytest.raises(ConfigError, match="cannot read"):
        from_coco(tmp_path / "none.json")


def test_ranges_hold_each_image_once():
    spec = evaluation_spec(evaluation("images=5", "shard=2", "features=[]"))
    assert [list(rows) for rows in spec.ranges] == [[0, 1], [2, 3], [4]]


def test_workers_share_all_ranges_and_each_has_one_owner():
    items = list(range(10))
    for world in (1, 2, 3, 11):
        assert sorted(sum((Worker(rank, world).part(items) for rank in range(world)), [])) == items
    assert worker({}) == Worker(0, 1, 0)
    assert worker({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Worker(3, 4, 1)
    assert worker({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}) == Worker(2, 8, 2)
    on_four = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4"}
    assert worker(on_four) == Worker(2, 8, 0, spread=True)
    for local, spread in (("8", False), ("4", True)):
        assert worker({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": local}).spread is spread
    assert worker({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Worker()  # a batch script, not a step of 8


TORCHRUN, SLURM = {"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (TORCHRUN | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2: the rank must be below the number of workers"),
        (TORCHRUN | {"RANK": "a"}, "RANK=a: not a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1: not a whole number"),
        (TORCHRUN | {"RANK": "²"}, "RANK=²: not a whole number"),
        (TORCHRUN | {"RANK": "9" * 5000, "WORLD_SIZE": "9" * 5001}, f"RANK={'9' * 40}...: not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE=: not a whole number"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x: not a whole number"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "a"}, "LOCAL_WORLD_SIZE=a: not a whole number"),
        (SLURM | {"SLURM_PROCID": "2"}, "SLURM_PROCID=2, SLURM_STEP_NUM_TASKS=2: the rank"),
        (SLURM | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x: not a whole number"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "x"}, "SLURM_STEP_NUM_NODES=x: not a whole number"),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_one_line(environ, words):
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}") as caught:
        worker(environ)
    assert len(str(caught.value)) < 200


def test_a_shard_is_whole_or_not_there_and_a_later_one_takes_its_place(tmp_path):
    path = tmp_path / "method" / "0000003-0000005.safetensors"
    one, two = Array(np.arange(6.0).reshape(2, 3), "net"), Array(np.ones((2, 0), np.uint8), "sampled")
    assert shards.producers(path) == {} and "missing" in shards.verify(path)
    shards.write(path, {"a": one})
    before = path.read_bytes()
    shards.write(path, {"a": one})
    assert path.read_bytes() == before
    shards.write(path, {"b": two, "a": one}, {"torch": "9.9"})
    assert shards.header(path)["versions"] == {"torch": "9.9"}
    assert shards.producers(path) == {"a": "net", "b": "sampled"} and shards.verify(path) is None
    assert np.array_equal(shards.load(path, "a"), one.value) and shards.load(path, "b").dtype == np.uint8
    assert [p.name for p in path.parent.iterdir()] == ["0000003-0000005.safetensors"]
    mine = f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    for left in (mine, f".{path.name}.{socket.gethostname()}-999999999.tmp", f".{path.name}.elsewhere-9.tmp"):
        shutil.copyfile(path, path.with_name(left))
    shards.sweep(path.parent)  # of processes that may live, nothing
    assert {p.name for p in path.parent.iterdir()} == {mine, f".{path.name}.elsewhere-9.tmp", path.name}


@pytest.mark.parametrize("byte", [0, 9, 60, -1])
def test_a_byte_that_changes_anywhere_in_a_shard_is_damage(byte, tmp_path):
    path = tmp_path / "0000000-0000002.safetensors"
    shards.write(path, {"a": Array(np.arange(6.0), "net")}, {"torch": "9.9"})
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x01
    path.write_bytes(data)
    assert str(path) in shards.verify(path)


@pytest.mark.parametrize(("name", "count"), [("table1", 5), ("table2", 6), ("fig6", 13), ("fig12", 10)])
@pytest.mark.parametrize("model", ["mini", "sdxl"])
def test_every_experiment_is_a_table_of_its_methods(name, count, model):
    spec = evaluation_spec(evaluation(f"experiment={name}", f"model={model}", "images=12"))
    assert len(spec.methods) == count and spec.paper == (name if name in paper_numbers.TABLES else None)
    assert not spec.methods[spec.baseline].terms and spec.methods[spec.baseline].sag is None
    if spec.paper:
        numbers = [paper_numbers.numbers(spec.paper, guidance) for guidance in spec.methods.values()]
        known = [{column: value for column, value in line.items() if value is not None} for line in numbers]
        assert known == list(paper_numbers.TABLES[name].values())  # in the paper's order, each line once
    assert all(spec.texts(range(12))) == (name == "table2")


def test_experiments_are_pictures_too():
    """generate.py takes the same files, and of them what it knows."""
    config = composed("experiment=table2")
    assert config.pairing == "zip" and config.compare[1].terms["seg"].perturbation.sigma == 1


def folders(*overrides: str) -> dict[str, str]:
    spec = evaluation_spec(resolved(evaluation(*overrides)))
    return {method: folder.name for method, folder in with_folders(spec, resolve_model("mini")).folders.items()}


@pytest.mark.slow
def test_shards_lie_by_what_pictures_depend_on():
    one = folders("experiment=table2")
    assert one == folders("experiment=table2", "images=40")
    assert one == folders("experiment=table2", "n_bootstrap=3", "n_examples=2", "device=cpu", "stage=reduce", "keep=8")
    assert one == folders("experiment=table2", "device=cuda", "batch_size=25", "compute.precision=exact",
                         "compute.offload=true")  # fmt: skip
    assert folders("experiment=table2", "device=cuda") == folders("experiment=table2", "device=cuda", "batch_size=100")
    assert one == folders("experiment=table2", "batch_size=25") != folders("experiment=table2", "batch_size=100")
    changes = ["device=cuda", "compute.compile=true", "device=cuda compute.graph=true", "compute.vae_tile=64",
               "batch_size=4", "shard=48", "steps=9", "sampler=heun", "prompts='scene:1-'", "model.dtype=float16",
               "controlnet=canny controls.canny.image=scene:0-", "controlnet=canny controls.canny.image=scene:1-",
               "controlnet=canny controls.canny.image=scene:0-999",
               "controlnet=depth controls.depth.image=scene:0-"]  # fmt: skip
    found = [folders("experiment=table2", *change.split()) for change in changes]
    assert len({digest for of_one in (one, *found) for digest in of_one.values()}) == len(one) * (1 + len(changes))


def test_experiments_share_the_shards_of_methods_they_share():
    """Whatever they are called there."""
    one, ablation = folders("experiment=table1"), folders("experiment=fig6")
    assert one["vanilla"] == ablation["vanilla"] and one["SEG σ=∞"] == ablation["s = 1 σ = ∞"]
    assert len({*one.values()} & {*ablation.values()}) == 3  # and σ = 10
    label = "{guidance: seg, label: mine, terms: {seg: {perturbation: {sigma: 10}}}}"
    mine = folders("guidance=none", f"compare=[none,{label}]", "prompts=['']", "sampler=dpmpp_2m", "schedule=karras")
    assert set(mine) == {"vanilla", "mine"} and mine["mine"].startswith("seg-")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("controls.canny.image=none.png", "controls.canny.image: none.png: "),
        ("controls.canny.image=[scene:0-7]", None),
        ("controls.canny.image=scene:0-9999", "10000 images, 1000 seeds"),
        ("controls.canny.net=cany", "controls.canny.net: "),
        ("controls.canny.start=1", "it would never act"),
    ],
)
def test_controls_are_checked_before_anything_is_made(given, words):
    overrides = ["experiment=table1", "controlnet=canny", *(["controls.canny.image=scene:0-"] if "net" in given or
                 "start" in given else []), given]  # fmt: skip
    if words is None:
        assert len(folders(*overrides)) == len(folders("experiment=table1"))
    else:
        with pytest.raises(ValueError, match=words):
            folders(*overrides)


FRAME = Frame(tuple(Value(*row) for row in [
    ("vanilla", "n", 9), ("vanilla", "fd-mini", 12.0, 0.5), ("vanilla", "fd_to_baseline-mini", None),
    ("vanilla", "kd-mini", 0.01), ("vanilla", "precision-mini", 0.5), ("vanilla", "recall-mini", 0.25),
    ("vanilla", "distance-mini", None), ("vanilla", "saturation", 0.3), ("vanilla", "contrast", 0.2),
    ("vanilla", "red", 0.5), ("vanilla", "green", 0.4), ("vanilla", "blue", 0.3), ("vanilla", "paper-fid", 129.496),
    ("SEG 2 σ=∞", "n", 9), ("SEG 2 σ=∞", "fd-mini", 7.25, 0.25), ("SEG 2 σ=∞", "fd_to_baseline-mini", -4.75, 0.3),
    ("SEG 2 σ=∞", "kd-mini", -2.04), ("SEG 2 σ=∞", "precision-mini", 0.75), ("SEG 2 σ=∞", "recall-mini", 0.2),
    ("SEG 2 σ=∞", "distance-mini", 0.4, 0.01), ("SEG 2 σ=∞", "saturation", 0.4), ("SEG 2 σ=∞", "contrast", 0.2),
    ("SEG 2 σ=∞", "red", 0.6), ("SEG 2 σ=∞", "green", 0.4), ("SEG 2 σ=∞", "blue", 0.2),
    ("SEG 2 σ=∞", "paper-fid", 88.215),
]))  # fmt: skip


def test_tables_say_the_same_in_every_form():
    lines = markdown(*table(FRAME)).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    seen = dict(zip(heads, cells, strict=True))
    assert seen["FD (mini)"] == "7.25 ± 0.25" and seen["− baseline"] == "−4.75 ± 0.30" and seen["KD (mini)"] == "−2.0"
    assert seen["distance (mini)"] == "0.400 ± 0.010" and seen["paper: FID"] == "88.215" and "–" in lines[2]
    made = latex(*table(FRAME))
    assert made.count(r"\\") == 3 and r"SEG 2 $\sigma$=$\infty$" in made and r"7.25 $\pm$ 0.25" in made
    assert "lrrrrrrrrr|r}" in made and all(ord(c) < 128 for c in made.replace("–", ""))
    rows = list(csv.DictReader(io.StringIO(to_csv(FRAME.plain()))))
    assert rows[15] == {"method": "SEG 2 σ=∞", "metric": "fd_to_baseline-mini", "value": "-4.75", "error": "0.3"}
    assert rows[2]["value"] == rows[0]["error"] == "" and len(rows) == len(FRAME.rows)
    last = json.loads(to_jsonl(FRAME, {"run": "x"}).splitlines()[-1])
    assert last == {"run": "x", "method": "SEG 2 σ=∞", "metric": "paper-fid", "value": 88.215, "error": None}


def test_a_frame_is_read_back_and_looked_up():
    assert Frame.of(json.loads(json.dumps(FRAME.plain()))) == FRAME
    assert FRAME.methods == ("vanilla", "SEG 2 σ=∞") and FRAME["SEG 2 σ=∞", "fd-mini"].error == 0.25
    assert FRAME["vanilla", "cost"].value is None and FRAME.metrics("fd") == (METRICS["fd-mini"],)
    assert METRICS["fd-inception"].head == "FID"
    for row in ({"method": "a", "metric": "unknown", "value": 1}, {"method": "a"}):
        with pytest.raises((KeyError, TypeError)):
            Frame.of([row])
    alone = Frame(FRAME.rows[:13])
    assert "− baseline" not in markdown(*table(alone)) and "FD (mini)" in markdown(*table(alone))


def test_figures_have_a_row_a_method_and_a_line_over_sigma():
    from segresearch.config import GuidanceConfig, typed

    seg = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
    guided = typed(dict[str, GuidanceConfig], {"vanilla": {}, "SEG 2 σ=∞": {"terms": {"seg": seg}}})
    config = evaluation("images=300", "compare=[]", "guidance=none")
    spec = dataclasses.replace(evaluation_spec(config), methods=guided)
    norms = {"vanilla": (0.0, 0.0), "SEG 2 σ=∞": (0.5, 0.25)}
    found = plots.draw(spec, Result(FRAME, norms, 9))
    assert set(found) == {"quality", "tradeoff", "colour", "norms"}
    rows = [t.get_text() for t in found["quality"].axes[0].get_yticklabels()]
    assert rows == ["vanilla", "SEG 2 σ=∞"] == [t.get_text() for t in found["colour"].axes[0].get_yticklabels()]
    marks = [tuple(mark.get_data()[0]) for mark in found["quality"].axes[0].lines if mark.get_marker() != "None"]
    assert marks == [(0.0,), (-4.75,)] and "bar" not in str(found["quality"].axes[0].patches)
    narrow = {**seg, "perturbation": {"kind": "seg", "sigma": 1}}
    guided |= typed(dict[str, GuidanceConfig], {"SEG 2 σ=1": {"terms": {"seg": narrow}}})
    spec = dataclasses.replace(spec, methods=guided)
    more = [dataclasses.replace(row, method="SEG 2 σ=1") for row in FRAME.rows[13:]]
    more[2] = dataclasses.replace(more[2], value=-3.0)
    found = plots.draw(spec, Result(Frame((*FRAME.rows, *more)), {}, 9))
    assert set(found) == {"quality", "blur", "tradeoff", "colour"}
    assert {t.get_text() for t in found["tradeoff"].axes[0].texts} >= {"vanilla", "SEG 2 σ=∞", "SEG 2 σ=1"}
    left = found["blur"].axes[0]
    assert [t.get_text() for t in left.get_xticklabels()] == ["1", "∞"]
    assert list(left.containers[0][0].get_ydata()) == [-3.0, -4.75]  # by rising σ
    assert plots.family(guided["SEG 2 σ=1"]) == ("SEG s = 2", 1.0) and plots.kind(guided["vanilla"]) == "vanilla"
    assert paper_numbers.key(guided["SEG 2 σ=∞"]) == math.inf
