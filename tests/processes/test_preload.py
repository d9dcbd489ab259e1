"""Warm workers: modules are imported once, and forked workers are like new processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch import ChildFailedError, LaunchConfig, UsageError, elastic_launch
from elastic_launch import workers as elastic_launch_workers
from tests.support.jobs import Job
from tests.support.waiting import SOON, is_alive, wait_until

TUNABLES = "glibc.malloc.check=0:glibc.malloc.tcache_count=7"
STATE = """
import json, multiprocessing, random, threading
def facts():
    return {
        "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__,
        "main": sys.modules["__main__"].__file__,
        "flags": list(sys.flags), "executable": sys.executable, "orig_argv": sys.orig_argv,
        "leader": os.getpid() == os.getpgid(0) == os.getsid(0),
        "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals()) if n != 63],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "environ": {name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1],
        "threads": threading.active_count(), "main thread": threading.current_thread() is threading.main_thread(),
        "process": multiprocessing.current_process().name, "buffered": sys.stdout.write_through,
        "affinity": sorted(os.sched_getaffinity(0)), "cwd": os.getcwd(), "umask": os.umask(0o22),
        "cached": __spec__ is None, "stdin": os.readlink("/proc/self/fd/0"), "getppid": os.getppid() > 1,
    }
json.dump(facts(), open(f"{os.environ['OUT']}/{rank}", "w"))
"""


def facts(job: Job, *args: str, out: str, **env: str) -> list[dict[str, Any]]:
    (job.path / out).mkdir()
    env["OUT"] = str(job.path / out)
    ended = job.run("--nproc-per-node", "2", "--rdzv-id", "j", "--log-dir", "logs", *args, **env)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads((job.path / out / str(rank)).read_text()) for rank in range(2)]
    for each in found:
        del each["environ"]["OUT"]
    return found


@pytest.mark.parametrize(
    ("start", "env"),
    [(("train.py", "a", "--b"), {}), (("-m", "train", "x"), {"GLIBC_TUNABLES": TUNABLES})],
)
def test_a_forked_worker_is_like_a_new_process(job: Job, start: tuple[str, ...], env: dict[str, str]) -> None:
    job.script(STATE)
    fresh = facts(job, *start, out="fresh", **env)
    assert fresh[0]["environ"].get("GLIBC_TUNABLES") == env.get("GLIBC_TUNABLES")
    warm = facts(job, "--preload", "numpy,xml.dom", *start, out="warm", **env)
    assert warm == fresh


def test_modules_are_imported_once_and_restarts_fork_again(job: Job) -> None:
    (job.path / "slow.py").write_text(
        "import os, random\n"
        f"with open({str(job.path / 'imports')!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')\n"
        "drawn = random.random()\n"
    )
    script = job.script(
        "import random, slow\nmark(f'{slow.drawn} {random.random()} {os.getpid()}')\n"
        "sys.exit(7 if restart == 0 and rank == 1 else 0)"
    )
    ended = job.run("--nproc-per-node", "2", "--max-restarts", "1", "--preload", "slow", script)
    assert ended.returncode == 0, ended.stderr
    assert len((job.path / "imports").read_text().split()) == 1
    marks = [mark.split() for mark in job.marks()]
    assert {mark[0] for mark in marks} >= {"1.0", "0.1", "1.1"}
    assert len({mark[1] for mark in marks}) == 1, "what the module has drawn is the same for all"
    assert len({mark[2] for mark in marks}) == len(marks), "what workers draw is not"


def test_modules_beside_the_script_and_in_packages(job: Job) -> None:
    (job.path / "lib" / "mylib").mkdir(parents=True)
    (job.path / "lib" / "mylib" / "__init__.py").write_text("")
    (job.path / "lib" / "mylib" / "data.py").write_text("value = 7")
    script = job.script("", "lib/train.py")
    Path(script).write_text(
        "import sys\nassert 'mylib.data' in sys.modules\nimport mylib.data as data\nprint(data.value)"
    )
    ended = job.run("--preload", "json,mylib.data", script)
    assert (ended.returncode, ended.stdout) == (0, "7\n"), ended.stderr


def test_modules_with_the_names_of_the_keepers_own(job: Job) -> None:
    names = ["bootstrap", "forked", "keeper_main", "standby", "written_pages"]
    for name in names:
        (job.path / f"{name}.py").write_text("value = 7")
    (job.path / "total.py").write_text(f"import {', '.join(names)}\nvalue = {'.value + '.join(names)}.value")
    ended = job.run("--preload", "total", job.script("import total\nprint(total.value)"))
    assert (ended.returncode, ended.stdout) == (0, "35\n"), ended.stderr


def test_workers_have_what_a_module_sets_when_it_is_imported(job: Job) -> None:
    (job.path / "odd.py").write_text(
        "import os, signal, sys\n"
        "assert 'GLIBC_TUNABLES' not in os.environ\n"
        "os.environ.setdefault('FROM_ODD', 'yes')\nos.environ['RANK'] = 'none'\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})\n"
        "os.chdir('/')\nargv = sys.argv[:]\nsys.path.insert(0, '/first')\n"
    )
    script = job.script(
        "os.kill(os.getpid(), signal.SIGUSR1)\nimport odd\n"
        "assert (os.environ['FROM_ODD'], rank) == ('yes', 0)\n"
        "assert odd.argv == [sys.argv[0]] and os.getcwd() == os.path.dirname(os.path.abspath(__file__))\n"
        "assert '/first' in sys.path and sys.path.count(os.getcwd()) == 1\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())"
    )
    ended = job.run("--preload", "odd", os.path.basename(script))
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


@pytest.mark.parametrize("safe", ["", "1"])
def test_modules_in_a_zip_file(job: Job, safe: str) -> None:
    with zipfile.ZipFile(job.path / "all.zip", "w") as file:
        file.writestr("__main__.py", "import sys\nassert 'helper' in sys.modules\nimport helper\nprint(helper.value)")
        file.writestr("helper.py", "value = 7")
    ended = job.run("--preload", "helper", "all.zip", PYTHONSAFEPATH=safe)
    assert (ended.returncode, ended.stdout) == (0, "7\n"), ended.stderr


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nos._exit(0)", "the module ended its process (exit code 0)"),
        ("import ctypes\nctypes.string_at(0)", "the module ended its process (SIGSEGV)"),
        ("import os\nos.closerange(3, 256)", "the module closed descriptors that are not its own"),
    ],
    ids=["exits", "crashes", "closes"],
)
def test_module_that_ends_the_process_is_named(job: Job, code: str, why: str) -> None:
    (job.path / "deadly.py").write_text(code)
    ended = job.run("--preload", "json,deadly", job.script(""))
    assert ended.returncode == 69
    assert ended.stderr.endswith(f"elastic-run: --preload deadly: cannot import the module: {why}\n")


def test_module_may_have_a_pool_of_processes_and_warnings_may_be_errors(job: Job) -> None:
    """The pool ends its processes by SIGTERM, which the keeper blocks."""
    (job.path / "pooled.py").write_text("import multiprocessing\nwith multiprocessing.Pool(2) as p: p.map(abs, [1])")
    ended = job.run("--preload", "pooled", job.script("mark('pooled' in sys.modules)"), PYTHONWARNINGS="error")
    assert (ended.returncode, job.marks()) == (0, ["0.0 True"])
    assert "Warning" not in ended.stderr


def test_random_states_are_each_worker_s_own(job: Job) -> None:
    script = job.script(
        "import random, numpy, torch\n"
        "mark(f'{random.random()} {numpy.random.rand()} {torch.rand(1).item()} {torch.initial_seed()}')"
    )
    ended = job.run("--nproc-per-node", "2", "--preload", "torch,numpy", script)
    assert ended.returncode == 0, ended.stderr
    (_, *first), (_, *second) = (mark.split() for mark in job.marks())
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("raise ValueError('boom')", 1, "ValueError: boom"),
        ("sys.exit(42)", 42, ""),
        ("sys.exit('too bad')", 1, "too bad"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("import atexit; atexit.register(os._exit, 5)", 5, ""),
        ("syntax error here =", 1, "SyntaxError"),
    ],
)
def test_workers_end_as_fresh_ones_do(job: Job, code: str, status: int, words: str) -> None:
    script = job.script(code)
    cold = job.run(script)
    warm = job.run("--preload", "json", script)
    assert warm.returncode == cold.returncode == status
    assert words in warm.stderr
    worker_words = [
        [line for line in ended.stderr.partition("=====")[0].splitlines() if not line.startswith("elastic-run: ")]
        for ended in (cold, warm)
    ]
    assert worker_words[0] == worker_words[1], "including the traceback"


def test_names_in_ps(job: Job) -> None:
    process = job.start("--nproc-per-node", "2", "--preload", "json", job.script("mark('up')\nwait()"), "x", "y")
    job.wait_for("0.0 up", "1.0 up")
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "train.py" in child.name()]
    assert sorted(worker.name() for worker in workers) == ["train.py:0", "train.py:1"]
    lines = {" ".join(filter(None, worker.cmdline())) for worker in workers}
    assert len(lines) == 1
    assert lines.pop().endswith("train.py x y")
    process.terminate()
    assert job.finish(process).returncode == 143


def test_module_that_cannot_be_imported_fails_the_launch_with_its_traceback(job: Job) -> None:
    (job.path / "broken.py").write_text("def f():\n    raise RuntimeError('no such luck')\nf()\n")
    ended = job.run("--preload", "json,broken", "--max-restarts", "3", job.script("mark('started')"))
    assert ended.returncode == 69
    assert (
        "elastic-run: --preload broken: cannot import the module:\n  Traceback (most recent call last):\n"
        in ended.stderr
    )
    assert 'broken.py", line 2, in f' in ended.stderr
    assert "RuntimeError: no such luck" in ended.stderr
    assert "elastic_launch/" not in ended.stderr, "without frames of the launcher"
    assert job.marks() == []
    assert "ModuleNotFoundError: No module named 'nowhere'" in job.run("--preload", "nowhere", job.script("")).stderr
    (job.path / "leave.py").write_text("raise SystemExit(0)")
    exits = job.run("--preload", "leave", job.script(""))
    assert (exits.returncode, "--preload leave: cannot import the module" in exits.stderr) == (69, True)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(1e5,), daemon=True, name='idler').start()",
            "has started threads (idler)",
        ),
        ("import _thread, time\n_thread.start_new_thread(time.sleep, (1e5,))", "has started 1 thread outside Python"),
        ("import asyncio\nloop = asyncio.new_event_loop()", "has created an event loop"),
        ("import subprocess\nchild = subprocess.Popen(['sleep', '1000'])", "has started a process"),
        ("import os\nos.system('sleep 1000 > /dev/null 2>&1 &')", "has started a process"),
    ],
)
def test_module_that_makes_forks_unsafe_is_named_and_workers_are_cold(job: Job, code: str, why: str) -> None:
    (job.path / "unsafe.py").write_text(code)
    script = job.script("mark('wave' in sys.modules or 'GLIBC_TUNABLES' in os.environ)\nprint(sys.argv[1])")
    ended = job.run("--nproc-per-node", "2", "--preload", "wave,unsafe,numpy", script, "hello")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("hello") == 2
    assert (
        ended.stderr.count(
            f"--preload unsafe: the module {why}, so workers cannot be forked; starting them without --preload"
        )
        == 1
    )
    assert sorted(job.marks()) == ["0.0 False", "1.0 False"]


def test_open_device_makes_forks_unsafe() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import preload_main as p; print(p.why_not_to_fork())\n"
        "p.DEVICES = ('/dev/full',); file = open('/dev/full', 'w'); print(p.why_not_to_fork())"
    )
    folder = str(Path(elastic_launch_workers.__file__).parent)
    ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert ended.stdout == "\nhas opened /dev/full\n"


def test_a_thread_that_is_slow_to_end_does_not_make_forks_unsafe() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import preload_main as p\n"
        "listed, looks = p.os.listdir, iter(range(400))\n"
        "p.os.listdir = lambda path: ['1', '2'] if 'task' in path and next(looks, None) is not None else listed(path)\n"
        "print(p.why_not_to_fork())"
    )
    folder = str(Path(elastic_launch_workers.__file__).parent)
    ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert ended.stdout == "\n"


def test_threads_that_end_before_a_fork_do_not_prevent_forks(job: Job) -> None:
    script = job.script("import numpy\nnumpy.ones((300, 300)) @ numpy.ones((300, 300))\nmark('done')")
    ended = job.run(
        "--nproc-per-node", "2", "--preload", "numpy", script, OMP_NUM_THREADS="4", OPENBLAS_NUM_THREADS="4"
    )
    assert ended.returncode == 0
    assert "--preload" not in ended.stderr
    assert len(job.marks()) == 2


def test_server_killed_is_replaced(job: Job) -> None:
    script = job.script("mark(os.getppid())\nwait() if restart == 0 else None")
    process = job.start("--nproc-per-node", "2", "--max-restarts", "1", "--preload", "json", script)
    wait_until(lambda: len(job.marks()) == 2)
    server = int(job.marks()[0].split()[1])
    os.kill(server, signal.SIGKILL)
    assert job.finish(process).returncode == 0
    assert len({mark.split()[1] for mark in job.marks()}) == 2


@pytest.mark.parametrize("moment", ["importing", "running"])
def test_agent_killed_leaves_nothing(job: Job, moment: str) -> None:
    (job.path / "slow.py").write_text(
        f"import os, time\nopen({str(job.path / 'importing')!r}, 'w').write(str(os.getpid()))\n"
        + ("time.sleep(1000)\n" if moment == "importing" else "")
    )
    script = job.script("subprocess.Popen(['sleep', '1000'], start_new_session=True)\nmark('up')\nwait()")
    process = job.start("--nproc-per-node", "2", "--preload", "slow", script)
    if moment == "importing":
        wait_until(lambda: (job.path / "importing").exists() and (job.path / "importing").read_text())
    else:
        job.wait_for("0.0 up", "1.0 up")
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    begin = time.monotonic()
    wait_until(lambda: not any(is_alive(child.pid) for child in below))
    assert time.monotonic() - begin < SOON


def test_signal_stops_a_server_that_imports(job: Job) -> None:
    (job.path / "slow.py").write_text(
        f"import time\nopen({str(job.path / 'importing')!r}, 'w').write('1')\ntime.sleep(1000)\n"
    )
    process = job.start("--preload", "slow", "--shutdown-timeout", "1", job.script(""))
    wait_until(lambda: (job.path / "importing").exists())
    process.terminate()
    assert job.finish(process).returncode == 143


def value() -> tuple[bool, str]:
    return "wave" in sys.modules, os.environ["RANK"]


def test_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = LaunchConfig(1, 1, 2, max_restarts=0, preload=["wave"])
    assert elastic_launch(config, value)() == {0: (True, "0"), 1: (True, "1")}
    config.start_method = "forkserver"
    assert elastic_launch(config, value)() == {0: (True, "0"), 1: (True, "1")}
    config.start_method = "fork"
    with pytest.raises(UsageError, match="preload with start_method='fork'"):
        elastic_launch(config, value)()
    with pytest.raises(UsageError, match="preload: only works for Python scripts, modules and functions"):
        elastic_launch(LaunchConfig(1, 1, 2, preload=["wave"]), "true")()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preload", "a b"], "--preload='a b': must be names of modules"),
        (["--preload", "json", "--no-python"], "--preload cannot be combined with --no-python"),
    ],
)
def test_wrong_use(job: Job, args: list[str], words: str) -> None:
    ended = job.run(*args, job.script(""))
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr


def test_variable(job: Job) -> None:
    assert job.run(job.script("sys.exit('wave' not in sys.modules)"), PET_PRELOAD="wave").returncode == 0


TORCH = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(4, requires_grad=True)
(x * x).sum().backward()
assert x.grad.sum() == 8
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
model(torch.ones(2, 4)).sum().backward()
big = torch.rand(600, 600)
(big @ big).exp().sum()  # OpenMP
data = torch.utils.data.DataLoader(torch.arange(64.0), batch_size=8, num_workers=2)
assert sum(batch.sum().item() for batch in data) == 2016
if rank == restart == 0:  # it imports torch, which takes seconds
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
total = torch.ones(1)
dist.all_reduce(total)
assert total == 2
mark("done")
if restart == 0 and rank == 1:
    wait_for("0.0 done", "1.0 done")
    os.kill(os.getpid(), signal.SIGKILL)
if restart == 0:
    wait()
os._exit(0)
"""


