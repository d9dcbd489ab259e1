"""Floor 5: the face of ``elastic-run``: turns how a job ended into what a terminal and a shell expect.

Imports next to nothing before it can deal with Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from elastic_launch.console import say, write


def main() -> int:
    """Run the command line and return the exit status: 0, the cause's, 128 + N for signal N, or an ``ExitCode``."""
    _open_standard_streams()
    try:
        from elastic_launch.errors import ChildFailedError, ExitCode, LaunchError, SignalException
        from elastic_launch.run import main as run

        try:
            run()
        except SignalException as error:
            say(str(error))
            return error.exit_code
        except ChildFailedError as error:
            write(f"{error}\n")
            return error.exit_code
        except LaunchError as error:
            say(f"error: {error}")
            return error.exit_code
        except Exception:
            import traceback

            write(traceback.format_exc())
            say("error: this is a defect of the launcher; please report it with the lines above")
            return ExitCode.SOFTWARE
    except KeyboardInterrupt:
        return 130  # before the agent took over the signals, or after it gave them back
    return 0


def _open_standard_streams() -> None:
    """Take up descriptors 0 to 2 where the caller closed them, before a socket gets such a number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
