"""Layer 2: the CPUs near a worker's GPU, for ``--numa-binding``.

Reads the topology from /sys and the GPUs from NVML or their driver's files in /proc; nothing of it before it is asked
for. It binds nobody: who starts a worker does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from elastic_launch.core.placement import format_list, parse_list, share, visible_cuda_devices
from elastic_launch.errors import UnavailableError, UsageError


class AffinityMode(StrEnum):
    """To which CPUs a worker is bound. The names and values are torch's."""

    NODE = "node"
    """To all CPUs of its GPU's NUMA node. The one to take when in doubt."""
    SOCKET = "socket"
    """To all CPUs of all NUMA nodes of that node's socket."""
    EXCLUSIVE = "exclusive"
    """To CPU cores of its own: those of the node, divided evenly among the GPUs there."""
    CORE_COMPLEX = "core-complex"
    """To the CPUs of the node that share one last-level cache, another one for each GPU as long as there are."""


@dataclass(frozen=True)
class NumaOptions:
    """``LaunchConfig.numa_options``. The fields are torch's, whose own class is taken just as well."""

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False
    """Whether workers run unbound where they cannot be bound; else the job does not start."""


def mode_of(options: object) -> tuple[str, bool]:
    """The mode, and whether to go on without it where it fails.

    ``options`` is a mode's name, a mode, or a NumaOptions: ours or torch's. Raises UsageError.
    """
    mode = getattr(options, "affinity_mode", options)
    mode = getattr(mode, "value", mode)
    modes = tuple(known.value for known in AffinityMode)
    if mode not in modes:
        raise UsageError(f"--numa-binding={mode!r}: must be one of {', '.join(modes)}")
    return str(mode), bool(getattr(options, "should_fall_back_if_binding_fails", False))


def bind(
    options: object, workers: int, environ: Mapping[str, str], log: Callable[[str], None]
) -> dict[int, frozenset[int]]:
    """What ``bindings`` gives, by local rank; nothing where the options let a failure pass.

    Raises:
        UsageError: the options are none.
        UnavailableError: the workers cannot be bound so.
    """
    mode, may_fail = mode_of(options)
    try:
        return dict(enumerate(bindings(mode, workers, environ)))
    except UnavailableError as error:
        if not may_fail:
            raise
        log(f"{error}; going on without it")
        return {}


def bindings(mode: str, workers: int, environ: Mapping[str, str], root: str = "/") -> list[frozenset[int]]:
    """The CPUs of each worker, by local rank: never none, and none that this process may not use itself.

    The worker of local rank N has the Nth of the GPUs that ``CUDA_VISIBLE_DEVICES`` shows. Without GPUs, with fewer
    than workers, or where the host does not tell near which node they are (a virtual machine), the workers are spread
    evenly over the nodes that have CPUs for them. Cores and caches are divided among all visible GPUs of a node, also
    those that have no worker, or among the workers where it goes by them.

    With GPUs of different models, numbers mean what they do to CUDA only with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    Args:
        mode: a value of AffinityMode.
        workers: of this node.
        environ: the workers', for ``CUDA_VISIBLE_DEVICES``.
        root: where ``dev``, ``proc`` and ``sys`` are.

    Raises:
        UsageError: there is no such mode.
        UnavailableError: a worker's node has no CPU for it, or too few cores, or the host does not tell its topology.
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
                raise UnavailableError(f"{option}: no NUMA node has a CPU of those that this process may use")
            near = [usable[rank * len(usable) // workers] for rank in range(workers)]
        parts = {node: _parts(mode, nodes, node, allowed, root) for node in set(near[:workers])}
    except OSError as error:
        raise UnavailableError(
            f"{option}: cannot read {error.filename}: {error.strerror}; this host does not tell its topology: "
            "start without --numa-binding"
        ) from error
    found = []
    for rank, node in enumerate(near[:workers]):
        place, places = near[:rank].count(node), near.count(node)
        if mode == AffinityMode.EXCLUSIVE:
            cpus = share(parts[node], place, places)
        else:
            cpus = parts[node][place % len(parts[node])] if parts[node] else frozenset()
        if not cpus:
            whole = nodes.get(node, frozenset())
            raise UnavailableError(
                f"{option}: NUMA node {node} has no CPU core for local rank {rank}: of its CPUs "
                f"({format_list(whole) or 'none'}) this process may use {format_list(whole & allowed) or 'none'}"
                + (f", and {places} GPUs or workers are to share them" if places > 1 else "")
                + "; allow it more CPUs, or try another mode"
            )
        found.append(cpus)
    return found


def _parts(
    mode: str, nodes: Mapping[int, frozenset[int]], node: int, allowed: frozenset[int], root: str
) -> list[frozenset[int]]:
    """What is to be handed out at a node: its cores, its caches or all of it; nothing where it has no usable CPU."""
    whole = nodes.get(node, frozenset())
    cpus = whole & allowed
    if mode == AffinityMode.EXCLUSIVE:
        return _groups(cpus, lambda cpu: _core_of(cpu, root))
    if mode == AffinityMode.CORE_COMPLEX:
        # The largest first: what a mask or a dead core has left of a complex is worth less than a whole one.
        return sorted(_groups(cpus, lambda cpu: _last_cache_of(cpu, root)), key=len, reverse=True)
    if mode == AffinityMode.SOCKET and whole:
        socket = _socket_of(whole, root)
        cpus = allowed.intersection(
            cpu for other in nodes.values() if other and _socket_of(other, root) == socket for cpu in other
        )
    return [cpus] if cpus else []


def _groups(cpus: frozenset[int], group_of: Callable[[int], frozenset[int]]) -> list[frozenset[int]]:
    """What is there of each group that these CPUs belong to, in the order of the groups' first CPUs."""
    groups: dict[tuple[int, int], frozenset[int]] = {}
    left = set(cpus)
    while left:
        cpu = min(left)
        group = group_of(cpu) | {cpu}
        groups[min(group), cpu] = group & left
        left -= group
    return [groups[first] for first in sorted(groups)]


