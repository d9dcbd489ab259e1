"""Programs that start torch's launcher for their users, as they are published: they start ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import Job, report_of
from tests.support.ports import free_port

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
ADOPT = (sys.executable, "-m", "elastic_launch", "--adopt", "--")
PATIENCE = 500
"""Seconds for a program that imports torch several times on a busy machine."""


def start(job: Job, *command: object, **env: str) -> subprocess.Popen[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "HF_HOME": str(job.path / "hub"), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    job.processes.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the status and all output of a program."""
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def test_accelerate_launch_restarts(job: Job) -> None:
    script = job.script("print('rank', rank, 'of', os.environ['WORLD_SIZE'], flush=True)\nif rank > restart: 1 / 0")
    words = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--max_restarts", 1, "--tee", 3)
    more = ("--main_process_port", free_port(), "--log_dir", job.path / "logs")
    status, text = finish(start(job, *ADOPT, "accelerate", "launch", *words, *more, script))
    assert status == 0, text
    assert "elastic-run: rank 1 failed (exit code 1, ZeroDivisionError: division by zero): restart 1 of 1" in text
    assert text.count("[default1]:rank 1 of 2\n") == 2
    assert "elastic-run: done: 2 workers succeeded" in text


def test_accelerate_launch_on_two_machines_fails_on_both(job: Job) -> None:
    script = job.script("mark()\nwait_for('0.0', '1.0')\nif rank == 1: sys.exit(7)\nwait()")
    words = ("--multi_gpu", "--num_processes", 2, "--num_machines", 2, "--main_process_ip", "127.0.0.1")
    port = ("--main_process_port", free_port())
    commands = [("accelerate", "launch", *words, *port, "--machine_rank", machine, script) for machine in (0, 1)]
    for process in [start(job, *ADOPT, *command) for command in commands]:
        status, text = finish(process)
        assert status == 1, text  # accelerate's own, after its traceback
        assert "elastic_launch.errors.ChildFailedError" in text
        assert "  rank    : 1 (local rank 0, " in text
        assert "  exit    : exit code 7\n" in text


def test_fabric_run(job: Job) -> None:
    script = job.script("if rank == 1: raise ValueError(f'boom {os.environ[\"LT_DEVICES\"]} {sys.argv[1:]}')\nwait()")
    words = ("run", "--accelerator=cpu", "--devices=2", f"--main-port={free_port()}")
    status, text = finish(start(job, *ADOPT, "fabric", *words, script, "--lr", 1))
    assert status == 1, text
    assert "  error   : ValueError: boom 2 ['--lr', '1']\n" in text


def test_torchx_ddp(job: Job) -> None:
    script = job.script("print('args', sys.argv[1:], flush=True)\nif rank == 1: sys.exit(7)\nwait()")
    command = ("torchx", "run", "-s", "local_cwd", "--wait", "--log", "dist.ddp", "-j", "1x2", "--script", script)
    status, text = finish(start(job, *command, "--", "--lr", "1", ELASTIC_LAUNCH_AS_TORCHRUN="1"))
    assert status == 1, text
    assert "args ['--lr', '1']" in text
    assert "elastic-run: rank 1 failed (exit code 7): stopping 1 worker" in text


NOTEBOOK = """
import elastic_launch.compat
from accelerate import notebook_launcher
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

def train(divisor):
    print(f"rank {os.environ['RANK']}: {4 // (int(os.environ['RANK']) - divisor)}\\n", end="", flush=True)

def launch(divisor, **more):
    notebook_launcher(train, args=(divisor,), num_processes=2, use_port=PORT, **more)

launch(-1)
try:
    launch(1, max_restarts=0)
except ChildFailedError as error:
    print("caught", error.get_first_failure()[0], error.get_first_failure()[1].error)
"""


def test_notebook_launcher(job: Job) -> None:
    (job.path / "cell.py").write_text(f"import os\nPORT = '{free_port()}'\n{NOTEBOOK}")
    status, text = finish(start(job, sys.executable, "cell.py"))
    assert status == 0, text
    assert {"rank 0: 4", "rank 1: 2", "rank 0: -4"} <= set(text.split("\n"))
    assert "caught 1 ZeroDivisionError: integer division or modulo by zero" in text


TRAINER = """
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def forward(self, x, labels):
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}

class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if (rank, restart, state.global_step) == (1, 0, 1): raise ValueError("boom")

data = [{"x": torch.tensor([float(x)]), "labels": torch.tensor([2.0 * x])} for x in range(16)]
args = TrainingArguments("out", use_cpu=True, max_steps=2, per_device_train_batch_size=2, report_to=[],
                         save_strategy="no", disable_tqdm=True)
trainer = Trainer(Model(), args, train_dataset=data, callbacks=[Fail()])
trainer.train()
# After a line that the other rank may have printed without its end so far.
print(f"\\nrank {rank} of {args.world_size}: step {trainer.state.global_step}\\n", end="", flush=True)
"""


def test_trainer_restarts_under_the_command_torchrun(job: Job) -> None:
    command = ("torchrun", "--nproc-per-node", 2, "--max-restarts", 1, "--", job.script(TRAINER))
    switches = {"ELASTIC_LAUNCH_AS_TORCHRUN": "1", "PET_PRELOAD": "torch,transformers.trainer"}
    status, text = finish(start(job, *command, **switches))
    assert status == 0, text
    assert "elastic-run: rank 1 failed (exit code 1, ValueError: boom): restart 1 of 1" in text
    assert {"rank 0 of 2: step 2", "rank 1 of 2: step 2"} <= set(text.split("\n"))


def test_torchs_module_is_handed_over_before_torch_is_imported(job: Job) -> None:
    """And it keeps its exit status. A worker that runs torchrun itself starts a job of its own, of the same kind."""
    (job.path / "torch.py").write_text("raise SystemExit('torch was imported')")  # -P: of the working directory
    script = job.script("print('rank', rank, sys.argv[1:], flush=True)\nif sys.argv[1:] and rank: sys.exit(7)\nwait()")
    inner = job.script(f"os.execvp('torchrun', ['torchrun', '--nproc-per-node', '2', {script!r}, 'x'])", "inner.py")
    for command in (
        ("torchrun", "--nproc-per-node", 2, script, "x"),
        (sys.executable, "-u", "-mtorch.distributed.run", "--nproc-per-node=2", script, "x"),
        (sys.executable, "-m", "torch.distributed.launch", "--use-env", "--nproc-per-node=2", script, "x"),
        (sys.executable, "-m", "torch.distributed.launch", "--nproc-per-node=2", script),
        ("torchrun", inner),
    ):
        status, text = finish(start(job, *command, ELASTIC_LAUNCH_AS_TORCHRUN="1"))
        assert (status, "torch was imported" in text) == (7, False), text
        assert "  exit    : exit code 7\n" in report_of(text)
