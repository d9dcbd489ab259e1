"""Layer 2: the process that runs this host's member of an embedded etcd: prepares it, starts it, looks after it.

It runs as a program of its own, ``main(CONTROL, AGENT)``, a child of the agent: what it asks the other members, and
what it waits for, takes seconds. CONTROL is a socket of whole messages, AGENT a pidfd of the agent. To this process
goes one message, the marshalled fields of ``Plan``; from it come lines for people. When either descriptor says that the
agent is gone, etcd is killed (its data is safe: etcd writes before it answers), temporary data is removed, and the
process ends. Should this process be killed, etcd dies with it.

How a member is started depends on what the others say:

- A majority of others answers, and lists this host's member as one that has served: it goes on with its data. Without
  data, or where etcd cannot go on with them, the old member is removed and a new one added, by etcd's member API: a
  member that forgot what it once agreed to must not vote under its old name.
- A majority answers, and this host's member has never served: it begins empty.
- No majority answers. With data, etcd starts, and waits for the others. Without, it starts as one of a new cluster,
  which all make alike, unless another host's member knows that this one has served: then only a majority of the
  others can replace it, and this process waits for one, and says so.

Members of another cluster, such as another job's at the same endpoints, are no answer: each tells the id of its
cluster, which follows from endpoints and token.

Of elastic_launch it imports nothing but how it begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import marshal
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from elastic_launch.host.child_main import begin

RESTARTS = 3
"""How often an etcd that has ended is started again."""
PATIENCE = 1.0
"""Seconds for an answer of a member."""
PORT_PATIENCE = 5.0
"""Seconds until a port that is in use counts as taken: the agent before this one may just be ending."""
STUCK = 10.0
"""Seconds until a member that does not serve, while a majority of others does, is replaced."""
SAY_FIRST, SAY_LATER = 5.0, 10.0
"""Seconds until people are told what is missing, and between two such lines."""

_OPTIONS = (
    *("--log-level", "error"),
    # A sign of life of each node is a write: without this the history of a long job would reach etcd's quota.
    *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "10m"),
    *("--quota-backend-bytes", str(8 << 30), "--snapshot-count", "10000"),
)
_PROGRAM = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"  # PR_SET_PDEATHSIG, SIGKILL
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


class Plan(NamedTuple):
    """What the process is told."""

    endpoints: tuple[tuple[str, int], ...]
    """Host and client port of every member, the same everywhere and in the same order. The port for the other members
    is the one above."""
    token: str
    """Tells this job's cluster from others."""
    own: int = -1
    """Which endpoint is this host's."""
    address: str = ""
    """The IP address to listen on."""
    binary: str = ""
    folder: str = ""
    """Where the data lies, and etcd's own words."""
    temporary: bool = False
    """The folder is removed at the end."""

    @property
    def cluster(self) -> int:
        """The id that etcd gives a cluster which begins like this; it stays when members are replaced."""
        members = (_hashed(f"{peer_url(host, port)}{self.token}".encode()) for host, port in self.endpoints)
        return int.from_bytes(_hashed(b"".join(sorted(members))), "big")


class _Answer(NamedTuple):
    """What a member said to a request: None: nothing, for the reason in ``why``."""

    body: Any
    why: str
    cluster: int = 0
    """Of which cluster it says to be, on the port for members."""


class _FailedError(Exception):
    """The member cannot run. The message is one line."""


