"""The parts of an evaluation on their own: prompts, workers, shards, the paper's figures, tables, figures."""

import json
import math
import os
import shutil
import socket

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig, conf_dir, settings
from segresearch.config.parse import from_coco, from_text
from segresearch.errors import ConfigError
from segresearch.evaluation import paper_numbers, plots, shards, table
from segresearch.evaluation.shards import Array
from segresearch.evaluation.spec import placed, study
from segresearch.evaluation.workers import Worker, worker


def composed(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return settings(compose("evaluate", overrides=list(overrides)), kind=EvaluateConfig)


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
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": "a"}, {"id": 2}]}', r"annotations\.1: no image_id"),
        ('{"annotations": [{"id": 1, "image_id": 2, "caption": " "}]}', r"annotations\.0: the caption is empty"),
    ]
    for text, words in wrong:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            from_coco(file)
    with pytest.raises(ConfigError, match="cannot read"):
        from_coco(tmp_path / "none.json")


def test_workers_share_all_ranges_and_each_has_one_owner():
    items = list(range(10))
    for world in (1, 2, 3, 11):
        assert sorted(sum((Worker(rank, world).part(items) for rank in range(world)), [])) == items
    assert worker({}) == Worker(0, 1, 0)
    assert worker({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Worker(3, 4, 1)
    assert worker({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}) == Worker(2, 8, 2)
    assert worker({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Worker()  # a batch script, not a step of 8
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "a", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError, match="RANK="):
            worker(wrong)


def test_a_shard_is_whole_or_not_there_and_a_later_one_takes_its_place(tmp_path):
    place = tmp_path / "setting" / shards.name(range(3, 5))
    one, two = Array(np.arange(6.0).reshape(2, 3), "net"), Array(np.ones(2, np.uint8), "sampled")
    assert shards.held(place) == {} and "missing" in shards.verify(place)
    shards.commit(place, {"a": one})
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    shards.commit(place, {"a": one})
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    shards.commit(place, {"a": one, "b": two}, {"torch": "9.9"})
    assert shards.made(place) == {"torch": "9.9"}
    assert shards.held(place) == {"a": "net", "b": "sampled"} and shards.verify(place) is None
    assert np.array_equal(shards.load(place, "a"), one.value) and shards.load(place, "b").dtype == np.uint8
    assert [p.name for p in place.parent.iterdir()] == ["0000003-0000005"]
    (place / "c.npy").write_bytes(b"")
    assert "c.npy, which is not a part of it" in shards.verify(place)
    mine = f".0000003-0000005.{socket.gethostname()}-{os.getpid()}.tmp"
    for left in (mine, f".0000003-0000005.{socket.gethostname()}-999999999.tmp", ".0000003-0000005.elsewhere-9.tmp"):
        shutil.copytree(place, place.with_name(left))
    shards.sweep(place.parent)  # of processes that may live, nothing
    kept = {mine, ".0000003-0000005.elsewhere-9.tmp", "0000003-0000005"}
    assert {p.name for p in place.parent.iterdir()} == kept
    assert [list(r) for r in shards.cut(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("name", "count"), [("table1", 5), ("table2", 6), ("fig6", 13), ("fig12", 10)])
@pytest.mark.parametrize("model", ["mini", "sdxl"])
def test_every_experiment_is_a_table_of_its_settings(name, count, model):
    plan = study(composed(f"experiment={name}", f"model={model}", "images=12"))
    assert len(plan.settings) == count and plan.paper == (name if name in paper_numbers.TABLES else None)
    assert not plan.settings[plan.first].terms and plan.settings[plan.first].sag is None
    if plan.paper:
        beside = [paper_numbers.figures(plan.paper, guidance) for guidance in plan.settings.values()]
        assert beside == list(paper_numbers.TABLES[name].values())  # in the paper's order, each line once
    assert all(plan.texts(range(12))) == (name == "table2")


def test_experiments_are_pictures_too():
    """generate.py takes the same files, and of them what it knows."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = settings(compose("generate", overrides=["experiment=table2"]))
    assert config.pairing == "zip" and config.compare[1].terms["seg"].perturbation.sigma == 1


def places(*overrides: str) -> dict[str, str]:
    config = composed(*overrides)
    return {name: place.name for name, place in placed(config, study(config), resolve_model("mini")).places.items()}


def test_shards_lie_by_what_pictures_depend_on():
    one = places("experiment=table2")
    assert one == places("experiment=table2", "images=40")
    assert one == places("experiment=table2", "n_bootstrap=3", "n_examples=2", "device=cpu", "stage=reduce", "keep=8")
    assert one == places("experiment=table2", "device=cuda", "batch_size=25", "compute.precision=exact",
                         "compute.offload=true")  # fmt: skip
    assert places("experiment=table2", "device=cuda") == places("experiment=table2", "device=cuda", "batch_size=100")
    assert one == places("experiment=table2", "batch_size=25") != places("experiment=table2", "batch_size=100")
    changes = ["device=cuda", "compute.compile=true", "device=cuda compute.graph=true", "compute.vae_tile=64",
               "batch_size=4", "shard=48", "steps=9", "sampler=heun", "prompts='scene:1-'", "model.dtype=float16",
               "controlnet=canny controls.canny.image=scene:0-", "controlnet=canny controls.canny.image=scene:1-",
               "controlnet=canny controls.canny.image=scene:0-999",
               "controlnet=depth controls.depth.image=scene:0-"]  # fmt: skip
    found = [places("experiment=table2", *change.split()) for change in changes]
    assert len({digest for of_one in (one, *found) for digest in of_one.values()}) == len(one) * (1 + len(changes))


def test_experiments_share_the_shards_of_settings_they_share():
    """Whatever they are called there."""
    table, ablation = places("experiment=table1"), places("experiment=fig6")
    assert table["vanilla"] == ablation["vanilla"] and table["SEG σ=∞"] == ablation["s = 1 σ = ∞"]
    assert len({*table.values()} & {*ablation.values()}) == 3  # and σ = 10
    label = "{guidance: seg, label: mine, terms: {seg: {perturbation: {sigma: 10}}}}"
    mine = places("guidance=none", f"compare=[none,{label}]", "prompts=['']", "sampler=dpmpp_2m", "schedule=karras")
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
        assert len(places(*overrides)) == len(places("experiment=table1"))
    else:
        with pytest.raises(ValueError, match=words):
            places(*overrides)


ROWS = [
    {"setting": "vanilla", "n": 9, "fd-mini": 12.0, "fd-mini-error": 0.5, "fd-mini-first": None, "kd-mini": 0.01,
     "precision-mini": 0.5, "recall-mini": 0.25, "distance-mini": None, "saturation": 0.3, "contrast": 0.2, "red": 0.5,
     "green": 0.4, "blue": 0.3, "paper-fid": 129.496},
    {"setting": "SEG 2 σ=∞", "n": 9, "fd-mini": 7.25, "fd-mini-error": 0.25, "fd-mini-first": -4.75,
     "fd-mini-first-error": 0.3, "kd-mini": -2.04, "precision-mini": 0.75, "recall-mini": 0.2, "distance-mini": 0.4,
     "distance-mini-error": 0.01, "saturation": 0.4, "contrast": 0.2, "red": 0.6, "green": 0.4, "blue": 0.2,
     "paper-fid": 88.215},
]  # fmt: skip


def test_tables_say_the_same_in_every_form():
    lines = table.markdown(ROWS).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    seen = dict(zip(heads, cells, strict=True))
    assert seen["FD (mini)"] == "7.25 ± 0.25" and seen["− first"] == "−4.75 ± 0.30" and seen["KD (mini)"] == "−2.0"
    assert seen["distance (mini)"] == "0.400 ± 0.010" and seen["paper: FID"] == "88.215" and "–" in lines[2]
    assert table.to_csv(ROWS).splitlines()[2].startswith("SEG 2 σ=∞,9,7.25,0.25,-4.75,")
    made = table.latex(ROWS)
    assert made.count(r"\\") == 3 and r"SEG 2 $\sigma$=$\infty$" in made and r"7.25 $\pm$ 0.25" in made
    assert "lrrrrrrrrr|r}" in made and all(ord(c) < 128 for c in made.replace("–", ""))
    assert json.loads(table.to_jsonl(ROWS, {"run": "x"}).splitlines()[1])["fd-mini"] == 7.25


def test_figures_are_drawn_of_bars_and_of_lines_over_sigma():
    from segresearch.config import GuidanceConfig, typed

    seg = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
    guided = typed(dict[str, GuidanceConfig], {"vanilla": {}, "SEG 2 σ=∞": {"terms": {"seg": seg}}})
    config = composed("images=300", "compare=[]", "guidance=none")
    plan = study(config)
    plan = type(plan)(guided, plan.prompts, (), plan.ranges, None)
    norms = {"vanilla": (0.0, 0.0), "SEG 2 σ=∞": (0.5, 0.25)}
    found = plots.draw(plan, ROWS, norms, "a run")
    assert set(found) == {"quality", "colour", "norms"}
    assert [t.get_text() for t in found["quality"].axes[0].get_yticklabels()] == ["vanilla", "SEG 2 σ=∞"]
    narrow = {**seg, "perturbation": {"kind": "seg", "sigma": 1}}
    guided |= typed(dict[str, GuidanceConfig], {"SEG 2 σ=1": {"terms": {"seg": narrow}}})
    plan = type(plan)(guided, plan.prompts, (), plan.ranges, None)
    found = plots.draw(plan, [*ROWS, {**ROWS[1], "setting": "SEG 2 σ=1", "fd-mini-first": -3.0}], {}, "a run")
    assert set(found) == {"quality", "colour"}
    left = found["quality"].axes[0]
    assert [t.get_text() for t in left.get_xticklabels()] == ["1", "∞"]
    assert list(left.containers[0][0].get_ydata()) == [-3.0, -4.75]  # by rising σ
    assert plots.family(guided["SEG 2 σ=1"]) == ("SEG s = 2", 1.0) and plots.method(guided["vanilla"]) == "vanilla"
    assert paper_numbers.key(guided["SEG 2 σ=∞"]) == math.inf
