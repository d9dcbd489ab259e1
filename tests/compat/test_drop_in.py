"""Names of torch's launcher: this package has them, and calls of them mean the same."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from importlib import import_module
from typing import Any

import pytest

import elastic_launch
from elastic_launch import DefaultLogsSpecs, LocalElasticAgent, RunResult, WorkerSpec, WorkerState
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from tests.support.waiting import DEADLINE, wait_until

ELASTIC = "torch.distributed.elastic"
MODULES = {
    "torch.distributed.run": "elastic_launch.run",
    "torch.distributed.launcher.api": "elastic_launch",
    f"{ELASTIC}.agent.server": "elastic_launch",
    f"{ELASTIC}.agent.server.api": "elastic_launch",
    f"{ELASTIC}.agent.server.local_elastic_agent": "elastic_launch",
    f"{ELASTIC}.rendezvous": "elastic_launch",
    f"{ELASTIC}.rendezvous.registry": "elastic_launch",
    f"{ELASTIC}.rendezvous.etcd_server": "elastic_launch",
    f"{ELASTIC}.multiprocessing": "elastic_launch",
    f"{ELASTIC}.multiprocessing.api": "elastic_launch",
    f"{ELASTIC}.multiprocessing.errors": "elastic_launch",
    f"{ELASTIC}.events": "elastic_launch.events",
    f"{ELASTIC}.metrics": "elastic_launch.metrics",
    f"{ELASTIC}.timer": "elastic_launch.timer",
    f"{ELASTIC}.utils.api": "elastic_launch.utils",
    f"{ELASTIC}.utils.distributed": "elastic_launch.utils",
    f"{ELASTIC}.utils.data": "elastic_launch.utils.data",
}
"""Modules of torch, and of ours that has the same public names."""
LEFT_OUT = {
    # Agents of one's own are not supported; docs/migrating.md says what to use instead.
    "ElasticAgent": "no agents of one's own",
    "SimpleElasticAgent": "no agents of one's own",
    "LocalElasticAgent.get_event_failed": "a hook of torch's loop",
    "LocalElasticAgent.get_event_succeeded": "a hook of torch's loop",
    "LocalElasticAgent.record_duration": "a hook of torch's loop",
    # One class, PContext, runs functions and commands.
    "MultiprocessContext": "one of two kinds of PContext",
    "SubprocessContext": "one of two kinds of PContext",
    "get_std_cm": "an internal of MultiprocessContext",
    # Names of variables of the environment, which are honoured, except for the last.
    "TORCHELASTIC_ENABLE_FILE_TIMER": "a variable's name",
    "TORCHELASTIC_HEALTH_CHECK_PORT": "a variable's name",
    "TORCHELASTIC_TIMER_FILE": "a variable's name",
    "TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT": "a variable's name",
    # Helpers that have nothing to do with launching.
    "find_free_port": "get_free_port does that",
    "create_c10d_store": "torch.distributed.TCPStore does that",
    "get_env_variable_or_raise": "os.environ does that",
    "stop_etcd": "an internal of EtcdServer",
}
"""What this package does without on purpose, and why."""
OTHER_DEFAULTS = {"LogsDest.filtered_stdout", "LogsDest.filtered_stderr"}
"""The same value, which a factory makes in torch."""

Parameter = tuple[str, str, str | None]
"""Name, kind, and the default's repr; None without a default."""


def describe(thing: Any) -> list[Parameter] | None:
    """Return the parameters of a callable; None if it has no signature."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    return [
        (each.name, each.kind.name, None if each.default is empty else repr(each.default))
        for each in signature.parameters.values()
    ]


DESCRIBE = """
found = {}
for theirs, ours in MODULES.items():
    module = import_module(theirs)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith(theirs)]
    # torch.distributed.run has no __all__, and programs import from it what it has imported itself.
    more = ["macros", "record"] if theirs == "torch.distributed.run" else getattr(module, "__all__", [])
    for name in sorted({name for name in [*own, *more] if not name.startswith("_")}):
        thing = getattr(module, name)
        attributes = {}
        if isinstance(thing, type):
            for attribute in {*dir(thing), *getattr(thing, "__dataclass_fields__", ())}:
                if not attribute.startswith("_"):
                    value = getattr(thing, attribute, None)
                    attributes[attribute] = describe(value) if inspect.isroutine(value) else None
        members = {member: each.value for member, each in getattr(thing, "__members__", {}).items()}
        found[f"{ours} {name}"] = describe(thing), attributes, members
