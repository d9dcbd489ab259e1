"""Rendezvous handlers as users write them, and an agent on one of them as a program (``agent_main``)."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from elastic_launch import DefaultLogsSpecs, LaunchError, LocalElasticAgent, RunResult, SignalException, WorkerSpec
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.errors import RendezvousClosedError
from elastic_launch.host.console import write
from elastic_launch.rendezvous.handler import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from elastic_launch.rendezvous.third_party import ThirdPartyRendezvous
from elastic_launch.rendezvous.third_party_tasks import HandlerTasks
from tests.support.waiting import DEADLINE, wait_until


class MemoryStore:
    """Of torch's ``Store`` what is needed, for one process."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.data[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.data, DEADLINE)
            return self.data[key]

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self.data[key] = b"%d" % (int(self.data.get(key, b"0")) + amount)
            return int(self.data[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)

    def delete_key(self, key: str) -> bool:
        with self._changed:
            return self.data.pop(key, None) is not None


class OneNode(RendezvousHandler):
    """Nobody to wait for."""

    use_agent_store = False

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.waiting: list[int | BaseException] = []
        self.info: Callable[[], Any] = lambda: RendezvousInfo(
            MemoryStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 29999)
        )

    def get_backend(self) -> str:
        return "one-node"

    def get_run_id(self) -> str:
        return "job-1"

    def next_rendezvous(self) -> RendezvousInfo:
        self.threads.add(threading.current_thread().name)
        self.calls.append("next")
        if self.error:
            raise self.error
        return self.info()  # type: ignore[no-any-return]

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        self.calls.append("close")

    def num_nodes_waiting(self) -> int:
        answer = self.waiting.pop(0) if self.waiting else 0
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def shutdown(self) -> bool:
        self.calls.append("shutdown")
        return True


class Files:
    """A directory that nodes share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[dict[str, Any]]:
        """A mapping that one node at a time may read and change."""
        with open(self.path / "lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.path / "state.json"
            state = json.loads(file.read_text()) if file.exists() else {}
            before = json.dumps(state)
            yield state
            if json.dumps(state) != before:
                file.write_text(json.dumps(state))


class FilesStore:
    """Of torch's ``Store`` what is needed; the same for every round, although it cannot delete keys."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def set(self, key: str, value: str) -> None:
        with self.files.locked() as state:
            state[key] = value

    def get(self, key: str) -> bytes:
        wait_until(lambda: self.check([key]), key)
        with self.files.locked() as state:
            return str(state[key]).encode()

    def add(self, key: str, amount: int) -> int:
        with self.files.locked() as state:
            state[key] = state.get(key, 0) + amount
            return int(state[key])

    def check(self, keys: list[str]) -> bool:
        with self.files.locked() as state:
            return all(key in state for key in keys)


class InFiles:
    """A handler that is no subclass of anything. A round begins when as many nodes wait as the file ``wanted`` says."""

    def __init__(self, path: Path) -> None:
        self.files = Files(path)
        self.me = f"node {os.getpid()}"
        self.round = 0

    def get_run_id(self) -> str:
        return "files"

    def next_rendezvous(self) -> RendezvousInfo:
        with self.files.locked() as state:
            state["waiting"] = [*state.get("waiting", []), self.me]
        while True:
            with self.files.locked() as state:
                if state.get("closed"):
                    raise RendezvousClosedError("closed")
                if len(state["waiting"]) == int((self.files.path / "wanted").read_text()):
                    state["members"], state["waiting"] = state["waiting"], []
                    state["round"] = state.get("round", 0) + 1
                members = state.get("members", [])
                if state.get("round", 0) > self.round and self.me in members:
                    self.round = state["round"]
                    store, where = FilesStore(self.files), RendezvousStoreInfo("files.example", 4000 + self.round)
                    return RendezvousInfo(cast(Any, store), members.index(self.me), len(members), where)
            time.sleep(0.01)

    def num_nodes_waiting(self) -> int:
        with self.files.locked() as state:
            return len(state["waiting"])

    def shutdown(self) -> bool:
        with self.files.locked() as state:
            state["closed"] = True
        return True


def third_party(
    handler: Any, workers: int = 1, local_addr: str | None = None, log: Callable[[str], None] = print, **settings: Any
) -> ThirdPartyRendezvous:
    """Return the rendezvous on a handler that is polled often, so that a test takes little time."""
    node = NodeRecord(os.urandom(8).hex(), os.uname().nodename, os.getpid(), workers, "trainer")
    return ThirdPartyRendezvous(HandlerTasks(handler, node, local_addr, log, **{"poll_interval": 0.05, **settings}))


def run_agent(handler: Any, command: str, *, workers: int = 1, restarts: int = 0, **settings: Any) -> RunResult:
    """Run a shell command on a handler."""
    rendezvous = third_party(handler, workers, **settings)
    spec = WorkerSpec("trainer", workers, rendezvous, entrypoint="sh", args=("-c", command), max_restarts=restarts)
    return LocalElasticAgent(spec, DefaultLogsSpecs(), log=settings.get("log", print)).run()


def agent_main(kind: str, path: str, restarts: str, workers: str, command: str) -> None:
    """The program of an agent: the exit status is the cause's, and standard error has the words."""
    status = 0
    try:
        handler = Stuck() if kind == "stuck" else torch_handler(path) if kind == "torch" else InFiles(Path(path))
        result = run_agent(
            handler, command, workers=int(workers), restarts=int(restarts), log=lambda text: write(f"{text}\n", 1)
        )
        if result.is_failed():
            write(result.report + "\n", 1)
            status = next(iter(result.failures.values())).status()
    except (SignalException, LaunchError) as error:
        write(f"{error}\n", 1)
        status = error.exit_code
    os._exit(status)


class Stuck(OneNode):
    """A handler whose nodes never meet."""

    def next_rendezvous(self) -> RendezvousInfo:
        write("stuck\n", 1)
        threading.Event().wait()
        raise AssertionError


def torch_handler(endpoint: str) -> Any:
    """torch's own c10d rendezvous, as its registry makes it."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters as TorchParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler as torch_get_handler

    return torch_get_handler(
        TorchParameters("c10d", endpoint, "torch-job", 2, 2, local_addr="127.0.0.1", last_call_timeout=1)
    )
