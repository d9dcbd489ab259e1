"""What the fuzz tests have in common."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

TEXT = st.text(st.characters(codec=None, categories=None), max_size=30)  # with surrogates
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**400, 2**63, -1, 256, 1e308])
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=10
)


def one_line(text: str, limit: int = 1000) -> bool:
    """Whether a text is one line for people: short, and without what could control a terminal."""
    return 0 < len(text) <= limit and text.isprintable()


def run_machine(machine: type[RuleBasedStateMachine]) -> None:
    """Try sequences of rules: fewer than other tests try examples, because each takes as long as twenty of those."""
    count = max(5, settings().max_examples // 20)
    run_state_machine_as_test(machine, settings=settings(max_examples=count, stateful_step_count=20))
