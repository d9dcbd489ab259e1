"""Records that strangers write, and how jobs end after that."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.records import NodeRecord, Unfit, encode
from elastic_launch.core.store_requests import Set
from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Decision, End, EndKind, Policy
from tests.support.simulation import World
from tests.support.worlds import form, world

DEADLINE = 15.0
FAILURE = ProcessFailure(0, 7, 1, error="ValueError: boom", rank=3, host="elsewhere", failed_at=1.5)


def job(low: int, high: int, policy: Policy = Policy(3), **settings: float) -> Settings:  # noqa: B008 - a value
    return Settings("job", low, high, last_call_timeout=10, policy=policy, **settings)  # type: ignore[arg-type]


def forge(made: World, name: str, record: NamedTuple | bytes, **changes: Any) -> None:
    """Write to the store, as anybody can who reaches it: a record, with other values in some fields."""
    data = record if isinstance(record, bytes) else encode(record)
    if changes:
        data = json.dumps({**json.loads(data), **changes}).encode()
    made.store.apply(Set(((f"elastic/job/{name}", data),)), lambda reply: None)


def formed(count: int, settings: Settings, token: bytes = b"") -> World:
    made = world(count, settings, token=token)
    form(made, count)
    made.run(made.now + 2)
    return made


def finishes(made: World) -> list[Finish]:
    """How the agents end, within the time in which a loss is noticed, a round ends, and a decider is replaced."""
    made.run(made.now + 4 * DEADLINE, stop=lambda: not made.live())
    assert not made.live(), f"{made}: {[agent.node.phase for agent in made.live()]}"
    return [agent.finish for agent in made.agents if agent.finish is not None]


def refused(made: World, key: str, rule: str) -> None:
    """Everybody ends with status 69, and with a line that names the key and the rule."""
    ends = finishes(made)
    assert [(end.status, end.failures, end.signum) for end in ends] == [(69, (), None)] * len(ends), ends
    assert any(f"elastic/job/{key} " in end.error and rule in end.error for end in ends), ends


DONE = End(EndKind.DONE, "all workers succeeded")
STOP = End(EndKind.STOP, "stop", signum=15)
ERROR = End(EndKind.ERROR, "broken", status=1)
FAILED = End(EndKind.FAILED, "rank 3 failed", "node-1", failures=(FAILURE,))
FINAL = Decision(False, failures=(FAILURE,))
NONSENSE = b'{"kind":'
STRANGER = NodeRecord("nobody", "elsewhere", 1, 2, "default")
SICK = Unfit(STRANGER, "the fan is loud")