@pytest.mark.parametrize(("threads", "modules"), [("1", "torch"), ("2", "torch,torch._dynamo")])
def test_torch_works_in_forked_workers(job: Job, threads: str, modules: str) -> None:
    """Without and with what an optimizer and DDP import, which takes as long as torch itself."""
    script = job.script(
        "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in TORCH.strip().splitlines())
    )
    ended = job.run(
        "--nproc-per-node", "2", "--max-restarts", "1", "--preload", modules, script, OMP_NUM_THREADS=threads
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(job.marks()) == ["0.0 done", "0.1 done", "1.0 done", "1.1 done"]
    assert "so workers cannot be forked" not in ended.stderr


def test_torch_compile_in_forked_workers(job: Job) -> None:
    script = job.script(
        "import torch\n"
        "@torch.compile\ndef f(x): return (x.sin() + x.cos()).sum()\n"
        "x = torch.ones(64)\nassert torch.allclose(f(x), (x.sin() + x.cos()).sum())\nmark('done')\nos._exit(0)"
    )
    # VEC_ISA_OK: torch need not try out the CPU, which takes 20 s; nor compile headers in advance, for one function.
    env = {"TORCHINDUCTOR_CACHE_DIR": str(job.path / "cache"), "TORCHINDUCTOR_VEC_ISA_OK": "1", "TMPDIR": str(job.path)}
    env["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    ended = job.run("--nproc-per-node", "1", "--preload", "torch", script, **env)
    assert ended.returncode == 0, ended.stderr
    assert len(job.marks()) == 1


def test_resource_tracker_is_each_worker_s_own(job: Job) -> None:
    (job.path / "locks.py").write_text("import multiprocessing\nlock = multiprocessing.get_context('spawn').Lock()\n")
    script = job.script(
        "from multiprocessing import resource_tracker, shared_memory\nimport locks\n"
        "assert resource_tracker._resource_tracker._fd is None\n"
        "with locks.lock: memory = shared_memory.SharedMemory(create=True, size=100)\n"
        "mark(resource_tracker._resource_tracker._pid)\nmemory.close()\nmemory.unlink()"
    )
    ended = job.run("--nproc-per-node", "2", "--preload", "locks", script)
    assert ended.returncode == 0, ended.stderr
    assert "--preload" not in ended.stderr
    assert len({mark.split()[1] for mark in job.marks()}) == 2


@pytest.mark.skipif(not os.path.exists("/dev/nvidiactl"), reason="no GPU here")
def test_cuda_and_nccl_in_forked_workers(job: Job) -> None:
    script = job.script(
        "import torch, torch.distributed as dist\n"
        "assert not torch.cuda.is_initialized()\n"
        "torch.cuda.set_device(int(os.environ['LOCAL_RANK']))\n"
        "dist.init_process_group('nccl')\n"
        "total = torch.ones(1, device='cuda')\ndist.all_reduce(total)\n"
        "assert total.item() == dist.get_world_size()\nmark('done')\n"
        "if restart == 0 and rank == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os._exit(0)"
    )
    ended = job.run("--nproc-per-node", "gpu", "--max-restarts", "1", "--preload", "torch", script)
    assert ended.returncode == 0, ended.stderr
    assert "0.1 done" in job.marks()
    assert "so workers cannot be forked" not in ended.stderr


def test_failure_in_a_warm_function_is_reported() -> None:
    with pytest.raises(ChildFailedError, match="ZeroDivisionError"):
        elastic_launch(LaunchConfig(1, 1, 2, max_restarts=0, preload=["json"]), divide)(0)


def divide(by: int) -> float:
    return 1 / by


def test_subprocesses_of_a_forked_worker_are_reaped_by_it(job: Job) -> None:
    script = job.script(
        "assert subprocess.run(['true']).returncode == 0\nassert os.wait() if os.fork() else os._exit(0)"
    )
    assert job.run("--preload", "json", script).returncode == 0
