"""Rendezvous handlers that users bring: torch's interface, the registry, and the agent on such a handler.

Agents of several nodes are processes: ``agent_main`` below is their program.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch import EtcdServer, LaunchError, WorkerSpec
from elastic_launch.control.client import sockets
from elastic_launch.core.store_requests import Request
from elastic_launch.errors import (
    ExitCode,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousStateError,
    RendezvousTimeoutError,
    UsageError,
)
from elastic_launch.host.resolver import PendingError
from elastic_launch.job import Decision
from elastic_launch.rendezvous import without_agent
from elastic_launch.rendezvous.factory import adapt
from elastic_launch.rendezvous.handler import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from elastic_launch.rendezvous.registry import (
    RendezvousHandlerRegistry,
    get_rendezvous_handler,
    rendezvous_handler_registry,
)
from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous
from elastic_launch.rendezvous.third_party import ThirdPartyRendezvous
from tests.support.control import asked
from tests.support.files import install_package
from tests.support.jobs import Job
from tests.support.ports import free_port
from tests.support.third_party import Files, MemoryStore, OneNode, run_agent, third_party
from tests.support.waiting import DEADLINE, SOON, wait_until

# --- stores and handlers


# --- agents


def start(
    job: Job, command: str, *, kind: str = "files", path: str = "", restarts: int = 0, workers: int = 1
) -> subprocess.Popen[str]:
    """Start an agent's process. Its workers have ``mark`` for the file that ``job.marks`` reads."""
    marks = f'mark() {{ echo "$RANK.$TORCHELASTIC_RESTART_COUNT $*" >> {job.path}/marks; }}; '
    command = marks + command
    program = "import sys; from tests.support.third_party import agent_main; agent_main(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, kind, path or str(job.path / "shared"), str(restarts), str(workers), command],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    job.processes.append(process)
    return process


def want(job: Job, nodes: int) -> None:
    (job.path / "shared").mkdir(exist_ok=True)
    (job.path / "shared" / "wanted").write_text(str(nodes))


def parameters(backend: str = "one-node", **config: Any) -> RendezvousParameters:
    return RendezvousParameters(backend, "host:1", "job", 1, 2, **config)


# --- the interface


def test_parameters_are_checked() -> None:
    params = RendezvousParameters("b", "e", "r", 1, 2, "10.0.0.1", timeout=5)
    assert (params.backend, params.endpoint, params.run_id, params.min_nodes, params.max_nodes) == ("b", "e", "r", 1, 2)
    assert (params.local_addr, params.config) == ("10.0.0.1", {"timeout": 5})
    for backend, least, most in (("", 1, 1), ("b", 0, 1), ("b", 2, 1)):
        with pytest.raises(ValueError, match="must"):
            RendezvousParameters(backend, "e", "r", least, most)


@pytest.mark.parametrize(
    ("value", "as_bool", "as_int"),
    [
        ("1", True, 1),
        ("0", False, 0),
        ("Yes", True, UsageError),
        ("F", False, UsageError),
        (True, True, 1),
        (0, False, 0),
        (2, UsageError, 2),
        (2.5, UsageError, 2),
        ("-4", UsageError, -4),
        ("on", UsageError, UsageError),
        ("", UsageError, UsageError),
        ([1], UsageError, UsageError),
        (None, None, None),
    ],
)
def test_settings_are_read_as_torch_reads_them(value: Any, as_bool: Any, as_int: Any) -> None:
    params = parameters(key=value)
    assert params.get("key") == value
    for read, expected in ((params.get_as_bool, as_bool), (params.get_as_int, as_int)):
        if expected is UsageError:
            with pytest.raises(ValueError, match="key="):
                read("key")
        else:
            assert read("key") is expected


def test_defaults_of_settings() -> None:
    params = parameters()
    assert (params.get("key", 5), params.get_as_bool("key", True), params.get_as_int("key", 7)) == (5, True, 7)
    assert (params.get("key"), params.get_as_bool("key"), params.get_as_int("key")) == (None, None, None)


def test_handler_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        RendezvousHandler()  # type: ignore[abstract]
    assert RendezvousHandler.use_agent_store.fget(OneNode()) is False  # type: ignore[attr-defined]


