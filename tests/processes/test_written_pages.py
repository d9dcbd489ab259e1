"""The pages of a fork that are its own: which they are, and how another fork gets them ahead of time."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import ctypes, json, mmap, os, signal, sys
from elastic_launch.workers import written_pages
from elastic_launch.workers.written_pages import PAGE, copy_pages

memory = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(b"x" * len(memory))
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))

def fork(act):
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        act()
        os.write(writing, b"done")
        signal.pause()
    assert os.read(reading, 4) == b"done"
    return pid

def write():
    for page in (3, 4, 10):
        memory[page * PAGE] = 0

def pages(ranges):
    everywhere = [address for begin, size in ranges for address in range(begin, begin + size, PAGE)]
    return [(address - start) // PAGE for address in everywhere if 0 <= address - start < len(memory)]

def written_by(pid):
    return written_pages.written_pages(pid, os.getpid())

def copy():
    copy_pages(ranges)
    assert memory[3 * PAGE] == memory[10 * PAGE] == ord("x")

children = [fork(write), fork(lambda: None)]
ranges = written_by(children[0])
children.append(fork(copy))
other = os.fork() or os.execv("/bin/sleep", ["sleep", "60"])
while open(f"/proc/{other}/comm").read() != "sleep\\n": pass
found = [pages(ranges), *(pages(written_by(pid)) for pid in children[1:])]
written_pages.MOST = 2 * PAGE
found = {"found": found, "most": sum(size for _, size in written_by(children[0])) // PAGE, "other": written_by(other)}
written_pages.LARGE = 0
print(json.dumps({**found, "large": written_by(children[0])}))
for pid in (*children, other):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_written_pages_are_found_and_copied_in_another_fork() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found == {"found": [[3, 4, 10], [], [3, 4, 10]], "most": 2, "other": [], "large": []}
