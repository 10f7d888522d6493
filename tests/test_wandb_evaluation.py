"""An evaluation in W&B: a group an experiment, a run a method; and nothing that happens there touches its files."""

import dataclasses
import json

import pytest
from helpers import contents, one_figure
from wandb_files import read

from segresearch import records, wandb_log
from segresearch.config import EvaluateConfig, typed
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.sample_shards import Worker
from segresearch.wandb_log import WandbConfig

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": 1}}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    monkeypatch.setattr(run.outputs.plots, "draw", one_figure)


@pytest.fixture
def config(folder, tmp_path):
    given = {
        "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
        "name": "study", "compare": [{}, {"label": "SEG", "terms": {"seg": SEG}}], "prompts": ["red", ""],
        "images": 2, "steps": 2, "size": [64, 64], "batch_size": 2, "shard": 2, "n_examples": 2,
        "text_alignment": "none",
        "features": ["mini"], "distances": [], "reference": "scene:100000-100005", "n_bootstrap": 2, "n_subsets": 2,
        "force": True, "device": "cpu", "out": str(tmp_path / "runs"), "wandb": {"mode": "offline"},
    }  # fmt: skip
    return typed(EvaluateConfig, given)


def test_an_evaluation_is_a_group_with_a_run_a_method_and_is_logged_once(config, model, tmp_path):
    done = evaluate(config, model, Worker())
    found = read(tmp_path / "runs")
    whole = f"study {done.folder.name}"
    seg = f"SEG {done.folder.name}"
    assert set(found) == {f"vanilla {done.folder.name}", seg, whole}
    assert {r.run_group for r, *_ in found.values()} == {"study"}
    assert [found[name][0].job_type for name in (seg, whole)] == ["method", "evaluation"]
    assert list(found[seg][0].tags) == ["study", "method", "tiny", "SEG"]
    _, values, settings, ended = found[seg]
    fd = done.result.frame["SEG", "fd-mini"]
    assert ended and (values["fd-mini"], values["fd-mini-error"]) == (fd.value, fd.error)
    assert values["guidance_rms"] == done.result.norms["SEG"][-1]
    assert values["images/captions"] == ["seed 0: red", "seed 1"] and values["image table/nrows"] == 2
    expected = {"method": "SEG", "kind": "SEG", "sigma": 1.0, "blur": 0.5, "scale": 2.0, "model": "tiny"}
    expected["run"] = done.folder.name
    assert expected.items() <= settings.items()
    _, values, settings, _ = found[whole]
    assert values["table/nrows"] == values["side by side/nrows"] == 2 and values["side by side/ncols"] == 4
    assert values["quality/_type"] == "image-file" and settings["all"]["images"] == 2
    media = list((tmp_path / "runs" / "wandb").glob("offline-run-*/files/media/images/images*.png"))
    assert len(media) == 4 and {records.read_record(p)["method"] for p in media} == {"vanilla", "SEG"}
    assert evaluate(config, model, Worker()).result == done.result
    assert len(list((tmp_path / "runs").glob("wandb/offline-run-*"))) == 3


def test_seeds_and_prompts_are_those_of_the_images(config, model, monkeypatch):
    """Of a run that begins at another image."""
    logged = []
    monkeypatch.setattr(run.outputs, "log", lambda config, out, key, made: logged.extend(made(out)) or True)
    evaluate(dataclasses.replace(config, first=3, prompts=("red", "", "blue", "lime")), model, Worker())
    method, whole = logged[1], logged[2]
    (images,) = method.images.values()
    assert [caption for _, caption in images] == ["seed 3: lime", "seed 4: red"]
    for rows in (method.tables["image table"], whole.tables["side by side"]):
        assert [(row["seed"], row["prompt"]) for row in rows] == [(3, "lime"), (4, "red")]
    said = [records.read_record(path) for path, _ in images]
    assert [(one["seed"], one["prompt"]) for one in said] == [(3, "lime"), (4, "red")]


FAKE = """
import json
class Run:
    def __init__(self, name, kind): self.name, self.kind = name, kind
    def log(self, numbers, **_):
        if self.kind == "progress":
            open({path!r}, "a").write(json.dumps([self.name, numbers]) + "\\n")
    def __getattr__(self, name): return lambda *_, **__: None
def init(**given): return Run(given["name"], given["job_type"])
def Settings(*_, **__): return None
Image = Table = Settings
"""


def test_evaluate_and_generate_are_seen_while_they_go_on(config, model, tmp_path, monkeypatch):
    from segresearch import wandb_live
    from segresearch.config import GenerateConfig
    from segresearch.generate import generate

    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE.format(path=str(tmp_path / "said")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setattr(wandb_live, "FIRST", 0.0)
    monkeypatch.setattr(wandb_live, "EVERY", 0.0)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(GenerateConfig) if hasattr(config, f.name)}
    runs = [evaluate(config, model, Worker()), generate(GenerateConfig(**shared), model)]
    lines = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    for done in runs:
        mine = [numbers for said, numbers in lines if said.startswith(f"study {done.folder.name} progress 2")]
        shares = [numbers["share"] for numbers in mine]
        assert len(mine) > 4 and shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] < 0.5
        assert {"images_per_second", "done/SEG", "done/vanilla"} <= mine[-1].keys()
    first = [numbers for said, numbers in lines if runs[0].folder.name in said]
    assert first[-1]["shards"] == 2 or first[-2].get("shards") == 1
    evaluate(config, model, Worker())  # nothing to do, so nothing is said
    assert len((tmp_path / "said").read_text().splitlines()) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "words"),
    [("import time; time.sleep(60)", "given up"), ("raise ImportError('no wandb here')", "no wandb here")],
)
def test_what_happens_there_does_not_touch_the_run(code, words, config, model, tmp_path, monkeypatch, capfd):
    plain = evaluate(dataclasses.replace(config, wandb=WandbConfig(), out=str(tmp_path / "plain")), model, Worker())
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setitem(wandb_log.LIMITS, "offline", 1.0)
    monkeypatch.setattr(wandb_log, "PER_RUN", 0.0)
    done = evaluate(config, model, Worker())
    assert done.result == plain.result and contents(done.folder) == contents(plain.folder)
    said = capfd.readouterr().err
    assert said.count("wandb: ") == 1 and words in said
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setitem(wandb_log.LIMITS, "offline", 60.0)
    evaluate(config, model, Worker())  # what was not logged is logged by the same command
    assert len(read(tmp_path / "runs")) == 3 and contents(done.folder) == contents(plain.folder)
