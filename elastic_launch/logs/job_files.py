"""The job's files: where they are, and which part of a worker's output goes where.

No other module knows the layout ``LOG_DIR/RUN_ID/attempt_K/RANK/{stdout.log,stderr.log,error.json,stacks.log}``.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping

from elastic_launch.config import INHERIT, LogsDest, LogsSpecs, Std, to_map
from elastic_launch.errors import LaunchError, LogDirectoryError, UnavailableError
from elastic_launch.host.files import belongs_to_another, replaceable_part

STACKS = "stacks.log"
"""The file beside a worker's error file with the stacks of its threads, if the worker hung and was killed."""


class DefaultLogsSpecs(LogsSpecs):
    """The layout ``LOG_DIR/RUN_ID/attempt_K/RANK``, so that the job's id tells where its files are."""

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        """Store the options of the same names.

        Args:
            log_dir: the directory; None for a temporary one. As with torchrun, ``/dev/null`` means no files at all.
            redirects: which streams go to files instead of the console.
            tee: which streams go to files and to the console.
            local_ranks_filter: the local ranks whose output the console shows; None for all.
        """
        if log_dir == os.devnull:
            log_dir, redirects, tee = None, Std.NONE, Std.NONE
        super().__init__(log_dir, redirects, tee, local_ranks_filter)

    @property
    def root_log_dir(self) -> str | None:
        """The directory that the user chose; None for a temporary one."""
        return self._root_log_dir

    @property
    def keeps_output(self) -> bool:
        """Whether any output goes to files."""
        return any(any(std.values()) if isinstance(std, dict) else bool(std) for std in (self._redirects, self._tee))

    def asks_for_files(self, has_filters: bool) -> bool:
        """Return whether the user asked for files; ``has_filters``: for those with lines that match a filter."""
        return bool(self._root_log_dir) or self.keeps_output or has_filters

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Create the workers' directories, and name the files in them.

        Errors are ignored: with a full or missing disk the job runs, but without these files.
        """
        dest = LogsDest()
        workers = max(envs, default=-1) + 1
        redirects, tee = to_map(self._redirects, workers), to_map(self._tee, workers)
        for local_rank, environ in envs.items():
            folder = self._folder(environ, environ.get("RANK", str(local_rank)))
            with contextlib.suppress(OSError):
                os.makedirs(folder, exist_ok=True)
            shown = self._local_ranks_filter is None or local_rank in self._local_ranks_filter
            for std, name, files, shown_files in (
                (Std.OUT, "stdout.log", dest.stdouts, dest.tee_stdouts),
                (Std.ERR, "stderr.log", dest.stderrs, dest.tee_stderrs),
            ):
                path = os.path.join(folder, name)
                if not (redirects[local_rank] | tee[local_rank]) & std:
                    path = INHERIT if shown else os.devnull
                elif tee[local_rank] & std and shown:
                    shown_files[local_rank] = path
                files[local_rank] = path
            dest.error_files[local_rank] = os.path.join(folder, "error.json")
        environ = next(iter(envs.values()), {})
        node = environ.get("GROUP_RANK", "0")
        suffix = "" if node == "0" else f"_{node}"  # all agents may share the directory
        dest.filtered_stdout = os.path.join(self._folder(environ), f"filtered_stdout{suffix}.log")
        dest.filtered_stderr = os.path.join(self._folder(environ), f"filtered_stderr{suffix}.log")
        return dest

    def _folder(self, environ: Mapping[str, str], *rank: str) -> str:
        root = self._root_log_dir or os.path.join(environ.get("TMPDIR") or "/tmp", "elastic_launch")
        run_id, attempt = environ.get("TORCHELASTIC_RUN_ID", "none"), environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return os.path.join(os.path.abspath(root), as_file_name(run_id), f"attempt_{attempt}", *rank)


class JobFiles:
    """The files of one job on this node."""

    def __init__(
        self,
        specs: LogsSpecs,
        run_id: str,
        temp_dir: str,
        *,
        has_filters: bool = False,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Create the directory.

        Args:
            specs: what the user asked for. If it names no directory, one in ``temp_dir`` is used.
            run_id: the job's id. Characters that a file name cannot have are percent-encoded.
            temp_dir: the system's directory for temporary files.
            has_filters: whether the lines that match a filter go to a separate file.
            log: prints a line on the console.

        Raises:
            UnavailableError: the directory cannot be created (``LogDirectoryError`` if something else has its name), or
                is another user's.
        """
        self._specs = specs
        self._temporary: str | None = None
        self.root = specs.root_log_dir or ""
        if not isinstance(specs, DefaultLogsSpecs):
            return  # a plug-in has its own layout
        self.asked_for = specs.asks_for_files(has_filters)
        log_dir = specs.root_log_dir
        if not log_dir:
            self._specs = copy.copy(specs)
            self._temporary = log_dir = os.path.join(temp_dir, f"elastic_launch_{os.urandom(6).hex()}")
            self._specs._root_log_dir = log_dir
        self.root = os.path.join(log_dir, as_file_name(run_id))
        try:
            self.root = os.path.abspath(self.root)
            if not self._temporary:
                _check_others(self.root, str(log_dir), log)
            else:
                os.mkdir(self._temporary, mode=0o700)
            os.makedirs(self.root, exist_ok=True)
        except OSError as error:
            if self.asked_for:
                raise cannot_create(specs, self.root, error) from error
            # Otherwise there is no place for temporary files, and the job runs without error files.

    def prepare(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return where everything goes in a new round. Remove error files that an earlier job with the same id left.

        Args:
            envs: the workers' environments, by local rank.

        Raises:
            LaunchError: a plug-in failed.
        """
        try:
            dest = self._specs.reify(envs)
            # torch's class names /dev/null for no file. A worker would replace that by its own file.
            dest.error_files = {rank: path for rank, path in dest.error_files.items() if path != os.devnull}
            for path in dest.error_files.values():
                with contextlib.suppress(OSError):
                    os.unlink(path)
        except Exception as error:
            raise LaunchError(f"{type(self._specs).__qualname__}.reify(): {type(error).__name__}: {error}") from error
        return dest

    def close(self, keep: bool) -> None:
        """Remove the temporary directory, unless files in it are kept.

        Args:
            keep: whether to keep all files. Otherwise only the files that the user asked for and stacks are kept.
        """
        if self._temporary:
            for directory, _, files in os.walk(self._temporary, topdown=False):
                with contextlib.suppress(OSError):
                    # A message has told the user where the stacks of a worker are, even if the job then succeeded.
                    for file in () if keep or self.asked_for else {*files} - {STACKS}:
                        os.unlink(os.path.join(directory, file))
                    os.rmdir(directory)

    @property
    def chosen(self) -> str | None:
        """The job's directory if the user has chosen where it is; None if not, or if a plug-in has its own layout."""
        return self.root if isinstance(self._specs, DefaultLogsSpecs) and not self._temporary else None

    @property
    def output(self) -> str | None:
        """The job's directory if files with the workers' output are in it, because the user asked for them."""
        specs = self._specs
        keeps_output = isinstance(specs, DefaultLogsSpecs) and specs.keeps_output
        return self.root if keeps_output and output_files(self.root) else None

    @property
    def kept(self) -> bool:
        """Whether there are any files."""
        return any(files for _, _, files in os.walk(self.root))


def _check_others(root: str, log_dir: str, log: Callable[[str], None]) -> None:
    """Check what other users can do to the directory of a job's files. Say so if they can replace it.

    Raises:
        UnavailableError: one of them has put it, or what is above it, where everybody may write.
    """
    if theirs := belongs_to_another(root):
        raise UnavailableError(
            f"--log-dir={log_dir}: {theirs} belongs to another user, and is where everybody may write; "
            "choose another directory"
        )
    if above := replaceable_part(root):
        log(f"--log-dir={log_dir}: every user may replace files below {above}, which has no sticky bit")


def cannot_create(specs: LogsSpecs, path: str, error: OSError) -> UnavailableError:
    """Return the error to raise if a directory for files that the user asked for cannot be created."""
    name = f"--log-dir={specs.root_log_dir}" if specs.root_log_dir else "-r/-t without --log-dir"
    kind = LogDirectoryError if isinstance(error, NotADirectoryError) else UnavailableError
    return kind(f"{name}: cannot create {path}: {error.strerror}; choose another directory with --log-dir")


def output_files(root: str) -> list[tuple[int, int, str, str]]:
    """Find the output files of all rounds below a job's directory.

    Args:
        root: ``LOG_DIR/RUN_ID``; it need not exist.

    Returns:
        Round, global rank, ``stdout`` or ``stderr``, and path of each file.
    """
    found = []
    for attempt in _numbered(root, "attempt_"):
        for rank in _numbered(os.path.join(root, f"attempt_{attempt}")):
            for stream in ("stdout", "stderr"):
                path = os.path.join(root, f"attempt_{attempt}", str(rank), f"{stream}.log")
                if os.path.isfile(path):
                    found.append((attempt, rank, stream, path))
    return found


def _numbered(folder: str, prefix: str = "") -> list[int]:
    """Return the numbers that stand after a prefix in the names of what is in a directory, in order."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder) if folder else []
    numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())


def as_file_name(text: str) -> str:
    """Percent-encode what a file name should not contain, as in ``a%2Fb`` for ``a/b``."""
    if text.isalnum() and text.isascii():
        return text
    from urllib.parse import quote  # late: 3 ms, which most job ids save

    name = quote(os.fsencode(text), safe="")
    return name if name.strip(".") else f"_{name}"