class MemberProcess:
    """Looks after the member from one start of etcd to the next."""

    def __init__(self, plan: Plan, control: socket.socket) -> None:
        self._plan = plan
        self._control = control
        self._host, self._port = plan.endpoints[plan.own]
        self._name = _joined(self._host, self._port)
        self._cluster = plan.cluster
        self._data = os.path.join(plan.folder, "data")
        self._log_path = os.path.join(plan.folder, "log")
        self._log_size = 0
        """Where the words of the etcd that runs begin."""
        self._pid = 0
        self._process: int | None = None
        """A pidfd of etcd."""
        self._starting = threading.Lock()
        self._teller = plan.endpoints[plan.own]
        """The member that told the list of members last."""
        self._is_doubtful = False
        """etcd could not go on with the data that there is."""
        self._began_at = self._said_at = 0.0

    def run(self) -> NoReturn:
        """Keep the member running; ``end`` is how this ends."""
        for attempt in range(RESTARTS + 1):
            try:
                why = self._live()
            except _FailedError as error:
                why = str(error)
            except OSError as error:
                why = f"cannot run: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
            if attempt < RESTARTS:
                self._log(f"the etcd member {self._name} of this host {why}: starting it again")
                time.sleep(1 << attempt)
        self._log(
            f"the etcd member {self._name} of this host {why}; it was started {RESTARTS + 1} times: this agent goes on "
            "without it, as long as a majority of the others serves"
        )
        while True:
            signal.pause()

    def end(self) -> NoReturn:
        """Leave nothing behind. Called from another thread than ``run``."""
        with self._starting:  # and never let go: nothing starts any more
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)
                _is_readable(self._process, None)
            if self._plan.temporary:
                shutil.rmtree(self._plan.folder, ignore_errors=True)
            os._exit(0)

    # --- one life of etcd

    def _live(self) -> str:
        """Start etcd, and return why it has ended. Raises _FailedError, OSError."""
        self._began_at = self._said_at = time.monotonic()
        os.makedirs(self._plan.folder, exist_ok=True)
        self._wait_for_ports()
        process = self._start(*self._prepare())
        alone_at = time.monotonic()
        while not self._serves():
            if _is_readable(process, 0.1):
                self._is_doubtful = True
                return self._why(process)
            if self._members() is None:
                alone_at = time.monotonic()
            elif time.monotonic() - alone_at > STUCK:
                self._is_doubtful = True
                signal.pidfd_send_signal(process, signal.SIGKILL)
                self._why(process)
                return f"does not serve, though a majority of the others does (see {self._log_path})"
            self._say_what_is_missing("waits for a majority of the members")
        self._is_doubtful = False
        _is_readable(process, None)
        return self._why(process)

    def _serves(self) -> bool:
        answer = _request(self._plan.address, self._port, "/health").body
        return isinstance(answer, dict) and answer.get("health") == "true"

    def _wait_for_ports(self) -> None:
        """Raises _FailedError where another program listens."""
        end = time.monotonic() + PORT_PATIENCE
        family = socket.AF_INET6 if ":" in self._plan.address else socket.AF_INET
        for port in (self._port, self._port + 1):
            while True:
                try:
                    with socket.socket(family) as sock:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        sock.bind((self._plan.address, port))
                        break
                except OSError as error:
                    if time.monotonic() >= end:
                        where = _joined(self._plan.address, port)
                        raise _FailedError(f"cannot listen on {where}: {error.strerror}") from None
                time.sleep(0.1)

    def _prepare(self) -> tuple[str, str]:
        """Have the data, and the others' list of members, such that etcd can start.

        Returns:
            etcd's ``initial-cluster-state`` and ``initial-cluster``.
        """
        while True:
            if (members := self._members()) is None:
                if self._has_data or not self._has_served_before():
                    return "new", self._everybody(self._peer_url(i) for i in range(len(self._plan.endpoints)))
                self._say_what_is_missing(
                    f"has lost its data ({self._data}) and must be replaced, which takes a majority of the others: "
                    "wait for them, or begin anew with another --rdzv-id"
                )
            else:
                mine = next((m for m in members if self._peer_url(self._plan.own) in m["peerURLs"]), None)
                has_served = mine is not None and bool(mine.get("clientURLs"))
                is_blank = not self._has_data and not self._is_doubtful
                if mine is None or has_served == is_blank or self._is_doubtful:
                    members = self._replace(mine)
                if members:
                    return "existing", self._everybody(url for member in members for url in member["peerURLs"][:1])
                self._say_what_is_missing("is to be replaced, which the others refuse at the moment")
            time.sleep(0.5)

    def _replace(self, mine: dict[str, Any] | None) -> Any:
        """Have the others take a new member in place of this host's. Returns the members; None: they refuse now."""
        shutil.rmtree(self._data, ignore_errors=True)
        if mine is not None:
            _request(*self._teller, "/v3/cluster/member/remove", {"ID": mine["ID"]})
        self._is_doubtful = False
        url = self._peer_url(self._plan.own)
        added = _request(*self._teller, "/v3/cluster/member/add", {"peerURLs": [url]}).body
        return added and added.get("members")

    @property
    def _has_data(self) -> bool:
        return os.path.isdir(os.path.join(self._data, "member"))

    def _start(self, state: str, cluster: str) -> int:
        """Start etcd. Returns a pidfd."""
        plan, own = self._plan, self._plan.own
        listen = [f"http://{_joined(plan.address, port)}" for port in (self._port, self._port + 1)]
        with open(self._log_path, "ab") as log, self._starting:
            self._log_size = log.tell()
            self._pid = os.posix_spawn(
                sys.executable,
                [
                    *(sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())),
                    *(plan.binary, "--name", _name(own), "--data-dir", self._data, *_OPTIONS),
                    *("--listen-client-urls", listen[0], "--advertise-client-urls", f"http://{self._name}"),
                    *("--listen-peer-urls", listen[1], "--initial-advertise-peer-urls", self._peer_url(own)),
                    *("--initial-cluster", cluster, "--initial-cluster-state", state),
                    *("--initial-cluster-token", plan.token),
                ],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), 2)],
                setsigmask=(),
            )
            if self._process is not None:
                os.close(self._process)
            self._process = os.pidfd_open(self._pid)
            return self._process

    def _why(self, process: int) -> str:
        """Wait for the end of etcd. Returns what it says about it."""
        _is_readable(process, None)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        with open(self._log_path, "rb") as log:
            log.seek(self._log_size)
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"{how}: {_readable(last)}" if last else how

    # --- the others

    def _peer_url(self, index: int) -> str:
        return peer_url(*self._plan.endpoints[index])

    def _everybody(self, urls: Any) -> str:
        """Members as ``initial-cluster`` has them."""
        names = {self._peer_url(i): _name(i) for i in range(len(self._plan.endpoints))}
        return ",".join(f"{names.get(url, f'x{number}')}={url}" for number, url in enumerate(urls))

    def _others(self) -> list[tuple[str, int]]:
        return [endpoint for i, endpoint in enumerate(self._plan.endpoints) if i != self._plan.own]

    def _members(self) -> Any:
        """The list of members, as a majority without this one has it; None: there is no majority that answers."""
        for other in self._others():
            answer = _request(*other, "/v3/cluster/member/list", {"linearizable": True}).body
            if answer and int(answer["header"]["cluster_id"]) == self._cluster:
                self._teller = other
                return answer["members"]
        return None

    def _has_served_before(self) -> bool:
        """Whether another member, also one without a majority, knows that this host's has served."""
        for host, port in self._others():
            answer = _request(host, port + 1, "/members")
            for member in answer.body if answer.cluster == self._cluster else ():
                if self._peer_url(self._plan.own) in member["peerURLs"] and member.get("clientURLs"):
                    return True
        return False

    # --- words

    def _say_what_is_missing(self, what: str) -> None:
        now = time.monotonic()
        if now - self._said_at < (SAY_FIRST if self._said_at == self._began_at else SAY_LATER):
            return
        self._said_at = now
        told = []
        for host, port in self._others():
            answer = _request(host, port + 1, "/version")
            told.append(f"{_joined(host, port)} {f'does not ({answer.why})' if answer.body is None else 'answers'}")
        waited = f"after {now - self._began_at:.0f} s"
        self._log(f"the etcd member {self._name} of this host {what}; {waited}: {', '.join(told)}")

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._control.send(text.encode(errors="replace")[:4000], socket.MSG_DONTWAIT)


