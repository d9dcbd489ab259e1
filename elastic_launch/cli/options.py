"""The table of ``elastic-run``'s options, and the parser that is built from it.

Names, defaults and meanings are those of torchrun. Values keep torchrun's types, most of which are text. Each value is
checked when it is read, whether it comes from the command line, from a ``PET_<NAME>`` variable, or from the file that
``--config`` names. The first of these that has the option wins. What a program sets on the parsed command line later
is read when it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import elastic_launch
from elastic_launch.config import DEFAULT_CHECK_TIMEOUT, DEFAULT_SIGNALS, Std
from elastic_launch.env import environment
from elastic_launch.errors import UsageError
from elastic_launch.job import HangAction
from elastic_launch.parsing import (
    is_number,
    parse_backoff,
    parse_command,
    parse_exit_codes,
    parse_filters,
    parse_hang_timeout,
    parse_min_max_nnodes,
    parse_modules,
    parse_port,
    parse_ranks,
    parse_rdzv_conf,
    parse_seconds,
    parse_signals,
)

if TYPE_CHECKING:
    from elastic_launch.cli.config_file import ConfigFile

Read = Callable[[str], Any]
"""Turns the text of an option into its value, or raises UsageError."""

SHELLS = ("bash", "zsh", "fish")
"""Shells that can complete the command line."""
VERSION = f"elastic-run {elastic_launch.__version__} (Python {'.'.join(map(str, sys.version_info[:3]))})"
EPILOG = """\
An option may be written with underscores (--nproc_per_node 2) or given as a variable (PET_NPROC_PER_NODE=2). \
Everything after SCRIPT is passed to it.

Two workers on this machine, restarted up to three times:

    elastic-run --standalone --nproc-per-node 2 --max-restarts 3 train.py

Two to four nodes; the same command on each of them:

    elastic-run --nnodes 2:4 --nproc-per-node gpu --rdzv-backend c10d \\
        --rdzv-endpoint node-1:29400 --rdzv-id my-job train.py --epochs 10

What would run, and what stands in its way:

    elastic-run --dry-run --nproc-per-node 8 -m mypackage.train
"""
SHORT_USAGE = """\
usage: elastic-run [OPTION ...] SCRIPT [ARGUMENT ...]

Two workers on this machine:

    elastic-run --standalone --nproc-per-node 2 train.py

