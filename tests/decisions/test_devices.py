"""Counting devices: recorded trees of the kernel's files, fakes of NVML and torch, and the real torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_launch import workers
from elastic_launch.core.placement import visible_cuda_devices
from elastic_launch.errors import UsageError
from elastic_launch.host import devices
from elastic_launch.host.devices import ACCELERATORS, cpu_count, has_accelerator, local_world_size
from tests.support.files import put
from tests.support.leaks import children

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44"]


@pytest.fixture(autouse=True)
def no_nvml_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from a host without both. None in sys.modules makes import and find_spec fail."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the size of the affinity mask."""
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))


# --- CPUs


V1 = "9:name=systemd:/job\n3:cpuset:/job\n2:cpu,cpuacct:/slice/job\n0::/job\n"

CGROUPS = {
    "no files": ({}, 16),
    "v2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "v2, own group": (
        {"proc/self/cgroup": "0::/slice/job\n", "sys/fs/cgroup/slice/job/cpu.max": "400000 100000\n"},
        4,
    ),
    "v2, a fraction is rounded up": (
        {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "250000 100000\n"},
        3,
    ),
    "v2, an exact quota is not": ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "30000 10000\n"}, 3),
    "v2, less than one CPU": ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "1000 100000\n"}, 1),
    "v2, more than the mask": ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "6400000 100000\n"}, 16),
    "v2, the parent has less": (
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "200000 100000\n",
        },
        2,
    ),
    "v2, the parent has more": (
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/job/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "500000 100000\n",
        },
        2,
    ),
    "v2, the host's path in a container": (
        {"proc/self/cgroup": "0::/kubepods/pod1/c1\n", "sys/fs/cgroup/cpu.max": "500000 100000\n"},
        5,
    ),
    "v2, a path above the namespace's root": (
        {"proc/self/cgroup": "0::/../../c1\n", "sys/fs/cgroup/cpu.max": "500000 100000\n", "sys/c1/cpu.max": "1 1\n"},
        5,
    ),
    "v2, a path with a colon": (
        {"proc/self/cgroup": "0::/a:b\n", "sys/fs/cgroup/a:b/cpu.max": "500000 100000\n"},
        5,
    ),
    "another group's limit": (
        {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/other/cpu.max": "100000 100000\n"},
        16,
    ),
    "v1, own group": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/slice/job/cpu.cfs_quota_us": "350000\n",
            "sys/fs/cgroup/cpu,cpuacct/slice/job/cpu.cfs_period_us": "50000\n",
        },
        7,
    ),
    "v1, mounted as cpu, the parent's limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/slice/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/slice/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/slice/cpu.cfs_quota_us": "600000\n",
            "sys/fs/cgroup/cpu/slice/cpu.cfs_period_us": "100000\n",
        },
        6,
    ),
    "v1, the host's path in a container": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1, cpuset is not cpu": (
        {
            "proc/self/cgroup": "3:cpuset:/job\n",
            "sys/fs/cgroup/cpuset/job/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpuset/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        16,
    ),
    "v1, half of it missing": (
        {"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/slice/job/cpu.cfs_quota_us": "200000\n"},
        16,
    ),
    "odd files above a sound one": (
        {
            "proc/self/cgroup": "\nwhat\n0::/a/b/c/d\n",
            "sys/fs/cgroup/cpu.max": "100000 0\n",
            "sys/fs/cgroup/a/cpu.max": "",
            "sys/fs/cgroup/a/b/cpu.max": "100000\n",
            "sys/fs/cgroup/a/b/c/cpu.max": "zwölf 100000\n",
            "sys/fs/cgroup/a/b/c/d/cpu.max": "900000 100000\n",
        },
        9,
    ),
}


@pytest.mark.parametrize(("files", "expected"), CGROUPS.values(), ids=CGROUPS.keys())
def test_cpu_count_is_the_mask_or_the_smallest_quota(
    files: dict[str, str], expected: int, tmp_path: Path, cpus: Callable[[int], None]
) -> None:
    cpus(16)
    assert cpu_count(put(tmp_path, files)) == expected


