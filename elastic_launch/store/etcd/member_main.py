"""Runs in the process of this host's embedded etcd member: prepares the member, starts etcd, and restarts it.

It is a process of its own because it asks the other members, and waits for them, for seconds. The agent sends it one
message, the fields of ``MemberPlan``. It sends the agent lines for the console. When the agent is gone, it kills etcd
(the data are safe, because etcd writes before it answers), removes temporary data, and ends. If this process is killed,
the kernel kills etcd.

How a member is started depends on what the others say:

- A majority of the others answers, and lists this host's member as one that has served. The member continues with its
  data. If the data are missing or broken, the old member is removed and a new one added, by etcd's member API: a member
  that has forgotten what it agreed to must not vote under its old name.
- A majority answers, and this host's member has never served. It begins without data.
- No majority answers, and there are data. etcd starts, and waits for the others.
- No majority answers, and there are no data. If another member knows that this one has served, only a majority of the
  others can replace it, and this process waits for a majority. Otherwise etcd starts as a member of a new cluster, as
  the others do.

Members of other clusters are ignored, such as those of another job with the same endpoints. Each member tells the id of
its cluster, which follows from endpoints and token.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from elastic_launch.host.child_main import dying_with_parent, receive_message, wait_for_agent
from elastic_launch.host.files import open_regular
from elastic_launch.store.etcd import leftovers
from elastic_launch.store.etcd.gateway import HttpReply, ask, is_healthy, tls_context
from elastic_launch.store.etcd.plan import MemberPlan, join_endpoint

if TYPE_CHECKING:
    from ssl import SSLContext

RESTARTS = 3
"""How often etcd is started again after it has ended."""
PORT_PATIENCE = 5.0
"""Seconds to wait for a port that is in use: a previous agent may just be ending."""
STUCK_AFTER = 10.0
"""Seconds after which a member is replaced if it does not serve although a majority of the others does."""
LATE_ANSWERS = 10
"""How often a member that accepts connections may be late with what it knows of this one; then it counts as dead."""
FIRST_REPORT, REPORT_INTERVAL = 5.0, 10.0
"""Seconds until the first line that says what is missing, and between such lines."""

_OPTIONS = (
    *("--log-level", "warn"),
    # Heartbeats leave no history, but the records of each round do.
    *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "10m"),
    *("--quota-backend-bytes", str(8 << 30), "--snapshot-count", "10000"),
)


class _MemberError(Exception):
    """The member cannot run. The message is one line, and continues "the etcd member ... of this host"."""


class MemberSupervisor:
    """Keeps etcd running."""

    def __init__(self, plan: MemberPlan, control: socket.socket) -> None:
        self._plan = plan
        self._control = control
        self._host, self._port = plan.endpoints[plan.own_index]
        self._others = [endpoint for index, endpoint in enumerate(plan.endpoints) if index != plan.own_index]
        self._peer_url = plan.peer_url(self._host, self._port)
        self._tls: SSLContext | None = None
        self._name = join_endpoint(self._host, self._port)
        self._tls_host = self._host if plan.tls else plan.address
        """What to call this host's member: its certificate has its name."""
        self._data = os.path.join(plan.folder, "data")
        self._replaced = f"{self._data}.replaced"
        """Data of a former member, until its successor serves."""
        self._lock: int | None = None
        """Descriptor of the lock on a temporary folder."""
        self._log_path = os.path.join(plan.folder, "log")
        self._log_size = 0
        """Where the log of the current etcd begins."""
        self._pid = 0
        self._process: int | None = None
        """A pidfd of etcd."""
        self._starting = threading.Lock()
        self._lister = plan.endpoints[plan.own_index]
        """The member that returned the list of members last."""
        self._data_failed = False
        """Whether etcd could not continue with its data."""
        self._started_at = self._reported_at = 0.0

    def run(self) -> NoReturn:
        """Start etcd, and restart it when it ends. Only ``end`` ends this."""
        for attempt in range(RESTARTS + 1):
            try:
                why = self._run_once()
            except _MemberError as error:
                why = str(error)
            except OSError as error:
                why = f"cannot run: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
            if attempt < RESTARTS:
                self._log(f"{why}: starting it again")
                time.sleep(1 << attempt)
        self._log(
            f"{why}; it was started {RESTARTS + 1} times: this agent continues without it, as long as a majority of "
            "the others serves"
        )
        while True:
            signal.pause()

    def end(self) -> NoReturn:
        """Kill etcd, remove temporary data, and end the process. Called in another thread than ``run``."""
        with self._starting:  # never released, so that nothing starts any more
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)
                _has_ended(self._process, None)
            if self._plan.temporary:
                shutil.rmtree(self._plan.folder, ignore_errors=True)
            os._exit(0)

    # --- one start of etcd

    def _run_once(self) -> str:
        """Start etcd, and wait for its end. Returns how it ended. Raises _MemberError, OSError."""
        self._started_at = self._reported_at = time.monotonic()
        self._make_folder()
        if self._plan.tls:
            self._tls = tls_context(*self._plan.tls)  # here, where an error is logged
        self._wait_for_ports()
        process = self._start(*self._prepare())
        alone_at = time.monotonic()
        while not is_healthy(self._tls_host, self._port, self._tls):
            if _has_ended(process, 0.1):
                self._data_failed = True
                return self._reap(process)
            if self._list_members() is None:
                alone_at = time.monotonic()
            elif time.monotonic() - alone_at > STUCK_AFTER:
                self._data_failed = True
                signal.pidfd_send_signal(process, signal.SIGKILL)
                self._reap(process)
                return f"does not serve, although a majority of the others does (see {self._log_path})"
            self._report_missing("waits for a majority of the members")
        self._data_failed = False
        shutil.rmtree(self._replaced, ignore_errors=True)
        return self._reap(process)

    def _make_folder(self) -> None:
        """Make the folder, and remove those of members that were killed. Raises OSError."""
        if self._plan.temporary and self._lock is None:
            leftovers.remove(os.path.dirname(self._plan.folder))
            self._lock = leftovers.make(self._plan.folder)
        os.makedirs(self._plan.folder, exist_ok=True)

    def _wait_for_ports(self) -> None:
        """Wait until both ports are free. Raises _MemberError if another program keeps one."""
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
                        where = join_endpoint(self._plan.address, port)
                        raise _MemberError(f"cannot listen on {where}: {error.strerror}") from None
                time.sleep(0.1)

    def _prepare(self) -> tuple[str, str]:
        """Prepare the data and the cluster's list of members for the start of etcd.

        Returns:
            etcd's options ``initial-cluster-state`` and ``initial-cluster``.
        """
        while True:
            has_data = os.path.isdir(os.path.join(self._data, "member"))
            if (members := self._list_members()) is None:
                if has_data or not self._has_served_before():
                    return "new", self._initial_cluster(
                        self._plan.peer_url(*endpoint) for endpoint in self._plan.endpoints
                    )
                self._report_missing(
                    f"has lost its data ({self._data}) and must be replaced, which takes a majority of the others: "
                    "wait for them, or start over with another --rdzv-id"
                )
            else:
                mine = next((member for member in members if self._peer_url in member["peerURLs"]), None)
                has_served = mine is not None and bool(mine.get("clientURLs"))
                if mine is None or has_served != has_data or self._data_failed:
                    members = self._replace(mine)
                if members:
                    return "existing", self._initial_cluster(
                        url for member in members for url in member["peerURLs"][:1]
                    )
                self._report_missing("must be replaced, which the others refuse at the moment")
            time.sleep(0.5)

    def _replace(self, mine: dict[str, Any] | None) -> Any:
        """Have the others replace this host's member by a new one. Returns the members; None if the others refuse.

        The data are removed when the new member serves: whoever answers may be no member at all.
        """
        if mine is not None:
            self._ask(self._lister, "/v3/cluster/member/remove", {"ID": mine["ID"]})
        added = self._ask(self._lister, "/v3/cluster/member/add", {"peerURLs": [self._peer_url]}).body
        members = read_members(added) or []
        if not any(self._peer_url in member["peerURLs"] for member in members):
            return None
        self._data_failed = False
        if os.path.exists(self._data):
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.rename(self._data, self._replaced)
        return members

    def _start(self, state: str, cluster: str) -> int:
        """Start etcd. Returns a pidfd."""
        plan = self._plan
        listen = [f"{plan.scheme}://{join_endpoint(plan.address, port)}" for port in (self._port, self._port + 1)]
        argv = dying_with_parent(
            [
                *(plan.binary, "--name", f"m{plan.own_index}", "--data-dir", self._data, *_OPTIONS),
                *("--listen-client-urls", listen[0], "--advertise-client-urls", f"{plan.scheme}://{self._name}"),
                *("--listen-peer-urls", listen[1], "--initial-advertise-peer-urls", self._peer_url),
                *("--initial-cluster", cluster, "--initial-cluster-state", state),
                *("--initial-cluster-token", plan.token),
                *_tls_options(plan),
            ]
        )
        with open(self._log_path, "ab", opener=open_regular) as log, self._starting:
            self._log_size = log.tell()
            actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
            self._pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigmask=())
            if self._process is not None:
                os.close(self._process)
            self._process = os.pidfd_open(self._pid)
            return self._process

    def _reap(self, process: int) -> str:
        """Wait for the end of etcd. Returns how it ended, with the last line of its log."""
        _has_ended(process, None)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        with open(self._log_path, "rb") as log:
            log.seek(self._log_size)
            why = last_words(log.read().decode(errors="replace"))
        return f"{how}: {why}" if why else how

    # --- the other members

    def _ask(self, where: tuple[str, int], path: str, body: dict[str, Any] | None = None) -> HttpReply:
        return ask(*where, path, body, self._tls)

    def _initial_cluster(self, urls: Iterable[str]) -> str:
        """etcd's option of this name, from the members' peer URLs."""
        names = {self._plan.peer_url(*endpoint): f"m{index}" for index, endpoint in enumerate(self._plan.endpoints)}
        return ",".join(f"{names.get(url, f'x{number}')}={url}" for number, url in enumerate(urls))

    def _list_members(self) -> Any:
        """The members, as known to a majority that does not include this host's; None if no majority answers."""
        for other in self._others:
            answer = self._ask(other, "/v3/cluster/member/list", {"linearizable": True}).body
            members = read_members(answer)
            if members and answer["header"].get("cluster_id") == str(self._plan.cluster_id):
                self._lister = other
                return members
        return None

    def _has_served_before(self) -> bool:
        """Whether another member, with or without a majority, knows that this host's has served."""
        for host, port in self._others:
            for _ in range(LATE_ANSWERS):
                reply = self._ask((host, port + 1), "/members")
                if not reply.is_late:
                    break
            members = read_members({"header": {}, "members": reply.body})
            for member in (members if reply.cluster_id == self._plan.cluster_id else None) or ():
                if self._peer_url in member["peerURLs"] and member["clientURLs"]:
                    return True
        return False

    # --- reports

    def _report_missing(self, what: str) -> None:
        """Log what the member waits for, and which other members answer, if that is due."""
        now = time.monotonic()
        if now - self._reported_at < (FIRST_REPORT if self._reported_at == self._started_at else REPORT_INTERVAL):
            return
        self._reported_at = now
        others = []
        for host, port in self._others:
            reply = self._ask((host, port + 1), "/version")
            state = f"does not answer ({reply.why})" if reply.body is None else "answers"
            others.append(f"{join_endpoint(host, port)} {state}")
        self._log(f"{what}; after {now - self._started_at:.0f} s: {', '.join(others)}")

    def _log(self, text: str) -> None:
        line = f"the etcd member {self._name} of this host {text}"
        with contextlib.suppress(OSError):
            self._control.send(line.encode(errors="replace")[:4000], socket.MSG_DONTWAIT)


