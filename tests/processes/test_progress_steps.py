"""How workers tell their progress: real workers, whose memory is read as the agent reads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elastic_launch import worker
from elastic_launch.core.progress.memory import WorkerProgress
from elastic_launch.workers import BOOTSTRAP
from tests.support.functions import tell, train
from tests.support.jobs import METHODS, Job
from tests.support.progress import python, script, started

TRAIN = """
import torch
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([parameter], lr=0.1)
parameter.grad = torch.ones(2)
for _ in range(2000):
    optimizer.step()
"""

# ---- Steps of torch's optimizers


@pytest.mark.torch
@pytest.mark.parametrize("how", ["module", "preload"])
def test_all_steps_of_a_program_are_counted(tmp_path: Path, how: str) -> None:
    (tmp_path / "program.py").write_text(TRAIN)
    command = python("module", "program") if how == "module" else python("script", str(tmp_path / "program.py"))
    before = time.monotonic()
    preload = ["torch"] if how == "preload" else []
    with started(
        *command, environ={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}, preload=preload
    ) as group:
        (told,) = group.finish()
    assert (told.steps, told.marks, told.iterations) == (2000, 0, 2000)
    assert before < told.first < told.last < time.monotonic()
    assert 0 < told.second <= told.longest < told.last - told.first


@pytest.mark.torch
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_all_steps_of_a_function_are_counted(method: str) -> None:
    with started(train, 2000, start_method=method) as group:
        assert group.finish()[0].steps == 2000


STEPS = """
import os, sys, torch
memory = int(os.environ.get("ELASTIC_LAUNCH_PROGRESS_FD", "0").split(",")[0])
before = 0
def counted():
    "The iterations since the last call."
    global before
    if not memory: return 0
    now = int.from_bytes(os.pread(memory, 8, 64), sys.byteorder)
    before, new = now, now - before
    return new
def optimizer(kind=torch.optim.SGD, **options):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return kind([parameter], lr=0.1, **options)
"""
LOOPS = {
    "two that take turns": ("a, b = optimizer(), optimizer()", "a.step(); b.step()"),
    "one of two more often": ("a, b = optimizer(), optimizer(torch.optim.Adam)", "a.step(); i % 5 or b.step()"),
    "with a closure": ("a = optimizer(torch.optim.LBFGS)", "a.step(lambda: torch.ones(1, requires_grad=True).sum())"),
    "one per parameter, in the backward pass": (
        "model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))\n"
        "each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}\n"
        "for p in each:\n"
        "    p.register_post_accumulate_grad_hook(lambda p: each[p].step())\n",
        "model(torch.ones(3)).sum().backward()",
    ),
    "a subclass": (
        "class Mine(torch.optim.Optimizer):\n"
        "    def __init__(self, parameters, lr):\n"
        "        super().__init__(parameters, {})\n"
        "    def step(self):\n"
        "        pass\n"
        "a = optimizer(Mine)",
        "a.step()",
    ),
}


@pytest.mark.torch
def test_an_iteration_is_counted_once_however_many_optimizers_step(tmp_path: Path) -> None:
    text = STEPS
    for name, (setup, step) in LOOPS.items():
        text += f"{setup}\nfor i in range(100):\n    {step}\nn = counted()\nassert n in (99, 100), (n, {name!r})\n"
    with started(*script(tmp_path, text)) as group:
        group.finish()


@pytest.mark.torch
def test_children_count_nothing(tmp_path: Path) -> None:
    text = STEPS + (
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, index): a = optimizer(); a.step(); a.step(); return index\n"
        "if __name__ == '__main__':\n"
        "    assert len(list(torch.utils.data.DataLoader(Data(), 2, num_workers=1)))\n"
        "    assert counted() == 0\n"
        "    optimizer().step()\n"
    )
    with started(*script(tmp_path, text)) as group:
        assert group.finish()[0].steps == 1


COMPILED = (
    STEPS.partition("def optimizer")[0]
    + """
