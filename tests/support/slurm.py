"""A Slurm of two nodes on this host. A node's name is an address of its own, so each can be reached by its name."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import DEADLINE, wait_until

_CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool-%n
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName=127.0.0.[1-2] NodeHostname=localhost CPUs=1 State=UNKNOWN Port=[{first}-{last}]
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


class Slurm:
    """The cluster, to be asked by Slurm's own programs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environ = {**os.environ, "SLURM_CONF": str(path / "slurm.conf")}

    def run(self, *command: str, **environ: str) -> str:
        """Run one of Slurm's programs. Returns what it prints."""
        done = subprocess.run(
            command, env={**self.environ, **environ}, cwd=self.path, capture_output=True, text=True, timeout=DEADLINE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> str:
        """What Slurm knows of a job, as ``NAME=VALUE``."""
        return self.run("scontrol", "show", "job", number)


@contextlib.contextmanager
def slurm_cluster(path: Path) -> Iterator[Slurm]:
    """Run the cluster, with its files in a directory. At the end its jobs are cancelled."""
    cluster = Slurm(path)
    port = free_port(3)
    config, state, log = path / "slurm.conf", path / "state", path / "daemons.log"
    config.write_text(_CONFIG.format(path=path, port=port, first=port + 1, last=port + 2))
    state.mkdir()
    with contextlib.ExitStack() as stack, log.open("wb") as output:

        def start(*command: str) -> None:
            daemon = subprocess.Popen(
                [*command, "-D", "-f", str(config)], env=cluster.environ, stdout=output, stderr=output
            )
            stack.callback(daemon.wait, DEADLINE)
            stack.callback(daemon.terminate)

        start("slurmctld")
        for node in (1, 2):
            start("slurmd", "-N", f"127.0.0.{node}")
        wait_until(lambda: _is_ready(cluster), "both nodes are idle")
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
            cluster.run("scancel", "--user=root")
            wait_until(lambda: not cluster.run("squeue", "--noheader"), "all jobs have ended")


def _is_ready(cluster: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"], env=cluster.environ, capture_output=True, text=True, timeout=DEADLINE
    )
    return done.stdout == "idle 2\n"
