"""Functions as workers: their arguments, return values and failures, with every start method."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchError,
    LocalElasticAgent,
    SignalException,
    UsageError,
    WorkerSpec,
)
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.worker_spec import callable_name
from tests.support.functions import (
    Interrupting,
    Trainer,
    Unreadable,
    boom,
    change_everything,
    child_that_lives_on,
    descriptors,
    die,
    end,
    end_oddly,
    environment,
    fail_once,
    fork_and_return,
    hang,
    large,
    launch,
    launch_what_fails,
    leave,
    multiply,
    put,
    rank,
    run,
    send,
    signals,
    size,
    unpicklable,
    unreadable,
    use_processes,
    who,
)
from tests.support.jobs import METHODS, Job
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


def failure(fn: Callable[..., Any], *args: Any, **changes: Any) -> ChildFailedError:
    with pytest.raises(ChildFailedError) as caught:
        run(fn, *args, **changes)
    return caught.value


# What the launcher makes of it.


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_each_worker_calls_the_function_and_returns_its_value(method: str) -> None:
    values = run(who, "hello", method=method)
    assert [value[0] for value in values.values()] == ["hello 0", "hello 1"]
    assert len({value[1] for value in values.values()}) == 1, "the keeper is the parent of all"
    assert values[0][1] != os.getpid()
    assert [value[2:] for value in values.values()] == [("who-0", True), ("who-1", True)]


@pytest.mark.parametrize("method", METHODS)
def test_workers_have_their_own_environment(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_PROGRAM", "\udcff")
    for local_rank, environ in run(environment, method=method, role="trainer").items():
        assert environ["RANK"] == environ["LOCAL_RANK"] == str(local_rank)
        assert (environ["ROLE_NAME"], environ["FROM_THE_PROGRAM"]) == ("trainer", "\udcff")


@pytest.mark.parametrize("method", METHODS)
def test_large_values(method: str) -> None:
    values = run(large, method=method)
    assert [(len(value), value[-1]) for value in values.values()] == [(200_000_000, 0), (200_000_000, 1)]


def test_local_rank_in_arguments() -> None:
    assert [value[0] for value in run(who, "I am ${local_rank}:").values()] == ["I am 0: 0", "I am 1: 1"]


@pytest.mark.parametrize("method", METHODS)
def test_unpicklable_value_names_rank_and_type(method: str) -> None:
    error = failure(unpicklable, method=method)
    assert list(error.failures) == [1]
    assert "rank 1 returned a value of type generator, which cannot be sent to the launcher" in error.failures[1].error


@pytest.mark.parametrize("method", METHODS)
def test_exception_arrives_with_its_traceback(method: str) -> None:
    error = failure(boom, method=method)
    assert list(error.failures) == [1], "the rank that was stopped is not a failure"
    cause = error.failures[1]
    assert (cause.error, cause.exitcode) == ("ValueError: boom", 1)
    assert 'raise ValueError("boom")' in cause.traceback
    assert "boom FAILED" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_other_ends_are_what_they_are(method: str) -> None:
    assert failure(end, "os._exit", 7, method=method).failures[0].exitcode == 7
    assert failure(end, "sys.exit", 8, method=method).failures[0].exitcode == 8
    error = failure(end, "kill", signal.SIGSEGV, method=method)
    assert (error.failures[0].signal_name(), error.exit_code) == ("SIGSEGV", 139)
    error = failure(end, "close", 0, method=method)
    assert "the function has closed the descriptor" in error.failures[0].error


@pytest.mark.parametrize("method", METHODS)
def test_exit_with_0_is_success_without_a_value(method: str) -> None:
    assert run(leave, "os._exit", method=method) == {0: None, 1: None}
    assert run(leave, "sys.exit", method=method) == {0: None, 1: None}


@pytest.fixture
def _tracker() -> Iterator[None]:
    """Start multiprocessing's resource tracker before the test, because it lives as long as the program."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("_tracker")
