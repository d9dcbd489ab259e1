"""Read the launcher's environment. No other module reads it; each gets the variables that it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping

_CONF = "PET_RDZV_CONF"
"""Variable that stands for ``--rdzv-conf``."""
PART = "ELASTIC_LAUNCH_PART"
"""Variable that marks the agent's helper processes, such as the store's host; its value is the agent's pid."""
TOKEN_FILE = "ELASTIC_LAUNCH_TOKEN_FILE"
"""Variable that names the file with the job's token if ``--token-file`` does not."""


def environment() -> dict[str, str]:
    """Return a copy of the variables as they are now."""
    return dict(os.environ)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of workers, which need neither a password for etcd nor the token, and pass no gate."""
    names = [TOKEN_FILE, "PET_TOKEN_FILE", "PET_STORE_GATE"]
    names += [_CONF] if "password=" in environ.get(_CONF, "").replace(" ", "") else []
    return {name: value for name, value in environ.items() if name not in names}


def as_part(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a helper process, with its mark. If the keeper is lost, marked processes are spared."""
    return {**environ, PART: str(os.getpid())}
