"""Floor 0: the one place where the launcher reads its environment. Everything else is handed what it needs."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """A copy of the variables as they are now."""
    return dict(os.environ)
