"""Layer 2: how many workers a host has room for: its CPUs, its GPUs, its other accelerators.

Reads /proc and /sys, talks to NVML, and runs one short-lived child that may import torch; this process never does. All
that costs time is imported where it is used: a plain number needs none of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

from elastic_launch.core.placement import visible_cuda_devices
from elastic_launch.errors import UsageError, signal_name
from elastic_launch.parsing import is_number

MAX_WORKERS = 1 << 16
"""More on one host is a slip of the keyboard."""

TORCH_DEADLINE = 120.0
"""Seconds that the child which imports torch may take; it is slow where torch lies on a cold network disk."""

# Its argument is a device's name, or "auto". It answers "COUNT VERSION"; -1: torch knows no such accelerator.
_ASK_TORCH = """
import os, sys
answer = os.dup(1)
os.dup2(2, 1)  # torch, or a plugin of it, may print: stdout is for the answer alone
import torch
name = sys.argv[1]
if name == "auto":
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():  # since 2.6
        name = torch.accelerator.current_accelerator().type
    else:
        name = "cuda" if torch.cuda.is_available() else "xpu"
try:
    torch.device(name)
    module = getattr(torch, name)
except (AttributeError, RuntimeError):
    module = None  # not the name of a device (as "accelerator"), or of one that is no hardware (as "meta")
if module is None:
    count = -1
elif not module.is_available():
    count = 0
else:
    # torch.cuda.device_count() may take NVML's word, which counts cards: wrong where they are cut up (MIG).
    runtime = getattr(torch._C, "_cuda_getDeviceCount", None) if name == "cuda" else None
    count = (runtime or module.device_count)()
os.write(answer, f"{count} {torch.__version__}".encode())
os._exit(0)  # the answer stands, however a driver takes being unloaded
"""


def local_world_size(nproc_per_node: str, environ: Mapping[str, str]) -> int:
    """The number of workers that ``--nproc-per-node`` asks for, at least 1.

    ``environ`` decides which devices are visible, as it will for the workers. Raises UsageError.
    """
    if is_number(nproc_per_node) and 1 <= int(nproc_per_node) <= MAX_WORKERS:
        return int(nproc_per_node)
    if nproc_per_node == "cpu":
        return cpu_count()
    option = f"--nproc-per-node={ascii(nproc_per_node)[1:-1]}"  # ascii: one line, and what looks like a digit shows
    refusal = UsageError(
        f"{option}: must be a number from 1 to {MAX_WORKERS}, "
        "or auto, cpu, gpu, xpu (or another accelerator that torch knows)"
    )
    name = "cuda" if nproc_per_node == "gpu" else nproc_per_node
    if not (name.isascii() and name.isidentifier()):
        raise refusal
    torch_init = _torch_init()
    if name == "auto" and torch_init and _is_cpu_only(torch_init):
        return cpu_count()

    count, why = _ask_nvml(environ, torch_init is not None) if name in ("auto", "cuda") else (None, "")
    if torch_init and (count is None or (name == "auto" and count == 0)):  # 0: there may be another maker's device
        count, why = _ask_torch(name, environ)
        if count is None:
            raise UsageError(f"{option}: asking torch for devices failed: {why}; pass a number or cpu")
    elif count is None and name in ("auto", "cuda", "xpu"):
        count, why = 0, "torch is not installed" + (f" and NVML cannot be asked ({why})" if why else "")
    if count is None or count < 0:
        raise refusal
    if count == 0 and name != "auto":
        kind, host = "GPU" if name == "cuda" else name.upper(), os.uname().nodename
        raise UsageError(f"{option}: this host ({host}) has no usable {kind}: {why}; pass a number or cpu")
    return count or cpu_count()


def cpu_count(root: str = "/") -> int:
    """CPUs that this process may use, at least 1: its affinity mask, or its cgroups' quota rounded up where less.

    ``root`` is where ``proc`` and ``sys`` are.
    """
    return min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])


def _cpu_quotas(root: str) -> Iterator[int]:
    """The quotas, in CPUs, of this process's cgroups and all above them. What cannot be read or understood is none."""
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, files = ["sys/fs/cgroup"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            # Version 1. The folder is named for all that is mounted there; "cpu" is its usual second name.
            mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the path may be the host's: then its folders are not there, and the mount's own files count.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                folder = "/".join([mount, *parts[:depth]])
                try:
                    quota, period = map(int, " ".join(_read(root, f"{folder}/{file}") for file in files).split())
                    if quota > 0 and period > 0:  # -1 is no limit; version 2 says "max", which is no number
                        yield -(-quota // period)
                except ValueError:
                    continue


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _ask_nvml(environ: Mapping[str, str], torch_installed: bool) -> tuple[int | None, str]:
    """The number of visible NVIDIA GPUs and, where it is 0, why; None and why where NVML cannot say."""
    try:
        import pynvml
    except ImportError as error:
        return None, str(error)

    def has_mig(handle: object) -> bool:
        try:
            return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        except pynvml.NVMLError:  # a model without MIG
            return False

    try:
        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            uuids = [pynvml.nvmlDeviceGetUUID(gpu) for gpu in gpus]  # bytes in old releases of pynvml
            mig = any(map(has_mig, gpus))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, str(error)
    value = environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible_cuda_devices(value, [uuid.decode() if isinstance(uuid, bytes) else uuid for uuid in uuids])
    if visible == [] or not gpus:
        return 0, f"CUDA_VISIBLE_DEVICES={value!r} hides all {len(gpus)}" if gpus else "NVML found 0"
    if visible is None or mig:
        # CUDA shows a process one compute instance at most, and not beside whole GPUs. What this process sees only CUDA
        # can tell; the more so as CUDA's order of unequal cards, which the numbers follow, is not NVML's.
        return (None, "MIG is in use") if torch_installed else (1, "")
    return len(visible), ""


def _torch_init() -> str | None:
    """Path of the package torch's first file; None where torch is not installed. Imports nothing of it."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return spec.origin if spec else None  # a folder that happens to be called torch has no origin


def _is_cpu_only(torch_init: str) -> bool:
    """Whether importing torch is certain to find no accelerator, so that ``auto`` need not wait for it.

    So it is with a CPU wheel of torch, if no other package has a backend for torch to load.
    """
    if "+cpu'" not in _read(os.path.dirname(torch_init), "version.py"):
        return False
    from importlib.metadata import entry_points

    return not entry_points(group="torch.backends")


def _ask_torch(name: str, environ: Mapping[str, str]) -> tuple[int | None, str]:
    """The number of devices of that name (-1: torch knows no such accelerator) and why 0; None and why on failure."""
    import subprocess

    # -P: the working directory may hold a file with the name of a module that torch imports.
    argv = [sys.executable, "-P", "-c", _ASK_TORCH, name]
    try:
        child = subprocess.run(
            argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=TORCH_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {TORCH_DEADLINE:g} s"
    lines, errors = (out.decode(errors="replace").strip().splitlines() for out in (child.stdout, child.stderr))
    if child.returncode < 0:
        return None, f"its process was killed by {signal_name(-child.returncode)}"
    count, _, version = lines[-1].partition(" ") if lines else ("", "", "")
    if not count.removeprefix("-").isdigit():
        return None, errors[-1] if errors else f"exit code {child.returncode} and no answer"
    hidden = " ".join(f"{key}={environ[key]!r}" for key in sorted(environ) if key.endswith("VISIBLE_DEVICES"))
    return int(count), f"torch {version} finds none" + (f" with {hidden}" if hidden else "")
