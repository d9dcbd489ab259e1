"""What can go wrong with a job of three hosts, and what the documentation says of it: a table."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import psutil

from tests.support.hosts import Host

if TYPE_CHECKING:
    from tests.chaos.job import ChaosJob

BACKENDS = ("c10d", "etcd", "embedded")
LASTS = 8.0
"""How long a fault lasts that is longer than the keep-alive deadline, in seconds."""
BLINK = 1.0
"""How long one lasts that nobody may mind."""


class Outcome(Enum):
    """What follows a fault. In the end all hosts train again."""

    NOTHING = "the round goes on"
    RESTART = "all workers start again, and one restart is used up"
    WITHOUT = "the others go on without the host after the deadline, and it comes back; no restart is used up"
    STORE = "the workers stop until the store is back; no restart is used up"


class Fault(NamedTuple):
    """A kind of fault."""

    strike: Callable[[ChaosJob, Host], None]
    heal: Callable[[ChaosJob, Host], None]
    lasts: float
    """Seconds after which it is healed."""
    outcomes: dict[str, Outcome | None]
    """By backend; None: the fault does not exist there. ``c10d host``: on the host of the c10d store."""
    words: str = ""
    """What an agent logs of it, as a regular expression: ``HOST`` stands for the host's name."""


def each(outcome: Outcome, *, store: Outcome | None = None) -> dict[str, Outcome | None]:
    """Return the same outcome for all backends, except on the host of the c10d store."""
    return {**dict.fromkeys(BACKENDS, outcome), "c10d host": store or outcome}


def send(signum: int, which: str) -> Callable[[ChaosJob, Host], None]:
    """Return what sends a signal to a process on a host."""

    def strike(job: ChaosJob, host: Host) -> None:
        for pid in job.find(host, which):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    return strike


def on_all(signum: int) -> Callable[[ChaosJob, Host], None]:
    """Return what sends a signal to everything on a host, to the workers first."""

    def strike(job: ChaosJob, host: Host) -> None:
        for pid in sorted(host.pids(), reverse=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    return strike


def nothing(job: ChaosJob, host: Host) -> None:
    """Heal what needs no healing."""


def connect(job: ChaosJob, host: Host) -> None:
    job.hosts.heal()


def start(job: ChaosJob, host: Host) -> None:
    """Start the agent again, on a host that the others reach."""
    job.hosts.heal()
    job.start(host)


def cut(job: ChaosJob, host: Host) -> None:
    job.hosts.cut(host)


def deafen(job: ChaosJob, host: Host) -> None:
    """Lose what the others send to a host, but not what it sends."""
    for other in job.others(host):
        job.hosts.lose(other, host)


def power_off(job: ChaosJob, host: Host) -> None:
    host.power_off()


def slow_down(job: ChaosJob, host: Host) -> None:
    job.hosts.impair(host, delay=0.1)


def lose_some(job: ChaosJob, host: Host) -> None:
    job.hosts.impair(host, loss=0.05)


def fill_disk(job: ChaosJob, host: Host) -> None:
    job.on(host, "dd", "if=/dev/zero", f"of={job.logs(host)}/fill", "bs=64k", check=False)


def empty_disk(job: ChaosJob, host: Host) -> None:
    job.on(host, "rm", "-f", f"{job.logs(host)}/fill")


def stall_disk(job: ChaosJob, host: Host) -> None:
    job.on(host, "fsfreeze", "--freeze", str(job.logs(host)))


def thaw_disk(job: ChaosJob, host: Host) -> None:
    job.on(host, "fsfreeze", "--unfreeze", str(job.logs(host)))


def jump(job: ChaosJob, host: Host) -> None:
    """Set the host's wall clock an hour forward, or back."""
    job.set_clock(host, 3600 if job.chance.random() < 0.5 else -3600)


KILL, STOP, CONT = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
LOST = r"no heartbeat from [^:]*HOST"
AWAY = rf"{LOST}|HOST was cut off|HOST (left|was)|lost HOST|the store"

FAULTS = {
    "worker killed": Fault(
        send(KILL, "worker"), nothing, 0, each(Outcome.RESTART), r"rank \d on HOST failed \(killed by SIGKILL"
    ),
    "worker stopped for a second": Fault(send(STOP, "worker"), send(CONT, "worker"), BLINK, each(Outcome.NOTHING)),
    "keeper killed": Fault(
        send(KILL, "keeper"), nothing, 0, each(Outcome.RESTART), r"the keeper process .* was killed"
    ),
    "keeper stopped for a second": Fault(send(STOP, "keeper"), send(CONT, "keeper"), BLINK, each(Outcome.NOTHING)),
    "agent killed": Fault(send(KILL, "agent"), start, LASTS, each(Outcome.WITHOUT, store=Outcome.STORE), AWAY),
    "agent stopped": Fault(send(STOP, "agent"), send(CONT, "agent"), LASTS, each(Outcome.WITHOUT), AWAY),
    "host off": Fault(power_off, start, LASTS, each(Outcome.WITHOUT, store=Outcome.STORE), AWAY),
    "host frozen": Fault(on_all(STOP), on_all(CONT), LASTS, each(Outcome.WITHOUT, store=Outcome.STORE), AWAY),
    "link cut": Fault(cut, connect, LASTS, each(Outcome.WITHOUT), AWAY),
    "link cut for a second": Fault(cut, connect, BLINK, each(Outcome.NOTHING)),
    "link cut one way": Fault(deafen, connect, LASTS, each(Outcome.WITHOUT), AWAY),
    "link slow": Fault(slow_down, connect, LASTS, each(Outcome.NOTHING)),
    "link loses 5 %": Fault(lose_some, connect, LASTS, each(Outcome.NOTHING)),
    "member of etcd killed": Fault(
        send(KILL, "member"), nothing, 0, {"c10d": None, "etcd": None, "embedded": Outcome.NOTHING}
    ),
    "disk full": Fault(fill_disk, empty_disk, 2, {"c10d": Outcome.NOTHING, "etcd": Outcome.NOTHING, "embedded": None}),
    "disk stalled": Fault(
        stall_disk, thaw_disk, LASTS, {"c10d": Outcome.WITHOUT, "etcd": Outcome.WITHOUT, "embedded": None}, AWAY
    ),
    "clock jumps": Fault(jump, nothing, 0, each(Outcome.NOTHING)),
}


def expected(fault: Fault, backend: str, host: Host) -> Outcome | None:
    """Return what follows a fault on a host."""
    place = "c10d host" if backend == "c10d" and host.number == 1 and "c10d host" in fault.outcomes else backend
    return fault.outcomes[place]


def find(pids: list[int], which: str) -> list[int]:
    """Return the processes of a kind among those of a host; of the workers, the first."""
    found: list[int] = []
    for pid in sorted(pids):
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(pid).cmdline()
            kind = (
                "keeper" if words[:1] == ["elastic-keeper"] or any("keeper_main" in word for word in words)
                else "worker" if any(word.endswith("chaos_worker.py") for word in words) and "--nnodes" not in words
                else "agent" if "elastic_launch" in words and words[0] != "env"
                else "member" if "--initial-cluster" in words and "-c" not in words
                else ""
            )  # fmt: skip
            found += [pid] if kind == which else []
    return found[:1]
