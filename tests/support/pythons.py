"""The Python versions on this host under which the launcher is tried."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

MINORS = (11, 12, 13, 14)


@functools.cache
def pythons() -> dict[str, str]:
    """Return paths by version: this Python, and those that PATH or pyenv knows."""
    candidates = [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in MINORS))]
    if shutil.which("pyenv"):
        for version in _output("pyenv", "versions", "--bare").split():
            if version.startswith(tuple(f"3.{minor}." for minor in MINORS)):
                candidates.append(f"{_output('pyenv', 'prefix', version)}/bin/python")
    found: dict[str, str] = {}
    for path in candidates:
        if version := _output(path, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"):
            found.setdefault(version, path)
    return dict(sorted(found.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def _output(*command: str) -> str:
    """Return what a command prints; empty if it fails, as a shim of pyenv does for a version that is not chosen."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
