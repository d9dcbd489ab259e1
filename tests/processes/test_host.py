"""What the host offers, asked of the real one: CPUs, their topology, the OOM killer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_launch.host.numa import AffinityMode, bindings


def test_cpu_count_of_this_host_follows_a_narrowed_mask() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from elastic_launch.host import devices"
    code += "; print(devices.cpu_count())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


@pytest.mark.skipif(not os.path.exists("/sys/devices/system/node/online"), reason="this kernel tells no topology")
@pytest.mark.parametrize("mode", [mode.value for mode in AffinityMode])
def test_the_kernel_takes_what_is_found_here(mode: str) -> None:
    allowed = os.sched_getaffinity(0)
    if mode == "core-complex" and not os.path.exists(f"/sys/devices/system/cpu/cpu{min(allowed)}/cache/index0"):
        pytest.skip("this host tells nothing of caches")
    [cpus] = bindings(mode, 1, {"CUDA_VISIBLE_DEVICES": ""})
    assert cpus
    assert cpus <= allowed
    code = f"import os; os.sched_setaffinity(0, {set(cpus)}); print(os.sched_getaffinity(0) == {set(cpus)})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


KILLED = """
import os, signal, sys
from elastic_launch.host.cgroup import OomCounter

with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
oom = OomCounter()
def child(what):
    pid = os.fork()
    if not pid:
        what()
        os._exit(0)
    return os.waitpid(pid, 0)[1]
def stop():
    os.kill(os.getpid(), signal.SIGKILL)
def eat():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    bytearray(b"x") * (256 << 20)
print(child(stop), oom.killed())
print(child(eat), oom.killed())
print(oom.describe())
"""


@pytest.mark.xdist_group("oom-killer")
def test_a_real_kill(memory_cgroup: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(memory_cgroup)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"{int(signal.SIGKILL)} 0",
        f"{int(signal.SIGKILL)} 1",
        "the kernel's OOM killer ended a process of this cgroup (memory limit 64 MiB): "
        "out of memory is the likely cause",
    ]
