"""Layer 2: the worker processes of one node, as the agent sees them: orders in, lifecycle events out.

Turns the messages of the keeper into events, starts a keeper when there is none, and when one is killed does its last
work in its place. Decides nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from elastic_launch.core.agent.messages import AgentEvent, Exited, GroupReaped, LeaseExpired, Started
from elastic_launch.core.agent.root_cause import ErrorRecord, Evidence, Exit
from elastic_launch.errors import ExitCode, LaunchError, UnavailableError
from elastic_launch.workers.keeper import (
    Begin,
    Keeper,
    KeeperLostError,
    bury_orphans,
    execute_keeper,
    has_children,
)

MOST_LOSSES = 3
"""Keepers in a row that are lost before they have started a worker, and replaced."""


class Command(NamedTuple):
    """What one worker is started with."""

    local_rank: int
    argv: list[str]
    """Empty for a function, which its keeper knows."""
    environ: dict[str, str]
    """Changes to the inherited environment."""
    descriptors: tuple[tuple[int, int], ...] = ()
    """Descriptors of this process, and their numbers in the worker; -1: any."""
    cpus: frozenset[int] = frozenset()
    """Where it may run; empty: where this process may."""


def _encoded(words: Sequence[str] | Mapping[str, str]) -> list[bytes] | dict[bytes, bytes]:
    if isinstance(words, Mapping):
        return {os.fsencode(name): os.fsencode(value) for name, value in words.items()}
    return [os.fsencode(word) for word in words]


class WorkerProcesses:
    """The processes of the current round. ``take()`` gives the events that ``fileno()`` announces."""

    def __init__(
        self,
        run_id: str,
        environ: Mapping[str, str],
        begin: Begin = execute_keeper,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepare.

        Args:
            run_id: marks the workers and all that they start.
            environ: what they inherit.
            begin: starts a keeper.
            say: takes a line for people.
        """
        self._run_id = run_id
        self._environ = environ
        self._alone = threading.active_count() == 1 and not has_children()
        self._begin = begin
        self._log = log
        self._keeper = Keeper(environ, begin)
        self._commands: dict[int, list[str]] = {}
        self._pids: Mapping[int, int] = {}
        self._running: set[int] = set()
        self._is_stand_in = False
        self._starting = False
        """The keeper has not said yet that it has started the workers."""
        self._told: tuple[int, ...] = ()
        """The signals that stopped workers which were not started yet."""
        self._losses = 0
        """Keepers that were lost without having started anybody."""
        self._lease = 0.0
        self._sweep_unanswered = False
        self._burial_owed = False
        self._errors: dict[int, Evidence] = {}
        """What the workers cannot tell themselves, by local rank."""

    def fileno(self) -> int:
        """The descriptor to wait on; it changes when a keeper is lost."""
        return self._keeper.fileno()

    def start(self, commands: Sequence[Command]) -> None:
        """Start a round; ``Started`` follows, and ``Exited`` for each worker, also for those that cannot be started."""
        if self._is_stand_in:
            self._keeper.close()
            self._keeper, self._is_stand_in = Keeper(self._environ, self._begin), False
        self._commands = {command.local_rank: command.argv for command in commands}
        self._running = set(self._commands)
        self._pids, self._errors = {}, {}
        self._starting, self._told = True, ()
        # As bytes: the two interpreters may be set to different encodings.
        orders = [
            (
                command.local_rank,
                _encoded(command.argv),
                _encoded(command.environ),
                [number for _, number in command.descriptors],
                sorted(command.cpus),
            )
            for command in commands
        ]
        if self._lease:  # the keeper may be a new one
            self._keeper.send("lease", self._lease)
        self._keeper.send("spawn", orders, descriptors=[fd for command in commands for fd, _ in command.descriptors])

    def tell(self, signum: int, local_ranks: frozenset[int], stop: bool) -> None:
        """Signal workers: to stop them, with their process groups, or else alone."""
        if stop and self._starting and self._begin is not execute_keeper:
            self._told = (int(signum), signal.SIGKILL)
            self._keeper.kill()  # it is importing modules, and hears nothing
        self._keeper.send("tell", int(signum), sorted(local_ranks), stop)

    def lease(self, until: float) -> None:
        """Let workers live until a moment on ``time.monotonic``, if this is not called again before: then come SIGKILL
        and ``LeaseExpired``. Without a first call they need no lease."""
        self._lease = until
        self._keeper.send("lease", until)

    def dump(self, local_ranks: Collection[int]) -> None:
        """Have workers that know how to write the stacks of their threads to stderr."""
        self._keeper.send("dump", sorted(local_ranks))

    def sweep(self, kill: bool) -> None:
        """End what is left; ``GroupReaped`` follows when nothing is."""
        self._sweep_unanswered = True
        self._keeper.send("sweep", kill)

    def take(self) -> list[AgentEvent]:
        """Read what has happened; may block if ``fileno()`` is not readable."""
        try:
            return [event for message in self._keeper.receive() for event in self._events(message)]
        except KeeperLostError:
            return self._keeper_is_lost()

    def close(self) -> None:
        """Have the keeper kill whatever is left; where it does not, since somebody stopped it, do it here."""
        if not self._keeper.close() or self._burial_owed:
            self._bury_orphans()

    def _events(self, message: tuple[object, ...]) -> list[AgentEvent]:
        match message:
            case ("started", dict(pids), dict(failed)):
                self._pids, self._starting, self._losses = pids, False, 0
                return [Started(pids), *(self._not_started(rank, *why) for rank, why in failed.items())]
            case ("exited", list(exits)):
                self._running -= {exit_[0] for exit_ in exits}
                return [Exited(Exit(*exit_)) for exit_ in exits]
            case ("gone", dict(leftovers)):
                return [self._gone(leftovers)]
            case ("lapsed",):
                return [LeaseExpired()]
            case ("warned", str(text)):
                self._log(text)
                return []
            case ("broken", str(text)):
                raise UnavailableError(text)
        raise LaunchError(f"internal error: the keeper said {message!r}")

    def _not_started(self, local_rank: int, number: int, reason: str) -> AgentEvent:
        command = (self._commands[local_rank] or ["a function's process"])[0]
        text = f"cannot start {command}: {reason}"
        self._errors[local_rank] = Evidence(ErrorRecord(text, text, time.time(), "<N/A>"))
        self._running.discard(local_rank)
        code = ExitCode.NOT_FOUND if number == errno.ENOENT else ExitCode.CANNOT_EXECUTE
        return Exited(Exit(local_rank, code, time.time()))

    def _bury_orphans(self) -> None:
        bury_orphans(self._alone, self._pids.values(), self._run_id)
        self._burial_owed = False

    def _gone(self, leftovers: Mapping[int, str]) -> AgentEvent:
        self._sweep_unanswered = False
        return GroupReaped(self._errors, tuple(f"{name} (pid {pid})" for pid, name in sorted(leftovers.items())))

    def _keeper_is_lost(self) -> list[AgentEvent]:
        """The workers died with their keeper; end what they leave, which is this process's now, and start afresh."""
        text = f"the process that kept the workers (pid {self._keeper.pid}) was killed, and its workers with it"
        if self._starting and self._begin is not execute_keeper:
            text = f"the process that workers are forked from (pid {self._keeper.pid}) ended while it imported modules"
        self._losses += not self._told
        if self._losses > MOST_LOSSES:
            raise UnavailableError(f"{text}; so were {MOST_LOSSES} before it, without having started any: giving up")
        self._burial_owed = True
        self._keeper.close()
        self._bury_orphans()
        now = time.time()
        exits: list[AgentEvent] = [
            Exited(Exit(rank, -signal.SIGKILL, now, self._told)) for rank in sorted(self._running)
        ]
        self._starting = False
        lost = Evidence(ErrorRecord(text, text, now, "<N/A>"))
        self._errors = dict.fromkeys(self._running, lost) | self._errors
        self._running.clear()
        # A small one will do until the next round; one that imports modules would not hear what it is told.
        self._keeper = Keeper(self._environ)
        self._is_stand_in = self._begin is not execute_keeper
        # An order to sweep that the agent still gives goes to the new keeper, which finds nothing.
        return [*exits, self._gone({})] if self._sweep_unanswered else exits
