"""A job of three hosts that counts steps, and what can be seen of it."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from elastic_launch.store.etcd.server import etcd_binary
from tests.chaos import chaos_worker_path
from tests.chaos.faults import find
from tests.support.hosts import Host, Hosts, Program

INTERVAL, ATTEMPTS = 1, 6
DEADLINE = INTERVAL * ATTEMPTS
"""Keep-alive deadline in seconds."""
WORKERS = 2
"""Number of workers on each host."""
MAX_RESTARTS = 100_000
CONF = f"keep_alive_interval={INTERVAL},keep_alive_max_attempt={ATTEMPTS},last_call_timeout=60"
RETRY = 1000
"""Milliseconds after which TCP sends again what is not acknowledged, at the latest, on hosts of etcd's members. That is
what docs/rendezvous.md advises; Linux has it since 6.15. Else a member is away for longer than its link was cut."""
DISK = 16 << 20
"""Size in bytes of each host's file system for logs."""


class ViolationError(Exception):
    """Something happened that the documentation rules out, or did not happen that it promises."""


class Step(NamedTuple):
    """One step of one worker."""

    round: int
    rank: int
    number: int
    time: float
    host: str
    pid: int


def now() -> float:
    """Return the time on the clock of the workers' notes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ChaosJob:
    """A job on three hosts, and its store."""

    def __init__(self, path: Path, backend: str, chance: random.Random, *, gloo: bool = False) -> None:
        """Start it.

        Args:
            path: An empty directory for all its files.
            backend: ``c10d``, ``etcd`` (three members on hosts of their own) or ``embedded``.
            chance: What is drawn is drawn from it.
            gloo: Whether the workers exchange a tensor in each step.
        """
        self.path, self.backend, self.chance = path, backend, chance
        self.steps: list[Step] = []
        self._read = 0
        self._pids: dict[tuple[int, int], int] = {}
        (path / "tmp").mkdir()
        os.environ["TMPDIR"] = str(path / "tmp")
        self._env = {"CHAOS_FOLDER": str(path), "CHAOS_GLOO": str(int(gloo))}
        self.missing: dict[str, str] = {}
        """Kinds of faults that this machine cannot have, and why."""
        if not self._build_clock():
            self.missing["clock jumps"] = "it needs a C compiler, cc"
        self.hosts = Hosts(6 if backend == "etcd" else 3, path)
        self.agents: dict[int, Program] = {}
        try:
            for number in range(1, len(self.hosts) + 1) if backend != "c10d" else ():
                self.on(
                    self.hosts[number], "sh", "-c", f"echo {RETRY} > /proc/sys/net/ipv4/tcp_rto_max_ms", check=False
                )
            for number in (4, 5, 6) if backend == "etcd" else ():
                self._start_etcd(self.hosts[number])
            for host in self.members:
                self._make_disk(host)
                self.start(host)
        except BaseException:
            self.close()
            raise

    @property
    def members(self) -> list[Host]:
        """The hosts with workers."""
        return [self.hosts[number] for number in (1, 2, 3)]

    def others(self, host: Host) -> list[Host]:
        """Return all hosts but one."""
        return [self.hosts[n] for n in range(1, len(self.hosts) + 1) if n != host.number]

    def start(self, host: Host) -> None:
        """Start the agent on a host."""
        endpoint = {"c10d": "host-1:29400", "etcd": "host-4:2379,host-5:2379,host-6:2379"}
        words = ["--nnodes", "1:3", "--nproc-per-node", str(WORKERS), "--max-restarts", str(MAX_RESTARTS)]
        words += ["--crash-loop", "0", "--rdzv-id", "job", "--log-dir", str(self.logs(host)), "--redirects", "3"]
        words += ["--rdzv-backend", "c10d" if self.backend == "c10d" else "etcd"]
        words += ["--rdzv-endpoint", endpoint.get(self.backend, "host-1,host-2,host-3")]
        words += ["--rdzv-conf", CONF + (",embedded=true" if self.backend == "embedded" else "")]
        clock = {"LD_PRELOAD": str(self.path / "clock.so"), "CHAOS_CLOCK": str(self._clock(host))}
        env = self._env | (clock if "clock jumps" not in self.missing else {})
        self.agents[host.number] = host.start(*words, chaos_worker_path(), **env)

    def logs(self, host: Host) -> Path:
        """Return a host's log directory."""
        return self.path / f"logs-{host.number}"

    def on(self, host: Host, *command: str, check: bool = True) -> str:
        """Run a command on a host, with the host's mounts. Return its output."""
        done = subprocess.run([*host.enter, *command], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def find(self, host: Host, which: str) -> list[int]:
        """Return the process of a kind on a host, if there is one."""
        return find(host.pids(), which)

    def set_clock(self, host: Host, seconds: int) -> None:
        """Set a host's wall clock forward by some seconds; back, if they are negative."""
        with self._clock(host).open("r+b") as file:
            file.write(struct.pack("l", seconds))

    # --- what it does

    def look(self) -> None:
        """Read what the workers have noted since, and check it.

        Raises:
            ViolationError: Two rounds overlap, or a rank is there twice.
        """
        notes = self.path / "steps"
        if not notes.exists():
            return
        with notes.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1]
        self._read += len(lines)
        for line in lines.decode().splitlines():
            round_, rank, number, at, host, pid = line.split()
            step = Step(int(round_), int(rank), int(number), float(at), host, int(pid))
            self._check(step)
            self.steps.append(step)

    def _check(self, step: Step) -> None:
        if self.steps and step.round < self.steps[-1].round:
            first = next(other for other in self.steps if other.round > step.round)
            if step.time > first.time:
                raise ViolationError(
                    f"{step.host} made step {step.number} of round {step.round} {step.time - first.time:.3f} s after "
                    f"{first.host} had begun round {first.round}"
                )
        if self._pids.setdefault((step.round, step.rank), step.pid) != step.pid:
            raise ViolationError(f"rank {step.rank} of round {step.round} ran twice")

    @property
    def round(self) -> int:
        """The newest round; -1: there is none."""
        return max((step.round for step in self.steps[-100:]), default=-1)

    def trains(self, since: float, hosts: int = 3) -> bool:
        """Whether all workers of so many hosts have made a step in the newest round since a time."""
        ranks = {step.rank for step in self.steps[-400:] if step.time > since and step.round == self.round}
        return ranks == set(range(hosts * WORKERS))

    def has_all_members(self) -> bool:
        """Whether all members of an embedded etcd serve: after a cut, one is away for longer than its host's agent."""
        ask = "import sys; from elastic_launch.store.etcd import gateway; print(gateway.is_healthy(sys.argv[1], 2379))"
        return self.backend != "embedded" or all(
            self.on(host, sys.executable, "-c", ask, host.address) == "True\n" for host in self.members
        )

    def first_step_after(self, round_: int) -> Step | None:
        """Return the first step of the rounds after one."""
        return min((step for step in self.steps if step.round > round_), key=lambda step: step.time, default=None)

    def lost_steps(self, round_: int) -> int:
        """Return how many steps of rank 0 were done again after a round."""
        mine = [step for step in self.steps if step.rank == 0]
        done = max((step.number for step in mine if step.round <= round_), default=0)
        return max(0, done + 1 - next((step.number for step in mine if step.round > round_), done + 1))

    def wait(self, condition: Callable[[], bool], until: float, what: str) -> None:
        """Wait until a condition holds.

        Raises:
            ViolationError: It does not in time; or an agent has ended.
        """
        while not condition():
            for number, agent in self.agents.items():
                if agent.process.poll() not in (None, -9):
                    raise ViolationError(f"the agent of host-{number} has ended with {agent.process.returncode}")
            if now() > until:
                raise ViolationError(f"not in time: {what}")
            time.sleep(0.05)
            self.look()

    def restarts(self) -> int:
        """Return the number of restarts used, as the agents have logged it."""
        found = re.findall(rf"restart (\d+) of {MAX_RESTARTS}", self.said())
        return max(map(int, found), default=0)

    def said(self) -> str:
        """Return all that the agents have said."""
        return "".join(program.said() for host in self.members for program in host.programs)

    def finish(self) -> None:
        """End the job well, and check that nothing is left of it.

        Raises:
            ViolationError: It does not end well, or leaves something behind.
        """
        (self.path / "end").touch()
        for number, agent in self.agents.items():
            try:
                status = agent.process.wait(120)
            except subprocess.TimeoutExpired:
                raise ViolationError(f"the agent of host-{number} does not end") from None
            if status:
                raise ViolationError(f"the agent of host-{number} ends with {status}")
        self.look()
        end = now() + 10
        while left := [host.name for host in self.members if host.pids()]:
            if now() > end:
                raise ViolationError(f"processes are left on {left}")
            time.sleep(0.1)
        for host in self.members:
            if sockets := re.findall(r"@\S+", self.on(host, "cat", "/proc/net/unix")):
                raise ViolationError(f"abstract sockets are left on {host.name}: {sockets}")

    def close(self) -> None:
        """Kill everything, and remove the hosts."""
        for host in self.members:
            self.on(host, "fsfreeze", "--unfreeze", str(self.logs(host)), check=False)
        self.hosts.close()

    # --- how it is made

    def _start_etcd(self, host: Host) -> None:
        client, peer = f"http://{host.address}:2379", f"http://{host.address}:2380"
        cluster = ",".join(f"{m.name}=http://{m.address}:2380" for m in (self.hosts[n] for n in (4, 5, 6)))
        host.run(
            *(etcd_binary(), "--name", host.name, "--data-dir", "etcd", "--log-level", "error"),
            *("--initial-cluster", cluster, "--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--unsafe-no-fsync"),
        )

    def _make_disk(self, host: Host) -> None:
        """Give a host a small file system for its logs. Under embedded etcd the member's data are there as well."""
        folder = self.logs(host)
        folder.mkdir()
        self._clock(host).write_bytes(struct.pack("l", 0))
        if self.backend != "embedded":
            image = self.path / f"disk-{host.number}"
            with image.open("wb") as file:
                file.truncate(DISK)
            try:
                subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
                self.on(host, "mount", "-o", "loop", str(image), str(folder))
            except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                self.missing |= dict.fromkeys(("disk full", "disk stalled"), f"it needs a loop device: {error}")

    def _clock(self, host: Host) -> Path:
        return self.path / f"clock-{host.number}"

    def _build_clock(self) -> bool:
        source = Path(__file__).with_name("clock.c")
        if not (compiler := shutil.which("cc")):
            return False
        target = str(self.path / "clock.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", target, str(source), "-ldl"], check=True)
        return True