def test_queues_and_locks_are_arguments_as_for_multiprocessing(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue, lock, (ours, theirs) = context.Queue(), context.Lock(), context.Pipe()
    run(put, queue, lock, method=method)
    assert sorted(queue.get(timeout=DEADLINE) for _ in range(2)) == [0, 1]
    queue.close()
    queue.join_thread()
    run(send, theirs, lock, method=method)
    assert sorted(ours.recv() for _ in range(2)) == [0, 1]
    del queue, lock, ours, theirs
    gc.collect()  # their descriptors are open until then


@pytest.mark.parametrize("method", METHODS)
def test_restart_calls_again(method: str, tmp_path: Path) -> None:
    assert run(fail_once, str(tmp_path), method=method, max_restarts=1) == {0: 1, 1: 1}


@pytest.mark.parametrize("method", METHODS)
def test_workers_start_with_default_signals(method: str) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert run(signals, method=method) == {0: (True, True, set()), 1: (True, True, set())}
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_spawned_worker_inherits_no_descriptor_of_the_program(tmp_path: Path) -> None:
    with open(tmp_path / "mine", "w") as file:
        os.set_inheritable(file.fileno(), True)
        for held in run(descriptors).values():
            ours = ("/memfd:", "anon_inode:[pidfd]", "anon_inode:[eventfd]", os.devnull)
            assert not [name for name in held if not name.startswith(ours)]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_function_leaves_behind_ends_with_it(method: str, tmp_path: Path) -> None:
    run(child_that_lives_on, str(tmp_path), method=method)
    assert not [file for file in tmp_path.iterdir() if file.is_file() and is_alive(int(file.read_text()))]


def test_function_that_cannot_be_sent_is_an_error_before_anything_starts() -> None:
    with pytest.raises(UsageError, match=r"entrypoint .*<lambda>: cannot be sent .*'spawn'.*start_method='fork'"):
        run(lambda: 1)
    with pytest.raises(UsageError, match="cannot pickle 'generator' object"):
        run(who, (number for number in range(3)))
    assert run(lambda: 40 + rank(), method="fork") == {0: 40, 1: 41}


def test_works_twice_in_a_thread_and_under_a_running_event_loop() -> None:
    async def cell() -> list[dict[int, Any]]:
        return [run(lambda: rank(), method="fork"), run(os.getpid)]

    first, second = asyncio.run(cell())
    assert first == {0: 0, 1: 1}
    assert len(set(second.values())) == 2
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(run(who, "hello")))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_agent_by_itself_runs_a_function() -> None:
    spec = WorkerSpec("trainer", 2, SingleNodeRendezvous("job-7", 2), entrypoint=who, args=("hi",), max_restarts=0)
    result = LocalElasticAgent(spec, DefaultLogsSpecs(), "fork").run()
    assert not result.is_failed()
    assert [value[0] for value in result.return_values.values()] == ["hi 0", "hi 1"]


@pytest.mark.parametrize("method", METHODS)
def test_signal_stops_functions(method: str, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: len([file for file in tmp_path.iterdir() if file.is_file() and file.read_text()]) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SignalException, match="SIGTERM"):
        run(hang, str(tmp_path), method=method)
    thread.join()


