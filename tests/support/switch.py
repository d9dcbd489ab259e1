"""Hosts made of namespaces, and the switch between them: the program that ``tests.support.hosts`` starts. Needs root.

``switch.py COUNT HOSTS_FILE`` creates the hosts 1 to COUNT. Each has a name, an /etc/hosts with the names of all, and a
network namespace with one cable: a TUN device, its other end a descriptor of this process. Hosts reach one another and
nothing else. All packets pass through this process, which drops or delays them as ordered. The hosts' kernels do not
notice: no link goes down, and no error comes back.

The program answers each line of JSON on its standard input with one on its standard output. When its input ends, it
kills whatever runs on the hosts, and ends. The namespaces and cables end with it, because nothing else holds them.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time

NEWNS, NEWUTS, NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_BIND, MS_PRIVATE, MS_REC = 0x1000, 1 << 18, 0x4000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET = 1 << 16
"""Buffer size in bytes, above that of any packet."""

_libc = ctypes.CDLL(None, use_errno=True)


def address(number: int) -> str:
    """Return the address of a host. Several runs can use the same ones: namespaces separate them."""
    return f"10.77.0.{number}"


def name(number: int) -> str:
    """Return the name of a host."""
    return f"host-{number}"


class Host:
    """A host, and this process's end of its cable. Creating one moves this process into the host's namespaces."""

    def __init__(self, number: int, hosts_file: str) -> None:
        _call(_libc.unshare, NEWNET | NEWUTS | NEWNS)
        socket.sethostname(name(number))
        _call(_libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
        _call(_libc.mount, hosts_file.encode(), b"/etc/hosts", None, MS_BIND, None)
        self.cable = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.cable, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
        orders = f"link set lo up\naddress add {address(number)}/24 dev eth0\nlink set eth0 up\n"
        subprocess.run(["ip", "-batch", "-"], input=orders, text=True, check=True)
        self.spaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")]
        self._network = os.fstat(self.spaces[0]).st_ino

    def power_off(self) -> None:
        """Kill whatever runs on this host, until nothing does."""
        while pids := self.processes():
            for pid in pids:
                try:  # noqa: SIM105 - saves an import
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.001)

    def processes(self) -> list[int]:
        """Return the pids of the processes on this host. Zombies have left their namespaces."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{pid}/ns/net").st_ino == self._network:
                    found.append(int(pid))
            except OSError:
                continue
        return found


class Switch:
    """Carries packets between the hosts according to rules."""

    def __init__(self, hosts: dict[int, Host]) -> None:
        self.hosts = hosts
        self.rules: dict[tuple[int, int], float | None] = {}
        """By source and destination: seconds by which packets are delayed; None: they are dropped."""
        self.losses: dict[tuple[int, int], float] = {}
        """By source and destination: the part of the packets that is lost."""
        self._late: list[tuple[float, int, int, bytes]] = []
        """Heap of delayed packets: time of delivery, sequence number, destination, packet."""
        self._count = 0

    def run(self) -> None:
        """Carry packets and obey orders until the input ends."""
        by_cable = {host.cable: number for number, host in self.hosts.items()}
        poller = select.poll()
        for fd in (0, *by_cable):
            poller.register(fd, select.POLLIN)
        while True:
            wait = max(0.0, self._late[0][0] - time.monotonic()) * 1000 + 0.5 if self._late else None
            for fd, _ in poller.poll(wait):
                if fd:
                    self._carry_from(by_cable[fd])
                    continue
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                self._obey(*json.loads(line))
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(self._late)
                os.write(self.hosts[to].cable, packet)

    def _obey(self, order: str, *arguments: object) -> None:
        """Obey an order, and answer."""
        if order == "rules":
            self.rules = {(source, to): late for source, to, late in arguments}  # type: ignore[misc, has-type]
        elif order == "losses":
            self.losses = {(source, to): part for source, to, part in arguments}  # type: ignore[misc, has-type]
        elif order == "processes":
            print(json.dumps(self.hosts[int(str(arguments[0]))].processes()), flush=True)
            return
        elif order == "power_off":
            self.hosts[int(str(arguments[0]))].power_off()
        print("[]", flush=True)

    def _carry_from(self, source: int) -> None:
        """Deliver, delay or drop the packets that a host has sent."""
        while True:
            try:
                packet = os.read(self.hosts[source].cable, PACKET)
            except BlockingIOError:
                return
            to = packet[19]  # the last byte of the address
            if packet[0] >> 4 != 4 or to not in self.hosts:
                continue
            if (source, to) in self.losses and random.random() < self.losses[source, to]:
                continue
            late = self.rules.get((source, to), 0.0)
            if late == 0.0:
                os.write(self.hosts[to].cable, packet)
            elif late is not None:
                self._count += 1
                heapq.heappush(self._late, (time.monotonic() + late, self._count, to, packet))


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def main(count: int, hosts_file: str) -> None:
    """Create the hosts, and be the switch between them."""
    with open(hosts_file, "w", encoding="utf-8") as file:
        file.write("127.0.0.1 localhost\n")
        file.writelines(f"{address(number)} {name(number)}\n" for number in range(1, count + 1))
    hosts = {number: Host(number, hosts_file) for number in range(1, count + 1)}
    _call(_libc.unshare, NEWNET)  # leave that of the last host
    print(json.dumps({number: host.spaces for number, host in hosts.items()}), flush=True)
    try:
        Switch(hosts).run()
    finally:
        for host in hosts.values():
            host.power_off()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
