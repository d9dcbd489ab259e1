"""Short texts for log lines, reports and file names."""

from __future__ import annotations

import os
from urllib.parse import quote

import pytest

from elastic_launch.core.text import counted, duration, headline, is_loopback, listed, shortened, visible
from elastic_launch.host.console import launcher_line
from elastic_launch.logs.job_files import as_file_name


def test_numbers_have_their_plural() -> None:
    assert [counted(number, "node") for number in (0, 1, 2, 12_480)] == ["0 nodes", "1 node", "2 nodes", "12,480 nodes"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (41.2, "41 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125.0, "2 min 5 s"),
        (720.0, "12 min"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h"),
        (15_000.0, "4 h 10 min"),
        (85_200.0, "23 h 40 min"),
        (172_800.0, "2 d"),
        (187_200.0, "2 d 4 h"),
        (1e8, "1,157 d 10 h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_list_counts_repeated_names_and_the_rest() -> None:
    assert listed(["a", "b", "a"]) == "a (2 nodes), b"
    assert listed(f"h{n}" for n in range(20)) == "h0, h1, h2, h3, h4, h5, h6, h7 and 12 more"


@pytest.mark.parametrize("limit", [10, 11])
def test_a_long_text_keeps_its_ends(limit: int) -> None:
    assert shortened("a" * limit, limit) == "a" * limit
    assert shortened("start" + "-" * 90 + "final", limit) == "start\n... 90 characters left out ...\nfinal"


@pytest.mark.parametrize("text", ["job-1", "a/b", "ü x%", "\udcff", "~_.", "a\nb", "".join(map(chr, range(128)))])
def test_a_file_name_is_percent_encoded(text: str) -> None:
    assert as_file_name(text) == quote(os.fsencode(text), safe="")


def test_no_file_name_is_empty_or_a_directory() -> None:
    assert [as_file_name(text) for text in ("", ".", "..")] == ["_", "_.", "_.."]


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("10.0.0.1", "128.0.0.1", "::", "fe80::1")))


def test_what_is_not_printable_is_made_visible() -> None:
    assert visible("plain \u00e4 \u4e2d") == "plain \u00e4 \u4e2d"
    assert visible("\x1b[2J\x00\x9b\u202e\udcff\r\n\t") == r"\x1b[2J\x00\x9b\u202e\udcff\r\n\t"
    assert visible("a\n\tb\r\n", lines=True) == "a\n\tb\\r\n"


def test_no_line_of_a_text_can_pass_for_one_of_the_launchers() -> None:
    assert launcher_line("lost\nelastic-run: done\x1b") == "elastic-run: lost\n  elastic-run: done\\x1b\n"


def test_a_headline_is_one_line_of_moderate_length() -> None:
    assert headline("boom\nTraceback\n  x\nValueError: y") == "boom ValueError: y"
    assert headline("") == ""
    assert len(headline(f"{'x' * 9000}\n{'y' * 9000}")) == 4001