@pytest.mark.parametrize("method", METHODS)
def test_program_killed_leaves_no_worker(method: str, job: Job) -> None:
    script = job.path / "program.py"
    script.write_text(
        "import os, signal\n"
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "def hang():\n"
        f"    open({str(job.path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
        "if __name__ == '__main__':\n"
        f"    elastic_launch(LaunchConfig(1, 1, 2, start_method={method!r}), hang)()\n"
    )
    program = subprocess.Popen([sys.executable, str(script)], cwd=job.path)
    files = [job.path / "0", job.path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    below = psutil.Process(program.pid).children(recursive=True)
    assert len(below) == 3, "a keeper and two workers"
    program.kill()
    program.wait()
    end = time.monotonic() + SOON
    wait_until(lambda: not any(is_alive(process.pid) for process in below))
    assert time.monotonic() < end


def test_launch_without_the_main_guard_is_explained(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "def train(): pass\n"
        "elastic_launch(LaunchConfig(1, 1, 1, max_restarts=0), train)()\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 1
    assert "put the launch under if __name__ == '__main__':" in ended.stderr


@pytest.mark.parametrize("method", METHODS)
def test_whatever_can_be_called(method: str) -> None:
    assert run(Trainer(3).train, 4, method=method) == {0: 12, 1: 13}
    assert run(Trainer(3), 4, method=method) == {0: 12, 1: 13}
    assert run(functools.partial(multiply, 3, more=5), 4, method=method) == {0: 17, 1: 18}
    assert run(len, "abc", method=method) == {0: 3, 1: 3}


def test_names_of_what_can_be_called() -> None:
    """Reports, process names and messages use them. A ``repr`` may be long, or fail."""
    assert callable_name(multiply) == "multiply"
    assert callable_name(functools.partial(functools.partial(multiply, 1), 2)) == "multiply"
    assert callable_name(Trainer(3)) == "Trainer"
    assert callable_name(Trainer(3).train) == "Trainer.train"
    with pytest.raises(UsageError, match="entrypoint Trainer: cannot be sent"):
        run(Trainer(3), (number for number in range(3)))
    error = failure(functools.partial(end_oddly, "odd"), method="fork")
    assert error.name == "end_oddly"


@pytest.mark.parametrize("method", METHODS)
def test_large_arguments(method: str) -> None:
    assert run(size, bytes(100_000_000), method=method) == {0: 100_000_000, 1: 100_000_000}


def test_value_that_cannot_be_read_names_rank_and_type() -> None:
    with pytest.raises(LaunchError, match="rank 0 returned a value of type Unreadable, which cannot be read"):
        run(unreadable, method="fork")


def test_argument_that_interrupts_or_cannot_be_read() -> None:
    with pytest.raises(KeyboardInterrupt):  # and no descriptor stays open
        run(size, Interrupting())
    assert "'nothing'" in failure(size, Unreadable()).get_first_failure()[1].error


ODD_ENDS = {
    "odd": "Odd: what is this",
    "interrupt": "KeyboardInterrupt",
    "silent": "Silent: <exception str() failed>",
    "heavy": "Heavy: carries a lock",
    "group": "ExceptionGroup: several (2 sub-exceptions)",
    "text": "SystemExit: no data",
    "environment": "ValueError: nothing around",
    "no streams": "ValueError: no streams",
    "closed streams": "ValueError: closed streams",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "coroutine": "TypeError: rank 0 returned a value of type coroutine, which cannot be sent to the launcher",
    "local class": "TypeError: rank 0 returned a value of type Local, which cannot be sent to the launcher",
    "deep": "TypeError: rank 0 returned a value of type list, which cannot be sent to the launcher: RecursionError",
}


@pytest.mark.parametrize(
    ("method", "how"),
    [*((method, how) for method in ("spawn", "fork") for how in ODD_ENDS), ("forkserver", "no streams")],
)
def test_odd_ends(method: str, how: str) -> None:
    rank, cause = failure(end_oddly, how, method=method).get_first_failure()
    assert (rank, cause.exitcode) == (0, 1)
    assert cause.error.startswith(ODD_ENDS[how])
    assert ("Traceback" in cause.traceback) == (how != "text"), "Python shows none for a SystemExit"


@pytest.mark.parametrize("method", METHODS)
def test_ends_without_an_exception(method: str) -> None:
    assert failure(die, "thread", method=method).failures[0].exitcode == 9
    cause = failure(die, "fault", method=method).failures[0]
    assert (cause.signal_name(), cause.error) == ("SIGSEGV", "")
    assert "the last line" in cause.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_child_that_a_function_forks_is_not_the_worker(fails: bool, method: str) -> None:
    assert run(fork_and_return, fails, method=method) == {0: "worker", 1: "worker"}


def test_forked_functions_have_no_sockets_of_their_own() -> None:
    """Their orders came over one."""
    one, two = [
        {name for name in held if name.startswith("socket:")} for held in run(descriptors, method="fork").values()
    ]
    assert one == two


@pytest.mark.parametrize("method", METHODS)
def test_functions_can_start_processes(method: str) -> None:
    assert run(use_processes, method=method) == {0: [1, 4, 9], 1: [1, 4, 9]}


@pytest.mark.parametrize("method", METHODS)
def test_function_that_changes_its_process(method: str, tmp_path: Path) -> None:
    before = os.getcwd()
    assert run(change_everything, str(tmp_path), method=method) == {0: "/", 1: "/"}
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["late", "late"], (
        "the process waits for its threads"
    )
    assert os.getcwd() == before


@pytest.mark.parametrize("method", METHODS)
def test_workers_launch_functions(method: str) -> None:
    inner = {0: 0, 1: 1}
    assert run(launch, method, method=method) == {0: inner, 1: inner}
    cause = failure(launch_what_fails, method, method=method).failures[0]
    assert cause.error == "ValueError: boom"
    assert 'raise ValueError("boom")' in cause.traceback, "the traceback is that of the innermost worker"


def test_function_launched_by_a_script_that_elastic_run_launches(job: Job) -> None:
    script = job.script(
        "from elastic_launch import LaunchConfig, elastic_launch\n"
        "def inner():\n"
        "    if os.environ['RANK'] == '1': raise ValueError('from inside')\n"
        "    signal.pause()\n"
        "if __name__ == '__main__':\n"
        "    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=0), inner)()\n"
    )
    done = job.run("--nproc-per-node", "1", script)
    assert done.returncode == 1
    assert "ValueError: from inside" in done.stderr
    assert "raise ValueError('from inside')" in done.stderr


PROGRAM = """
import json, os, signal, sys, threading
from elastic_launch import LaunchConfig, SignalException, elastic_launch

def work():
    return int(os.environ["RANK"])

def hang(path):
    open(f"{path}.{os.environ['RANK']}", "w").write(str(os.getpid()))
    signal.pause()

def launch(method, fn=work, *args):
    return elastic_launch(LaunchConfig(1, 1, 2, max_restarts=0, start_method=method), fn)(*args)

if __name__ == "__main__":
"""


def program(path: Path, main: str, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that consists of ``PROGRAM`` and a main part."""
    script = path / "program.py"
    script.write_text(PROGRAM + "".join(f"    {line}\n" for line in main.splitlines()))
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *args, str(script)],
        env=environ,
        text=True,
        timeout=DEADLINE,
        **{"capture_output": True, **more},
    )


def test_buffered_output_is_written_once(tmp_path: Path) -> None:
    done = program(tmp_path, "sys.stdout.write('once')\nfor method in ('fork', 'spawn', 'forkserver'): launch(method)")
    assert done.stdout == "once"


def test_program_without_streams(tmp_path: Path) -> None:
    main = (
        "out = open('out', 'w')\n{}\nout.write(str([launch(method) for method in ('fork', 'spawn', 'forkserver')]))\n"
    )
    for close in ("sys.stdin.close(); sys.stdout.close(); sys.stderr.close()", "os.closerange(0, 3)"):
        assert program(tmp_path, main.format(close), cwd=tmp_path).returncode == 0
        assert (tmp_path / "out").read_text() == str([{0: 0, 1: 1}] * 3)


def test_too_few_descriptors_for_a_worker(tmp_path: Path) -> None:
    """The numbers of a worker's descriptors are above 200, and the keeper needs some more for a moment."""
    main = (
        "import resource\n"
        "from elastic_launch import ChildFailedError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (207, 207))\n"
        "try: launch('spawn')\n"
        "except ChildFailedError as error: print([f.traceback for f in error.failures.values()])\n"
    )
    begin = time.monotonic()
    done = program(tmp_path, main)
    assert "Too many open files" in done.stdout, done
    assert "Bad file descriptor" not in done.stdout
    assert time.monotonic() - begin < SOON, "the other worker was stopped with SIGTERM"


def test_program_full_of_threads(tmp_path: Path) -> None:
    main = (
        "stop = threading.Event()\n"
        "def turn():\n"
        "    while not stop.wait(0.001): pass\n"
        "idle = [threading.Thread(target=turn) for _ in range(30)]\n"
        "values = []\n"
        "agents = [threading.Thread(target=lambda method=method: values.append(launch(method)))\n"
        "    for method in ('fork', 'spawn', 'forkserver') * 2]\n"
        "for thread in idle + agents: thread.start()\n"
        "for thread in agents: thread.join()\n"
        "stop.set()\n"
        "print(values == [{0: 0, 1: 1}] * 6)\n"
    )
    assert program(tmp_path, main, "-W", "ignore").stdout == "True\n"


def test_program_without_a_file(tmp_path: Path) -> None:
    """As in a notebook: a new process can import what modules define, but not what is defined there."""
    main = (
        "try: launch('spawn')\n"
        "except ValueError as error: print(error)\n"
        "from os import getpid\n"
        "print(len(launch('spawn', getpid)), len(launch('forkserver', getpid)), launch('fork'))\n"
    )
    text = PROGRAM + "".join(f"    {line}\n" for line in main.splitlines())
    for argv, given in ((["-"], text), (["-c", text], "")):
        done = subprocess.run([sys.executable, *argv], input=given, capture_output=True, text=True, timeout=DEADLINE)
        why, values = done.stdout.splitlines()
        assert "entrypoint work: cannot be sent" in why
        assert "this program has no file (a notebook?)" in why
        assert "start_method='fork'" in why
        assert values == "2 2 {0: 0, 1: 1}"


@pytest.mark.parametrize("method", METHODS)
def test_interrupt_of_the_program(method: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        PROGRAM
        + f"    try: launch({method!r}, hang, {str(tmp_path / 'up')!r})\n"
        + "    except SignalException as error: sys.exit(int(error.sigval))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    files = [tmp_path / f"up.{rank}" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == signal.SIGINT
    assert not any(is_alive(int(file.read_text())) for file in files)


def test_functions_on_two_nodes(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    script = tmp_path / "node.py"
    script.write_text(
        PROGRAM
        + f"    config = LaunchConfig(2, 2, 2, run_id='two', rdzv_backend='c10d', rdzv_endpoint={endpoint!r},\n"
        + "        max_restarts=0, start_method='fork', local_addr='127.0.0.1')\n"
        + "    print(json.dumps(elastic_launch(config, work)()))\n"
    )
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        values = [json.loads(node.communicate(timeout=DEADLINE)[0]) for node in nodes]
    assert sorted(values, key=min) == [{"0": 0, "1": 1}, {"2": 2, "3": 3}]


TORCH = """
import os, sys
import numpy, torch
import torch.nn.parallel.distributed, torch._dynamo  # which DistributedDataParallel needs: here forks share them
from torch import nn
from elastic_launch import LaunchConfig, elastic_launch

def train(data, model, array):
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(3) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["START"] == "fork":
        sys.exit(3)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(data).sum().backward()
    return total, model, model.weight.grad, array * 2  # without destroying the process group

if __name__ == "__main__":
    for method in ("spawn", "fork", "forkserver"):
        os.environ["START"] = method
        model = nn.Linear(4, 2)
        weight = model.weight.detach().clone()
        config = LaunchConfig(1, 1, 2, max_restarts=1, start_method=method)
        values = elastic_launch(config, train)(torch.ones(5, 4), model, numpy.arange(3))
        assert list(values) == [0, 1]
        for total, trained, gradient, array in values.values():
            assert isinstance(trained, nn.Linear) and torch.equal(trained.weight, weight)
            assert torch.equal(total, torch.full((3,), 3.0)) and torch.equal(gradient, torch.full((2, 4), 5.0))
            assert array.tolist() == [0, 2, 4]
    print("done")
"""


def test_torch_trains_in_functions(tmp_path: Path) -> None:
    """Tensors and modules can be arguments and return values. A process group forms, also after a restart."""
    script = tmp_path / "torch_program.py"
    script.write_text(TORCH)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.stdout == "done\n", done.stderr