def test_store_info_is_decided_by_rank_0() -> None:
    store = MemoryStore()
    found: list[RendezvousStoreInfo] = []
    other = threading.Thread(target=lambda: found.append(RendezvousStoreInfo.build(1, store, "10.9.9.9", 99)))
    other.start()
    info = RendezvousStoreInfo.build(0, store, "10.0.0.1", 4711)
    other.join()
    assert found == [info] == [RendezvousStoreInfo("10.0.0.1", 4711)]
    free = RendezvousStoreInfo.build(0, store, None)
    assert free.master_addr
    assert not free.master_addr.startswith("localhost")
    assert 0 < free.master_port < 65536


# --- the registry


def test_registry() -> None:
    registry = RendezvousHandlerRegistry()
    handler = OneNode()

    def create(params: RendezvousParameters) -> OneNode:
        return handler

    registry.register("one-node", create)
    registry.register("one-node", create)
    assert registry.create_handler(parameters()) is handler
    with pytest.raises(ValueError, match="already registered"):
        registry.register("one-node", lambda params: handler)
    with pytest.raises(ValueError, match="must name"):
        registry.register("", create)
    registry.register("misnamed", create)
    with pytest.raises(LaunchError, match=r"'misnamed'.* a handler of 'one-node'"):
        registry.create_handler(parameters("misnamed"))
    registry.register("none", lambda params: None)
    with pytest.raises(LaunchError, match="returned None, not a handler"):
        registry.create_handler(parameters("none"))
    with pytest.raises(UsageError, match="'nowhere': unknown; choose one of misnamed, none, one-node"):
        registry.create_handler(parameters("nowhere"))