def peer_url(host: str, port: int) -> str:
    """Where other members reach the one with this endpoint."""
    return f"http://{_joined(host, port + 1)}"


def _hashed(data: bytes) -> bytes:
    """An id, as etcd makes them."""
    return hashlib.sha1(data, usedforsecurity=False).digest()[:8]


def _name(index: int) -> str:
    return f"m{index}"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _request(host: str, port: int, path: str, body: dict[str, Any] | None = None) -> _Answer:
    """Ask a member by HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            return _Answer(None, f"status {response.status}")
        return _Answer(json.loads(data), "", int(response.headers.get("X-Etcd-Cluster-ID", "0"), 16))
    except TimeoutError:
        return _Answer(None, "no answer")
    except OSError as error:
        return _Answer(None, (error.strerror or str(error)).lower())
    except (http.client.HTTPException, ValueError):
        return _Answer(None, "it is no etcd")
    finally:
        connection.close()


def _readable(line: str) -> str:
    """A line of etcd's log without what is for machines."""
    try:
        fields = json.loads(line)
        return f"{fields['msg']}: {fields['error']}" if fields.get("error") else str(fields["msg"])
    except (ValueError, KeyError, TypeError):
        return line


def _is_readable(descriptor: int, seconds: float | None) -> bool:
    """Wait for a descriptor; of a process: for its end."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def _end_with(agent: int, control: socket.socket, member: MemberProcess) -> NoReturn:
    """Wait until the agent is gone, or has closed its end; then leave."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(agent, select.POLLIN)
    poller.poll()
    member.end()


def main(control_fd: int, agent: int) -> NoReturn:
    """Run the member; both are inherited descriptors."""
    control = begin(control_fd, agent, "elastic-member")
    member = MemberProcess(Plan(*marshal.loads(control.recv(1 << 20))), control)
    threading.Thread(target=_end_with, args=(agent, control, member), daemon=True).start()
    member.run()
