"""Check a node before its workers start: GPUs, shared memory, and the directory for checkpoints.

    elastic-run --health-check "python health_check.py --gpus 8 --shm 8 --checkpoints /data/ckpt" ... train.py

Each problem is printed in a line, and the exit status is then 1. Needs only the standard library; for GPUs also
``pip install nvidia-ml-py``. Adapt it: a check that takes seconds may as well run a small matrix product on each GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

APPLICATION_XIDS = {13, 31, 43, 45, 68}
"""Xid errors that a program causes, so that they say nothing of the GPU."""


def gpu_problems(expected: int, xid_seconds: float) -> Iterator[str]:
    """Ask NVML for the number of GPUs, for memory errors, and for Xid errors that occur in the next seconds."""
    try:
        import pynvml
    except ImportError:
        yield "pynvml is not installed (pip install nvidia-ml-py)"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield f"NVML: {error}"
        return
    try:
        count = pynvml.nvmlDeviceGetCount()
        if count < expected:
            yield f"{count} of {expected} GPUs"
        events = pynvml.nvmlEventSetCreate()
        for index in range(count):
            try:
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, events)
            except pynvml.NVMLError as error:
                yield f"GPU {index}: {error}"
                continue
            yield from memory_problems(pynvml, index, gpu)
        end = time.monotonic() + xid_seconds
        while (left := end - time.monotonic()) > 0:
            try:
                event = pynvml.nvmlEventSetWait_v2(events, max(1, int(left * 1000)))
            except pynvml.NVMLError:  # nothing has happened
                break
            if event.eventData not in APPLICATION_XIDS:
                yield f"GPU {pynvml.nvmlDeviceGetIndex(event.device)}: Xid {event.eventData}"
        pynvml.nvmlEventSetFree(events)
    finally:
        pynvml.nvmlShutdown()


def memory_problems(nvml: Any, index: int, gpu: object) -> Iterator[str]:
    """Look for memory errors since the driver was loaded, and for rows that could not be replaced."""
    try:
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        if errors := nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since):
            yield f"GPU {index}: {errors} uncorrected ECC errors since the driver was loaded"
    except nvml.NVMLError:
        pass  # it has no ECC, or it is off
    try:
        _, _, is_pending, has_failed = nvml.nvmlDeviceGetRemappedRows(gpu)
        if has_failed:
            yield f"GPU {index}: a row of its memory is broken and could not be replaced"
        elif is_pending:
            yield f"GPU {index}: a row of its memory is broken and is replaced at the next reset"
    except nvml.NVMLError:
        pass  # an older model


def shared_memory_problems(gigabytes: float, path: str = "/dev/shm") -> Iterator[str]:
    """Look for free space for DataLoader workers and NCCL."""
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize / 1e9
    if free < gigabytes:
        yield f"{path}: {free:.1f} GB free, less than {gigabytes:g} GB"


def directory_problems(path: str) -> Iterator[str]:
    """Write a file there, as a checkpoint would be."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{path}: cannot be written: {error.strerror}"


def main() -> int:
    """Run the checks that the arguments ask for."""
    parser = argparse.ArgumentParser(description="Check a node before its workers start.")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that must be there and work; 0: any")
    parser.add_argument("--xid-seconds", type=float, default=1.0, metavar="SECONDS", help="how long to wait for Xids")
    parser.add_argument("--shm", type=float, default=0.0, metavar="GB", help="free space that /dev/shm must have")
    parser.add_argument("--checkpoints", default="", metavar="DIR", help="directory that must be writable")
    args = parser.parse_args()
    problems = [
        *(gpu_problems(args.gpus, args.xid_seconds) if args.gpus else ()),
        *shared_memory_problems(args.shm),
        *(directory_problems(args.checkpoints) if args.checkpoints else ()),
    ]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
