"""The numbers of a run in W&B while it goes on, and a W&B that hangs, dies or is missing meanwhile."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from wandb_files import stored

from segresearch import wandb_live
from segresearch.progress import Bar
from segresearch.wandb_live import live
from segresearch.wandb_log import WandbConfig, WandbRun

OFFLINE = WandbConfig("offline", tags=("mine",))
RUN = WandbRun("study 0123", "study", "", {"model": "tiny"}, tags=["tiny"])


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(wandb_live, "FIRST", 0.0)
    monkeypatch.setattr(wandb_live, "EVERY", 0.0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a module in the place of wandb."""

    def put(code):
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "wandb.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return put


def history(folder):
    """Of the one offline run below `folder`: (run, steps, exit code)."""
    import json

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = stored(file)
    steps = [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in records if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    return run, steps, [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]


def test_a_run_is_seen_while_it_goes_on(tmp_path):
    with live(OFFLINE, tmp_path, RUN) as watch, Bar(6, watch=watch) as bar:
        for method in ("vanilla", "SEG σ=∞"):
            bar.describe(method)
            bar.add(2)
        until = time.monotonic() + 60
        while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < until:
            time.sleep(0.05)
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))  # the run still goes on
        bar.numbers["shards"] = 1
        bar.add(2)
    run, steps, codes = history(tmp_path)
    assert run.display_name.startswith("study 0123 progress 2") and run.run_group == "study"
    assert run.job_type == "progress" and list(run.tags) == ["study", "progress", "tiny", "mine"]
    assert codes == [0] and [step["images"] for step in steps] == [2, 4, 6]
    last = steps[-1]
    assert last["done/vanilla"] == 2 and last["done/SEG σ=∞"] == 4 and last["share"] == 1 and last["shards"] == 1
    assert last["images_per_second"] > 0 and "shards" not in steps[0]


def test_a_run_that_fails_is_marked_as_one(tmp_path):
    with pytest.raises(KeyError), live(OFFLINE, tmp_path, RUN) as watch:
        watch({"images": 1})
        until = time.monotonic() + 60
        while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < until:
            time.sleep(0.05)
        raise KeyError
    assert history(tmp_path)[2] in ([1], [])  # [] where W&B did not close in time


def test_nothing_starts_for_short_runs_or_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_live, "FIRST", 10.0)
    now = [0.0]
    monkeypatch.setattr(wandb_live, "start", lambda *_: pytest.fail("started"))
    with live(OFFLINE, tmp_path, RUN, lambda: now[0]) as watch:
        for now[0] in range(10):
            watch({"images": now[0]})
    with live(WandbConfig(), tmp_path, RUN) as watch:
        assert watch is None
    assert not (tmp_path / "wandb").exists()


def test_two_starts_of_one_run_are_two_runs_of_wandb(tmp_path, fake):
    fake(f"""
class Run:
    def __getattr__(self, name):
        return lambda *_, **__: None
def init(**given):
    open({str(tmp_path / "ids")!r}, "a").write(given["id"] + "\\n")
    return Run()
def Settings(**_): return None
""")
    for _ in range(2):
        with live(OFFLINE, tmp_path, RUN) as watch:
            watch({"images": 1})
    ids = (tmp_path / "ids").read_text().split()
    assert len(ids) == len({*ids}) == 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ImportError('no wandb here')", "no wandb here"),
        ("import os; os._exit(7)", "its process ended"),
        ("import time; time.sleep(60)", "not closed in 1 s, given up"),
        ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "given up"),
    ],
)
def test_trouble_costs_one_line_and_no_time(code, words, tmp_path, fake, monkeypatch, capfd):
    fake(code)
    monkeypatch.setitem(wandb_live.LIMITS, "offline", 1.0 if "sleep" in code else 20.0)
    slowest = 0.0
    with live(OFFLINE, tmp_path, RUN) as watch:
        for i in range(3000):  # more than a pipe holds
            begun = time.monotonic()
            watch({"images": i, "x" * 100: 1})
            slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 2, "a write has waited"
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("wandb: progress: ")
    assert words in said.err and "the run itself goes on" in said.err, said.err
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb_live" in " ".join(p.cmdline())]


KILLED = """
import sys, time
from pathlib import Path
from segresearch import wandb_live
from segresearch.wandb_log import WandbConfig, WandbRun
wandb_live.FIRST = 0.0
with wandb_live.live(WandbConfig("offline"), Path(sys.argv[1]), WandbRun("a", "b", "")) as watch:
    watch({"images": 1})
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_run_that_is_killed_leaves_no_process_of_wandb(tmp_path, fake):
    fake(f"""
class Run:
    def log(self, numbers): open({str(tmp_path / "said")!r}, "a").write(f"{{numbers}}\\n")
    def finish(self, exit_code): open({str(tmp_path / "said")!r}, "a").write(f"ended {{exit_code}}\\n")
def init(**given): return Run()
def Settings(**_): return None
""")
    root = os.path.dirname(os.path.dirname(wandb_live.__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    said, until = tmp_path / "said", time.monotonic() + 30
    while time.monotonic() < until and not (said.exists() and "ended" in said.read_text()):
        time.sleep(0.05)
    first, last = said.read_text().splitlines()
    assert "'images': 1" in first and last == "ended 1"
