"""Anything at all on the command line, in variables, in the file of ``--config``, and in ``--rdzv-conf``."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_launch.cli.options import OPTIONS
from elastic_launch.config import LaunchConfig
from elastic_launch.core.text import visible
from elastic_launch.errors import UsageError
from elastic_launch.rendezvous.factory import SETTINGS, create_rendezvous
from elastic_launch.run import config_from_args, parse_args
from tests.support.nonsense import TEXT, one_line

ODD = [
    *("", " ", "0", "1", "-1", "2:1", "1:2", "\N{SUPERSCRIPT TWO}", "\N{FULLWIDTH DIGIT ONE}", "1_000", "0x10", " 8"),
    *("nan", "inf", "-inf", "nan:inf", "1e-9", "1e400", "9" * 400, "9" * 5000, "1.5", "true", "\x1b[2J", "a\nb"),
    *("\udc80", "a=b", "=", "a=,b", ",", ",,", ":", "[", "[::1]:70000", "0:1,0:2", "0:9", "SIGKILL", "'", "\\"),
]
VALUES = TEXT.map(lambda text: text.replace("\0", "")) | st.sampled_from(ODD)
NAMED = {option.name: option for option in OPTIONS}
HARMLESS = [name for name in NAMED if name not in ("config", "logs-specs")]  # those name a file, and code
CONF_NAMES = st.sampled_from([*SETTINGS, "rank", "protocol", "cacert", "unknown"])


@pytest.fixture(autouse=True, scope="module")
def _script(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with contextlib.chdir(tmp_path_factory.mktemp("job")):
        Path("train.py").touch()
        yield


def outcome(words: list[str], variables: dict[str, str]) -> None:
    """A command line has settings, perhaps with warnings of one line each, or is refused in one line with status 2."""
    err = io.StringIO()
    refused = ""
    status: str | int | None = 2
    with (
        mock.patch.dict(os.environ, variables),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            config_from_args(parse_args([*words, "train.py"]))
        except UsageError as error:
            refused = visible(str(error))  # as elastic-run shows it
        except SystemExit as end:
            status, refused = end.code, err.getvalue().removesuffix("\n").rpartition("\n")[2] or "\n"
    if refused:
        assert one_line(refused, 6000)
    assert status == 2
    assert all(one_line(line, 6000) for line in err.getvalue().splitlines())


@given(st.sampled_from(OPTIONS), VALUES)
@example(NAMED["restart-backoff"], "nan:inf")
@example(NAMED["nnodes"], "9" * 400)
def test_any_text_as_the_value_of_an_option(option: Any, text: str) -> None:
    complaint = "-"
    try:
        option.read(text)
    except UsageError as error:
        complaint = str(error)
    assert one_line(complaint, 6000)  # values are quoted


@given(st.dictionaries(st.sampled_from(HARMLESS), VALUES, max_size=3), st.booleans())
@example({"redirects": "0:1,0:2"}, False)
@example({"redirects": "2:1"}, False)
@example({"rdzv-conf": "a\nb"}, False)
@example({"role": "\x1b[2J", "nproc-per-node": "\x1b[2J"}, True)
def test_any_values_on_the_command_line_and_in_variables(values: dict[str, str], as_variables: bool) -> None:
    if as_variables:
        outcome(
            [],
            {
                NAMED[name].variable: os.fsencode(value.encode("utf-8", "replace")).decode()
                for name, value in values.items()
            },
        )
    else:
        outcome([f"--{name}={value}" for name, value in values.items()], {})


@given(st.lists(VALUES, max_size=4))
@example(["--no", "-\x1b", "--=", "-r"])
@example(["--unknown\n"])
def test_any_words_before_the_script(words: list[str]) -> None:
    if not any(word.startswith(("--com", "--c", "--log")) for word in words):
        outcome(words, {})


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{{{}}}".format(", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()))
    if isinstance(value, str):
        return '"{}"'.format("".join(f"\\U{ord(it):08x}" for it in value))
    return str(value)


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOML = st.recursive(
    st.booleans() | st.integers() | st.floats() | PLAIN | st.sampled_from(["nan", "1:2", "2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=5,
)


def with_file(content: bytes) -> None:
    Path("job.toml").write_bytes(content)
    outcome(["--config=job.toml"], {})


@given(st.binary(max_size=100))
@example(b"role = " + b"[" * 100_000)
@example(b"role = 0x" + b"f" * 5000)
@example(b"nnodes = " + b"9" * 5000)
@example(b'"\\u001b[2J\\n" = 1')
@example(b'args = ["\\u0000"]')
@example(b'role = "\\u0000"')
@example(b"role = 1979-05-27")
@example(b"a.b.c = 1\na.b = 2")
@example(b"rdzv-conf = {" + b"a." * 5000 + b"a = 1}")
@example(b"\xff\xfe")
def test_any_bytes_as_a_file_of_options(content: bytes) -> None:
    with_file(content)


@given(
    st.dictionaries(
        st.sampled_from([*HARMLESS, "logs-specs", "script", "args", "config", "nnodes_", "r"]), TOML, max_size=3
    )
)
@example({"rdzv-conf": {"\n": "\x1b"}})
@example({"rdzv-conf": {"a": {"b": 1}}})
@example({"duplicate-stdout-filters": ["\0"]})
def test_any_values_in_a_file_of_options(values: dict[str, Any]) -> None:
    with_file("".join(f"{toml(name)} = {toml(value)}\n" for name, value in values.items()).encode())


@given(
    st.sampled_from(["c10d", "static", "etcd"]),
    st.dictionaries(CONF_NAMES, VALUES | st.floats() | st.integers() | st.none(), max_size=3),
    VALUES | st.just("localhost:29400"),
)
@example("c10d", {"keep_alive_interval": "1e-9"}, "localhost")
@example("c10d", {"keep_alive_max_attempt": "9" * 18, "keep_alive_interval": "1e308"}, "localhost")
@example("c10d", {"rank": "9" * 400}, "localhost")
@example("etcd", {"embedded": "true", "join_timeout": "1e308"}, "a:1,b:65535")
@example("c10d", {"unknown": "\x1b[2J"}, "local\x1b[2Jhost")
def test_any_settings_of_a_rendezvous(backend: str, conf: dict[str, Any], endpoint: str) -> None:
    lines: list[str] = []
    try:
        config = LaunchConfig(2, 2, 1, run_id="j", rdzv_backend=backend, rdzv_endpoint=endpoint, rdzv_configs=conf)
        create_rendezvous(config, {}, lines.append)
    except UsageError as error:
        lines.append(str(error))
    assert all(one_line(visible(line), 6000) for line in lines)


@given(TEXT, TEXT, st.integers(-2, 5))
def test_any_text_as_a_setting_from_python(backoff: str, codes: str, restarts: int) -> None:
    with contextlib.suppress(UsageError):
        config = LaunchConfig(1, 1, 1, max_restarts=restarts, restart_backoff=backoff, fatal_exit_codes=codes)
        assert config.policy.backoff <= config.policy.backoff_limit < float("inf")