import json, logging, torch._dynamo
from torch._dynamo.utils import counters
logging.disable(logging.WARNING)
class Mine(torch.optim.Optimizer):
    "Can be compiled as a whole. torch's own break the graph in step() by themselves."
    def __init__(self, parameters):
        super().__init__(parameters, {})
    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad)
def new(kind):
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return kind(model.parameters())
def watched(kind, fullgraph, backend="eager", optimizers=1):
    torch._dynamo.reset()
    counters.clear()
    all = [new(kind) for _ in range(optimizers)]
    @torch.compile(fullgraph=fullgraph, backend=backend)
    def step():
        for optimizer in all:
            optimizer.step()
    step()
    counted()
    for _ in range(20):
        step()
    counts.append(counted())
    explained = torch._dynamo.explain(step)()
    breaks, recompiles = sum(counters["graph_break"].values()), sum(counters["recompiles"].values())
    return dict(counters["stats"]), breaks, recompiles, explained.graph_count, explained.graph_break_count
counts = []
found = [
    watched(Mine, True),
    watched(Mine, True, "aot_eager"),
    watched(Mine, True, "eager", 2),
    watched(torch.optim.SGD, False),
    watched(torch.optim.Adam, False, "eager", 2),
]
for kind in (Mine, torch.optim.SGD):
    pair = [new(kind), new(kind)]
    one = torch.compile(lambda optimizer: optimizer.step(), backend="eager")
    counted()
    for _ in range(20):
        one(pair[0])
        one(pair[1])
    counts.append(counted())
print(json.dumps([found, counts]))
"""
)


@pytest.mark.torch
def test_steps_in_compiled_code_are_counted_and_leave_the_graph_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script(tmp_path, COMPILED)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as plain, started(*command) as group:
        group.finish()
        graphs, counts = json.loads(capfd.readouterr().out)
        assert plain.stdout
        assert json.load(plain.stdout) == [graphs, [0] * 7]
    assert [breaks for _, breaks, *_ in graphs[:3]] == [0, 0, 0]
    assert [recompiles for _, _, recompiles, *_ in graphs] == [0] * 5
    assert counts[:5] == [20] * 5
    # The first step of all may belong to an iteration of the optimizers before.
    assert [count in (19, 20) for count in counts[5:]] == [True, True]


# ---- How the program's import of torch is noticed; with a torch that has next to nothing


OPTIMIZER = """
_global_optimizer_pre_hooks, _global_optimizer_post_hooks = [], []
register_optimizer_step_pre_hook = _global_optimizer_pre_hooks.append
register_optimizer_step_post_hook = _global_optimizer_post_hooks.append
class Optimizer:
    def update(self): pass
    def step(self):
        for hook in _global_optimizer_pre_hooks:
            hook(self, (), {})
        self.update()
        for hook in _global_optimizer_post_hooks:
            hook(self, (), {})
"""
LITTLE_TORCH = {
    "torch/__init__.py": "from torch import optim, compiler\n",
    "torch/compiler.py": "def is_dynamo_compiling(): return False\n",
    "torch/optim/__init__.py": "from torch.optim import optimizer\nfrom torch.optim import sgd\n",
    "torch/optim/optimizer.py": OPTIMIZER,
    "torch/optim/sgd.py": "from torch.optim.optimizer import Optimizer\n",
}


@pytest.fixture
def little_torch(tmp_path: Path) -> dict[str, str]:
    """The variable with which a worker finds it."""
    for name, text in LITTLE_TORCH.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


VIEW = """
import sys
before = list(sys.meta_path)
import torch.optim.optimizer, torch.optim.sgd
print(len(before), [finder for finder in sys.meta_path if "bootstrap" in str(type(finder).__module__) + repr(finder)])
for name, module in sorted(sys.modules.items()):
    if name.startswith("torch"):
        values = vars(module)
        print(name, sorted(values), type(module.__loader__), vars(module.__loader__), vars(module.__spec__))
