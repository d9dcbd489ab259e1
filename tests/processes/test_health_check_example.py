"""The example of a health check: its checks of a real host, and those of GPUs with a module that stands for NVML."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "health_check.py"

PYNVML = """
import os
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8
class NVMLError(Exception): pass
class Event:
    def __init__(self, device, number): self.device, self.eventData, self.eventType = device, number, 8
faults = dict(word.split("=") for word in os.environ["FAULTS"].split())
xids = [int(number) for number in faults.get("xid", "").split(",") if number]
registered = []
def nvmlInit():
    if "driver" in faults: raise NVMLError("Driver Not Loaded")
def nvmlShutdown(): print("shut down") if os.environ.get("TELL") else None
def nvmlDeviceGetCount(): return int(faults.get("count", 2))
def nvmlDeviceGetHandleByIndex(index):
    if faults.get("lost") == str(index): raise NVMLError("GPU is lost")
    return index
def nvmlDeviceGetIndex(handle): return handle
def nvmlEventSetCreate(): return registered
def nvmlEventSetFree(events): pass
def nvmlDeviceRegisterEvents(handle, kinds, events): events.append(handle)
def nvmlEventSetWait_v2(events, milliseconds):
    assert 0 < milliseconds <= 1000
    if not xids: raise NVMLError("Timeout")
    return Event(registered[-1], xids.pop(0))
def nvmlDeviceGetTotalEccErrors(handle, kind, since):
    assert (kind, since) == (1, 0)
    if "ecc" not in faults: raise NVMLError("Not Supported")
    return int(faults["ecc"]) * handle
def nvmlDeviceGetRemappedRows(handle):
    rows = {"pending": (0, 1, 1, 0), "failed": (0, 1, 0, 1), "none": (0, 0, 0, 0)}
    if "rows" not in faults: raise NVMLError("Not Supported")
    return rows[faults["rows"] if handle else "none"]
"""


def run(*args: str, **env: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *args], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("faults", "problems"),
    [
        ("", []),
        ("count=1", ["1 of 2 GPUs"]),
        ("driver=no", ["NVML: Driver Not Loaded"]),
        ("lost=1", ["GPU 1: GPU is lost"]),
        ("ecc=0", []),
        ("ecc=3", ["GPU 1: 3 uncorrected ECC errors since the driver was loaded"]),
        ("rows=none", []),
        ("rows=pending", ["GPU 1: a row of its memory is broken and is replaced at the next reset"]),
        ("rows=failed", ["GPU 1: a row of its memory is broken and could not be replaced"]),
        ("xid=79", ["GPU 1: Xid 79"]),
        ("xid=31,48", ["GPU 1: Xid 48"]),
    ],
)
def test_gpus_are_checked_through_nvml(faults: str, problems: list[str], tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text(PYNVML)
    status, lines = run("--gpus", "2", PYTHONPATH=str(tmp_path), FAULTS=faults)
    assert (status, lines) == (1 if problems else 0, problems)


def test_without_pynvml_gpus_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    assert run("--gpus", "1", PYTHONPATH=str(tmp_path)) == (
        1,
        ["pynvml is not installed (pip install nvidia-ml-py)"],
    )


def test_shared_memory_is_measured() -> None:
    assert run("--shm", "0.000001") == (0, [])
    status, [line] = run("--shm", "1e9")
    assert status == 1
    assert line.startswith("/dev/shm: ")


def test_a_directory_for_checkpoints_is_written_to(tmp_path: Path) -> None:
    assert run("--checkpoints", str(tmp_path)) == (0, [])
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "missing"
    assert run("--checkpoints", str(missing)) == (1, [f"{missing}: cannot be written: No such file or directory"])


def test_all_problems_are_told(tmp_path: Path) -> None:
    status, lines = run("--shm", "1e9", "--checkpoints", str(tmp_path / "missing"))
    assert (status, len(lines)) == (1, 2)


def test_without_arguments_there_is_nothing_to_check() -> None:
    assert run() == (0, [])
