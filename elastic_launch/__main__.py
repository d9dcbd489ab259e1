"""The programs ``elastic-run`` and ``python -m elastic_launch``."""

import _signal  # type: ignore[import-not-found]  # signal takes milliseconds

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    # So that Ctrl-C during the imports ends this process without a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from elastic_launch.cli.main import console

if __name__ == "__main__":
    console()
