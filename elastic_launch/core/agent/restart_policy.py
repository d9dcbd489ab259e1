"""Layer 1: what follows a failure: another round, or the end of the job; and what the job remembers of it. Pure.

Whoever decides, decides for the job: a ``Ledger`` goes from round to round with the places that nodes get. It holds
ages, not times: no clock is compared with that of another host.
"""

from __future__ import annotations

import re

from elastic_launch.core.agent.root_cause import is_port_clash, shortened
from elastic_launch.errors import ProcessFailure, shell_status
from elastic_launch.job import Ledger, Policy, Verdict

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
    ledger: Ledger,
    failures: tuple[ProcessFailure, ...],
    node: str,
    port: int = 0,
    may_restart: bool = True,
) -> Verdict:
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
        return Verdict(False, ledger)
    if ledger.free < FREE_RESTARTS and any(failure.rank == 0 and is_port_clash(failure, port) for failure in failures):
        return Verdict(may_restart, ledger._replace(free=ledger.free + 1), failures)
    cause = failures[0]
    still, charged = _remembered(policy, ledger)
    repeats = ledger.repeats + 1 if _is_same(ledger, cause) else 1
    status = shell_status(cause.exitcode)
    if charged >= policy.max_restarts or not may_restart:
        why = ""
    elif status in policy.fatal_exit_codes:
        why = f"exit status {status} is fatal (--fatal-exit-codes)"
    elif repeats >= CRASH_LOOP:
        why = f"crash loop: rank {cause.rank} failed {repeats} times in a row in the same way, with no time in between"
    else:
        pause = min(policy.backoff_limit, policy.backoff * 2.0 ** min(charged, 1000))
        after = Ledger(
            charged + 1,
            ledger.free,
            (*still, 0.0) if policy.window else (0.0,),
            _signature(cause),
            repeats,
            node,
            ledger.in_a_row + 1 if node == ledger.node else 1,
        )
        return Verdict(True, after, failures, pause=pause)
    return Verdict(False, ledger._replace(charged=charged, ages=still), failures, why=why)


def aged(ledger: Ledger, seconds: float) -> Ledger:
    """The ledger, so many seconds later."""
    return ledger._replace(ages=tuple(round(age + seconds, 3) for age in ledger.ages))


def stands_aside(policy: Policy, ledger: Ledger, node: str) -> bool:
    """Whether a node has caused so many failures in a row that another should have its place."""
    return 0 < policy.node_failure_limit <= ledger.in_a_row and node == ledger.node


def _remembered(policy: Policy, ledger: Ledger) -> tuple[tuple[float, ...], int]:
    """The failures that are not forgotten yet: their ages, as far as they are kept, and how many there are."""
    if not policy.window:
        return ledger.ages, ledger.charged
    ages = tuple(age for age in ledger.ages if age <= policy.window)
    return ages, len(ages)


def _is_same(ledger: Ledger, cause: ProcessFailure) -> bool:
    return bool(ledger.ages) and ledger.ages[-1] <= NO_TIME and ledger.failure == _signature(cause)


def _signature(cause: ProcessFailure) -> str:
    """Rank and error; numbers that differ from process to process (addresses, pids, ports) are left out."""
    error = re.sub(r"0x[0-9a-f]+|\d{4,}", "#", cause.error_line())
    return shortened(f"{cause.rank} {cause.exitcode} {error}", _SIGNATURE)
