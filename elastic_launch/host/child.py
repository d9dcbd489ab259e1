"""Starts helper processes of the agent, and ends them.

A helper process does what the agent's own process must not: it imports torch or gRPC, starts threads, or blocks. The
bridge to etcd, an embedded etcd member, torch's TCPStore and the health server are such processes. Each has a session
of its own, all signals blocked, and a socket to the agent. It also holds a pidfd of the agent, and ends with it.
``child_main`` is the helper process's side.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from elastic_launch.env import as_part
from elastic_launch.errors import UnavailableError, how_it_ended
from elastic_launch.host.debugger import not_followed

KILL_PATIENCE = 2.0
"""Seconds to wait for the end of a process that was killed."""

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = (
    # This copy of the package, and nothing else of its folder.
    "import sys; sys.path.insert(0, sys.argv[1]); import elastic_launch; sys.path.pop(0);"
    "from elastic_launch.host import child_main; child_main.run(*sys.argv[2:])"
)


def spawn(
    argv: list[str],
    environ: Mapping[str, str],
    inherited: Mapping[int, int],
    closed: Collection[int] = (),
    unblocked: Collection[int] = (),
) -> int:
    """Start a program in a session of its own, with signals blocked, and SIGCHLD not ignored.

    Args:
        argv: Path of the program, and its arguments.
        environ: All of its environment variables.
        inherited: Descriptors of this process by their numbers in the new one. The standard streams are inherited
            as they are, unless their numbers are among these.
        closed: Descriptors that are not inherited, even if they are marked as inheritable.
        unblocked: Signals that are not blocked in the new process.

    Returns:
        The pid.

    Raises:
        OSError: The system cannot start the program.
    """
    with not_followed():
        return os.posix_spawn(
            argv[0],
            argv,
            environ,
            file_actions=[
                *((os.POSIX_SPAWN_CLOSE, fd) for fd in closed),
                # A descriptor that is duplicated onto itself loses close-on-exec, in the new process only.
                *((os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in inherited.items()),
            ],
            setsid=True,
            setsigmask=signal.valid_signals() - set(unblocked),
            setsigdef=[signal.SIGCHLD],  # some daemons ignore it: the system would not tell how children end
        )


class Child:
    """A helper process, and a socket to it that keeps messages apart and never blocks."""

    def __init__(
        self,
        what: str,
        name: str,
        module: str,
        environ: Mapping[str, str],
        flags: Sequence[str] = ("-I", "-S"),
        inherited: Sequence[int] = (),
        keeps_output: bool = False,
        message: Any = None,
    ) -> None:
        """Start the process.

        Args:
            what: The process in the words of an error message: ``the bridge to etcd``.
            name: The name that ``ps`` shows, up to 15 characters.
            module: The module of this package that it runs; ``child_main.run`` tells how.
            environ: Its environment variables.
            flags: Options of its Python interpreter.
            inherited: Further descriptors, which it inherits under the same numbers.
            keeps_output: Keep its standard output and error for ``last_line``; otherwise they are discarded.
            message: The first message to the process, a value that ``marshal`` supports; None sends nothing.

        Raises:
            UnavailableError: The system cannot start the process (no pidfd before Linux 5.3, no more processes).
        """
        self._exitcode: int | None = None
        try:
            with contextlib.ExitStack() as on_error:
                self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                on_error.callback(self.control.close)
                self.control.setblocking(False)
                output = os.memfd_create(name) if keeps_output else os.devnull
                self._output = on_error.enter_context(open(output, "r+b", 0))
                out = self._output.fileno()
                with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent, open(os.devnull, "rb") as null:
                    numbers = (theirs.fileno(), agent.fileno(), *inherited)
                    self.pid = spawn(
                        [sys.executable, *flags, "-c", _PROGRAM, _ROOT, name, module, *map(str, numbers)],
                        as_part(environ),
                        {0: null.fileno(), 1: out, 2: out, **{number: number for number in numbers}},
                        closed=_inheritable(numbers),
                    )
                self._process = on_error.enter_context(open(os.pidfd_open(self.pid), "rb"))
                if message is not None:
                    self._send(message)
                on_error.pop_all()
        except OSError as error:
            raise UnavailableError(f"cannot start {what}: {error}") from error

    def _send(self, message: Any) -> None:
        """Send the first message, in a memory file: a socket does not take more than some 200 KiB at once."""
        with open(os.memfd_create("message"), "wb") as file, contextlib.suppress(BrokenPipeError):
            marshal.dump(message, file)
            file.flush()
            socket.send_fds(self.control, [b"m"], [file.fileno()])  # the socket reports if the process has ended

    def fileno(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        return self.control.fileno()

    def has_ended(self, patience: float) -> bool:
        """Wait up to ``patience`` seconds for the process to end, and reap it. Returns whether it has ended."""
        poller = select.poll()
        poller.register(self._process, select.POLLIN)
        if not poller.poll(patience * 1000):
            return False
        with contextlib.suppress(ChildProcessError):  # another part of this program may reap all children
            if result := os.waitid(os.P_PIDFD, self._process.fileno(), os.WEXITED | os.WNOHANG):
                exited = result.si_code == os.CLD_EXITED
                self._exitcode = result.si_status if exited else -result.si_status
        return True

    def how_it_ended(self) -> str:
        """How the process ended, for messages: ``killed by SIGKILL``. Waits for the end if necessary."""
        self.has_ended(KILL_PATIENCE)
        return "exit code unknown" if self._exitcode is None else how_it_ended(self._exitcode)

    def last_line(self) -> str:
        """The last line of the process's output."""
        self._output.seek(0)  # the process has moved the shared offset
        return self._output.read().decode(errors="replace").strip().rpartition("\n")[2]

    def end(self, patience: float = 0.0) -> None:
        """End the process, and reap it. Does nothing the second time.

        Args:
            patience: Seconds that it has to end by itself when its socket is closed; then it is killed.
        """
        if self._process.closed:
            return
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)  # forks of this program may have copies of the descriptor
        self.control.close()
        if not self.has_ended(patience):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)
            self.has_ended(KILL_PATIENCE)
        self._process.close()
        self._output.close()


def _inheritable(kept: Collection[int]) -> list[int]:
    """Descriptors of the surrounding program that a new process would inherit, unless their numbers are too high.

    Such a descriptor was opened before the limit was lowered. ``posix_spawn`` refuses its number, so it is inherited.
    """
    found, limit = [], os.sysconf("SC_OPEN_MAX")
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if 2 < fd < limit and fd not in kept and os.get_inheritable(fd):
                found.append(fd)
    return found