def test_cpu_count_is_the_mask_where_that_is_smaller(tmp_path: Path, cpus: Callable[[int], None]) -> None:
    cpus(3)
    root = put(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"})
    assert cpu_count(root) == 3


# --- CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        (" ", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        ("0,1,2,3", [0, 1, 2, 3]),
        (" 1, 2", [1, 2]),
        ("+1", [1]),
        ("01", [1]),
        ("1gpu,2nd", [1, 2]),
        ("1_0", [1]),
        # the first invalid entry ends the list
        ("-1", []),
        ("0,-1,1", [0]),
        ("1,4,2", [1]),
        ("4", []),
        ("99999999999999999999", []),
        ("0,,1", [0]),
        (",0", []),
        ("0,x,1", [0]),
        ("none", []),
        ("NoDevFiles", []),
        ("٣", []),
        # given twice: no device at all, if the list gets that far
        ("1,1", []),
        ("0,1,0", []),
        ("1,01", []),
        ("0,9,9", [0]),
        ("0,9,0", [0]),
        # UUIDs, or prefixes of exactly one
        ("GPU-bb33", [2]),
        ("GPU-b", [2]),
        ("GPU-cc44,GPU-aa1", [3, 0]),
        ("GPU-aa", []),
        ("GPU-", []),
        ("GPU-bb33,GPU-aa,GPU-cc44", [2]),
        ("GPU-bb,GPU-dd,GPU-cc", [2]),
        ("GPU-bb333", []),
        ("GPU-bb,GPU-bb33", []),
        ("GPU-bb,", [2]),
        ("gpu-bb33", []),
        ("GPU-BB33", []),
        # not both kinds in one list
        ("GPU-bb33,0", [2]),
        ("0,GPU-bb33", [0]),
        # only CUDA knows
        ("MIG-5c89c4e2", None),
        ("MIG-GPU-aa11/1/0", None),
        ("0,MIG-5c89c4e2", None),
    ],
)
def test_visible_cuda_devices(value: str | None, expected: list[int] | None) -> None:
    assert visible_cuda_devices(value, UUIDS) == expected


def test_a_prefix_of_one_letter_is_enough_for_an_only_gpu() -> None:
    assert visible_cuda_devices("GPU-", ["GPU-aa11"]) == [0]
    assert visible_cuda_devices("GPU-,G", ["GPU-aa11"]) == [0]
    assert visible_cuda_devices(None, []) == []


# --- NVML


class NVMLError(Exception):
    """The base class of pynvml's errors."""


class FakeNvml(SimpleNamespace):
    """A fake of the module pynvml. ``mig`` has the indices of GPUs in MIG mode; ``held`` counts open inits."""

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, uuids: Sequence[str | bytes], mig: Sequence[int] = (), fails: str = "") -> None:
        super().__init__()
        self.uuids = uuids
        self.mig = mig
        self.fails = fails
        self.held = 0
        self.inits = 0

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's names, here and below
        self._check("init")
        self.held += 1
        self.inits += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.held -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._check("handle")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return self.uuids[handle]

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(domain=0, bus=handle, device=0)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if handle == 0 and not self.mig:
            raise NVMLError("Not Supported")
        return [int(handle in self.mig), 1]  # the second is the mode after the next reset, which has no effect now

    def _check(self, call: str) -> None:
        if call == self.fails:
            raise NVMLError(f"{call} failed")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(uuids: Sequence[str | bytes], **options: object) -> FakeNvml:
        fake = FakeNvml(uuids, **options)  # type: ignore[arg-type]
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


BYTES = [uuid.encode() for uuid in UUIDS]


@pytest.mark.parametrize("uuids", [UUIDS, BYTES], ids=["str", "bytes"])
@pytest.mark.parametrize("option", ["gpu", "cuda", "auto"])
@pytest.mark.parametrize(
    ("environ", "expected"), [({}, 4), ({"CUDA_VISIBLE_DEVICES": "2,0,7"}, 2), ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, 1)]
)
def test_nvml_counts_the_visible_gpus(
    option: str,
    environ: dict[str, str],
    expected: int,
    uuids: Sequence[str | bytes],
    nvml: Callable[..., FakeNvml],
) -> None:
    fake = nvml(uuids)
    assert local_world_size(option, environ) == expected
    assert (fake.inits, fake.held) == (1, 0)