"""


@pytest.mark.quick
def test_torch_is_imported_as_without_the_launcher(
    tmp_path: Path, little_torch: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    command = script(tmp_path / "work", VIEW + "torch.optim.optimizer.Optimizer().step()\n")
    with started(*command, environ=little_torch) as group:
        assert group.finish()[0].steps == 1
    env = {**os.environ, **little_torch}
    plain_run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    ours, plain = (re.sub("0x[0-9a-f]+", "", text).splitlines() for text in (capfd.readouterr().out, plain_run.stdout))
    assert ours[1:] == plain[1:]
    assert int(ours[0].split()[0]) == int(plain[0].split()[0]) + 1
    assert ours[0].split()[1] == "[]", "the finder has left"


@pytest.mark.quick
@pytest.mark.parametrize(
    "optimizer", ["", OPTIMIZER.replace("register_optimizer_step_post_hook", "other")], ids=["empty", "without hooks"]
)
def test_another_torch_is_left_alone(tmp_path: Path, little_torch: dict[str, str], optimizer: str) -> None:
    (tmp_path / "torch/optim/optimizer.py").write_text(optimizer)
    (tmp_path / "torch/optim/sgd.py").write_text("")
    with started(*script(tmp_path / "work", "import torch, zipfile, decimal\n"), environ=little_torch) as group:
        assert group.finish() == [WorkerProgress()]


@pytest.mark.quick
def test_a_program_without_torch_finds_loaded_what_plain_python_has_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import sys\nprint(list(sys.modules), sorted(sys.path_importer_cache))\nimport zipfile\n"
    command = script(tmp_path, text)
    with started(*command) as group:
        assert group.finish() == [WorkerProgress()]
        with pytest.raises(BlockingIOError):  # nothing was reported, so the agent was not woken
            os.eventfd_read(group.memory.fileno())
    plain = subprocess.run([sys.executable, command[-1]], capture_output=True, text=True, check=True)
    assert capfd.readouterr().out == plain.stdout


@pytest.mark.quick
def test_the_agent_is_woken_once_when_steps_are_going_to_be_counted(
    tmp_path: Path, little_torch: dict[str, str]
) -> None:
    text = "import torch\na = torch.optim.optimizer.Optimizer()\nfor _ in range(50): a.step()\n"
    with started(*script(tmp_path / "work", text), count=2, environ=little_torch) as group:
        assert [told.steps for told in group.finish()] == [50, 50]
        assert os.eventfd_read(group.memory.fileno()) == 2


@pytest.mark.quick
def test_nothing_is_counted_where_it_is_turned_off(job: Job, little_torch: dict[str, str]) -> None:
    text = (
        "import torch\nassert not torch.optim.optimizer._global_optimizer_post_hooks\n"
        "from elastic_launch import worker\nworker.progress(1)\nassert not worker.should_stop()\n"
        "assert not os.environ['ELASTIC_LAUNCH_PROGRESS_FD']\n"
        "files = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')[:-1]]\n"
        "assert not [file for file in files if 'progress' in file or 'eventfd' in file], files\n"
    )
    # Also below a launcher that has a memory for its worker.
    done = job.run(job.script(text), **little_torch, ELASTIC_LAUNCH_PROGRESS="0", ELASTIC_LAUNCH_PROGRESS_FD="200,201")
    assert done.returncode == 0, done.stderr


# ---- Leases


FENCED = {
    "a step": (
        "import torch\nclass Mine(torch.optim.optimizer.Optimizer):\n    def update(self): act()\ngo_on = Mine().step\n"
    ),
    "progress": "from elastic_launch import worker\ndef go_on(): worker.progress(); act()\n",
    "check": "from elastic_launch import worker\ndef go_on(): worker.check(); act()\n",
}
"""How a program does something that must not happen after the end of its lease."""


@pytest.mark.quick
@pytest.mark.parametrize("what", FENCED)
def test_nothing_is_done_after_the_end_of_a_lease(tmp_path: Path, little_torch: dict[str, str], what: str) -> None:
    acts, begin, end = (tmp_path / name for name in ("acts", "begin", "end"))
    text = (
        "import os, time\n"
        f"acts = open({str(acts)!r}, 'ab', buffering=0)\n"
        "def act(): acts.write(b'.')\n"
        f"{FENCED[what]}"
        f"while not os.path.exists({str(begin)!r}): time.sleep(0.002)\n"
        f"os.unlink({str(begin)!r})\n"
        f"while not os.path.exists({str(end)!r}): go_on()\n"
    )
    with started(*script(tmp_path / "work", text), environ=little_torch) as group:
        group.wait_until(lambda: acts.exists() and group.pids)
        worker = psutil.Process(group.pids[0])

        def wait_until_it_looks_again_and_again() -> None:
            times = worker.num_ctx_switches().voluntary + 5
            group.wait_until(lambda: worker.num_ctx_switches().voluntary >= times)

        group.memory.set_lease(0.0)  # the keeper knows of no lease, and so does not kill the worker
        begin.touch()
        group.wait_until(lambda: not begin.exists())
        wait_until_it_looks_again_and_again()
        assert acts.stat().st_size == 0
        group.memory.set_lease(time.monotonic() + 1000)
        group.wait_until(lambda: acts.stat().st_size > 10)
        group.memory.set_lease(0.0)
        wait_until_it_looks_again_and_again()
        done = acts.stat().st_size
        wait_until_it_looks_again_and_again()
        assert acts.stat().st_size == done
        group.memory.set_lease(float("inf"))
        group.wait_until(lambda: acts.stat().st_size > done)
        end.touch()
        group.finish()


# ---- elastic_launch.worker


TELL = """
from elastic_launch import worker
for step in range(100, 150):
    worker.progress(step)