print(json.dumps(found))
"""

Described = dict[str, tuple[list[Parameter] | None, dict[str, list[Parameter] | None], dict[str, object]]]
"""By module and name: parameters, attributes with their parameters, members of an enumeration."""


@pytest.fixture(scope="module")
def torchs() -> Described:
    """Return torch's names and signatures, from a process that imports them."""
    imports = "import inspect, json\nfrom importlib import import_module\nfrom typing import Any\n"
    code = (
        f"from __future__ import annotations\n{imports}MODULES = {MODULES!r}\n{inspect.getsource(describe)}{DESCRIBE}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def differences(name: str, ours: list[Parameter] | None, theirs: list[Parameter] | None) -> list[str]:
    """Return why a call that torch accepts would fail here or mean something else. Ours may have more parameters."""
    if ours is None or theirs is None:
        return []
    variadic = {inspect.Parameter.VAR_KEYWORD.name, inspect.Parameter.VAR_POSITIONAL.name}
    found = [f"{name}: no parameter {parameter}" for parameter, _, _ in theirs[len(ours) :]]
    for (our_name, our_kind, our_default), (parameter, kind, default) in zip(ours, theirs, strict=False):
        if our_kind != kind or (our_name != parameter and kind not in variadic):
            found.append(f"{name}: {our_name} ({our_kind}) in place of {parameter} ({kind})")
        elif default is not None and our_default != default and f"{name}.{parameter}" not in OTHER_DEFAULTS:
            found.append(f"{name}: {parameter}={our_default}, not {default}")
    more = ours[len(theirs) :]
    return found + [f"{name}: needs {each}" for each, kind, default in more if default is None and kind not in variadic]


def test_every_name_exists_and_accepts_the_same_arguments(torchs: Described) -> None:
    assert len(torchs) > 60
    found, left_out = [], set()
    for key, (parameters, attributes, members) in torchs.items():
        module, _, name = key.partition(" ")
        if name in LEFT_OUT:
            left_out.add(name)
            continue
        try:
            thing = getattr(import_module(module), name)
        except AttributeError:
            found.append(f"{module} has no {name}")
            continue
        found += differences(name, describe(thing), parameters)
        if members:
            assert issubclass(thing, enum.Enum)
            assert {member: each.value for member, each in thing.__members__.items()} == members, name
        slots = {"params"} if name == "MetricsConfig" else set()  # set by its constructor
        fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else slots
        for attribute, theirs in attributes.items():
            if f"{name}.{attribute}" in LEFT_OUT:
                left_out.add(f"{name}.{attribute}")
            elif attribute in fields:
                continue
            elif not hasattr(thing, attribute):
                found.append(f"{name} has no {attribute}")
            elif theirs is not None:
                found += differences(f"{name}.{attribute}", describe(getattr(thing, attribute)), theirs)
    assert found == []
    assert left_out == set(LEFT_OUT), "what is left out exists in torch"


def test_errors_have_torchs_hierarchy() -> None:
    for name in ("Closed", "Connection", "GracefulExit", "State", "Timeout"):
        assert issubclass(getattr(elastic_launch, f"Rendezvous{name}Error"), elastic_launch.RendezvousError)
    error = elastic_launch.SignalException("stopped", sigval=signal.SIGTERM)
    assert error.sigval is signal.SIGTERM


def test_public_names_and_the_types_that_a_checker_sees_are_the_same() -> None:
    typed = re.findall(r"from elastic_launch\.(\S+) import (\w+) as \2", inspect.getsource(elastic_launch))
    assert sorted(name for _, name in typed) == sorted(elastic_launch.__all__)
    for module, name in typed:
        assert getattr(elastic_launch, name) is getattr(import_module(f"elastic_launch.{module}"), name)
        where = getattr(elastic_launch, name).__module__
        assert where.startswith("elastic_launch.") or name.islower() or name == "RendezvousHandlerCreator"


def test_streams_are_read_from_text_by_torchs_keyword() -> None:
    assert elastic_launch.Std.from_str(vm="3") is elastic_launch.Std.ALL  # dir() of an enumeration hides its methods


def test_a_config_is_filled_in_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"join_timeout": 5}
    config = elastic_launch.LaunchConfig(1, 1, 1, rdzv_configs=given)
    assert isinstance(config.logs_specs, DefaultLogsSpecs)
    assert (config.shutdown_timeout, config.rdzv_configs) == (30, {"join_timeout": 5, "timeout": 5})
    assert given == {"join_timeout": 5}
    assert elastic_launch.LaunchConfig(1, 1, 1).rdzv_configs == {"timeout": 600}
    assert elastic_launch.LaunchConfig(1, 1, 1, rdzv_backend="mine").rdzv_configs == {"timeout": 900}
    config = dataclasses.replace(config, rdzv_timeout=7, shutdown_timeout=0)
    assert (config.rdzv_configs["timeout"], config.shutdown_timeout) == (7, 0)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "12")
    assert elastic_launch.LaunchConfig(1, 1, 1).shutdown_timeout == 12
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="TORCH_ELASTIC_SHUTDOWN_TIMEOUT='soon'"):
        elastic_launch.LaunchConfig(1, 1, 1)


def test_results_can_be_changed() -> None:
    result = RunResult(WorkerState.SUCCEEDED)
    result.state = WorkerState.FAILED
    assert result.is_failed()


def handled() -> str:
    return os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]