# --- What /sys tells of CPUs


def _read(root: str, path: str) -> str:
    with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _nodes(root: str) -> dict[int, frozenset[int]]:
    """The CPUs of each NUMA node; a node that is only memory has none."""
    folder = "sys/devices/system/node"
    online = parse_list(_read(root, f"{folder}/online"))
    return {node: parse_list(_read(root, f"{folder}/node{node}/cpulist")) for node in online}


def _socket_of(node: frozenset[int], root: str) -> str:
    return _read(root, f"sys/devices/system/cpu/cpu{min(node)}/topology/physical_package_id")


def _core_of(cpu: int, root: str) -> frozenset[int]:
    return parse_list(_read(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))


def _last_cache_of(cpu: int, root: str) -> frozenset[int]:
    """The CPUs that share this one's cache of the highest level."""
    folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
    caches = [
        (int(_read(root, f"{folder}/{name}/level")), f"{folder}/{name}/shared_cpu_list")
        for name in os.listdir(os.path.join(root, folder))
        if name.startswith("index") and _read(root, f"{folder}/{name}/type") != "Instruction"
    ]
    return parse_list(_read(root, max(caches)[1])) if caches else frozenset()


# --- GPUs


def _node_of(address: str, root: str) -> int:
    """The NUMA node of a PCI device; -1 where the host does not know."""
    try:
        return int(_read(root, f"sys/bus/pci/devices/{address}/numa_node"))
    except (OSError, ValueError):
        return -1


def _visible_gpus(option: str, environ: Mapping[str, str], root: str) -> list[str]:
    """The PCI addresses of the NVIDIA GPUs that CUDA shows the workers, in CUDA's order; raises UnavailableError."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    migs = [entry.strip() for entry in value.split(",")] if value and "MIG-" in value else []
    gpus, of_migs, why = _ask_nvml(migs)
    if gpus is None:
        gpus = _ask_driver(root)
    if migs and gpus and not of_migs:
        raise UnavailableError(
            f"{option}: CUDA_VISIBLE_DEVICES={value!r} names MIG devices, and only NVML could tell on which GPUs they "
            f"are ({why}): install nvidia-ml-py, or start without --numa-binding"
        )
    if migs:
        return of_migs
    visible = visible_cuda_devices(value, [uuid for uuid, _ in gpus])
    return [gpus[i][1] for i in visible or []]


def _ask_nvml(migs: Sequence[str]) -> tuple[list[tuple[str, str]] | None, list[str], str]:
    """UUID and PCI address of each GPU, in PCI's order, and the addresses of those that these MIG devices are part of.

    None where NVML cannot tell one or the other, and why.
    """
    try:
        import pynvml
    except ImportError as error:
        return None, [], str(error)

    def address(handle: object) -> str:
        pci = pynvml.nvmlDeviceGetPciInfo(handle)
        return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"

    def gpu(handle: object) -> tuple[str, str]:
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        return uuid.decode() if isinstance(uuid, bytes) else uuid, address(handle)  # bytes in old releases of pynvml

    try:
        pynvml.nvmlInit()
        try:
            gpus = [gpu(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
            parts = [pynvml.nvmlDeviceGetHandleByUUID(mig) for mig in migs]
            return gpus, [address(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)) for part in parts], ""
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, [], str(error)


def _ask_driver(root: str) -> list[tuple[str, str]]:
    """UUID and PCI address of each GPU, in PCI's order, by the files of NVIDIA's driver; none where there is no driver.

    In some containers they tell of all the host's GPUs; those without a device file are not for this container.
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
            gpus.append((facts.get("GPU UUID", ""), address))
    return gpus
