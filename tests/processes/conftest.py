"""What several rooms of processes need: a disk that is soon full, and a memory cgroup. Both take root."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until


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
