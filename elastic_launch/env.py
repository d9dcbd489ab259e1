"""Read the launcher's environment. No other module reads it; each gets the variables that it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping

PART = "ELASTIC_LAUNCH_PART"
"""Variable that marks the agent's helper processes, such as the store's host; its value is the agent's pid."""


def environment() -> dict[str, str]:
    """Return a copy of the variables as they are now."""
    return dict(os.environ)


def as_part(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a helper process, with its mark. If the keeper is lost, marked processes are spared."""
    return {**environ, PART: str(os.getpid())}
