"""Layer 0: the one place where the launcher reads its environment. Everything else is handed what it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping

PART = "ELASTIC_LAUNCH_PART"
"""Variable of the agent's children that are no workers, such as the store's host: the agent's pid."""


def environment() -> dict[str, str]:
    """A copy of the variables as they are now."""
    return dict(os.environ)


def as_part(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that is part of the launcher: a keeper that is lost does not take it along."""
    return {**environ, PART: str(os.getpid())}
