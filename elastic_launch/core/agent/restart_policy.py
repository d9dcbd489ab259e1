"""Layer 1: what follows a failure: another round, or the end of the job; and what the job remembers of it. Pure.

Whoever decides, decides for the job: a ``RestartHistory`` travels from round to round with the assignments. It holds
ages, not times: no clock is compared with that of another host.
"""

from __future__ import annotations

import re

from elastic_launch.core.agent.root_cause import is_port_clash, shortened
from elastic_launch.errors import ProcessFailure, shell_status
from elastic_launch.job import Decision, Policy, RestartHistory

FREE_RESTARTS = 3
"""How often a port that was taken is replaced without charge to ``max_restarts``."""
NO_TIME = 10.0
"""Seconds between two failures that count as no time."""
CRASH_LOOP = 3
"""So many times the same failure, with no time in between, are a crash loop."""
_SIGNATURE = 200
"""Characters by which a failure is known again."""


def follow(
    policy: Policy,
    restart_history: RestartHistory,
    failures: tuple[ProcessFailure, ...],
    node: str,
    port: int = 0,
    may_restart: bool = True,
) -> Decision:
    """What follows a round that ended with failures, or without.

    Args:
        policy: the job's.
        ledger: the job's.
        failures: the cause first.
        node: the id of the node whose worker was the cause.
        port: of the workers' store, if the launcher has picked it and can pick another.
        may_restart: False: some node cannot take part in another round.
    """
    if not failures:
        return Decision(False, restart_history)
    if restart_history.uncharged < FREE_RESTARTS and any(
        failure.rank == 0 and is_port_clash(failure, port) for failure in failures
    ):
        return Decision(may_restart, restart_history._replace(uncharged=restart_history.uncharged + 1), failures)
    cause = failures[0]
    still, used = _remembered(policy, restart_history)
    repeats = restart_history.repeats + 1 if _is_same(restart_history, cause) else 1
    status = shell_status(cause.exitcode)
    if used >= policy.max_restarts or not may_restart:
        why = ""
    elif status in policy.fatal_exit_codes:
        why = f"exit status {status} is fatal (--fatal-exit-codes)"
    elif repeats >= CRASH_LOOP:
        why = f"crash loop: rank {cause.rank} failed {repeats} times in a row in the same way, with no time in between"
    else:
        pause = min(policy.backoff_limit, policy.backoff * 2.0 ** min(used, 1000))
        after = RestartHistory(
            used + 1,
            restart_history.uncharged,
            (*still, 0.0) if policy.window else (0.0,),
            _signature(cause),
            repeats,
            node,
            restart_history.in_a_row + 1 if node == restart_history.node else 1,
        )
        return Decision(True, after, failures, pause=pause)
    return Decision(False, restart_history._replace(used=used, ages=still), failures, why=why)


def aged(restart_history: RestartHistory, seconds: float) -> RestartHistory:
    """The ledger, so many seconds later."""
    return restart_history._replace(ages=tuple(round(age + seconds, 3) for age in restart_history.ages))


def stands_aside(policy: Policy, restart_history: RestartHistory, node: str) -> bool:
    """Whether a node has caused so many failures in a row that another should have its place."""
    return 0 < policy.node_failure_limit <= restart_history.in_a_row and node == restart_history.node


def _remembered(policy: Policy, restart_history: RestartHistory) -> tuple[tuple[float, ...], int]:
    """The failures that are not forgotten yet: their ages, as far as they are kept, and how many there are."""
    if not policy.window:
        return restart_history.ages, restart_history.used
    ages = tuple(age for age in restart_history.ages if age <= policy.window)
    return ages, len(ages)


def _is_same(restart_history: RestartHistory, cause: ProcessFailure) -> bool:
    return (
        bool(restart_history.ages)
        and restart_history.ages[-1] <= NO_TIME
        and restart_history.failure == _signature(cause)
    )


def _signature(cause: ProcessFailure) -> str:
    """Rank and error; numbers that differ from process to process (addresses, pids, ports) are left out."""
    error = re.sub(r"0x[0-9a-f]+|\d{4,}", "#", cause.error_line())
    return shortened(f"{cause.rank} {cause.exitcode} {error}", _SIGNATURE)
