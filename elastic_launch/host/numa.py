"""Find the CPUs near each worker's GPU, for ``--numa-binding``.

Reads the topology from /sys, and the GPUs from NVML or from their driver's files in /proc, both only when asked. The
keeper binds the workers when it starts them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from elastic_launch.core.placement import format_list, parse_list, share, visible_cuda_devices
from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.host import nvml


class AffinityMode(StrEnum):
    """Which CPUs a worker is bound to. The names and values are torch's."""

    NODE = "node"
    """All CPUs of the NUMA node of its GPU. Use this one when in doubt."""
    SOCKET = "socket"
    """All CPUs of the socket of its GPU's NUMA node, which may have more than one node."""
    EXCLUSIVE = "exclusive"
    """CPU cores for this worker alone: those of the GPU's NUMA node, divided evenly among the GPUs there."""
    CORE_COMPLEX = "core-complex"
    """CPUs of the GPU's NUMA node that share a last-level cache. Each GPU gets another cache if there are enough."""


@dataclass(frozen=True)
class NumaOptions:
    """The value of ``LaunchConfig.numa_options``. The fields are torch's, and torch's own class is accepted, too."""

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False
    """Whether workers run unbound if they cannot be bound. If not, the job does not start."""


def mode_of(options: object) -> tuple[str, bool]:
    """Return the mode, and whether to start unbound workers if binding fails.

    Args:
        options: the name of a mode, a mode, or a ``NumaOptions``, ours or torch's.

    Raises:
        UsageError: there is no such mode.
    """
    mode = getattr(options, "affinity_mode", options)
    mode = getattr(mode, "value", mode)
    if mode not in list(AffinityMode):
        raise UsageError(f"--numa-binding={mode!r}: must be one of {', '.join(AffinityMode)}")
    return str(mode), bool(getattr(options, "should_fall_back_if_binding_fails", False))


def bind(
    options: object, workers: int, environ: Mapping[str, str], log: Callable[[str], None]
) -> dict[int, frozenset[int]]:
    """Return the result of ``bindings`` by local rank; empty if it fails and ``options`` allow that.

    Args:
        options: as for ``mode_of``.
        workers: the number of workers on this node.
        environ: the workers' environment.
        log: receives a warning if the workers cannot be bound.

    Raises:
        UsageError: the options are invalid.
        UnavailableError: the workers cannot be bound as asked.
    """
    mode, may_fail = mode_of(options)
    try:
        return dict(enumerate(bindings(mode, workers, environ)))
    except UnavailableError as error:
        if not may_fail:
            raise
        log(f"{error}; starting workers without binding")
        return {}


