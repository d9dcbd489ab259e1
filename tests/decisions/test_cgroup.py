"""The OOM killer's counters: recorded trees of the kernel's files, and a real kill in a real cgroup."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from elastic_launch.host.cgroup import OomCounter
from tests.support.files import put


def events(kills: int) -> str:
    return f"low 0\nhigh 12\nmax 340\noom 9\noom_kill {kills}\noom_group_kill 7\n"


def control(kills: int) -> str:
    return f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"


def vmstat(kills: int) -> str:
    return f"nr_free_pages 123\noom_kill {kills}\nnuma_hit 5\n"


V1 = "9:name=systemd:/job\n4:cpu,cpuacct:/other\n3:memory:/slice/job\n0::/job\n"
NONE_V1 = "9223372036854771712\n"
HOST = {"proc/vmstat": "oom_kill 500\n", "proc/meminfo": "MemFree: 1 kB\nMemTotal:       65536000 kB\n"}

# By name: the tree, the file whose counter rises with its content, and the description after the second kill.
TREES = {
    "v2": (
        {"proc/self/cgroup": "0::/slice/job\n", "sys/fs/cgroup/slice/job/memory.max": "68719476736\n"},
        ("sys/fs/cgroup/slice/job/memory.events", events),
        "2 processes of this cgroup (memory limit 64.0 GiB): out of memory is the likely cause",
    ),
    "v2, the limit is above": (
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/job/memory.max": "max\n",
            "sys/fs/cgroup/slice/memory.max": "536870912\n",
        },
        ("sys/fs/cgroup/slice/job/memory.events", events),
        "2 processes of this cgroup (memory limit 512 MiB): out of memory is the likely cause",
    ),
    "v2, no limit": (
        {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"},
        ("sys/fs/cgroup/job/memory.events", events),
        "2 processes of this cgroup: out of memory is the likely cause",
    ),
    "v2, without the controller": (
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/job/cgroup.procs": "",
            "sys/fs/cgroup/slice/memory.max": "1073741824\n",
        },
        ("sys/fs/cgroup/slice/memory.events", events),
        "2 processes of this cgroup (memory limit 1.0 GiB): out of memory is the likely cause",
    ),
    "v2, a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1073741824\n"},
        ("sys/fs/cgroup/memory.events", events),
        "2 processes of this cgroup (memory limit 1.0 GiB): out of memory is the likely cause",
    ),
    "v2, the host's path in a container": (
        {"proc/self/cgroup": "0::/kubepods/pod1/c1\n"},
        ("sys/fs/cgroup/memory.events", events),
        "2 processes of this cgroup: out of memory is the likely cause",
    ),
    "v2, a path above the namespace's root": (
        {"proc/self/cgroup": "0::/../../c1\n", "sys/fs/cgroup/c1/memory.events": events(70)},
        ("sys/fs/cgroup/memory.events", events),
        "2 processes of this cgroup: out of memory is the likely cause",
    ),
    "v2, a name with a colon and an umlaut": (
        {"proc/self/cgroup": "0::/jöb:1\n"},
        ("sys/fs/cgroup/jöb:1/memory.events", events),
        "2 processes of this cgroup: out of memory is the likely cause",
    ),
    "v1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/memory/slice/job/memory.limit_in_bytes": NONE_V1,
            "sys/fs/cgroup/memory/slice/memory.limit_in_bytes": "8589934592\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NONE_V1,
        },
        ("sys/fs/cgroup/memory/slice/job/memory.oom_control", control),
        "2 processes of this cgroup (memory limit 8.0 GiB): out of memory is the likely cause",
    ),
    "v1, no limit": (
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/slice/job/memory.limit_in_bytes": NONE_V1},
        ("sys/fs/cgroup/memory/slice/job/memory.oom_control", control),
        "2 processes of this cgroup: out of memory is the likely cause",
    ),
    "v1, the host's path in a container": (
        {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "8589934592\n"},
        ("sys/fs/cgroup/memory/memory.oom_control", control),
        "2 processes of this cgroup (memory limit 8.0 GiB): out of memory is the likely cause",
    ),
    "v1, a kernel whose cgroups do not count": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/memory/slice/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n",
            "proc/meminfo": HOST["proc/meminfo"],
        },
        ("proc/vmstat", vmstat),
        "2 processes on this host (memory 62.5 GiB): out of memory is a possible cause",
    ),
    "the root of all": (
        {"proc/self/cgroup": "0::/\n", "proc/meminfo": HOST["proc/meminfo"]},
        ("proc/vmstat", vmstat),
        "2 processes on this host (memory 62.5 GiB): out of memory is a possible cause",
    ),
    "no cgroups": (
        {},
        ("proc/vmstat", vmstat),
        "2 processes on this host: out of memory is a possible cause",
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_counters(tmp_path: Path, name: str) -> None:
    files, (counter, content), description = TREES[name]
    if counter != "proc/vmstat":
        put(tmp_path, HOST)
    put(tmp_path, {**files, counter: content(3)})
    oom = OomCounter(str(tmp_path))
    put(tmp_path, {"proc/vmstat": vmstat(501)} if counter != "proc/vmstat" else {})  # of another cgroup
    assert (oom.killed(), oom.describe()) == (0, "")
    put(tmp_path, {counter: content(4)})
    assert oom.killed() == 1
    assert oom.describe() == f"the kernel's OOM killer ended {description}".replace("2 processes", "a process")
    put(tmp_path, {counter: content(5)})
    assert oom.killed() == 2
    assert oom.describe() == f"the kernel's OOM killer ended {description}"
    assert OomCounter(str(tmp_path)).killed() == 0  # each starts at 0


def test_neighbours_do_not_count(tmp_path: Path) -> None:
    own, above = "sys/fs/cgroup/slice/job/memory.events", "sys/fs/cgroup/slice/memory.events"
    put(tmp_path, {"proc/self/cgroup": "0::/slice/job\n", own: events(0), above: events(0)})
    oom = OomCounter(str(tmp_path))
    put(tmp_path, {above: events(1)})
    assert oom.killed() == 0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/vmstat": "nr_free_pages 1\noom_kill\n"},
        {"proc/vmstat": "", "proc/self/cgroup": "nonsense\n\n::\n0:\n"},
        {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.events": "oom_kill many\n"},
    ],
)
def test_what_cannot_be_read_counts_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    put(tmp_path, files)
    oom = OomCounter(str(tmp_path))
    assert (oom.killed(), oom.describe()) == (0, "")


def test_a_counter_that_vanishes_or_falls_counts_nothing(tmp_path: Path) -> None:
    file = "sys/fs/cgroup/job/memory.events"
    put(tmp_path, {"proc/self/cgroup": "0::/job\n", file: events(3)})
    oom = OomCounter(str(tmp_path))
    put(tmp_path, {file: events(1)})
    assert oom.killed() == 0
    (tmp_path / file).unlink()
    assert (oom.killed(), oom.describe()) == (0, "")


def test_it_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        OomCounter()
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.05  # far more than it takes, because other programs use this CPU, too


# --- A real kill
