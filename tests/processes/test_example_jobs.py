"""The examples that are jobs, each run as its first lines say; ``digits_ddp.py`` is in ``test_demo.py``."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import TWO, Job
from tests.support.waiting import DEADLINE, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
STANDALONE = ("--standalone", *TWO)


def commands_in_path(folder: Path) -> str:
    """A PATH on which the programs are those under test."""
    for name, module in (("elastic-run", "elastic_launch"), ("elastic-job", "elastic_launch.operate")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


def test_a_pool_without_torch_does_each_task_although_a_worker_dies(job: Job) -> None:
    results = job.path / "results"
    done = job.run(
        *STANDALONE, "--max-restarts", "1", str(EXAMPLES / "pool.py"), "--results", str(results), "--tasks", "10",
        "--kill-task", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 1 failed (killed by SIGKILL): restart 1 of 1" in done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert sorted(map(int, found)) == list(range(10))
    assert [found[str(task)]["primes"] for task in (0, 1, 9)] == [168, 135, 112]


def test_a_preempted_job_goes_on_at_the_step_at_which_all_ranks_stopped(job: Job) -> None:
    folder = job.path / "checkpoints"
    script = (str(EXAMPLES / "preemption.py"), "--checkpoints", str(folder))
    first = job.start(*STANDALONE, *script, "--steps", "1000000")
    stdout, begun = first.stdout, ""
    assert stdout

    def have_begun() -> bool:
        nonlocal begun
        begun += stdout.readline()
        return begun.count("begins at step 0") == 2 and "step 20" in begun

    wait_until(have_begun)
    first.send_signal(signal.SIGTERM)
    out = job.finish(first).stdout
    assert first.returncode == 128 + signal.SIGTERM
    told = re.findall(r"told to stop at step (\d+)", out)
    assert len(told) == 2
    assert told[0] == told[1]
    shards = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [shard["step"] for shard in shards] == [int(told[0])] * 2

    second = job.run(*STANDALONE, *script, "--steps", str(int(told[0]) + 5))
    assert second.returncode == 0, second.stderr
    assert re.findall(r"begins at step (\d+)", second.stdout) == [told[0]] * 2


def test_the_smoke_test_for_ci_tells_success_from_failure(job: Job) -> None:
    path = commands_in_path(job.path)
    for text, status in (("print('hello')", 0), ("sys.exit(3 if rank else 0)", 3)):
        summary = job.path / f"summary-{status}.md"
        done = subprocess.run(
            [str(EXAMPLES / "smoke_test.sh"), job.script(text)],
            env={**os.environ, "PATH": path, "GITHUB_STEP_SUMMARY": str(summary), "SMOKE_LOGS": f"{job.path}/{status}"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == status, done.stderr
        assert ("exit code 3" in summary.read_text()) is bool(status)


@pytest.mark.torch
def test_fsdp2_resumes_from_its_shards(job: Job) -> None:
    options = (*STANDALONE, "--preload", "torch", "--max-restarts", "1")
    words = ("--checkpoint", "checkpoint", "--steps", "20", "--kill-step", "15")
    done = job.run(*options, str(EXAMPLES / "fsdp2.py"), *words)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"begins at step (.*)", done.stdout) == ["0 with 2 ranks", "10 with 2 ranks"]
    [loss] = re.findall(r"^loss (\S+)", done.stdout, re.MULTILINE)
    assert float(loss) < 8, "the loss at the beginning"


@pytest.mark.torch
def test_a_script_for_trainer_runs_unchanged(job: Job) -> None:
    options = (*STANDALONE, "--preload", "torch,transformers")
    arguments = ["--max_steps", "3", "--report_to", "none", "--disable_tqdm", "1", "--use_cpu", "1"]
    process = job.start(
        *options, str(EXAMPLES / "hf_trainer.py"), *arguments, "--output_dir", "out", HF_HUB_OFFLINE="1"
    )
    out, err = process.communicate(timeout=2 * DEADLINE)
    assert process.returncode == 0, err
    assert "steps 3, ranks 2" in out


NOTEBOOK = """\
import sys, nbclient, nbformat
from traitlets.config import Config
notebook = nbformat.read(sys.argv[1], as_version=4)
config = Config(KernelManager={"transport": "ipc"})  # no ports, which others could take before the kernel does
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", config=config).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.torch
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    result = tmp_path / "result.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(EXAMPLES / "notebook.ipynb"), str(result)],
        env={**os.environ, "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": os.environ["TMPDIR"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(result.read_text())["cells"] if cell["cell_type"] == "code"]
    _, launch, failure = (cell["outputs"] for cell in cells)
    [value] = [output["data"]["text/plain"] for output in launch if output["output_type"] == "execute_result"]
    losses = ast.literal_eval("".join(value))
    assert sorted(losses) == [0, 1]
    assert max(losses.values()) < 0.1
    assert "ValueError: no data for rank 0" in "".join(text for output in failure for text in output["text"])
