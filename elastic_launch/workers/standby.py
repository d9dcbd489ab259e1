"""Fork workers from a warm keeper, when they are needed or ahead of time.

Every forked worker begins as a standby: a process that waits for its order, blocked in ``recvmsg``, and has done
nothing else. Standbys that were forked while the round before ran are ready at once. If there are none, or not enough
of them, more are forked, and get their orders at once.

An order is one byte, GO or HOLD, with descriptors: first a memory file that holds the marshalled order, then the
worker's own. The answer is a marshalled None, or the error (errno, message) because of which the standby ends. A
standby whose socket is closed before it has an order ends. After HOLD, a worker runs its program only when its socket
is closed.

A standby must be what a fork of the keeper would be now. What can change from outside in the life of a keeper is
compared (``inherited``), and standbys that differ are replaced. Modules that change on disk are not looked at, because
a fork would not see that either.

``preload_main`` imports this file without its package.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
import time

if __package__:
    from elastic_launch.workers import keeper_main, written_pages
else:
    import keeper_main  # type: ignore[import-not-found, no-redef]
    import written_pages  # type: ignore[import-not-found, no-redef]

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from elastic_launch.workers.keeper_main import SpawnOrder

DELAY = 1.0
"""Seconds from the start of a round to the first fork for the next one: until then the workers need the CPUs."""
PAUSE = 0.05
"""Seconds between two such forks."""
PATIENCE = 0.05
"""Seconds without an answer after which the keeper looks whether a standby is stopped."""
LIMIT = 10.0
"""Seconds without an answer after which a new process is given up: the system may have it wait for a dead disk."""
GO, HOLD = b"g", b"h"
"""What the first byte of an order says: run the program at once, or only when the socket is closed."""
HEAD_START = 0.05
"""Seconds, at most, by which rank 0 starts before the others if it is to serve torch's store."""
GLANCE = 0.001
"""Seconds after which the keeper looks again whether it serves."""
NEVER = float("inf")
RLIM_NLIMITS = 16
OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
FIRST_VICTIM = b"1000"
"""Has the kernel kill a process before all others when memory is used up."""


class ForkedWorker(BaseException):
    """Raised in the process of a forked worker, to leave all of the keeper's frames."""

    def __init__(
        self, socket: _socket.socket, environment: dict[bytes, bytes], limits: tuple[int, int], oom_score_adj: bytes
    ) -> None:
        self.environment = environment
        """Once the order is taken, the worker's whole environment; until then, what all workers inherit."""
        self.order: SpawnOrder = (-1, [], {}, [], [])
        self.descriptors: list[int] = []
        """The descriptors that were sent for this worker, in the order of the message."""
        self._socket = socket
        self._is_held = False
        """Whether it must not run its program yet."""
        self._limits = limits
        """Those of open files."""
        self._oom_score_adj = oom_score_adj
        """What to set it to again; empty: it has not been changed."""

    def take_order(self) -> None:
        """Wait for the order. Then become the worker as far as descriptors, limits and CPUs go."""
        size = _socket.CMSG_SPACE(4 * keeper_main.MAX_DESCRIPTORS)
        data, ancillary, _, _ = self._socket.recvmsg(1, size, keeper_main.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        self._is_held = data == HOLD
        memory, *descriptors = keeper_main.descriptors_in(ancillary)
        self.order = _, _, changes, targets, cpus = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))
        os.close(memory)
        answers = self._socket.detach()
        try:
            for signum in signal.sigpending():  # they were meant for a standby
                handler = signal.signal(signum, signal.SIG_IGN)
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
            lowest = max((2, *map(abs, targets))) + 1
            number, answers = answers, fcntl.fcntl(answers, fcntl.F_DUPFD_CLOEXEC, lowest)  # it may be a target
            os.close(number)
            self.descriptors = numbers = keeper_main.renumber(descriptors, targets, lowest)
            for fd in {*descriptors} - {*numbers}:
                os.close(fd)
            self.environment = {**self.environment, **changes}
            if changes.get(keeper_main.PROGRESS):
                self.environment[keeper_main.PROGRESS] = b"%d,%d" % tuple(numbers[-2:])
            resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)
            if cpus:
                os.sched_setaffinity(0, cpus)
            if self._oom_score_adj:
                set_oom_score_adj(self._oom_score_adj)
            os.write(answers, marshal.dumps(None))
        except BaseException as error:
            try:
                os.write(answers, marshal.dumps((getattr(error, "errno", 0), getattr(error, "strerror", str(error)))))
            finally:
                os._exit(127)
        self._socket = _socket.socket(fileno=answers)

    def wait(self) -> None:
        """Wait until the program may run."""
        if self._is_held:
            self._socket.recv(1)
        self._socket.close()


