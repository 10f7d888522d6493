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
    for _ in range(200):
        if (folder / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    calls = (folder / "calls").read_text().splitlines()
    assert calls == ["srun --gpus-per-task=1 python -m segresearch evaluate experiment=table2 images=9",
                     "scontrol requeue 5_1"]  # fmt: skip


def test_a_worker_that_does_not_end_is_not_waited_for_until_the_limit(slurm):
    folder, env = slurm
    (folder / "srun").write_text("#!/bin/bash\ntrap '' USR1\ntouch ready\nexec sleep 30\n")
    process = subprocess.Popen(["bash", str(SCRIPT)], cwd=folder, env=env | {"GRACE": "1"}, start_new_session=True)
    for _ in range(200):
        if (folder / "ready").exists():
            break
        time.sleep(0.05)
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