@pytest.mark.parametrize(
    ("uuids", "environ", "why"),
    [
        ([], {}, "NVML found 0"),
        (UUIDS, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides all 4"),
        (UUIDS, {"CUDA_VISIBLE_DEVICES": "9"}, "CUDA_VISIBLE_DEVICES='9' hides all 4"),
    ],
)
def test_gpu_where_nvml_sees_none_is_an_error_with_the_reason(
    uuids: list[str], environ: dict[str, str], why: str, nvml: Callable[..., FakeNvml], cpus: Callable[[int], None]
) -> None:
    fake = nvml(uuids)
    host = os.uname().nodename
    with pytest.raises(UsageError) as caught:
        local_world_size("gpu", environ)
    assert str(caught.value) == (
        f"--nproc-per-node=gpu: this host ({host}) has no usable GPU: {why}; pass a number or cpu"
    )
    cpus(1)
    assert local_world_size("auto", environ) == 1
    assert (fake.inits, fake.held) == (2, 0)


@pytest.mark.parametrize("fails", ["init", "handle"])
def test_nvml_that_fails_is_named_if_torch_is_not_installed(
    fails: str, nvml: Callable[..., FakeNvml], cpus: Callable[[int], None]
) -> None:
    fake = nvml(UUIDS, fails=fails)
    with pytest.raises(UsageError, match=rf"torch is not installed, and NVML is not available \({fails} failed\)"):
        local_world_size("gpu", {})
    cpus(1)
    assert local_world_size("auto", {}) == 1
    assert fake.held == 0


def test_a_broken_pynvml_is_named_if_torch_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"pynvml.py": "raise ImportError('half installed')"})
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"torch is not installed, and NVML is not available \(half installed\)"):
        local_world_size("gpu", {})


@pytest.mark.parametrize(
    ("mig", "value"), [([1], None), ([1], "0"), ([], "MIG-5c89c4e2"), ([0, 1, 2, 3], "MIG-GPU-aa11/1/0")]
)
def test_mig_without_torch_is_one_device(mig: list[int], value: str | None, nvml: Callable[..., FakeNvml]) -> None:
    nvml(UUIDS, mig=mig)
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert local_world_size("gpu", environ) == 1
    assert local_world_size("auto", environ) == 1


def test_mig_shows_nothing_if_nothing_is_visible(nvml: Callable[..., FakeNvml]) -> None:
    nvml(UUIDS, mig=[0])
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES='' hides all 4"):
        local_world_size("gpu", {"CUDA_VISIBLE_DEVICES": ""})


# --- torch, in the child

FAKE_TORCH = '''
"""As much of torch as the child uses. FAKE_DEVICES: the host's devices, "NAME=COUNT,..."; the first is current."""
import os, sys
from types import SimpleNamespace

__version__ = "9.9"
print("noise on stdout")
os.system("echo noise from a child; echo")
os.write(1, b"7 noise without a newline")
_devices = dict(pair.split("=") for pair in os.environ.get("FAKE_DEVICES", "").split(",") if pair)


def device(name):
    if name not in ("cpu", "cuda", "xpu", "meta", "npu"):
        raise RuntimeError(f"Expected one of cpu, cuda, ...: {name}")
    return SimpleNamespace(type=name)


def _module(name):
    count = int(_devices.get(name, 0))
    return SimpleNamespace(device_count=lambda: count, is_available=lambda: count > 0)


cuda, xpu, npu = map(_module, ("cuda", "xpu", "npu"))
_C = SimpleNamespace()
if "FAKE_RUNTIME" in os.environ:
    _C._cuda_getDeviceCount = lambda: int(os.environ["FAKE_RUNTIME"])
if "FAKE_OLD" not in os.environ:
    accelerator = SimpleNamespace(
        is_available=lambda: bool(_devices),
        current_accelerator=lambda: device(next(iter(_devices))),
        device_count=lambda: 1,
    )
if "FAKE_RECORD" in os.environ:
    with open(os.environ["FAKE_RECORD"], "a") as record:
        print(sys.argv[1], file=record)
exec(os.environ.get("FAKE_CODE", ""))
'''


