"""The process of an embedded etcd member: folders of dead ones are removed, and nonsense from others does no harm."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch.store.etcd import gateway, leftovers, member_main
from elastic_launch.store.etcd.gateway import HttpReply, ask, is_healthy
from elastic_launch.store.etcd.member import EtcdMember
from elastic_launch.store.etcd.member_main import MemberSupervisor, last_words
from elastic_launch.store.etcd.plan import TEMPORARY, MemberPlan
from elastic_launch.store.etcd.server import etcd_binary
from tests.support.ports import free_port
from tests.support.waiting import wait_until


def folder(parent: Path, number: int) -> Path:
    return parent / f"{TEMPORARY}{number:012x}"


def test_only_folders_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    used, left, linked, fresh, old, foreign = (folder(tmp_path, number) for number in range(6))
    lock = leftovers.make(str(used))
    os.close(leftovers.make(str(left)))
    (left / "data").mkdir()
    elsewhere = tmp_path / "elsewhere"
    os.close(leftovers.make(str(elsewhere)))
    linked.symlink_to(elsewhere)
    fresh.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    os.close(leftovers.make(str(foreign)))
    if os.geteuid() == 0:
        os.chown(foreign, 12345, 12345)
    try:
        leftovers.remove(str(tmp_path))
        leftovers.remove(str(tmp_path / "nowhere"))
    finally:
        os.close(lock)
    names = {path.name for path in tmp_path.iterdir()}
    kept = [used, linked, elsewhere, fresh, *([foreign] if os.geteuid() == 0 else [])]
    assert names == {path.name for path in kept}
    assert (elsewhere / "lock").exists()


def test_the_data_of_a_member_that_was_killed_are_removed_by_the_next_one(tmp_path: Path) -> None:
    def member(number: int) -> tuple[EtcdMember, MemberPlan]:
        plan = MemberPlan(
            (("127.0.0.1", free_port(2)),), "job", 0, "127.0.0.1", etcd_binary(), str(folder(tmp_path, number)), True
        )
        return EtcdMember(plan, dict(os.environ)), plan

    killed, plan = member(1)
    with closing(killed):
        wait_until(lambda: is_healthy(*plan.endpoints[0]))
        processes = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes)
        killed._temporary = ""  # the agent is killed, too
    assert (folder(tmp_path, 1) / "data" / "member").is_dir()
    following, plan = member(2)
    with closing(following):
        wait_until(lambda: not folder(tmp_path, 1).exists())
        wait_until(lambda: is_healthy(*plan.endpoints[0]))
    assert list(tmp_path.iterdir()) == []


NONSENSE: list[Any] = [
    None, 1, "x", [], {}, {"header": 1}, {"header": {}}, {"header": {}, "members": 1}, {"header": {}, "members": [1]},
    {"header": {"cluster_id": []}, "members": []}, {"header": {"cluster_id": "x" * 5000}, "members": [{}]},
    {"members": [{"peerURLs": 5, "clientURLs": {}}]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_nonsense_of_other_members_is_ignored(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MemberPlan((("a", 1), ("b", 3), ("c", 5)), "job", 0, "127.0.0.1", "etcd", str(tmp_path))
    body = NONSENSE[number]
    bodies = [body]
    if isinstance(body, dict):  # the same from a member of this job's cluster
        header = {"cluster_id": str(plan.cluster_id)}
        bodies.append({**body, "header": header} if isinstance(body.get("header"), dict) else body)
    (tmp_path / "data" / "member").mkdir(parents=True)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        supervisor = MemberSupervisor(plan, ours)
        for each in bodies:
            monkeypatch.setattr(member_main, "ask", lambda *args, it=each: HttpReply(it, cluster_id=plan.cluster_id))
            assert not supervisor._has_served_before()
            found = supervisor._list_members()
            assert found is None or found[0]["peerURLs"] == []
            supervisor._replace({"ID": "1", "peerURLs": []}) if not found else None
            assert (tmp_path / "data" / "member").is_dir(), "data are removed only for a new member"


def test_a_member_that_is_slow_to_say_what_it_knows_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one that has lost its data would begin anew, and vote again on what it has agreed to."""
    plan = MemberPlan((("a", 1), ("b", 3)), "job", 0, "127.0.0.1", "etcd", str(tmp_path))
    known = [{"ID": "1", "peerURLs": [plan.peer_url("a", 1)], "clientURLs": ["http://a:1"]}]
    monkeypatch.setattr(gateway, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        late = gateway.ask("127.0.0.1", silent.getsockname()[1], "/members")
    assert late == HttpReply(None, "no answer", is_late=True)
    replies = [late, late, HttpReply(known, cluster_id=plan.cluster_id)]
    monkeypatch.setattr(member_main, "ask", lambda *args: replies.pop(0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert MemberSupervisor(plan, ours)._has_served_before()


@contextmanager
def serving(answer: bytes, *, slowly: bool = False) -> Iterator[int]:
    """A server that answers each request with some bytes, perhaps one by one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
                while slowly:
                    self.wfile.write(b" ")
                    stop.wait(0.05)
                self.wfile.write(answer)
            except OSError:
                pass  # the client has had enough

        def log_message(self, *args: Any) -> None:
            pass

    stop = threading.Event()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_answer_of_a_member_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (b" " * (gateway.MAX_ANSWER + 1), b"[" * 100_000, b"\xff", b"9" * 5000):
        with serving(answer) as port:
            wait_until(lambda port=port: ask("127.0.0.1", port, "/") == HttpReply(None, gateway.NOT_HTTP))  # type: ignore[misc]
    with serving(json.dumps({"health": "true"}).encode()) as port:
        wait_until(lambda: is_healthy("127.0.0.1", port))
    monkeypatch.setattr(gateway, "LONGEST", 0.3)
    with serving(b"", slowly=True) as port:
        assert ask("127.0.0.1", port, "/").body is None


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ('{"level":"warn","msg":"slow"}\n{"level":"fatal","msg":"no data","error":"gone"}\n', "no data: gone"),
        ("panic: out of range\n\ngoroutine 7 [running]:\nmain()\n\t/go/server.go:932 +0x1fd\n", "panic: out of range"),
    ],
)
def test_last_words_of_etcd_are_not_the_end_of_a_stack(log: str, words: str) -> None:
    assert last_words(log) == words
