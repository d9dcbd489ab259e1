"""Find out how many workers a host has room for: its CPUs, GPUs and other accelerators.

Reads /proc and /sys, asks NVML, and runs one short-lived child that may import torch. This process never imports it.
Everything slow is imported where it is used, because a plain number of workers needs none of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

from elastic_launch.core.placement import visible_cuda_devices
from elastic_launch.errors import UsageError, signal_name
from elastic_launch.host.cgroup import cgroup_folders, read
from elastic_launch.parsing import is_number

MAX_WORKERS = 1 << 16
"""A larger number of workers on one host is taken for a typing error."""

ACCELERATORS = ("nvidia", "kfd", "dri", "accel", "vfio", "neuron", "habanalabs", "davinci")
"""Prefixes of the names that accelerators have in /dev."""

TORCH_DEADLINE = 120.0
"""Seconds that the child may take to import torch, which is slow from a cold network disk."""

# Its argument is a device's name or "auto". It answers "COUNT VERSION"; -1 means that torch does not know the name.
_ASK_TORCH = """
import os, sys
answer = os.dup(1)
os.dup2(2, 1)  # torch or one of its plug-ins may print; stdout is for the answer alone
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
    module = None  # not the name of a device ("accelerator"), or of one that is not hardware ("meta")
if module is None:
    count = -1
elif not module.is_available():
    count = 0
else:
    # torch.cuda.device_count() may ask NVML, which counts cards. That is wrong if they are divided (MIG).
    runtime = getattr(torch._C, "_cuda_getDeviceCount", None) if name == "cuda" else None
    count = (runtime or module.device_count)()
os.write(answer, f"{count} {torch.__version__}".encode())
os._exit(0)  # without unloading drivers, which may crash
"""


def local_world_size(nproc_per_node: str, environ: Mapping[str, str]) -> int:
    """Return the number of workers that ``--nproc-per-node`` asks for, at least 1.

    Args:
        nproc_per_node: the option's value.
        environ: the workers' environment, which decides what devices they can see.

    Raises:
        UsageError: the value is invalid, or this host has no such device.
    """
    if is_number(nproc_per_node) and 1 <= int(nproc_per_node) <= MAX_WORKERS:
        return int(nproc_per_node)
    if nproc_per_node == "cpu":
        return cpu_count()
    option = f"--nproc-per-node={ascii(nproc_per_node)[1:-1]}"  # ascii: one line, and look-alikes of digits show
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

    count, why = _count_with_nvml(environ, torch_init is not None) if name in ("auto", "cuda") else (None, "")
    if torch_init and (count is None or (name == "auto" and count == 0)):  # 0: there may be other accelerators
        count, why = _count_with_torch(name, environ)
        if count is None:
            raise UsageError(f"{option}: asking torch for devices failed: {why}; pass a number or cpu")
    elif count is None and name in ("auto", "cuda", "xpu"):
        count, why = 0, "torch is not installed" + (f", and NVML is not available ({why})" if why else "")
    if count is None or count < 0:
        raise refusal
    if count == 0 and name != "auto":
        kind, host = "GPU" if name == "cuda" else name.upper(), os.uname().nodename
        raise UsageError(f"{option}: this host ({host}) has no usable {kind}: {why}; pass a number or cpu")
    return count or cpu_count()


def has_accelerator(folder: str = "/dev") -> bool:
    """Return whether this host may have an accelerator: it has such a device file, whoever may use it."""
    try:
        return any(name.startswith(ACCELERATORS) for name in os.listdir(folder))
    except OSError:
        return True  # nobody can tell


def cpu_count(root: str = "/") -> int:
    """Return the number of CPUs that this process may use, at least 1.

    This is the size of its affinity mask or, if that is less, the quota of its cgroups, rounded up.

    Args:
        root: the directory with ``proc`` and ``sys``.
    """
    return min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])


def _cpu_quotas(root: str) -> Iterator[int]:
    """Yield the quotas of this process's cgroup and of all above it, in CPUs. Skip what cannot be read or parsed."""
    for folder in cgroup_folders("cpu", root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
            try:
                quota, period = map(int, " ".join(read(root, f"{folder}/{name}") for name in names).split())
            except ValueError:
                continue  # version 2 says "max" for no limit
            if quota > 0 and period > 0:  # version 1 says -1
                yield -(-quota // period)


def _count_with_nvml(environ: Mapping[str, str], is_torch_installed: bool) -> tuple[int | None, str]:
    """Return the number of visible NVIDIA GPUs and, if it is 0, why; None and why if NVML cannot say."""
    from elastic_launch.host import nvml  # late: most jobs say how many workers they want

    try:
        gpus, _ = nvml.query()
    except nvml.NvmlError as error:
        return None, str(error)
    value = environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible_cuda_devices(value, [gpu.uuid for gpu in gpus])
    if visible == [] or not gpus:
        return 0, f"CUDA_VISIBLE_DEVICES={value!r} hides all {len(gpus)}" if gpus else "NVML found 0"
    if visible is None or any(gpu.has_mig for gpu in gpus):
        # CUDA shows a process at most one compute instance, and none beside whole GPUs. Only CUDA knows what this
        # process sees. Besides, the numbers follow CUDA's order of unequal cards, which is not NVML's.
        return (None, "MIG is in use") if is_torch_installed else (1, "")
    return len(visible), ""


def _torch_init() -> str | None:
    """Return the path of torch's first file, without importing it; None if torch is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    return spec.origin if spec else None  # a directory that happens to be called torch has no origin


def _is_cpu_only(torch_init: str) -> bool:
    """Return whether torch is certain to find no accelerator, so that ``auto`` need not wait for its import.

    This is the case for a CPU wheel of torch, unless another package has a backend for torch to load.
    """
    if "+cpu'" not in read(os.path.dirname(torch_init), "version.py"):
        return False
    from importlib.metadata import entry_points

    return not entry_points(group="torch.backends")


def _count_with_torch(name: str, environ: Mapping[str, str]) -> tuple[int | None, str]:
    """Have a child process count a kind of devices with torch.

    Returns:
        The number of devices, -1 if torch does not know their name, and why it is 0; None and why if this fails.
    """
    import subprocess

    # -P: the working directory may hold a file named like a module that torch imports.
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
