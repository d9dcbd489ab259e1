"""The agent's side of the keeper: start it, send it messages, and turn its replies into lifecycle events.

``KeeperProcess`` is one keeper. ``KeeperClient`` controls the workers of one node through a keeper. It replaces a
keeper that was killed, and kills the processes that this one left behind. It decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.core.agent.messages import AgentEvent, Exited, GroupReaped, LeaseExpired, Started
from elastic_launch.core.agent.root_cause import ErrorRecord, Evidence, Exit
from elastic_launch.core.text import ranks_text
from elastic_launch.errors import ExitCode, LaunchError, UnavailableError, signal_name
from elastic_launch.host.child import spawn
from elastic_launch.parsing import AUTO
from elastic_launch.workers import keeper_main
from elastic_launch.workers.orphans import KILL_PATIENCE, has_ended, kill_orphans, live_keepers, reap

MAX_LOST_STARTS = 3
"""Keepers in a row that may be lost before they have started a worker. When one more is lost, the client gives up."""

StartKeeper = Callable[[Mapping[str, str], tuple[int, ...]], int]
"""Starts a keeper with an environment and two inherited descriptors (socket, agent's pidfd). Returns its pid."""

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""Has a warm keeper ask for huge pages for what ``malloc`` returns. They make a fork, and its end, twice as fast.

Its workers do not have this in their environment.
"""
_TITLE_ROOM = 4096
"""Characters added to a warm keeper's command line, as room for the command lines that its workers show."""


def execute_keeper(environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
    """Start the ordinary keeper, whose workers execute commands."""
    argv = [*keeper_main.COMMAND, *map(str, inherited)]
    return spawn(argv, environ, {fd: fd for fd in inherited}, unblocked=[signal.SIGCHLD])


def is_auto(preload: Sequence[str]) -> bool:
    """Return whether the launcher chooses what is preloaded, by what the program imports."""
    return list(preload) == [AUTO]


def preload_keeper(
    python: Sequence[str], modules: Sequence[str], kind: str, target: str, descriptors: Sequence[int] = ()
) -> StartKeeper:
    """Return what starts a warm keeper, which imports modules and then forks its workers.

    Args:
        python: the interpreter and its flags, ``-u`` among them.
        modules: the modules to import, each with names from it that may be modules, as in ``torch.utils:data``. After
            an AUTO in front, one that cannot be imported ends nothing.
        kind: what the workers run: ``script``, ``module``, ``function`` or ``main``. ``main`` is a function, too, but
            its main module is imported beforehand.
        target: the script or module. For a function, the number of the descriptor with multiprocessing's preparation
            data.
        descriptors: further descriptors that the keeper inherits.
    """

    def start(environ: Mapping[str, str], inherited: tuple[int, ...]) -> int:
        program = os.path.join(os.path.dirname(__file__), "preload_main.py")
        argv = [*python, program, ",".join(modules), kind, target, " " * _TITLE_ROOM, *map(str, inherited)]
        tunables = f"{HUGE_PAGES}:{environ[TUNABLES]}" if TUNABLES in environ else HUGE_PAGES  # the user's wins
        environ = {**environ, TUNABLES: tunables}
        return spawn(argv, environ, {fd: fd for fd in (*inherited, *descriptors)}, unblocked=[signal.SIGCHLD])

    return start


class KeeperLostError(Exception):
    """The keeper ended unexpectedly."""


class KeeperProcess:
    """One keeper. Its ``fileno()`` is readable when ``receive()`` has something to return."""

    def __init__(self, environ: Mapping[str, str], start: StartKeeper = execute_keeper) -> None:
        """Start the process. Its workers inherit ``environ`` and the descriptors that it inherits.

        Raises:
            UnavailableError: the system cannot start it.
        """
        self._buffer = bytearray()
        self._ends_by_itself = True
        self._exit_code: int | None = None
        self._sock, theirs = socket.socketpair()
        try:
            with theirs, open(os.pidfd_open(os.getpid()), "rb") as agent:
                self.pid = start(environ, (theirs.fileno(), agent.fileno()))
            live_keepers.add(self.pid)
            self._process = open(os.pidfd_open(self.pid), "rb")  # noqa: SIM115 - close() closes it
        except OSError as error:
            self._sock.close()
            raise UnavailableError(
                f"cannot start the keeper process: {error}; it needs Linux 5.3 or newer, and the limits of processes "
                "and open files must allow it (`ulimit -u`, `ulimit -n`)"
            ) from error

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._sock.fileno()

    def send(self, *message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a message, with descriptors. If the keeper is gone, the next ``receive`` raises."""
        data = keeper_main.pack(message)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(descriptors), keeper_main.MAX_DESCRIPTORS):
                # Each batch needs one byte to travel with. The message is longer than there are batches.
                socket.send_fds(self._sock, [data[:1]], descriptors[start : start + keeper_main.MAX_DESCRIPTORS])
                data = data[1:]
            self._sock.sendall(data)

    def renew_lease(self, until: float) -> None:
        """Send a lease. It is lost if the keeper is gone or closed, or has read nothing for minutes (an import)."""
        with contextlib.suppress(OSError):
            self._sock.send(keeper_main.pack(("renew_lease", until)), socket.MSG_DONTWAIT)

    def receive(self) -> Iterable[tuple[Any, ...]]:
        """Return the messages that have arrived.

        Raises:
            KeeperLostError: the keeper is gone.
        """
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            raise KeeperLostError
        self._buffer += data
        return list(keeper_main.unpack(self._buffer))

    def close(self) -> bool:
        """Have the keeper kill whatever is left, and wait for its end. Kill it if that takes too long.

        Returns:
            Whether it did its work. If not, what was below it is now below this process.
        """
        if self._process.closed:
            return True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # forks of this process may hold copies
        self._sock.close()
        with self._process as process:
            self._ends_by_itself = has_ended(process.fileno(), KILL_PATIENCE)
            if not self._ends_by_itself:
                self.kill()
                has_ended(process.fileno(), KILL_PATIENCE)
        live_keepers.discard(self.pid)
        self._exit_code = reap(self.pid)
        return self._exit_code in (0, None) and self._ends_by_itself

    def why_it_ended(self) -> str:
        """Return what an imported module did to this process, which is closed; empty: it was killed from outside."""
        code = self._exit_code
        if not self._ends_by_itself or code == keeper_main.DESCRIPTORS_CLOSED:
            return "the module closed descriptors that are not its own"
        if code is None or code in (-signal.SIGKILL, -signal.SIGTERM):
            return ""
        return f"the module ended its process ({f'exit code {code}' if code >= 0 else signal_name(-code)})"

    def resume(self) -> bool:
        """Resume it if somebody has stopped it: then it can neither reap nor kill. Returns whether it was stopped."""
        with contextlib.suppress(OSError):  # it has ended
            if keeper_main.read_stat(self.pid)[0] == b"T":
                signal.pidfd_send_signal(self._process.fileno(), signal.SIGCONT)
                return True
        return False

    def kill(self) -> None:
        """Kill it. The next ``receive`` raises."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process.fileno(), signal.SIGKILL)


class Command(NamedTuple):
    """How to start one worker."""

    local_rank: int
    argv: list[str]
    """Empty for a function that the keeper knows already."""
    environ: dict[str, str]
    """Changes to the inherited environment."""
    descriptors: tuple[tuple[int, int], ...] = ()
    """Pairs of a descriptor of this process and its number in the worker, where -N means any from N on."""
    cpus: frozenset[int] = frozenset()
    """CPUs to bind the worker to; empty: those of this process."""


class KeeperClient:
    """The workers of the current round. ``fileno()`` is readable when ``take()`` has events."""

    def __init__(
        self,
        run_id: str,
        environ: Mapping[str, str],
        start_keeper: StartKeeper = execute_keeper,
        log: Callable[[str], None] = lambda text: None,
        detail: Callable[[str], None] = lambda text: None,
        standbys: int = 0,
    ) -> None:
        """Start a keeper.

        Args:
            run_id: the job's id, by which the workers' descendants are recognized.
            environ: the environment that the workers inherit.
            start_keeper: starts the keeper, and replaces one that was lost.
            log: receives warnings.
            detail: receives what only some users want to know.
            standbys: how many processes are to be ready for the first round, if the keeper is a warm one.

        Raises:
            UnavailableError: the system cannot start a keeper.
        """
        self._run_id = run_id
        self._environ = environ
        self._is_alone = threading.active_count() == 1 and not keeper_main.has_children()
        self._start_keeper = start_keeper
        self._log, self._detail = log, detail
        self._keeper = KeeperProcess(environ, start_keeper)
        self._standbys = 0
        """How many processes a warm keeper has been told to have ready."""
        self._stand_by(standbys)
        self._importing = ""
        """What a warm keeper imports, as an option names it; empty: nothing any more."""
        self._has_started = False
        """Whether the keeper has started workers before, so that it imports nothing any more."""
        self._unstarted: tuple[list[Any], list[int]] | None = None
        """The orders of a warm keeper's first workers, with copies of their descriptors, until these are started."""
        self._is_stand_in = False
        """Whether the keeper is an ordinary one that replaces a lost warm one until the next round."""
        self._commands: dict[int, list[str]] = {}
        """The workers' command lines, by local rank."""
        self._pids: Mapping[int, int] = {}
        self._running: set[int] = set()
        """Local ranks of workers that have not ended."""
        self._is_starting = False
        """Whether the keeper has yet to report that it started the workers."""
        self._early_stop_signals: tuple[int, ...] = ()
        """Signals that stopped the workers before they were started."""
        self._lost_starts = 0
        """Keepers in a row that were lost before they started a worker."""
        self._lease = 0.0
        self._is_reaping = False
        """Whether the keeper has yet to reply to ``reap_leftovers``."""
        self._is_reaped = False
        """Whether nothing is left of the round."""
        self._has_orphans = False
        """Whether a lost keeper's processes have yet to be killed."""
        self._errors: dict[int, Evidence] = {}
        """By local rank: errors that the workers cannot report themselves."""

    def fileno(self) -> int:
        """Return the descriptor to wait on. It changes when a keeper is lost."""
        return self._keeper.fileno()

    def start(self, commands: Sequence[Command], standbys: int = 0) -> None:
        """Start a round. ``Started`` follows, and one ``Exited`` per worker, even for one that cannot be started.

        Args:
            commands: the workers.
            standbys: how many processes a warm keeper is to have ready for the next round.
        """
        if self._is_stand_in:
            self._keeper.close()
            self._keeper, self._is_stand_in = KeeperProcess(self._environ, self._start_keeper), False
            self._has_started = False
        self._commands = {command.local_rank: command.argv for command in commands}
        self._running = set(self._commands)
        self._pids, self._errors = {}, {}
        self._is_starting, self._early_stop_signals, self._is_reaped = True, (), False
        # As bytes: the two interpreters may be set to different encodings.
        orders = [
            (
                command.local_rank,
                [os.fsencode(word) for word in command.argv],
                {os.fsencode(name): os.fsencode(value) for name, value in command.environ.items()},
                [number for _, number in command.descriptors],
                sorted(command.cpus),
            )
            for command in commands
        ]
        descriptors = [fd for command in commands for fd, _ in command.descriptors]
        if not self._has_started and self._start_keeper is not execute_keeper:
            self._unstarted = orders, [os.dup(fd) for fd in descriptors]
        self._send_orders(orders, descriptors)
        self._stand_by(standbys)

    def send_signal(self, signum: int, local_ranks: frozenset[int], stop: bool) -> None:
        """Send workers a signal. One that is to ``stop`` them goes to their process groups, any other to them alone."""
        self._resume_keeper()
        if stop and self._is_starting and self._start_keeper is not execute_keeper:
            self._early_stop_signals = (int(signum), signal.SIGKILL)
            self._keeper.kill()  # it is importing modules, and reads no messages meanwhile
        self._keeper.send("send_signal", int(signum), sorted(local_ranks), stop)

    def lease(self, until: float) -> None:
        """Let the workers live until a time on ``time.monotonic``. Workers need no lease before the first call.

        Unless this is called again before that time, the workers are killed and ``LeaseExpired`` follows.
        """
        self._lease = until
        self._resume_keeper()
        self._keeper.renew_lease(until)

    def dump_stacks(self, local_ranks: Collection[int]) -> None:
        """Have Python workers write the stacks of their threads, to their memory or to stderr."""
        self._keeper.send("dump_stacks", sorted(local_ranks))

    def sample_stacks(self, pids: Collection[int]) -> None:
        """Have processes of this node's workers write the stacks of their threads into their memory, and go on."""
        self._keeper.send("sample_stacks", sorted(pids))

    def reap_leftovers(self, kill: bool) -> None:
        """End what is left, with SIGTERM or SIGKILL. ``GroupReaped`` follows once nothing is."""
        if self._is_reaped:
            return  # after the end of a lease, the keeper does not wait to be asked
        self._is_reaping = True
        self._resume_keeper()
        self._keeper.send("reap_leftovers", kill)

    def take(self) -> list[AgentEvent]:
        """Read what has happened. May block unless ``fileno()`` is readable."""
        try:
            return [event for message in self._keeper.receive() for event in self._events(message)]
        except KeeperLostError:
            return self._replace_keeper()

    def close(self) -> None:
        """Have the keeper kill whatever is left. If the keeper does not, because it was stopped, do it here."""
        self._forget_orders()
        if not self._keeper.close() or self._has_orphans:
            self._kill_orphans()

    def _events(self, message: tuple[object, ...]) -> list[AgentEvent]:
        match message:
            case ("started", dict(pids), dict(failed)):
                self._pids, self._is_starting, self._lost_starts = pids, False, 0
                self._has_started = True
                self._forget_orders()
                return [Started(pids), *(self._not_started(rank, *why) for rank, why in failed.items())]
            case ("exited", list(exits)):
                self._running -= {exit_[0] for exit_ in exits}
                return [Exited(Exit(*exit_)) for exit_ in exits]
            case ("reaped", dict(leftovers)):
                return [self._reaped(leftovers)]
            case ("lease_expired",):
                return [LeaseExpired()]
            case ("dropped", int(signum), list(ranks)):
                self._log(
                    f"{signal_name(signum)} is not passed on to local {'rank' if len(ranks) == 1 else 'ranks'} "
                    f"{ranks_text(ranks)}: without a handler, the program would die of it"
                )
                return []
            case ("importing", str(what)):
                self._importing = what
                return []
            case ("warning", str(text)):
                self._log(text)
                return []
            case ("detail", str(text)):
                self._detail(text)
                return []
            case ("failed", str(text)):
                raise UnavailableError(text)
        raise LaunchError(f"internal error: unexpected message from the keeper: {message!r}")

    def _send_orders(self, orders: list[Any], descriptors: Sequence[int]) -> None:
        if self._lease:  # this may be a new keeper
            self._keeper.send("renew_lease", self._lease)
        self._keeper.send("spawn", orders, descriptors=descriptors)

    def _forget_orders(self) -> None:
        if self._unstarted:
            for fd in self._unstarted[1]:
                os.close(fd)
            self._unstarted = None

    def _stand_by(self, count: int) -> None:
        if count or self._standbys:
            self._keeper.send("stand_by", count)
        self._standbys = count

    def _resume_keeper(self) -> None:
        """Resume the keeper if somebody has stopped it, because until then no end of a worker is seen."""
        if self._keeper.resume():
            self._log(
                f"the keeper process (pid {self._keeper.pid}) was stopped (SIGSTOP): resumed, because it alone sees "
                "how workers end"
            )

    def _not_started(self, local_rank: int, number: int, reason: str) -> AgentEvent:
        command = (self._commands[local_rank] or ["a function's process"])[0]
        text = f"cannot start {command}: {reason}"
        self._errors[local_rank] = Evidence(ErrorRecord(text, text, time.time(), "<N/A>"))
        self._running.discard(local_rank)
        code = ExitCode.NOT_FOUND if number == errno.ENOENT else ExitCode.CANNOT_EXECUTE
        return Exited(Exit(local_rank, code, time.time()))

    def _reaped(self, leftovers: Mapping[int, str]) -> AgentEvent:
        self._is_reaping, self._is_reaped = False, True
        return GroupReaped(self._errors, tuple(f"{name} (pid {pid})" for pid, name in sorted(leftovers.items())))

    def _kill_orphans(self) -> None:
        kill_orphans(self._is_alone, self._pids.values(), self._run_id)
        self._has_orphans = False

    def _replace_keeper(self) -> list[AgentEvent]:
        """Kill what the lost keeper left, and start another. The workers died with the lost one."""
        text = f"the keeper process (pid {self._keeper.pid}) was killed, and its workers with it"
        if self._is_starting and self._start_keeper is not execute_keeper:
            text = f"the keeper process (pid {self._keeper.pid}) ended while it imported modules"
        importing, self._importing = self._importing, ""
        self._has_orphans = True
        self._keeper.close()
        if importing and not self._early_stop_signals and (why := self._keeper.why_it_ended()):
            if importing.startswith(f"--preload {AUTO}: "):
                return self._start_cold(f"{importing}: {why}")
            raise UnavailableError(f"{importing}: cannot import the module: {why}")
        self._lost_starts += not self._early_stop_signals
        if self._lost_starts > MAX_LOST_STARTS:
            raise UnavailableError(
                f"{text}; giving up, because the {MAX_LOST_STARTS} keepers before it also ended without starting a "
                "worker; check the preloaded modules and the memory of this host"
            )
        self._kill_orphans()
        now = time.time()
        exits: list[AgentEvent] = [
            Exited(Exit(rank, -signal.SIGKILL, now, self._early_stop_signals)) for rank in sorted(self._running)
        ]
        self._is_starting = False
        self._forget_orders()
        lost = Evidence(ErrorRecord(text, text, now, "<N/A>"))
        self._errors = dict.fromkeys(self._running, lost) | self._errors
        self._running.clear()
        # Until the next round an ordinary keeper will do. One that imports modules would not read its messages.
        self._keeper = KeeperProcess(self._environ)
        self._is_stand_in = self._start_keeper is not execute_keeper
        # If the agent still asks the new keeper to reap leftovers, it finds none.
        return [*exits, self._reaped({})] if self._is_reaping else exits

    def _start_cold(self, reason: str) -> list[AgentEvent]:
        """Go on without preloaded modules, which nobody has asked for by name."""
        self._log(f"{reason}; starting workers without --preload")
        self._kill_orphans()
        self._start_keeper = execute_keeper
        self._keeper = KeeperProcess(self._environ)
        if self._unstarted:
            self._send_orders(*self._unstarted)
        return [self._reaped({})] if self._is_reaping else []
