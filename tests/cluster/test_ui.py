"""``elastic-job ui``: its server as other programs see it, and its page in a real browser, with real jobs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from elastic_launch.operate.ui.server import MAX_CLIENTS
from tests.support.browser import Browser, browser
from tests.support.control import elastic_job, start_elastic_job
from tests.support.jobs import TWO, Job
from tests.support.leaks import wait_for_children
from tests.support.nodes import Nodes, c10d
from tests.support.servers import shared_etcd
from tests.support.waiting import DEADLINE, wait_until

STEPS = "from elastic_launch import worker\ndef step(n):\n    worker.progress(n)\n    time.sleep(0.02)\n"
TRAINS = STEPS + "for n in range(10**6): step(n)\n"


class Page:
    """A running ``elastic-job ui``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout
        found = re.search(r"(http://[^/]+)/(?:#token=(\S+))?", process.stdout.readline())
        assert found, process.stderr
        self.url, self.token = found[1], found[2] or ""
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """Return the status and the body of a reply that ends."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.url}{path}", headers=named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def wait_for(self, run_id: str) -> None:
        """Wait until a job can be asked."""
        wait_until(lambda: self.ask(f"/api/files?job={run_id}")[0] == 200)

    def events(self, query: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the events of a stream as they come."""
        with urllib.request.urlopen(f"{self.url}/api/events?{query}", timeout=DEADLINE) as reply:
            kind = ""
            for line in reply:
                name, _, value = line.decode().strip().partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def send(self, data: bytes) -> bytes:
        """Send bytes as they are, and return everything that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            found = b""
            while block := sock.recv(1 << 16):
                found += block
            return found


@contextmanager
def page(job: Job, *words: str) -> Iterator[Page]:
    """Serve the page on a free port."""
    process = start_elastic_job(job, "ui", "--port", "0", *words)
    try:
        yield Page(process)
        assert process.poll() is None, "the server goes on, whatever comes"
    finally:
        process.send_signal(signal.SIGINT)
        done = job.finish(process)
    assert (done.returncode, done.stderr) == (130, "")


def start(job: Job, run_id: str, *args: str, script: str = TRAINS) -> subprocess.Popen[str]:
    return job.start("--rdzv-id", run_id, *args, job.script(script, f"{run_id}.py"))


def stop(job: Job, process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    job.finish(process)


# ---- Who is served


def test_only_requests_that_mean_this_host_are_answered(job: Job) -> None:
    with page(job) as served:
        for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}", "localhost:9999", "[::1]:80"):
            assert served.ask("/", Host=host)[0] == 200
        for host in (f"evil.example:{served.port}", "localhost.evil.example", "[", ""):
            assert served.ask("/", Host=host)[0] == 403
            assert served.ask("/api/events", Host=host)[0] == 403


def test_pages_of_other_sites_get_no_data(job: Job) -> None:
    with page(job) as served:
        for headers in (
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": "http://a.example"},
        ):
            for method, path in (("GET", "/api/files?job=x"), ("POST", "/api/stacks?job=x")):
                assert served.ask(path, method, **headers) == (403, '{"error": "another site\'s page may not ask"}')
        with urllib.request.urlopen(served.url, timeout=DEADLINE) as reply:
            assert "default-src 'none'; script-src 'self'" in reply.headers["Content-Security-Policy"]
            assert reply.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_users_of_the_host_get_no_data(job: Job) -> None:
    with page(job) as served:
        code = (
            "import urllib.request, urllib.error\n"
            f"try: urllib.request.urlopen('{served.url}/api/files?job=x')\n"
            "except urllib.error.HTTPError as error: print(error.code, error.read().decode())\n"
        )
        command = [sys.executable, "-I", "-S", "-c", code]
        own = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert own.stdout == '404 {"error": "x: no such job of yours runs on this host"}\n'
        other = subprocess.run(["setpriv", "--reuid=65534", *command], capture_output=True, text=True, timeout=DEADLINE)
        assert other.stdout == '403 {"error": "the jobs are another user\'s"}\n', other.stderr


@pytest.mark.parametrize(
    ("bind", "address"), [("::1", "::1"), ("localhost", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1")]
)
def test_the_user_of_a_connection_is_found_with_each_kind_of_address(job: Job, bind: str, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with page(job, "--bind", bind) as served, contextlib.closing(socket.socket(family)) as sock:
        sock.connect((address, served.port))
        sock.sendall(b"GET /api/files?job=x HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.0 404")


def test_another_address_needs_the_token_that_is_printed(job: Job) -> None:
    with page(job, "--bind", "0.0.0.0") as served:
        assert len(served.token) == 32
        served.url = f"http://127.0.0.1:{served.port}"
        assert served.ask("/")[0] == 200
        assert served.ask("/api/files?job=x") == (401, '{"error": "the token is missing or wrong"}')
        assert served.ask("/api/files?job=x", Authorization="Bearer wrong")[0] == 401
        assert served.ask("/api/files?job=x", Authorization=f"Bearer {served.token}")[0] == 404


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--port", "65536"], 2, "--port=65536: must be from 0 to 65535"),
        (["--bind", "no-such-host.invalid"], 2, "--bind=no-such-host.invalid: no such address"),
        (["--bind", "192.0.2.1"], 69, "--bind=192.0.2.1, port 8470: "),
        (["--token", "a b"], 2, "--token: must be ASCII characters without spaces"),
    ],
)
def test_a_wrong_address_is_one_line(words: list[str], status: int, text: str) -> None:
    done = elastic_job("ui", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert text in done.stderr


def test_a_port_that_is_taken_is_an_error_if_it_was_asked_for(job: Job) -> None:
    with page(job) as served:
        done = elastic_job("ui", "--port", str(served.port))
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr == (
            f"elastic-job: --bind=127.0.0.1, port {served.port}: Address already in use; choose another\n"
        )


# ---- Bad luck


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"\x16\x03\x01\x00\xff\x01\r\n\r\n", b""),
        (b"GET /\r\n\r\n", b""),
        (b"GET http://[ HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 400"),
        (b"GET /../../etc/passwd HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 404"),
        (b"BREW /api/events HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 501"),
        (b"GET /%s HTTP/1.0\r\n\r\n" % (b"a" * 70000), b"HTTP/1.0 414"),
        (b"GET /api/files HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 400"),
        (b"GET /api/events?job=x&rank=%s HTTP/1.0\r\nHost: localhost\r\n\r\n" % (b"9" * 5000), b"HTTP/1.0 400"),
        (b"GET /api/events?rank=-1 HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 400"),
        (b"GET /api/stacks?job=x HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 404"),
        (b"POST /api/stacks?job=x HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.0 404"),
    ],
)
def test_garbage_gets_an_error(job: Job, data: bytes, reply: bytes) -> None:
    with page(job) as served:
        assert served.send(data).startswith(reply)
        assert served.ask("/")[0] == 200


def test_clients_that_do_not_read_do_not_keep_others_waiting(job: Job) -> None:
    process = start(job, "watched")
    with page(job) as served:
        served.wait_for("watched")
        sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(MAX_CLIENTS // 2)]
        for sock in sockets:
            sock.sendall(b"GET /api/events?job=watched HTTP/1.0\r\nHost: localhost\r\n\r\n")
        _, seen = next(served.events("job=watched"))
        assert seen["job"] == "watched"
        agent = psutil.Process(process.pid)
        wait_until(lambda: len(agent.net_connections("unix")) > 1)
        assert len(agent.net_connections("unix")) < 8, "all watch through one connection to the agent"
        for sock in sockets:
            sock.close()
        assert next(served.events("job=watched"))[1]["job"] == "watched"
    stop(job, process)


def test_no_more_clients_are_served_than_there_are_places_for(job: Job) -> None:
    with page(job) as served:
        sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(MAX_CLIENTS)]
        wait_until(lambda: served.ask("/")[0] == 503)
        for sock in sockets:
            sock.close()
        wait_until(lambda: served.ask("/")[0] == 200)


def test_a_job_that_ends_is_told_to_the_end_and_its_output_can_still_be_read(job: Job) -> None:
    files = ("-r", "3", "--log-dir", str(job.path / "logs"))
    script = (
        "print('\\x1b[31mone\\ntwo', flush=True)\nmark('up')\nwait_for('fail')\n"
        "print('three', flush=True)\nsys.exit(7)\n"
    )
    process = start(job, "watched", *files, script=script)
    job.wait_for("0.0 up")
    with page(job) as served:
        assert json.loads(served.ask("/api/files?job=watched")[1])["files"] == [[0, 0, "stderr"], [0, 0, "stdout"]]
        text, views = "", []
        for kind, data in served.events("job=watched&rank=0&stream=stdout"):
            if kind == "log":
                text += data["text"]
                job.mark("fail")
            else:
                views.append(data)
        assert text == "\x1b[31mone\ntwo\nthree\n"
        assert (views[0]["state"], views[0]["is_over"]) == ("running", False)
        assert (views[-1]["state"], views[-1]["is_over"], views[-1]["is_lost"]) == ("failed", True, False)
        assert job.finish(process).returncode == 7
        again = dict(served.events("job=watched&rank=0&stream=stderr"))
        assert again["job"]["state"] == "failed"
        assert again["log"]["title"] == "round 0, rank 0, stderr"
        _, listed = next(served.events())
        assert (listed["jobs"], [it["job"] for it in listed["ended"]]) == ([], ["watched"])
        assert served.ask("/api/stacks?job=watched", "POST")[0] == 404


def test_a_job_whose_agent_is_killed_is_lost(job: Job) -> None:
    process = start(job, "watched")
    with page(job) as served:
        served.wait_for("watched")
        views = []
        for _, view in served.events("job=watched"):
            views.append(view)
            process.kill()
        view = views[-1]
        assert (view["state"], view["is_over"], view["is_lost"]) == ("running", True, True)
        process.wait()
        assert [kind for kind, _ in served.events("job=never-ran")] == ["error"]
    wait_for_children()


def test_an_agent_that_is_stopped_is_told(job: Job) -> None:
    process = start(job, "watched")
    with page(job) as served:
        served.wait_for("watched")
        remarks = []
        for _, view in served.events("job=watched"):
            if view["remark"] not in remarks:
                remarks.append(view["remark"])
                process.send_signal(signal.SIGCONT if view["remark"] else signal.SIGSTOP)
            elif len(remarks) == 2 and not view["remark"]:
                break
        assert remarks == ["", f"The agent (pid {process.pid}) does not answer: it is stopped, or gets no CPU time."]
    stop(job, process)


@pytest.mark.parametrize("backend", ["c10d", "etcd"])
def test_a_job_of_several_nodes_is_seen_whole_through_a_restart(job: Job, backend: str) -> None:
    nodes = Nodes(job, "etcd", shared_etcd(), "2") if backend == "etcd" else c10d(job, "2")
    script = job.script(TRAINS)
    processes = [nodes(number, script=script) for number in range(2)]
    with page(job) as served:
        served.wait_for(nodes.run_id)
        seen: dict[str, Any] = {}
        events = served.events(f"job={nodes.run_id}")
        wanted = 0
        for _, view in events:
            seen |= view["nodes"]
            is_whole = view["node_total"] == len(seen) == 2 and all(node["workers"] for node in seen.values())
            if is_whole and view["state"] == "running" and view["round"] == wanted:
                if wanted:
                    break
                wanted = 1
                elastic_job("restart", nodes.run_id)
        # What follows a restart is told as it happens, which takes longer on a busy machine.
        pairs = itertools.pairwise(it["now"] for _, it in events)
        begin = next(now for before, now in pairs if now - before > 0.9)
        later = list(itertools.takewhile(lambda it: it[1]["now"] < begin + 3, events))
        assert len(later) < 15, "an agent is asked once per second, however many there are"
        assert (view["source"], view["world_size"], view["remark"]) == ("store", 2, "")
        assert sorted(node["pid"] for node in seen.values()) == sorted(process.pid for process in processes)
        assert view["rounds"][0]["reason"].startswith("restart requested on ")
    elastic_job("stop", nodes.run_id)
    for process in processes:
        job.finish(process)


# ---- In a browser


@pytest.fixture
def window() -> Iterator[Browser]:
    assert shutil.which("chromedriver"), "install chromium and chromium-driver: the page is tested in it"
    with tempfile.TemporaryDirectory() as profile, browser(profile) as opened:
        yield opened


def test_the_page_shows_a_job_its_failure_the_next_round_and_output(job: Job, window: Browser) -> None:
    files = ("-r", "3", "--log-dir", str(job.path / "logs"))
    script = (
        STEPS + "print('<b>hello</b> from', rank, flush=True)\n"
        "for n in range(10**6):\n    step(n)\n"
        "    if restart == 0 and rank == 1 and os.path.exists('fail'): raise ValueError('<i>nan</i>')\n"
        "    if restart == 1 and os.path.exists('end'): break\n"
    )
    with page(job) as served:
        window.open(served.url)
        window.wait_for("#no-jobs", "No job of yours")
        process = start(job, "demo", *TWO, "--max-restarts", "2", *files, script=script)
        window.wait_for("#jobs", r"demo\s+running")
        window.click("#jobs a")
        window.wait_for('[data-rank="1"]', r"1\s+step \d")
        assert window.run("return document.querySelectorAll('.tile').length") == 2
        window.wait_for("#counts", "1 node running\\s+2 ranks running")
        (job.path / "fail").touch()
        window.wait_for("#subtitle", "round 1")
        cause = r"rank 1 failed \(exit code 1, ValueError: <i>nan</i>\)"
        window.wait_for("#rounds", cause)
        window.wait_for("#notices", f"Last trouble: {cause}")
        window.wait_for("#facts", r"Restarts used\s+1 of 2")
        window.wait_for("#said", f"Round 1, because {cause}")
        assert re.search(cause, window.run("return document.querySelector('#line svg').getAttribute('aria-label')"))
        window.click('[data-rank="1"]')
        window.wait_for("#rank", r"Rank 1 on .*\s+State\s+running")
        window.click("#rank-log")
        window.wait_for("#log-note", "round 1, rank 1, stdout")
        window.wait_for("#log", "^<b>hello</b> from 1$")
        (job.path / "end").touch()
        window.wait_for("#notices", "The job has ended: succeeded")
        assert job.finish(process).returncode == 0
        window.wait_for("#live", "ended")
        assert window.trouble() == []
        assert all(url.startswith(served.url) for url in window.requested()), "nothing comes from elsewhere"


def test_the_page_tells_a_hang_and_shows_the_stacks(job: Job, window: Browser) -> None:
    script = (
        STEPS + "def stuck():\n    while True: time.sleep(0.1)  # here\n"
        "for n in range(20): step(n)\nif rank == 1: stuck()\nwait()\n"
    )
    process = start(job, "hangs", *TWO, "--hang-timeout", "2", script=script)
    with page(job) as served:
        served.wait_for("hangs")
        window.open(f"{served.url}/#/job/hangs")
        window.wait_for("#state", "stalled")
        window.wait_for("#notices", r"No rank has made a step for \d+ s")
        window.wait_for("#said", "The job makes no progress")
        assert "rank 1, stalled" in window.run("return document.querySelector('[data-rank=\"1\"]').ariaLabel")
        window.click("#stacks-take")
        window.wait_for("#stacks", "stuck")
        window.wait_for("#stacks-note", "Taken at")
        stop(job, process)
        window.wait_for("#notices", "The job has ended: stopped")
        assert window.trouble() == []


def test_the_page_works_on_a_phone_with_a_token_by_keyboard_and_with_a_thousand_nodes(
    job: Job, window: Browser
) -> None:
    process = start(job, "phone", *TWO)
    with page(job, "--token", "a+secret/") as served:
        window.emulate(width=390, height=844, dark=True)
        window.open(f"{served.url}/#/job/phone")
        window.wait_for("#ask", "The token that")
        window.press("#token", "wrong\ue007")
        window.wait_for("#problem", "wrong")
        window.press("#token", "a+secret/\ue007")
        window.wait_for('[data-rank="0"]', r"0\s+step")
        assert window.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        window.run("document.querySelector('[data-rank=\"0\"]').focus()")
        window.press('[data-rank="0"]', "\ue014")  # right
        assert window.run("return document.activeElement.dataset.rank") == "1"
        window.press('[data-rank="1"]', "\ue007")
        window.wait_for("#rank-title", "Rank 1 on ")
        assert window.run("return document.querySelectorAll('.tile[tabindex=\"0\"]').length") == 1
        nodes = {
            place: {
                **{"group_rank": place, "host": f"host-{place}", "pid": place, "role": None, "workers": None},
                **{"state": "unresponsive" if place == 700 else "running", "heartbeat": 0},
                "ranks": [8 * place, 8 * place + 7],
            }
            for place in range(1000)
        }
        window.run(
            "stream.abort(); stream = null; receiveJob({...shown.view, ...arguments[0]})",
            {"nodes": nodes, "node_total": 1000},
        )
        assert "999 nodes running" in window.text("#counts")
        assert window.run("return document.querySelectorAll('#nodes tr').length") == 50
        assert "host-700" in window.text("#nodes"), "those that stand out come first"
        window.press("#find", "4321")
        assert window.text("#nodes").startswith("host-540\n")
        assert [it for it in window.trouble() if "401" not in it] == []
        window.open(f"{served.url}/#token=a%2Bsecret/")
        window.wait_for("#jobs", "phone")
        assert "secret" not in window.run("return location.href")
    stop(job, process)
