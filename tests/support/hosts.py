"""Several hosts on this machine, with connections that can be cut; see ``tests.support.switch``. Needs root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from tests.support import switch
from tests.support.waiting import DEADLINE, wait_until


class Program:
    """A program that runs on a host. Its output goes to a file, which a test can read while the program runs."""

    def __init__(self, command: list[str], path: Path, env: dict[str, str]) -> None:
        self._path = path
        with path.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        """Return its output so far, stdout and stderr."""
        return self._path.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until its output contains a text."""
        wait_until(lambda: text in self.said() or self.process.poll() is not None, text)
        assert text in self.said(), self.said()

    def wait(self) -> int:
        """Wait for its end. Return its exit status."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._path.name} has not ended; it said:\n{self.said()}") from None

    def freeze(self) -> None:
        """Stop it with SIGSTOP. What it has started runs on."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume it with SIGCONT."""
        self.process.send_signal(signal.SIGCONT)


class Host:
    """One of the hosts. All share files and processes, but each has its own name, address and loopback interface."""

    def __init__(self, hosts: Hosts, number: int, spaces: list[str]) -> None:
        self.number = number
        self.name, self.address = switch.name(number), switch.address(number)
        self.programs: list[Program] = []
        self._hosts = hosts
        net, uts, mount = spaces
        self.enter = ["nsenter", f"--net={net}", f"--uts={uts}", f"--mount={mount}"]
        """The words that run a command on this host."""
        self._path = hosts.path / self.name
        """Working directory of the programs on this host."""
        self._path.mkdir()
        self._temp = Path(os.environ["TMPDIR"]) / self.name
        self._temp.mkdir()

    def run(self, *command: str, **env: str) -> Program:
        """Start a program on this host, with some changes to the environment."""
        # Entering the mount namespace resets the working directory.
        there = ["env", f"--chdir={self._path}", f"TMPDIR={self._temp}"]
        output = self._hosts.path / f"{self.name}.output.{len(self.programs)}"
        self.programs.append(
            Program([*self.enter, *there, *command], output, {**os.environ, "OMP_NUM_THREADS": "1", **env})
        )
        return self.programs[-1]

    def start(self, *args: str, **env: str) -> Program:
        """Start ``elastic-run`` on this host, with some changes to the environment."""
        return self.run(sys.executable, "-m", "elastic_launch", *args, **env)

    def pids(self) -> list[int]:
        """Return the processes on this host."""
        found: list[int] = self._hosts.order("processes", self.number)
        return found

    def power_off(self) -> None:
        """Kill everything on this host, without any packet to the others. Its temporary files are lost.

        The host is cut off until ``Hosts.heal``. Programs can be started on it again.
        """
        self._hosts.cut(self)
        self._hosts.order("power_off", self.number)
        self.wait()

    def wait(self) -> None:
        """Wait for the programs to end. Remove the temporary files of those that were killed."""
        for program in self.programs:
            program.process.wait(DEADLINE)
        if any(program.process.returncode == -signal.SIGKILL for program in self.programs):
            shutil.rmtree(self._temp)
            self._temp.mkdir()


class Hosts:
    """Hosts 1 to ``count``, as ``hosts[1]`` and so on. All cuts, losses and delays last until ``heal``."""

    def __init__(self, count: int, path: Path) -> None:
        self.path = path
        self._rules: dict[tuple[int, int], float | None] = {}
        assert os.geteuid() == 0, "these tests make network namespaces: run them as root"
        self._switch = subprocess.Popen(
            [sys.executable, "-I", "-S", switch.__file__, str(count), str(path / "hosts")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends this process
        )
        spaces: dict[str, list[int]] = self._answer()
        folder = f"/proc/{self._switch.pid}/fd"
        self._hosts = [Host(self, int(n), [f"{folder}/{fd}" for fd in fds]) for n, fds in spaces.items()]

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number - 1]

    def __len__(self) -> int:
        return len(self._hosts)

    def cut(self, host: Host, *others: Host) -> None:
        """Drop all packets between a host and some others, in both directions; without others: between it and all."""
        for other in others or self._hosts:
            self._rules[host.number, other.number] = self._rules[other.number, host.number] = None
        self._apply()

    def lose(self, source: Host, to: Host) -> None:
        """Drop the packets from one host to another, but not those in the other direction."""
        self._rules[source.number, to.number] = None
        self._apply()

    def delay(self, seconds: float) -> None:
        """Delay every packet by some seconds."""
        self._rules = {(a.number, b.number): seconds for a in self._hosts for b in self._hosts}
        self._apply()

    def impair(self, host: Host, delay: float = 0.0, loss: float = 0.0) -> None:
        """Delay the packets from and to a host by some seconds, and lose a part of them."""
        pairs = [pair for other in self._hosts for pair in ((host.number, other.number), (other.number, host.number))]
        self._rules |= dict.fromkeys(pairs, delay) if delay else {}
        self._apply()
        self.order("losses", *((source, to, loss) for source, to in pairs if loss))

    def heal(self) -> None:
        """Deliver all packets again, without delay."""
        self._rules = {}
        self._apply()
        self.order("losses")

    def _apply(self) -> None:
        self.order("rules", *((source, to, late) for (source, to), late in self._rules.items()))

    def order(self, *order: object) -> Any:
        """Send an order to the switch, wait until it is done, and return what it answers."""
        _pipe(self._switch.stdin).write(json.dumps(order) + "\n")
        _pipe(self._switch.stdin).flush()
        return self._answer()

    def _answer(self) -> Any:
        line = _pipe(self._switch.stdout).readline()
        assert line, "the switch has ended; see its standard error"
        return json.loads(line)

    def close(self) -> None:
        """Kill the programs on the hosts, and remove the hosts."""
        with self._switch:  # leaving the block waits for its end, and until then something may still write files
            _pipe(self._switch.stdin).close()
        for host in self._hosts:
            host.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
