"""Layer 3: lets the agent run on a rendezvous handler of torch's interface, whoever wrote it.

A handler blocks, so all its methods, and those of its store, run in one thread beside the agent's loop; that thread is
the only one that touches them, but for threads of the handler's own. It hands events to the loop and wakes it. What
such a handler does not offer is agreed through its store, under keys below ``PREFIX``: places, how a round ended, and
that all nodes have succeeded. The store needs torch's ``get`` (which waits for the key), ``set``, ``add``, ``check``
and ``delete_key``. All nodes of a job must run this launcher.

The thread is a daemon: one that hangs in a handler does not keep the program from ending, nor the agent from returning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    Leave,
    RendezvousAction,
    ReportFailure,
    ReportRound,
    ReportSuccess,
    RequestJoin,
)
from elastic_launch.core.agent.restart_policy import aged
from elastic_launch.core.rendezvous.ranks import assign
from elastic_launch.core.rendezvous.records import NodeRecord, decode, encode
from elastic_launch.errors import (
    ExitCode,
    LaunchError,
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousStateError,
    RendezvousTimeoutError,
    UnavailableError,
    signal_name,
)
from elastic_launch.host.console import log as say_on_stderr
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Assignment, Decision, End, EndKind, RestartHistory
from elastic_launch.rendezvous.handler import RendezvousStoreInfo
from elastic_launch.worker_spec import WorkerSpec

PREFIX = "elastic-launch/"
"""Of all our keys in the handler's store."""
POLL = 5.0
"""Seconds between looks at who waits and how the round goes: the interface has no way to be told."""
EXIT_BARRIER_TIMEOUT = 300.0
"""Seconds that a node whose workers succeeded waits for the others' to do so; torch's."""
CLOSE_PATIENCE = 2.0
"""Seconds that the handler has for its goodbye."""
LINGER = 2.0
"""Seconds that a node which knows that all have succeeded waits for the others to know: it may host the store."""

_FIRST_LOOK, _LAST_LOOK = 0.05, 0.5
"""Seconds between looks at the exit barrier: at first, and after a while."""

_KINDS: tuple[type[RendezvousError], ...] = (
    RendezvousTimeoutError,
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousError,
)

Task = Callable[[], Sequence[AgentEvent]]


class _Hello(NamedTuple):
    """What a node tells the node of rank 0."""

    node: NodeRecord
    token: str
    """Fresh in each round, so that an old answer is not taken for this one's."""
    rounds: int
    """How many there were, as far as it knows."""


class _Answer(NamedTuple):
    """What the node of rank 0 answers."""

    assignment: Assignment
    token: str
    """Of the round: a part of its keys."""


class _Outcome(NamedTuple):
    """How a round ended, and what follows: written once."""

    end: End
    decision: Decision


