"""Binding workers to CPUs: recorded topologies, torch's answers for the same ones, fakes of NVML, and this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from elastic_launch.core.placement import format_list, parse_list, share, virtual_device
from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.host.numa import AffinityMode, NumaOptions, bindings, mode_of
from tests.support.files import put

pytestmark = pytest.mark.xdist_group("numa")
"""In one process: writing the hosts takes seconds."""

MODES = [mode.value for mode in AffinityMode]


class Cpu(NamedTuple):
    """Where a CPU is, by the kernel's numbers. CPUs with the same ``complex`` share a last-level cache."""

    node: int
    socket: int
    core: int
    complex: int | None


class Host(NamedTuple):
    """A topology: its CPUs, its GPUs' NUMA nodes, nodes without CPUs, and the CPUs that a process may use."""

    cpus: Mapping[int, Cpu]
    gpus: Sequence[int] = ()
    memory: Iterable[int] = ()
    offline: Iterable[int] = ()
    masked: Iterable[int] = ()

    @property
    def allowed(self) -> set[int]:
        return set(self.cpus) - set(self.masked)


def addresses(host: Host) -> list[str]:
    return [f"0000:{0x19 + 0x1B * i:02x}:00.0" for i in range(len(host.gpus))]


def files(host: Host) -> dict[str, str]:
    """The files in /sys and /proc of such a host."""
    found: dict[str, str] = {}
    nodes: dict[int, set[int]] = {node: set() for node in host.memory}
    siblings: dict[tuple[int, int], set[int]] = {}
    complexes: dict[int | None, set[int]] = {}
    for cpu, where in host.cpus.items():
        nodes.setdefault(where.node, set()).add(cpu)
        siblings.setdefault((where.socket, where.core), set()).add(cpu)
        complexes.setdefault(where.complex, set()).add(cpu)
    for name in ("online", "possible"):
        found[f"sys/devices/system/node/{name}"] = format_list(frozenset(nodes))
    for node, cpus in nodes.items():
        found[f"sys/devices/system/node/node{node}/cpulist"] = format_list(frozenset(cpus))
    for cpu in host.offline:
        found[f"sys/devices/system/cpu/cpu{cpu}/online"] = "0"
    for cpu, where in host.cpus.items():
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        core = siblings[where.socket, where.core]
        found[f"{folder}/topology/physical_package_id"] = str(where.socket)
        found[f"{folder}/topology/thread_siblings_list"] = format_list(frozenset(core))
        caches = [(1, "Data", core), (1, "Instruction", core), (2, "Unified", core)]
        if where.complex is not None:
            caches.append((3, "Unified", complexes[where.complex]))
        for i, (level, kind, cpus) in enumerate(caches):
            cache = f"{folder}/cache/index{i}"
            found |= {f"{cache}/level": str(level), f"{cache}/type": kind}
            found[f"{cache}/shared_cpu_list"] = format_list(frozenset(cpus))
    for i, (address, node) in enumerate(zip(addresses(host), host.gpus, strict=True)):
        found[f"sys/bus/pci/devices/{address}/numa_node"] = str(node)
        found[f"proc/driver/nvidia/gpus/{address}/information"] = (
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18\nGPU UUID: \t GPU-{i:02x}aa-bb\n"
            f"Bus Type: \t PCIe\nBus Location: \t {address}\nDevice Minor: \t {i}\nGPU Excluded:\t No"
        )
        found[f"dev/nvidia{i}"] = ""
    return {name: text and f"{text}\n" for name, text in found.items()}


