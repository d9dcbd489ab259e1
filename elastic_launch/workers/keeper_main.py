"""Layer 2: the keeper, a small process between the agent and its workers. It is their parent and their undertaker.

The agent and the keeper are both subreapers, and each ends all that is below it when the other goes. So nothing that a
worker started, daemons included, outlives the job, even when the agent or the keeper is killed with SIGKILL.

It runs as a program of its own, ``main(SOCKET, AGENT)`` under ``python -I -S``: executed, not forked, because the agent
may live in a program full of threads. SOCKET is a stream to the agent; AGENT is a pidfd of the agent, since a program
that forks may keep copies of the socket's other end. It has all signals blocked but SIGCHLD, and a session of its own:
neither a terminal nor a batch system that signals every process of a job can hit it by accident.

It imports nothing of elastic_launch and as little as possible of the standard library: it stands in the way of the
first worker. It decides nothing, and gives no process up; the agent does, and then leaves the keeper to its task.

Messages are marshalled tuples after a length of four bytes; both ends are the same interpreter.

To the keeper:
    ("spawn", [(local rank, argv, environment changes, [descriptor's number in the worker, ...], [cpu, ...]), ...])
        -- begins a round; the descriptors come with it, in that order; number -1: any
    ("tell", signum, [local rank, ...], stop?)
    ("dump", [local rank, ...])  -- have them write the stacks of their threads to stderr
    ("sweep", kill?)
    ("lease", until)  -- SIGKILL all of them at that time of the monotonic clock, unless another lease comes before
To the agent:
    ("started", {local rank: pid}, {local rank: (errno, message)})
    ("exited", [(local rank, exit code, time, (stop signals sent before, ...)), ...])
    ("gone", {pid: name})  -- answers the sweeps of a round, when nothing is left; what had to be killed besides workers
    ("lapsed",)  -- the lease has run out
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

TYPE_CHECKING = False  # typing is an import that the keeper does without
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, NoReturn

    Order = tuple[int, list[bytes], dict[bytes, bytes], list[int], list[int]]
    """One worker to be started, as in the ``spawn`` message."""

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37

PROGRAM = "import sys; sys.path.append(sys.argv[1]); import keeper_main; keeper_main.main(*map(int, sys.argv[2:]))"
"""Imported, not executed as a script, for the compiled file that the agent's own import has left: 5 ms."""
COMMAND = (sys.executable, "-I", "-S", "-c", PROGRAM, os.path.dirname(__file__))
"""What starts a keeper; the numbers of its descriptors follow."""

MSG_CTRUNC, MSG_CMSG_CLOEXEC = 0x8, 0x40000000
DUMP_SIGNAL = 63
"""Python workers answer it with the stacks of their threads (``bootstrap``, ``function_main``)."""
MOST_DESCRIPTORS = 250
"""That go with one message; the kernel takes 253."""

FIRST_LOOK, SLOWEST_LOOK = 0.01, 1.0
"""Seconds between looks for processes that are still there after SIGKILL, or were forked meanwhile."""

libc = ctypes.CDLL(None)


class Forked(BaseException):
    """Raised in the process of a worker that is not to execute a command, through all of the keeper's frames."""

    def __init__(self, order: Order, environment: dict[bytes, bytes], descriptors: list[int]) -> None:
        self.order = order
        self.environment = environment
        """All of it."""
        self.descriptors = descriptors
        """Those that came for it, in their order."""


def set_subreaper(on: bool) -> bool:
    """Make this process the parent of what its descendants orphan, or undo that. Returns whether the system lets it."""
    return bool(libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0)


def get_subreaper() -> bool:
    """Whether this process is a subreaper."""
    flag = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag), 0, 0, 0)
    return bool(flag.value)


def children_by_parent() -> dict[int, list[int]]:
    """The pids of all processes that /proc shows, by their parent's."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    stat = file.read()
            except OSError:
                continue  # it has ended meanwhile
            parent = int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])
            children.setdefault(parent, []).append(int(name))
    return children


def descendants(root: int) -> list[int]:
    """All processes below one, nearest first."""
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
        pass  # ended, or it runs as another user (sudo in a worker)


def session_of(pid: int) -> int:
    """The session of a process, living or dead; -1 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split(None, 4)[3])
    except OSError:
        return -1


