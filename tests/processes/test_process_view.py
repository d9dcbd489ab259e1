"""The kernel's view of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from elastic_launch.core.progress.stacks import KernelView
from elastic_launch.host.process_view import kernel_view, python_children
from tests.support.waiting import is_alive, wait_until

SLEEPS = "import time; time.sleep(1000)"
SPINS = "while True: pass"
READS = "input()"


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for input that never comes, and does not outlive the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def view(pid: int) -> KernelView:
    seen = kernel_view(pid)
    assert seen is not None
    return seen


@pytest.mark.quick
def test_a_sleeping_process_is_in_the_system_call_that_it_sleeps_in() -> None:
    with running(sys.executable, "-c", SLEEPS, "a\nb") as process:
        wait_until(lambda: view(process.pid).syscall == "clock_nanosleep", "it sleeps")
        seen = view(process.pid)
        assert seen.state == "S"
        assert "nanosleep" in seen.wchan
        assert seen.command.startswith(f"{sys.executable} -c {SLEEPS}")
        assert not seen.reads_stdin
        assert seen.tracer_pid == 0


def test_a_process_that_computes_uses_cpu_time() -> None:
    with running(sys.executable, "-c", SPINS) as process:
        wait_until(lambda: view(process.pid).cpu_seconds > 0.2, "it computes")
        wait_until(lambda: view(process.pid).state == "R", "it computes")


@pytest.mark.quick
def test_a_process_that_waits_for_input_reads_stdin() -> None:
    with running(sys.executable, "-c", READS) as process:
        wait_until(lambda: view(process.pid).reads_stdin, "it reads")
        assert view(process.pid).syscall == "read"


def test_a_process_that_reads_something_else_does_not_read_stdin() -> None:
    with running(sys.executable, "-c", "import os; os.read(os.pipe()[0], 1)") as process:
        wait_until(lambda: view(process.pid).syscall == "read", "it reads")
        assert not view(process.pid).reads_stdin


def test_a_stopped_process_is_stopped() -> None:
    with running(sys.executable, "-c", SLEEPS) as process:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: view(process.pid).state == "T", "it is stopped")


def test_bytes_that_a_process_moves_are_counted() -> None:
    code = "import os, time; os.write(os.open('/dev/null', os.O_WRONLY), bytes(10_000_000)); time.sleep(1000)"
    with running(sys.executable, "-c", code) as process:
        wait_until(lambda: view(process.pid).io_bytes >= 10_000_000, "it writes")


def test_an_odd_name_does_not_confuse_the_view() -> None:
    code = "import time; open('/proc/self/comm', 'w').write('a) R (b'); time.sleep(1000)"
    with running(sys.executable, "-c", code) as process:
        wait_until(lambda: view(process.pid).name == "a) R (b", "it has its name")
        wait_until(lambda: view(process.pid).state == "S", "it sleeps")


@pytest.mark.quick
def test_a_process_that_is_gone_has_no_view() -> None:
    with running(sys.executable, "-c", SLEEPS) as process:
        process.kill()
        wait_until(lambda: view(process.pid).state == "Z", "it has ended")  # nobody has waited for it yet
    assert kernel_view(process.pid) is None
    assert python_children(process.pid, 8) == []


def test_what_another_user_may_not_read_is_empty() -> None:
    if os.getuid() != 0:
        pytest.skip("takes root, to become another user")
    code = (
        "import os, sys; from elastic_launch.host.process_view import kernel_view, python_children; os.setuid(65534);"
        "v = kernel_view(int(sys.argv[1])); print(v.state, repr(v.syscall), repr(v.wchan), v.io_bytes, v.name != '')"
    )
    with running(sys.executable, "-c", SLEEPS) as process:
        wait_until(lambda: view(process.pid).syscall == "clock_nanosleep", "it sleeps")
        shown = subprocess.check_output([sys.executable, "-c", code, str(process.pid)], text=True)
    assert shown == "S '' '' 0 True\n"


def test_python_processes_below_a_shell_are_found_nearest_first() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPS!r}])"
    with running("/bin/sh", "-c", f'"{sys.executable}" -c "{parent}"; sleep 1000') as process:
        wait_until(lambda: len(python_children(process.pid, 8)) == 2, "both run")
        near, far = python_children(process.pid, 8)
        try:
            assert python_children(near, 8) == [far]
            assert python_children(process.pid, 1) == [near]
        finally:
            for pid in (process.pid, near, far):  # the shell first, or it would go on
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(near) and not is_alive(far), "they have ended")