class FakeTorch:
    """A package torch that this process finds and the child imports. It records what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = root / "asked"
        put(root, {"torch/__init__.py": FAKE_TORCH, "torch/version.py": "__version__ = '9.9+cu999'\n"})

    def environ(self, **variables: str) -> dict[str, str]:
        return {"PYTHONPATH": str(self.root), "FAKE_RECORD": str(self.record), **variables}

    def asked(self) -> list[str]:
        return self.record.read_text().split() if self.record.exists() else []


@pytest.fixture
def fake_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    monkeypatch.delitem(sys.modules, "torch")
    fake = FakeTorch(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return fake


@pytest.mark.parametrize(
    ("option", "variables", "expected"),
    [
        ("gpu", {"FAKE_DEVICES": "cuda=8"}, 8),
        ("cuda", {"FAKE_DEVICES": "cuda=8"}, 8),
        ("gpu", {"FAKE_DEVICES": "cuda=8", "FAKE_RUNTIME": "3"}, 3),
        ("xpu", {"FAKE_DEVICES": "xpu=6", "FAKE_RUNTIME": "3"}, 6),
        ("npu", {"FAKE_DEVICES": "npu=5"}, 5),
        ("auto", {"FAKE_DEVICES": "cuda=8"}, 8),
        ("auto", {"FAKE_DEVICES": "npu=5,cuda=8"}, 5),
        ("auto", {"FAKE_DEVICES": ""}, 1),
        ("auto", {"FAKE_OLD": "1", "FAKE_DEVICES": "xpu=6,cuda=8"}, 8),
        ("auto", {"FAKE_OLD": "1", "FAKE_DEVICES": "xpu=6"}, 6),
        ("auto", {"FAKE_OLD": "1"}, 1),
        # a crash after the answer does not matter
        ("gpu", {"FAKE_DEVICES": "cuda=8", "FAKE_CODE": "import atexit; atexit.register(os.abort)"}, 8),
    ],
)
def test_torch_is_asked(
    option: str, variables: dict[str, str], expected: int, fake_torch: FakeTorch, cpus: Callable[[int], None]
) -> None:
    cpus(1)
    assert local_world_size(option, fake_torch.environ(**variables)) == expected
    assert fake_torch.asked() == ["cuda" if option == "gpu" else option]
    assert sys.modules.get("torch") is None


@pytest.mark.parametrize(
    ("option", "variables", "problem"),
    [
        ("gpu", {}, "this host (HOST) has no usable GPU: torch 9.9 finds none"),
        ("xpu", {}, "this host (HOST) has no usable XPU: torch 9.9 finds none"),
        ("npu", {}, "this host (HOST) has no usable NPU: torch 9.9 finds none"),
        (
            "gpu",
            {"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "7"},
            "this host (HOST) has no usable GPU: torch 9.9 finds none with CUDA_VISIBLE_DEVICES='7' "
            "HIP_VISIBLE_DEVICES=''",
        ),
        ("gpu", {"FAKE_CODE": "raise ImportError('no libcudart')"}, "asking torch for devices failed: ImportError: no "
         "libcudart"),
        ("auto", {"FAKE_CODE": "raise ImportError('no libcudart')"}, "asking torch for devices failed: ImportError: no "
         "libcudart"),
        ("xpu", {"FAKE_CODE": r"sys.exit('no driver\n\n')"}, "asking torch for devices failed: no driver"),
        ("xpu", {"FAKE_CODE": "sys.exit()"}, "asking torch for devices failed: exit code 0 and no answer"),
        ("gpu", {"FAKE_CODE": "sys.exit(3)"}, "asking torch for devices failed: exit code 3 and no answer"),
        (
            "auto",
            {"FAKE_CODE": "import signal; os.kill(os.getpid(), signal.SIGSEGV)"},
            "asking torch for devices failed: its process was killed by SIGSEGV",
        ),
    ],
)  # fmt: skip
def test_a_failure_of_torch_is_an_error_in_one_line(
    option: str, variables: dict[str, str], problem: str, fake_torch: FakeTorch
) -> None:
    # Without the noise, which also goes to stderr and would hide that a silent child gives no message.
    init = fake_torch.root / "torch" / "__init__.py"
    init.write_text("\n".join(line for line in FAKE_TORCH.splitlines() if "noise" not in line))
    with pytest.raises(UsageError) as caught:
        local_world_size(option, fake_torch.environ(**variables))
    problem = problem.replace("HOST", os.uname().nodename)
    assert str(caught.value) == f"--nproc-per-node={option}: {problem}; pass a number or cpu"


def test_a_torch_that_hangs_is_given_up(fake_torch: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "TORCH_DEADLINE", 0.5)
    code = "import signal; signal.pause()"
    with pytest.raises(UsageError, match=r"asking torch for devices failed: no answer within 0\.5 s; pass a number"):
        local_world_size("auto", fake_torch.environ(FAKE_CODE=code))
    assert children() == []


def test_the_child_does_not_read_the_terminal(fake_torch: FakeTorch) -> None:
    with contextlib.ExitStack() as stack:
        terminal = os.dup(0)
        stack.callback(os.close, terminal)
        stack.callback(os.dup2, terminal, 0)
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        os.dup2(reader, 0)
        os.close(reader)
        os.write(writer, b"typed ahead")
        code = "assert os.read(0, 1) == b''"
        assert local_world_size("gpu", fake_torch.environ(FAKE_DEVICES="cuda=8", FAKE_CODE=code)) == 8


def test_files_in_the_working_directory_do_not_replace_modules(
    fake_torch: FakeTorch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"cwd/torch.py": "raise SystemExit('the wrong torch')", "cwd/types.py": "raise SystemExit('wrong')"})
    monkeypatch.chdir(tmp_path / "cwd")
    assert local_world_size("gpu", fake_torch.environ(FAKE_DEVICES="cuda=2")) == 2


def test_torch_is_not_asked_if_nvml_answers(fake_torch: FakeTorch, nvml: Callable[..., FakeNvml]) -> None:
    nvml(UUIDS)
    assert local_world_size("gpu", fake_torch.environ(FAKE_DEVICES="cuda=8")) == 4
    assert local_world_size("auto", fake_torch.environ(FAKE_DEVICES="cuda=8")) == 4
    with pytest.raises(UsageError, match="hides all 4"):
        local_world_size("gpu", fake_torch.environ(FAKE_DEVICES="cuda=8", CUDA_VISIBLE_DEVICES=""))
    assert fake_torch.asked() == []


def test_nvml_without_gpus_leaves_auto_to_torch(fake_torch: FakeTorch, nvml: Callable[..., FakeNvml]) -> None:
    nvml([])
    assert local_world_size("auto", fake_torch.environ(FAKE_DEVICES="npu=5")) == 5


@pytest.mark.parametrize("option", ["gpu", "auto"])
@pytest.mark.parametrize(("options", "value"), [({"mig": [3]}, "0"), ({}, "MIG-5c89c4e2"), ({"fails": "init"}, "0")])
def test_torch_is_asked_if_nvml_cannot_say(
    option: str, options: dict[str, object], value: str, fake_torch: FakeTorch, nvml: Callable[..., FakeNvml]
) -> None:
    nvml(UUIDS, **options)
    environ = fake_torch.environ(FAKE_DEVICES="cuda=8", FAKE_RUNTIME="2", CUDA_VISIBLE_DEVICES=value)
    assert local_world_size(option, environ) == 2


def test_auto_does_not_ask_a_cpu_build_of_torch(
    fake_torch: FakeTorch, nvml: Callable[..., FakeNvml], cpus: Callable[[int], None]
) -> None:
    put(fake_torch.root, {"torch/version.py": "__version__ = '9.9+cpu'\n"})
    nvml(UUIDS)  # which this torch could not use
    cpus(1)
    assert local_world_size("auto", fake_torch.environ(FAKE_DEVICES="npu=5")) == 1
    assert fake_torch.asked() == []


def test_auto_asks_a_cpu_build_that_has_a_backend_to_load(fake_torch: FakeTorch) -> None:
    put(
        fake_torch.root,
        {
            "torch/version.py": "__version__ = '9.9+cpu'\n",
            "torch_npu-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch-npu\nVersion: 1.0\n",
            "torch_npu-1.0.dist-info/entry_points.txt": "[torch.backends]\ntorch_npu = torch_npu:load\n",
        },
    )
    assert local_world_size("auto", fake_torch.environ(FAKE_DEVICES="npu=5")) == 5


# --- the option


@pytest.mark.parametrize(("option", "expected"), [("1", 1), ("8", 8), ("128", 128), ("007", 7)])
def test_numbers(option: str, expected: int) -> None:
    assert local_world_size(option, {}) == expected


def test_cpu_and_auto_without_torch_are_the_cpu_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_count", lambda: 11)
    assert local_world_size("cpu", {}) == 11
    assert local_world_size("auto", {}) == 11


ALLOWED = "must be a number from 1 to 65536, or auto, cpu, gpu, xpu (or another accelerator that torch knows)"


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("0", "0"),
        ("000", "000"),
        ("-1", "-1"),
        ("+2", "+2"),
        (" 2", " 2"),
        ("2\n", "2\\n"),
        ("1_0", "1_0"),
        ("1.5", "1.5"),
        ("1e3", "1e3"),
        ("٣", "\\u0663"),
        ("²", "\\xb2"),
        ("", ""),
        ("cuda:0", "cuda:0"),
        ("a b", "a b"),
        ("ñpu", "\\xf1pu"),
        ("unknown", "unknown"),
        ("GPU", "GPU"),
        ("meta", "meta"),
        ("accelerator", "accelerator"),
    ],
)
def test_other_values_are_refused_with_and_without_torch(
    option: str, shown: str, fake_torch: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for torch_installed in (True, False):
        if not torch_installed:
            monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(UsageError) as caught:
            local_world_size(option, fake_torch.environ(FAKE_DEVICES="cuda=8"))
        assert str(caught.value) == f"--nproc-per-node={shown}: {ALLOWED}"
    assert fake_torch.asked() == ([option] if option.isascii() and option.isidentifier() else [])


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("xpu", "has no usable XPU: torch is not installed; pass a number or cpu"),
        (
            "gpu",
            "has no usable GPU: torch is not installed, and NVML is not available (import of pynvml halted; None in ",
        ),
    ],
)
def test_devices_that_need_torch_say_that_it_is_missing(option: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        local_world_size(option, {})
    assert str(caught.value).startswith(f"--nproc-per-node={option}: this host ({os.uname().nodename}) {problem}")


def test_a_directory_called_torch_is_not_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    put(tmp_path, {"torch/notes.txt": ""})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError, match="no usable XPU: torch is not installed"):
        local_world_size("xpu", {})


# --- the real thing


@pytest.fixture
def real_environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment for the real torch, in which it finds no device on any host."""
    monkeypatch.delitem(sys.modules, "torch")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": "99"}


