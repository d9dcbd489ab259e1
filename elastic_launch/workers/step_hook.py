"""Count a worker's iterations in the memory that its agent made for it.

``core/progress/memory.py`` describes the memory. A step costs no system call, and wakes nobody.

``bootstrap`` loads this file when the program imports torch. Like that one, it may run under another Python than the
agent, from 3.8 on, so it imports nothing of this package. ``elastic_launch.worker`` uses it as an ordinary module. All
numbers are kept in the memory, so the two may count side by side.
"""

import os
import sys
import time

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost milliseconds
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

SWITCH = "ELASTIC_LAUNCH_PROGRESS"
VARIABLE = "ELASTIC_LAUNCH_PROGRESS_FD"

# The same as in core/progress/memory.py.
MAGIC = b"ELPROG1\0"
PAGE = 4096
HOLD, STOP_AT, LEASE = 1, 2, 4
STEPS, MARKS, FIRST, LAST, LONGEST, SECOND, NUMBER, FIRST_NUMBER, PHASE_SINCE, CALLS = range(8, 18)
PHASE, PHASE_SIZE = 160, 32

LEASE_PAUSE = 0.05
"""Seconds between two looks at a lease that is over."""

nowhere = memoryview(bytearray(PAGE)).cast("Q")
"""Stands in for the memory where there is none: outside of a job, and in children that a worker forks."""
words = None
"""The memory's first page as words of 64 bits; None until ``connect`` was called."""


def connect() -> "memoryview":
    """Find the memory, once, and tell the agent so. Returns its words, or ``nowhere``."""
    global words
    if words is None:
        words = _mapped() or nowhere
    return words


def _mapped() -> "memoryview | None":
    """Map the memory that the environment names, if it is still there.

    The program may have closed the descriptors. Their numbers may belong to other files now.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        memory, notify = map(int, os.environ.get(VARIABLE, "").split(","))
        if os.pread(memory, len(MAGIC), 0) != MAGIC or os.fstat(memory).st_size < PAGE:
            return None
        import mmap

        # Without trackfd, mmap would keep a descriptor of its own. Python has the option since 3.13.
        options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        page = memoryview(mmap.mmap(memory, PAGE, **options)).cast("Q")
        if os.readlink(f"/proc/self/fd/{notify}") == "anon_inode:[eventfd]":
            os.write(notify, (1).to_bytes(8, sys.byteorder))
    except (ImportError, OSError, ValueError):
        return None
    return page


def _leave() -> None:
    """Write nothing any more: this process is a child that the worker has forked."""
    global words
    words = nowhere


os.register_at_fork(after_in_child=_leave)


def advance(counter: int) -> None:
    """Add 1 to STEPS or MARKS. The time since the last of them counts as a gap, except in a phase."""
    page = words or nowhere
    now = time.monotonic_ns()
    last = page[LAST]
    if not page[FIRST]:
        page[FIRST] = now
    elif not page[PHASE_SINCE] and (gap := now - last) > page[SECOND]:
        longest = page[LONGEST]
        page[LONGEST], page[SECOND] = (gap, longest) if gap > longest else (longest, gap)
    page[LAST] = now
    page[counter] += 1
    if page[LEASE]:
        check_lease()


def check_lease() -> None:
    """Return only while the lease of this worker lasts. If it is over, the keeper is about to kill this process."""
    page = words or nowhere
    while page[LEASE] and time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= page[LEASE]:
        time.sleep(LEASE_PAUSE)


def count_steps(optimizers: "ModuleType") -> None:
    """Count an iteration whenever an optimizer steps that has stepped before in the current one.

    So optimizers that take turns count once per iteration, and so does one optimizer per parameter.

    The hook is called in compiled code, too. Whatever torch.compile cannot trace, such as a look at the clock, would
    break the graph. But it lets an assignment to the attribute of an object that is implemented in C happen after the
    graph, as it is written. So the hook assigns to a ``ctypes.c_bool``, which asks the assigned object whether it is
    true, and that object counts. The graph remains what it is without the hook, and no guard depends on a counter.
    If several optimizers step in one graph, the last assignment alone happens, which is enough.

    A step begins only while the lease lasts. In compiled code that is checked after the step, when it is counted.

    Args:
        optimizers: the module ``torch.optim.optimizer``. The rest of torch may still be about to be imported.
    """
    page = connect()
    if page is nowhere:
        return
    import ctypes

    torch = sys.modules["torch"]
    stepped: set[int] = set()

    def count(optimizer: object) -> None:
        key = id(optimizer)
        if stepped and key not in stepped:
            stepped.add(key)
            return
        if len(stepped) != 1:
            stepped.clear()
            stepped.add(key)
        advance(STEPS)

    class Counted(tuple):  # type: ignore[type-arg]  # a tuple, so that it is whole before it is assigned
        __slots__ = ()

        def __bool__(self) -> bool:
            count(self[0])
            return True

    class Counter(ctypes.c_bool):
        pass

    counter = Counter()

    def hook(optimizer: object, args: object, kwargs: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            counter.value = Counted((optimizer,))  # type: ignore[assignment]
        else:
            count(optimizer)

    def before(optimizer: object, args: object, kwargs: object) -> None:
        if not torch.compiler.is_dynamo_compiling() and page[LEASE]:
            check_lease()

    optimizers.register_optimizer_step_pre_hook(before)
    optimizers.register_optimizer_step_post_hook(hook)
