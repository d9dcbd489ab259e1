"""Floor 2: the job's files: where they lie.

The only module that knows a path of the layout ``LOG_DIR/RUN_ID/attempt_K/RANK/error.json``.
"""

from __future__ import annotations

import contextlib
import os

from elastic_launch.errors import UnavailableError


class JobFiles:
    """The directory of one job on this node."""

    def __init__(self, log_dir: str | None, run_id: str, temp_dir: str) -> None:
        """Make the directory.

        Args:
            log_dir: what the user asked for; None: a directory in ``temp_dir`` that ``close`` removes when it is empty.
            run_id: the job's id; characters that a file name cannot have are percent-encoded.
            temp_dir: the system's directory for temporary files.

        Raises:
            UnavailableError: it cannot be made.
        """
        self._temporary = None if log_dir else os.path.join(temp_dir, f"elastic_launch_{os.urandom(6).hex()}")
        self.root = os.path.join(log_dir or self._temporary or "", _as_file_name(run_id))
        self._usable = True
        try:
            self.root = os.path.abspath(self.root)
            if self._temporary:
                os.mkdir(self._temporary, mode=0o700)
            os.makedirs(self.root, exist_ok=True)
        except OSError as error:
            if log_dir:
                raise UnavailableError(f"--log-dir={log_dir}: cannot make {self.root}: {error.strerror}") from error
            self._usable = False  # no place for temporary files: a job can run without error files

    def attempt_dir(self, attempt: int) -> str:
        """The directory of one round."""
        return os.path.join(self.root, f"attempt_{attempt}")

    def error_file(self, attempt: int, rank: int) -> str:
        """Where the worker of a global rank writes its exception."""
        return os.path.join(self.attempt_dir(attempt), str(rank), "error.json")

    def prepare(self, attempt: int, rank: int) -> str:
        """Make the directory of a worker and clear what an earlier job of the same id left; return its error file.

        A disk that is full or gone does not stop a job from running, only from telling its error in a file.
        """
        path = self.error_file(attempt, rank)
        if not self._usable:
            return path
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
        return path

    def close(self, keep: bool) -> None:
        """Remove a directory that the user did not name: all of it, or, to ``keep`` files, if it has none."""
        if self._temporary:
            for directory, _, files in os.walk(self._temporary, topdown=False):
                with contextlib.suppress(OSError):
                    for file in [] if keep else files:
                        os.unlink(os.path.join(directory, file))
                    os.rmdir(directory)

    @property
    def kept(self) -> bool:
        """Whether there are files to look at."""
        return any(files for _, _, files in os.walk(self.root))


def _as_file_name(run_id: str) -> str:
    if run_id.isalnum() and run_id.isascii():
        return run_id
    from urllib.parse import quote  # late: 3 ms, and most ids need it not

    name = quote(os.fsencode(run_id), safe="")
    return name if name.strip(".") else f"_{name}"
