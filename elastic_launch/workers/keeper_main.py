"""The keeper: a small process between the agent and its workers, which is the workers' parent and reaper.

The agent and the keeper are both subreapers (``PR_SET_CHILD_SUBREAPER``). When one of them dies, the other kills
everything below itself. So nothing that a worker started outlives the job, daemons included, even when the agent or the
keeper is killed with SIGKILL.

The keeper runs as a program of its own: ``main(SOCKET, AGENT)`` under ``python -I -S``. It is executed, not forked,
because the agent may live in a program full of threads. SOCKET is a stream socket to the agent. AGENT is a pidfd of the
agent. The socket alone would not show the agent's death, because forks of its program may hold copies of the other end.
The keeper blocks all signals but SIGCHLD and has a session of its own, so that neither a terminal nor a batch system
that signals every process of a job can hit it by accident.

It imports nothing of elastic_launch and as little of the standard library as possible, because the first worker waits
for its start. It decides nothing and never gives up on a process; the agent may do so, and leaves the keeper to its
task.

Messages are marshalled tuples behind a length of four bytes. Both ends run the same interpreter.

To the keeper, with the name of a method of ``Keeper``:
    ("spawn", [(local rank, argv, environment changes, [descriptor's number in the worker, ...], [cpu, ...]), ...])
        -- start a round. The descriptors arrive with the message, in this order; number -N means any from N on. With
        PROGRESS among the changes, the last two are those that it names.
    ("send_signal", signum, [local rank, ...], is_stop)
    ("dump_stacks", [local rank, ...])  -- have these workers write the stacks of their threads
    ("sample_stacks", [pid, ...])  -- have these processes below write theirs; they are about to go on
    ("reap_leftovers", with_kill)  -- end what the workers left, with SIGTERM or with SIGKILL
    ("renew_lease", until)  -- send SIGKILL to all at this time.monotonic(), unless a later lease arrives first
    ("stand_by", count)  -- of a warm keeper: have as many processes ready for the next round (``standby``)
To the agent:
    ("started", {local rank: pid}, {local rank: (errno, message)})
    ("exited", [(local rank, exit code, time, (stop signal sent before, ...)), ...])
    ("reaped", {pid: name})
        -- once per round, when no process is left; names the processes that had to be killed after the workers' end
    ("dropped", signum, [local rank, ...])  -- this signal was not passed on: the workers would have died of it
    ("lease_expired",)
    ("failed", message)  -- the keeper cannot do its work and exits
    ("detail", message)  -- for a user who wants to know everything
    ("warning", message), ("importing", what)  -- from ``preload_main`` only
"""

from __future__ import annotations

import _socket
import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
import time
from enum import Enum

TYPE_CHECKING = False  # mypy knows the name; importing typing would delay the first worker
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, NoReturn

    from elastic_launch.workers.standby import StandbyPool

    SpawnOrder = tuple[int, list[bytes], dict[bytes, bytes], list[int], list[int]]
    """One worker to start, as in the ``spawn`` message."""

PROGRAM = "import sys; sys.path.append(sys.argv[1]); import keeper_main; keeper_main.main(*map(int, sys.argv[2:]))"
"""Imports this file instead of running it as a script: that finds the compiled file and saves 5 ms."""
COMMAND = (sys.executable, "-I", "-S", "-c", PROGRAM, os.path.dirname(__file__))
"""Command line of a keeper, without the numbers of its two descriptors."""

DUMP_SIGNAL = 63
"""Python workers answer this signal with the stacks of their threads (``bootstrap``, ``function_main``)."""
PROGRESS = b"ELASTIC_LAUNCH_PROGRESS_FD"
"""The variable with the numbers of the two descriptors by which a worker tells its progress."""
MAX_DESCRIPTORS = 250
"""Descriptors sent with one message. The kernel's limit is 253."""

MIN_KILL_INTERVAL, MAX_KILL_INTERVAL = 0.01, 1.0
"""Seconds until SIGKILL is sent again, to processes that are still there and to those forked meanwhile."""
DESCRIPTORS_CLOSED = 71
"""Exit status of a warm keeper if a module has closed its descriptors."""
NO_LEASE = float("inf")
"""The lease of workers that need none."""
MAX_POLL = 86400.0
"""Seconds. poll(2) cannot wait for more than 24 days, but a lease may last longer."""

