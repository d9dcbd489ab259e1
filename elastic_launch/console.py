"""Floor 2: the launcher's own lines for people, on standard error."""

from __future__ import annotations

import contextlib
import os


def say(text: str) -> None:
    """Write one line of the launcher's."""
    write(f"elastic-run: {text}\n")


def write(text: str) -> None:
    """Write to standard error, whatever becomes of it: it must not end the job."""
    data = memoryview(text.encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
