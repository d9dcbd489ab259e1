"""The program ``elastic-run``: run the command line, print how the job ended, and exit with its status.

It imports next to nothing before it can handle Ctrl-C. For ``--help``, ``--version`` and a wrong option it imports no
more than the options.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NoReturn

from elastic_launch.core.text import visible
from elastic_launch.host import signals
from elastic_launch.host.console import RED, REPORT_PATIENCE, YELLOW, Shown, log, paint, shown, write

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def main(parse: Callable[[], argparse.Namespace] | None = None) -> int:
    """Run the command line and return the exit status: 0, the cause's, 128 + N for signal N, or an ``ExitCode``.

    Args:
        parse: reads the command line; None for that of ``elastic-run``.
    """
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, _ignore)  # they are for the workers, and there are none yet
    signals.owns_process = True
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # __main__ has set it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # the parent may have blocked some
        from elastic_launch.cli.options import get_args_parser
        from elastic_launch.errors import ChildFailedError, ExitCode, LaunchError, SignalException, UsageError

        try:
            args = parse() if parse else get_args_parser().parse_args()
            from elastic_launch.cli.command import run

            run(args)
        except ChildFailedError as error:
            write(_with_colour(f"{error}\n"), REPORT_PATIENCE)
            from elastic_launch.workers.error_handler import get_error_handler

            get_error_handler().record_exception(error)  # for a launcher that runs this one as a worker
            return error.exit_code
        except (LaunchError, SignalException) as error:
            text = visible(str(error), lines=not isinstance(error, UsageError))
            log(paint(text, YELLOW if isinstance(error, SignalException) else RED))
            return error.exit_code
        except Exception:
            import traceback

            write(traceback.format_exc(), REPORT_PATIENCE)
            log(paint("this is a defect of the launcher; please report it with the lines above", RED))
            return ExitCode.SOFTWARE
    except KeyboardInterrupt:
        return 130  # before the agent handles signals
    return 0


def console(parse: Callable[[], argparse.Namespace] | None = None) -> NoReturn:
    """Exit with the status of ``main``, without the interpreter's own shutdown, which restores signal handlers."""
    os._exit(main(parse))


def _with_colour(report: str) -> str:
    """Return a report with its headline, the line that says what failed, in red."""
    return Shown(
        "\n".join(paint(line, RED) if line.endswith(" FAILED") else shown(line) for line in report.split("\n"))
    )


def _ignore(signum: int, frame: object) -> None:
    """Ignore a signal. Workers would inherit SIG_IGN, but not this handler."""
