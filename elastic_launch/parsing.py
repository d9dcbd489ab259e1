"""Parse settings that are given as text: on the command line, in variables and in ``--rdzv-conf``.

Pure functions. Invalid text raises ``UsageError``. The message is one line that begins with the text and says what is
allowed, so that the caller can put the option's name in front.
"""

from __future__ import annotations

import signal

from elastic_launch.errors import UsageError

AUTO = "auto"
"""The value of ``--preload`` that leaves the choice to the launcher."""
DEFAULT_BACKOFF_LIMIT = 300.0
"""The longest pause before a restart, in seconds, if ``--restart-backoff`` does not name one."""


def is_number(text: str) -> bool:
    """Return whether the text is a non-negative integer in at most 18 decimal digits.

    >>> is_number("8"), is_number(" 8"), is_number("1_000")  # int() accepts all three
    (True, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) <= 18


def parse_port(text: str, prefix: str = "") -> int:
    """Read a port number, 0 to 65535.

    Args:
        text: the number.
        prefix: what the error message begins with, as in ``MY_PORT=``.

    Raises:
        UsageError: the text is not such a number.
    """
    if not is_number(text) or int(text) > 65535:
        raise UsageError(f"{prefix}{text!r}: must be a port number from 0 to 65535")
    return int(text)


def parse_seconds(text: str, prefix: str = "", *, above_zero: bool = False) -> float:
    """Read a finite number of seconds, at least 0.

    Args:
        text: the number, as in ``0.5``.
        prefix: what the error message begins with, as in ``--rdzv-conf join_timeout=``.
        above_zero: whether to reject 0.

    Raises:
        UsageError: the text is not such a number.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf") or (above_zero and seconds == 0):
        raise UsageError(f"{prefix}{text!r}: must be a number of seconds{' above 0' if above_zero else ', at least 0'}")
    return seconds


def parse_command(text: str) -> list[str]:
    """Split a command into words, by the rules of a POSIX shell for quotes. No shell is involved.

    >>> parse_command("sh -c 'test -w /data'")
    ['sh', '-c', 'test -w /data']

    Raises:
        UsageError: a quotation is not closed, or the program is missing in a text that is not empty.
    """
    if not text:
        return []
    import shlex  # late: few jobs have a command

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r}: {str(error).lower()}") from error
    if not words or not words[0]:
        raise UsageError(f"{text!r}: must be a command")
    return words


def parse_hang_timeout(text: str) -> float | None:
    """Read a number of seconds, at least 0; ``auto``, which leaves the choice to the launcher, is None.

    Raises:
        UsageError: the text is neither.
    """
    if text == "auto":
        return None
    try:
        return parse_seconds(text)
    except UsageError as error:
        raise UsageError(f"{error}, or auto") from error


def read_flag(value: object) -> bool | None:
    """Read 1, true, t, yes or y as True, and 0, false, f, no or n as False, in any case; None for anything else."""
    return _FLAGS.get(str(value).lower())


_FLAGS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n"), False),
}


def parse_min_max_nnodes(nnodes: str) -> tuple[int, int]:
    """Read ``N`` or ``MIN:MAX`` as the smallest and the largest number of nodes.

    >>> parse_min_max_nnodes("4"), parse_min_max_nnodes("1:4")
    ((4, 4), (1, 4))

    Raises:
        UsageError: the text has neither form, or 1 <= MIN <= MAX does not hold.
    """
    low, colon, high = nnodes.partition(":")
    high = high if colon else low
    if not (is_number(low) and is_number(high) and 1 <= int(low) <= int(high)):
        raise UsageError(f"{nnodes!r}: must be a number of nodes, at least 1, or a range MIN:MAX with 1 <= MIN <= MAX")
    return int(low), int(high)


def parse_rdzv_conf(text: str) -> dict[str, str]:
    """Read ``KEY=VALUE,KEY=VALUE``. Quotes around the whole text are dropped.

    >>> parse_rdzv_conf("join_timeout=600, is_host=true")
    {'join_timeout': '600', 'is_host': 'true'}

    Raises:
        UsageError: an entry has no key or no value.
    """
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    settings: dict[str, str] = {}
    for entry in _entries(text):
        key, _, value = (part.strip() for part in entry.partition("="))
        if not key or not value:
            if "password" in settings:  # what follows it may be a part of it
                raise UsageError(
                    "password=***,...: what follows must be KEY=VALUE; a password with a comma goes into a file "
                    "(password_file=)"
                )
            raise UsageError(f"{entry!r}: must be KEY=VALUE; separate several entries with commas")
        settings[key] = value
    return settings