@pytest.mark.torch
def test_auto_with_the_real_torch_is_the_cpu_count(
    real_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_world_size("auto", real_environ) == cpu_count()
    monkeypatch.setattr(devices, "_is_cpu_only", lambda torch_init: False)  # the same if torch must be asked
    assert local_world_size("auto", real_environ) == cpu_count()


@pytest.mark.torch
def test_gpu_with_the_real_torch_is_an_error(real_environ: dict[str, str]) -> None:
    with pytest.raises(
        UsageError, match=r"=gpu: .* has no usable GPU: torch \S+ finds none with CUDA_VISIBLE_DEVICES=''"
    ):
        local_world_size("gpu", real_environ)


@pytest.mark.torch
def test_meta_is_no_accelerator_to_the_real_torch(real_environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="=meta: must be a number"):
        local_world_size("meta", real_environ)


@pytest.mark.parametrize(("name", "expected"), [("nvidia0", True), ("accel1", True), ("null", False), ("", True)])
def test_device_files_of_accelerators(name: str, expected: bool, tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    if name:
        folder.mkdir()
        (folder / name).touch()
    assert has_accelerator(str(folder)) == expected


def test_a_warm_keeper_that_has_begun_to_use_one_knows() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import preload_main; print(*preload_main.DEVICES)"
    printed = subprocess.check_output([sys.executable, "-c", code, os.path.dirname(workers.__file__)], text=True)
    assert printed.split() == [f"/dev/{name}" for name in ACCELERATORS]


def test_importing_the_module_imports_nothing_else() -> None:
    code = "import sys, elastic_launch.config, elastic_launch.host; before = set(sys.modules)"
    code += "; import elastic_launch.host.devices; print(*sorted(set(sys.modules) - before))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == (
        "elastic_launch.core elastic_launch.core.placement elastic_launch.host.cgroup elastic_launch.host.devices\n"
    )


def test_a_number_needs_no_other_module() -> None:
    code = "import sys, elastic_launch.host.devices as d; before = set(sys.modules); print(d.local_world_size('2', {}))"
    code += "; print(*sorted(set(sys.modules) - before))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "2\n\n"
