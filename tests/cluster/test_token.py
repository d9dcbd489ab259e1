"""Jobs with a token: real agents and stores, and a stranger who reaches the store."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from elastic_launch.core.store_requests import Append, Set, Wait
from elastic_launch.host import token
from elastic_launch.store.client import StoreClient, connect
from elastic_launch.store.etcd.bridge import EtcdBridge
from tests.support.jobs import Job
from tests.support.nodes import Nodes, c10d, up
from tests.support.servers import shared_etcd
from tests.support.waiting import DEADLINE, wait_until

SAME = "give all nodes of a job the same --token-file, and another job another --rdzv-id"
RUN = """
import glob
seen = [*os.environ.values(), *sys.argv]
for fd in glob.glob('/proc/self/fd/*'):
    try: seen.append(os.readlink(fd))
    except OSError: pass
mark('token seen' if any('job.token' in it for it in seen) else 'up')
wait_for('go')
"""


@contextlib.contextmanager
def stranger(nodes: Nodes) -> Iterator[StoreClient]:
    """A connection of somebody who reaches the store."""
    with contextlib.ExitStack() as stack:
        if nodes.backend == "c10d":
            host, port = nodes.endpoint.rsplit(":", 1)
            client = connect((host, int(port)), socket.AF_INET, "store")
        else:
            bridge = EtcdBridge(nodes.endpoint, f"elastic-launch/{nodes.run_id}/", {}, os.environ)
            stack.callback(bridge.close)
            client = StoreClient(bridge.connect(), "store")
        stack.callback(client.close)
        yield client


def write(client: StoreClient, nodes: Nodes, **values: bytes) -> None:
    """Write keys of the first round; ``__`` stands for a slash."""
    items = tuple((nodes.key(f"0/{name.replace('__', '/')}"), value) for name, value in values.items())
    client.call(Set(items), DEADLINE)
    client.call(Wait(tuple(key for key, _ in items)), DEADLINE)  # they have arrived


def status(*words: str) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, "-m", "elastic_launch.operate", "status", "--json", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.mark.parametrize("backend", ["c10d", "etcd"])
def test_strangers_do_not_join_nor_blame_and_at_most_end_a_job_with_a_token(job: Job, backend: str) -> None:
    file = str(job.path / "job.token")
    token.write(file)
    nodes = c10d(job, "2") if backend == "c10d" else Nodes(job, "etcd", shared_etcd(), "2")
    script = job.script(RUN)
    with stranger(nodes) as client:
        first = nodes(0, "--token-file", file, script=script)
        client.call(Wait((nodes.key("0/node/1"),)), DEADLINE)
        record = {"node": "nobody", "host": "elsewhere", "pid": 1, "workers": 1, "role": "default"}
        write(client, nodes, node__2=json.dumps(record).encode(), ticket=b"2")
        second = nodes(1, script=script, ELASTIC_LAUNCH_TOKEN_FILE=file)
        wait_until(lambda: up(job, 0, 2))
        assert sorted(job.marks()) == ["0.0 up", "1.0 up"]
        tokenless = nodes(2, script=script)
        result = job.finish(tokenless)
        assert result.returncode == 69
        assert f"{nodes.key('round')} is signed with a token, and this node has none" in result.stderr
        where = "--rdzv-backend", nodes.backend, "--rdzv-endpoint", nodes.endpoint, "--rdzv-id", nodes.run_id
        left_out = f"ignored: {nodes.key('0/node/2')} is not signed with this node's token: {SAME}"
        refused = status(*where)
        assert refused.returncode == 69
        assert "is signed with a token, and this node has none" in refused.stderr
        for words in ((*where, "--token-file", file), (nodes.run_id,)):  # the agents here know the file
            seen = status(*words)
            assert seen.returncode == 0, seen.stderr
            assert seen.stderr.splitlines() == [f"elastic-job: {left_out}"]
            assert json.loads(seen.stdout)["world_size"] == 2
        os.remove(file)
        assert "only what the agents on this host know: --token-file=" in status(nodes.run_id).stderr
        client.call(Append(nodes.key("0/unfit"), b"{}\n"), DEADLINE)
        write(client, nodes, leader__1=b"7", monitor__1=b"7", status=b"{}", lost=b"{}", stalled=b"1", look=b"9")
        write(client, nodes, end=b'{"kind":"done","reason":"all workers succeeded"}')
    results = [job.finish(process) for process in (first, second)]
    assert left_out in results[0].stderr
    for result in results:
        assert result.returncode == 69
        assert f"{nodes.key('0/end')} is not signed with this node's token" in result.stderr
        assert "Traceback" not in result.stderr
