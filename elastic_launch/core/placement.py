"""Decide which devices and which CPUs a worker gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from elastic_launch.errors import UsageError


def visible_cuda_devices(value: str | None, uuids: Sequence[str]) -> list[int] | None:
    """Return the indices of the GPUs that CUDA shows to a process, in CUDA's order.

    The rules are those of the CUDA programming guide ("CUDA environment variables") and, where it leaves gaps, those of
    torch. The list ends before its first invalid entry. An entry that occurs twice hides all devices. The first entry
    decides between indices and UUIDs. Anything may follow the digits of an index.

    Args:
        value: the process's ``CUDA_VISIBLE_DEVICES``; None if it is not set.
        uuids: the UUIDs of the host's GPUs, by index.

    Returns:
        None if ``value`` names MIG devices, which only CUDA can resolve.
    """
    if value is None:
        return list(range(len(uuids)))
    if "MIG-" in value:
        return None
    visible: list[int] = []
    for entry in value.split(","):
        if value.startswith("GPU-"):
            found = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        else:
            number = re.match(r"\s*([+-]?\d+)", entry, re.ASCII)
            found = [i for i in range(len(uuids)) if number and i == int(number[1])]
        if len(found) != 1:
            break
        if found[0] in visible:
            return []
        visible += found
    return visible


def virtual_device(local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which a worker sees its own device, and no other, as device 0.

    Its device is the local rank's entry in the inherited ``CUDA_VISIBLE_DEVICES``: an index, a UUID or a MIG device. If
    that is not set, it is the device whose index is the local rank. If that hides all devices, they stay hidden. As in
    torch, ``LOCAL_WORLD_SIZE`` does not change.

    Args:
        local_rank: the worker's local rank.
        environ: the environment that the worker inherits.

    Raises:
        UsageError: ``CUDA_VISIBLE_DEVICES`` shows fewer devices than there are workers.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local_rank)}
    shown: list[str] = []
    for entry in map(str.strip, value.split(",")):
        if not re.match(r"\+?\d|GPU-|MIG-", entry, re.ASCII):
            break  # CUDA ends the list here, too
        shown.append(entry)
    if shown and local_rank >= len(shown):
        raise UsageError(
            f"--virtual-local-rank: local rank {local_rank} needs its own device, but CUDA_VISIBLE_DEVICES={value!r} "
            f"shows only {len(shown)}; list more devices there, or start fewer workers (--nproc-per-node)"
        )
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": shown[local_rank] if shown else value}


def parse_list(text: str) -> frozenset[int]:
    """Parse a list in the kernel's format: ``0-2,8`` is 0, 1, 2 and 8."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def format_list(numbers: frozenset[int]) -> str:
    """Format a list as the kernel does: ``0-2,8`` for 0, 1, 2 and 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def share(groups: Sequence[frozenset[int]], index: int, count: int) -> frozenset[int]:
    """Return the union of the groups that one of ``count`` workers gets when they are shared out evenly, in order.

    If they do not divide evenly, the first workers get one more. The last ones get nothing if there are too few.
    """
    each, extra = divmod(len(groups), count)
    start = index * each + min(index, extra)
    return frozenset().union(*groups[start : start + each + (index < extra)])
