"""An evaluation in W&B: a group an experiment, a run a setting; and nothing that happens there touches its files."""

import dataclasses

import pytest
from make_models import write_folder
from matplotlib.figure import Figure
from test_tracking import read

from segresearch import png_metadata, tracking
from segresearch.config import EvaluateConfig, typed
from segresearch.evaluation import evaluate as run
from segresearch.evaluation.evaluate import evaluate
from segresearch.evaluation.workers import Worker
from segresearch.models import load_sdxl
from segresearch.tracking import WandbConfig

pytestmark = pytest.mark.filterwarnings("ignore:text encoder")
SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": 1}}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    def draw(*_):
        made = Figure(figsize=(1, 1))
        made.subplots().plot([1, 2])
        return {"quality": made}

    monkeypatch.setattr(run.plots, "draw", draw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_sdxl(folder)


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


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_evaluation_is_a_group_with_a_run_a_setting(config, model, tmp_path, monkeypatch):
    done = evaluate(config, model, Worker())
    found = read(tmp_path / "runs")
    whole = f"study {done.folder.name}"
    assert set(found) == {"vanilla", "SEG", whole} and {r.run_group for r, *_ in found.values()} == {"study"}
    assert [found[name][0].job_type for name in ("SEG", whole)] == ["setting", "evaluation"]
    _, values, settings, ended = found["SEG"]
    row = done.result.rows[1]
    assert ended and values["fd-mini"] == row["fd-mini"] and values["guidance_rms"] == done.result.norms["SEG"][-1]
    assert values["pictures/captions"] == ["seed 0: red", "seed 1"] and values["picture table/nrows"] == 2
    expected = {"method": "SEG", "sigma": 1.0, "blur": 0.5, "scale": 2.0, "run": done.folder.name, "model": "tiny"}
    assert expected.items() <= settings.items()
    _, values, settings, _ = found[whole]
    assert values["table/nrows"] == values["side by side/nrows"] == 2 and values["side by side/ncols"] == 4
    assert values["quality/_type"] == "image-file" and settings["all"]["images"] == 2
    media = list((tmp_path / "runs" / "wandb").glob("offline-run-*/files/media/images/pictures*.png"))
    assert len(media) == 4 and {png_metadata.read_record(p)["method"] for p in media} == {"vanilla", "SEG"}
    monkeypatch.setattr(tracking, "_sent", None)
    assert evaluate(config, model, Worker()).result == done.result and len(read(tmp_path / "runs")) == 3


@pytest.mark.parametrize(
    ("code", "words"),
    [("import time; time.sleep(60)", "given up"), ("raise ImportError('no wandb here')", "no wandb here")],
)
def test_what_happens_there_does_not_touch_the_run(code, words, config, model, tmp_path, monkeypatch, capfd):
    plain = evaluate(dataclasses.replace(config, wandb=WandbConfig(), out=str(tmp_path / "plain")), model, Worker())
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setitem(tracking.LIMITS, "offline", 1.0)
    monkeypatch.setattr(tracking, "EACH", 0.0)
    done = evaluate(config, model, Worker())
    assert done.result == plain.result and contents(done.folder) == contents(plain.folder)
    said = capfd.readouterr().err
    assert said.count("wandb: ") == 1 and words in said
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setitem(tracking.LIMITS, "offline", 60.0)
    evaluate(config, model, Worker())  # what is missing of the mirror is made by the same command
    assert len(read(tmp_path / "runs")) == 3 and contents(done.folder) == contents(plain.folder)