def test_workers_and_agents_know_the_signals_that_stop_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = elastic_launch.LaunchConfig(1, 1, 1, signals_to_handle="SIGTERM,SIGUSR2", start_method="fork")
    assert elastic_launch.elastic_launch(config, handled)() == {0: "SIGTERM,SIGUSR2"}
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGUSR2")
    spec = WorkerSpec("trainer", 1, SingleNodeRendezvous("job-7", 1), entrypoint="sh", max_restarts=0)
    spec.args = ("-c", f"kill -USR2 {os.getpid()}; exec sleep 1000")  # the worker signals its agent
    with pytest.raises(elastic_launch.SignalException) as caught:
        LocalElasticAgent(spec, DefaultLogsSpecs()).run()
    assert caught.value.sigval is signal.SIGUSR2


def test_states() -> None:
    running = [state for state in WorkerState if WorkerState.is_running(state)]
    assert running == [WorkerState.HEALTHY, WorkerState.UNHEALTHY]
    assert WorkerState("SUCCEEDED") is WorkerState.SUCCEEDED


def greet(greeting: str) -> str:
    return greeting


class HealthCheckServer:
    """A health check server as torch's agent accepts it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


def test_agent_accepts_torchs_arguments_by_position(capfd: pytest.CaptureFixture[str]) -> None:
    spec = WorkerSpec("trainer", 2, SingleNodeRendezvous("job-7", 2), greet, None, ("hi",), 0)
    health = HealthCheckServer()
    logs = DefaultLogsSpecs(None, elastic_launch.Std.NONE, elastic_launch.Std.NONE, None)
    agent = LocalElasticAgent(spec, logs, "fork", 300, "[${rank}] ", 5, health, 10.0)
    result = agent.run("trainer")
    assert result == RunResult(WorkerState.SUCCEEDED, {0: "hi", 1: "hi"}, {})
    assert health.calls == ["start", "stop"]


def store_address() -> list[str]:
    return [os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")]


def test_spec_can_name_the_address_and_port_of_the_workers_store() -> None:
    spec = WorkerSpec("trainer", 1, SingleNodeRendezvous("job-7", 1), store_address, max_restarts=0)
    spec.master_addr, spec.master_port = "node-0", 12345
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(), "fork")
    assert agent.run().return_values == {0: ["node-0", "12345", "False"]}
    assert (agent.get_worker_group().master_addr, agent.get_worker_group().master_port) == ("node-0", 12345)


@pytest.mark.parametrize("fails", [False, True])
def test_worker_group_follows_the_run(fails: bool) -> None:
    text = f"read line < $0; exit {int(fails)}"
    spec = WorkerSpec("trainer", 2, SingleNodeRendezvous("job-7", 2), entrypoint="sh", max_restarts=0)
    assert spec.get_entrypoint_name() == "sh"
    with subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE) as gate:  # its stdin stays open while it runs
        spec.args = ("-c", text, f"/proc/{gate.pid}/fd/0")
        agent = LocalElasticAgent(spec, DefaultLogsSpecs())
        group = agent.get_worker_group()
        assert (group.spec, group.state, group.group_rank) == (spec, WorkerState.INIT, None)
        assert [(worker.local_rank, worker.global_rank, worker.id) for worker in group.workers] == [
            (0, -1, None),
            (1, -1, None),
        ]
        results: list[RunResult] = []
        thread = threading.Thread(target=lambda: results.append(agent.run()))
        thread.start()
        wait_until(lambda: all(worker.id for worker in agent.get_worker_group("default").workers))
        group = agent.get_worker_group()
        assert (group.state, group.group_rank, group.group_world_size) == (WorkerState.HEALTHY, 0, 1)
        assert [(worker.global_rank, worker.role_rank, worker.world_size) for worker in group.workers] == [
            (0, 0, 2),
            (1, 1, 2),
        ]
        assert group.master_port
        gate.kill()
        assert gate.stdin
        gate.stdin.close()
        thread.join()
    expected = WorkerState.FAILED if fails else WorkerState.SUCCEEDED
    assert results[0].state is agent.get_worker_group().state is expected
    assert results[0].is_failed() == fails
    assert {failure.exitcode for failure in results[0].failures.values()} == ({1} if fails else set())


def test_entrypoint_comes_before_fn_and_a_function_has_a_name() -> None:
    def name(fn: Any = None, entrypoint: Any = None) -> str:
        return WorkerSpec(
            "trainer", 1, SingleNodeRendezvous("x", 1), fn=fn, entrypoint=entrypoint
        ).get_entrypoint_name()

    assert name(fn=greet) == name(entrypoint=greet) == "greet"
    assert name(fn=greet, entrypoint="train.py") == "train.py"
    assert name(fn=HealthCheckServer().start) == "HealthCheckServer.start"


def test_agent_starts_and_stops_the_health_check_server() -> None:
    health = HealthCheckServer()
    config = elastic_launch.LaunchConfig(1, 1, 1, max_restarts=0, start_method="fork")
    assert elastic_launch.elastic_launch(config, greet, health)("hi") == {0: "hi"}
    assert elastic_launch.launch_agent(config, greet, ["hi"], health) == {0: "hi"}
    assert health.calls == ["start", "stop"] * 2
