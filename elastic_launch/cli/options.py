"""Layer 5: the command line: one table of options, and the parser made from it.

Names, defaults and meanings are those of torchrun. Values keep torchrun's types, most of them text, and are checked as
they are read, wherever they come from: the command line, or ``PET_<NAME>`` where the command line is silent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from elastic_launch.config import (
    DEFAULT_SIGNALS,
    Std,
    is_number,
    parse_backoff,
    parse_exit_codes,
    parse_filters,
    parse_modules,
    parse_nnodes,
    parse_ranks,
    parse_rdzv_conf,
    parse_signals,
)
from elastic_launch.env import environment
from elastic_launch.errors import UsageError

Read = Callable[[str], Any]
"""Turns an option's text into its value, or raises UsageError with what is allowed."""


def _checked(parse: Callable[[str], object]) -> Read:
    """Keep the text, as torchrun does, once it is known to be good."""

    def read(text: str) -> str:
        parse(text)
        return text

    return read


def _count(least: int) -> Read:
    def read(text: str) -> int:
        if not is_number(text) or int(text) < least:
            raise UsageError(f"{text!r}: must be a number of at least {least}")
        return int(text)

    return read


def _crash_loop(text: str) -> int:
    count: int = _count(0)(text)
    if count == 1:
        raise UsageError(f"{text!r}: must be at least 2, or 0 to turn this off")
    return count


def _port(text: str) -> int:
    if not is_number(text) or int(text) > 65535:
        raise UsageError(f"{text!r}: must be a port, a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{text!r}: must be a number of seconds, at least 0")
    return seconds


def _one_of(*allowed: str) -> Read:
    def read(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"{text!r}: must be one of {', '.join(allowed)}")
        return text

    return read


def _name(text: str) -> str:
    if not text.strip():
        raise UsageError(f"{text!r}: must not be empty")
    return text


def _flag(text: str) -> bool:
    value = {"0": False, "1": True, "false": False, "true": True}.get(text.lower())
    if value is None:
        raise UsageError(f"{text!r}: must be 1 or 0")
    return value


class Option(NamedTuple):
    """One option. Its ``PET_`` variable and its spelling with underscores follow from its name."""

    name: str
    default: Any
    read: Read
    help: str
    short: str | None = None

    @property
    def dest(self) -> str:
        """The attribute that holds the value."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable that gives the value where the command line does not."""
        return f"PET_{self.dest.upper()}"

    @property
    def is_flag(self) -> bool:
        """Whether it stands on the command line without a value."""
        return self.read is _flag

    @property
    def flags(self) -> list[str]:
        """Every way to write it, without repetition."""
        return [*filter(None, [self.short]), *dict.fromkeys((f"--{self.name}", f"--{self.dest}"))]


OPTIONS = (
    Option("nnodes", "1:1", _checked(parse_nnodes), "nodes: a number, or a range MIN:MAX"),
    Option("nproc-per-node", "1", str, "workers per node: a number, auto, cpu, gpu, xpu or another accelerator"),
    Option("rdzv-backend", "static", _name, "how nodes meet: static, c10d, etcd, or a plug-in's name"),
    Option("rdzv-endpoint", "", str, "where nodes meet, HOST:PORT"),
    Option("rdzv-id", "none", str, "the job's id; none stands for a fresh one on one node"),
    Option("rdzv-conf", "", _checked(parse_rdzv_conf), "settings of the rendezvous, KEY=VALUE,..."),
    Option("standalone", False, _flag, "one node: no endpoint, a fresh id"),
    Option("max-restarts", 0, _count(0), "how often failed workers are started again"),
    Option("restart-window", 0.0, _seconds, "seconds after which a failure does not count any more; 0: all count"),
    Option("restart-backoff", "0", _checked(parse_backoff), "seconds before a restart, doubling: FIRST[:MOST]"),
    Option("fatal-exit-codes", "", _checked(parse_exit_codes), "exit statuses without a restart, as in 2,64-78"),
    Option("node-failure-limit", 0, _count(0), "failures in a row after which a node lets a spare take over; 0: none"),
    Option("crash-loop", 3, _crash_loop, "identical failures in quick succession that end the job; 0: never"),
    Option("monitor-interval", 0.1, _seconds, "accepted for torchrun's sake: nothing here polls"),
    Option("start-method", "spawn", _one_of("spawn", "fork", "forkserver"), "how workers that are functions start"),
    Option("preload", [], parse_modules, "modules to import once, for workers that are forked, as in torch,numpy"),
    Option("event-log-handler", "null", str, "where the record of events goes"),
    Option("role", "default", str, "a name for the workers' role"),
    Option("module", False, _flag, "the script is a module, as with python -m", "-m"),
    Option("no-python", False, _flag, "the script is a program of its own, not Python's"),
    Option("run-path", False, _flag, "run the script with this Python, whatever PYTHON_EXEC says"),
    Option("log-dir", None, str, "directory for the workers' files: LOG_DIR/RUN_ID/attempt_K/RANK"),
    Option("redirects", "0", _checked(Std.from_str), "streams to files: 1 stdout, 2 stderr, 3 both, or 0:1,1:2", "-r"),
    Option("tee", "0", _checked(Std.from_str), "streams to files and console, written as for -r", "-t"),
    Option("local-ranks-filter", "", _checked(parse_ranks), "local ranks whose output the console shows, as in 0,1"),
    Option("duplicate-stdout-filters", [], parse_filters, "texts; stdout lines with one go to a file as well"),
    Option("duplicate-stderr-filters", [], parse_filters, "texts; stderr lines with one go to a file as well"),
    Option("node-rank", 0, _count(0), "the rank that this node asks for"),
    Option("master-addr", "127.0.0.1", str, "address of the node with rank 0"),
    Option("master-port", None, _port, "port of the workers' store; a free one where none is given on one node"),
    Option("local-addr", None, str, "address of this node, for the others"),
    Option("logs-specs", None, str, "name of a LogsSpecs plug-in (entry point group torchrun.logs_specs)"),
    Option("numa-binding", None, _one_of("node", "socket", "exclusive", "core-complex"), "bind workers to CPUs"),
    Option("signals-to-handle", DEFAULT_SIGNALS, _checked(parse_signals), "signals that stop the job"),
    Option("shutdown-timeout", None, _count(0), "seconds between a worker's stop signal and SIGKILL (default 30)"),
    Option("virtual-local-rank", False, _flag, "each worker sees its device as number 0"),
    Option("quiet", False, _flag, "tell of trouble only", "-q"),
    Option("verbose", False, _flag, "each node tells what it does", "-v"),
)


