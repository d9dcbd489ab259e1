"""``--cluster slurm``: what Slurm's variables say, and what a user has given besides."""

from __future__ import annotations

import pytest

from elastic_launch.cli.cluster import first_host, slurm
from elastic_launch.errors import UsageError
from elastic_launch.run import config_from_args, parse_args

BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "node-[7-9]",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "3",
}
"""In a batch script, as Slurm 22.05 sets them."""
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node-[8-9]",
    "SLURM_NODEID": "1",
}
"""In a step on two of the nodes."""
ONE = {**BATCH, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n01"}


@pytest.fixture
def in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environ", "nnodes", "rank", "endpoint", "job"),
    [
        (STEP, "2", "1", "node-8:27688", "4711.0"),
        ({**STEP, "SLURM_STEP_ID": "3"}, "2", "1", "node-8:27691", "4711.3"),
        ({**STEP, "SLURM_RESTART_COUNT": "2"}, "2", "1", "node-8:27688", "4711.0"),  # after a requeue
        ({**STEP, "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}, "2", "1", "node-8:27688", "4711.0"),
        (ONE, "1", "0", "n01:27688", "4711"),  # the batch script itself
        ({**ONE, "SLURM_JOB_ID": "4712"}, "1", "0", "n01:27696", "4712"),
    ],
)
def test_slurm_tells_where_nodes_meet(environ: dict[str, str], nnodes: str, rank: str, endpoint: str, job: str) -> None:
    values = {name: value for name, (value, _) in slurm(environ).items()}
    assert values == {
        "nnodes": nnodes,
        "node_rank": rank,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": endpoint,
        "rdzv_id": job,
    }


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n[01-03,07]", "n01"),
        ("n[3,5-9],m[1-2]", "n3"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]n[008-010]", "rack2n008"),
        ("n[1-2]-ib.example", "n1-ib.example"),
        ("10.0.0.[17-18]", "10.0.0.17"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({}, "SLURM_JOB_ID is not set: this process is not part of a Slurm job"),
        ({"SLURM_JOB_ID": "1"}, "SLURM_JOB_NUM_NODES is not set"),
        (BATCH, "job 4711 has 3 nodes, and this is not a job step"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "8"}, "step 4711.0 starts 8 launchers on 2 nodes: pass srun --ntasks=2"),
        ({**STEP, "SLURM_HET_SIZE": "2"}, "a heterogeneous job"),
        ({**STEP, "SLURM_JOB_ID": "many"}, "SLURM_JOB_ID='many': must be a number"),
        ({**STEP, "SLURM_NODEID": "-1"}, "SLURM_NODEID='-1': must be a number"),
    ],
)
def test_where_no_agent_should_be(environ: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError, match=r"^--cluster=slurm: ") as error:
        slurm(environ)
    assert text in str(error.value)


@pytest.mark.usefixtures("in_slurm")
@pytest.mark.parametrize(
    ("words", "nodes", "backend", "endpoint", "job"),
    [
        ("", (2, 2), "c10d", "node-8:27688", "4711.0"),
        ("--nnodes 2:4 --rdzv-id mine", (2, 4), "c10d", "node-8:27688", "mine"),
        ("--rdzv-endpoint here:1 --rdzv-backend c10d", (2, 2), "c10d", "here:1", "4711.0"),
        ("--rdzv-backend etcd --rdzv-endpoint e:2379", (2, 2), "etcd", "e:2379", "4711.0"),
        ("--rdzv-backend static", (2, 2), "static", "node-8:27688", "4711.0"),
        ("--master-addr there --master-port 7", (2, 2), "static", "there:7", "4711.0"),
        ("--standalone", (1, 1), "c10d", "", ""),
    ],
)
def test_what_is_given_wins(words: str, nodes: tuple[int, int], backend: str, endpoint: str, job: str) -> None:
    args = parse_args(["--cluster", "slurm", *words.split(), __file__])
    found, _, _ = config_from_args(args)
    assert ((found.min_nodes, found.max_nodes), found.rdzv_backend) == (nodes, backend)
    assert (found.rdzv_endpoint, found.run_id) == (endpoint, job)
    assert found.rdzv_configs.get("rank") == (0 if words == "--standalone" else 1)
    if not words:
        assert args.given["nnodes"] == "SLURM_STEP_NUM_NODES", "where --dry-run says that it comes from"


@pytest.mark.usefixtures("in_slurm")
def test_without_the_option_slurm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_args([__file__]).nnodes == "1:1"
    monkeypatch.setenv("PET_CLUSTER", "slurm")
    assert parse_args([__file__]).nnodes == "2"


@pytest.mark.usefixtures("in_slurm")
def test_a_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(SystemExit):
        parse_args(["--cluster", "slurm", __file__])
    assert "--cluster=slurm: SLURM_STEP_NUM_NODES='0': must be a number of nodes" in capsys.readouterr().err
