"""experiments/slurm.sbatch on a real Slurm of one node (make test-slurm): arrays, requeues, signals, lost workers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import contents
from slurm_node import client, ended, job, missing, node

from segresearch import runs
from segresearch.evaluation import shards

ROOT = Path(runs.__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "slurm.sbatch"
SETTINGS = ["compare=[none]", "images=4", "shard=1", "batch_size=1", "steps=2", "n_examples=1", "n_bootstrap=2",
            "n_subsets=2", "force=true", "reference=scene:100000-100009", "wandb.mode=off", "paper=none"]  # fmt: skip
LONGER = ["images=8", "steps=25"]  # of runs that are stopped on their way
LIMIT = 900.0  # seconds of a job, on a machine that does much beside
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed (slurm-wlm and munge): {', '.join(missing())}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of clients of a running node, whose jobs find this Python as `python`."""
    with node(tmp_path_factory.mktemp("slurm")) as env:
        path = f"{Path(sys.executable).parent}:{env['PATH']}"
        yield {**env, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PAUSE": "1"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The files of an evaluation without Slurm, by experiment."""
    made = {}

    def of(*settings):
        if settings not in made:
            out = tmp_path_factory.mktemp("plain")
            call = [sys.executable, "-m", "segresearch", "evaluate", *SETTINGS, *settings, f"out={out}"]
            subprocess.run(call, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
            made[settings] = results(out)
        return made[settings]

    return of


def results(out):
    """Shards, features of the reference and results below `out`."""
    return {name: data for name, data in contents(out).items() if "/" in name and not name.startswith("latest/")}


def submit(cluster, folder, *options, settings=()):
    """A job of the batch script with two workers; its number. Its output goes to <folder>/log."""
    given = ["--parsable", "--ntasks=2", "--cpus-per-task=1", "--array=0", f"--output={folder}/log-%a", *options]
    said = client(cluster, "sbatch", *given, str(SCRIPT), *SETTINGS, f"out={folder}/runs", *settings, cwd=folder)
    assert said.returncode == 0, said.stderr
    return said.stdout.strip()


def log(folder, task=0):
    path = folder / f"log-{task}"
    return path.read_text(errors="replace") if path.exists() else ""


def whole_shards(folder):
    """The shards that are there, with the times at which they were written; none may be damaged."""
    paths = sorted((folder / "runs").glob("shards/*/*.safetensors"))
    assert not [*filter(None, map(shards.verify, paths))]
    return {path: path.stat().st_mtime_ns for path in paths}


def until(condition, what):
    """Wait for `condition`, a function. Fails after LIMIT."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.2)
    return found


def running(cluster, folder, number):
    """Wait until a job has written its first shard."""
    until(lambda: [*(folder / "runs").glob("shards/*/*.safetensors")],
          lambda: f"no shard: {job(cluster, number)}\n{log(folder)}")  # fmt: skip


def again(cluster, number):
    """Start a requeued job in two seconds; Slurm lets it wait for two minutes. The node takes a launch in the second of
    the requeue for one of the job that it ended, and refuses it."""
    assert client(cluster, "scontrol", "update", f"jobid={number}", "StartTime=now+2").returncode == 0


def test_an_array_of_experiments_makes_the_bytes_of_plain_runs(cluster, plain, tmp_path):
    number = submit(cluster, tmp_path, "--array=0-1")
    for task, experiment in enumerate(("table1", "table2")):
        state = ended(cluster, f"{number}_{task}", LIMIT)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), log(tmp_path, task)
        assert log(tmp_path, task).count("2 images sampled") == 2  # by each worker; the last one makes the tables
        assert plain(f"experiment={experiment}").items() <= results(tmp_path / "runs").items()


def test_before_the_time_limit_a_job_is_requeued_and_keeps_its_shards(cluster, plain, tmp_path):
    """What Slurm sends by --signal=B:USR1@120, sent by hand."""
    number = f"{submit(cluster, tmp_path, settings=LONGER)}_0"
    running(cluster, tmp_path, number)
    assert client(cluster, "scancel", "--signal=USR1", "--batch", number).returncode == 0
    until(lambda: job(cluster, number)["Restarts"] == "1", lambda: f"{job(cluster, number)}\n{log(tmp_path)}")
    kept = whole_shards(tmp_path)
    assert "stopped by SIGUSR1: whole shards are kept; the same command resumes" in log(tmp_path) and len(kept) < 8
    again(cluster, number)
    state = ended(cluster, number, LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log(tmp_path)
    assert kept.items() <= whole_shards(tmp_path).items()  # none was written anew
    assert results(tmp_path / "runs") == plain("experiment=table1", *LONGER)


def test_slurm_itself_requeues_at_the_time_limit(cluster, tmp_path):
    """A limit of one minute, the least there is, and a run that takes longer."""
    options, hasty = ("--time=1", "--signal=B:USR1@40"), {**cluster, "GRACE": "10"}
    number = f"{submit(hasty, tmp_path, *options, settings=['images=100000'])}_0"
    until(lambda: job(cluster, number)["Restarts"] == "1", lambda: f"{job(cluster, number)}\n{log(tmp_path)}")
    assert job(cluster, number)["JobState"] == "PENDING"
    whole_shards(tmp_path)
    client(cluster, "scancel", number)


def test_a_cancelled_job_ends_with_its_shards_whole(cluster, tmp_path):
    number = f"{submit(cluster, tmp_path, settings=LONGER)}_0"
    running(cluster, tmp_path, number)
    client(cluster, "scancel", number)
    assert ended(cluster, number, LIMIT)["JobState"] == "CANCELLED"
    until(lambda: "stopped by SIGTERM" in log(tmp_path), lambda: log(tmp_path))
    assert 0 < len(whole_shards(tmp_path)) < 8
    assert not [path for path in (tmp_path / "runs" / "shards").rglob("*.tmp")]


FAILING = """#!/bin/bash
[ "$SLURM_PROCID" = 1 ] && [ -n "$SLURM_STEP_ID" ] && echo "error: no weights here" >&2 && exit 3
exec {python} "$@"
"""


def test_a_failing_worker_of_two_is_the_failure_of_the_job(cluster, plain, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAILING.format(python=sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)
    broken = {**cluster, "PATH": f"{tmp_path / 'bin'}:{cluster['PATH']}"}
    number = f"{submit(broken, tmp_path)}_0"
    state = ended(cluster, number, LIMIT)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "3:0"), f"{state}\n{log(tmp_path)}"
    assert "error: no weights here" in log(tmp_path) and "worker 1 of 2 has written its part; 2 of 4" in log(tmp_path)
    kept = whole_shards(tmp_path)
    assert len(kept) == 2
    state = ended(cluster, f"{submit(cluster, tmp_path)}_0", LIMIT)
    assert state["JobState"] == "COMPLETED" and kept.items() <= whole_shards(tmp_path).items(), log(tmp_path)
    assert results(tmp_path / "runs") == plain("experiment=table1")