All options: elastic-run --help
Documentation: README.md and docs/ in the elastic-launch source tree
"""


def _checked(parse: Callable[[str], object]) -> Read:
    """Return a reader that checks the text but returns it unchanged, as torchrun does."""

    def read(text: str) -> str:
        parse(text)
        return text

    return read


def _above_zero(text: str) -> float:
    return parse_seconds(text, above_zero=True)


def _count(text: str) -> int:
    if not is_number(text):
        raise UsageError(f"{text!r}: must be a number of at least 0")
    return int(text)


def _crash_loop(text: str) -> int:
    if (number := _count(text)) == 1:
        raise UsageError(f"{text!r}: must be at least 2, or 0 to turn this off")
    return number


def _one_of(*allowed: str) -> Read:
    def read(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"{text!r}: must be one of {', '.join(allowed)}")
        return text

    return read


START_METHODS = ("spawn", "fork", "forkserver")
CLUSTERS = ("slurm",)
NUMA_MODES = ("node", "socket", "exclusive", "core-complex")
_hang_action = _one_of(*HangAction)
_cluster = _one_of(*CLUSTERS)
_start_method = _one_of(*START_METHODS)
_numa_mode = _one_of(*NUMA_MODES)
_streams = _checked(Std.from_str)


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
    """One option. Its variable and its spelling with underscores follow from its name."""

    name: str
    """Name with dashes, as in ``max-restarts``."""
    default: Any
    """Value if neither the command line nor the variable sets one."""
    read: Read
    """Reads and checks the text of the value."""
    metavar: str
    """Placeholder for the value in the help; ``""`` for flags."""
    help: str
    """Description in the help, without the default."""
    short: str | None = None
    """Short spelling, as in ``-r``; None if there is none."""

    @property
    def dest(self) -> str:
        """Name of the attribute that holds the value."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Name of the environment variable that sets the value if the command line does not."""
        return f"PET_{self.dest.upper()}"

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value on the command line."""
        return self.read is _flag

    @property
    def flags(self) -> list[str]:
        """Spellings on the command line, each once. Those that begin with ``--no-`` turn off what is on by default."""
        names = [self.name, f"no-{self.name}"] if self.default is True else [self.name]
        spellings = [f"--{each}" for name in names for each in (name, name.replace("-", "_"))]
        return [*filter(None, [self.short]), *dict.fromkeys(spellings)]

    @property
    def shown_flags(self) -> list[str]:
        """Spellings that the help shows."""
        return [flag for flag in self.flags if "_" not in flag]


GROUPS = {
    "what to run": (
        Option("module", False, _flag, "", "SCRIPT is a module, as with python -m", "-m"),
        Option("no-python", False, _flag, "", "SCRIPT is a program of any kind; run it without Python"),
        Option("run-path", False, _flag, "", "run SCRIPT with this Python, despite PYTHON_EXEC or --no-python"),
        Option("config", None, str, "FILE", "options, script and arguments from a TOML file; what is given here wins"),
        Option("dry-run", False, _flag, "", "show what would run, and what checks find; start nothing"),
    ),
    "nodes and rendezvous": (
        Option("nnodes", "1:1", _checked(parse_min_max_nnodes), "MIN[:MAX]", "number of nodes, or a range"),
        Option("cluster", None, _cluster, "NAME", "take the nodes, their endpoint and the id from the system: slurm"),
        Option("standalone", False, _flag, "", "run on this node alone; the rendezvous options are ignored"),
        Option("rdzv-backend", "static", _name, "NAME", "how nodes meet: static, c10d, etcd, plug-in"),
        Option("rdzv-endpoint", "", str, "HOST:PORT", "where nodes meet; etcd accepts several, separated by commas"),
        Option("rdzv-id", "none", str, "ID", "id of the job, the same on all its nodes"),
        Option("rdzv-conf", "", _checked(parse_rdzv_conf), "CONF", "settings of the backend, as in join_timeout=600"),
        Option("token-file", "", str, "FILE", "token that all nodes share: strangers cannot join or steer the job"),
        Option("store-gate", False, _flag, "", "let only nodes with the token connect to the store (static, c10d)"),
        Option("node-rank", 0, _count, "RANK", "rank of this node; optional with c10d and etcd"),
        Option("local-addr", None, str, "HOST", "address of this node (default: the one that reaches the endpoint)"),
        Option("master-addr", "127.0.0.1", str, "HOST", "with static: address of the node of rank 0"),
        Option(
            "master-port", None, parse_port, "PORT", "with static: port on that node (default: 29500; on one node, any)"
        ),
    ),
    "workers and devices": (
        Option("nproc-per-node", "1", str, "N", "workers on this node: a number, auto, cpu, gpu or xpu"),
        Option("numa-binding", None, _numa_mode, "MODE", "bind workers to CPUs: node, socket, exclusive, core-complex"),
        Option("virtual-local-rank", False, _flag, "", "show each worker only its own device, as number 0"),
        Option(
            "preload",
            None,
            parse_modules,
            "MODULES",
            "modules to import before workers are forked: torch,numpy, or auto, or none "
            "(default: auto on a host without an accelerator)",
        ),
        Option("standby", True, _flag, "", "with --preload: fork the workers of the next round ahead of time"),
        Option("start-method", "spawn", _start_method, "METHOD", "for functions: spawn, fork or forkserver"),
        Option("role", "default", str, "NAME", "name of the workers' role"),
    ),
    "restarts": (
        Option("max-restarts", 0, _count, "N", "how often failed workers are restarted"),
        Option("restart-window", 0, parse_seconds, "SECONDS", "age at which a failure no longer counts; 0: never"),
        Option("restart-backoff", "0", _checked(parse_backoff), "FIRST[:MAX]", "seconds before a restart, doubling"),
        Option("fatal-exit-codes", "", _checked(parse_exit_codes), "CODES", "end the job on these statuses: 2,64-78"),
        Option("crash-loop", 3, _crash_loop, "N", "end the job after N identical failures in a row; 0: never"),
        Option("node-failure-limit", 0, _count, "N", "replace a node by a spare after N failures in a row; 0: never"),
    ),
    "stopping": (
        Option("signals-to-handle", DEFAULT_SIGNALS, _checked(parse_signals), "SIGNALS", "signals that stop the job"),
        Option("shutdown-timeout", None, _count, "SECONDS", "time from a stop signal to SIGKILL (default: 30)"),
        Option("monitor-interval", 0.1, parse_seconds, "SECONDS", "ignored: the agent does not poll"),
    ),
    "hangs": (
        Option(
            "hang-timeout", "auto", _checked(parse_hang_timeout), "SECONDS", "time without a step of any rank; 0: never"
        ),
        Option("hang-action", "report", _hang_action, "ACTION", "what follows: report, restart or stop"),
        Option("hang-native", False, _flag, "", "show native frames of hung workers, too, with py-spy"),
        Option("start-timeout", 0, parse_seconds, "SECONDS", "time until the first steps; 0: any"),
    ),
    "health of the nodes": (
        Option("health-check", "", _checked(parse_command), "CMD", "command that must succeed before each round"),
        Option("health-check-timeout", DEFAULT_CHECK_TIMEOUT, _above_zero, "SECONDS", "time that it may take"),
    ),
    "output of the workers": (
        Option("redirects", "0", _streams, "STREAMS", "to files: 1 stdout, 2 stderr, 3 both; by rank: 0:1,1:2", "-r"),
        Option("tee", "0", _streams, "STREAMS", "to files and to the console; values as for -r", "-t"),
        Option("log-dir", None, str, "DIR", "write files to DIR/ID/attempt_K/RANK (default: a temporary directory)"),
        Option("local-ranks-filter", "", _checked(parse_ranks), "RANKS", "show only these local ranks on the console"),
        Option("duplicate-stdout-filters", [], parse_filters, "TEXTS", "copy stdout lines with one of these to a file"),
        Option("duplicate-stderr-filters", [], parse_filters, "TEXTS", "copy stderr lines with one of these to a file"),
        Option("logs-specs", None, str, "NAME", "plug-in that decides where output goes"),
    ),
    "what the launcher says": (
        Option("quiet", False, _flag, "", "show warnings and errors only", "-q"),
        Option("verbose", False, _flag, "", "show what each node does: ranks, pids, where files are", "-v"),
        Option("events", None, str, "PATH", "append the events of the job as JSON lines to a file, or in a directory"),
        Option("event-log-handler", "null", str, "NAME", "where events go: null, console or a plug-in"),
    ),
}
"""The options, in the groups and the order of the help."""

OPTIONS = tuple(option for group in GROUPS.values() for option in group)


OWN = {
    *("config", "cluster", "dry_run", "preload", "quiet", "verbose", "events", "health_check", "health_check_timeout"),
    *("standby", "token_file", "store_gate"),
    *("restart_window", "restart_backoff", "fatal_exit_codes", "crash_loop", "node_failure_limit"),
    *("hang_timeout", "hang_action", "hang_native", "start_timeout"),
}
"""Options that torchrun lacks, by attribute name."""

PROGRAM = "the program"
"""Source of a value that was set after parsing."""


class Arguments(argparse.Namespace):
    """A parsed command line."""

    __slots__ = ("given",)
    """``given``: where each value that is not a default comes from, by its name here: ``--nnodes``, ``PET_NNODES``, the
    path of the file, or ``PROGRAM``. It is not in ``vars()``, because torchrun lacks it."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "given":
            self.given[name] = PROGRAM


