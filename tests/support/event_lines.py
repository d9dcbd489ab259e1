"""The events that a job has written, checked against the tables of ``docs/events.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "events.md"
FAILURE = ("rank", "local_rank", "host", "worker_pid", "exitcode", "how", "failed_at", "error")
"""The fields of a failure that the page explains as fields of events; those of its last table follow."""


def _rows(section: str) -> list[list[str]]:
    """The rows of the tables in a part of the page, without heads."""
    found = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found if not set("".join(row)) <= {"-"}]


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _tables() -> tuple[dict[str, list[str]], dict[str, str], dict[str, str], dict[str, str]]:
    """Return the fields of each event, the type of each field, a failure's own fields, and those of a goodput."""
    events, fields = PAGE.read_text().split("## The events\n")[1].split("## The fields\n")
    common, *rows = _rows(events)[1:]
    common_fields = _names(common[3])
    kinds = {_names(name)[0]: [*common_fields, *_names(cell)] for name, _, _, cell in rows}
    sections = re.split(r"^A \*", fields, flags=re.MULTILINE)
    types, failure, goodput = ({_names(row[0])[0]: row[1] for row in _rows(section)[1:]} for section in sections)
    return kinds, types, failure, goodput


EVENTS, TYPES, _OF_FAILURE, GOODPUT_TYPES = _tables()
FAILURE_TYPES = {name: TYPES[name] for name in FAILURE} | _OF_FAILURE


def _is_object(types: dict[str, str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and not problems_of(value, list(types), types)


_IS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "null": lambda value: value is None,
    "failure": _is_object(FAILURE_TYPES),
    "goodput": _is_object(GOODPUT_TYPES),
}


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("list of "):
        return isinstance(value, list) and all(_fits(each, kind.removeprefix("list of ")) for each in value)
    return any(_IS[one](value) for one in kind.split(" or "))


def problems_of(found: dict[str, Any], names: list[str], types: dict[str, str]) -> list[str]:
    """Return what is wrong with an object that should have these fields, of these types."""
    wrong = [f"no {name}" for name in names if name not in found]
    wrong += [f"{name} is not on the page" for name in found if name not in names]
    return wrong + [
        f"{name}={value!r} is no {types[name]}"
        for name, value in found.items()
        if name in names and not _fits(value, types[name])
    ]


def check(event: dict[str, Any]) -> None:
    """Check one event against the page."""
    name = event.get("name")
    assert name in EVENTS, f"{name!r} is not on the page"
    assert not problems_of(event, EVENTS[name], TYPES), event
    assert event["scope"] in ("job", "node")
    assert event["level"] in ("warning", "info", "debug", None)


def events_in(*paths: Path) -> list[dict[str, Any]]:
    """Return the events in files, each of which is on the page."""
    events = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    for event in events:
        check(event)
    return events


def names(events: list[dict[str, Any]]) -> list[str]:
    """Return the events' names, without messages."""
    return [event["name"] for event in events if event["name"] != "message"]