STANDBY = "elastic-standby"
"""The name of a process that stands by, as ``ps`` shows it."""

MSG_CTRUNC, MSG_CMSG_CLOEXEC = 0x8, 0x40000000
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
libc = ctypes.CDLL(None)


def main(sock: int, agent: int) -> NoReturn:
    """Run the keeper as a program; ``sock`` and ``agent`` are inherited descriptors."""
    close_others((sock, agent))
    serve(sock, agent, inherited_environment())


def serve(sock: int, agent: int, environment: dict[bytes, bytes], pool: StandbyPool | None = None) -> NoReturn:
    """Be the keeper until this process ends.

    Args:
        sock: the descriptor of the socket to the agent.
        agent: the descriptor of the agent's pidfd.
        environment: what the workers inherit.
        pool: forks the workers from this process; None: they execute a command.

    Raises:
        ForkedWorker: only with a ``pool``, in a new process: that process is to be a worker, not the keeper.
    """
    for fd in (sock, agent):
        os.set_inheritable(fd, False)
    libc.prctl(PR_SET_NAME, b"elastic-keeper", 0, 0, 0)
    set_subreaper(True)
    keeper = Keeper(sock, agent, environment, pool)  # with a name, or its end would be a ResourceWarning
    keeper.run()
    os._exit(0)


class KeeperPhase(Enum):
    """How far the keeper is with the current round."""

    RUNNING = 0
    TERMINATING = 1
    """The leftovers have been sent SIGTERM."""
    KILLING = 2
    """Whatever is left is sent SIGKILL repeatedly."""
    REAPED = 3
    """No process is left, and the agent knows."""


class RunningWorker:
    """A worker that has not ended."""

    def __init__(self, local_rank: int, pid: int) -> None:
        self.local_rank = local_rank
        self.pid = pid
        self.stop_signals: tuple[int, ...] = ()
        """The stop signals that it has been sent."""


