"""``--dry-run``: what it tells is what a launch does, and it starts nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_launch.cli import checks, dry_run, plan, store_checks
from elastic_launch.cli.checks import Mark, Subject
from elastic_launch.errors import LaunchError, RendezvousConnectionError
from elastic_launch.host.ports import listen
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.rendezvous.backends.etcd import EtcdBackend
from elastic_launch.run import config_from_args, parse_args
from elastic_launch.store.etcd import gateway
from tests.support.jobs import TWO, Job
from tests.support.ports import free_port
from tests.support.servers import shared_etcd, shared_store
from tests.support.waiting import DEADLINE

SHOW = "import json; mark(json.dumps({'argv': open('/proc/self/cmdline').read().split(chr(0))[:-1], **os.environ}))"


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of a table, by the title above it."""
    _, _, rest = text.partition(f"{title}\n")
    assert rest, text
    lines = rest.partition("\n\n")[0].splitlines()
    return [re.split(r"  +", line.strip()) for line in lines]


def found(text: str) -> dict[str, tuple[str, str]]:
    """Mark and text of each check, by its name."""
    return {row[1]: (row[0], "  ".join(row[2:])) for row in rows(text, "Checks")}


def last_line(stderr: str) -> str:
    return stderr.strip().splitlines()[-1]


# ---- what it tells is what a launch does


def test_one_node_gets_exactly_the_environment_and_the_command_that_are_shown(job: Job) -> None:
    script = job.script(SHOW)
    words = (*TWO, "--rdzv-id", "j1", "--log-dir", "logs", "--virtual-local-rank", "--max-restarts", "1", script, "a b")
    shown = job.run("--dry-run", *words, CUDA_VISIBLE_DEVICES="4,5", OMP_NUM_THREADS="1")
    assert shown.returncode == 0, shown.stderr
    assert job.marks() == []
    assert not (job.path / "logs").exists()
    assert job.run(*words, CUDA_VISIBLE_DEVICES="4,5").returncode == 0
    common = dict(rows(shown.stdout, "Environment of each worker, besides what it inherits"))
    head, *workers = rows(shown.stdout, "Workers")
    assert len(workers) == 2
    told: dict[str, dict[str, str]] = {}
    for line in job.marks():
        worker = json.loads(line.split(" ", 1)[1])
        told[worker["RANK"]] = worker
    for number, worker in enumerate(workers):
        shown_here = {**common, **dict(zip(head[1:], worker[1:], strict=True))}
        real = told[str(number)]
        added = {name for name in real if real[name] != os.environ.get(name)} - {"argv", "LC_CTYPE"}
        assert added <= {*shown_here, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}, "this test has set the last two"
        chosen = {"MASTER_PORT": plan.FREE_PORT, "ELASTIC_LAUNCH_PROGRESS_FD": plan.DESCRIPTORS}
        assert shown_here == {name: real[name] for name in shown_here} | chosen
        assert plan.joined(real["argv"]) == shown.stdout.partition("Command of each worker\n  ")[2].partition("\n")[0]


def test_each_value_has_its_source(job: Job) -> None:
    (job.path / "job.toml").write_text("max-restarts = 2\nnproc-per-node = 3\nargs = ['-x']\nscript = 'train.py'")
    (job.path / "train.py").touch()
    result = job.run("--dry-run", "--config", "job.toml", "--max-restarts", "1", PET_ROLE="trainer")
    assert result.returncode == 0, result.stderr
    settings = {name: (value, source) for name, value, source in rows(result.stdout, "Options")}
    assert settings["max-restarts"] == ("1", "--max-restarts")
    assert settings["role"] == ("trainer", "PET_ROLE")
    assert settings["nproc-per-node"] == ("3", "job.toml")
    assert settings["nnodes"] == ("1:1", "default")
    assert settings["script"] == ("train.py -x", "job.toml")
    assert settings["log-dir"] == (plan.TEMPORARY, "default")