class Arguments(argparse.Namespace):
    """A parsed command line; ``given`` has the options that were given, by flag or variable. No argument itself."""

    __slots__ = ("given",)


class Parser(argparse.ArgumentParser):
    """Parses the options before the script, and leaves everything after it alone."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; everything from the script on is the script's, and never left over."""
        if args is None:
            import sys

            args = sys.argv[1:]
        script = self._script_position(args)
        namespace = Arguments() if namespace is None else namespace
        _, rest = super().parse_known_args(list(args[:script]), namespace)
        if script >= len(args):
            self.error(f"unrecognized arguments: {' '.join(rest)}" if rest else "the script to run is missing")
        try:
            _read_values(namespace, environment())
        except UsageError as error:
            self.error(str(error))
        namespace.training_script = args[script]
        namespace.training_script_args = list(args[script + 1 :])
        return namespace, [word for word in rest if word != "--"]

    def _script_position(self, args: Sequence[str]) -> int:
        """Where the script stands: the first word that is neither an option nor an option's value."""
        position = 0
        while position < len(args):
            word = args[position]
            if word == "--":
                return position + 1
            if not word.startswith("-") or word == "-":
                return position
            position += 2 if self._takes_next_word(word) else 1
        return position

    def _takes_next_word(self, word: str) -> bool:
        """Whether an option's value is the word after it: for ``-r`` and ``--tee``, not for ``-r3`` and ``--tee=3``."""
        actions = self._option_string_actions  # with those that other programs have added to this parser
        matches = (
            [word] if word in actions else [flag for flag in actions if flag.startswith(word) and word[:2] == "--"]
        )
        return any(actions[flag].nargs != 0 for flag in matches)

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``elastic-run``; its namespaces have torchrun's attributes."""
    parser = Parser(
        prog="elastic-run",
        description="Start, supervise and restart the workers of a distributed training job on this node.",
        usage="%(prog)s [OPTION ...] SCRIPT [ARGUMENT ...]",
        epilog="Every option can also be given as PET_<OPTION>, as in PET_NPROC_PER_NODE=gpu.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    for option in OPTIONS:
        if option.is_flag:
            parser.add_argument(*option.flags, dest=option.dest, action="store_true", help=option.help)
        else:
            default = f" (default {option.default})" if option.default not in (None, "", []) else ""
            parser.add_argument(*option.flags, dest=option.dest, metavar="VALUE", help=option.help + default)
    return parser


def _read_values(namespace: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Read each option's text, from the command line, else from its variable; else set its default."""
    given = set()
    for option in OPTIONS:
        source, value = f"--{option.name}", getattr(namespace, option.dest, None)
        if value is None:
            source, value = option.variable, environ.get(option.variable) or None  # an empty one is none
        if value is None:
            value = option.default
        else:
            given.add(option.dest)
        if value is not option.default and isinstance(value, str):
            try:
                value = option.read(value)
            except UsageError as error:
                raise UsageError(f"{source}={error}") from error
        setattr(namespace, option.dest, value)
    if isinstance(namespace, Arguments):
        namespace.given = given