def name_of(pid: int) -> str:
    """The name of a process, as ``ps`` shows it; empty when it has ended."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            mask = file.read().partition(b"\nSigCgt:")[2].split(None, 1)[0]
    except (OSError, IndexError):
        return False  # it has ended
    return bool(int(mask, 16) >> (signum - 1) & 1)


def pack(message: tuple[Any, ...]) -> bytes:
    """A message as it goes over the socket."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "little") + data


def unpack(buffer: bytearray) -> Iterator[tuple[Any, ...]]:
    """Take the whole messages out of a buffer; what is left is the start of one."""
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4], "little")):
        message = marshal.loads(bytes(buffer[4:end]))
        del buffer[:end]
        yield message


class Phase(Enum):
    """Where a round stands, as the keeper sees it."""

    SERVING = 0
    SWEEPING = 1
    """What is left has had SIGTERM."""
    KILLING = 2
    """SIGKILL goes to whatever is left, again and again."""
    SWEPT = 3
    """Nothing is left, and the agent has been told."""


class Worker:
    """A worker that has not ended."""

    def __init__(self, local_rank: int, pid: int) -> None:
        self.local_rank = local_rank
        self.pid = pid
        self.told: tuple[int, ...] = ()
        """The stop signals that it was sent."""


class Service:
    """What the keeper does on each order and each death."""

    def __init__(self, sock: int, agent: int, environment: dict[bytes, bytes], forks: bool = False) -> None:
        self.sock = sock
        self.socket = _socket.socket(fileno=sock)
        self.agent = agent
        self.agent_lives = True
        self.environment = environment
        self.forks = forks
        """Workers do not execute their command: they go on in a fork of this process."""
        self.own: tuple[int, ...] = ()
        """Descriptors that are nothing for a worker that is forked and not executed."""
        self.held: list[int] = []
        """Descriptors that came for the workers to be started."""
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        """The workers'. This process has many of theirs for a moment."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limits[1], self.limits[1]))
        self.phase = Phase.SERVING
        self.workers: dict[int, Worker] = {}
        """By local rank, until they have ended."""
        self.told_groups: set[int] = set()
        """Process groups that were sent a stop signal as a whole."""
        self.leftovers: dict[int, str] = {}
        """What had to be killed when the workers had ended: name by pid."""
        self.next_look = FIRST_LOOK
        self.is_kept = False
        """There is a process to be kept."""
        self.lease = float("inf")
        """Until when the agent is sure that no other node has taken this one's place."""

    def run(self) -> None:
        """Serve until the agent is gone and nothing is left."""
        deaths, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.own = (self.sock, self.agent, deaths, wakeup)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)
        poller = select.poll()
        for fd in (self.sock, self.agent, deaths):
            poller.register(fd, select.POLLIN)
        orders: dict[str, Callable[..., None]] = {
            "spawn": self.spawn,
            "tell": self.tell,
            "dump": self.dump,
            "sweep": self.sweep,
            "lease": self.renew,
        }
        buffer = bytearray()
        while True:
            ready = [fd for fd, _ in poller.poll(self.patience())]
            if deaths in ready:
                os.read(deaths, 4096)
            if self.sock in ready:
                data = self.receive()
                self.agent_lives = bool(data)
                buffer += data
                for name, *arguments in unpack(buffer):
                    orders[name](*arguments)
            if self.agent in ready or (self.sock in ready and not self.agent_lives):
                self.agent_lives = False
                poller.unregister(self.sock)
                poller.unregister(self.agent)
                self.kill_all()
            self.is_kept = self.look()
            if self.is_kept and time.monotonic() >= self.lease:
                self.lapse()
            if not self.is_kept and not self.agent_lives:
                return

    def patience(self) -> float | None:
        """Milliseconds until something is due."""
        if self.phase is Phase.KILLING:
            return self.next_look * 1000
        if not self.is_kept or self.lease == float("inf"):
            return None
        return max(0.0, self.lease - time.monotonic()) * 1000

    def receive(self) -> bytes:
        """Read what the agent sent; nothing when it has closed its end."""
        try:
            room = _socket.CMSG_SPACE(4 * MOST_DESCRIPTORS)
            data, ancillary, flags, _ = self.socket.recvmsg(1 << 16, room, MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return b""
        if flags & MSG_CTRUNC:  # each would get another's
            self.send(("broken", "too many open files for the workers' output: raise the limit (`ulimit -n`)"))
            os._exit(1)
        for _, _, numbers in ancillary:
            self.held += memoryview(numbers[: len(numbers) // 4 * 4]).cast("i").tolist()
        return data

    def send(self, message: tuple[Any, ...]) -> None:
        """Send to the agent; that it is gone shows elsewhere."""
        data = memoryview(pack(message))
        try:
            while self.agent_lives and data:
                data = data[os.write(self.sock, data) :]
        except OSError:
            return

    def spawn(self, orders: list[Order]) -> None:
        """Start the workers of a round."""
        self.phase = Phase.SERVING
        self.told_groups.clear()
        self.leftovers.clear()
        started: dict[int, int] = {}
        failed: dict[int, tuple[int, str]] = {}
        for order in orders:
            local_rank, targets = order[0], order[3]
            descriptors, self.held = self.held[: len(targets)], self.held[len(targets) :]
            try:
                started[local_rank] = pid = self.start(order, descriptors)
            except OSError as error:
                failed[local_rank] = (error.errno or 0, error.strerror or str(error))
            else:
                self.workers[local_rank] = Worker(local_rank, pid)
            for fd in descriptors:
                os.close(fd)
        self.send(("started", started, failed))

    def start(self, order: Order, descriptors: Sequence[int]) -> int:
        """Start one worker as the leader of a session of its own, and return its pid.

        Raises:
            OSError: it could not be forked or executed.
        """
        _, argv, changes, targets, cpus = order
        environment = {**self.environment, **changes}
        keeper = os.getpid()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError:
            os.close(writing)
            os.close(reading)
            raise
        if pid == 0:
            try:
                os.setsid()
                # For the case that the keeper and the agent die in the same instant. It outlives the exec, and the
                # keeper may have died before it was set.
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != keeper:
                    os._exit(127)
                numbers, writing = place(descriptors, targets, writing)
                resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)
                if cpus:
                    os.sched_setaffinity(0, cpus)
                if not self.forks:
                    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
                        signal.signal(ignored_by_python, signal.SIG_DFL)
                    signal.pthread_sigmask(signal.SIG_SETMASK, ())
                    os.execvpe(argv[0], argv, environment)
                self.socket.detach()  # its end must not close what has its number by then
                for fd in {reading, *self.own, *descriptors, *self.held} - set(numbers):
                    os.close(fd)
            except BaseException as error:
                os.write(writing, marshal.dumps((getattr(error, "errno", 0), getattr(error, "strerror", str(error)))))
                os._exit(127)
            os.close(writing)
            raise Forked(order, environment, numbers)
        os.close(writing)
        with open(reading, "rb") as pipe:
            data = pipe.read()
        if data:
            os.waitpid(pid, 0)
            raise OSError(*marshal.loads(data))
        return pid

    def tell(self, signum: int, local_ranks: list[int], stop: bool) -> None:
        """Send a signal to workers that have not ended, whose pids are still theirs.

        One that is to stop them goes to their whole process groups, and is remembered: how they end is then an answer.
        """
        for worker in [self.workers[rank] for rank in local_ranks if rank in self.workers]:
            if not stop:
                kill(worker.pid, signum)
                continue
            worker.told += (signum,)
            self.told_groups.add(worker.pid)
            for number in (signum, signal.SIGCONT):  # a stopped worker would sleep through its grace
                kill(-worker.pid, number)

    def dump(self, local_ranks: list[int]) -> None:
        """Have workers write their stacks: each itself or, below a wrapper, the nearest process that knows how to."""
        for worker in [self.workers[rank] for rank in local_ranks if rank in self.workers]:
            for pid in (worker.pid, *descendants(worker.pid)):
                if catches(pid, DUMP_SIGNAL):
                    kill(pid, DUMP_SIGNAL)
                    kill(pid, signal.SIGCONT)
                    break

    def sweep(self, with_kill: bool) -> None:
        """Begin to end what is left; ``look`` tells the agent when nothing is."""
        if self.phase is Phase.SWEPT or (self.phase is Phase.KILLING and not with_kill):
            return  # the order and the answer to an earlier one have crossed
        if with_kill:
            self.kill_all()
            return
        self.phase = Phase.SWEEPING
        if self.reap():
            # What had its stop signal with its group is not sent another: a second one often means "now".
            for pid in descendants(os.getpid()):
                try:
                    told = os.getpgid(pid) in self.told_groups
                except ProcessLookupError:
                    continue
                if not told:
                    kill(pid, signal.SIGTERM)
                    kill(pid, signal.SIGCONT)

    def renew(self, until: float) -> None:
        """The agent lives, and has heard from the others."""
        self.lease = until

    def lapse(self) -> None:
        """The agent does not renew the lease: it is stopped. Others may train in this node's place from now on."""
        self.lease = float("inf")
        if self.phase in (Phase.SERVING, Phase.SWEEPING):
            self.send(("lapsed",))
            self.kill_all()

    def kill_all(self) -> None:
        """SIGKILL whatever is below, from the next ``look`` on until nothing is."""
        self.phase = Phase.KILLING
        self.next_look = FIRST_LOOK
        for worker in self.workers.values():
            worker.told += (int(signal.SIGKILL),)

    def look(self) -> bool:
        """Look who is left, and do what the phase asks for. Returns whether any process is left."""
        left = self.reap()
        if left and self.phase is Phase.KILLING:
            for pid in descendants(os.getpid()):
                if not self.workers:
                    self.leftovers[pid] = name_of(pid)
                kill(pid, signal.SIGKILL)
            self.next_look = min(2 * self.next_look, SLOWEST_LOOK)
        if not left and self.phase in (Phase.SWEEPING, Phase.KILLING):
            self.phase = Phase.SWEPT
            self.send(("gone", self.leftovers))
        return left

    def reap(self) -> bool:
        """Collect the dead, workers or adopted; tell of the workers. Returns whether any process is left."""
        ended: list[tuple[int, int, float, tuple[int, ...]]] = []
        by_pid = {worker.pid: worker for worker in self.workers.values()}
        left = True
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                left = False
                break
            if pid == 0:
                break
            if worker := by_pid.get(pid):
                del self.workers[worker.local_rank]
                ended.append((worker.local_rank, os.waitstatus_to_exitcode(status), time.time(), worker.told))
        if ended:
            self.send(("exited", ended))
        return left


def inherited_environment() -> dict[bytes, bytes]:
    """The variables as the agent gave them: Python may have set LC_CTYPE in ``os.environ`` since."""
    with open("/proc/self/environ", "rb") as file:
        return dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if b"=" in entry)


def place(descriptors: Sequence[int], targets: Sequence[int], pipe: int) -> tuple[list[int], int]:
    """Give descriptors the numbers that the worker knows them by. Returns those, and where ``pipe`` is now."""
    lowest = max((2, *targets)) + 1
    old, pipe = pipe, fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, lowest)
    os.close(old)
    # All of them out of the way first: one's number may be another's target.
    numbers = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in descriptors]
    for index, target in enumerate(targets):
        if target >= 0:
            os.dup2(numbers[index], target)
            os.close(numbers[index])
            numbers[index] = target
    return numbers, pipe


def close_others(kept: Sequence[int]) -> None:
    """Close what the caller left open: it is neither for the keeper nor for the workers."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            try:  # noqa: SIM105 - contextlib is an import that the keeper does without
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself


def serve(sock: int, agent: int, environment: dict[bytes, bytes], forks: bool = False) -> NoReturn:
    """Be the keeper, to the end of this process.

    Raises:
        Forked: only where it ``forks``: this process is a worker, and free of the keeper.
    """
    for fd in (sock, agent):
        os.set_inheritable(fd, False)
    libc.prctl(PR_SET_NAME, b"elastic-keeper", 0, 0, 0)
    set_subreaper(True)
    Service(sock, agent, environment, forks).run()
    os._exit(0)


def main(sock: int, agent: int) -> NoReturn:
    """Run the keeper as a program; ``sock`` and ``agent`` are inherited descriptors."""
    close_others((sock, agent))
    serve(sock, agent, inherited_environment())
