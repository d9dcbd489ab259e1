"""The examples in the docstrings of what users import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import elastic_launch
from tests.support.waiting import DEADLINE

EXPORTED = {getattr(elastic_launch, name).__module__ for name in elastic_launch.__all__}
NAMESPACES = ("events", "metrics", "run", "timer", "timer.client", "timer.server", "utils", "utils.data")
MODULES = {"elastic_launch", *EXPORTED, *(f"elastic_launch.{name}" for name in NAMESPACES)}
RUN = """
import doctest, importlib, sys
results = doctest.testmod(importlib.import_module(sys.argv[1]), optionflags=doctest.ELLIPSIS)
sys.exit(results.failed > 0)
"""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_in_docstrings(name: str, tmp_path: Path) -> None:
    """In a process of its own, since examples configure what belongs to the process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, name],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
