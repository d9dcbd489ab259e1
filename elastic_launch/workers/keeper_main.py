"""Floor 2: the keeper, a small process between the agent and its workers. It is their parent and their undertaker.

The agent and the keeper are both subreapers, and each ends all that is below it when the other goes. So nothing that a
worker started, daemons included, outlives the job, even when the agent or the keeper is killed with SIGKILL.

It runs as a program of its own, ``main(SOCKET, AGENT)`` under ``python -I -S``: executed, not forked, because the agent
may live in a program full of threads. SOCKET is a stream to the agent; AGENT is a pidfd of the agent, since a program
that forks may keep copies of the socket's other end. It has all signals blocked but SIGCHLD, and a session of its own:
neither a terminal nor a batch system that signals every process of a job can hit it by accident.

It imports nothing of elastic_launch and as little as possible of the standard library: it stands in the way of the
first worker. It decides nothing but when to give up on processes: that is never.

Messages are marshalled tuples after a length of four bytes; both ends are the same interpreter.

To the keeper:
    ("spawn", [(local rank, argv, environment changes), ...])  -- begins a round
    ("tell", signum, [local rank, ...], the whole process groups?)
    ("sweep", kill?)
To the agent:
    ("started", {local rank: pid}, {local rank: (errno, message)})
    ("exited", [(local rank, exit code, time, (signals sent before, ...)), ...])
    ("gone",)  -- the answer to the first sweep that leaves no process; it ends the round
"""

from __future__ import annotations

import ctypes
import marshal
import os
import select
import signal
import time

TYPE_CHECKING = False  # typing is an import that the keeper does without
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37

FIRST_LOOK, SLOWEST_LOOK = 0.01, 1.0
"""Seconds between looks for processes that are still there after SIGKILL, or were forked meanwhile."""

libc = ctypes.CDLL(None)


def set_subreaper(on: bool) -> None:
    """Make this process the parent of what its descendants orphan, or undo that (``prctl(2)``)."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


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


class _Worker:
    def __init__(self, local_rank: int, pid: int) -> None:
        self.local_rank = local_rank
        self.pid = pid
        self.told: tuple[int, ...] = ()


class Keeper:
    """The state of the process, and what it does on each message and death."""

    def __init__(self, sock: int) -> None:
        self.sock = sock
        self.workers: dict[int, _Worker] = {}
        """By local rank, until they have ended."""
        self.told_groups: set[int] = set()
        """Process groups that were sent a stop signal as a whole."""
        self.sweeping = False
        self.swept = False
        self.killing = False
        self.agent_lives = True
        self.next_look: float | None = None

    def send(self, message: tuple[Any, ...]) -> None:
        """Send to the agent, if it lives."""
        data = memoryview(pack(message))
        try:
            while self.agent_lives and data:
                data = data[os.write(self.sock, data) :]
        except OSError:
            self.agent_lives = False

    def spawn(self, commands: list[tuple[int, list[str], dict[str, str]]]) -> None:
        """Start the workers of a round."""
        self.told_groups.clear()
        self.swept = False
        started: dict[int, int] = {}
        failed: dict[int, tuple[int, str]] = {}
        for local_rank, argv, environment in commands:
            try:
                pid = start(argv, {**os.environ, **environment})
            except OSError as error:
                failed[local_rank] = (error.errno or 0, error.strerror or str(error))
            else:
                started[local_rank] = pid
                self.workers[local_rank] = _Worker(local_rank, pid)
        self.send(("started", started, failed))

    def tell(self, signum: int, local_ranks: list[int], group: bool) -> None:
        """Send a signal to workers; only to those that have not ended, whose pids are still theirs."""
        for worker in [self.workers[rank] for rank in local_ranks if rank in self.workers]:
            worker.told += (signum,)
            if group:
                self.told_groups.add(worker.pid)
                # SIGCONT, or a stopped worker would sleep through its grace.
                for number in (signum, signal.SIGCONT):
                    kill(-worker.pid, number)
            else:
                kill(worker.pid, signum)

    def sweep(self, with_kill: bool) -> None:
        """Begin to end what is left; ``after_deaths`` tells the agent when nothing is."""
        if self.swept:
            return  # the order and the answer to an earlier one have crossed
        self.sweeping = True
        if with_kill:
            self.start_killing()
        elif self.reap():
            # What had its stop signal with its group is not sent another: a second one often means "now".
            for pid in descendants(os.getpid()):
                try:
                    told = os.getpgid(pid) in self.told_groups
                except ProcessLookupError:
                    continue
                if not told:
                    kill(pid, signal.SIGTERM)
                    kill(pid, signal.SIGCONT)

    def start_killing(self) -> None:
        """SIGKILL whatever is below, again and again, until nothing is."""
        self.killing = True
        for worker in self.workers.values():
            worker.told += (int(signal.SIGKILL),)
        self.next_look = FIRST_LOOK

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

    def after_deaths(self) -> bool:
        """Look who is left, and go on killing if that is due. Returns whether the keeper's work is done."""
        left = self.reap()
        if left and self.killing and self.next_look is not None:
            for pid in descendants(os.getpid()):
                kill(pid, signal.SIGKILL)
            self.next_look = min(2 * self.next_look, SLOWEST_LOOK)
        if not left:
            if self.sweeping:
                self.swept = True
                self.send(("gone",))
            self.sweeping = self.killing = False
            self.next_look = None
        return not left and not self.agent_lives

    def run(self, agent: int) -> None:
        """Serve until the agent is gone and nothing is left."""
        deaths, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)
        poller = select.poll()
        for fd in (self.sock, agent, deaths):
            poller.register(fd, select.POLLIN)
        buffer = bytearray()
        while True:
            ready = [fd for fd, _ in poller.poll(None if self.next_look is None else self.next_look * 1000)]
            if deaths in ready:
                os.read(deaths, 4096)
            if self.sock in ready:
                data = self.receive()
                self.agent_lives = self.agent_lives and bool(data)
                buffer += data
                for name, *arguments in unpack(buffer):
                    getattr(self, name)(*arguments)
            if agent in ready:
                self.agent_lives = False
            if not self.agent_lives and self.next_look is None:
                for fd in (self.sock, agent):
                    poller.unregister(fd)
                self.start_killing()
            if self.after_deaths():
                return

    def receive(self) -> bytes:
        """Read what the agent sent; nothing when it has closed its end."""
        try:
            return os.read(self.sock, 1 << 16)
        except ConnectionError:
            return b""


def start(argv: list[str], environment: dict[str, str]) -> int:
    """Start one worker as the leader of a session of its own, and return its pid.

    Raises:
        OSError: it could not be forked or executed.
    """
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
            if os.getppid() == keeper:
                for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(ignored_by_python, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.execvpe(argv[0], argv, environment)
        except OSError as error:
            os.write(writing, marshal.dumps((error.errno, error.strerror)))
        except BaseException as error:
            os.write(writing, marshal.dumps((0, str(error))))
        finally:
            os._exit(127)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    if data:
        os.waitpid(pid, 0)
        raise OSError(*marshal.loads(data))
    return pid


def main(sock: int, agent: int) -> NoReturn:
    """Run the keeper; ``sock`` and ``agent`` are inherited descriptors."""
    for fd in (sock, agent):
        os.set_inheritable(fd, False)
    low, high = sorted((sock, agent))
    for start_, end in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(start_, end)  # what the caller left open is neither for us nor for the workers
    libc.prctl(PR_SET_NAME, b"elastic-keeper", 0, 0, 0)
    set_subreaper(True)
    Keeper(sock).run(agent)
    os._exit(0)