def test_values_that_stand_for_others_are_shown_as_what_they_mean(job: Job) -> None:
    script = job.script("")
    words = ("--dry-run", "--standalone", "--nproc-per-node", "cpu", script)
    result = job.run(*words, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="7")
    settings = {row[0]: tuple(row[1:]) for row in rows(result.stdout, "Options")}
    assert settings["nproc-per-node"] == (f"{len(os.sched_getaffinity(0))} (cpu)", "--nproc-per-node")
    assert settings["rdzv-backend"] == ("c10d", "--standalone")
    assert settings["shutdown-timeout"] == ("7", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


def test_of_several_nodes_it_tells_what_is_decided_later(job: Job) -> None:
    port = free_port()
    words = ("--nnodes", "2:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "j/1")
    result = job.run("--dry-run", *TWO, *words, "--log-dir", "logs", job.script(""))
    assert result.returncode == 0, result.stderr
    common = dict(rows(result.stdout, "Environment of each worker, besides what it inherits"))
    later = {name for name, value in common.items() if value == plan.LATER}
    assert later == {"GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "ROLE_RANK", "ROLE_WORLD_SIZE", "WORLD_SIZE"}
    assert (common["MASTER_PORT"], common["TORCHELASTIC_USE_AGENT_STORE"]) == (str(port), "True")
    assert common["TORCHELASTIC_ERROR_FILE"] == f"{job.path}/logs/j%2F1/attempt_0/RANK/error.json"
    assert rows(result.stdout, "Workers")[1:] == [["0", "0", plan.LATER], ["1", "1", plan.LATER]]
    fixed = job.run("--dry-run", "--nnodes", "2", "--master-addr", "localhost", "--node-rank", "1", job.script(""))
    common = dict(rows(fixed.stdout, "Environment of each worker, besides what it inherits"))
    assert (common["GROUP_RANK"], common["GROUP_WORLD_SIZE"]) == ("1", "2")


# ---- errors are those of the launch


def occupied(job: Job) -> list[str]:
    """A file where a directory should be."""
    (job.path / "file").touch()
    return ["--log-dir", "file", "--rdzv-id", "j1", job.script("")]


ERRORS: list[tuple[str, int, Callable[[Job], list[str]]]] = [
    ("script", 2, lambda job: ["nowhere.py"]),
    ("options", 2, lambda job: ["--node-rank", "1", job.script("")]),
    ("nodes", 2, lambda job: ["--nnodes", "2", "--rdzv-backend", "c10d", job.script("")]),
    ("backend", 2, lambda job: ["--rdzv-backend", "moon", job.script("")]),
    ("handler", 2, lambda job: ["--event-log-handler", "moon", job.script("")]),
    ("log directory", 69, occupied),
]


@pytest.mark.parametrize(("status", "words"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_error_and_status_are_those_of_the_launch(status: int, words: Callable[[Job], list[str]], job: Job) -> None:
    args = words(job)
    planned, launched = job.run("--dry-run", *args), job.run(*args)
    assert (planned.returncode, last_line(planned.stderr)) == (launched.returncode, last_line(launched.stderr))
    assert planned.returncode == status
    assert [mark for mark, _ in found(planned.stdout).values()].count("error") == 1


def test_port_in_use_is_an_error_as_at_the_launch(job: Job) -> None:
    with listen(0) as sock:
        args = ("--master-port", str(sock.getsockname()[1]), job.script(""))
        planned, launched = job.run("--dry-run", *args), job.run(*args)
    assert planned.returncode == launched.returncode == 69
    assert last_line(planned.stderr) == last_line(launched.stderr)
    assert f"(pid {os.getpid()})" in planned.stderr


def test_too_few_devices_are_an_error_as_at_the_launch(job: Job) -> None:
    args = (*TWO, "--virtual-local-rank", job.script(""))
    planned, launched = (job.run(*more, *args, CUDA_VISIBLE_DEVICES="3") for more in (("--dry-run",), ()))
    assert (planned.returncode, last_line(planned.stderr)) == (launched.returncode, last_line(launched.stderr))
    assert found(planned.stdout)["devices"][0] == "error"


@pytest.mark.parametrize(("limit", "mark", "status"), [(40, "warning", 0), (24, "error", 69)])
def test_limit_of_open_files(limit: int, mark: str, status: int, job: Job) -> None:
    command = (
        f"ulimit -n {limit}; exec {sys.executable} -m elastic_launch --dry-run -t 3 --nproc-per-node 4 --log-dir l "
    )
    result = subprocess.run(["sh", "-c", command + job.script("")], cwd=job.path, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert found(result.stdout)["open files"][0] == mark


def test_output_that_nobody_reads_to_its_end_is_no_error(job: Job) -> None:
    process = job.start("--dry-run", job.script(""))
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    assert job.finish(process).returncode == 0


def test_output_that_cannot_be_written_is_an_error(job: Job) -> None:
    with open("/dev/full", "w") as full:
        command = (sys.executable, "-m", "elastic_launch", "--dry-run", job.script(""))
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (69, "elastic-run: standard output: No space left on device\n")


def test_no_value_controls_the_terminal() -> None:
    assert dry_run.table([("a\nb", "\x1b[2J")]) == ["  a\\nb  \\x1b[2J"]


# ---- the checks of stores


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, a store may stand still for longer than a user would wait."""
    monkeypatch.setattr(store_checks, "PATIENCE", DEADLINE)
    monkeypatch.setattr(gateway, "TIMEOUT", DEADLINE)
    monkeypatch.setattr(gateway, "LONGEST", DEADLINE)


def c10d(host: str, port: int, is_host: bool | None = None) -> C10dBackend:
    return C10dBackend(host, port, is_host, {})


@pytest.mark.usefixtures("_patient")
def test_port_of_the_store_is_free_or_the_store_answers() -> None:
    port = free_port()
    assert store_checks.store(c10d("localhost", port), 600) == f"port {port} is free; this host serves the store"
    assert store_checks.names(c10d("127.0.0.1", port)) == "127.0.0.1 (this host)"
    port = shared_store().port
    assert store_checks.store(c10d("127.0.0.1", port), 600) == f"the store at 127.0.0.1:{port} answers"
    assert store_checks.store(c10d("127.0.0.1", port, False), 600) == f"the store at 127.0.0.1:{port} answers"


def test_store_of_another_host_need_not_serve_yet() -> None:
    doubt = store_checks.store(c10d("127.0.0.1", free_port(), False), 77)
    assert isinstance(doubt, store_checks.Doubt)
    assert "connection refused" in doubt.text
    assert "the launch waits up to 77 s" in doubt.text


@pytest.mark.usefixtures("_patient")
def test_stranger_at_the_port_of_the_store_is_named() -> None:
    with listen(0) as sock:
        port = sock.getsockname()[1]

        def answer() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RendezvousConnectionError, match="not as a TCPStore") as caught:
            store_checks.store(c10d("127.0.0.1", port), 600)
        thread.join()
    assert f"(pid {os.getpid()})" in str(caught.value)


def test_name_that_cannot_be_resolved(job: Job) -> None:
    words = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "no.invalid:1")
    result = job.run("--dry-run", *words, job.script(""))
    assert result.returncode == 69
    assert "cannot resolve 'no.invalid'" in last_line(result.stderr)
    assert found(result.stdout)["endpoint"][0] == "error"
    some = store_checks.names(EtcdBackend("no.invalid,127.0.0.1", "j", {}, {}))
    assert isinstance(some, store_checks.Doubt)
    assert some.text.startswith("127.0.0.1 (this host); cannot resolve 'no.invalid'")


@pytest.mark.usefixtures("_patient")
def test_etcd_is_healthy_and_has_a_version() -> None:
    endpoint = shared_etcd()
    healthy = store_checks.store(EtcdBackend(endpoint, "j", {}, {}), 600)
    assert isinstance(healthy, str)
    assert re.fullmatch(rf"{endpoint} is healthy \(etcd \d+\.\d+\.\d+\)", healthy)
    dead = f"127.0.0.1:{free_port()}"
    some = store_checks.store(EtcdBackend(f"{dead},{endpoint}", "j", {}, {}), 600)
    assert isinstance(some, store_checks.Doubt)
    assert some.text == f"{healthy}; {dead}: connection refused"
    with pytest.raises(
        RendezvousConnectionError, match=f"etcd at {dead} cannot be reached: {dead}: connection refused"
    ):
        store_checks.store(EtcdBackend(dead, "j", {}, {}), 600)


@pytest.mark.usefixtures("_patient")
def test_port_that_speaks_no_http_may_serve_grpc_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"127.0.0.1:{sock.getsockname()[1]}"

        def answer() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"\0\0\6\4\0\0\0\0\0")  # the beginning of HTTP/2

        thread = threading.Thread(target=answer)
        thread.start()
        doubt = store_checks.store(EtcdBackend(endpoint, "j", {}, {}), 600)
        thread.join()
    assert isinstance(doubt, store_checks.Doubt)
    assert "may serve gRPC alone" in doubt.text


def test_embedded_etcd_names_its_member_and_needs_its_ports(job: Job) -> None:
    port = free_port(2)
    words = f"--nnodes 2 --rdzv-backend etcd --rdzv-endpoint 127.0.0.1:{port} --rdzv-conf embedded=true --rdzv-id j"
    args = ("--dry-run", *words.split(), job.script(""))
    result = job.run(*args)
    assert result.returncode == 0, result.stderr
    assert f"runs the member 127.0.0.1:{port}" in found(result.stdout)["store"][1]
    with listen(port + 1):
        result = job.run(*args)
    assert result.returncode == 69
    assert f"port {port + 1} is in use" in last_line(result.stderr)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = c10d("localhost", 1), c10d("192.0.2.1", 1)
    assert str(store_checks.packages(here)).startswith("torch 2.")
    assert store_checks.packages(there) is None
    monkeypatch.setattr(store_checks, "_version", lambda package: "2.4.1")
    with pytest.raises(RendezvousConnectionError, match=r"needs torch 2.5 or later.*torch 2\.4\.1"):
        store_checks.packages(here)
    monkeypatch.setattr(store_checks, "_is_installed", lambda module: module == "etcd3")
    with pytest.raises(RendezvousConnectionError, match=r"needs torch 2\.5 or later.*no module named torch"):
        store_checks.packages(here)
    with pytest.raises(RendezvousConnectionError, match=r"pip install 'elastic-launch\[etcd\]'.*'grpc'"):
        store_checks.packages(EtcdBackend("h", "j", {}, {}))


# ---- the other checks


def checked(name: str, *args: str, **environ: str) -> tuple[Mark, str]:
    """What one check finds for a command line."""
    parsed = parse_args([*args, "train.py"])
    config, _, _ = config_from_args(parsed)
    rendezvous, _ = checks.check_rendezvous(config, environ)
    [finding] = [each for each in checks.run(Subject(parsed, config, environ, rendezvous)) if each.name == name]
    return finding.mark, finding.text


@pytest.fixture
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()


@pytest.mark.usefixtures("_in_a_directory")
def test_log_directory(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, text = checked("log directory", "--log-dir", "a/b", "--rdzv-id", "j1")
    assert (mark, text.split(":")[0]) == (Mark.OK, f"{tmp_path}/a/b/j1")
    mark, text = checked("log directory", "--log-dir", str(small_disk))
    assert mark is Mark.WARNING
    assert "64 KiB free; logs may be cut off" in text
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    assert checked("log directory", "--log-dir", "a")[0] is Mark.ERROR
    mark, text = checked("log directory", TMPDIR=str(tmp_path))
    assert (mark, text) == (
        Mark.WARNING,
        f"{tmp_path}: Permission denied; the job runs without files for exceptions",
    )


@pytest.mark.usefixtures("_in_a_directory")
def test_shared_memory(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SHM", str(small_disk))
    mark, text = checked("/dev/shm")
    assert mark is Mark.WARNING
    assert text.startswith("64 KiB, of which 64 KiB are free; data loaders")
    monkeypatch.setattr(checks, "SHM", str(small_disk / "nowhere"))
    assert checked("/dev/shm")[1].startswith("No such file or directory")


@pytest.mark.usefixtures("_in_a_directory")
def test_cpus_of_each_worker() -> None:
    mark, text = checked("CPUs", *TWO, "--numa-binding", "node")
    assert mark is Mark.OK, text
    assert re.fullmatch(r"local rank 0: [\d,-]+; local rank 1: [\d,-]+", text)


@pytest.mark.usefixtures("_in_a_directory")
def test_module_that_is_not_there_is_doubtful() -> None:
    assert checked("script", "-m")[0] is Mark.OK  # train.py is in the directory
    parsed = parse_args(["-m", "no_such_module.main"])
    config, _, _ = config_from_args(parsed)
    first = next(checks.run(Subject(parsed, config, {})))
    assert (first.name, first.mark) == ("script", Mark.WARNING)


def test_error_of_a_check_ends_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(subject: Subject) -> str:
        raise LaunchError("no")

    monkeypatch.setattr(checks, "CHECKS", (("a", fail), ("b", lambda subject: "yes"), ("c", lambda subject: None)))
    parsed = parse_args(["--no-python", "true"])
    results = [(each.name, each.mark) for each in checks.run(Subject(parsed, config_from_args(parsed)[0], {}))]
    assert results == [("a", Mark.ERROR), ("b", Mark.OK)]


def test_marks_have_colours_where_the_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = [checks.Finding("a", Mark.ERROR, "no")]
    assert dry_run.findings_table(finding) == ["  error  a  no"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert dry_run.findings_table(finding) == ["  \x1b[31merror\x1b[0m  a  no"]


def test_docs_list_every_check() -> None:
    page = (Path(checks.__file__).parents[2] / "docs/operating.md").read_text()
    table = page.partition("| check | looks at |\n|---|---|\n")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")}
    assert listed == {"rendezvous", *(name for name, _ in checks.CHECKS)}