def test_built_in_names_are_taken() -> None:
    for name in ("static", "c10d", "etcd", "etcd-v2"):
        with pytest.raises(UsageError, match="already registered"):
            rendezvous_handler_registry.register(name, lambda params: OneNode())
    with pytest.raises(UsageError, match=r"'nowhere': unknown; choose one of .*c10d"):
        get_rendezvous_handler(parameters("nowhere"))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a package that offers handlers."""
    site = install_package(
        tmp_path / "site",
        "[torchrun.handlers]\none-node = good_plugin:get\nbroken = broken_plugin:get\nmissing = no_such_module:get\n",
        good_plugin="from tests.support.third_party import OneNode\n"
        "def get(): return create\ndef create(params): return OneNode()\n",
        broken_plugin="raise RuntimeError('boom')\n",
    )
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("good_plugin", None)


def test_packages_offer_handlers(plugins: str) -> None:
    registry = RendezvousHandlerRegistry()
    assert registry.known_backends() == ["broken", "missing", "one-node"]
    first, second = (registry.create_handler(parameters()) for _ in range(2))
    assert (first.get_backend(), type(first), type(second)) == ("one-node", OneNode, OneNode)
    with pytest.raises(LaunchError, match="broken_plugin:get of plugins failed: RuntimeError: boom"):
        registry.create_handler(parameters("broken"))
    with pytest.raises(LaunchError, match="no_such_module:get of plugins failed: ModuleNotFoundError"):
        registry.create_handler(parameters("missing"))


def test_packages_are_searched_only_for_unknown_backends() -> None:
    code = (
        "import sys; from elastic_launch.rendezvous.registry import *\n"
        "rendezvous_handler_registry.register('x', lambda p: None)\n"
        "try: get_rendezvous_handler(RendezvousParameters('x', '', '', 1, 1))\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print('importlib.metadata' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LaunchError\nFalse\n"


# --- one node


def test_one_node(tmp_path: Path) -> None:
    handler = OneNode()
    handler.use_agent_store = True
    command = (
        f"echo $RANK $WORLD_SIZE $GROUP_RANK $GROUP_WORLD_SIZE $ROLE_RANK $ROLE_WORLD_SIZE $MASTER_ADDR $MASTER_PORT "
        f"$TORCHELASTIC_RUN_ID $TORCHELASTIC_USE_AGENT_STORE > {tmp_path}/env.$RANK"
    )
    result = run_agent(handler, command, workers=2)
    assert result.return_values == {0: None, 1: None}
    common = "127.0.0.1 29999 job-1 True"
    assert (tmp_path / "env.0").read_text().strip() == f"0 2 0 1 0 2 {common}"
    assert (tmp_path / "env.1").read_text().strip() == f"1 2 0 1 1 2 {common}"
    assert handler.calls == ["next", "shutdown"]
    assert handler.threads == {"elastic-launch-rendezvous"}


def test_failures_restart_the_job_until_no_restart_is_left(tmp_path: Path) -> None:
    handler = OneNode()
    said: list[str] = []
    command = f"echo $TORCHELASTIC_RESTART_COUNT >> {tmp_path}/rounds; exit 3"
    result = run_agent(handler, command, restarts=2, log=said.append)
    assert result.failures[0].exitcode == 3
    assert (tmp_path / "rounds").read_text().split() == ["0", "1", "2"]
    assert handler.calls == ["next", "next", "next", "shutdown"]
    assert [line for line in said if "restart 2 of 2" in line]


def test_nodes_that_wait_end_the_round_uncharged(tmp_path: Path) -> None:
    handler = OneNode()
    handler.waiting = [0, 1]
    said: list[str] = []
    command = f"echo >> {tmp_path}/$TORCHELASTIC_RESTART_COUNT; [ -e {tmp_path}/1 ] || exec sleep 1000"
    assert not run_agent(handler, command, log=said.append).is_failed()
    assert handler.calls == ["next", "next", "shutdown"]
    assert "1 more node can join: stopping 1 worker" in said


def test_store_address_is_chosen_if_the_handler_names_none(tmp_path: Path) -> None:
    handler = OneNode()
    handler.info = lambda: RendezvousInfo(MemoryStore(), 0, 1, None)  # type: ignore[arg-type]
    command = f"echo $MASTER_ADDR $MASTER_PORT > {tmp_path}/env"
    run_agent(handler, command, local_addr="10.1.2.3")
    assert re.fullmatch(r"10\.1\.2\.3 [1-9][0-9]*\n", (tmp_path / "env").read_text())


class Torchs:
    """Errors with torch's names that are not ours."""

    class RendezvousTimeoutError(Exception):
        pass

    class RendezvousGracefulExitError(Exception):
        pass

    class DistStoreError(RuntimeError):
        pass


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [
        (
            RendezvousTimeoutError("alone"),
            RendezvousTimeoutError,
            "^rendezvous handler OneNode: .*TimeoutError: alone$",
        ),
        (Torchs.RendezvousTimeoutError("alone\nin line 2"), RendezvousTimeoutError, "TimeoutError: alone$"),
        (RendezvousClosedError("over"), RendezvousError, "OneNode: .*: over; the job has already ended"),
        (ConnectionRefusedError(111, "refused"), RendezvousConnectionError, "ConnectionRefusedError: .*refused$"),
        (Torchs.DistStoreError("wait timeout"), RendezvousConnectionError, "DistStoreError: wait timeout$"),
        (
            KeyError("x"),
            LaunchError,
            "KeyError: 'x'; this looks like a bug in the handler:\nTraceback",
        ),
        (SystemExit(3), LaunchError, "SystemExit: 3; this looks like a bug"),
        (StopIteration(3), LaunchError, "StopIteration: 3; this looks like a bug"),
    ],
)
def test_handler_that_raises(error: BaseException, kind: type[LaunchError], match: str) -> None:
    handler = OneNode(error)
    with pytest.raises(kind, match=match) as caught:
        run_agent(handler, "true")
    assert caught.value.exit_code == {
        RendezvousTimeoutError: ExitCode.TIMEOUT,
        LaunchError: ExitCode.SOFTWARE,
    }.get(kind, ExitCode.UNAVAILABLE)
    assert handler.calls == ["next"], "a node that was never in the job must not end it for the others"


@pytest.mark.parametrize("kind", [RendezvousGracefulExitError, Torchs.RendezvousGracefulExitError])
def test_graceful_exit_is_not_a_failure(kind: type[Exception]) -> None:
    handler, said = OneNode(kind("not needed")), list[str]()
    assert run_agent(handler, "true", log=said.append).return_values == {}
    assert "not needed; the job goes on without this node" in said[0]
    assert handler.calls == ["next"]


def test_handler_that_raises_while_workers_run() -> None:
    handler = OneNode()
    handler.waiting = [OSError(5, "gone")]
    with pytest.raises(RendezvousConnectionError, match=r"OneNode: OSError: .*gone"):
        run_agent(handler, "exec sleep 1000")
    assert handler.calls == ["next", "shutdown"]


