"""Which lines are coloured, and when."""

from __future__ import annotations

import os

import pytest

from elastic_launch.core.agent.messages import Log
from elastic_launch.core.lines import contained
from elastic_launch.host import console
from elastic_launch.host.console import RED, YELLOW, in_colour, log_line, paint
from elastic_launch.job import Level, LineKind

WISHES = [
    # a terminal, variables, coloured
    (True, {}, True),
    (False, {}, False),
    (True, {"NO_COLOR": "1"}, False),
    (True, {"NO_COLOR": ""}, True),
    (False, {"FORCE_COLOR": "1"}, True),
    (False, {"FORCE_COLOR": ""}, False),
    (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    (True, {"TERM": "dumb"}, False),
    (True, {"TERM": "dumb", "FORCE_COLOR": "1"}, True),
]


@pytest.mark.parametrize(("terminal", "variables", "coloured"), WISHES)
def test_colours_follow_the_terminal_and_the_users_wishes(
    terminal: bool, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: terminal)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert paint("text", RED) == ("\x1b[31mtext\x1b[0m" if coloured else "text")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (Log("a"), "\x1b[33ma\x1b[0m"),
        (Log("a\nb\n"), "\x1b[33ma\x1b[0m\nb\n"),
        (Log("a", Level.INFO), "a"),
        (Log("a", Level.INFO, LineKind.FAILURE), "\x1b[31ma\x1b[0m"),
        (Log("a", kind=LineKind.FAILURE), "\x1b[31ma\x1b[0m"),
        (Log("a", Level.INFO, LineKind.PROGRESS), "a"),
    ],
)
def test_trouble_has_colour(line: Log, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    written: list[str] = []
    with console.log_through(written.append):
        log_line(line, console.log)
    assert written == [shown]


def test_a_programs_own_function_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    written: list[str] = []
    log_line(Log("a"), written.append)
    in_colour(written.append, YELLOW)("b")
    assert written == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (b"plain\n", b"plain\n"),
        (b"\x1b[31mred\n", b"\x1b[31mred\x1b[0m\n"),
        (b"\x1b[31mred\x1b[0m\r\nplain\n", b"\x1b[31mred\x1b[0m\r\nplain\n"),
        (b"\x1b[1;38:5:9mred\x1b[m, \x1b[4mline\r\n", b"\x1b[1;38:5:9mred\x1b[m, \x1b[4mline\x1b[0m\r\n"),
        (b"\x1b[2J\x1b[H\x1b[5Aup\x1b[?25l\x1b7\n", b"up\n"),
        (b"\x1b]0;title\x07text\x1b[", b"text"),
        (b"\x1b" * 5, b""),
    ],
)
def test_a_line_changes_nothing_beyond_its_end_on_a_shared_terminal(lines: bytes, shown: bytes) -> None:
    assert contained(lines) == shown
