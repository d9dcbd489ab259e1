"""``elastic-job exporter``: real jobs, scraped as Prometheus would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from elastic_launch import __version__
from elastic_launch.control.client import ask_all, sockets
from elastic_launch.operate import exporter
from elastic_launch.operate.exporter import JobCollector
from elastic_launch.operate.exporter_metrics import METRICS, UNUSABLE, Kind
from tests.support.control import elastic_job, start_elastic_job
from tests.support.jobs import TWO, Job
from tests.support.leaks import wait_for_children
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE, wait_until

HOST = os.uname().nodename
RUN = "mark('up'); wait()\n"
STEPS = """
from elastic_launch.worker import progress
for step in range(3): progress(step); time.sleep(0.02)
while time.process_time() < 0.1: pass
mark('stepped')
if rank == 1 and restart == 0: wait_for('go'); sys.exit(3)
wait()
"""

Samples = dict[str, dict[tuple[str, ...], float]]
"""By name, and by the labels' values in the order of their names."""


def samples(families: Any) -> Samples:
    """Return what a scrape tells; no sample is there twice."""
    found: Samples = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = tuple(value for _, value in sorted(sample.labels.items()))
        assert labels not in found.setdefault(sample.name, {}), sample
        found[sample.name][labels] = sample.value
    return found


def have_started(found: Samples, workers: int) -> bool:
    """Whether the agents know their workers' pids: these may step before that."""
    return len(found.get("elastic_worker_cpu_seconds_total", ())) == workers


class Exporter:
    """A running ``elastic-job exporter``."""

    def __init__(self, job: Job, *options: str) -> None:
        self.process = start_elastic_job(job, "exporter", "--port", "0", *options)
        assert self.process.stderr
        self.greeting = self.process.stderr.readline().strip()
        self.url = self.greeting.split()[-1]

    def text(self, accept: str = "text/plain") -> str:
        """Return the answer to one scrape."""
        request = urllib.request.Request(self.url, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=DEADLINE) as response:
            return str(response.read().decode())

    def scrape(self) -> Samples:
        """Return the samples of one scrape."""
        return samples(plain_text(self.text()))

    def scrape_when(self, condition: Callable[[Samples], object]) -> Samples:
        """Scrape until the samples are as they should be; return them."""
        found: list[Samples] = []

        def holds() -> bool:
            found.append(self.scrape())
            return bool(condition(found[-1]))

        wait_until(holds, "a scrape")
        return found[-1]


@pytest.fixture
def registry() -> CollectorRegistry:
    """The exporter in this process."""
    registry = CollectorRegistry()
    registry.register(JobCollector(os.environ))
    return registry


def start(job: Job, run_id: str, *args: str, script: str = RUN) -> subprocess.Popen[str]:
    """Start a job, and wait for its control socket."""
    before = len(sockets(os.environ))
    process = job.start("--rdzv-id", run_id, *args, job.script(script, f"{len(job.processes)}.py"))
    wait_until(lambda: len(sockets(os.environ)) > before)
    return process


