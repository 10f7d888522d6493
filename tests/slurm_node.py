"""A Slurm of one node in a folder, for tests: munged, slurmctld and slurmd of this user, which end with the block."""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
SBIN = "/usr/sbin:/sbin"
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=15
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:{cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


def missing() -> list[str]:
    """The programs that a node needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


@contextlib.contextmanager
def node(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """The environment of clients of a node with `cpus` cores, each with a GPU in name alone. Its state is in `folder`.
    RuntimeError with the ends of its logs where it does not come up."""
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}", "SLURM_CONF": str(folder / "slurm.conf")}
    for name in [name for name in env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
        del env[name]  # of a job that these tests run in
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, user=user, folder=folder, cpus=cpus, ports=_ports(2)))
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={folder}/gpu{i}\n" for i in range(cpus)))
    for i in range(cpus):
        (folder / f"gpu{i}").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = (["munged", "--force", f"--socket={folder}/munge.socket", *files], ["slurmctld"], ["slurmd"])
    try:
        for daemon in daemons:
            done = subprocess.run(daemon, env=env, capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise RuntimeError(f"{daemon[0]}: {done.stderr.strip()[-500:]}")
        until = time.monotonic() + 60
        while "idle" not in (said := client(env, "sinfo", "-h", "-o", "%t").stdout):
            if time.monotonic() > until:
                ends = [path.read_text(errors="replace")[-500:] for path in folder.glob("slurm*.log")]
                raise RuntimeError(f"the node is {said.strip() or 'not there'}:\n" + "\n".join(ends))
            time.sleep(0.2)
        yield env
    finally:
        client(env, "scancel", "--signal=KILL", "--full", "--user", user)
        client(env, "scancel", "--user", user)
        until = time.monotonic() + 20
        while client(env, "squeue", "-h").stdout.strip() and time.monotonic() < until:
            time.sleep(0.2)
        for name in ("slurmd", "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


def _ports(count: int) -> list[int]:
    """Free ports of this machine."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def client(env: dict[str, str], *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """A command of Slurm."""
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


def job(env: dict[str, str], number: str) -> dict[str, str]:
    """What Slurm says of a job or of a task of an array: JobState, ExitCode, Restarts, ..."""
    said = client(env, "scontrol", "-o", "show", "job", number).stdout.splitlines()
    return dict(word.partition("=")[::2] for word in said[0].split()) if said else {}


def ended(env: dict[str, str], number: str, limit: float = 300.0) -> dict[str, str]:
    """`job` once it has ended. TimeoutError with its state."""
    until = time.monotonic() + limit
    while (state := job(env, number)).get("JobState") in ACTIVE:
        if time.monotonic() > until:
            raise TimeoutError(f"job {number} is {state['JobState']} ({state.get('Reason')}) after {limit:g} s")
        time.sleep(0.5)
    return state
