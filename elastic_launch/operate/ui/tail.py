"""The end of one rank's output, and what is appended to it."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elastic_launch.host.files import open_regular
from elastic_launch.operate.logs import LogFile, files_of, find_last

LINES = 200
"""Lines with which a tail begins."""
MAX_BYTES = 256 << 10
"""Bytes that are read at once. A tail that is further behind leaves out what is between."""


class Choice(NamedTuple):
    """Whose output is shown."""

    rank: int
    stream: str
    """``stdout`` or ``stderr``."""
    round: int | None
    """None: the latest."""

    def among(self, agents: Sequence[Mapping[str, Any]]) -> LogFile | None:
        """Return the file of the jobs' agents that is meant; None: there is none."""
        files = [it for it in files_of(agents, self.rank) if it.stream == self.stream]
        return next((it for it in reversed(files) if self.round in (None, it.round)), None)


class Tail:
    """Reads a file from its last lines on."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._at: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> str:
        """Return what is new. The file may not exist yet, or any more."""
        try:
            with open(self.file.path, "rb", opener=open_regular) as opened:
                size = os.fstat(opened.fileno()).st_size
                if self._at is None:
                    self._at, _, size = find_last(opened, LINES)
                elif self._at > size:  # somebody has emptied it
                    self._at = 0
                skipped = max(0, size - self._at - MAX_BYTES)
                opened.seek(self._at + skipped)
                data = opened.read(MAX_BYTES)
                self._at += skipped + len(data)
        except OSError:
            return ""
        note = f"\n[{skipped:,} bytes are left out here]\n" if skipped else ""
        return note + self._decoder.decode(data)