def test_impossible_rank() -> None:
    handler = OneNode()
    handler.info = lambda: RendezvousInfo(MemoryStore(), 2, 2, RendezvousStoreInfo("a", 1))
    with pytest.raises(RendezvousStateError, match="returned rank 2 of 2"):
        run_agent(handler, "true")


def test_failing_shutdown_is_logged() -> None:
    class Rude(OneNode):
        def shutdown(self) -> bool:
            raise OSError("no")

    said: list[str] = []
    assert not run_agent(Rude(), "true", log=said.append).is_failed()
    assert said[-1:] == ["rendezvous handler Rude: OSError: no (in shutdown())"]


def test_a_pause_before_the_next_round_is_kept() -> None:
    from elastic_launch.core.agent.messages import AgentEvent, Assigned, Decided, ReportRound, RequestJoin

    rendezvous = third_party(OneNode())
    begin, events = time.monotonic(), list[AgentEvent]()
    rendezvous.ask(ReportRound(Decision(True, pause=0.3)))
    rendezvous.ask(RequestJoin())

    def has_joined() -> bool:
        events.extend(rendezvous.take())
        return len(events) == 2

    try:
        wait_until(has_joined)
    finally:
        rendezvous.close()
    assert [type(event) for event in events] == [Decided, Assigned]
    assert time.monotonic() - begin >= 0.3


def test_adapt() -> None:
    spec = WorkerSpec("r", 1, OneNode(), entrypoint="true")
    assert isinstance(adapt(OneNode(), spec, {}, print), ThirdPartyRendezvous)
    with pytest.raises(LaunchError, match="no next_rendezvous"):
        adapt(object(), spec, {}, print)
    own = get_rendezvous_handler(RendezvousParameters("c10d", "host-a:29400", "job", 2, 2))
    assert (own.get_backend(), own.get_run_id()) == ("c10d", "job")
    assert isinstance(adapt(own, spec, {}, print), StoreRendezvous)
    with pytest.raises(UsageError, match="need a rendezvous endpoint"):  # without an agent
        get_rendezvous_handler(RendezvousParameters("c10d", "", "job", 2, 2)).next_rendezvous()


def test_signal_while_the_handler_blocks(job: Job) -> None:
    process = start(job, "true", kind="stuck")
    assert process.stderr
    assert process.stderr.readline() == "stuck\n"
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert job.finish(process).returncode == 143
    assert time.monotonic() - before < SOON


# --- several nodes


def test_two_nodes_restart_as_one(job: Job) -> None:
    want(job, 2)
    command = (
        "mark $WORLD_SIZE $GROUP_RANK $ROLE_RANK $MASTER_ADDR:$MASTER_PORT;"
        "if [ $TORCHELASTIC_RESTART_COUNT = 1 ]; then exit 0; fi;"
        f"if [ $RANK = 2 ]; then while [ $(wc -l < {job.path}/marks) -lt 3 ]; do sleep 0.01; done; exit 7; fi;"
        "exec sleep 1000"
    )
    first = start(job, command, workers=2, restarts=1)
    wait_until(lambda: "waiting" in read(job))
    second = start(job, command, workers=1, restarts=1)
    ends = [job.finish(process) for process in (first, second)]
    assert [end.returncode for end in ends] == [0, 0], ends
    marks = job.marks()
    assert sorted(marks[:3]) == [f"{rank}.0 3 {rank // 2} {rank} files.example:4001" for rank in range(3)]
    assert sorted(mark.split()[0] for mark in marks[3:]) == ["0.1", "1.1", "2.1"]
    assert {mark.split()[-1] for mark in marks[3:]} == {"files.example:4002"}
    text = "rank 2 on " + os.uname().nodename + " failed (exit code 7)"
    assert f"{text}: restart 1 of 1" in ends[1].stderr
    assert f"{text}: stopping 2 workers" in ends[0].stderr


def test_final_failure_ends_all_nodes(job: Job) -> None:
    want(job, 2)
    command = "mark; if [ $RANK = 0 ]; then while [ ! -e go ]; do sleep 0.01; done; exit 7; fi; exec sleep 1000"
    agents = [start(job, command.replace("go", f"{job.path}/go")) for _ in range(2)]
    job.wait_for("0.0", "1.0")
    (job.path / "go").touch()
    for agent in agents:
        end = job.finish(agent)
        assert end.returncode == 7
        assert "FAILED" in end.stderr
    assert len(job.marks()) == 2
    assert read(job)["closed"] is True