def bindings(mode: str, workers: int, environ: Mapping[str, str], root: str = "/") -> list[frozenset[int]]:
    """Return the CPUs of each worker, by local rank: at least one each, and only CPUs that this process may use.

    Local rank N has the Nth of the GPUs that ``CUDA_VISIBLE_DEVICES`` shows. Workers are spread evenly over the NUMA
    nodes that have usable CPUs if there are no GPUs, if there are fewer than workers, or if the host does not know
    their nodes (a virtual machine). Cores and caches of a node are divided among its visible GPUs, including those
    without a worker, or among its workers if they are spread.

    With GPUs of different models, numbers mean what they mean to CUDA only if ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` is set.

    Args:
        mode: a value of ``AffinityMode``.
        workers: the number of workers on this node.
        environ: the workers' environment, for ``CUDA_VISIBLE_DEVICES``.
        root: the directory with ``dev``, ``proc`` and ``sys``.

    Raises:
        UsageError: there is no such mode.
        UnavailableError: a worker's node has no usable CPU or too few cores, or the host does not show its topology.
    """
    mode, _ = mode_of(mode)
    option = f"--numa-binding={mode}"
    allowed = frozenset(os.sched_getaffinity(0))
    try:
        nodes = _nodes(root)
        near = [_node_of(address, root) for address in _visible_gpus(option, environ, root)]
        if len(near) < workers or -1 in near:
            usable = sorted(node for node, cpus in nodes.items() if cpus & allowed)
            if not usable:
                raise UnavailableError(f"{option}: no NUMA node has a CPU that this process may use")
            near = [usable[rank * len(usable) // workers] for rank in range(workers)]
        parts = {node: _parts(mode, nodes, node, allowed, root) for node in set(near[:workers])}
    except OSError as error:
        raise UnavailableError(
            f"{option}: cannot read {error.filename}: {error.strerror}; this host does not show its topology, "
            "so start without --numa-binding"
        ) from error
    found = []
    for rank, node in enumerate(near[:workers]):
        index, sharing = near[:rank].count(node), near.count(node)
        if mode == AffinityMode.EXCLUSIVE:
            cpus = share(parts[node], index, sharing)
        else:
            cpus = parts[node][index % len(parts[node])] if parts[node] else frozenset()
        if not cpus:
            whole = nodes.get(node, frozenset())
            raise UnavailableError(
                f"{option}: NUMA node {node} has no CPU core for local rank {rank}: of its CPUs "
                f"({format_list(whole) or 'none'}) this process may use {format_list(whole & allowed) or 'none'}"
                + (f", and {sharing} GPUs or workers share them" if sharing > 1 else "")
                + "; allow it more CPUs, or try another mode"
            )
        found.append(cpus)
    return found


def _parts(
    mode: str, nodes: Mapping[int, frozenset[int]], node: int, allowed: frozenset[int], root: str
) -> list[frozenset[int]]:
    """Return what a node offers: its cores, its caches, or all its CPUs at once; empty if it has no usable CPU."""
    whole = nodes.get(node, frozenset())
    cpus = whole & allowed
    if mode == AffinityMode.EXCLUSIVE:
        return _groups(cpus, lambda cpu: _core_of(cpu, root))
    if mode == AffinityMode.CORE_COMPLEX:
        # The largest first: a complex that a mask or a dead core has reduced is worth less than a whole one.
        return sorted(_groups(cpus, lambda cpu: _last_cache_of(cpu, root)), key=len, reverse=True)
    if mode == AffinityMode.SOCKET and whole:
        socket = _socket_of(whole, root)
        cpus = allowed.intersection(
            cpu for other in nodes.values() if other and _socket_of(other, root) == socket for cpu in other
        )
    return [cpus] if cpus else []


def _groups(cpus: frozenset[int], group_of: Callable[[int], frozenset[int]]) -> list[frozenset[int]]:
    """Split CPUs into the groups that they belong to, in the order of the groups' first CPUs."""
    groups: dict[tuple[int, int], frozenset[int]] = {}
    left = set(cpus)
    while left:
        cpu = min(left)
        group = group_of(cpu) | {cpu}
        groups[min(group), cpu] = group & left
        left -= group
    return [groups[first] for first in sorted(groups)]


# ---- CPUs, from /sys


def _read(root: str, path: str) -> str:
    with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _nodes(root: str) -> dict[int, frozenset[int]]:
    """Return the CPUs of each NUMA node. A node that has only memory is empty."""
    folder = "sys/devices/system/node"
    online = parse_list(_read(root, f"{folder}/online"))
    return {node: parse_list(_read(root, f"{folder}/node{node}/cpulist")) for node in online}


def _socket_of(node: frozenset[int], root: str) -> str:
    return _read(root, f"sys/devices/system/cpu/cpu{min(node)}/topology/physical_package_id")


def _core_of(cpu: int, root: str) -> frozenset[int]:
    return parse_list(_read(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))


def _last_cache_of(cpu: int, root: str) -> frozenset[int]:
    """Return the CPUs that share this CPU's cache of the highest level."""
    folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
    caches = [
        (int(_read(root, f"{folder}/{name}/level")), f"{folder}/{name}/shared_cpu_list")
        for name in os.listdir(os.path.join(root, folder))
        if name.startswith("index") and _read(root, f"{folder}/{name}/type") != "Instruction"
    ]
    return parse_list(_read(root, max(caches)[1])) if caches else frozenset()


# ---- GPUs


def _node_of(address: str, root: str) -> int:
    """Return the NUMA node of a PCI device; -1 if the host does not know it."""
    try:
        return int(_read(root, f"sys/bus/pci/devices/{address}/numa_node"))
    except (OSError, ValueError):
        return -1


def _visible_gpus(option: str, environ: Mapping[str, str], root: str) -> list[str]:
    """Return the PCI addresses of the NVIDIA GPUs that CUDA shows the workers, in CUDA's order.

    Raises:
        UnavailableError: ``CUDA_VISIBLE_DEVICES`` names MIG devices, and NVML cannot say which GPUs they belong to.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    mig_devices = [entry.strip() for entry in value.split(",")] if value and "MIG-" in value else []
    try:
        gpus, parents = nvml.query(mig_devices)
    except nvml.NvmlError as error:
        gpus, parents = _gpus_from_driver(root), []
        if mig_devices and gpus:
            raise UnavailableError(
                f"{option}: CUDA_VISIBLE_DEVICES={value!r} names MIG devices, and only NVML knows which GPUs they are "
                f"part of ({error}); install elastic-launch[nvml], or start without --numa-binding"
            ) from error
    if mig_devices:
        return parents
    visible = visible_cuda_devices(value, [gpu.uuid for gpu in gpus])
    return [gpus[i].pci_address for i in visible or []]


def _gpus_from_driver(root: str) -> list[nvml.Gpu]:
    """Return the GPUs that NVIDIA's driver lists, in the order of their PCI addresses; empty without a driver.

    In some containers it lists all GPUs of the host. Those without a device file do not belong to the container.
    """
    folder = os.path.join(root, "proc/driver/nvidia/gpus")
    try:
        addresses = sorted(os.listdir(folder))
    except OSError:
        return []
    gpus = []
    for address in addresses:
        pairs = (line.partition(":") for line in _read(folder, f"{address}/information").splitlines())
        facts = {name.strip(): value.strip() for name, _, value in pairs}
        minor = facts.get("Device Minor")
        if minor is None or os.path.exists(os.path.join(root, f"dev/nvidia{minor}")):
            gpus.append(nvml.Gpu(facts.get("GPU UUID", ""), address))
    return gpus