class Keeper:
    """Carries out the agent's messages and reaps the processes below."""

    def __init__(self, sock: int, agent: int, environment: dict[bytes, bytes], pool: StandbyPool | None) -> None:
        self.pid = os.getpid()
        self.sock = sock
        self.socket = _socket.socket(fileno=sock)
        self.agent = agent
        self.is_agent_alive = True
        self.environment = environment
        self.pool = pool
        if pool:
            pool.release = self.release
        self.private_descriptors: tuple[int, ...] = ()
        """The keeper's own descriptors besides the socket's. A forked worker closes them."""
        self.received_descriptors: list[int] = []
        """Descriptors for workers that have not been started yet."""
        self.worker_limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        # For a moment the keeper holds many of the workers' descriptors.
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.worker_limits[1], self.worker_limits[1]))
        self.phase = KeeperPhase.RUNNING
        self.workers: dict[int, RunningWorker] = {}
        """The workers that have not ended, by pid."""
        self.has_failed = False
        """Whether a worker of the round has failed."""
        self.stopped_groups: set[int] = set()
        """Process groups that have been sent a stop signal as a whole."""
        self.killed_leftovers: dict[int, str] = {}
        """Names, by pid, of the processes that were sent SIGKILL after the last worker had ended."""
        self.kill_interval = MIN_KILL_INTERVAL
        """Seconds until SIGKILL is sent again."""
        self.lease = NO_LEASE
        """When the workers are killed unless the agent renews the lease, on ``time.monotonic``."""
        self.is_any_left = False
        """Whether there is a child that is not a standby."""

    def run(self) -> None:
        """Serve until the agent is gone and no process is left."""
        sigchld, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.private_descriptors = (self.agent, sigchld, wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)
        poller = select.poll()
        for fd in (self.sock, self.agent, sigchld):
            poller.register(fd, select.POLLIN)
        buffer = bytearray()
        while True:
            ready = [fd for fd, _ in poller.poll(self.poll_timeout())]
            if sigchld in ready:
                os.read(sigchld, 4096)
            if self.sock in ready:
                data = self.receive()
                self.is_agent_alive = bool(data)
                buffer += data
                for method, *arguments in unpack(buffer):
                    getattr(self, method)(*arguments)
            if self.agent in ready or (self.sock in ready and not self.is_agent_alive):
                self.is_agent_alive = False
                poller.unregister(self.sock)
                poller.unregister(self.agent)
                self.start_killing()
                if self.pool:
                    self.pool.discard()
            self.is_any_left = self.advance()
            if self.is_any_left and time.monotonic() >= self.lease:
                self.expire_lease()
            if not self.is_any_left and not self.is_agent_alive:
                return
            if self.pool and not ready and time.monotonic() >= self.pool.due:
                self.add_standby(self.pool)

    def poll_timeout(self) -> float | None:
        """Return the milliseconds until something is due; None if nothing is."""
        if self.phase is KeeperPhase.KILLING:
            return self.kill_interval * 1000
        due = self.lease if self.is_any_left else NO_LEASE
        if self.pool:
            due = min(due, self.pool.due)
        return None if due == NO_LEASE else min(max(0.0, due - time.monotonic()), MAX_POLL) * 1000

    # ---- messages

    def receive(self) -> bytes:
        """Read what the agent has sent; empty when it has closed its end."""
        try:
            size = _socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
            data, ancillary, flags, _ = self.socket.recvmsg(1 << 16, size, MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return b""
        if flags & MSG_CTRUNC:  # some are missing: every worker after them would get another's descriptors
            self.send(("failed", "too many open files for the workers' output; raise the limit (`ulimit -n`)"))
            os._exit(1)
        self.received_descriptors += descriptors_in(ancillary)
        return data

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message to the agent. Its death is noticed elsewhere."""
        data = memoryview(pack(message))
        try:
            while self.is_agent_alive and data:
                data = data[os.write(self.sock, data) :]
        except OSError:
            return

    def spawn(self, orders: list[SpawnOrder]) -> None:
        """Start the workers of a round."""
        self.phase = KeeperPhase.RUNNING
        self.has_failed = False
        self.stopped_groups.clear()
        self.killed_leftovers.clear()
        if self.pool:
            started, failed = self.pool.start(orders, self.received_descriptors, self.lease)
        else:
            started, failed = self.execute(orders)
        self.workers |= {pid: RunningWorker(local_rank, pid) for local_rank, pid in started.items()}
        while self.received_descriptors:
            os.close(self.received_descriptors.pop())
        self.send(("started", started, failed))

    def execute(self, orders: list[SpawnOrder]) -> tuple[dict[int, int], dict[int, tuple[int, str]]]:
        """Start workers that execute commands. Returns pids and errors by local rank, as ``StandbyPool.start``."""
        started: dict[int, int] = {}
        failed: dict[int, tuple[int, str]] = {}
        errors: dict[int, int] = {}
        position = 0
        for order in orders:
            end = position + len(order[3])
            try:
                started[order[0]], errors[order[0]] = self.start_worker(order, self.received_descriptors[position:end])
            except OSError as error:
                failed[order[0]] = (error.errno or 0, error.strerror or str(error))
            position = end
        for local_rank, reading in errors.items():  # only now, so that the new processes go on at the same time
            with open(reading, "rb") as pipe:
                text = pipe.read()
            if text:
                os.waitpid(started.pop(local_rank), 0)
                failed[local_rank] = marshal.loads(text)
        return started, failed

    def stand_by(self, count: int) -> None:
        """Have standbys ready for the next round, if this keeper is warm."""
        if self.pool:
            self.pool.want(count, is_busy=bool(self.workers))

    def add_standby(self, pool: StandbyPool) -> None:
        """Fork one standby, if that is possible."""
        if self.workers and not pool.standbys:
            pool.learn(max(self.workers.values(), key=lambda worker: worker.local_rank).pid)
        try:
            pool.add()
        except OSError as error:
            self.send(("detail", f"cannot fork a standby for the next round: {error.strerror}"))

    def release(self) -> None:
        """Close the keeper's own descriptors, in a forked process."""
        self.socket.close()
        for fd in (*self.private_descriptors, *self.received_descriptors):
            os.close(fd)

    def send_signal(self, signum: int, local_ranks: list[int], is_stop: bool) -> None:
        """Send a signal to workers that have not ended.

        A stop signal goes to the worker's process group, and is recorded: it explains how the worker ends. Any other
        signal goes to the worker alone, or below a wrapper to the nearest process, if that is prepared for it.
        """
        if not is_stop:
            self.pass_on(signum, local_ranks)
            return
        for worker in self.running(local_ranks):
            worker.stop_signals += (signum,)
            self.stopped_groups.add(worker.pid)
            for number in (signum, signal.SIGCONT):  # a stopped worker would sleep through its grace period
                kill(-worker.pid, number)

    def pass_on(self, signum: int, local_ranks: list[int]) -> None:
        """Send workers a signal that is not to stop them, but none that would die of it."""
        dropped = []
        for worker in self.running(local_ranks):
            for pid in (worker.pid, *descendants(worker.pid)):
                if signum == signal.SIGKILL or is_prepared(pid, signum):  # SIGKILL: an expired timer's
                    kill(pid, signum)
                    break
            else:
                dropped.append(worker.local_rank)
        if dropped:
            self.send(("dropped", signum, dropped))

    def dump_stacks(self, local_ranks: list[int]) -> None:
        """Have workers write their stacks. Below a wrapper, the nearest process with a handler does it."""
        for worker in self.running(local_ranks):
            for pid in (worker.pid, *descendants(worker.pid)):
                if has_handler(pid, DUMP_SIGNAL):
                    kill(pid, DUMP_SIGNAL)
                    kill(pid, signal.SIGCONT)
                    break

    def sample_stacks(self, pids: list[int]) -> None:
        """Have processes write their stacks. One that is stopped stays so: that is what the agent wants to see."""
        below = set(descendants(self.pid))
        for pid in pids:
            if pid in below and has_handler(pid, DUMP_SIGNAL):
                kill(pid, DUMP_SIGNAL)

    def reap_leftovers(self, with_kill: bool) -> None:
        """Begin to end what is left. ``advance`` tells the agent when nothing is."""
        if self.phase is KeeperPhase.REAPED or (self.phase is KeeperPhase.KILLING and not with_kill):
            return  # this message and the reply to an earlier one have crossed
        if with_kill:
            self.start_killing()
            return
        self.phase = KeeperPhase.TERMINATING
        if self.reap():
            # Nothing is sent a second stop signal: many programs read that as "now".
            for pid in self.leftovers():
                try:
                    is_stopped = os.getpgid(pid) in self.stopped_groups
                except ProcessLookupError:
                    continue
                if not is_stopped:
                    kill(pid, signal.SIGTERM)
                    kill(pid, signal.SIGCONT)

    def renew_lease(self, until: float) -> None:
        """Let the workers live until a time on ``time.monotonic``."""
        self.lease = until

    def running(self, local_ranks: list[int]) -> list[RunningWorker]:
        """Return those of the workers that have not been reaped, so that their pids are still theirs."""
        return [worker for worker in self.workers.values() if worker.local_rank in local_ranks]

    # ---- the end of workers

    def expire_lease(self) -> None:
        """Kill the workers: the agent is stopped or starved, and another node may take this one's place."""
        self.lease = NO_LEASE
        if self.phase in (KeeperPhase.RUNNING, KeeperPhase.TERMINATING):
            self.send(("lease_expired",))
            self.start_killing()

    def start_killing(self) -> None:
        """Have ``advance`` send SIGKILL to every process below, until none is left."""
        self.phase = KeeperPhase.KILLING
        self.kill_interval = MIN_KILL_INTERVAL
        for worker in self.workers.values():
            worker.stop_signals += (int(signal.SIGKILL),)

    def advance(self) -> bool:
        """Reap what has ended, and do what the phase asks for. Returns whether any process is left."""
        is_any_left = self.reap()
        if is_any_left and self.phase is KeeperPhase.KILLING:
            for pid in self.leftovers():
                if not self.workers:
                    self.killed_leftovers[pid] = name_of(pid)
                kill(pid, signal.SIGKILL)
            self.kill_interval = min(2 * self.kill_interval, MAX_KILL_INTERVAL)
        if not is_any_left and self.phase in (KeeperPhase.TERMINATING, KeeperPhase.KILLING):
            self.phase = KeeperPhase.REAPED
            self.send(("reaped", self.killed_leftovers))
            if self.pool and self.has_failed:
                self.pool.hurry()
        return is_any_left

    def reap(self) -> bool:
        """Collect ended children, workers and adopted ones, and report workers.

        Returns:
            Whether any child is left that is not a standby.
        """
        exits: list[tuple[int, int, float, tuple[int, ...]]] = []
        while (child := reap_child())[0]:
            pid, status = child
            if worker := self.workers.pop(pid, None):
                exits.append((worker.local_rank, os.waitstatus_to_exitcode(status), time.time(), worker.stop_signals))
                self.has_failed = self.has_failed or status != 0
            elif self.pool:
                self.pool.forget(pid)
        if exits:
            self.send(("exited", exits))
        if self.workers or not self.pool or not self.pool.standbys:
            return has_children()
        others = {*children_of(self.pid)} - self.pool.standbys.keys()
        # If a child ends while the kernel lists them, the list may lack others. The keeper then looks again.
        return bool(others) or has_ended_child()

    def leftovers(self) -> list[int]:
        """Return the pids of all processes below, nearest first, without standbys."""
        standbys = self.pool.standbys if self.pool else ()
        return [pid for pid in descendants(self.pid) if pid not in standbys]

    # ---- the start of a worker that executes a command

    def start_worker(self, order: SpawnOrder, descriptors: Sequence[int]) -> tuple[int, int]:
        """Fork one worker.

        Returns:
            Its pid, and a pipe which it closes when it executes its command, or to which it writes why it cannot.

        Raises:
            OSError: the worker could not be forked.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC)  # the child reports an error here; otherwise exec closes it
        try:
            pid = os.fork()
        except OSError:
            os.close(writing)
            os.close(reading)
            raise
        if pid == 0:
            self.become_worker(order, descriptors, reading, writing)
        os.close(writing)
        return pid, reading

    def become_worker(self, order: SpawnOrder, descriptors: Sequence[int], reading: int, writing: int) -> NoReturn:
        """Turn the new process into the worker: give it a session, and execute its command.

        Args:
            order: the worker.
            descriptors: those that were sent for it.
            reading: the reading end of the pipe for errors.
            writing: the writing end of that pipe.
        """
        _, argv, changes, targets, cpus = order
        environment = {**self.environment, **changes}
        errors = writing
        try:
            os.setsid()
            # In case the keeper and the agent die at the same instant. The setting survives exec, but has no effect if
            # the keeper has died before.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.pid:
                os._exit(127)
            lowest = max((2, *map(abs, targets))) + 1
            errors = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, lowest)  # its number may be a target
            # The new program has no descriptors of its own, so numbers that need not be kept can be.
            renumber(descriptors, list(map(abs, targets)), lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, self.worker_limits)
            if cpus:
                os.sched_setaffinity(0, cpus)
            for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored_by_python, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvpe(argv[0], argv, environment)
        except BaseException as error:
            os.write(errors, marshal.dumps((getattr(error, "errno", 0), getattr(error, "strerror", str(error)))))
        os._exit(127)


# ---- descriptors and the environment


def renumber(descriptors: Sequence[int], targets: Sequence[int], lowest: int) -> list[int]:
    """Give descriptors the numbers that the worker expects. Returns these numbers.

    Args:
        descriptors: the descriptors.
        targets: their numbers in the worker, where -N means the lowest from N on that is free.
        lowest: a number above all of these.
    """
    # Move all of them out of the way first: the number of one may be the target of another.
    numbers = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in descriptors]
    for index, target in sorted(enumerate(targets), key=lambda item: item[1] < 0):  # fixed numbers first
        number = numbers[index]
        if target >= 0:
            numbers[index] = os.dup2(number, target)
        else:
            numbers[index] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, max(3, -target))
        os.close(number)
    return numbers


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that have arrived with a message."""
    found: list[int] = []
    for _, _, numbers in ancillary:
        found += memoryview(numbers[: len(numbers) // 4 * 4]).cast("i").tolist()
    return found


def close_others(kept: Sequence[int]) -> None:
    """Close what the caller left open, except standard streams and ``kept``: neither keeper nor workers use it."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            try:  # noqa: SIM105 - contextlib is an import that the keeper does without
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself


def inherited_environment() -> dict[bytes, bytes]:
    """Return the environment that the agent gave this process.

    Not as /proc shows it, because glibc cuts the text of GLIBC_TUNABLES into pieces. But Python may have set LC_CTYPE.
    """
    environment = dict(os.environb)
    with open("/proc/self/environ", "rb") as file:
        if b"\0LC_CTYPE=" not in b"\0" + file.read():
            environment.pop(b"LC_CTYPE", None)
    return environment


# ---- other processes


def set_subreaper(on: bool) -> bool:
    """Set whether this process adopts the orphans among its descendants. Returns whether the system supports it."""
    return bool(libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0)


def get_subreaper() -> bool:
    """Return whether this process is a subreaper."""
    flag = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag), 0, 0, 0)
    return bool(flag.value)


def has_children() -> bool:
    """Return whether this process has a child, running or not yet reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def has_ended_child() -> bool:
    """Return whether this process has a child that has ended and has not been reaped."""
    return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap_child() -> tuple[int, int]:
    """Reap a child that has ended. Returns its pid, or 0 if there is none, and its wait status."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def read_stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat after the name: state, parent's pid, process group, session and so on.

    Raises:
        OSError: the process has been reaped.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def children_by_parent() -> dict[int, list[int]]:
    """Return the pids of all processes in /proc, by the pid of their parent."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = int(read_stat(name)[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(name))
    return children


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's children. It must have one thread."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [*map(int, file.read().split())]
    except OSError:  # not every kernel has this file
        return children_by_parent().get(pid, [])


def descendants(root: int) -> list[int]:
    """Return the pids of all processes below one, nearest first."""
    children = children_by_parent()
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found[1:]


def kill(pid: int, signum: int) -> None:
    """Send a signal to a process that may have ended."""
    try:  # noqa: SIM105 - contextlib is an import that the keeper does without
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, or it runs as another user (sudo in a worker)


def name_of(pid: int) -> str:
    """Return the name of a process, as ``ps`` shows it; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def has_handler(pid: int, signum: int) -> bool:
    """Return whether a process has a handler for a signal; False if it has ended."""
    return in_mask(pid, signum, b"SigCgt")


def is_prepared(pid: int, signum: int) -> bool:
    """Return whether a process has a handler for a signal, ignores it, or waits for it: if not, it would die of it."""
    return any(in_mask(pid, signum, name) for name in (b"SigCgt", b"SigIgn", b"SigBlk")) or is_in_sigwait(pid)


def is_in_sigwait(pid: int) -> bool:
    """Return whether a thread of a process waits for signals. Those are not in its mask while it does."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/wchan", "rb") as file:
                if b"sigtimedwait" in file.read():
                    return True
    except OSError:
        pass  # it has ended
    return False


def in_mask(pid: int, signum: int, name: bytes) -> bool:
    """Return whether a signal is in one of a process's masks, by its name in /proc; False if the process has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            mask = file.read().partition(b"\n%s:" % name)[2].split(None, 1)[0]
    except (OSError, IndexError):
        return False
    return bool(int(mask, 16) >> (signum - 1) & 1)


# ---- messages


def pack(message: tuple[Any, ...]) -> bytes:
    """Encode a message for the socket."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "little") + data


def unpack(buffer: bytearray) -> Iterator[tuple[Any, ...]]:
    """Take the complete messages out of a buffer. What stays is the start of the next one."""
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4], "little")):
        message = marshal.loads(bytes(buffer[4:end]))
        del buffer[:end]
        yield message
