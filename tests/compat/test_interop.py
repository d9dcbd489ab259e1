"""Handlers, creators and LogsSpecs written against torch's classes work here, and ours work under torch's agent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = r'''
import json, sys, threading
from pathlib import Path
import torch.distributed as dist
from torch.distributed.elastic import rendezvous as torchs
from torch.distributed.elastic.agent.server import WorkerSpec as TorchSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent as TorchAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs as TorchLogs, Std as TorchStd
from torch.distributed.elastic.multiprocessing.api import LogsDest as TorchDest, LogsSpecs as TorchLogsSpecs
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler as torch_get_handler
from torch.distributed.launcher.api import LaunchConfig as TorchConfig, elastic_launch as torch_launch
import elastic_launch as ours
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.rendezvous.third_party_round import form_round

path, found = Path(sys.argv[1]), {}


def make_handler(api, store):
    class Handler(api.RendezvousHandler):
        def __init__(self, params): self.params = params
        def get_backend(self): return self.params.backend
        def get_run_id(self): return self.params.run_id
        def next_rendezvous(self):
            where = api.RendezvousStoreInfo.build(0, store, "127.0.0.1", 29999)
            return api.RendezvousInfo(store, 0, self.params.get_as_int("nodes", 1), where)
        def is_closed(self): return False
        def set_closed(self): pass
        def num_nodes_waiting(self): return 0
        def shutdown(self): return True
    return Handler


class PythonStore(dist.Store):
    """What programs write that have a store of their own."""

    def __init__(self):
        super().__init__()
        self.data, self.changed = {}, threading.Condition()
    def set(self, key, value):
        with self.changed:
            self.data[key] = value.encode() if isinstance(value, str) else value
            self.changed.notify_all()
    def get(self, key):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.data, 60)
            return self.data[key]
    def add(self, key, amount):
        with self.changed:
            self.data[key] = b"%d" % (int(self.data.get(key, b"0")) + amount)
            return int(self.data[key])
    def check(self, keys):
        return all(key in self.data for key in keys)


class MyLogs(TorchLogsSpecs):
    root_log_dir = str(path / "mine")
    def reify(self, envs):
        files = {rank: str(path / f"mine.{rank}") for rank in envs}
        return TorchDest(files, dict.fromkeys(envs, ""), {}, {}, dict.fromkeys(envs, "/dev/null"))


def run(agent):
    result = agent.run()
    return [result.state.name, sorted(result.return_values.items())]


ECHO = ("-c", "echo $RANK of $WORLD_SIZE")
handlers = {"torch's": make_handler(torchs, dist.HashStore()), "ours": make_handler(ours, PythonStore())}
# Here, with torch's classes; and with torch's default and another layout of files.
ours.rendezvous_handler_registry.register("theirs", handlers["torch's"])
theirs = ours.get_rendezvous_handler(torchs.RendezvousParameters("theirs", "h:1", "job", 1, 1, nodes="1"))
for name, logs in (("torch's", TorchLogs(str(path / "a"), TorchStd.OUT)), ("mine", MyLogs())):
    spec = ours.WorkerSpec("r", 2, theirs, entrypoint="sh", args=ECHO, max_restarts=0)
    found["ours on " + name] = run(ours.LocalElasticAgent(spec, logs))
config = dict(rdzv_backend="theirs", rdzv_endpoint="h:1", run_id="job", max_restarts=0)
made = ours.LaunchConfig(1, 1, 2, logs_specs=TorchLogs(str(path / "b"), redirects=TorchStd.ALL), **config)
found["our launch"] = sorted(ours.elastic_launch(made, "sh")(*ECHO).items())
# There, with ours.
torchs.rendezvous_handler_registry.register("ours", handlers["ours"])
handler = torch_get_handler(ours.RendezvousParameters("ours", "h:1", "job", 1, 1))
spec = TorchSpec("r", 2, handler, entrypoint="sh", args=ECHO, max_restarts=0, monitor_interval=0.1)
found["torch's on ours"] = run(TorchAgent(spec, ours.DefaultLogsSpecs(str(path / "c"), ours.Std.OUT)))
made = TorchConfig(1, 1, 2, logs_specs=ours.DefaultLogsSpecs(str(path / "d"), tee=ours.Std.OUT),
                   **{**config, "rdzv_backend": "ours"}, monitor_interval=0.1)
found["torch's launch"] = sorted(torch_launch(made, "sh")(*ECHO).items())
# Two nodes that meet twice in one store that torch's agent would accept, too.
store, formed = PythonStore(), []
for number in range(2):
    def join(rank):
        info = ours.RendezvousInfo(store, rank, 2, ours.RendezvousStoreInfo("h", 1))
        node = NodeRecord(f"node-{rank}", "h", 1, 1, "r", known_round=number - 1)
        made = form_round(info, node, False, None).assignment
        formed.append([made.restart_count, made.group_rank, made.world_size])
    nodes = [threading.Thread(target=join, args=(rank,)) for rank in (1, 0)]
    for node in nodes: node.start()
    for node in nodes: node.join()
found["rounds"] = sorted(formed)
print(json.dumps(found))
'''
BOTH = [[0, None], [1, None]]


def test_what_is_written_for_one_launcher_works_with_the_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "ours on torch's": ["SUCCEEDED", BOTH],
        "ours on mine": ["SUCCEEDED", BOTH],
        "our launch": BOTH,
        "torch's on ours": ["SUCCEEDED", BOTH],
        "torch's launch": BOTH,
        "rounds": [[0, 0, 2], [0, 1, 2], [1, 0, 2], [1, 1, 2]],
    }
    texts = sorted(file.read_text() for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size)
    assert texts == sorted(["0 of 2\n", "1 of 2\n"] * 5)
