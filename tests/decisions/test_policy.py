"""When a job restarts: its budget and window, back-off, fatal statuses, crash loops, bad nodes."""

from __future__ import annotations

import signal

import pytest

from elastic_launch.core.agent.restart_policy import BACK_TO_BACK, UNCHARGED_RESTARTS, aged, follow, is_deprioritized
from elastic_launch.errors import ExitCode, ProcessFailure, signal_name
from elastic_launch.job import Decision, HangAction, Policy, RestartHistory


def failure(rank: int = 0, exitcode: int = 1, error: str = "ValueError: boom") -> tuple[ProcessFailure, ...]:
    return (ProcessFailure(rank, 100, exitcode, error=error, failed_at=0.0, rank=rank, host="host-a"),)


class Job:
    """A job that fails again and again. Each call is a failure some seconds after the last one."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.history = RestartHistory()

    def __call__(self, after: float, *, rank: int = 0, exitcode: int = 1, error: str = "", node: str = "n") -> Decision:
        decision = follow(self.policy, aged(self.history, after), failure(rank, exitcode, error), node)
        self.history = decision.restart_history
        return decision


def test_restarts_are_used_up() -> None:
    job = Job(Policy(2))
    assert [job(100).restart for _ in range(3)] == [True, True, False]
    assert job.history.used == 2


def test_thousands_of_restarts_do_not_overflow_the_pause() -> None:
    for backoff in (0.0, 1.0):
        decision = follow(Policy(9999, backoff=backoff, backoff_limit=300), RestartHistory(9998), failure(), "n")
        assert (decision.restart, decision.pause) == (True, 300 * backoff)


@pytest.mark.parametrize(
    ("action", "restarts"), [(HangAction.REPORT, True), (HangAction.RESTART, True), (HangAction.STOP, False)]
)
def test_a_hang_may_end_the_job_although_restarts_are_left(action: HangAction, restarts: bool) -> None:
    policy = Policy(3, hang_action=action)
    hang = ProcessFailure(0, 100, ExitCode.HANG, error="it loops", is_hang=True)
    assert follow(policy, RestartHistory(), (hang,), "n").restart is restarts
    assert follow(policy, RestartHistory(), failure(), "n").restart


def test_a_round_without_failures_ends_the_job() -> None:
    assert follow(Policy(3), RestartHistory(1), (), "n") == Decision(False, RestartHistory(1))


def test_failures_older_than_the_window_are_forgotten() -> None:
    job = Job(Policy(2, window=60))
    assert all(job(31).restart for _ in range(20)), "never three of them within the window"
    assert job.history.used == 2
    assert [job(5, rank=n).restart for n in (1, 2)] == [False, False], "now there are"


def test_without_a_window_no_failure_is_forgotten() -> None:
    job = Job(Policy(2))
    assert [job(1e6).restart for _ in range(3)] == [True, True, False]


def test_pauses_double_up_to_the_limit() -> None:
    job = Job(Policy(9, backoff=1, backoff_limit=5))
    assert [job(100).pause for _ in range(5)] == [1, 2, 4, 5, 5]


def test_pauses_are_short_again_once_failures_are_forgotten() -> None:
    job = Job(Policy(9, window=60, backoff=1, backoff_limit=5))
    assert [job(10).pause, job(10).pause, job(100).pause] == [1, 2, 1]


def test_fatal_statuses_are_those_of_a_shell() -> None:
    job = Job(Policy(9, fatal_exit_codes=frozenset({2, 137})))
    assert job(100, exitcode=1).restart
    assert job(100, exitcode=2) == Decision(
        False, aged(RestartHistory(1, 0, (0,), "0 1 ", 1, "n", 1), 100), failure(0, 2, ""), why=job(0, exitcode=2).why
    )
    assert job(0, exitcode=2).why == "exit status 2 is fatal (--fatal-exit-codes)"
    assert job(0, exitcode=-9).why == "exit status 137 is fatal (--fatal-exit-codes)"


def test_a_crash_loop_ends_the_job() -> None:
    job = Job(Policy(99))
    decisions = [job(1, rank=3, error="KeyError: 'lr'") for _ in range(3)]
    assert [decision.restart for decision in decisions] == [True, True, False]
    assert decisions[-1].why == (
        "crash loop: rank 3 failed 3 times in a row in the same way within 10 s of each other "
        "(--crash-loop=3; 0 turns this off)"
    )


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_a_crash_loop_is_as_long_as_the_policy_says(limit: int) -> None:
    job = Job(Policy(99, crash_loop=limit))
    assert [job(1).restart for _ in range(limit)] == [True] * (limit - 1) + [False]


def test_without_a_limit_there_is_no_crash_loop() -> None:
    job = Job(Policy(99, crash_loop=0))
    assert all(job(1).restart for _ in range(99))


CRASHES = {"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"}


@pytest.mark.parametrize("signum", sorted(signal.valid_signals()))
def test_only_a_signal_of_its_own_making_counts_as_a_crash(signum: int) -> None:
    job = Job(Policy(99))
    is_crash = signal_name(signum) in CRASHES
    assert [job(1, exitcode=-signum).restart for _ in range(3)] == [True, True, not is_crash]


@pytest.mark.parametrize("exitcode", [1, 2, 42, 126, 127, 137, 255])
def test_every_exit_status_counts_as_a_crash(exitcode: int) -> None:
    job = Job(Policy(99))
    assert [job(1, exitcode=exitcode).restart for _ in range(3)] == [True, True, False]


def test_a_worker_killed_from_outside_interrupts_a_crash_loop() -> None:
    job = Job(Policy(99))
    job(1), job(1), job(1, exitcode=-signal.SIGKILL)
    assert [job(1).restart for _ in range(3)] == [True, True, False]


def test_different_failures_and_long_runs_are_no_crash_loop() -> None:
    job = Job(Policy(99))
    assert all(job(1, rank=n % 2).restart for n in range(10)), "different ranks"
    assert all(job(1, exitcode=1 + n % 2).restart for n in range(10)), "different statuses"
    assert all(job(1, error=f"ValueError: {'ab'[n % 2]}").restart for n in range(10)), "different errors"
    assert all(job(BACK_TO_BACK + 1).restart for _ in range(10)), "they run for a while"


def test_errors_that_differ_only_in_a_long_number_are_the_same() -> None:
    job = Job(Policy(99))
    decisions = [job(1, error=f"RuntimeError: <Net at 0x7f{n}a8> of pid {4711 + n}") for n in range(3)]
    assert not decisions[-1].restart


def test_a_taken_port_uses_up_no_restart_a_few_times() -> None:
    history, taken = RestartHistory(), failure(0, 1, "EADDRINUSE: port 29501")
    for count in range(1, UNCHARGED_RESTARTS + 1):
        decision = follow(Policy(0), history, taken, "n", port=29501)
        history = decision.restart_history
        assert (decision.restart, history) == (True, RestartHistory(uncharged=count))
    assert not follow(Policy(0), history, taken, "n", port=29501).restart
    for error in ("EADDRINUSE: port 29501", "EADDRINUSE: port 29501, is_master=(rank == 0)"):
        assert not follow(Policy(0), RestartHistory(), failure(0, 1, error), "n").restart, "the user chose the port"


def test_a_node_that_cannot_go_on_ends_the_job() -> None:
    assert not follow(Policy(3), RestartHistory(), failure(), "n", may_restart=False).restart


def test_a_node_is_deprioritized_after_so_many_failures_in_a_row() -> None:
    policy = Policy(99, node_failure_limit=2)
    job = Job(policy)
    job(100, node="a", rank=1)
    assert not is_deprioritized(policy, job.history, "a")
    job(100, node="a", rank=2)
    assert is_deprioritized(policy, job.history, "a")
    assert not is_deprioritized(policy, job.history, "b")
    job(100, node="b")
    assert not is_deprioritized(policy, job.history, "a")
    assert not is_deprioritized(Policy(99), job.history, "b"), "the policy has no limit"
