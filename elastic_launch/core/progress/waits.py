"""What a stack waits for, told by the files and functions of its innermost calls.

Calls into C have no frame of their own in Python's stacks. So ``lock.acquire()`` or ``tensor.item()`` in the user's
code shows as the user's line, and only the system call tells more.
"""

from __future__ import annotations

import re

from elastic_launch.core.progress.stacks import Frame, is_native, is_users

_DISTRIBUTED = re.compile(
    r"(?:^|/)torch/distributed/(?!checkpoint/|elastic/|launcher/|rpc/|run\.py|launch\.py)"
    r"|(?:^|/)torch/nn/parallel/distributed\.py$"
    r"|(?:^|/)(?:deepspeed/comm|horovod)/"
)
"""Code that talks to other ranks, and computes nothing."""
_WRAPPER = re.compile(
    r"(?:^|/)(?:contextlib|c10d_logger|torch/_ops|torch/_compile|torch/_dynamo/\w+|torch/utils/_\w+)\.py$"
)
"""Code that only calls what it wraps."""
_COLLECTIVE = re.compile(
    r"(?:all_|reduce|broadcast|barrier|monitored_barrier|gather|scatter|send|recv|batch_isend|wait|init_process|new_gr)"
)
"""Names under which users know what they call."""
BACKWARD = "backward pass"
_SYNCHRONIZES = (
    (re.compile(r"(?:^|/)torch/(?:cuda|xpu|mps|accelerator)/"), re.compile(r"synchronize|wait"), "synchronize"),
    (re.compile(r"(?:^|/)torch/autograd/"), re.compile(r"_engine_run_backward|backward"), BACKWARD),
)
"""Calls that end when the device, and so the collectives in its queue, have finished: file, function, shown name."""
_NATIVE_COLLECTIVE = re.compile(r"(?:cu|hip)\w*Synchronize|p?nccl|gloo::|c10d::|MPI_")

_DEBUGGER = re.compile(
    r"(?:^|/)python3[^/]*/(?:pdb|bdb|code)\.py$"
    r"|(?:^|/)(?:ipdb|pudb|debugpy|pydevd\w*|_pydev\w*|IPython/terminal)(?:/|\.py$)"
)
_WAITS = (
    ("data", re.compile(r"(?:^|/)torch/utils/data/dataloader\.py$"), re.compile(r"_(?:try_)?get_data|_next_data")),
    ("process", re.compile(r"python3[^/]*/(?:subprocess|multiprocessing/popen\w+)\.py$"), re.compile(r"")),
    (
        "lock",
        re.compile(
            r"python3[^/]*/(?:threading|queue|asyncio/locks|concurrent/futures/_base|multiprocessing/(?:synchronize|queues"
            r"|connection|pool|managers))\.py$"
        ),
        re.compile(r"_?wait|acquire|join|__enter__|get|put|recv|result|_?poll"),
    ),
    (
        "network",
        re.compile(r"python3[^/]*/(?:socket|ssl|http/client)\.py$"),
        re.compile(r"read|recv|accept|connect|do_handshake|send"),
    ),
    ("events", re.compile(r"python3[^/]*/selectors\.py$"), re.compile(r"")),
)
"""What a stack waits for: its kind, file and function. The first row that fits a call below the user's code decides."""
_SYSCALLS = {
    "futex": "futex",
    "nanosleep": "sleep",
    "clock_nanosleep": "sleep",
    "recvfrom": "network",
    "recvmsg": "network",
    "accept": "network",
    "accept4": "network",
    "connect": "network",
    "wait4": "process",
    "waitid": "process",
    "poll": "events",
    "ppoll": "events",
    "select": "events",
    "pselect6": "events",
    "epoll_wait": "events",
    "epoll_pwait": "events",
    "read": "file",
    "write": "file",
    "openat": "file",
    "fsync": "file",
    "flock": "file",
    "fcntl": "file",
    "ioctl": "device call",
}


def collective_of(frames: tuple[Frame, ...]) -> str:
    """Return the operation in which a stack waits for other ranks, such as ``all_reduce``; empty if it does not.

    ``synchronize`` and the backward pass are among them, because collectives may be queued on a device, or run in the
    backward pass. Whether they are, the stack does not tell.
    """
    calls = [frame for frame in frames if not is_native(frame) and not _WRAPPER.search(frame.file)]
    depth = next((number for number, call in enumerate(calls) if not _DISTRIBUTED.search(call.file)), len(calls))
    if names := [call.function for call in calls[:depth]]:
        return next((name for name in reversed(names) if _COLLECTIVE.match(name)), names[0])
    for file, function, name in _SYNCHRONIZES:
        if any(file.search(call.file) and function.match(call.function) for call in calls[:1]):
            return name
    python = next((number for number, frame in enumerate(frames) if not is_native(frame)), len(frames))
    return "collective" if any(_NATIVE_COLLECTIVE.match(frame.function) for frame in frames[:python]) else ""


def is_debugger(frames: tuple[Frame, ...]) -> bool:
    """Return whether a debugger or an interactive interpreter is among the callers."""
    return any(_DEBUGGER.search(frame.file) for frame in frames)


def wait_of(frames: tuple[Frame, ...], syscall: str) -> str:
    """Return the kind of what a stack waits for: ``data``, ``lock``, ``sleep`` and so on; empty if it is not known.

    Args:
        frames: the stack, innermost first.
        syscall: the name of the system call that the thread is in.
    """
    calls = []
    for frame in frames:
        if is_users(frame):
            break
        calls.append(frame)
    for kind, file, function in _WAITS:
        if any(file.search(call.file) and function.match(call.function) for call in calls):
            return kind
    return _SYSCALLS.get(syscall, "")


def is_idle(frames: tuple[Frame, ...]) -> bool:
    """Return whether a thread beside the main thread is of no interest: it waits for work, or runs no user's code."""
    if collective_of(frames):
        return False
    return wait_of(frames, "") != "" or not any(map(is_users, frames))
