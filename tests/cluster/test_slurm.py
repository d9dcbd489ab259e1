"""The example for Slurm, under a real Slurm."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.support.slurm import slurm_cluster
from tests.support.waiting import wait_until

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
TRAIN = """\
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *args: print("checkpoint", flush=True) or sys.exit(0))
print("rank {RANK} of {WORLD_SIZE} in {TORCHELASTIC_RUN_ID}".format(**os.environ), flush=True)
while True: signal.pause()
"""


def test_the_batch_script_runs_one_job_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    train, log, programs = tmp_path / "train.py", tmp_path / "out.log", tmp_path / "bin"
    train.write_text(TRAIN)
    programs.mkdir()
    for name, module in (("elastic-run", "elastic_launch"), ("elastic-job", "elastic_launch.operate")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "TOKEN_DIR": str(tmp_path)}

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    with slurm_cluster(tmp_path) as slurm:
        options = ["--parsable", "--nodes=2", f"--output={log}", str(SCRIPT), "--nproc-per-node", "1", str(train)]
        number = slurm.run("sbatch", *options, **environ).strip()
        ranks = {f"rank {rank} of 2 in {number}.0" for rank in (0, 1)}
        wait_until(lambda: ranks <= set(lines()), "two ranks in one job")
        slurm.run("scancel", "--signal=TERM", number)  # as Slurm does some time before the time limit
        wait_until(lambda: "Restarts=1" in slurm.job(number), "the job is in the queue again")
        assert lines().count("checkpoint") == 2
