"""The examples for batch systems say what the launcher understands."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from elastic_launch.cli.options import OPTIONS
from elastic_launch.config import LaunchConfig
from elastic_launch.errors import UsageError
from elastic_launch.host import token
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.run import config_from_args, parse_args

EXAMPLES = Path(__file__).parents[2] / "examples"
SLURM, KUBERNETES, TRAINJOB = (EXAMPLES / name for name in ("slurm.sbatch", "kubernetes.yaml", "trainjob.yaml"))
VARIABLES = {option.variable for option in OPTIONS}
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node-[7-9]",
}
"""What srun sets for each agent."""
CPUS = {"gpu": "cpu"}
"""What to launch with where the tests run: no devices."""


def stand_in(directory: Path, name: str, body: str) -> None:
    """A program that is found before any other of its name."""
    file = directory / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def run_slurm_script(path: Path, srun_status: int) -> tuple[list[str], list[str]]:
    """Run the batch script with Slurm's commands replaced. Returns what was run by srun, and what was told to Slurm."""
    keep_token = f"cp -p {path}/*.token {path}/token"
    stand_in(path, "srun", f'printf "%s\\n" "$@" > {path}/srun.args; {keep_token}; exit {srun_status}')
    stand_in(path, "scontrol", f'printf "%s\\n" "$*" >> {path}/scontrol.args')
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[7-9]", "SLURM_JOB_NUM_NODES": "3"}
    stand_in(path, "elastic-job", f'exec {sys.executable} -m elastic_launch.operate "$@"')
    environ = {**os.environ, **slurm, "PATH": f"{path}:{os.environ['PATH']}", "HOME": str(path)}
    done = subprocess.run(["bash", str(SLURM), __file__, "--epochs", "2"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (srun_status, "")
    told = path / "scontrol.args"
    return (path / "srun.args").read_text().splitlines(), told.read_text().splitlines() if told.exists() else []


def config(args: argparse.Namespace) -> tuple[LaunchConfig, list[str]]:
    found, _, words = config_from_args(args)
    return found, words


def test_slurm_script_launches_an_elastic_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, told = run_slurm_script(tmp_path, 0)
    start = words.index("elastic-run")
    assert {"--kill-on-bad-exit=0", "--wait=0", "--no-kill"} <= set(words[:start])
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    found, script = config(parse_args(words[start + 1 :]))
    assert (found.min_nodes, found.max_nodes, found.run_id) == (2, 3, "4711.0")
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("c10d", "node-7:27688")
    assert script[-3:] == [__file__, "--epochs", "2"]
    assert found.token_file == str(tmp_path / "elastic-job-4711.token")
    assert not os.path.exists(found.token_file), "it is removed at the end"
    assert len(token.read(str(tmp_path / "token"))) == 64
    assert told == [], "a job that has ended is not put back into the queue"


@pytest.mark.parametrize(("status", "told"), [(143, ["requeue 4711"]), (1, []), (69, [])])
def test_slurm_script_goes_back_into_the_queue_when_it_was_stopped(
    tmp_path: Path, status: int, told: list[str]
) -> None:
    assert run_slurm_script(tmp_path, status)[1] == told


def test_slurm_script_leaves_time_for_checkpoints() -> None:
    text = SLURM.read_text()
    grace = re.search(r"^GRACE=(\d+)$", text, re.MULTILINE)
    announced = re.search(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)
    assert grace
    assert announced
    assert int(grace[1]) < min(30, int(announced[1])), "KillWait is 30 s unless it is set"


def kubernetes_variables() -> dict[str, str]:
    """The container's, but for those whose value only the cluster knows."""
    text = KUBERNETES.read_text()
    found = dict(re.findall(r'^ +- name: (\w+)\n +value: "?([^"\n]*)"?$', text, re.MULTILINE))
    assert len(found) == len(re.findall(r"^ +value: ", text, re.MULTILINE))
    return found


def test_kubernetes_variables_launch_an_elastic_job(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = kubernetes_variables()
    for name, value in variables.items():
        monkeypatch.setenv(name, CPUS.get(value, value))
    found, _ = config(parse_args([__file__]))
    assert (found.min_nodes, found.max_nodes, found.rdzv_backend) == (2, 4, "c10d")
    said: list[str] = []
    with pytest.raises(UsageError, match="/run/train-token/token: No such file"):
        create_rendezvous(found, {}, said.append)
    found.token_file = ""
    create_rendezvous(found, {}, said.append)
    assert said == [], "a setting of PET_RDZV_CONF is not known"
    text = KUBERNETES.read_text()
    assert re.findall(r"^  (?:completions|parallelism): (\d+)", text, re.MULTILINE) == ["4", "4"]
    kill = re.search(r"terminationGracePeriodSeconds: (\d+)", text)
    assert kill
    assert found.shutdown_timeout is not None
    assert found.shutdown_timeout < int(kill[1])
    assert f"port: {variables['TORCHELASTIC_HEALTH_CHECK_PORT']}\n" in text


def test_kubernetes_knows_all_that_the_manifest_says() -> None:
    """The published schemas are strict about names and types. 1.31 is the oldest version that the manifest is for."""
    for document in yaml.safe_load_all(KUBERNETES.read_text()):
        assert kubernetes_validate.validate(document, "1.31", strict=True) == "1.31"


def test_kubeflow_knows_all_that_the_train_job_says() -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    written = yaml.safe_load(TRAINJOB.read_text())
    # What the models do not know, they leave out.
    assert TrainerV1alpha1TrainJob.from_dict(written).to_dict() == written


def test_the_variables_of_a_train_job_launch_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]
    operators = {
        "PET_NNODES": trainer["numNodes"],
        "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
        "PET_NODE_RANK": 3,
        "PET_MASTER_ADDR": "train-node-0-0.train",
        "PET_MASTER_PORT": 29400,
    }
    for name, value in {**operators, **{it["name"]: it["value"] for it in trainer["env"]}}.items():
        monkeypatch.setenv(name, str(value))
    assert trainer["command"] == ["elastic-run"]
    found, _ = config(parse_args([__file__, *trainer["args"][1:]]))
    assert (found.max_nodes, found.nproc_per_node, found.rdzv_configs["rank"]) == (4, 8, 3)
    assert (found.rdzv_endpoint, found.max_restarts) == ("train-node-0-0.train:29400", 3)
    said: list[str] = []
    create_rendezvous(found, {}, said.append)
    assert said == [], "a setting of PET_RDZV_CONF is not known"


@pytest.mark.parametrize("file", [SLURM, KUBERNETES, TRAINJOB], ids=lambda file: file.name)
def test_variables_that_are_named_exist(file: Path) -> None:
    assert set(re.findall(r"\bPET_[A-Z_]+\b", file.read_text())) - {"PET_"} <= VARIABLES


def test_the_five_variables_of_operators_launch_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the comment in the manifest names, and no others."""
    five = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "3",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "master-0",
        "PET_MASTER_PORT": "29501",
    }
    assert all(name in KUBERNETES.read_text() for name in five)
    for name, value in five.items():
        monkeypatch.setenv(name, value)
    found, _ = config(parse_args([__file__]))
    assert (found.max_nodes, found.nproc_per_node, found.rdzv_configs["rank"]) == (2, 3, 1)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "master-0:29501")
