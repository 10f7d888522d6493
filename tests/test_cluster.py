"""The batch script under stand-ins for Slurm's commands, and a disk that is full."""

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from segresearch import runs
from segresearch.cli import explained

SCRIPT = Path(runs.__file__).resolve().parents[1] / "experiments" / "slurm.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """A PATH with an srun that waits for a signal or ends at once, a python and a scontrol that note their calls."""
    files = {
        "srun": 'echo "srun $*" >> calls\n[ -n "$QUICK" ] && exit "$QUICK"\ntrap "exit 138" USR1\ntouch ready\n'
                "while true; do sleep 0.05; done\n",
        "scontrol": 'echo "scontrol $*" >> calls\n',
        "python": 'echo "python $*" >> calls\n[ -f late ] && exit 0\ntouch late\nexit 4\n',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5",
           "SLURM_ARRAY_TASK_ID": "1", "PAUSE": "0"}  # fmt: skip
    return tmp_path, env


def test_before_the_time_limit_the_workers_end_and_the_job_is_requeued(slurm):
    folder, env = slurm
    process = subprocess.Popen(["bash", str(SCRIPT), "images=9"], cwd=folder, env=env)
    ready(folder)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    calls = (folder / "calls").read_text().splitlines()
    assert calls == ["srun --gpus-per-task=1 python -m segresearch evaluate experiment=table2 images=9",
                     "scontrol requeue 5_1"]  # fmt: skip


def ready(folder):
    for _ in range(200):
        if (folder / "ready").exists():
            return
        time.sleep(0.05)


WAITING = """#!/bin/bash
trap "echo stopped >> calls; exit 138" USR1
touch ready
while true; do read -t 0.05 <> <(:); done
"""


@pytest.mark.parametrize("waiting", ["python", "sleep"])
def test_the_signal_counts_after_the_workers_too(slurm, waiting):
    """While the results are made, and in the pause before they are tried again, here of an hour."""
    folder, env = slurm
    (folder / "python").write_text("#!/bin/bash\nexit 4\n")
    (folder / waiting).write_text(WAITING)
    (folder / waiting).chmod(0o755)
    env = env | {"QUICK": "0", "PAUSE": "3600", "GRACE": "5" if waiting == "python" else "0"}
    process = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    ready(folder)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and said == ""
    calls = (folder / "calls").read_text().splitlines()
    assert "stopped" in calls[1:] and "scontrol requeue 5_1" in calls[1:] and len(calls) == 3


def test_a_job_that_is_not_requeued_says_so_and_does_not_end_well(slurm):
    """As with --no-requeue."""
    folder, env = slurm
    (folder / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    process = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    ready(folder)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 4 and said.count("\n") == 1 and "job 5_1 was not requeued" in said


def test_an_array_that_is_longer_than_the_experiments_ends_in_one_line(slurm):
    folder, env = slurm
    env = env | {"EXPERIMENTS": "table1 fig6", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", str(SCRIPT)], cwd=folder, env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (folder / "calls").exists()
    assert "EXPERIMENTS has 2 (table1 fig6) and none for task 2" in done.stderr and "--array=0-1" in done.stderr


def test_a_worker_that_does_not_end_is_not_waited_for_until_the_limit(slurm):
    folder, env = slurm
    (folder / "srun").write_text("#!/bin/bash\ntrap '' USR1\ntouch ready\nexec sleep 30\n")
    process = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=env | {"GRACE": "1"}, start_new_session=True)
    ready(folder)
    begun = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0 and time.monotonic() - begun < 20
    os.killpg(process.pid, signal.SIGKILL)  # what Slurm does to a job that it requeues
    assert (folder / "calls").read_text().splitlines() == ["scontrol requeue 5_1"]


def test_the_results_are_made_again_until_all_shards_are_seen(slurm):
    folder, env = slurm
    done = subprocess.run(["bash", str(SCRIPT)], cwd=folder, env=env | {"QUICK": "0"})
    calls = (folder / "calls").read_text().splitlines()
    assert done.returncode == 0 and calls[1:] == ["python -m segresearch evaluate experiment=table2 stage=reduce"] * 2


def test_a_failure_of_the_workers_is_the_jobs(slurm):
    folder, env = slurm
    assert subprocess.run(["bash", str(SCRIPT)], cwd=folder, env=env | {"QUICK": "3"}).returncode == 3


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")  # a write, unlike an open, names no file

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as error:
        runs.write(tmp_path / "table.md", "text")
    code, text = explained(error.value)
    assert code == 5 and str(tmp_path / "table.md") in text and "free some room" in text
    assert not [*tmp_path.iterdir()]
