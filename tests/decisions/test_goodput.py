"""How a job's time is accounted for: exact numbers by hand, what always holds in random rounds, and how it is told."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.lifecycle import KILL_PATIENCE, AgentState
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    Assigned,
    DeadlineReached,
    Decided,
    Ended,
    Exited,
    Finish,
    GroupReaped,
    LeaseExpired,
    Limits,
    Log,
    ReportRound,
    Signalled,
    Started,
)
from elastic_launch.core.agent.report import format_report
from elastic_launch.core.agent.restart_policy import aged, follow
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.core.progress import goodput
from elastic_launch.core.progress.goodput import RoundProgress, furthest, round_progress, summary, with_round
from elastic_launch.core.rendezvous.records import decode, encode
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment, Decision, End, EndKind, Goodput, Level, LostTime, Policy, RestartHistory

# --- by hand


TWENTY = RoundProgress(21, 105, 125)
FIRST_ROUND = Goodput(21, 20, 5, since=LostTime(1, 2, 4))
"""``TWENTY`` from 100 on; over at 126, gone at 128, as of 132."""


def test_a_round_is_startup_steps_and_what_came_after_the_latest_step() -> None:
    first = with_round(Goodput(), TWENTY, 100, 126, 128, 132)
    assert first == FIRST_ROUND
    assert first.elapsed == 32, "from the assignment to now"


def test_a_restart_costs_the_time_from_the_latest_step_to_the_next_first_one() -> None:
    met = goodput.aged(FIRST_ROUND, 3)
    second = with_round(met, RoundProgress(5, 7004, 7064), 7000, 7065, 7065, 7065)  # on a host with another clock
    assert second == Goodput(26, 80, 5, 1, LostTime(1, 2, 7, 4), since=LostTime(1))
    assert second.lost.total == 14
    assert second.elapsed == 32 + 3 + 65


def test_rounds_without_a_step_are_startup_before_the_first_step_and_lost_after_it() -> None:
    idle = RoundProgress()
    startup = with_round(Goodput(), idle, 100, 101, 103, 104)
    assert startup == Goodput(startup=3, since=LostTime(0, 0, 1))
    assert with_round(startup, TWENTY, 100, 126, 128, 132) == FIRST_ROUND._replace(startup=3 + 1 + 5)
    assert with_round(FIRST_ROUND, idle, 200, 201, 203, 204) == Goodput(
        21, 20, 5, 1, LostTime(1, 2, 4, 3), since=LostTime(0, 0, 1)
    )


def test_a_stall_that_ended_is_no_time_in_steps() -> None:
    stalled = with_round(Goodput(), TWENTY._replace(stalled=8), 100, 126, 128, 132)
    assert stalled == FIRST_ROUND._replace(in_steps=12, stalled=8)


def test_a_round_that_still_runs_is_accounted_for_up_to_now() -> None:
    assert with_round(Goodput(), TWENTY, 100, 127, 127, 127) == Goodput(21, 20, 5, since=LostTime(2))
    before_a_step = with_round(FIRST_ROUND, RoundProgress(), 200, 209, 209, 209)
    assert (before_a_step.restarts, before_a_step.lost.total) == (1, 7 + 9)


@pytest.mark.parametrize(
    ("numbers", "repeated"),
    [
        ([(0, 99), (50, 149)], 50),
        ([(0, 99), (100, 149)], 0),
        ([(0, 99), (150, 199)], 0),
        ([(0, 99), (50, 69), (60, 149)], 20 + 40),
        ([(0, 99), (-1, -1), (90, 99)], 10),
        ([(-1, -1), (0, 9)], 0),
        ([(5, 5), (5, 5), (5, 5)], 2),
    ],
)
def test_steps_are_repeated_up_to_the_highest_number_before(numbers: list[tuple[int, int]], repeated: int) -> None:
    made = Goodput()
    for first, last in numbers:
        made = with_round(made, RoundProgress(1, 1, 2, first, last), 0, 3, 3, 3)
    assert made.repeated == repeated
    assert made.number == max(last for _, last in numbers)


class Counted(NamedTuple):
    """What the memory of a worker holds, as far as it matters here."""

    iterations: int
    first: float = 1.0
    last: float = 2.0
    first_number: int | None = None
    number: int | None = None


def test_the_rank_that_made_most_stands_for_a_round() -> None:
    workers = [Counted(3), Counted(7, 1, 9, 0, 6), Counted(0, 0.0, 0.0)]
    assert round_progress(workers, 2.5) == RoundProgress(7, 1, 9, 0, 6, 2.5)
    assert round_progress([Counted(3)]) == RoundProgress(3, 1, 2)
    assert round_progress([]) == RoundProgress()


def test_of_two_accounts_the_one_that_has_the_latest_round_counts() -> None:
    assert furthest(Goodput(5, 9), Goodput(6, 1)) == furthest(Goodput(6, 1), Goodput(5, 9)) == Goodput(6, 1)
    behind = goodput.aged(FIRST_ROUND, 90)
    complete = with_round(FIRST_ROUND, RoundProgress(), 0, 80, 81, 89)
    assert furthest(behind, complete) == furthest(complete, behind) == complete, "a round without a step"
    assert furthest(FIRST_ROUND, behind) == behind


# --- whatever workers write


@pytest.mark.parametrize(
    "garbage",
    [
        RoundProgress(-5, 105, 125),
        RoundProgress(1 << 63, -1e12, 1e12, 1 << 63, 0, 1e12),
        RoundProgress(7, 125, 105, stalled=-4),
        RoundProgress(7, 1e12, 1e12),
        RoundProgress(7, 0, 0),
    ],
)
def test_what_workers_write_stays_within_their_round(garbage: RoundProgress) -> None:
    made = with_round(FIRST_ROUND, garbage, 100, 126, 128, 132)
    assert min(times(made)) >= 0
    assert made.repeated == 0
    assert made.elapsed == FIRST_ROUND.elapsed + 32
    assert made.in_steps <= FIRST_ROUND.in_steps + 28


def times(made: Goodput) -> tuple[float, ...]:
    return made.in_steps, made.startup, made.stalled, *made.lost, *made.since


def counts(made: Goodput) -> tuple[float, ...]:
    """What can only grow."""
    return made.steps, made.restarts, made.repeated, made.in_steps, made.startup, made.stalled, *made.lost


@pytest.mark.parametrize("block", range(4))
def test_in_any_rounds_no_time_is_lost_or_counted_twice(block: int) -> None:
    steps = 0
    for seed in range(block * 500, (block + 1) * 500):
        chance = random.Random(seed)
        made, elapsed = Goodput(), 0.0

        def some(high: float, chance: random.Random = chance) -> float:
            return round(chance.choice([0.0, chance.uniform(0, high)]), 3)

        for _ in range(chance.randint(1, 8)):
            began = round(chance.uniform(0, 1e6), 3)  # each round is decided on by another host
            first = began + some(50)
            last = first + some(500)
            over = last + some(20)
            gone = over + some(20)
            now = gone + some(9)
            progress = RoundProgress(
                chance.choice([0, chance.randint(1, 999)]),
                first,
                last,
                chance.choice([-1, chance.randrange(99)]),
                chance.randrange(-1, 999),
                some(600),
            )
            if chance.random() < 0.2:  # the memory holds anything
                progress = progress._replace(
                    first=chance.uniform(-1e7, 1e7), last=chance.uniform(-1e7, 1e7), stalled=chance.uniform(-9, 1e7)
                )
            before, made = made, with_round(made, progress, began, over, gone, now)
            elapsed += now - began
            assert all(now >= then for then, now in zip(counts(before), counts(made), strict=True)), f"seed {seed}"
            travel = some(5)
            if made != Goodput():
                elapsed += travel
            history = aged(RestartHistory(goodput=made), travel)
            assert decode(RestartHistory, encode(history), "key") == history
            made = history.goodput
            assert min(times(made)) >= 0, f"seed {seed}"
            assert made.elapsed == pytest.approx(elapsed, abs=0.1), f"seed {seed}"
            assert made.in_steps + made.startup + made.lost.total + made.stalled <= elapsed + 0.1, f"seed {seed}"
        steps += made.steps
    assert steps > 0


def test_an_account_without_any_progress_takes_no_room_in_a_record() -> None:
    history = aged(RestartHistory(1), 60)
    assert encode(history) == b'{"used":1}'
    full = with_round(goodput.aged(FIRST_ROUND, 9.87654321), RoundProgress(99, 0.1, 123.45678, 1, 99, 3.3), 0, 1, 1, 2)
    assert len(encode(RestartHistory(goodput=full))) < 300


# --- in words


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Goodput(), ""),
        (Goodput(startup=60), ""),
        (Goodput(1, 0, 4), "1 step, 0.0 % of 4.0 s in steps"),
        (
            Goodput(12_480, 14_600, 350, 2, LostTime(5, 6, 20, 10), since=LostTime(9)),
            "12,480 steps, 97.3 % of 4 h 10 min in steps, 2 restarts cost 41 s",
        ),
        (
            Goodput(900, 540, 0, 1, LostTime(start=60), 300, 1200),
            "900 steps, 60.0 % of 15 min in steps, 1 restart cost 1 min and 1,200 repeated steps, stalls cost 5 min",
        ),
        (Goodput(5, float("nan")), ""),
        (Goodput(5, float("inf")), ""),
    ],
)
def test_an_account_in_words(made: Goodput, text: str) -> None:
    assert summary(made) == text


# --- in the agent


ASSIGNMENT = Assignment(0, 1, 0, 2, 2, 0, 2, "127.0.0.1", 29500, "host-a", port_picked=False)
MADE = RoundProgress(1001, 1010.0, 1110.0)
"""What workers make that are started at 1000."""


class Agent:
    """An agent that takes part in rounds, on a clock that tests move."""

    def __init__(self, max_restarts: int = 0, past: Goodput = Goodput()) -> None:  # noqa: B008 - a value
        self.now = 1000.0
        self.state: AgentState
        self.state, _ = lifecycle.begin(Limits(Policy(max_restarts), 30))
        self(Assigned(ASSIGNMENT._replace(restart_history=RestartHistory(goodput=past))), Started({0: 100, 1: 101}))

    def __call__(self, *events: AgentEvent) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            self.state, actions = lifecycle.step(self.state, event, self.now)
        return actions

    def ends_well(self, progress: RoundProgress | None) -> tuple[Decision, list[Action]]:
        """Its workers succeed at 1112, are gone at 1113, and the round is decided on at 1115."""
        self.now = 1112
        self(Exited(Exit(0, 0, 1112.0)), Exited(Exit(1, 0, 1112.0)))
        self.now = 1113
        self(GroupReaped({}, progress=progress))
        self.now = 1115
        [report] = self(Ended(End(EndKind.DONE, "all workers succeeded"), 1115.0))
        assert isinstance(report, ReportRound)
        return report.decision, self(Decided(Decision(False)))

    def fails(self, progress: RoundProgress | None) -> Decision:
        """A worker fails at 1112, the other stops at 1113, and the failure is reported at 1115."""
        self.now = 1112
        failure = ProcessFailure(0, 100, 1)
        self(Exited(Exit(0, 1, 1112.0)), Ended(End(EndKind.FAILED, "", failures=(failure,), mine=True), 1112.0))
        self.now = 1113
        self(Exited(Exit(1, -15, 1113.0, (15,))))
        self.now = 1115
        [report] = self(GroupReaped({}, progress=progress))
        assert isinstance(report, ReportRound)
        return report.decision


def test_the_last_line_says_what_a_job_got_done() -> None:
    decision, actions = Agent().ends_well(MADE)
    made = Goodput(1001, 100, 10, since=LostTime(2, 1, 2))
    assert decision.restart_history.goodput == made
    assert actions == [
        Log("done: 2 workers succeeded; 1,001 steps, 87.0 % of 1 min 55 s in steps", Level.INFO),
        Finish(goodput=made),
    ]


@pytest.mark.parametrize("progress", [None, RoundProgress()])
def test_the_last_line_of_a_job_that_counts_no_step_is_short(progress: RoundProgress | None) -> None:
    _, [log, finish] = Agent().ends_well(progress)
    assert log == Log("done: 2 workers succeeded", Level.INFO)
    assert isinstance(finish, Finish)
    assert finish.goodput.steps == 0


def test_rounds_that_nobody_counts_leave_no_account() -> None:
    decision, [_, finish] = Agent().ends_well(None)
    assert (decision, finish) == (Decision(False), Finish())


def test_a_failed_round_is_in_the_history_of_the_next_one() -> None:
    decision = Agent(max_restarts=1, past=FIRST_ROUND).fails(MADE)
    assert decision.restart
    assert decision.restart_history.goodput == Goodput(1022, 120, 5, 1, LostTime(1, 2, 4, 10), since=LostTime(2, 3, 0))


def test_the_report_of_a_failed_job_says_what_it_got_done() -> None:
    agent = Agent(past=FIRST_ROUND)
    decision = agent.fails(MADE)
    [finish] = agent(Decided(decision))
    assert isinstance(finish, Finish)
    report = format_report("train.py", finish, 0, None)
    line = "progress  : 1,022 steps, 81.6 % of 2 min 27 s in steps, 1 restart cost 17 s"
    assert line in report.splitlines()
    assert "progress" not in format_report("train.py", finish._replace(goodput=Goodput()), 0, None)


@pytest.mark.parametrize("theirs", [0, 5000])
def test_the_node_whose_workers_made_most_steps_stands_for_the_job(theirs: int) -> None:
    agent = Agent()
    agent.fails(MADE)
    decision = Decision(False, RestartHistory(goodput=Goodput(theirs, 7)), (ProcessFailure(0, 1, 1),))
    [finish] = agent(Decided(decision))
    assert isinstance(finish, Finish)
    assert finish.goodput.steps == max(theirs, 1001)


def test_a_job_that_a_signal_ends_has_its_account() -> None:
    agent = Agent(past=FIRST_ROUND)
    agent.now = 1110
    agent(Signalled(15, 1110.0), Exited(Exit(0, -15, 0.0, (15,))), Exited(Exit(1, -15, 0.0, (15,))))
    agent.now = 1111
    [finish] = agent(GroupReaped({}, progress=MADE))
    assert isinstance(finish, Finish)
    assert finish.goodput == Goodput(1022, 120, 5, 1, LostTime(1, 2, 4, 10), since=LostTime(0, 1, 0))


def test_workers_that_the_keeper_killed_are_accounted_for() -> None:
    agent = Agent()
    agent.now = 1112
    agent(LeaseExpired(), *(Exited(Exit(rank, -9, 1112.0, (9,))) for rank in (0, 1)))
    agent.now = 1113
    agent(GroupReaped({}, progress=MADE))
    agent.now = 1130
    [*_, report] = agent(Ended(End(EndKind.MEMBERSHIP_CHANGED, "no heartbeat"), 1130.0))
    assert isinstance(report, ReportRound)
    assert report.decision.restart_history.goodput == Goodput(1001, 100, 10, since=LostTime(2, 1, 17))


def test_workers_that_cannot_be_killed_are_accounted_for() -> None:
    agent = Agent()
    agent.now = 1110
    agent(Exited(Exit(0, 1, 1110.0)), Ended(End(EndKind.FAILED, "", mine=True), 1110.0))
    for _ in range(2):  # the stacks, then SIGKILL
        agent(DeadlineReached())
    agent.now += KILL_PATIENCE
    report = agent(DeadlineReached(progress=MADE))[-1]
    assert isinstance(report, ReportRound)
    assert report.decision.restart_history.goodput == Goodput(1001, 100, 10, since=LostTime(0, KILL_PATIENCE, 0))


def test_whatever_is_decided_keeps_the_account() -> None:
    history = RestartHistory(goodput=FIRST_ROUND)
    failure = (ProcessFailure(0, 100, 1, error="EADDRINUSE: 29501", rank=0),)
    decisions = {
        "done": follow(Policy(1), history, (), "n"),
        "restart": follow(Policy(1, window=9), history, failure, "n"),
        "port": follow(Policy(1), history, failure, "n", port=29501),
        "used up": follow(Policy(0), history, failure, "n"),
        "fatal": follow(Policy(1, fatal_exit_codes=frozenset({1})), history, failure, "n"),
        "crash loop": follow(Policy(1, crash_loop=1), history, failure, "n"),
    }
    assert [decision.restart for decision in decisions.values()] == [False, True, True, False, False, False]
    assert decisions["port"].restart_history.uncharged == 1
    assert decisions["crash loop"].why.startswith("crash loop")
    assert {decision.restart_history.goodput for decision in decisions.values()} == {FIRST_ROUND}