def stop(job: Job, *processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        job.finish(process)


def test_a_job_is_told_with_its_restart_its_steps_and_its_workers(job: Job) -> None:
    process = start(job, "my-job", *TWO, "--max-restarts", "2", script=STEPS)
    job.wait_for("0.0 stepped", "1.0 stepped")
    served = Exporter(job)
    me = ("0", HOST, "my-job")  # agent, host, job_id
    found = served.scrape_when(lambda found: len(found.get("elastic_worker_steps_total", ())) == 2)
    assert found["elastic_agent_up"] == {me: 1}
    assert found["elastic_job_rounds_total"] == {me: 1}
    assert not any(found["elastic_job_restarts_total"].values())
    assert found["elastic_worker_steps_total"] == {(*me, "0"): 3, (*me, "1"): 3}
    job.mark("go")
    job.wait_for("0.1 stepped", "1.1 stepped")
    found = served.scrape_when(
        lambda found: found.get("elastic_job_steps_total", {}).get(me) == 6 and have_started(found, 2)
    )
    [info] = found["elastic_agent_info"]
    assert info == ("0", "static", HOST, "my-job", "root", __version__)
    assert {key[-1] for key, value in found["elastic_agent_state"].items() if value} == {"running"}
    assert {key[-1]: value for key, value in found["elastic_agent_workers"].items() if value} == {"running": 2}
    assert {key[1]: value for key, value in found["elastic_job_restarts_total"].items() if value} == {"failed": 1}
    single = ("rounds_total", "restarts_left", "nodes", "world_size", "repeated_steps_total", "stalled")
    assert [found[f"elastic_job_{name}"][me] for name in single] == [2, 1, 1, 2, 3, 0]
    assert found["elastic_agent_rendezvous_seconds_count"][me] == 2
    assert 0 <= found["elastic_agent_rendezvous_seconds_sum"][me] < DEADLINE  # alone, a node meets in no time
    lost = {key[-1]: value for key, value in found["elastic_job_lost_seconds_total"].items()}
    assert lost["start"] > 0
    assert lost["stalled"] == 0
    assert 0 < found["elastic_job_goodput_ratio"][me] < 1
    assert 0 <= found["elastic_job_last_step_age_seconds"][me] < DEADLINE
    workers = psutil.Process(process.pid).children()[0].children()
    told = sorted(found["elastic_worker_resident_memory_bytes"].values())
    assert told == pytest.approx(sorted(worker.memory_info().rss for worker in workers), rel=0.2)
    assert all(0 < value < DEADLINE for value in found["elastic_worker_cpu_seconds_total"].values())
    assert len(found["elastic_worker_cpu_seconds_total"]) == 2
    stop(job, process)
    assert served.scrape() == {UNUSABLE: {(): 0}}, "it has ended"
    assert served.process.poll() is None


def test_every_metric_is_described_in_both_formats_and_prometheus_parser_takes_them(job: Job) -> None:
    process = start(job, 'a "job"\\', script=STEPS)
    job.wait_for("0.0 stepped")
    served = Exporter(job)
    served.scrape_when(lambda found: "elastic_job_steps_total" in found and have_started(found, 1))
    for parser, accept in ((plain_text, "text/plain"), (open_metrics, "application/openmetrics-text; version=1.0.0")):
        families = list(parser(served.text(accept)))
        told = samples(families)
        assert ("0", HOST, 'a "job"\\') in told["elastic_agent_up"]
        assert {name.removesuffix("_count").removesuffix("_sum") for name in told} == {
            *(metric.name for metric in METRICS),
            UNUSABLE,
        }
        for metric in METRICS:
            base = metric.name.removesuffix("_total").removesuffix("_info")
            [family] = [family for family in families if family.name in (base, metric.name)]
            assert family.documentation == metric.help
            kind = "gauge" if metric.kind is Kind.INFO and parser is plain_text else metric.kind.value
            assert family.type == kind
    stop(job, process)


def test_jobs_with_the_same_id_are_told_apart(job: Job) -> None:
    first = start(job, "same")
    second = start(job, "same", *TWO)
    served = Exporter(job)
    sizes = {("0", HOST, "same"): 1.0, ("1", HOST, "same"): 2.0}
    found = served.scrape_when(lambda found: len(found.get("elastic_job_world_size", ())) == 2)
    assert found["elastic_job_world_size"] == sizes
    stop(job, first)
    assert served.scrape()["elastic_job_world_size"] == {("1", HOST, "same"): 2.0}
    stop(job, second)


def test_an_agent_that_hangs_is_down_and_holds_up_neither_the_others_nor_another_scrape(
    job: Job, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, healthy = start(job, "hanging"), start(job, "healthy")
    wait_until(lambda: job.marks() == ["0.0 up"] * 2)
    up = {("0", HOST, "hanging"): 0.0, ("0", HOST, "healthy"): 1.0}
    assert samples(registry.collect())["elastic_agent_up"] == dict.fromkeys(up, 1.0)
    hanging.send_signal(signal.SIGSTOP)
    # Both scrapes have asked before either gets an answer: so neither waits for the other.
    both = threading.Barrier(2, timeout=DEADLINE)

    def asked(paths: list[str]) -> Any:
        both.wait()
        return ask_all(paths)

    monkeypatch.setattr(exporter, "ask_all", asked)
    found: list[Samples] = []
    scrapes = [threading.Thread(target=lambda: found.append(samples(registry.collect()))) for _ in range(2)]
    for scrape in scrapes:
        scrape.start()
    for scrape in scrapes:
        scrape.join()
    assert [told["elastic_agent_up"] for told in found] == [up, up]
    assert all(set(told["elastic_job_nodes"]) == {("0", HOST, "healthy")} for told in found)
    hanging.send_signal(signal.SIGCONT)
    monkeypatch.setattr(exporter, "ask_all", ask_all)
    wait_until(lambda: samples(registry.collect())["elastic_agent_up"] == dict.fromkeys(up, 1.0))
    stop(job, hanging, healthy)


def test_what_a_dead_agent_left_is_not_told_and_is_removed(job: Job, registry: CollectorRegistry) -> None:
    process = start(job, "killed")
    job.wait_for("0.0 up")
    process.kill()
    process.wait()
    assert len(sockets(os.environ)) == 1
    assert samples(registry.collect()) == {UNUSABLE: {(): 0}}
    assert sockets(os.environ) == []
    wait_for_children()


def test_without_jobs_the_metrics_are_described_and_have_no_samples() -> None:
    done = elastic_job("exporter", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert samples(plain_text(done.stdout)) == {UNUSABLE: {(): 0}}
    assert {line.split()[2] for line in done.stdout.splitlines() if line.startswith("# TYPE ")} == {
        *(metric.name for metric in METRICS),
        UNUSABLE,
    }


def test_once_prints_what_a_scrape_tells(job: Job) -> None:
    process = start(job, "ümläut")
    job.wait_for("0.0 up")
    done = elastic_job("exporter", "--once", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert samples(plain_text(done.stdout))["elastic_agent_up"] == {("0", HOST, "ümläut"): 1}
    stop(job, process)


def test_a_directory_that_is_open_to_others_is_counted_and_named(job: Job) -> None:
    folder = Path(os.environ["TMPDIR"], f"elastic-run-{os.getuid()}")
    folder.mkdir()
    folder.chmod(0o750)
    served = Exporter(job)
    assert [served.scrape() for _ in range(2)] == [{UNUSABLE: {(): 1}}] * 2
    folder.chmod(0o700)
    assert served.scrape() == {UNUSABLE: {(): 0}}
    served.process.terminate()
    _, err = served.process.communicate(timeout=DEADLINE)
    assert err == f"elastic-job: {folder}: is open to other users; run chmod 700 on it, or remove it\n", "said once"


def test_a_directory_that_cannot_be_read_is_counted_and_named(
    registry: CollectorRegistry, capfd: pytest.CaptureFixture[str]
) -> None:
    temp = Path(os.environ["TMPDIR"])
    temp.chmod(0o755)
    folder = temp / "elastic-run-12345"
    folder.mkdir(mode=0o000)
    os.chown(folder, 12345, 12345)
    os.seteuid(12345)
    try:
        found = samples(registry.collect())
    finally:
        os.seteuid(0)
    assert found == {UNUSABLE: {(): 1}}
    assert capfd.readouterr().err == f"elastic-job: {folder}: Permission denied\n"


THEIRS = """
import os, select, elastic_launch.control.connection
from elastic_launch.control.server import ControlServer
from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.agent.messages import Limits
from elastic_launch.core.status import Facts, Meeting, agent_status
from elastic_launch.job import Policy

class Operator:
    def status(self):
        facts = Facts("theirs", "here", os.getpid(), "0.0", "x.py", 1.0, 3, 30.0, "")
        return agent_status(facts, AgentState(Limits(Policy(3), 30)), Meeting("static"), [], {}, 1.0)

os.setgid(12345); os.setuid(12345)
server = ControlServer("theirs", os.environ, Operator())
print("ready", flush=True)
while True:
    poller = select.poll()
    for fd, mask in server.descriptors(): poller.register(fd, mask)
    server.take([fd for fd, _ in poller.poll()])
"""


def test_root_is_told_of_the_jobs_of_others(job: Job, registry: CollectorRegistry) -> None:
    Path(os.environ["TMPDIR"]).chmod(0o777)
    own = start(job, "own")
    with subprocess.Popen([sys.executable, "-c", THEIRS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        found = samples(registry.collect())
        process.kill()
    assert found["elastic_agent_info"] == {
        ("0", "static", "here", "theirs", "12345", "0.0"): 1,
        ("0", "static", HOST, "own", "root", __version__): 1,
    }
    stop(job, own)


def test_a_port_in_use_is_an_error_that_names_its_owner() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        done = elastic_job("exporter", "--port", str(port))
    assert done.returncode == 69
    assert done.stderr.startswith(f"elastic-job: port {port} is in use by ")
    assert done.stderr.endswith(f" (pid {os.getpid()}): choose another one with --port\n")


@pytest.mark.parametrize("options", [("--bind", "no.such.host.invalid"), ("--port", "70000"), ("--bind", "192.0.2.1")])
def test_an_address_that_cannot_be_listened_on_is_an_error_in_one_line(options: tuple[str, str]) -> None:
    done = elastic_job("exporter", *options)
    assert done.returncode == 69
    assert done.stderr.startswith("elastic-job: --bind=")
    assert done.stderr.count("\n") == 1


def test_it_listens_on_the_loopback_only_unless_told_otherwise(job: Job) -> None:
    served = Exporter(job)
    port = int(served.url.rsplit(":", 1)[1].partition("/")[0])
    assert served.greeting == f"elastic-job: metrics are at http://127.0.0.1:{port}/metrics"
    with socket.socket() as other:
        other.settimeout(DEADLINE)
        assert other.connect_ex(("127.0.0.2", port)) != 0
    everywhere = Exporter(job, "--bind", "0.0.0.0")
    with socket.create_connection(("127.0.0.2", int(everywhere.url.rsplit(":", 1)[1].partition("/")[0])), DEADLINE):
        pass


def test_without_the_package_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from elastic_launch.operate.__main__ import main; sys.exit(main(['exporter']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 69
    assert done.stderr.startswith("elastic-job: elastic-job exporter needs: pip install 'elastic-launch[metrics]' (")