def test_node_joins(job: Job) -> None:
    want(job, 1)
    command = "mark $WORLD_SIZE; if [ $WORLD_SIZE = 1 ]; then exec sleep 1000; fi"
    first = start(job, command)
    job.wait_for("0.0 1")
    want(job, 2)
    second = start(job, command)
    ends = [job.finish(process) for process in (first, second)]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert sorted(job.marks()) == ["0.0 1", "0.1 2", "1.1 2"]


def test_the_user_restarts_and_stops_the_job_on_one_of_its_nodes(job: Job) -> None:
    want(job, 2)
    agents = [start(job, "mark $WORLD_SIZE; exec sleep 1000") for _ in range(2)]
    job.wait_for("0.0 2", "1.0 2")
    assert asked(sockets(os.environ)[0], request="restart")["ok"]
    job.wait_for("0.1 2", "1.1 2")
    path = sockets(os.environ)[1]
    status = asked(path, request="status")["status"]
    assert (status["state"], status["restarts"], status["uncharged_restarts"], status["nodes"]) == ("running", 0, 1, 2)
    assert asked(path, request="stop")["ok"]
    ends = [job.finish(agent) for agent in agents]
    assert [end.returncode for end in ends] == [143, 143]
    for text in ("restart", "stop"):
        assert any(f"{text} requested on {os.uname().nodename}: stopping 1 worker" in end.stderr for end in ends)


def test_node_leaves(job: Job) -> None:
    want(job, 2)
    command = "mark $WORLD_SIZE; if [ $WORLD_SIZE = 2 ]; then exec sleep 1000; fi"
    agents = [start(job, command) for _ in range(2)]
    job.wait_for("0.0 2", "1.0 2")
    want(job, 1)
    agents[0].send_signal(signal.SIGTERM)
    left, stayed = (job.finish(agent) for agent in agents)
    assert (left.returncode, stayed.returncode) == (143, 0)
    assert "is leaving (SIGTERM): stopping 1 worker" in stayed.stderr
    assert job.marks()[2:] == ["0.1 1"]


def test_nodes_wait_for_each_others_success(job: Job) -> None:
    want(job, 2)
    command = f"mark; [ $RANK = 0 ] || while [ ! -e {job.path}/go ]; do sleep 0.01; done; mark done"
    agents = [start(job, command) for _ in range(2)]
    job.wait_for("0.0 done", "1.0")
    wait_until(lambda: any(key.endswith("/done") for key in read(job)))
    assert [agent.poll() for agent in agents] == [None, None]
    (job.path / "go").touch()
    assert [job.finish(agent).returncode for agent in agents] == [0, 0]


def test_success_does_not_wait_forever(job: Job) -> None:
    """The other node never reports anything again."""
    store, said = MemoryStore(), list[str]()
    handler = OneNode()
    handler.info = lambda: RendezvousInfo(store, 0, 2, RendezvousStoreInfo("127.0.0.1", 29999))
    # The same store: the other node registers in it, and does nothing else.
    other = OneNode()
    other.info = lambda: RendezvousInfo(store, 1, 2, RendezvousStoreInfo("127.0.0.1", 29999))
    silent = third_party(other)
    from elastic_launch.core.agent.messages import RequestJoin

    silent.ask(RequestJoin())
    try:
        assert not run_agent(handler, "true", exit_barrier_timeout=0.2, log=said.append).is_failed()
    finally:
        silent.close()
    assert said[1:-1] == ["this node's workers succeeded; others did not end within 0.2 s"]


def read(job: Job) -> dict[str, Any]:
    with Files(job.path / "shared").locked() as state:
        return dict(state)


