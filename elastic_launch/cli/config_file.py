"""Read the file of ``--config``: options by their long names, in TOML, and the script with its arguments.

script = "train.py"
args = ["--epochs", 10]
nnodes = "2:4"
max-restarts = 3
fatal-exit-codes = [2, "64-78"]
[rdzv-conf]
join_timeout = 600
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from elastic_launch.errors import UsageError

if TYPE_CHECKING:
    from elastic_launch.cli.options import Option

SCRIPT, ARGUMENTS = "script", "args"
"""The keys that are not options."""
NOT_IN_FILES = ("config", "dry-run")
"""Options that say what to do with a command line, not how the job runs."""
TABLES = ("rdzv-conf",)
"""Options whose ``KEY=VALUE,...`` may be a table."""
TEXT_LISTS = ("duplicate-stdout-filters", "duplicate-stderr-filters")
"""Options that take a list of texts, in which a comma is doubled."""
LISTS = (
    *TABLES,
    *TEXT_LISTS,
    *("rdzv-endpoint", "fatal-exit-codes", "signals-to-handle", "preload", "redirects", "tee", "local-ranks-filter"),
)
"""Options that take values separated by commas, which may be a list."""
MAX_SIZE = 1 << 20
"""Bytes of a file."""


class ConfigFile(NamedTuple):
    """What a file holds."""

    path: str
    values: dict[str, str | bool]
    """The options by attribute name: flags as booleans, all others as the text that the command line would have."""
    command: list[str]
    """The script and its arguments; empty if the file names no script."""


def read(path: str, source: str, options: Sequence[Option]) -> ConfigFile:
    """Read a file.

    Args:
        path: its path.
        source: what names it, for messages: ``--config`` or ``PET_CONFIG``.
        options: the options that it may have.

    Raises:
        UsageError: it cannot be read, has an unknown key, or a value of a wrong type.
    """
    import tomllib  # late, like this module

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIZE + 1)
        if len(data) > MAX_SIZE:
            raise UsageError(f"{source}={path}: must have at most {MAX_SIZE:,} bytes")
        content = tomllib.loads(data.decode())
        repr(content)  # what can be read may still be nested too deeply, or have too many digits, to be shown
    except OSError as error:
        raise UsageError(f"{source}={path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError, or not UTF-8, or an integer with too many digits
        raise UsageError(f"{source}={path}: not a TOML file: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{source}={path}: its values are nested too deeply") from error
    by_name = {option.name: option for option in options if option.name not in NOT_IN_FILES}
    values: dict[str, str | bool] = {}
    for key, value in content.items():
        if key in (SCRIPT, ARGUMENTS):
            continue
        option = by_name.get(key) or by_name.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(_unknown(path, key, [SCRIPT, ARGUMENTS, *by_name]))
        if option.dest in values:
            raise UsageError(f"{path}: {option.name} is given twice, with dashes and with underscores")
        values[option.dest] = text = _value(path, option, value)
        if isinstance(text, str) and "\0" in text:
            raise UsageError(f"{path}: {option.name}={_shown(value)}: must not contain a NUL character")
    return ConfigFile(path, values, _command(path, content))


def _command(path: str, content: dict[str, Any]) -> list[str]:
    script, arguments = content.get(SCRIPT), content.get(ARGUMENTS, [])
    if not isinstance(script, str | None) or script == "":
        raise UsageError(f"{path}: {SCRIPT}={_shown(script)}: must be a text, the path of the script")
    texts = _texts(arguments)
    if texts is None:
        raise UsageError(f"{path}: {ARGUMENTS}={_shown(arguments)}: must be a list of texts and numbers")
    if "\0" in "".join([script or "", *texts]):
        raise UsageError(f"{path}: {SCRIPT} and {ARGUMENTS} must not contain a NUL character")
    return [script, *texts] if script else []


def _value(path: str, option: Option, value: Any) -> str | bool:
    """Return the option's value as the command line would have it."""
    if option.is_flag:
        if isinstance(value, bool):
            return value
        allowed = "true or false"
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif option.name not in LISTS:
        allowed = f"a number or a text, as in --{option.name} {option.metavar}"
    else:
        is_table = isinstance(value, dict) and option.name in TABLES
        texts = _texts([*value.values()] if is_table else value)
        if texts is not None:
            texts = [f"{key}={text}" for key, text in zip(value, texts, strict=True)] if is_table else texts
            return ",".join(text.replace(",", ",,") if option.name in TEXT_LISTS else text for text in texts)
        allowed = f"a list{' or a table' if option.name in TABLES else ''}, or a text as in --{option.name} "
        allowed += option.metavar
    raise UsageError(f"{path}: {option.name}={_shown(value)}: must be {allowed}")


def _texts(values: Any) -> list[str] | None:
    """Return a list of texts and numbers as texts; None if it is something else."""
    if not isinstance(values, list) or not all(isinstance(each, str | int | float) for each in values):
        return None
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values]


def _shown(value: Any) -> str:
    """Return a value as the file may have it, at most 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unknown(path: str, key: str, known: Sequence[str]) -> str:
    import difflib  # late: for this message only

    near = difflib.get_close_matches(key.replace("_", "-"), known, 1)
    hint = f"did you mean {near[0]}?" if near else "must be an option's long name without the dashes, script or args"
    return f"{path}: unknown key {key}: {hint}"
