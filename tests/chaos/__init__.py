"""Real jobs on three hosts, and faults drawn from a seed: ``python -m tests.chaos``."""

from __future__ import annotations

from pathlib import Path


def chaos_worker_path() -> str:
    """Return the path of the workers' program."""
    return str(Path(__file__).with_name("chaos_worker.py"))