def parse_ranks(text: str) -> set[int] | None:
    """Read ``0,1,2`` as a set of local ranks; None, which stands for all ranks, if the text is empty.

    Raises:
        UsageError: an entry is not a number.
    """
    if not text:
        return None
    ranks = [part.strip() for part in text.split(",")]
    if not all(is_number(rank) for rank in ranks):
        raise UsageError(f"{text!r}: must be local ranks separated by commas, as in 0,1,2")
    return {int(rank) for rank in ranks}


def parse_signals(text: str) -> frozenset[signal.Signals]:
    """Read ``SIGTERM,SIGINT`` as a set of signals.

    Raises:
        UsageError: a name is unknown, or no process can handle the signal (SIGKILL, SIGSTOP).
    """
    names = _entries(text)
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise UsageError(
                f"{name!r}: must be names of signals that a process can handle, separated by commas, "
                "as in SIGTERM,SIGINT"
            )
    return frozenset(signal.Signals[name] for name in names)


def parse_backoff(text: str) -> tuple[float, float]:
    """Read ``FIRST`` or ``FIRST:MAX`` as two numbers of seconds.

    MAX defaults to ``DEFAULT_BACKOFF_LIMIT``, or to FIRST if that is longer.

    >>> parse_backoff("1:60"), parse_backoff("5"), parse_backoff("600")
    ((1.0, 60.0), (5.0, 300.0), (600.0, 600.0))

    Raises:
        UsageError: the text has neither form, or 0 <= FIRST <= MAX does not hold.
    """
    first, colon, longest = text.partition(":")
    try:
        seconds = float(first)
        limit = float(longest) if colon else max(seconds, DEFAULT_BACKOFF_LIMIT)
    except ValueError:
        seconds = limit = -1.0
    if not 0 <= seconds <= limit < float("inf"):
        raise UsageError(f"{text!r}: must be seconds, FIRST or FIRST:MAX, as in 1:60")
    return seconds, limit


def parse_exit_codes(text: str) -> frozenset[int]:
    """Read a list of exit statuses as a shell shows them, so that 137 stands for SIGKILL.

    >>> sorted(parse_exit_codes("2, 64-66"))
    [2, 64, 65, 66]

    Raises:
        UsageError: an entry is neither a number from 1 to 255 nor a range of them.
    """
    codes: set[int] = set()
    for entry in _entries(text):
        first, dash, last = entry.partition("-")
        last = last if dash else first
        if not (is_number(first) and is_number(last) and 1 <= int(first) <= int(last) <= 255):
            raise UsageError(f"{entry!r}: must be exit statuses from 1 to 255, or ranges of them, as in 2,64-78")
        codes.update(range(int(first), int(last) + 1))
    return frozenset(codes)


def parse_modules(text: str) -> list[str]:
    """Read ``torch,mylib.data`` as a list of module names; ``auto`` stays as it is, ``none`` is none.

    Raises:
        UsageError: an entry is not the name of a module.
    """
    names = _entries(text)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(
                f"{name!r}: must be names of modules, separated by commas, as in torch,mylib.data, or auto or none"
            )
    return [] if names == ["none"] else names


def parse_filters(text: str) -> list[str]:
    """Read a list of texts separated by commas. A doubled comma stands for a comma within a text.

    >>> parse_filters("loss,epoch 1,,2")
    ['loss', 'epoch 1,2']
    """
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",") if part]


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Read ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT`` as host and port; the port is 0 if the text has none.

    >>> split_endpoint("node-1:29400"), split_endpoint("[::1]:29400"), split_endpoint("::1")
    (('node-1', 29400), ('::1', 29400), ('::1', 0))

    Raises:
        UsageError: the port is not a number from 0 to 65535.
    """
    host, colon, port = endpoint.strip().rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, port = endpoint.strip(), "0"  # no port; perhaps a bare IPv6 address
    return host.strip("[]"), parse_port(port, f"{endpoint!r}: port ")


def _entries(text: str) -> list[str]:
    """Return the non-empty parts of a comma-separated list, without surrounding blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]
