"""When a job restarts: the budget, its window, back-off, fatal statuses, crash loops, bad nodes."""

from __future__ import annotations

from elastic_launch.core.agent.restart_policy import CRASH_LOOP, NO_TIME, aged, follow, stands_aside
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Decision, Policy, RestartHistory


def failure(rank: int = 0, exitcode: int = 1, error: str = "ValueError: boom") -> tuple[ProcessFailure, ...]:
    return (ProcessFailure(rank, 100, exitcode, error=error, rank=rank, host="host-a"),)


class Job:
    """A job that fails again and again, a while after each start."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.restart_history = RestartHistory()

    def __call__(self, after: float, *, rank: int = 0, exitcode: int = 1, error: str = "", node: str = "n") -> Decision:
        decision = follow(self.policy, aged(self.restart_history, after), failure(rank, exitcode, error), node)
        self.restart_history = decision.restart_history
        return decision


def test_the_budget_is_counted_down() -> None:
    job = Job(Policy(2))
    assert [job(100).restart for _ in range(3)] == [True, True, False]
    assert job.restart_history.used == 2


def test_thousands_of_restarts_are_as_good_as_one() -> None:
    for backoff in (0.0, 1.0):
        decision = follow(Policy(9999, backoff=backoff, backoff_limit=300), RestartHistory(9998), failure(), "n")
        assert (decision.restart, decision.pause) == (True, 300 * backoff)


def test_a_round_without_failures_is_the_end() -> None:
    assert follow(Policy(3), RestartHistory(1), (), "n") == Decision(False, RestartHistory(1))


def test_failures_older_than_the_window_are_forgotten() -> None:
    job = Job(Policy(2, window=60))
    assert all(job(31).restart for _ in range(20)), "never three of them within a minute"
    assert job.restart_history.used == 2
    assert [job(5, rank=n).restart for n in (1, 2)] == [False, False], "but now"


def test_without_a_window_none_is_forgotten() -> None:
    job = Job(Policy(2))
    assert [job(1e6).restart for _ in range(3)] == [True, True, False]


def test_pauses_double_up_to_the_limit() -> None:
    job = Job(Policy(9, backoff=1, backoff_limit=5))
    assert [job(100).pause for _ in range(5)] == [1, 2, 4, 5, 5]


def test_pauses_become_short_again_when_failures_are_forgotten() -> None:
    job = Job(Policy(9, window=60, backoff=1, backoff_limit=5))
    assert [job(10).pause, job(10).pause, job(100).pause] == [1, 2, 1]


def test_fatal_statuses_are_those_that_a_shell_shows() -> None:
    job = Job(Policy(9, fatal_exit_codes=frozenset({2, 137})))
    assert job(100, exitcode=1).restart
    assert job(100, exitcode=2) == Decision(
        False, aged(RestartHistory(1, 0, (0,), "0 1 ", 1, "n", 1), 100), failure(0, 2, ""), why=job(0, exitcode=2).why
    )
    assert job(0, exitcode=2).why == "exit status 2 is fatal (--fatal-exit-codes)"
    assert job(0, exitcode=-9).why == "exit status 137 is fatal (--fatal-exit-codes)"


def test_the_same_failure_with_no_time_in_between_is_a_crash_loop() -> None:
    job = Job(Policy(99))
    verdicts = [job(1, rank=3, error="KeyError: 'lr'") for _ in range(CRASH_LOOP)]
    assert [decision.restart for decision in verdicts] == [True] * (CRASH_LOOP - 1) + [False]
    assert "crash loop: rank 3 failed 3 times in a row" in verdicts[-1].why


def test_other_failures_and_long_runs_are_no_crash_loop() -> None:
    job = Job(Policy(99))
    assert all(job(1, rank=n % 2).restart for n in range(10)), "different ranks"
    assert all(job(1, error=f"ValueError: {'ab'[n % 2]}").restart for n in range(10)), "different errors"
    assert all(job(NO_TIME + 1).restart for _ in range(10)), "they run for a while"


def test_errors_that_differ_in_a_number_only_are_the_same() -> None:
    job = Job(Policy(99))
    verdicts = [job(1, error=f"RuntimeError: <Net at 0x7f{n}a8> of pid {4711 + n}") for n in range(3)]
    assert not verdicts[-1].restart


def test_a_port_that_was_taken_is_free_of_charge_a_few_times() -> None:
    restart_history, taken = RestartHistory(), failure(0, 1, "EADDRINUSE: port 29501")
    for count in (1, 2, 3):
        decision = follow(Policy(0), restart_history, taken, "n", port=29501)
        restart_history = decision.restart_history
        assert (decision.restart, restart_history) == (True, RestartHistory(uncharged=count))
    assert not follow(Policy(0), restart_history, taken, "n", port=29501).restart
    assert not follow(Policy(0), RestartHistory(), taken, "n", port=0).restart, "the user chose it"


def test_a_node_that_cannot_go_on_ends_the_job() -> None:
    assert not follow(Policy(3), RestartHistory(), failure(), "n", may_restart=False).restart


def test_a_node_stands_aside_when_it_caused_so_many_failures_in_a_row() -> None:
    policy = Policy(99, node_failure_limit=2)
    job = Job(policy)
    job(100, node="a", rank=1)
    assert not stands_aside(policy, job.restart_history, "a")
    job(100, node="a", rank=2)
    assert stands_aside(policy, job.restart_history, "a")
    assert not stands_aside(policy, job.restart_history, "b")
    job(100, node="b")
    assert not stands_aside(policy, job.restart_history, "a")
    assert not stands_aside(Policy(99), job.restart_history, "b"), "nobody asked for it"