class ForeignRendezvous:
    """Turns a handler's blocking calls into events. Serves one run of one agent."""

    def __init__(
        self,
        handler: Any,
        *,
        role: str,
        local_world_size: int,
        local_addr: str | None = None,
        poll: float = POLL,
        exit_barrier_timeout: float = EXIT_BARRIER_TIMEOUT,
        log: Callable[[str], None] = say_on_stderr,
    ) -> None:
        """Nothing is started yet.

        Args:
            handler: has the methods of torch's ``RendezvousHandler``.
            role: of this node's workers.
            local_world_size: how many there are.
            local_addr: this node's address, for a handler that does not say where the workers' store is.
            poll: seconds between calls of ``num_nodes_waiting``.
            exit_barrier_timeout: seconds to wait for the others' success.
            say: takes each line for people, from the thread.
        """
        self.lease: Callable[[float], None] = lambda until: None  # not used: the handler decides who is there
        self._handler = handler
        self._node = NodeRecord(os.urandom(8).hex(), os.uname().nodename, os.getpid(), local_world_size, role)
        self._local_addr = local_addr
        self._poll = poll
        self._exit_barrier_timeout = exit_barrier_timeout
        self._log = log
        # The loop's part.
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._end: End | None = None
        """How the round ended, as the agent was told."""
        self._left = False
        """The job goes on, or may do so, without this node."""
        # Between the two.
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: deque[AgentEvent | BaseException] = deque()
        self._lock = threading.Lock()
        # The thread's part.
        self._again: Task | None = None
        """What to do every ``_pause`` seconds while there is nothing else to do."""
        self._pause = poll
        self._store: Any = None
        self._keys = ""
        self._assignment: Assignment | None = None
        self._began_at = 0.0
        self._outcome: _Outcome | None = None
        self._decision = Decision(True)
        self._settled_at = time.monotonic()
        self._rounds = 0
        self._succeeded = False
        self._barrier_ends = 0.0
        self._reserved: socket.socket | None = None

    # --- the agent's loop

    def get_run_id(self) -> str:
        """The job's id, as the handler has it."""
        return str(self._handler.get_run_id())

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Hand an action to the thread; only ``ReportFailure`` is answered at once."""
        if self._thread is None:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._work, name="elastic-launch-rendezvous", daemon=True)
            self._thread.start()
        match action:
            case RequestJoin():
                self._end = None
                self._tasks.put(self._join)
            case ReportFailure(failure):
                if self._end is None:
                    self._end = End(EndKind.FAILED, failure.headline(), self._node.node, mine=True)
                    self._tasks.put(self._rest)
                    return [Ended(self._end, time.time())]
            case ReportSuccess():
                self._tasks.put(self._succeed)
            case ReportRound(decision):
                self._tasks.put(partial(self._settle, self._end, decision))
            case Leave(signum, error, status):
                self._left = not error  # else it ends the job
                why = f"{self._node.host}: {error}" if error else f"{self._node.host} leaves ({signal_name(signum)})"
                self._tasks.put(partial(self._leave, why, status))
        return []

    def descriptors(self) -> list[tuple[int, int]]:
        """What the thread wakes the loop with."""
        return [(self._wake, select.POLLIN)] if self._wake >= 0 else []

    def deadline(self) -> float | None:
        """No time to keep: the thread does."""
        return None

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """What the thread has found.

        Raises:
            LaunchError: the handler, or its store, failed.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)  # before the results are read: what comes now is announced again
        events: list[AgentEvent] = []
        while self._results:
            result = self._results.popleft()
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, Ended):
                if self._end is not None:
                    continue  # the agent has been told of another end of this round
                self._end = result.end
            events.append(result)
        return events

    def close(self) -> None:
        """End the job for the handler, but where this node left it or never was in it; then end the thread.

        A thread that hangs in the handler is given up after ``CLOSE_PATIENCE`` and lives until the handler returns.
        """
        if self._thread is None:
            return
        with self._lock:
            wake, self._wake = self._wake, -1
        self._tasks.put(self._shut_down)
        self._tasks.put(None)
        self._thread.join(CLOSE_PATIENCE)
        if wake >= 0:
            os.close(wake)

    # --- the thread

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=self._pause if self._again else None)
            except queue.Empty:
                task = self._again
            if task is None:
                break
            try:
                self._post(task())
            except BaseException as error:
                self._again = None
                self._post([self._explained(error)])
        self._release_port()

    def _post(self, results: Sequence[AgentEvent | BaseException]) -> None:
        with self._lock:  # else the descriptor could be closed, and be another's, at the moment of writing
            if results and self._wake >= 0:
                self._results.extend(results)
                os.eventfd_write(self._wake, 1)

    def _join(self) -> Sequence[AgentEvent]:
        if (left := self._decision.pause - (time.monotonic() - self._settled_at)) > 0:
            self._again, self._pause = self._join, left
            return []
        self._again = self._outcome = self._store = None
        self._release_port()
        try:
            info = self._handler.next_rendezvous()
        except Exception as error:
            if _is_a(error, RendezvousGracefulExitError):
                self._left = True
                self._log(f"{self._about(error)}; the job goes on without this node")
                return [Decided(Decision(False))]
            if not _is_a(error, RendezvousClosedError):
                raise
            if self._succeeded:
                self._log("the job has ended, after this node's workers had ended well")
                return [Decided(Decision(False))]
            text = f"{self._about(error)}; the job has ended already: use another --rdzv-id for a new one"
            decision = self._decision._replace(restart=False, error=text, status=ExitCode.UNAVAILABLE)
            return [Decided(decision)]  # with the failures after which this node hoped for another round
        if self._wake < 0:
            return []  # the agent is gone
        assignment = self._exchange(info)
        if assignment.group_rank == 0 and not assignment.agent_store:
            with contextlib.suppress(UnavailableError):  # it serves already, or the worker's error will tell
                self._reserved = reserve_port(assignment.master_port)
        self._again, self._pause = self._watch, self._poll
        return [Assigned(assignment)]

    def _exchange(self, info: Any) -> Assignment:
        """Tell the node of rank 0 of this one, and get this one's place from it.

        Each node writes and reads once; that of rank 0 does so for each. What is read is deleted, since some handlers
        give the same store for every round.
        """
        store, rank, size = info.store, info.rank, info.world_size
        if not (isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
            raise RendezvousStateError(f"next_rendezvous() gave rank {rank!r} of {size!r}")
        restart_history = aged(self._decision.restart_history, time.monotonic() - self._settled_at)
        node = self._node._replace(restart_history=restart_history, past=self._rounds - 1)
        hello = _Hello(node, os.urandom(8).hex(), self._rounds)
        if rank == 0:
            hellos = [hello, *_read_hellos(store, size)]
            rounds = max(hello.rounds for hello in hellos)
            # In a store that served an earlier round, torch's process groups would meet the keys of that.
            shares = bool(getattr(self._handler, "use_agent_store", False))
            served = shares and rounds == 0
            where = None if shares and not served else info.bootstrap_store_info
            where = where or RendezvousStoreInfo.build(0, store, self._local_addr)
            assignments = assign(
                [hello.node for hello in hellos],
                where.master_addr,
                where.master_port,
                restart_count=rounds,
                restart_history=max((hello.node for hello in hellos), key=lambda node: node.past).restart_history,
            )
            # The handler's port may be the same in each round, so another round is no remedy when it is taken.
            answers = [
                _Answer(assignment._replace(port_picked=False, agent_store=served), hello.token)
                for assignment in assignments
            ]
            for place_rank in range(1, size):
                answer = encode(answers[place_rank]).decode()
                store.set(_answer_key(place_rank, hellos[place_rank].token), answer)
            answer_here = answers[0]
        else:
            store.set(_hello_key(rank), encode(hello).decode())
            key = _answer_key(rank, hello.token)
            answer_here = decode(_Answer, store.get(key), key)
            store.delete_key(key)
        self._store, self._assignment = store, answer_here.assignment
        self._keys = f"{PREFIX}{answer_here.token}/"
        self._rounds = answer_here.assignment.restart_count + 1
        self._succeeded = False
        self._began_at = time.monotonic()
        return answer_here.assignment

    def _rest(self) -> Sequence[AgentEvent]:
        self._again = None
        return []

    def _watch(self) -> Sequence[AgentEvent]:
        """Look whether the round is over, or should be since nodes wait."""
        if outcome := self._read_outcome():
            self._again = None
            return [Ended(outcome.end, time.time())]
        waiting = self._handler.num_nodes_waiting()
        if waiting <= 0:
            return []
        self._again = None
        outcome = self._reform(f"{waiting} more node{'s' if waiting > 1 else ''} can join")
        return [Ended(outcome.end, time.time())]

    def _settle(self, end: End | None, decision: Decision) -> Sequence[AgentEvent]:
        """What follows the round: what the node that ended it wrote, or this node's own word."""
        self._again = None
        if end is not None and end.kind is not EndKind.DONE:
            mine = _Outcome(end._replace(mine=False), decision)
            try:
                outcome = self._write_outcome(mine)
            except Exception:
                outcome = mine  # the store is lost: the failure that is known says more, and a new round will tell
            if outcome is not mine:
                consequences = () if outcome.decision.restart else decision.failures
                decision = outcome.decision._replace(failures=(*outcome.decision.failures, *consequences))
        self._decision, self._settled_at = decision, time.monotonic()
        return [Decided(decision)]

    def _succeed(self) -> Sequence[AgentEvent]:
        """This node's workers have ended well: wait for the others'."""
        self._succeeded = True
        self._barrier_ends = time.monotonic() + self._exit_barrier_timeout
        self._again, self._pause = self._barrier, _FIRST_LOOK
        if self._size > 1:
            with contextlib.suppress(Exception):  # a store that is lost shows at once again
                if self._store.add(f"{self._keys}done", 1) >= self._size:
                    self._store.set(f"{self._keys}all", "1")
        return self._barrier()

    def _barrier(self) -> Sequence[AgentEvent]:
        self._pause = min(self._pause * 1.5, _LAST_LOOK)
        done = Ended(End(EndKind.DONE, "all workers have ended well"), time.time())
        try:
            if self._size == 1 or self._store.check([f"{self._keys}all"]):
                self._linger()
                self._again = None
                return [done]
            if outcome := self._read_outcome():
                self._again = None
                return [Ended(outcome.end, time.time())]
        except Exception as error:
            self._log(f"{self._about(error)}; this node's workers have ended well, the others' are not known of")
            self._again = None
            return [done]
        if time.monotonic() < self._barrier_ends:
            return []
        self._log(f"this node's workers have ended well; the others' have not within {self._exit_barrier_timeout:g} s")
        self._again = None
        return [done]

    def _linger(self) -> None:
        """Wait a little until every node knows that all have succeeded: with this process its store may go."""
        end = time.monotonic() + LINGER
        with contextlib.suppress(Exception):  # another that knew has gone
            seen = self._store.add(f"{self._keys}seen", 1) if self._size > 1 else 1
            while seen < self._size and time.monotonic() < end:
                time.sleep(_FIRST_LOOK / 2)
                seen = self._store.add(f"{self._keys}seen", 0)

    def _leave(self, why: str, status: int) -> Sequence[AgentEvent]:
        """Have the others go on at once, instead of when they miss this node."""
        self._again = None
        if self._store is not None and self._size > 1:
            with contextlib.suppress(Exception):  # it is this node that leaves; the others will miss it
                restart_history, rank = self._restart_history(), self._assignment.group_rank if self._assignment else -1
                end = End(EndKind.MEMBERSHIP_CHANGED, why, self._node.node, rank=rank)
                if status:
                    end = End(EndKind.ERROR, why, self._node.node, status=status)
                self._write_outcome(
                    _Outcome(end, Decision(not status, restart_history, error=why if status else "", status=status))
                )
        return []

    def _shut_down(self) -> Sequence[AgentEvent]:
        """``shutdown`` ends the job for everybody, also for later rounds."""
        self._again = None
        if self._assignment is not None and not self._left:
            try:
                self._handler.shutdown()
            except Exception as error:
                self._log(f"{self._about(error)}, at its shutdown()")
        return []

    def _reform(self, reason: str) -> _Outcome:
        return self._write_outcome(
            _Outcome(End(EndKind.MEMBERSHIP_CHANGED, reason, self._node.node), Decision(True, self._restart_history()))
        )

    def _restart_history(self) -> RestartHistory:
        return (
            aged(self._assignment.restart_history, time.monotonic() - self._began_at)
            if self._assignment
            else RestartHistory()
        )

    def _read_outcome(self) -> _Outcome | None:
        key = f"{self._keys}end"
        if self._outcome is None and self._store.check([key]):
            self._outcome = decode(_Outcome, self._store.get(key), key)
        return self._outcome

    def _write_outcome(self, outcome: _Outcome) -> _Outcome:
        """Write it, unless another node was first; the one that holds."""
        if (before := self._read_outcome()) is not None:
            return before
        self._store.set(f"{self._keys}end", encode(outcome).decode())
        self._outcome = outcome
        return outcome

    @property
    def _size(self) -> int:
        return self._assignment.group_world_size if self._assignment else 0

    def _release_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    # --- errors

    def _about(self, error: BaseException) -> str:
        """One line: which handler, and what."""
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return f"rendezvous handler {type(self._handler).__name__}: {what}"

    def _explained(self, error: BaseException) -> BaseException:
        """The error as one of ours. With a traceback where the handler did not mean to raise it."""
        explained: LaunchError
        if kind := next((kind for kind in _KINDS if _is_a(error, kind)), None):
            explained = kind(self._about(error))
        elif isinstance(error, OSError) or type(error).__name__ in ("RuntimeError", "DistStoreError"):
            # The latter are what torch's stores raise when a key does not come, or a connection is lost.
            explained = RendezvousConnectionError(self._about(error))
        else:
            import traceback  # late: only to explain a defect

            text = "".join(traceback.format_exception(error)).rstrip()
            explained = LaunchError(f"{self._about(error)}, which looks like a defect of the handler:\n{text}")
        explained.__cause__ = error
        return explained


def adapt(handler: Any, spec: WorkerSpec, environ: Mapping[str, str], log: Callable[[str], None]) -> Any:
    """What the agent can talk to: a backend of the launcher's own, or a handler of torch's interface, wrapped.

    Raises:
        LaunchError: it is neither.
        UsageError: a parameter of the backend is wrong.
    """
    if hasattr(handler, "for_agent"):
        return handler.for_agent(spec, environ, log)
    if not hasattr(handler, "next_rendezvous"):
        raise LaunchError(f"rdzv_handler={handler!r}: must be a rendezvous handler; it has no next_rendezvous()")
    return ForeignRendezvous(
        handler, role=spec.role, local_world_size=spec.local_world_size, local_addr=spec.local_addr, log=log
    )


def _is_a(error: BaseException, kind: type[BaseException]) -> bool:
    """By name: torch's classes are others than ours."""
    return kind.__name__ in (base.__name__ for base in type(error).__mro__)


def _hello_key(rank: int) -> str:
    return f"{PREFIX}node/{rank}"


def _answer_key(rank: int, token: str) -> str:
    return f"{PREFIX}place/{rank}/{token}"


def _read_hellos(store: Any, size: int) -> list[_Hello]:
    """The other nodes' words, by rank; waits for them."""
    keys = [_hello_key(rank) for rank in range(1, size)]
    at_once = len(keys) > 1 and getattr(store, "has_extended_api", bool)()
    found = cast(list[bytes], store.multi_get(keys) if at_once else [store.get(key) for key in keys])
    for key in keys:
        store.delete_key(key)
    return [decode(_Hello, data, key) for data, key in zip(found, keys, strict=True)]
