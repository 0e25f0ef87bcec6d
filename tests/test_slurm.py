"""`launch/slurm.sh` on a real SLURM of one node: two processes that find each other, a signal before the time is over,
and the job that queues itself again. Needs Debian's slurm-wlm and munge, and root, whose daemons they are.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install slurm-wlm munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]

CONF = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.log
ReturnToService=2
KillWait=5
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""

# Trains nothing: joins the others, tells who it is, and on its first run waits for the signal.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
import jax
from jax.experimental.multihost_utils import process_allgather
from launch import cluster
cluster.initialize()
out = Path(sys.argv[1])
again = (out / "stopped").exists()
total = int(process_allgather(jax.numpy.ones(())).sum())
(out / f"{jax.process_index()}.json").write_text(json.dumps({"processes": jax.process_count(), "total": total}))
if again:
    sys.exit(0)
def stop(*_):
    (out / "stopped").touch()
    os._exit(int(os.environ["STOPPED_EXIT_CODE"]))
signal.signal(signal.SIGTERM, stop)
(out / f"{jax.process_index()}.ready").touch()
time.sleep(120)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` finds a cluster of this machine alone."""
    where = tmp_path / "slurm"
    for name in ("state", "spool", "munge"):
        (where / name).mkdir(parents=True)
    key = where / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = where / "slurm.conf"
    conf.write_text(CONF.format(dir=where, host=host, port=free_port(), slurmd_port=free_port(), cpus=os.cpu_count()))
    (where / "cgroup.conf").write_text("")
    environ = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    quiet = dict(env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    munged = [
        "munged", "--foreground", "--force", f"--socket={where}/munge.socket", f"--key-file={key}",
        f"--pid-file={where}/munged.pid", f"--log-file={where}/munged.log", f"--seed-file={where}/munge.seed",
    ]  # fmt: skip
    daemons = [subprocess.Popen(munged, **quiet)]  # type: ignore[call-overload]
    try:
        wait_for("munged", (where / "munge.socket").exists)
        for command in (["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf), "-N", host]):
            daemons.append(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
        idle = ["sinfo", "--noheader", "--format=%T"]
        wait_for(
            "the node",
            lambda: subprocess.run(idle, env=environ, capture_output=True, text=True).stdout.strip() == "idle",
        )
        yield environ
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def done_with(slurm: dict[str, str]) -> set[str]:
    """The steps of job 1 that the node has ended and forgotten."""
    log = Path(slurm["SLURM_CONF"]).with_name("slurmd.log").read_text()
    return set(re.findall(r"\[1\.(\w+)\] done with job", log))


def test_a_job_is_stopped_before_its_time_and_goes_on(slurm: dict[str, str], tmp_path: Path) -> None:
    program, log = tmp_path / "program.py", tmp_path / "job.log"
    program.write_text(PROGRAM)
    environ = {key: value for key, value in slurm.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    options = ["--ntasks-per-node=2", "--overcommit", "--signal=B:USR1@60", "--time=12", f"--output={log}"]
    submitted = subprocess.run(
        ["sbatch", "--parsable", *options, "launch/slurm.sh", sys.executable, program, tmp_path],
        cwd=ROOT, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def shown() -> str:
        return subprocess.run(["scontrol", "show", "job", job], env=environ, capture_output=True, text=True).stdout

    wait_for("both processes", lambda: all((tmp_path / f"{i}.ready").exists() for i in (0, 1)), 300)
    for i in (0, 1):
        assert json.loads((tmp_path / f"{i}.json").read_text()) == {"processes": 2, "total": 2}
        (tmp_path / f"{i}.json").unlink()
    # What SLURM itself sends when the time is nearly over.
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=environ, check=True)
    wait_for("the queue", lambda: "JobState=PENDING" in shown())
    wait_for("the node", lambda: done_with(slurm) == {"batch", "0"})
    # It also refuses what was begun in the second, by the clock, in which it was told to end the first run.
    after = int(time.time()) + 2
    wait_for("the next second", lambda: time.time() >= after)
    hurry = ["scontrol", "update", f"JobId={job}", "StartTime=now"]  # it would begin in two minutes
    subprocess.run(hurry, env=environ, check=True)
    wait_for("the second run", lambda: all((tmp_path / f"{i}.json").exists() for i in (0, 1)), 300)
    assert "stopped before its last step: queued again" in log.read_text()
    wait_for("the end", lambda: "JobState=COMPLETED" in shown())
    assert "Restarts=1" in shown()


def test_a_dry_run_prints_the_step() -> None:
    done = subprocess.run(
        ["bash", "launch/slurm.sh", "python", "-m", "launch.train"],
        cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0].split() == [
        "srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "python", "-m", "launch.train",
    ]  # fmt: skip
