"""The record by which all nodes hear of a verdict."""

from __future__ import annotations

from typing import NamedTuple

from elastic_launch.core.progress.verdict import Verdict
from elastic_launch.core.rendezvous.records import RULES, record_of
from elastic_launch.core.rendezvous.rules import Rules, each, flag, line, lines, whole

MAX_TEXT = 60_000
"""Characters of the merged stacks that the other nodes get to see."""
_RANKS = 1 << 18
"""Most ranks that are blamed."""


class Judgement(NamedTuple):
    """A verdict, and what follows from it."""

    verdict: Verdict
    blamed: int
    """The rank whose failure it is if the hang counts as one."""
    text: str
    """The merged stacks."""


_RANK = whole(0, 2**31)
RULES |= {
    Verdict: Rules(
        4 << 20,
        {"ranks": each(_RANK, _RANKS), "why": line(4000), "place": line(2000), "certain": flag, "kind": line(100)},
    ),
    Judgement: Rules(
        4 << 20,
        {"verdict": record_of(Verdict), "blamed": whole(-1, 2**31), "text": lines(MAX_TEXT + 100)},
    ),
}
