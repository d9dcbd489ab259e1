"""Functions that tests run as workers.

Every worker that is a fresh Python imports this module. So it imports little; test modules import much.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rank() -> int:
    return int(os.environ["RANK"])


def run(fn: Callable[..., Any], *args: Any, method: str = "spawn", **changes: Any) -> dict[int, Any]:
    """Run a function as two workers."""
    from elastic_launch import LaunchConfig, elastic_launch  # late: few workers are launchers, too

    settings = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0, "start_method": method}
    return elastic_launch(LaunchConfig(**{**settings, **changes}), fn)(*args)


def who(greeting: str) -> tuple[str, int, str, bool]:
    name = multiprocessing.current_process().name
    return f"{greeting} {rank()}", os.getppid(), name, threading.current_thread() is threading.main_thread()


def environment() -> dict[str, str]:
    return dict(os.environ)


def large() -> bytes:
    return bytes([rank()]) * 200_000_000


def unpicklable() -> Any:
    return (number for number in range(3)) if rank() == 1 else None


def boom() -> None:
    if rank() == 1:
        raise ValueError("boom")
    signal.pause()


def end(how: str, status: int) -> Any:
    if rank() == 1:
        signal.pause()
    if how == "os._exit":
        os._exit(status)
    if how == "sys.exit":
        sys.exit(status)
    if how == "kill":
        os.kill(os.getpid(), status)
    os.closerange(3, 1000)
    return "lost"


def leave(how: str) -> None:
    if how == "os._exit":
        os._exit(0)
    sys.exit(0)


def put(queue: Any, lock: Any) -> None:
    with lock:
        queue.put(rank())


def send(connection: Any, lock: Any) -> None:
    with lock:
        connection.send(rank())


def fail_once(marks: str) -> int:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.exit(3)
    Path(marks, str(rank())).write_text("")
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def signals() -> tuple[bool, bool, set[int]]:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)}
    return (
        all(handler is signal.SIG_DFL for handler in handlers.values()),
        signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        {int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, ())},
    )


def hang(path: str) -> None:
    Path(path, str(rank())).write_text(str(os.getpid()))
    signal.pause()


def child_that_lives_on(path: str) -> None:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(path, str(rank())).write_text(str(child.pid))


def descriptors() -> list[str]:
    numbers = os.listdir("/proc/self/fd")  # and that of the listing itself, which is closed again
    return [
        os.readlink(f"/proc/self/fd/{fd}") for fd in numbers if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}")
    ]


class Trainer:
    """Something to call that is no function; its representation is no name."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        raise RuntimeError("not ready")

    def train(self, number: int) -> int:
        return self.factor * number + rank()

    def __call__(self, number: int) -> int:
        return self.train(number)


def multiply(factor: int, number: int, *, more: int = 0) -> int:
    return factor * number + more + rank()


def size(value: bytes) -> int:
    return len(value)


class Unreadable:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("nothing",)


class Interrupting:
    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def unreadable() -> Unreadable:
    return Unreadable()


class Odd(BaseException):
    pass


class Silent(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Heavy(Exception):  # noqa: N818
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def end_oddly(how: str) -> Any:
    if rank() == 1:
        signal.pause()
    match how:
        case "odd":
            raise Odd("what is this")
        case "interrupt":
            raise KeyboardInterrupt
        case "silent":
            raise Silent
        case "heavy":
            raise Heavy("carries a lock")
        case "group":
            raise ExceptionGroup("several", [ValueError("a"), KeyError("b")])
        case "text":
            sys.exit("no data")
        case "environment":
            os.environ.clear()
            raise ValueError("nothing around")
        case "no streams":
            sys.stdout = sys.stderr = None
            raise ValueError("no streams")
        case "closed streams":
            sys.stderr.close()
            sys.stdout.close()
            raise ValueError("closed streams")
        case "recursion":
            return end_oddly(how)
        case "coroutine":
            import asyncio

            return asyncio.sleep(1)
        case "local class":
            return type("Local", (), {})()
        case "deep":
            return functools.reduce(lambda inner, _: [inner], range(5000), list[Any]())
    return None


def die(how: str) -> None:
    if rank() == 1:
        signal.pause()
    if how == "thread":
        threading.Thread(target=os._exit, args=(9,)).start()
        signal.pause()
    os.write(2, b"the last line\n")  # pytest has its own in place of sys.stderr
    faulthandler.disable()  # pytest's, which a fork inherits: it writes pages to the terminal
    ctypes.string_at(0)


def fork_and_return(fails: bool) -> str:
    pid = os.fork()
    if pid == 0:
        if fails:
            raise ValueError("the child's")
        return "child"
    os.waitpid(pid, 0)
    return "worker"


def square(number: int) -> int:
    return number * number


def use_processes() -> list[int]:
    left = multiprocessing.Process(target=time.sleep, args=(1000,), daemon=True)
    left.start()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(square, [1, 2, 3])


def change_everything(path: str) -> str:
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.close(0)
    sys.stdout.close()

    def late() -> None:
        threading.main_thread().join()  # which ends when the function has returned
        Path(path, str(rank())).write_text("late")

    threading.Thread(target=late).start()
    return os.getcwd()


def launch(method: str) -> dict[int, Any]:
    return run(rank, method=method)


def launch_what_fails(method: str) -> Any:
    if rank() == 1:
        signal.pause()
    return run(boom, method=method)


def greet(greeting: str) -> str:
    return f"{greeting} {rank()}"


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.005)


def ignore_sigterm(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(path, f"ready.{rank()}").write_text("")
    while True:
        signal.pause()


def fail_beside_one_that_ignores_sigterm(path: str) -> None:
    if rank() == 0:
        ignore_sigterm(path)
    wait_for(f"{path}/ready.0")
    sys.exit(4)


def speak() -> None:
    os.write(1, f"out {rank()}\n".encode())  # pytest has its own in place of sys.stdout
    os.write(2, f"err {rank()}\n".encode())


def train(steps: int) -> None:
    """Step an optimizer."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    for _ in range(steps):
        optimizer.step()


def tell(steps: int) -> None:
    """Tell of iterations, in the worker and in a child."""
    from elastic_launch import worker

    for step in range(steps):
        worker.progress(step)
    pid = os.fork()
    worker.progress(1000)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
