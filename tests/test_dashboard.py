"""Dashboards are built without a server, show what an experiment has, and are published only with an account."""

import builtins
import json
import subprocess
import sys

import pytest
from helpers import script

from segresearch import dashboard
from segresearch.config import conf_dir
from segresearch.dashboard import build, metrics_of, spec
from segresearch.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
METRICS = ("n", "fd-mini", "fd_to_baseline-mini", "fd-inception", "distance-mini", "distance-vgg", "saturation",
           "contrast")  # fmt: skip
SCRIPT = conf_dir().parent / "experiments" / "dashboard.py"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No account, and no way to a server."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a connection")

    for key in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)


def panels(given) -> list[dict]:
    """All panels in a spec, however deep."""
    if isinstance(given, dict):
        return ([given] if "viewType" in given else []) + [p for value in given.values() for p in panels(value)]
    return [p for value in given for p in panels(value)] if isinstance(given, list) else []


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_an_experiment_has_its_plots_pictures_and_tables(kind, offline):
    board = spec(build(kind, "table1", METRICS, "mine", "us"))
    shown = panels(board)
    scatter = [p["config"] for p in shown if p["viewType"] == "Scatter Plot"]
    axes = {(p["xAxis"], p["yAxis"]) for p in scatter}
    far, near = ("summary:distance-mini", "summary:distance-vgg"), ("summary:fd-mini", "summary:fd-inception")
    assert axes == {("config:blur.value", y) for y in near} | {(x, y) for x in far for y in near}
    assert "guidance_rms" in json.dumps([p for p in shown if p["viewType"] == "Run History Line Plot"])
    assert [p["config"]["mediaKeys"] for p in shown if p["viewType"] == "Media Browser"] == [["images"]]
    assert {p["viewType"] for p in shown} >= {"Bar Chart", "Weave"}
    text = json.dumps(board)
    assert "side by side" in text and '"name": "experiment"' in text and '"value": "table1"' in text
    assert kind == "workspace" or '"value": "method"' in text and '"value": "evaluation"' in text


def test_what_an_experiment_lacks_has_no_panel(offline):
    kinds = {p["viewType"] for p in panels(spec(build("workspace", "own", ("n", "saturation"))))}
    assert "Scatter Plot" not in kinds and {"Bar Chart", "Media Browser"} <= kinds


def test_the_script_prints_saves_and_says_what_publishing_needs(offline, call, tmp_path, monkeypatch):
    main = script("dashboard").main
    code, said = call(main, "table1")
    assert code == 2 and "table1: no runs of it in runs" in said.err and said.err.count("\n") == 1
    (tmp_path / "runs/table1/one").mkdir(parents=True)
    (tmp_path / "runs/table1/one/config.yaml").write_text("steps: 2\n")
    values = {"n": 3, "fd-mini": 2.5, "distance-mini": 0.1}
    rows = [{"method": "SEG", "metric": metric, "value": value, "error": None} for metric, value in values.items()]
    (tmp_path / "runs/table1/one/results.json").write_text(json.dumps({"metrics": rows}))
    assert metrics_of("table1") == ("n", "fd-mini", "distance-mini")
    code, said = call(main, "table1")
    assert code == 0 and len(panels(json.loads(said.out))) >= 5 and said.err == ""
    code, said = call(main, "table1", "--kind", "report", "--save", tmp_path / "report.json")
    assert code == 0 and said.out == "" and panels(json.loads((tmp_path / "report.json").read_text()))
    code, said = call(main, "table1", "--publish")
    assert code == 2 and said.err.count("\n") == 1 and "publishing needs a W&B account: run `wandb login`" in said.err


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    importing = builtins.__import__

    def missing(name, *rest, **keywords):
        if name.startswith("wandb_workspaces"):
            raise ImportError(f"No module named {name!r}")
        return importing(name, *rest, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'segresearch\[dashboards\]'"):
        build("report", "table1", METRICS)
    assert dashboard.EXTRA.count("\n") == 0


def test_help_and_slips_load_nothing_heavy(tmp_path):
    light = ("import runpy, sys\nsys.argv = sys.argv[1:]\n"
             "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
             "except SystemExit as end: print(end.code, sorted({'torch', 'wandb'} & set(sys.modules)))\n")  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", light, str(SCRIPT), "none"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.stdout == "2 []\n" and ended.stderr.startswith("error: none: no runs of it in runs")
