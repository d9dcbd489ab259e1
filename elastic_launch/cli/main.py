"""Layer 5: the face of ``elastic-run``: turns how a job ended into what a terminal and a shell expect.

Imports next to nothing before it can deal with Ctrl-C.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from elastic_launch.host import signals
from elastic_launch.host.console import REPORT_PATIENCE, log, write


def main() -> int:
    """Run the command line and return the exit status: 0, the cause's, 128 + N for signal N, or an ``ExitCode``."""
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, _ignore)  # the workers' business, also while there are none yet
    signals.owns_process = True
    try:
        from elastic_launch.errors import ChildFailedError, ExitCode, LaunchError, SignalException
        from elastic_launch.run import main as run

        try:
            run()
        except SignalException as error:
            log(str(error))
            return error.exit_code
        except ChildFailedError as error:
            write(f"{error}\n", REPORT_PATIENCE)
            from elastic_launch.workers.error_handler import get_error_handler

            get_error_handler().record_exception(error)  # for a launcher that this one is a worker of
            return error.exit_code
        except LaunchError as error:
            log(str(error))
            return error.exit_code
        except Exception:
            import traceback

            write(traceback.format_exc(), REPORT_PATIENCE)
            log("this is a defect of the launcher; please report it with the lines above")
            return ExitCode.SOFTWARE
    except KeyboardInterrupt:
        return 130  # before the agent took over the signals
    return 0


def console() -> NoReturn:
    """The program: ``main``, and then an end without the interpreter's own, which gives the signals back first."""
    os._exit(main())


def _ignore(signum: int, frame: object) -> None:
    """Not SIG_IGN, which the workers would inherit."""
