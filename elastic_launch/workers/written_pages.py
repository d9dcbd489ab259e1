"""Find the pages that a forked worker has written to, and have a standby copy them before it becomes a worker.

A fork shares its memory with the keeper. The first time it writes to a page, the kernel copies that page. A worker that
joins torch's process group writes to 1,400 pages, and copying them one by one was a fifth of the CPU time of a restart
with standbys. Which pages those are, one round shows for the next: all workers have the keeper's addresses.

``preload_main`` imports this file without its package.
"""

from __future__ import annotations

import ctypes
import os

if __package__:
    from elastic_launch.workers import keeper_main
else:
    import keeper_main  # type: ignore[import-not-found, no-redef]

PAGE = os.sysconf("SC_PAGE_SIZE")
PageRanges = list[tuple[int, int]]
"""Addresses and lengths, in bytes."""

MOST = 8 << 20
"""Bytes that are copied ahead at most: a worker may write to far more in the course of its work."""
LARGE = 1 << 30
"""Bytes of one mapping that is not looked at: it holds data, and the keeper would be busy with it for too long."""
MADV_POPULATE_WRITE = 23
PRESENT, IS_FILE, EXCLUSIVE = 0x80, 0x20, 0x01
"""Flags of a page, in the last byte of its entry in pagemap."""
WRITTEN = bytes(flags & (PRESENT | IS_FILE | EXCLUSIVE) == PRESENT | EXCLUSIVE for flags in range(256))
"""Whether a page with these flags belongs to one process alone."""
START_STACK, START_BRK = 25, 44
"""Where stack and heap begin, in what ``read_stat`` returns."""


def written_pages(worker: int, keeper: int) -> PageRanges:
    """Return the pages of a keeper's memory that a worker, a fork of it, has replaced by its own.

    Raises:
        OSError: the worker has ended, or its memory may not be looked at.
    """
    ranges: PageRanges = []
    stats = [keeper_main.read_stat(pid) for pid in (worker, keeper)]
    if len({(stat[START_STACK], stat[START_BRK]) for stat in stats}) > 1:
        return ranges  # it has executed another program
    left = MOST // PAGE
    with open(f"/proc/{keeper}/maps", "rb") as maps, open(f"/proc/{worker}/pagemap", "rb", buffering=0) as pagemap:
        for line in maps:
            addresses, mode = line.split(None, 2)[:2]
            if mode[1:2] != b"w" or mode[3:4] != b"p":
                continue
            start, end = (int(text, 16) for text in addresses.split(b"-"))
            if end - start >= LARGE:
                continue
            if left <= 0:
                break
            flags = os.pread(pagemap.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)[7::8]
            written = flags.translate(WRITTEN)
            last = 0
            while left > 0 and (first := written.find(1, last)) >= 0:
                last = written.find(0, first)
                last = min(len(written) if last < 0 else last, first + left)
                left -= last - first
                ranges.append((start + first * PAGE, (last - first) * PAGE))
    return ranges


def copy_pages(ranges: PageRanges) -> None:
    """Have the kernel copy shared pages of this process. Before Linux 5.14 nothing happens."""
    for start, size in ranges:
        keeper_main.libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_POPULATE_WRITE)
