"""The main job, as ``make demo`` runs it: real training that loses a worker and recovers from its checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.jobs import Job

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "digits_ddp.py")


def test_training_recovers_from_its_checkpoint(job: Job) -> None:
    checkpoint = str(job.path / "digits.pt")
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    arguments = ("--epochs", "6", "--kill-rank", "1", "--kill-epoch", "4", "--checkpoint", checkpoint)
    done = job.run(*options, EXAMPLE, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("start: 2 ranks")
    killed, resumed = lines.index("rank 1 kills itself"), lines.index("resumed from epoch 4: 2 ranks, 1437 images")
    assert killed < resumed
    epochs = [int(match[1]) for line in lines if (match := re.match(r"epoch +(\d+): loss", line))]
    assert epochs == [1, 2, 3, 4, 5, 6], "each epoch is finished once: the checkpoint was used"
    accuracy = re.search(r"accuracy on 360 held-out images: ([\d.]+) %", done.stdout)
    assert accuracy
    assert float(accuracy[1]) > 90
    assert "rank 1 failed (killed by SIGKILL): restart 1 of 1" in done.stderr


def test_survivors_error_is_not_the_cause(job: Job) -> None:
    """A rank is killed in the middle of a collective; its peer's complaint is a consequence."""
    script = job.script(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo'); x = torch.ones(1); dist.all_reduce(x)\n"
        "signal.signal(15, signal.SIG_IGN)  # so that the survivor lives to complain\n"
        "if rank == 1: os.kill(os.getpid(), 9)\n"
        "dist.all_reduce(x)\n"
    )
    done = job.run("--nproc-per-node", "2", script)
    assert done.returncode == 137
    report = done.stderr[done.stderr.index("=====") :]
    assert report.index("rank    : 1 ") < report.index("exit    : killed by SIGKILL")
