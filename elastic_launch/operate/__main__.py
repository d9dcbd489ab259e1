"""The program ``elastic-job``: choose the subcommand, run it, and exit with its status.

Each subcommand is a module with a function ``main``, which gets the arguments that follow its name. Only that module is
imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import elastic_launch
from elastic_launch.errors import ExitCode, LaunchError, UsageError

COMMANDS = {
    "ps": ("ps", "list your jobs on this host"),
    "status": ("status", "show a job: its nodes, ranks, restarts, and what it waits for"),
    "logs": ("logs", "show what a job's ranks on this host have written to its files"),
    "stacks": ("stacks", "show where all ranks of a job stand in their code"),
    "stop": ("stop", "stop a job, or one of its nodes, in good order"),
    "restart": ("restart", "begin another round now, without using up a restart"),
    "ui": ("ui.command", "show your jobs as a page in a browser, live"),
    "exporter": ("exporter", "serve metrics of the jobs on this host to Prometheus"),
    "report": ("report", "make one page of a finished job's events"),
    "token": ("token", "make a token, which keeps strangers out of a job"),
}
"""The subcommands: module and what it does."""
_WIDTH = max(map(len, COMMANDS))
USAGE = "\n".join(
    [
        "usage: elastic-job COMMAND [JOB] [OPTION ...]",
        "",
        *(f"  {name:<{_WIDTH}}  {what}" for name, (_, what) in COMMANDS.items()),
        "",
        "JOB is a job's id, the beginning of it, or the pid of its agent; with only one job it may be left out.",
        "elastic-job COMMAND --help lists the options. Exit status 3: no such job runs; 2: wrong arguments.",
    ]
)


def main(argv: Sequence[str]) -> int:
    """Run a command line, without the program's name, and return the exit status."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    status = 0
    try:
        if name in ("-h", "--help", "help"):
            print(USAGE)
        elif name == "--version":
            print(f"elastic-job {elastic_launch.__version__}")
        elif name in COMMANDS:
            status = import_module(f"elastic_launch.operate.{COMMANDS[name][0]}").main(rest)
        else:
            raise UsageError(f"{name or 'no command'}: must be one of {', '.join(COMMANDS)} (elastic-job --help)")
        sys.stdout.flush()
    except LaunchError as error:
        print(f"elastic-job: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # of standard output: whatever else can fail is told apart where it is done
        print(f"elastic-job: {error.strerror or error}", file=sys.stderr)
        return ExitCode.UNAVAILABLE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def console() -> NoReturn:
    """Run this process's command line, and exit."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly if the reader, such as head, has seen enough
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - descriptor 1 is closed
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # main has said so; Python would try again at its end, and choose another status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    console()
