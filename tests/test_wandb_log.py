"""The log in W&B: what an offline run holds, read back from its file, and every way in which W&B may fail."""

import dataclasses
import math
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from wandb_files import read

from segresearch import wandb_log
from segresearch.runs import digest
from segresearch.wandb_log import WandbConfig, WandbRun, log

OFFLINE = WandbConfig("offline")


@pytest.fixture
def images(tmp_path):
    paths = []
    for color in ("red", "blue"):
        paths.append(tmp_path / f"{color}.png")
        Image.new("RGB", (8, 8), color).save(paths[-1])
    return paths


@pytest.fixture
def runs(images):
    rows = [{"seed": 0, "image": images[0], "x": math.inf}, {"seed": 1, "image": images[1], "x": 0.5}]
    one = WandbRun(
        "SEG",
        "table1",
        "method",
        settings={"sigma": math.inf},
        values={"fd": 1.5, "none": None},
        series={"rms": [0.1, 0.2]},
        tables={"t": rows},
        images={"images": [(p, p.stem) for p in images]},
    )
    whole = WandbRun("all", "table1", "evaluation", images={"quality": [(images[0], "")]})
    return [one, whole]


def test_an_offline_run_holds_groups_numbers_tables_and_figures(runs, tmp_path, images, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert log(OFFLINE, tmp_path / "out", "key", lambda _: runs)
    found = read(tmp_path / "out")
    assert set(found) == {"SEG", "all"}
    run, values, settings, ended = found["SEG"]
    run_id = digest(["key", "method", "SEG"])
    assert (run.run_group, run.job_type, run.project, run.run_id) == ("table1", "method", "segresearch", run_id)
    assert settings["sigma"] == "inf" and ended
    assert values["fd"] == 1.5 and "none" not in values and values["rms"] == 0.2 and values["evaluation"] == 2
    assert values["t/_type"] == "table-file" and values["t/nrows"] == 2
    assert values["images/captions"] == ["red", "blue"]
    assert found["all"][1]["quality/_type"] == "image-file"
    media = [p.read_bytes() for p in (tmp_path / "out" / "wandb").rglob("*") if p.is_file()]
    for image in images:  # in the run's media and in the table
        assert media.count(image.read_bytes()) >= 2
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]


FAKE = """
class Run:
    def __getattr__(self, name):
        return lambda *_, **__: None

def init(**given):
    with open({path!r}, "a") as file:
        file.write(given["id"] + "\\n")
    return Run()

def Settings(*_, **__):
    return None

Image = Table = Settings
"""


def test_off_does_nothing_and_the_same_runs_are_logged_once(runs, tmp_path, monkeypatch):
    out, logged = tmp_path / "out", tmp_path / "logged"
    (tmp_path / "wandb.py").write_text(FAKE.format(path=str(logged)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not log(WandbConfig(), out, "key", lambda _: runs) and not out.exists()
    assert log(OFFLINE, out, "key", lambda _: runs) and not log(OFFLINE, out, "key", lambda _: runs)
    assert log(OFFLINE, out, "another", lambda _: runs)
    assert log(dataclasses.replace(OFFLINE, mode="online"), out, "key", lambda _: runs)
    ids = logged.read_text().split()
    assert len(ids) == 6 and ids[:2] == ids[4:] and not {*ids[:2]} & {*ids[2:4]}
    (tmp_path / "wandb.py").write_text("raise ImportError('no')")
    assert not log(OFFLINE, tmp_path / "more", "key", lambda _: runs)
    (tmp_path / "wandb.py").write_text(FAKE.format(path=str(logged)))
    assert log(OFFLINE, tmp_path / "more", "key", lambda _: runs)


def test_runs_that_cannot_be_made_cost_one_line(tmp_path, capsys):
    def failing(folder: Path):
        raise OSError(28, "No space left on device")

    assert not log(OFFLINE, tmp_path, "key", failing)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left" in message


FAKES = {
    "raise ImportError('no wandb here')": "no wandb here",
    "def Settings(**_): raise RuntimeError('no account\\nat all')": "no account at all",
    "import os; os._exit(7)": "ended with code 7",
    "import time; time.sleep(60)": "not done in 1 s, given up",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)": "given up",
}


@pytest.mark.parametrize(("code", "words"), FAKES.items())
def test_a_log_that_fails_or_hangs_costs_one_line(code, words, runs, tmp_path, monkeypatch, capfd):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    start = time.monotonic()
    limit = 1.0 if "given up" in words else 30.0
    assert not log(OFFLINE, tmp_path / "out", "key", lambda _: runs, limit)
    assert time.monotonic() - start < 30
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert words in said.err and "the run itself is complete" in said.err


def test_a_service_that_is_killed_on_the_way_costs_one_line(runs, tmp_path, capfd):
    """The real service, killed as soon as it is there, while the log has many runs to write."""
    answers = []
    many = [dataclasses.replace(runs[0], name=f"run {i}") for i in range(400)]
    call = threading.Thread(
        target=lambda: answers.append(log(OFFLINE, tmp_path / "out", "key", lambda _: many, 20.0))
    )
    call.start()
    killed = False
    while call.is_alive() and not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if "wandb-core" in process.name() or "wandb-core" in " ".join(process.cmdline()[:1]):
                    if list((tmp_path / "out").glob("wandb/offline-run-*")):
                        process.kill()
                        killed = True
            except psutil.Error:
                continue
        time.sleep(0.01)
    call.join(60)
    assert killed and answers == [False]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("wandb: ") and "the run itself is complete" in said
    assert not [p for p in psutil.Process().children(recursive=True) if p.is_running() and "wandb" in p.name()]


def test_an_interrupt_ends_the_log_and_leaves_no_process(runs, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    def interrupted(*_):
        raise KeyboardInterrupt

    waited = wandb_log.subprocess.Popen.wait
    monkeypatch.setattr(wandb_log.subprocess.Popen, "wait", lambda p, *a: interrupted() if a else waited(p))
    before = psutil.Process().children()  # from Python 3.14 on a lock of tqdm starts Python's resource tracker
    with pytest.raises(KeyboardInterrupt):
        log(OFFLINE, tmp_path / "out", "key", lambda _: runs)
    left = [p for p in psutil.Process().children() if p not in before]
    assert not [p for p in left if sys.executable in p.cmdline() and p.is_running()]
    assert "wandb" not in os.listdir(tmp_path)


def test_images_of_generate_are_logged_with_their_grid(folder, model, tmp_path):
    from segresearch.config import GenerateConfig, typed
    from segresearch.generate import generate

    given = {
        "model": {"name": "tiny", "path": str(folder)}, "sampler": {"name": "euler"}, "schedule": {"name": "leading"},
        "name": "shots", "compare": [{}], "guidance": {"label": "CFG", "terms": {"cfg": {"kind": "cfg", "weight": 2}}},
        "prompts": ["red"], "seeds": "0-1", "steps": 1, "device": "cpu", "out": str(tmp_path / "runs"),
        "wandb": {"mode": "offline", "tags": ["mine"]},
    }  # fmt: skip
    done = generate(typed(GenerateConfig, given), model)
    ((name, (run, values, settings, ended)),) = read(tmp_path / "runs").items()
    assert name == f"shots {done.folder.name}" and ended and values["images"] == 4
    assert settings["run"] == done.folder.name
    assert list(run.tags) == ["shots", "images", "tiny", "vanilla", "CFG", "mine"]
    assert values["grid/_type"] == "image-file" and values["cfg/captions"] == ["seed 0: red", "seed 1: red"]
    assert "wandb" not in settings and not (done.folder / "wandb").exists()
