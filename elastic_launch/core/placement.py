"""Layer 1: which devices and which CPUs a worker gets: rules about numbers and names. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from elastic_launch.errors import UsageError


def visible_cuda_devices(value: str | None, uuids: Sequence[str]) -> list[int] | None:
    """Which of the GPUs with these UUIDs CUDA shows a process whose ``CUDA_VISIBLE_DEVICES`` is ``value``, in order.

    None where ``value`` names MIG devices: only CUDA knows. The rules are the CUDA runtime's (CUDA programming guide,
    "CUDA environment variables"), and where that is silent, what torch counts: the list ends before its first invalid
    entry; an entry given twice hides all; the first entry decides between numbers and UUIDs; a number may be followed
    by anything.
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
    """What ``--virtual-local-rank`` changes in a worker's environment: its device, and no other, is number 0.

    The device is the local rank's entry of the inherited ``CUDA_VISIBLE_DEVICES``, be it a number, a UUID or a MIG
    device; the one with the local rank's number where that is not set. ``LOCAL_WORLD_SIZE`` stays what it is, as in
    torch. Where the variable hides all devices, it goes on doing so.

    Raises UsageError: the variable shows some devices, and fewer than this worker needs.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local_rank)}
    shown: list[str] = []
    for entry in map(str.strip, value.split(",")):
        if not re.match(r"\+?\d|GPU-|MIG-", entry, re.ASCII):
            break  # here CUDA ends the list, too
        shown.append(entry)
    if shown and local_rank >= len(shown):
        raise UsageError(
            f"--virtual-local-rank: local rank {local_rank} needs a device of its own, and CUDA_VISIBLE_DEVICES="
            f"{value!r} shows only {len(shown)}; name more devices there, or start fewer workers (--nproc-per-node)"
        )
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": shown[local_rank] if shown else value}


def parse_list(text: str) -> frozenset[int]:
    """The numbers of a list as the kernel writes it: ``0-2,8`` is 0, 1, 2 and 8; an empty text is none."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def format_list(numbers: frozenset[int]) -> str:
    """The numbers as the kernel writes them: ``0-2,8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def share(groups: Sequence[frozenset[int]], place: int, places: int) -> frozenset[int]:
    """The part of one among so many that divide the groups evenly, in order; the first get the groups that are over.

    Empty where there are fewer groups than places before it.
    """
    each, over = divmod(len(groups), places)
    start = place * each + min(place, over)
    return frozenset().union(*groups[start : start + each + (place < over)])