class Standby:
    """A forked process that has not answered to an order yet."""

    def __init__(self, pid: int, socket: _socket.socket, is_ahead: bool) -> None:
        self.pid = pid
        self.socket = socket
        self.is_ahead = is_ahead
        """Whether it was forked ahead of time. If not, it is a worker, whatever happens to it."""
        self.inherited = inherited() if is_ahead else ()

    def send(self, order: SpawnOrder, descriptors: Sequence[int], when: bytes) -> bool:
        """Send it its order, GO or HOLD. Returns False if it has ended.

        Raises:
            OSError: the order cannot be sent.
        """
        memory = os.memfd_create("order", os.MFD_CLOEXEC)
        try:
            os.write(memory, marshal.dumps(order))
            numbers = b"".join(fd.to_bytes(4, "little") for fd in (memory, *descriptors))
            self.socket.sendmsg([when], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
        except ConnectionError:
            return False
        finally:
            os.close(memory)
        return True

    def answer(self) -> bytes:
        """Return its answer; empty if it has ended without one. May block unless the socket is readable."""
        try:
            return self.socket.recv(1 << 16)
        except ConnectionError:
            return b""


class StandbyPool:
    """Forks the workers of a keeper, some of them ahead of time."""

    def __init__(self, environment: dict[bytes, bytes]) -> None:
        """Fork nothing yet.

        Args:
            environment: what the workers inherit.
        """
        self.environment = environment
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.release: Callable[[], None] = lambda: None
        """Closes the keeper's own descriptors, in a forked process."""
        self.wanted = 0
        """How many standbys there are to be."""
        self.due = NEVER
        """When to fork the next one, on ``time.monotonic``."""
        self.written: written_pages.PageRanges = []
        """The pages that a standby copies ahead of time."""
        self.standbys: dict[int, Standby] = {}
        """Those that were forked ahead, by pid."""
        self.pending: dict[int, Standby] = {}
        """Those that have been sent an order, until they have answered and may run their programs, by pid."""

    # ---- ahead of time

    def learn(self, worker: int) -> None:
        """Have the next standbys copy the pages that a worker has written to."""
        try:
            self.written = written_pages.written_pages(worker, os.getpid())
        except OSError:
            self.written = []

    def want(self, count: int, is_busy: bool) -> None:
        """Have ``count`` standbys: at once, or a little later if workers are starting. End all others."""
        self.wanted = count
        while len(self.standbys) > count:
            self.end(self.standbys.popitem()[1])
        self.due = time.monotonic() + DELAY * is_busy if len(self.standbys) < count else NEVER

    def hurry(self) -> None:
        """Fork what is wanted now: the workers have ended, and another round is likely to follow."""
        self.want(self.wanted, is_busy=False)

    def add(self) -> None:
        """Fork a standby.

        Raises:
            OSError: that is not possible now. No further attempt is due.
        """
        self.due = NEVER
        standby = self.fork(is_ahead=True)
        self.standbys[standby.pid] = standby
        if len(self.standbys) < self.wanted:
            self.due = time.monotonic() + PAUSE

    def forget(self, pid: int) -> None:
        """Note that a child has ended. If it was a standby, the keeper forks another one when that is needed."""
        if standby := self.standbys.pop(pid, None):
            standby.socket.close()

    def discard(self) -> None:
        """End all standbys, and make no more."""
        self.want(0, is_busy=False)

    def end(self, standby: Standby) -> None:
        """End a standby that is in no list any more."""
        keeper_main.kill(standby.pid, signal.SIGKILL)
        standby.socket.close()

    # ---- workers

    def start(
        self, orders: Sequence[SpawnOrder], descriptors: Sequence[int], lease: float = NEVER
    ) -> tuple[dict[int, int], dict[int, tuple[int, str]]]:
        """Start workers, and wait until they are about to run.

        Args:
            orders: the workers.
            descriptors: those of all workers, in this order.
            lease: when to wait no longer, on ``time.monotonic``, because the workers are to be killed.

        Returns:
            Pids by local rank, and errors (errno, message) by the local ranks of workers that could not be started.
        """
        now = inherited()
        for standby in [it for it in self.standbys.values() if it.inherited != now]:
            self.end(self.standbys.pop(standby.pid))
        start = Start(self, max(map(store_port, orders), default=0))
        position = 0
        for order in orders:
            end = position + len(order[3])
            start.hand_out(order, descriptors[position:end])
            position = end
        start.finish(min(lease, time.monotonic() + LIMIT))
        return dict(sorted(start.started.items())), start.failed

    def hand_out(self, order: SpawnOrder, descriptors: Sequence[int], when: bytes) -> Standby:
        """Send an order, GO or HOLD, to a standby, which is ``pending`` then. Forks one if there is none.

        Raises:
            OSError: there is none, and none can be forked, or the order cannot be sent.
        """
        while True:
            pid = next(iter(self.standbys), 0)
            standby = self.standbys.pop(pid) if pid else self.fork(is_ahead=False)
            try:
                is_sent = standby.send(order, descriptors, when)
            except BaseException:
                self.end(standby)
                raise
            if is_sent or not standby.is_ahead:
                self.pending[standby.pid] = standby
                return standby
            self.end(standby)

    def let_go(self, standby: Standby) -> None:
        """Have nothing to do any more with one that is ``pending``. If it is held, it runs its program."""
        del self.pending[standby.pid]
        standby.socket.close()

    def fork(self, is_ahead: bool) -> Standby:
        """Fork a standby.

        Raises:
            OSError: that is not possible.
            ForkedWorker: in the new process.
        """
        ours, theirs = _socket.socketpair()
        try:
            keeper = os.getpid()
            if (pid := os.fork()) == 0:
                self.become_standby(keeper, ours, theirs, is_ahead)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return Standby(pid, ours, is_ahead)

    def become_standby(self, keeper: int, ours: _socket.socket, theirs: _socket.socket, is_ahead: bool) -> NoReturn:
        """Give the new process a session, close what is not its own, and leave all frames.

        Args:
            keeper: the keeper's pid.
            ours: the keeper's end of the socket pair.
            theirs: the other end.
            is_ahead: whether its order is not known yet.

        Raises:
            ForkedWorker: always.
        """
        try:
            os.setsid()
            # In case the keeper and the agent die at the same instant. It has no effect if the keeper has died before.
            keeper_main.libc.prctl(keeper_main.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper:
                os._exit(127)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            signal.set_wakeup_fd(-1)
            for socket in (ours, *(it.socket for pool in (self.standbys, self.pending) for it in pool.values())):
                socket.close()
            self.release()
            adjustment = b""
            if is_ahead:
                keeper_main.libc.prctl(keeper_main.PR_SET_NAME, keeper_main.STANDBY.encode(), 0, 0, 0)
                adjustment = content_of(OOM_SCORE_ADJ)
                set_oom_score_adj(FIRST_VICTIM)
                written_pages.copy_pages(self.written)
            worker = ForkedWorker(_socket.socket(fileno=theirs.detach()), self.environment, self.limits, adjustment)
        except BaseException:
            os._exit(127)
        raise worker


class Start:
    """The start of a round's workers. If rank 0 is to serve torch's store, the others are held until it does.

    A rank that asks for the store before would try again only after most of a second.
    """

    def __init__(self, pool: StandbyPool, port: int) -> None:
        """Start nothing yet.

        Args:
            pool: has the processes.
            port: where the first worker serves torch's store; 0: it does not.
        """
        self.started: dict[int, int] = {}
        """Pids by local rank."""
        self.failed: dict[int, tuple[int, str]] = {}
        """Errors (errno, message) by the local ranks of workers that could not be started."""
        self._pool = pool
        self._port = port
        """Where the store is to be served; 0: nobody is held any more."""
        self._holds_until = 0.0
        """When the others may run even if it is not, on ``time.monotonic``."""
        self._handed: dict[int, tuple[Standby, SpawnOrder, Sequence[int]]] = {}
        """The processes that have not answered, and what they were sent, by their sockets' descriptors."""
        self._held: list[Standby] = []
        """Those that have answered, and may not run their programs yet."""
        self._poller = select.poll()

    def hand_out(self, order: SpawnOrder, descriptors: Sequence[int]) -> None:
        """Send an order."""
        serves = self._port > 0 and store_port(order) == self._port
        try:
            standby = self._pool.hand_out(order, descriptors, HOLD if self._port and not serves else GO)
        except OSError as error:
            self.failed[order[0]] = (error.errno or 0, error.strerror or str(error))
            return
        if serves:
            self._holds_until = time.monotonic() + HEAD_START
        self._handed[standby.socket.fileno()] = standby, order, descriptors
        self._poller.register(standby.socket.fileno(), select.POLLIN)
        self._release_when_served()

    def finish(self, until: float) -> None:
        """Wait until all workers run their programs, or could not be started: what has not answered by then, is killed.

        Args:
            until: on ``time.monotonic``.
        """
        while self._handed or self._held:
            is_holding = self._port > 0
            ready = self._poller.poll(1000 * (GLANCE if is_holding else PATIENCE))
            for fd, _ in ready:
                self._poller.unregister(fd)
                self._take_answer(*self._handed.pop(fd))
            self._release_when_served()
            if not ready and not is_holding:
                self._unblock()
                if time.monotonic() >= until:
                    self._give_up()

    def _take_answer(self, standby: Standby, order: SpawnOrder, descriptors: Sequence[int]) -> None:
        answer = standby.answer()
        if error := marshal.loads(answer) if answer else None:
            self.failed[order[0]] = error
        elif answer or not standby.is_ahead:  # one that was forked just now counts as a worker that has ended
            self.started[order[0]] = standby.pid
            if self._port:
                self._held.append(standby)
                return
        self._pool.let_go(standby)
        if not answer and standby.is_ahead:
            self.hand_out(order, descriptors)

    def _release_when_served(self) -> None:
        if self._port and (time.monotonic() >= self._holds_until or is_listening(self._port)):
            self._port = 0
            for standby in self._held:
                self._pool.let_go(standby)
            self._held.clear()

    def _unblock(self) -> None:
        """Kill or resume what is stopped and therefore does not answer."""
        for standby, _, _ in self._handed.values():
            if is_stopped(standby.pid):
                # The socket shows the end of one that can be replaced. Any other is a worker: the keeper must not wait
                # for it, because it would notice neither the agent's death nor the end of a lease.
                keeper_main.kill(standby.pid, signal.SIGKILL if standby.is_ahead else signal.SIGCONT)

    def _give_up(self) -> None:
        for standby, order, _ in self._handed.values():
            self._pool.let_go(standby)
            keeper_main.kill(standby.pid, signal.SIGKILL)
            self.failed[order[0]] = (errno.ETIMEDOUT, "its process has not answered, and was killed")
        self._handed.clear()


# ---- what a fork inherits


def inherited() -> tuple[Any, ...]:
    """Return what a fork of this process would inherit that others can change: limits, CPUs, priority, cgroup."""
    return (
        [resource.getrlimit(number) for number in range(RLIM_NLIMITS)],
        os.sched_getaffinity(0),
        os.sched_getscheduler(0),
        os.getpriority(os.PRIO_PROCESS, 0),
        content_of("/proc/self/cgroup"),
        content_of(OOM_SCORE_ADJ),
    )


def content_of(path: str) -> bytes:
    """Return the content of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def set_oom_score_adj(text: bytes) -> None:
    """Set how likely the kernel is to kill this process when memory is used up, where that is allowed."""
    try:
        with open(OOM_SCORE_ADJ, "wb") as file:
            file.write(text)
    except OSError:
        return


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by a signal or a debugger."""
    try:
        return keeper_main.read_stat(pid)[0] in (b"T", b"t")
    except OSError:
        return False


# ---- torch's store


def store_port(order: SpawnOrder) -> int:
    """Return the port on which this worker is likely to serve torch's store; 0 if it is not."""
    variables = order[2]
    serves = variables.get(b"RANK") == b"0" and variables.get(b"TORCHELASTIC_USE_AGENT_STORE") != b"True"
    port = variables.get(b"MASTER_PORT", b"")
    return int(port) if serves and port.isdigit() and "torch.distributed" in sys.modules else 0


def is_listening(port: int) -> bool:
    """Return whether a process listens on a port on an IPv4 address, or for both families.

    Only then can a socket with SO_REUSEADDR not be bound there: the agent and torch's store set that option as well.
    (The list in /proc takes milliseconds: the kernel goes through all places that it has for connections.)
    """
    try:
        sock = _socket.socket()
    except OSError:
        return False  # no descriptor is free, or there is no IPv4
    try:
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    finally:
        sock.close()
    return False