def _tls_options(plan: MemberPlan) -> list[str]:
    """etcd's options for TLS: clients and members must show a certificate of the same authority."""
    if plan.tls is None:
        return []
    cacert, cert, key = plan.tls
    return [
        *("--cert-file", cert, "--key-file", key, "--trusted-ca-file", cacert, "--client-cert-auth"),
        *(
            "--peer-cert-file",
            cert,
            "--peer-key-file",
            key,
            "--peer-trusted-ca-file",
            cacert,
            "--peer-client-cert-auth",
        ),
        *(("--peer-client-cert-file", plan.peer_cert, "--peer-client-key-file", key) if plan.peer_cert else ()),
    ]


def read_members(answer: Any) -> list[dict[str, Any]] | None:
    """The members in an answer, each with ID, peerURLs and clientURLs; None if it is not what a member answers."""

    def urls(value: Any) -> list[str]:
        return [url for url in value if isinstance(url, str)] if isinstance(value, list) else []

    if not (isinstance(answer, dict) and isinstance(answer.get("header"), dict)):
        return None
    members = answer.get("members")
    if not (isinstance(members, list) and all(isinstance(member, dict) for member in members)):
        return None
    return [
        {"ID": str(it.get("ID")), "peerURLs": urls(it.get("peerURLs")), "clientURLs": urls(it.get("clientURLs"))}
        for it in members
    ]


def last_words(log: str) -> str:
    """Why etcd has ended, by its log: the last line, or the one before the stack of a crash."""
    lines = log.strip().splitlines() or [""]
    line = next((line for line in lines if line.startswith(("panic: ", "fatal error: "))), lines[-1])
    try:
        fields = json.loads(line)
        return f"{fields['msg']}: {fields['error']}" if fields.get("error") else str(fields["msg"])
    except (ValueError, KeyError, TypeError):
        return line


def _has_ended(process: int, seconds: float | None) -> bool:
    """Wait for the end of a process, by its pidfd; None waits forever. Returns whether it has ended."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def _end_with_agent(control: socket.socket, agent: int, member: MemberSupervisor) -> NoReturn:
    wait_for_agent(control, agent)
    member.end()


def main(control: socket.socket, agent: int) -> NoReturn:
    """Run the member.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
    """
    member = MemberSupervisor(MemberPlan(*receive_message(control)), control)
    threading.Thread(target=_end_with_agent, args=(control, agent, member), daemon=True).start()
    member.run()