class CompletionAction(argparse.Action):
    """``--completion SHELL``: print the script for the shell, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        """Print the script for the shell that ``values`` names."""
        from elastic_launch.cli import completion  # late: a launch does not need it

        print(completion.script(str(values)), end="", flush=True)
        parser.exit()


class SwitchAction(argparse.Action):
    """``--NAME`` or ``--no-NAME``: turn something on or off."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Set what the spelling says."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


class HelpFormatter(argparse.HelpFormatter):
    """Shows one long spelling of each option, and the name of its value once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=33, width=110)

    def format_help(self) -> str:
        """Format the help for the width of the terminal."""
        import shutil  # late: it takes 3 ms, and a launch makes formatters, too

        self._width = shutil.get_terminal_size().columns - 2
        return super().format_help()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill paragraphs, but leave examples, which are indented, as they are."""
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            it if it[0] == " " else super(HelpFormatter, self)._fill_text(it, width, indent) for it in paragraphs
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "_" not in flag]
        if not flags:
            return super()._format_action_invocation(action)
        return ", ".join(flags) + (f" {action.metavar}" if action.metavar else "")


class Parser(argparse.ArgumentParser):
    """Parses the options before the script, and leaves everything after it alone."""

    options: Sequence[Option] = OPTIONS
    """Those that it has; further ones are of the program that uses it."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options before the script. The script's arguments are never among the remaining ones."""
        args, environ = sys.argv[1:] if args is None else list(args), environment()
        if not args and not environ.get("PET_CONFIG"):
            self.exit(2, SHORT_USAGE)
        script = self._script_position(args)
        words = args[script + 1 :] if args[script : script + 1] == ["--"] else args[script:]
        namespace = Arguments() if namespace is None else namespace
        for option in self.options:
            if not hasattr(namespace, option.dest):
                setattr(namespace, option.dest, None)  # it keeps that unless the command line has the option
        # Without the dashes, argparse would take words of the script for options.
        _, rest = super().parse_known_args([*args[:script], "--", *(words or [""])], namespace)
        try:
            words = self._complete(namespace, environ, words)
        except UsageError as error:
            self.error(str(error))
        if not words:
            self.error(f"unrecognized arguments: {' '.join(rest)}" if rest else "the script to run is missing")
        return namespace, rest

    def _complete(self, namespace: argparse.Namespace, environ: Mapping[str, str], words: list[str]) -> list[str]:
        """Set the options that the command line lacks to the value of their variable, else of the file, else default.

        Args:
            namespace: has the options that the command line has; the others are None.
            environ: the variables.
            words: the script and its arguments, as given on the command line.

        Returns:
            The script and its arguments. Those of the file if none were given; empty if there are none.
        """
        given = {
            option.dest: f"--{option.name}" for option in self.options if getattr(namespace, option.dest) is not None
        }
        file = _config_file(namespace, environ) if len(self.options) == len(OPTIONS) else None
        for option in self.options:
            if option.dest in given:
                continue
            value = self.get_default(option.dest)
            if text := environ.get(option.variable):  # an empty variable counts as unset
                given[option.dest] = option.variable
                value = _read(option, text, option.variable)
            elif file and option.dest in file.values:
                given[option.dest] = file.path
                value = _read(option, file.values[option.dest], f"{file.path}: {option.name}")
            setattr(namespace, option.dest, value)
        if "token_file" in given and not namespace.token_file:  # such as that of a variable that is not set
            raise UsageError("--token-file='': must name a file; leave the option out if there is no token")
        if getattr(namespace, "cluster", None) in CLUSTERS:
            from elastic_launch.cli import cluster  # late: most jobs name none

            cluster.fill(namespace, given, environ, self.options)
        if file and not words:
            words = file.command
            given["training_script"] = file.path
        if words:
            namespace.training_script, *namespace.training_script_args = words
        if isinstance(namespace, Arguments):
            namespace.given = given
        return words

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return the options that an abbreviation may mean. One that torchrun accepts keeps its meaning."""
        found: list[Any] = super()._get_option_tuples(option_string)
        return [each for each in found if each[0].dest not in OWN] or found

    def _script_position(self, args: Sequence[str]) -> int:
        """Return the index of the script: the first word that is neither an option nor the value of one; or of "--"."""
        position = 0
        while position < len(args):
            word = args[position]
            if not word.startswith("-") or word in ("-", "--"):
                return position
            position += 2 if self._takes_next_word(word) else 1
        return position

    def _takes_next_word(self, word: str) -> bool:
        """Return whether the next word is the option's value, as for ``-r`` and ``--tee``, but not ``--tee=3``."""
        actions = self._option_string_actions  # includes options that another program has added to this parser
        if word in actions:
            return actions[word].nargs != 0
        return word.startswith("--") and any(actions[flag].nargs != 0 for flag in actions if flag.startswith(word))

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with status 2."""
        # Late, like what only errors need.
        from elastic_launch.core.text import visible
        from elastic_launch.host.console import RED, paint

        self.exit(2, f"{self.prog}: {paint(visible(message), RED)} (see {self.prog} --help)\n")


def get_args_parser(own: bool = True) -> argparse.ArgumentParser:
    """Return a new parser of the command line, to which a program may add options, or which may be its own's parent.

    Its namespaces have the attributes of torchrun's. As there, ``PET_`` variables are its defaults.

    Args:
        own: False leaves out the options that torchrun lacks.
    """
    environ = environment()
    options = OPTIONS if own else [option for option in OPTIONS if option.dest not in OWN]
    parser = Parser(
        prog="elastic-run",
        description="Start, supervise and restart the workers of a distributed training job on this node.",
        usage="%(prog)s [OPTION ...] SCRIPT [ARGUMENT ...]",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.options = options
    if own:
        parser.add_argument("--version", action="version", version=VERSION, help="show the version and exit")
        parser.add_argument(
            "--completion",
            action=CompletionAction,
            default=argparse.SUPPRESS,
            choices=SHELLS,
            metavar="SHELL",
            help="print what completes this command line in a shell: bash, zsh or fish",
        )
    for number, (title, group_options) in enumerate(GROUPS.items()):
        group = parser.add_argument_group(title)
        if number == 0:
            group.add_argument("training_script", metavar="SCRIPT", help="the program of each worker")
            group.add_argument(
                "training_script_args", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="is passed to it"
            )
            if own:
                group.add_argument(
                    "--adopt",
                    action="store_true",
                    default=argparse.SUPPRESS,
                    help="SCRIPT is a program that starts torchrun, as accelerate does; it starts elastic-run instead",
                )
        for option in group_options:
            if option in options:
                _add(group, option, environ)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option, environ: Mapping[str, str]) -> None:
    def read(text: str) -> Any:
        try:
            return _read(option, text, f"--{option.name}")
        except UsageError as error:
            raise argparse.ArgumentError(None, str(error)) from error

    default = option.default
    if text := environ.get(option.variable):
        default = text  # if it is wrong, parsing says so
        with contextlib.suppress(UsageError):
            default = option.read(text)
    settings: dict[str, Any] = {"dest": option.dest, "default": default, "help": option.help}
    if option.is_flag:
        if option.default:
            settings["help"] += " (default: on)"
            group.add_argument(*option.flags, action=SwitchAction, nargs=0, **settings).type = read
        else:
            group.add_argument(*option.flags, action="store_true", **settings).type = read
        return
    if option.default not in (None, "", []):
        settings["help"] += f" (default: {option.default})"
    group.add_argument(*option.flags, type=read, metavar=option.metavar, **settings)


def _read(option: Option, value: Any, source: str) -> Any:
    """Return the value of an option, read from its text unless it is a list.

    Raises:
        UsageError: it is wrong; the message begins with ``source``.
    """
    try:
        return value if isinstance(value, list) else option.read(str(value))
    except UsageError as error:
        raise UsageError(f"{source}={error}") from error


def read_options(args: argparse.Namespace, own: bool = True) -> argparse.Namespace:
    """Return a parsed command line with the values of all options, also of those that a program has set or left out.

    Args:
        args: from any parser that has the options of ``get_args_parser()``. Numbers may be texts, and the other way
            round.
        own: False ignores what it has under the names of ``OWN``, which may be options of the program.

    >>> from elastic_launch.run import parse_args
    >>> args = parse_args(["train.py"])
    >>> args.nproc_per_node, args.node_rank = 2, "0"
    >>> args = read_options(args)
    >>> args.nproc_per_node, args.node_rank
    ('2', 0)

    Raises:
        UsageError: a value is wrong.
    """
    environ = environment()
    found = Arguments()
    found.__dict__.update(vars(args))
    for option in OPTIONS:
        value = getattr(args, option.dest, None) if own or option.dest not in OWN else None
        source = f"--{option.name}"
        if value is None:
            source, value = option.variable, environ.get(option.variable) or None
        found.__dict__[option.dest] = option.default if value is None else _read(option, value, source)
    # A namespace that does not know what was given is a program's own.
    found.given = getattr(args, "given", {"master_addr": PROGRAM} | ({"node_rank": PROGRAM} if found.node_rank else {}))
    return found


def _config_file(namespace: argparse.Namespace, environ: Mapping[str, str]) -> ConfigFile | None:
    path, source = getattr(namespace, "config", None), "--config"
    if path is None:
        path, source = environ.get("PET_CONFIG"), "PET_CONFIG"
    if not path:
        return None
    from elastic_launch.cli import config_file  # late: few jobs have a file

    return config_file.read(path, source, OPTIONS)
