"""The record by which all nodes hear of a verdict."""

from __future__ import annotations

from typing import NamedTuple

from elastic_launch.core.progress.verdict import Verdict


class Judgement(NamedTuple):
    """A verdict, and what follows from it."""

    verdict: Verdict
    blamed: int
    """The rank whose failure it is if the hang counts as one."""
    text: str
    """The merged stacks."""
