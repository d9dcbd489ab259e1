"""Decide what follows a failure: another round or the end of the job.

One node decides for the whole job. What it must remember is in a ``RestartHistory``, which is passed from round to
round with the assignments. It holds ages instead of times, because the clocks of two hosts cannot be compared.
"""

from __future__ import annotations

import re
import signal

from elastic_launch.core.agent.root_cause import is_port_clash
from elastic_launch.core.progress import goodput
from elastic_launch.core.text import shortened
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Change, Decision, HangAction, Policy, RestartHistory

UNCHARGED_RESTARTS = 3
"""How often a taken port is replaced without using up a restart."""
BACK_TO_BACK = 10.0
"""Failures this close together, in seconds, count as back-to-back."""
_MAX_SIGNATURE = 200
"""Maximum characters of a failure's signature."""
UNKNOWN_CHANGE = "membership_changed"
"""Name of a change of membership if a node that does not tell ended the round."""
CAUSES = ("failed", "hang", "port_taken", *(change.value for change in Change if change), UNKNOWN_CHANGE)
"""What ``restart_cause`` returns."""
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
"""Signals that a program causes itself. Any other signal was probably sent from outside."""


def follow(
    policy: Policy,
    history: RestartHistory,
    failures: tuple[ProcessFailure, ...],
    node: str,
    port: int = 0,
    may_restart: bool = True,
) -> Decision:
    """Decide what follows a round.

    Args:
        policy: the job's restart policy.
        history: the job's restart history, aged to the present.
        failures: the failed workers of all nodes, the cause first; empty if there are none.
        node: the id of the node on which the cause failed.
        port: the port of the workers' store if the launcher can pick another one; otherwise 0.
        may_restart: False if a node cannot take part in another round.
    """
    if not failures:
        return Decision(False, history)
    is_clash = any(failure.rank == 0 and is_port_clash(failure, port) for failure in failures)
    if is_clash and history.uncharged < UNCHARGED_RESTARTS:
        return Decision(may_restart, history._replace(uncharged=history.uncharged + 1), failures)
    cause = failures[0]
    ages, used = _counted_failures(policy, history)
    signature, status = _signature(cause), cause.status()
    repeats = _repeats(history, signature)
    if cause.is_hang and policy.hang_action is HangAction.STOP:
        why = "a hang ends the job (--hang-action=stop)"
    elif used >= policy.max_restarts or not may_restart:
        why = ""
    elif status in policy.fatal_exit_codes:
        why = f"exit status {status} is fatal (--fatal-exit-codes)"
    elif 0 < policy.crash_loop <= repeats:
        why = (
            f"crash loop: rank {cause.rank} failed {repeats} times in a row in the same way within {BACK_TO_BACK:g} s "
            f"of each other (--crash-loop={policy.crash_loop}; 0 turns this off)"
        )
    else:
        pause = min(policy.backoff_limit, policy.backoff * 2.0 ** min(used, 1000))
        after = history._replace(
            used=used + 1,
            ages=(*ages, 0.0) if policy.window else (0.0,),
            failure=signature,
            repeats=repeats,
            node=node,
            in_a_row=history.in_a_row + 1 if node == history.node else 1,
        )
        return Decision(True, after, failures, pause=pause)
    return Decision(False, history._replace(used=used, ages=ages), failures, why=why)


def has_restarts(policy: Policy, history: RestartHistory) -> bool:
    """Return whether a failure may be followed by another round, in a round that begins with this history."""
    return policy.max_restarts > (0 if policy.window else history.used)


def restart_cause(history: RestartHistory, decision: Decision, change: str) -> str:
    """Return why another round follows, one of ``CAUSES``.

    Args:
        history: the job's restart history in the round that is over.
        decision: what the nodes agreed on.
        change: what changed the membership; empty if nothing did, or if that is not known.
    """
    if decision.failures:
        if decision.failures[0].is_hang:
            return "hang"
        return "port_taken" if decision.restart_history.uncharged > history.uncharged else "failed"
    if decision.gone:
        return Change.NODE_LOST.value
    return change or UNKNOWN_CHANGE


def aged(history: RestartHistory, seconds: float) -> RestartHistory:
    """Return the history ``seconds`` later."""
    ages = tuple(round(age + seconds, 3) for age in history.ages)
    return history._replace(ages=ages, goodput=goodput.aged(history.goodput, seconds))


def is_deprioritized(policy: Policy, history: RestartHistory, node: str) -> bool:
    """Return whether a node has caused so many failures in a row that a spare should replace it."""
    return 0 < policy.node_failure_limit <= history.in_a_row and node == history.node


def _counted_failures(policy: Policy, history: RestartHistory) -> tuple[tuple[float, ...], int]:
    """Return the ages of the failures within the policy's window, and how many failures count."""
    if not policy.window:
        return history.ages, history.used
    ages = tuple(age for age in history.ages if age <= policy.window)
    return ages, len(ages)


def _repeats(history: RestartHistory, signature: str) -> int:
    """Return how often in a row the program has failed in this way; 0 if it did not fail by itself."""
    if not signature:
        return 0
    is_repeat = history.failure == signature and bool(history.ages) and history.ages[-1] <= BACK_TO_BACK
    return history.repeats + 1 if is_repeat else 1


def _signature(cause: ProcessFailure) -> str:
    """Return rank, status and error without numbers that vary between runs; empty if the worker was killed."""
    if cause.exitcode < 0 and -cause.exitcode not in _CRASHES:
        return ""
    error = re.sub(r"0x[0-9a-f]+|\d{4,}", "#", cause.error_line())
    return shortened(f"{cause.rank} {cause.exitcode} {error}", _MAX_SIGNATURE)