"""


@pytest.mark.quick
@pytest.mark.parametrize("how", ["script", "preload", "program"])
def test_a_program_tells_its_iterations(tmp_path: Path, how: str) -> None:
    command = script(tmp_path, TELL)
    if how == "program":
        command = (sys.executable, command[-1])
    with started(*command, count=2, preload=["elastic_launch.worker"] if how == "preload" else []) as group:
        for told in group.finish():
            assert (told.steps, told.marks, told.iterations) == (0, 50, 50)
            assert (told.first_number, told.number) == (100, 149)
        assert os.eventfd_read(group.memory.fileno()) == 2


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_a_function_tells_its_iterations_and_its_children_do_not(method: str) -> None:
    with started(tell, 50, count=2, start_method=method) as group:
        for told in group.finish():
            assert (told.marks, told.first_number, told.number) == (51, 0, 1000)


@pytest.mark.quick
def test_phases_nest(tmp_path: Path) -> None:
    events = tmp_path / "events"
    text = (
        "import os, time\n"
        "from elastic_launch import worker\n"
        f"events = {str(events)!r}\n"
        "def wait(name):\n"
        "    while not os.path.exists(f'{events}/{name}'): time.sleep(0.002)\n"
        "worker.progress()\n"
        "with worker.phase('outer'):\n"
        "    wait('in outer')\n"
        "    with worker.phase('inner \\u2603'):\n"
        "        wait('in inner')\n"
        "    wait('in outer again')\n"
        "worker.progress()\n"
        "worker.progress(phase='loading')\n"
        "wait('loading')\n"
        "worker.progress(phase='')\n"
    )
    events.mkdir()
    with started(*script(tmp_path, text)) as group:
        seen = []
        for event, phase in (
            ("in outer", "outer"),
            ("in inner", "inner \N{SNOWMAN}"),
            ("in outer again", "outer"),
            ("loading", "loading"),
        ):
            group.wait_until(lambda phase=phase: group.read()[0].phase == phase)  # type: ignore[misc]
            seen.append(group.read()[0])
            (events / event).touch()
        (told,) = group.finish()
    outer, inner, again, _ = seen
    assert (told.phase, told.phase_since, told.marks) == ("", 0.0, 4)
    assert outer.phase_since == again.phase_since < inner.phase_since < again.last < told.last


@pytest.mark.quick
def test_where_there_is_no_memory_nothing_happens() -> None:
    worker.progress(5, phase="eval")
    with worker.phase("eval"), worker.phase("inner"):
        assert not worker.should_stop()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("progress('5')", TypeError, "step must be an integer, not str"),
        ("progress(1.0)", TypeError, "step must be an integer, not float"),
        ("progress(-1)", ValueError, "step=-1: must be 0 or higher"),
        ("progress(2**63)", ValueError, "must be 0 or higher, and fit into 63 bits"),
        ("progress(phase=5)", TypeError, "the name of a phase must be a text, not int"),
        ("phase('x' * 33)", ValueError, "must be a name of at most 32 bytes"),
        ("phase('\\0')", ValueError, "must be a name of at most 32 bytes in UTF-8, without NUL"),
        ("phase('')", ValueError, "a phase must have a name"),
    ],
)
def test_wrong_arguments(call: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        eval(f"worker.{call}")


@pytest.mark.quick
def test_should_stop_turns_true_at_the_call_that_the_agent_has_set(tmp_path: Path) -> None:
    text = (
        "from elastic_launch import worker\n"
        "while not worker.should_stop(): worker.progress()\n"
        "assert worker.should_stop(), 'it stays true'\n"
    )
    with started(*script(tmp_path, text), count=2) as group:
        group.wait_until(lambda: all(told.calls > 10 for told in group.read()))
        group.memory.set_stop(1, 0)

        def are_held() -> bool:
            before = group.read()
            time.sleep(0.02)
            return before == group.read()

        group.wait_until(are_held)
        calls = [told.calls for told in group.read()]
        group.memory.set_stop(0, 0)  # nothing was decided
        group.wait_until(lambda: all(told.calls > before for told, before in zip(group.read(), calls, strict=True)))
        group.memory.set_stop(1, 0)
        group.wait_until(are_held)
        stop_at = max(told.calls for told in group.read()) + 3
        group.memory.set_stop(1, stop_at)
        for told in group.finish():
            assert (told.calls, told.marks) == (stop_at + 1, stop_at - 1)


@pytest.mark.quick
def test_importing_the_module_costs_next_to_nothing() -> None:
    code = "import sys, time; before = set(sys.modules); import elastic_launch.worker; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {"elastic_launch", "elastic_launch.worker", "elastic_launch.workers", "elastic_launch.workers.step_hook"}
    assert eval(done.stdout) <= {*modules, "__future__"}


# ---- The descriptors


@pytest.mark.quick
def test_a_file_that_has_got_the_descriptor_s_number_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    text = (
        "import os\n"
        "memory, notify = map(int, os.environ['ELASTIC_LAUNCH_PROGRESS_FD'].split(','))\n"
        "os.closerange(3, 1000)\n"
        f"file = open({str(mine)!r}, 'w+b', buffering=0)\n"
        "file.write(b'x' * 5000)\n"
        "for fd in (memory, notify): os.dup2(file.fileno(), fd)\n"
        "from elastic_launch import worker\n"
        "worker.progress(1)\n"
    )
    with started(*script(tmp_path, text)) as group:
        assert group.finish() == [WorkerProgress()]
    assert mine.read_bytes() == b"x" * 5000


@pytest.mark.quick
def test_numbers_that_a_module_has_taken_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(
        "import os\nfile = open(__file__)\nfor fd in range(200, 230): os.dup2(file.fileno(), fd)\n"
    )
    text = (
        TELL + "import greedy, os\nfor fd in range(200, 230): assert os.path.sameopenfile(fd, greedy.file.fileno())\n"
    )
    with started(*script(tmp_path, text), count=2, preload=["greedy"]) as group:
        assert [told.marks for told in group.finish()] == [50, 50]


@pytest.mark.quick
@pytest.mark.parametrize("preload", [[], ["json"]], ids=["cold", "warm"])
def test_a_worker_has_its_memory_under_the_agent_s_number(tmp_path: Path, preload: list[str]) -> None:
    with started(*script(tmp_path, "import time\ntime.sleep(1000)\n"), count=3, preload=preload) as group:
        group.wait_until(lambda: len(group.pids) == 3)
        for rank, pid in group.pids.items():
            group.wait_until(lambda rank=rank, pid=pid: group.memory.is_open_in(pid, rank))  # type: ignore[misc]
            assert not group.memory.is_open_in(pid, (rank + 1) % 3)


@pytest.mark.quick
def test_a_job_in_a_worker_has_a_memory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "inner.py").write_text(TELL)
    command = [sys.executable, "-m", "elastic_launch", str(tmp_path / "inner.py")]
    text = f"import subprocess\n{TELL}\nsubprocess.run({command!r}, check=True)\n"
    with started(*script(tmp_path, text)) as group:
        assert group.finish()[0].marks == 50


# ---- Stacks


SURVIVE = """
import ctypes, os, sys, threading, time
events = sys.argv[1]
reading, writing = os.pipe()
releasing = threading.Event()
def release():
    releasing.set()
    while not os.path.exists(f"{events}/dumped"):
        time.sleep(0.002)
    os.write(writing, b"xy")
