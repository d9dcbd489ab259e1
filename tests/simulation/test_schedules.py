"""The search through many schedules: it finds what fails, and what of it is needed."""

from __future__ import annotations

import pytest

import tests.simulation.__main__ as search
from elastic_launch.core.rendezvous.messages import Settings
from tests.simulation.__main__ import KINDS, Failure, Kind
from tests.support.simulation import World


def broken(seed: int) -> None:
    """Five faults, of which two together do harm; one node."""
    made = World(seed, Settings("job", 2, 2))
    made.add()
    happened: set[int] = set()
    for number in range(5):
        made.fault(number, lambda number=number: happened.add(number))  # type: ignore[misc]
    made.run(made.now + 10)
    assert not {1, 3} <= happened, f"{made}: happened: {happened}"


@pytest.fixture
def _one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "broken", Kind(broken, 1))


@pytest.mark.usefixtures("_one_that_fails")
def test_a_failure_is_reduced_to_the_faults_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    failure = search.attempt(Failure("broken", 7))
    assert failure
    smallest = search.shrink(failure)
    assert smallest.command() == "python -m tests.simulation again broken 7 calm 0 2 4"
    assert "happened: {1, 3}" in smallest.text
    assert search.again("broken", 7, ["calm", "0", "2", "4"]) == 1
    assert search.again("broken", 7, ["3"]) == 0
    assert "host-0:\n" in capsys.readouterr().out


@pytest.mark.usefixtures("_one_that_fails")
def test_the_search_ends_with_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "kind_of", lambda seed: "broken" if seed == 150 else "events")
    assert search.main(400, 0, processes=1) == 1
    assert "broken, seed 150: failed" in capsys.readouterr().out


def test_every_kind_is_played(capsys: pytest.CaptureFixture[str]) -> None:
    assert {search.kind_of(seed) for seed in range(100)} == {*KINDS}
    assert search.main(20, 0, processes=1) == 0
    assert "20 schedules passed" in capsys.readouterr().out
