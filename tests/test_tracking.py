"""The mirror in W&B: what an offline run holds, read back from its file, and every way in which W&B may fail."""

import dataclasses
import json
import math
import os
import struct
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from segresearch import tracking
from segresearch.tracking import Mirror, WandbConfig, mirror, numbered, once

OFFLINE = WandbConfig("offline")


@pytest.fixture
def pictures(tmp_path):
    found = []
    for color in ("red", "blue"):
        found.append(tmp_path / f"{color}.png")
        Image.new("RGB", (8, 8), color).save(found[-1])
    return found


@pytest.fixture
def runs(pictures):
    rows = [{"seed": 0, "picture": pictures[0], "x": math.inf}, {"seed": 1, "picture": pictures[1], "x": 0.5}]
    one = Mirror(
        "SEG",
        "table1",
        "setting",
        settings={"sigma": math.inf},
        metrics={"fd": 1.5, "none": None},
        series={"rms": [0.1, 0.2]},
        tables={"t": rows},
        images={"pictures": [(p, p.stem) for p in pictures]},
    )
    whole = Mirror("all", "table1", "evaluation", images={"quality": pictures[0]})
    return numbered([one, whole], "key")


def stored(file: Path) -> list:
    """The records of an offline run's file: W&B's header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = file.read_bytes(), 7, [], []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return found


def read(folder: Path) -> dict[str, tuple]:
    """By name: (run, last values, settings, whether it was finished) of every offline run below `folder`."""
    found = {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        records, values, ended = stored(file), {}, False
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
            elif kind == "history":
                values |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            ended |= kind == "exit"
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        found[run.display_name] = (run, values, settings, ended)
    return found


def test_an_offline_run_holds_groups_numbers_tables_and_figures(runs, tmp_path, pictures, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert mirror(OFFLINE, tmp_path / "out", runs)
    found = read(tmp_path / "out")
    assert set(found) == {"SEG", "all"}
    run, values, settings, ended = found["SEG"]
    assert (run.run_group, run.job_type, run.project, run.run_id) == ("table1", "setting", "segresearch", runs[0].id)
    assert settings["sigma"] == "inf" and ended
    assert values["fd"] == 1.5 and "none" not in values and values["rms"] == 0.2 and values["evaluation"] == 2
    assert values["t/_type"] == "table-file" and values["t/nrows"] == 2
    assert values["pictures/captions"] == ["red", "blue"]
    assert found["all"][1]["quality/_type"] == "image-file"
    media = [p.read_bytes() for p in (tmp_path / "out" / "wandb").rglob("*") if p.is_file()]
    for picture in pictures:  # in the run's media and in the table
        assert media.count(picture.read_bytes()) >= 2
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]


def test_off_does_nothing_and_the_same_runs_are_mirrored_once(runs, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tracking, "_sent", lambda *a: calls.append(a) or "")
    assert not mirror(WandbConfig(), tmp_path / "out", runs) and not (tmp_path / "out").exists()
    assert once(OFFLINE, tmp_path / "out", runs) and not once(OFFLINE, tmp_path / "out", runs)
    assert once(OFFLINE, tmp_path / "out", numbered(runs, "another"))
    assert once(dataclasses.replace(OFFLINE, mode="online"), tmp_path / "out", runs) and len(calls) == 3
    monkeypatch.setattr(tracking, "_sent", lambda *_: "no")
    assert not once(OFFLINE, tmp_path / "more", runs)
    monkeypatch.undo()


FAKES = {
    "raise ImportError('no wandb here')": "no wandb here",
    "def Settings(**_): raise RuntimeError('no account\\nat all')": "no account at all",
    "import os; os._exit(7)": "ended with code 7",
    "import time; time.sleep(60)": "not done in 1 s, given up",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)": "given up",
}


@pytest.mark.parametrize(("code", "words"), FAKES.items())
def test_a_mirror_that_fails_or_hangs_costs_one_line(code, words, runs, tmp_path, monkeypatch, capfd):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    start = time.monotonic()
    assert not mirror(OFFLINE, tmp_path / "out", runs, limit=1.0 if "given up" in words else 30.0)
    assert time.monotonic() - start < 30
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert words in said.err and "the run itself is complete" in said.err


def test_a_service_that_is_killed_on_the_way_costs_one_line(runs, tmp_path, capfd):
    """The real service, killed as soon as it is there, while the mirror has many runs to write."""
    answers = []
    many = [dataclasses.replace(runs[0], name=f"run {i}", id="") for i in range(400)]
    call = threading.Thread(target=lambda: answers.append(mirror(OFFLINE, tmp_path / "out", many, limit=20.0)))
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


def test_an_interrupt_ends_the_mirror_and_leaves_no_process(runs, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    def interrupted(*_):
        raise KeyboardInterrupt

    waited = tracking.subprocess.Popen.wait
    monkeypatch.setattr(tracking.subprocess.Popen, "wait", lambda p, *a: interrupted() if a else waited(p))
    before = psutil.Process().children()  # from Python 3.14 on a lock of tqdm starts Python's resource tracker
    with pytest.raises(KeyboardInterrupt):
        mirror(OFFLINE, tmp_path / "out", runs)
    left = [p for p in psutil.Process().children() if p not in before]
    assert not [p for p in left if sys.executable in p.cmdline() and p.is_running()]
    assert "wandb" not in os.listdir(tmp_path)
