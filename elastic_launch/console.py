"""Floor 2: the launcher's own lines for people, on standard error."""

from __future__ import annotations

import contextlib
import os


def say(text: str) -> None:
    """Write one line, whole, whatever becomes of standard error: it must not end the job."""
    with contextlib.suppress(OSError):
        os.write(2, f"elastic-run: {text}\n".encode(errors="backslashreplace"))
