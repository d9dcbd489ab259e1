"""What every test gets: a job to launch in a directory of its own, and the proof that it left nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

from elastic_launch.workers.keeper_main import set_subreaper
from tests.support.jobs import Job
from tests.support.leaks import nothing_left
from tests.support.pythons import pythons
from tests.support.servers import stop_shared

settings.register_profile("small", max_examples=30, deadline=None, database=None, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None, database=None, print_blob=True)
settings.load_profile("small")  # "make fuzz" loads the other one


def pytest_report_header() -> str:
    """Say under which versions of Python the launcher is tried (``test_packaging.py``), and with which torch."""
    return f"pythons: {', '.join(pythons())}; torch: {version('torch')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as quick what needs no process, and does not import torch; elsewhere tests are marked one by one.

    Of the simulation's blocks of random schedules, each of which takes seconds, the first two are quick.
    """
    if "programs" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("programs")])
        items[:] = [item for item in items if not item.get_closest_marker("programs")]
    for item in items:
        block = item.callspec.params.get("block", 0) if hasattr(item, "callspec") else 0
        if (
            item.path.parent.name in ("decisions", "simulation", "fuzz")
            and block < 2
            and not item.get_closest_marker("torch")
        ):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the collection has made: the simulation would take a tenth longer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _adopt_orphans() -> None:
    """Whatever a test orphans becomes this process's own child, where ``_nothing_left`` finds it."""
    set_subreaper(True)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell has its background jobs ignore SIGINT, nohup has them ignore SIGHUP: programs under test would, too."""
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.fixture(autouse=True, scope="session")
def _shared_servers() -> Iterator[None]:
    """Those that tests have started for each other end with the last test."""
    yield
    stop_shared()


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test that leaves a process, a thread, a descriptor or a temporary file."""
    tmp_path_factory.getbasetemp()  # is made before TMPDIR changes
    # Not below tmp_path: programs make Unix sockets here, and the path of one has 107 bytes at most.
    temp = Path(tempfile.mkdtemp(prefix="test-"))
    monkeypatch.setenv("TMPDIR", str(temp))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in os.environ:
        prefixes = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_", "ELASTIC_LAUNCH_", "XDG_RUNTIME_DIR")
        if name.startswith(prefixes) or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")
    try:
        with nothing_left(temp):
            yield
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say how many threads a worker may have, so that the launcher need not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job to be launched; what still runs of it at the end of the test is killed."""
    job = Job(tmp_path)
    yield job
    for process in job.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