@pytest.mark.parametrize("backend", ["static", "c10d", "etcd"])
def test_built_in_backends_need_no_agent(backend: str) -> None:
    """Two nodes meet, exchange values, meet again when one of them asks for it, and end."""
    with contextlib.ExitStack() as stack:
        if backend == "etcd":
            server = EtcdServer()
            stack.callback(server.stop)
            server.start()
            endpoint = server.get_endpoint()
        else:
            endpoint = f"127.0.0.1:{free_port()}"
        config: list[dict[str, Any]] = [{"rank": rank} if backend == "static" else {} for rank in (0, 1)]
        handlers = [
            get_rendezvous_handler(RendezvousParameters(backend, endpoint, "job-1", 2, 2, **more)) for more in config
        ]
        for handler in handlers:
            stack.callback(handler.shutdown)
        infos = meet(handlers)
        assert sorted(info.rank for info in infos) == [0, 1]
        assert {info.world_size for info in infos} == {2}
        assert infos[0].bootstrap_store_info == infos[1].bootstrap_store_info
        assert {handler.use_agent_store for handler in handlers} == {backend != "etcd"}
        assert [handler.num_nodes_waiting() for handler in handlers] == [0, 0]
        infos[0].store.set("key", "value")
        assert infos[1].store.get("key") == b"value"
        assert [info.store.add("count", 2) for info in infos] == [2, 4]
        second = threading.Thread(target=lambda: infos.append(handlers[1].next_rendezvous()))
        second.start()
        wait_until(lambda: handlers[0].num_nodes_waiting())
        first = threading.Thread(target=lambda: infos.append(handlers[0].next_rendezvous()))
        member, store = cast(Any, handlers[0])._member, cast(Any, infos[0].store)
        with store._lock:  # another thread of the program waits for the store, which must not hold up heartbeats
            first.start()
            wait_until(lambda: member._store is not store)
            assert member._lock.acquire(timeout=DEADLINE)
            member._lock.release()
        for thread in (first, second):
            thread.join()
        assert sorted(info.rank for info in infos[2:]) == [0, 1]
        assert not infos[2].store.check(["key"]), "each round has keys of its own"
        assert not any(handler.is_closed() for handler in handlers)
        assert handlers[1].shutdown()
        wait_until(lambda: handlers[0].is_closed())
        with pytest.raises(RendezvousClosedError):
            handlers[0].next_rendezvous()


def meet(handlers: list[RendezvousHandler]) -> list[RendezvousInfo]:
    infos: dict[int, RendezvousInfo] = {}

    def join(number: int) -> None:
        infos[number] = handlers[number].next_rendezvous()

    threads = [threading.Thread(target=join, args=(number,)) for number in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [info for _, info in sorted(infos.items())]


def test_torchs_own_handler(job: Job) -> None:
    """Run two agents on torch's dynamic rendezvous over its TCPStore: a failure, a second round, success."""
    endpoint = f"127.0.0.1:{free_port()}"
    script = job.script(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "sums = torch.ones(1)\n"
        "dist.all_reduce(sums)\n"
        "mark(f'{sums.item():g} ' + os.environ['TORCHELASTIC_USE_AGENT_STORE'])\n"
        "dist.barrier()\n"
        "if restart == 0 and rank == 1: os._exit(7)\n"
        "if restart == 0: wait()\n"
        "dist.destroy_process_group()\n"
        "os._exit(0)\n"
    )
    command = f"exec {sys.executable} {script}"
    agents = [start(job, command, kind="torch", path=endpoint, restarts=1) for _ in range(2)]
    ends = [job.finish(agent) for agent in agents]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert sorted(job.marks()) == ["0.0 2 True", "0.1 2 False", "1.0 2 True", "1.1 2 False"]


def test_a_connection_to_a_dead_address_holds_up_no_heartbeat() -> None:
    """The thread that sends them needs the lock."""

    class Client:
        def __init__(self, answers: bool) -> None:
            self.answers, self.is_closed = answers, False

        def call(self, request: Request, timeout: float) -> None:
            with ThreadPoolExecutor(1) as other:
                seen.append(other.submit(is_free).result())
            if not self.answers:
                raise RendezvousConnectionError("no answer")

        def close(self) -> None:
            self.is_closed = True

    class Backend:
        def __init__(self) -> None:
            self.left: list[Client | PendingError] = [PendingError("not yet"), Client(False), Client(True)]

        def connect(self) -> Client:
            found = self.left.pop(0)
            if isinstance(found, PendingError):
                raise found
            return found

        def has_untried_address(self) -> bool:
            return bool(self.left)

    def is_free() -> bool:
        if got := member._lock.acquire(blocking=False):
            member._lock.release()
        return bool(got)

    seen: list[bool] = []
    member: Any = object.__new__(without_agent.Member)
    member._run_id, member._lock = "job", threading.Condition()
    member._rendezvous = SimpleNamespace(backend=Backend())
    assert member._connect().answers
    assert seen == [True, True]