threading.Thread(target=release).start()
releasing.wait()
libc = ctypes.CDLL(None, use_errno=True)
open(f"{events}/blocked", "w").close()
buffer = ctypes.create_string_buffer(1)
assert libc.read(reading, buffer, 1) == 1, ctypes.get_errno()  # C: nobody else would start it again
assert os.read(reading, 1) == b"y"
"""


def is_complete(stacks: bytes) -> bool:
    """Whether they end with the outermost frame of the main thread, which is not the script's."""
    return stacks.endswith(b" in <module>\n") and b"train.py" not in stacks.splitlines()[-1]


@pytest.mark.quick
@pytest.mark.parametrize("preload", [[], ["json"]], ids=["cold", "warm"])
def test_system_calls_survive_that_stacks_are_taken(
    tmp_path: Path, preload: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with started(*script(tmp_path, SURVIVE), str(tmp_path), preload=preload) as group:
        group.wait_until((tmp_path / "blocked").exists)
        for _ in range(3):
            group.workers.dump_stacks([0])
            group.wait_until(lambda: is_complete(group.memory.stacks(0)))
            assert group.memory.stacks(0).count(b"Thread 0x") == 1, "only those of the last time"
            assert b"in release" in group.memory.stacks(0)
        (tmp_path / "dumped").touch()
        group.finish()
    assert capfd.readouterr().err == ""


@pytest.mark.quick
def test_sleep_in_python_lasts_as_long_as_asked_for(tmp_path: Path) -> None:
    text = (
        "import sys, time\nopen(f'{sys.argv[1]}/blocked', 'w').close()\n"
        "begin = time.monotonic()\ntime.sleep(0.5)\nassert time.monotonic() - begin >= 0.5\n"
    )
    with started(*script(tmp_path, text), str(tmp_path)) as group:
        group.wait_until((tmp_path / "blocked").exists)
        group.workers.dump_stacks([0])
        group.wait_until(lambda: group.memory.stacks(0))
        group.finish()


# ---- A program that is not Python


def test_the_example_in_c_counts_its_steps(tmp_path: Path) -> None:
    page = (Path(BOOTSTRAP).parents[2] / "docs/progress.md").read_text()
    (example,) = re.findall(r"```c\n(.*?)```", page, re.DOTALL)
    (tmp_path / "train.c").write_text(example)
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-o", "train", "train.c"], cwd=tmp_path, check=True)
    with started(str(tmp_path / "train"), count=2) as group:
        for told in group.finish():
            assert (told.iterations, told.first > 0, told.last >= told.first) == (100, True, True)
        assert os.eventfd_read(group.memory.fileno()) == 2
    assert subprocess.run([tmp_path / "train"], check=False).returncode == 0, "outside of a job"