# Linux numbers the first threads of all cores, then the second ones.
XEON = {cpu: Cpu(cpu // 16 % 2, cpu // 16 % 2, cpu % 16, cpu // 16 % 2) for cpu in range(64)}
EPYC = {cpu: Cpu(cpu % 64 // 8, cpu % 64 // 32, cpu % 64, cpu % 64 // 4) for cpu in range(128)}
GRACE = {cpu: Cpu(cpu // 18, cpu // 18, cpu % 18, cpu // 18) for cpu in range(72)}
POWER = {cpu: Cpu(8 * (cpu // 32), 8 * (cpu // 32), cpu // 4, cpu // 8) for cpu in range(64)}

HOSTS = {
    "laptop": Host({cpu: Cpu(0, 0, cpu % 4, 0) for cpu in range(8)}, [-1]),
    "two Xeons": Host(XEON, [0, 0, 0, 0, 1, 1, 1, 1]),
    "two Xeons, uneven": Host(XEON, [0, 0, 0, 1]),
    "two Xeons, masked": Host(XEON, [0, 0, 1], masked={*range(0, 2), *range(7, 34), *range(36, 51)}),
    "two Xeons, CPUs offline": Host(
        {cpu: where for cpu, where in XEON.items() if cpu not in (1, 33, 40)}, [0, 0, 1], offline=(1, 33, 40)
    ),
    "two EPYCs, four nodes each": Host(EPYC, [3, 3, 1, 1, 7, 7, 5, 5]),
    "two EPYCs, three GPUs at a node": Host(EPYC, [3, 3, 3]),
    "two EPYCs, a complex has lost CPUs": Host(EPYC, [3, 3, 3], masked={24, 25, 88}),
    "two Xeons, two nodes share a cache": Host(
        {cpu: Cpu(cpu % 32 // 8, cpu % 32 // 16, cpu % 32, cpu % 32 // 16) for cpu in range(64)}, [0, 1, 2, 3, 3]
    ),
    "no L3 cache": Host({cpu: Cpu(0, 0, cpu % 4, None) for cpu in range(8)}, [0, 0, 0]),
    "four Grace-Hoppers": Host(GRACE, [0, 1, 2, 3], memory=range(4, 36)),
    "two POWER9": Host(POWER, [0, 0, 8, 8], memory=(252, 253, 254, 255)),
}

# The CPUs of each local rank in the kernel's notation, by host and mode.
EXPECTED = {
    ("laptop", "node"): ["0-7"],
    ("laptop", "socket"): ["0-7"],
    ("laptop", "exclusive"): ["0-7"],
    ("laptop", "core-complex"): ["0-7"],
    ("two Xeons", "node"): ["0-15,32-47"] * 4 + ["16-31,48-63"] * 4,
    ("two Xeons", "exclusive"): [
        "0-3,32-35",
        "4-7,36-39",
        "8-11,40-43",
        "12-15,44-47",
        "16-19,48-51",
        "20-23,52-55",
        "24-27,56-59",
        "28-31,60-63",
    ],
    ("two Xeons", "core-complex"): ["0-15,32-47"] * 4 + ["16-31,48-63"] * 4,
    ("two Xeons, uneven", "exclusive"): ["0-5,32-37", "6-10,38-42", "11-15,43-47", "16-31,48-63"],
    ("two Xeons, masked", "node"): ["2-6,34-35", "2-6,34-35", "51-63"],
    ("two Xeons, masked", "exclusive"): ["2-4,34-35", "5-6", "51-63"],
    ("two Xeons, CPUs offline", "exclusive"): ["0,2-8,32,34-39", "9-15,41-47", "16-31,48-63"],
    ("two EPYCs, four nodes each", "node"): ["24-31,88-95"] * 2
    + ["8-15,72-79"] * 2
    + ["56-63,120-127"] * 2
    + ["40-47,104-111"] * 2,
    ("two EPYCs, four nodes each", "socket"): ["0-31,64-95"] * 4 + ["32-63,96-127"] * 4,
    ("two EPYCs, four nodes each", "core-complex"): [
        "24-27,88-91",
        "28-31,92-95",
        "8-11,72-75",
        "12-15,76-79",
        "56-59,120-123",
        "60-63,124-127",
        "40-43,104-107",
        "44-47,108-111",
    ],
    ("two EPYCs, three GPUs at a node", "exclusive"): ["24-26,88-90", "27-29,91-93", "30-31,94-95"],
    ("two EPYCs, three GPUs at a node", "core-complex"): ["24-27,88-91", "28-31,92-95", "24-27,88-91"],
    ("two EPYCs, a complex has lost CPUs", "exclusive"): ["26-27,89-91", "28-29,92-93", "30-31,94-95"],
    ("two EPYCs, a complex has lost CPUs", "core-complex"): ["28-31,92-95", "26-27,89-91", "28-31,92-95"],
    ("two Xeons, two nodes share a cache", "socket"): ["0-15,32-47"] * 2 + ["16-31,48-63"] * 3,
    ("two Xeons, two nodes share a cache", "core-complex"): [
        "0-7,32-39",
        "8-15,40-47",
        "16-23,48-55",
        "24-31,56-63",
        "24-31,56-63",
    ],
    ("no L3 cache", "core-complex"): ["0,4", "1,5", "2,6"],
    ("four Grace-Hoppers", "node"): ["0-17", "18-35", "36-53", "54-71"],
    ("four Grace-Hoppers", "socket"): ["0-17", "18-35", "36-53", "54-71"],
    ("two POWER9", "socket"): ["0-31", "0-31", "32-63", "32-63"],
    ("two POWER9", "exclusive"): ["0-15", "16-31", "32-47", "48-63"],
    ("two POWER9", "core-complex"): ["0-7", "8-15", "32-39", "40-47"],
}

Place = Callable[..., list[str]]


@pytest.fixture(scope="module")
def root_of() -> Iterator[Callable[[Host], str]]:
    """Writes the tree of a host, once per host. Tests must only read it.

    Together they have 14,000 directories and 27,000 names of some hundred files: seconds on a disk, but not in memory.
    """
    written: list[tuple[Host, str]] = []
    contents: dict[str, str] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="test-numa-", dir=memory) as folder:

        def find(host: Host) -> str:
            for known, root in written:
                if known == host:
                    return root
            root = f"{folder}/{len(written)}"
            for name, text in files(host).items():
                path = f"{root}/{name}"
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if contents.setdefault(text, path) == path:
                    put(Path(root), {name: text})
                else:
                    os.link(contents[text], path)
            written.append((host, root))
            return root

        yield find


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the import of pynvml fail."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def place(no_nvml: None, root_of: Callable[[Host], str], monkeypatch: pytest.MonkeyPatch) -> Place:
    """Ask for the bindings on a host. The answer is in the kernel's notation."""

    def ask(host: Host, mode: str, workers: int | None = None, **environ: str) -> list[str]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: host.allowed)
        found = bindings(mode, workers or len(host.gpus), environ, root_of(host))
        return [format_list(cpus) for cpus in found]

    return ask


@pytest.mark.parametrize(("name", "mode"), EXPECTED)
def test_workers_are_near_their_gpus(place: Place, name: str, mode: str) -> None:
    assert place(HOSTS[name], mode) == EXPECTED[name, mode]


# torch cannot be given another /sys. So its private function is called in a separate process where open() and the like
# are redirected.
ASK_TORCH = """
import builtins, json, logging, os, sys
from types import SimpleNamespace
import torch
from torch.numa.binding import AffinityMode, NumaOptions, _get_logical_cpus_to_bind_to

logging.disable(logging.CRITICAL)
root = ""
def bent(function):
    return lambda path=".", *args, **kwargs: function(
        root + path if isinstance(path, str) and path.startswith("/sys/") else path, *args, **kwargs)
builtins.open, os.listdir, os.path.exists = bent(open), bent(os.listdir), bent(os.path.exists)
answers = {}
for name, (root, allowed, gpus) in json.load(sys.stdin).items():
    os.sched_getaffinity = lambda pid: set(allowed)
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: len(gpus)
    def properties(index):
        domain, bus, device = gpus[index].split(":")
        domain, bus, device = int(domain, 16), int(bus, 16), int(device[:2], 16)
        return SimpleNamespace(pci_domain_id=domain, pci_bus_id=bus, pci_device_id=device)
    torch.cuda.get_device_properties = properties
    for mode in AffinityMode:
        try:
            answer = [sorted(_get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=NumaOptions(mode)))
                      for gpu in range(len(gpus))]
        except Exception as error:
            answer = type(error).__name__
        answers[f"{name}: {mode.value}"] = answer
ours = [NumaOptions(AffinityMode.CORE_COMPLEX), NumaOptions(AffinityMode.NODE, True)]
sys.path.insert(0, sys.argv[1])
from elastic_launch.host.numa import mode_of
answers["options"] = [mode_of(options) for options in ours]
json.dump(answers, sys.stdout)
"""


@pytest.mark.torch
@pytest.mark.usefixtures("no_nvml")
def test_torch_binds_workers_the_same_way(root_of: Callable[[Host], str], monkeypatch: pytest.MonkeyPatch) -> None:
    question: dict[str, tuple[str, list[int], list[str]]] = {}
    ours: dict[str, object] = {}
    for name, host in HOSTS.items():
        root = root_of(host)
        question[name] = (root, sorted(host.allowed), addresses(host))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, host=host: host.allowed)
        for mode in MODES:
            ours[f"{name}: {mode}"] = [sorted(cpus) for cpus in bindings(mode, len(host.gpus), {}, root)]
    child = subprocess.run(
        [sys.executable, "-c", ASK_TORCH, str(Path(__file__).parents[2])],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    theirs = json.loads(child.stdout)
    assert theirs.pop("options") == [["core-complex", False], ["node", True]]
    # torch 2.13 asks for the socket of every node, and fails for nodes without CPUs.
    failures = {key for key, answer in theirs.items() if answer == "ValueError"}
    assert failures <= {"four Grace-Hoppers: socket", "two POWER9: socket"}
    assert {key: cpus for key, cpus in ours.items() if key not in failures} == {
        key: cpus for key, cpus in theirs.items() if key not in failures
    }


# --- Without GPUs, or with fewer GPUs than workers


@pytest.mark.parametrize(
    ("host", "mode", "workers", "expected"),
    [
        (HOSTS["laptop"]._replace(gpus=()), "node", 3, ["0-7"] * 3),
        (HOSTS["laptop"]._replace(gpus=()), "exclusive", 3, ["0-1,4-5", "2,6", "3,7"]),
        (Host(XEON), "node", 1, ["0-15,32-47"]),
        (Host(XEON), "node", 2, ["0-15,32-47", "16-31,48-63"]),
        (Host(XEON), "node", 3, ["0-15,32-47", "0-15,32-47", "16-31,48-63"]),
        (Host(XEON), "exclusive", 4, ["0-7,32-39", "8-15,40-47", "16-23,48-55", "24-31,56-63"]),
        (Host(EPYC), "node", 2, ["0-7,64-71", "32-39,96-103"]),
        (Host(EPYC), "socket", 2, ["0-31,64-95", "32-63,96-127"]),
        (Host(EPYC), "core-complex", 4, ["0-3,64-67", "16-19,80-83", "32-35,96-99", "48-51,112-115"]),
        # Nodes without CPUs, or without usable ones, get no worker.
        (Host(GRACE, memory=range(4, 36)), "node", 4, ["0-17", "18-35", "36-53", "54-71"]),
        (Host(XEON, masked={*range(0, 16), *range(32, 48)}), "node", 2, ["16-31,48-63"] * 2),
        (Host(POWER, memory=(252,)), "node", 2, ["0-31", "32-63"]),
        # More workers than GPUs, and GPUs whose node a virtual machine does not know.
        (Host(XEON, [1]), "node", 2, ["0-15,32-47", "16-31,48-63"]),
        (Host(XEON, [-1, -1]), "node", 2, ["0-15,32-47", "16-31,48-63"]),
        (Host(XEON, [-1, -1]), "exclusive", 2, ["0-15,32-47", "16-31,48-63"]),
    ],
)
def test_workers_are_spread_over_the_nodes(
    place: Place, host: Host, mode: str, workers: int, expected: list[str]
) -> None:
    assert place(host, mode, workers) == expected


@pytest.mark.parametrize("mode", MODES)
def test_no_core_is_shared_or_unused(place: Place, mode: str) -> None:
    host = Host(XEON)
    for workers in range(1, 33):
        found = [parse_list(cpus) for cpus in place(host, mode, workers)]
        assert all(found)
        if mode == "exclusive" and workers > 1:
            assert sum(map(len, found)) == len(frozenset().union(*found)) == 64
            assert all(cpu + 32 in cpus for cpus in found for cpu in cpus if cpu < 32)  # with its second thread


# --- Which GPU a local rank has


TWO = Host(XEON, [1, 0])
AT_0, AT_1 = "0-15,32-47", "16-31,48-63"


@pytest.mark.parametrize(
    ("visible", "workers", "expected"),
    [
        (None, 2, [AT_1, AT_0]),
        ("1,0", 2, [AT_0, AT_1]),
        ("1", 1, [AT_0]),
        ("GPU-01aa-bb,GPU-00aa-bb", 2, [AT_0, AT_1]),
        ("GPU-01", 1, [AT_0]),
        ("", 2, [AT_0, AT_1]),  # as without GPUs
        ("-1", 1, [AT_0]),
        ("0", 2, [AT_0, AT_1]),
    ],
)
def test_cuda_visible_devices_decides(place: Place, visible: str | None, workers: int, expected: list[str]) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert place(TWO, "node", workers, **environ) == expected


def test_fewer_workers_than_gpus_leave_the_others_their_cores(place: Place) -> None:
    assert place(HOSTS["two Xeons"], "exclusive", 2) == ["0-3,32-35", "4-7,36-39"]
    assert place(HOSTS["two Xeons"], "exclusive", 2, CUDA_VISIBLE_DEVICES="6,7") == ["16-23,48-55", "24-31,56-63"]


def test_gpus_are_in_the_order_of_the_bus(place: Place) -> None:
    nodes = [1, 0, 0, 1, 0, 1, 1]
    assert place(Host(XEON, nodes), "node") == [(AT_0, AT_1)[node] for node in nodes]


@pytest.mark.usefixtures("no_nvml")
def test_a_gpu_of_another_container_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(XEON))
    root = put(tmp_path, files(TWO))
    (tmp_path / "dev/nvidia0").unlink()
    assert [format_list(cpus) for cpus in bindings("node", 1, {}, root)] == [AT_0]


class NVMLError(Exception):
    pass


class Nvml(SimpleNamespace):
    """A fake of pynvml: GPUs at these addresses, and the GPUs that MIG devices are part of."""

    NVMLError = NVMLError

    def __init__(self, buses: Sequence[int], migs: Mapping[str, int], broken: str = "") -> None:
        super().__init__(buses=buses, migs=migs, broken=broken, running=0)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise NVMLError(self.broken)
        self.running += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.running -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.buses)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        return ("gpu", index)

    def nvmlDeviceGetUUID(self, handle: tuple[str, int]) -> bytes:  # noqa: N802
        return f"GPU-{handle[1]}".encode()

    def nvmlDeviceGetMigMode(self, handle: tuple[str, int]) -> list[int]:  # noqa: N802
        raise NVMLError("Not Supported")

    def nvmlDeviceGetPciInfo(self, handle: tuple[str, int]) -> object:  # noqa: N802
        kind, index = handle
        assert kind == "gpu"
        return SimpleNamespace(domain=0, bus=self.buses[index], device=0)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        if uuid not in self.migs:
            raise NVMLError("Not Found")
        return ("mig", self.migs[uuid])

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: tuple[str, int]) -> object:  # noqa: N802
        kind, index = handle
        assert kind == "mig"
        return ("gpu", index)


@pytest.mark.parametrize(
    ("visible", "workers", "expected"),
    [
        (None, 2, [AT_0, AT_1]),
        ("1", 1, [AT_1]),
        ("GPU-1,GPU-0", 2, [AT_1, AT_0]),
        ("MIG-b, MIG-a", 2, [AT_1, AT_0]),
        ("MIG-b,MIG-c", 2, [AT_1, AT_1]),
    ],
)
def test_nvml_is_asked_first(
    place: Place, monkeypatch: pytest.MonkeyPatch, visible: str | None, workers: int, expected: list[str]
) -> None:
    nvml = Nvml([0x34, 0x19], {"MIG-a": 0, "MIG-b": 1, "MIG-c": 1})  # the reverse order of the driver's files
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert place(TWO, "node", workers, **environ) == expected
    assert nvml.running == 0


def test_if_nvml_fails_the_driver_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([], {}, broken="Driver Not Loaded"))
    assert place(TWO, "node") == [AT_1, AT_0]
    with pytest.raises(
        UnavailableError, match=r"=node: CUDA_VISIBLE_DEVICES='MIG-a' .*Driver Not Loaded.*elastic-launch\[nvml\]"
    ):
        place(TWO, "node", 1, CUDA_VISIBLE_DEVICES="MIG-a")
    monkeypatch.setitem(sys.modules, "pynvml", nvml := Nvml([0x19], {}))
    with pytest.raises(UnavailableError, match=r"names MIG devices.*Not Found"):
        place(TWO, "node", 1, CUDA_VISIBLE_DEVICES="MIG-nobody's")
    assert nvml.running == 0


def test_mig_devices_on_a_host_without_gpus_are_ignored(place: Place) -> None:
    assert place(Host(XEON), "node", 2, CUDA_VISIBLE_DEVICES="MIG-a,MIG-b") == [AT_0, AT_1]


# --- Errors


@pytest.mark.parametrize(
    ("host", "mode", "workers", "message"),
    [
        (
            Host(XEON, [0], masked={*range(0, 16), *range(32, 48)}),
            "node",
            1,
            r"^--numa-binding=node: NUMA node 0 has no CPU core for local rank 0: of its CPUs \(0-15,32-47\) this "
            "process may use none; allow it more CPUs, or try another mode$",
        ),
        (Host(XEON, [0], masked={*range(0, 16), *range(32, 48)}), "socket", 1, "=socket: NUMA node 0 has no CPU"),
        (Host(XEON, [0], masked={*range(0, 16), *range(32, 48)}), "exclusive", 1, "=exclusive: NUMA node 0 has no"),
        (Host(XEON, [0], masked={*range(0, 16), *range(32, 48)}), "core-complex", 1, "=core-complex: NUMA node 0 has"),
        (
            Host(XEON, [0, 0], masked=set(XEON) - {2, 34}),
            "exclusive",
            2,
            r"for local rank 1: .* may use 2,34, and 2 GPUs or workers share them; allow",
        ),
        (Host(XEON), "exclusive", 33, "NUMA node 0 has no CPU core for local rank 16: .* and 17 GPUs or workers"),
        (Host(GRACE, [4], memory=[4]), "node", 1, r"NUMA node 4 has no CPU core .* \(none\)"),
        (Host(GRACE, [5]), "node", 1, "NUMA node 5 has no CPU core"),  # it is not online
        (Host(XEON, masked=range(64)), "node", 1, "=node: no NUMA node has a CPU that this process may use"),
    ],
)
def test_a_worker_without_a_cpu_is_an_error(place: Place, host: Host, mode: str, workers: int, message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        place(host, mode, workers)


@pytest.mark.parametrize("mode", MODES)
def test_a_host_without_a_topology_is_an_error(tmp_path: Path, mode: str) -> None:
    with pytest.raises(UnavailableError, match=f"^--numa-binding={mode}: cannot read .*/node/online: No such file"):
        bindings(mode, 1, {"CUDA_VISIBLE_DEVICES": ""}, str(tmp_path))


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        ("socket", "topology/physical_package_id"),
        ("exclusive", "topology/thread_siblings_list"),
        ("core-complex", "cache/index3/shared_cpu_list"),
    ],
)
def test_only_the_files_that_a_mode_needs_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, missing: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    root = put(tmp_path, files(Host({0: Cpu(0, 0, 0, 0)})))
    (tmp_path / "sys/devices/system/cpu/cpu0" / missing).unlink()
    environ = {"CUDA_VISIBLE_DEVICES": ""}
    for other in MODES:
        if other != mode:
            assert bindings(other, 1, environ, root) == [{0}]
    with pytest.raises(UnavailableError, match=f"cannot read .*/{missing}: No such file"):
        bindings(mode, 1, environ, root)


# --- Options


def test_mode_of() -> None:
    assert mode_of("socket") == ("socket", False)
    assert mode_of(AffinityMode.EXCLUSIVE) == ("exclusive", False)
    assert mode_of(NumaOptions(AffinityMode.NODE)) == ("node", False)
    assert mode_of(NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)) == ("node", True)


@pytest.mark.parametrize("options", ["cpu", "", None, 3, ["node"], NumaOptions("NODE")])  # type: ignore[arg-type]
def test_an_unknown_mode(options: object) -> None:
    with pytest.raises(UsageError, match=r"^--numa-binding=.*: must be one of node, socket, exclusive, core-complex$"):
        mode_of(options)


def test_bindings_of_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--numa-binding='cpu'"):
        bindings("cpu", 1, {}, str(tmp_path))


# --- This host


def test_importing_the_module_imports_little() -> None:
    code = "import sys, elastic_launch.config, elastic_launch.core, elastic_launch.host; before = set(sys.modules)"
    code += "; import elastic_launch.host.numa; print(*sorted(set(sys.modules) - before))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == (
        "elastic_launch.core.placement elastic_launch.host.numa elastic_launch.host.nvml\n"
    )


# --- Rules


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("\n", []),
        ("0", [0]),
        ("0-3\n", [0, 1, 2, 3]),
        ("0,8", [0, 8]),
        ("1-2,252-253,255", [1, 2, 252, 253, 255]),
    ],
)
def test_lists_in_the_kernel_s_notation(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == set(numbers)
    assert format_list(frozenset(numbers)) == text.strip()


def test_share() -> None:
    cores = [frozenset({core}) for core in range(5)]
    assert [share(cores, place, 3) for place in range(3)] == [{0, 1}, {2, 3}, {4}]
    assert [len(share(cores, place, 7)) for place in range(7)] == [1, 1, 1, 1, 1, 0, 0]
    assert share([], 0, 1) == set()


# The first rows are what torchrun 2.13 does.
@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["0", "1"]),
        ("3,1", ["3", "1"]),
        (" 3 , 2 ", ["3", "2"]),
        ("GPU-aa,GPU-bb,GPU-cc", ["GPU-aa", "GPU-bb", "GPU-cc"]),
        ("MIG-a,MIG-b", ["MIG-a", "MIG-b"]),
        ("0,0", ["0", "0"]),
        ("", [""]),
        ("-1", ["-1"]),
        # Here torchrun fails for the second.
        ("", ["", ""]),
        ("NoDevFiles", ["NoDevFiles", "NoDevFiles"]),
    ],
)
def test_virtual_device(visible: str | None, devices: list[str]) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    for rank, device in enumerate(devices):
        assert virtual_device(rank, environ) == {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device}


@pytest.mark.parametrize("visible", ["3", "3,", "3,,2", "3,-1,2", "GPU-aa, x"])
def test_virtual_device_that_does_not_exist(visible: str) -> None:
    assert virtual_device(0, {"CUDA_VISIBLE_DEVICES": visible})["CUDA_VISIBLE_DEVICES"] in ("3", "GPU-aa")
    with pytest.raises(
        UsageError, match=r"^--virtual-local-rank: local rank 1 needs .* shows only 1; .*--nproc-per-node"
    ):
        virtual_device(1, {"CUDA_VISIBLE_DEVICES": visible})
