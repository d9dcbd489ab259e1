"""What several rooms of processes need: time for stacks; and as root a disk that is soon full, and a memory cgroup."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_launch.core.agent import lifecycle
from tests.support.waiting import wait_until

STACKS_TIME = 2.5
"""Seconds that launchers of ``time_for_stacks`` give a worker to write its stacks before it is killed."""
_SET_STACKS_TIME = f"""
import sys
if sys.orig_argv[1:3] == ["-m", "elastic_launch"]:
    from elastic_launch.core.agent import lifecycle
    lifecycle.DUMP_TIME = {STACKS_TIME}
    lifecycle._dump_time = lambda state: {STACKS_TIME}
"""


@pytest.fixture
def time_for_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give workers more than half a second for their stacks: on a busy machine, they may stand still for longer."""
    monkeypatch.setattr(lifecycle, "DUMP_TIME", STACKS_TIME)
    monkeypatch.setattr(lifecycle, "_dump_time", lambda state: STACKS_TIME)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_SET_STACKS_TIME)
    path = os.pathsep.join([str(tmp_path / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def memory_mount() -> Path | None:
    """This process's memory cgroup, of either version, if there is one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = "/sys/fs/cgroup" if not controllers else "/sys/fs/cgroup/memory"
        if not controllers or "memory" in controllers.split(","):
            for folder in (Path(mount + path), Path(mount)):
                if (folder / "memory.oom_control").exists() or (folder / "cgroup.subtree_control").exists():
                    return folder
    return None


def is_removed(folder: Path) -> bool:
    """Remove a cgroup; the kernel may take a moment after its last process was waited for."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB; the test is skipped where none can be made (which takes root, as a rule)."""
    above = memory_mount()
    if above is None:
        pytest.skip("no memory cgroup here")
    folder = above / f"elastic_launch_test_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        limits = [folder / name for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists()]
        if not limits:
            pytest.skip("the memory controller is not handed on to new cgroups here")
        limits[0].write_text(str(64 << 20))
        for name in ("memory.swap.max", "memory.swappiness"):  # to the end of the memory without a detour by the disk
            if (folder / name).exists():
                (folder / name).write_text("0")
        yield folder
    finally:
        wait_until(lambda: is_removed(folder), f"{folder} is empty")
