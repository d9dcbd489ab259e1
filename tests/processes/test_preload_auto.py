"""``--preload auto``: workers are forked with what their program imports, and are as cold ones would be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.core.preload import SLOW
from elastic_launch.core.preload_reader import QUICK
from elastic_launch.workers import preload_plan
from tests.support.jobs import Job
from tests.support.progress import script, started
from tests.support.training_scripts import SCRIPTS, Script

IS_FORK = "b'preload_main' in open(f'/proc/{os.getppid()}/cmdline', 'rb').read()"
WARM = f"import os, sys\nimport numpy\nsys.stdout.write('forked: %s\\n' % ({IS_FORK}))\n"
"""In one piece. `print` writes several, between which another rank may write if this one stands still."""


def test_a_program_that_imports_something_slow_is_forked(job: Job) -> None:
    (job.path / "train.py").write_text(WARM)
    ended = job.run("--preload", "auto", "--nproc-per-node", "2", "-v", "train.py")
    assert (ended.returncode, ended.stdout) == (0, "forked: True\n" * 2), ended.stderr
    assert "--preload auto: workers are forked with numpy\n" in ended.stderr
    ended = job.run("-v", "train.py", PET_PRELOAD="auto", PYTHONSAFEPATH="1")
    assert ended.stdout == "forked: True\n"
    for option in ("auto", "none"):
        ended = job.run("--preload", option, "-q", "train.py")
        assert (ended.stdout, ended.stderr) == (f"forked: {option == 'auto'}\n", "")


@pytest.mark.parametrize(
    ("options", "environ", "why"),
    [
        (["cold.py"], {}, "workers start cold: cold.py:2: os.environ['A'] = 'b': this could change"),
        (["--virtual-local-rank", "train.py"], {}, "they differ from the beginning with --virtual-local-rank"),
        (["train.py"], {"PYTHON_EXEC": "python3"}, ""),
        (["--no-python", sys.executable, "train.py"], {}, ""),
    ],
)
def test_others_are_not_and_v_says_why(job: Job, options: list[str], environ: dict[str, str], why: str) -> None:
    (job.path / "train.py").write_text(WARM)
    (job.path / "cold.py").write_text(f"import os\nos.environ['A'] = 'b'\n{WARM}")
    environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = job.run("--preload", "auto", "-v", *options, **environ)
    assert (ended.returncode, ended.stdout, why in ended.stderr) == (0, "forked: False\n", True), ended.stderr
    assert "auto" not in job.run("--preload", "auto", *options, **environ).stderr


@pytest.mark.parametrize(
    ("code", "forked"),
    [
        ("1/0", False),
        ("print('hello')", False),
        ("import sys; sys.stdout.close()", False),
        ("import threading, time; threading.Thread(target=time.sleep, args=(1e5,), daemon=True).start()", False),
        ("raise ImportError('not today')", False),
        ("import nowhere.at.all", False),
        ("value = 1", True),
    ],
    ids=["fails", "prints", "closes its output", "starts a thread", "refuses", "lacks something", "is fine"],
)
def test_a_module_that_cannot_be_preloaded_ends_nothing(
    code: str, forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A module that was thought to be safe, and is not."""
    command = script(tmp_path, f"import os\nassert ({IS_FORK}) is {forked}")
    (tmp_path / "odd.py").write_text(code)
    monkeypatch.setattr(preload_plan, "choose", lambda *_: ["auto", "json", "odd:value", "nowhere:at:all"])
    with started(*command, count=2, preload=["auto"]) as group:
        group.finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import ctypes; ctypes.string_at(0)", "the module ended its process (SIGSEGV)"),
        ("import os; os.closerange(3, 256)", "the module closed descriptors that are not its own"),
    ],
    ids=["crashes", "closes"],
)
def test_a_module_that_ends_the_process_makes_workers_cold(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script(tmp_path, f"import os\nassert not ({IS_FORK})")
    (tmp_path / "deadly.py").write_text(code)
    monkeypatch.setattr(preload_plan, "choose", lambda *_: ["auto", "json", "deadly"])
    with started(*command, count=2, preload=["auto"]) as group:
        group.finish()
    assert capfd.readouterr().out == f"--preload auto: deadly: {why}; starting workers without --preload\n"


def test_arrow_starts_no_thread_and_workers_do_not_know(job: Job) -> None:
    (job.path / "arrow.py").write_text("import os\nseen = os.environ['JE_ARROW_MALLOC_CONF']\n")
    text = "import arrow, os\nprint(arrow.seen, os.environ.get('JE_ARROW_MALLOC_CONF'))"
    (job.path / "train.py").write_text(text)
    quiet = "background_thread:false"
    assert job.run("--preload", "arrow", "train.py").stdout == f"{quiet} None\n"
    ended = job.run("--preload", "arrow", "train.py", JE_ARROW_MALLOC_CONF="dirty_decay_ms:0")
    assert ended.stdout == f"dirty_decay_ms:0,{quiet} dirty_decay_ms:0\n"


def test_functions(job: Job) -> None:
    (job.path / "main.py").write_text(
        f"import os\nimport numpy\n\ndef work(): return {IS_FORK}\n\nif __name__ == '__main__':\n"
        "    from elastic_launch import LaunchConfig, elastic_launch\n"
        "    for method in ('spawn', 'forkserver', 'fork'):\n"
        "        config = LaunchConfig(1, 1, 2, max_restarts=0, preload='auto', start_method=method)\n"
        "        print(elastic_launch(config, work)())\n"
    )
    ended = subprocess.run([sys.executable, "main.py"], cwd=job.path, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["{0: True, 1: True}", "{0: True, 1: True}", "{0: False, 1: False}"], (
        ended.stderr
    )


# ---- that workers are as cold ones would be

REPORT = """
import json, os, signal, sys, threading
def state():
    found = {
        "modules": list(sys.modules), "environ": dict(os.environ), "path": sys.path, "argv": sys.argv,
        "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())], "cwd": os.getcwd(),
        "threads": threading.active_count(), "hooks": [str(type(hook)) for hook in sys.meta_path],
        "streams": [str(sys.stdout), str(sys.stderr)], "excepthook": str(sys.excepthook),
        "filters": [str(each) for each in getattr(sys.modules.get("warnings"), "filters", ())],
    }
    torch = sys.modules.get("torch")
    if hasattr(torch, "get_num_threads"):
        found["torch"] = [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
            torch.distributed.is_initialized(), torch.get_rng_state().shape]
        found["draws"] = torch.rand(1).item()
    if numpy := sys.modules.get("numpy"):
        found["numpy"] = [str(numpy.geterr()), numpy.get_printoptions()["precision"]]
    return found
"""
PROBE = """
with open(__import__("os").environ["PROBE_OUT"], "a") as __file:
    __file.write(__import__("probe").json.dumps(__import__("probe").state()) + "\\n")
"""
VARYING = {"MASTER_PORT", "PROBE_OUT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "ELASTIC_LAUNCH_PROGRESS_FD"}


def run(job: Job, program: Script, preload: str) -> tuple[str, dict[str, Any]]:
    """Run a program with one worker. Returns its output and the state in which it ended."""
    for path, text in {**program.files, program.program: program.text + PROBE}.items():
        (job.path / path).parent.mkdir(parents=True, exist_ok=True)
        (job.path / path).write_text(text)
    (job.path / "lib.py").write_text("")
    (job.path / "probes").mkdir(exist_ok=True)
    (job.path / "probes" / "probe.py").write_text(REPORT)
    out = job.path / f"state.{preload}"
    target = ["-m", program.module] if program.module else [program.program]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(job.path / "probes")]))
    ended = job.run("--preload", preload, "-v", *target, PROBE_OUT=str(out), PYTHONPATH=paths, PYTHONHASHSEED="0")
    assert ended.returncode == 0, ended.stderr
    assert ("workers are forked with" in ended.stderr) == (preload == "auto" and bool(program.imports)), ended.stderr
    state: dict[str, Any] = json.loads(re.sub(r" at 0x\w+", "", out.read_text()))
    for name in VARYING:
        state["environ"].pop(name, None)
    launcher = [line for line in ended.stderr.splitlines() if not line.startswith("elastic-run: ")]
    return ended.stdout + "\n".join(launcher), state


RANKS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_", "ROLE_"),
    *("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""What the names of variables begin with that the launcher sets for each worker."""

KEEPERS: set[str] = set()


def keepers(job: Job) -> set[str]:
    """Return the modules that a warm keeper has without importing any for its workers."""
    if not KEEPERS:
        (job.path / "empty.py").write_text("import sys\nprint(*sys.modules)")
        KEEPERS.update(job.run("--preload", "sys", "empty.py").stdout.split())
        KEEPERS.add("_elastic_launch_step_hook")  # comes as soon as the worker runs and torch is there
    return KEEPERS


FEW = ("own package", "sklearn and scipy")
"""Those that also run in ``make test``. All of them take minutes: ``make programs``."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.programs)
        for name, script in SCRIPTS.items()
        if not script.needs or find_spec(script.needs)
    ],
)
def test_programs_are_as_they_are_cold(name: str, job: Job) -> None:
    cold_output, cold = run(job, SCRIPTS[name], "none")
    output, warm = run(job, SCRIPTS[name], "auto")
    assert output == cold_output
    if "draws" in cold and "manual_seed" not in SCRIPTS[name].text:
        assert warm.pop("draws") != cold.pop("draws")
    own = {path.stem for path in job.path.iterdir()}
    modules, cold_modules = (
        [name for name in state.pop("modules") if name not in keepers(job) and name.partition(".")[0] not in own]
        for state in (warm, cold)
    )
    assert modules == cold_modules, "in the same order"
    assert warm == cold


@pytest.mark.programs
@pytest.mark.parametrize("package", sorted(SLOW | QUICK))
def test_packages_are_safe(package: str, job: Job) -> None:
    """They can be forked after their import, and ask for no variable of a rank."""
    pytest.importorskip(package)
    (job.path / "traced.py").write_text(
        "import os\nget = type(os.environ).__getitem__\n"
        "def note(self, name):\n    open('asked', 'a').write(f'{name}\\n')\n    return get(self, name)\n"
        f"type(os.environ).__getitem__ = note\nimport {package}\ntype(os.environ).__getitem__ = get\n"
    )
    (job.path / "train.py").write_text(f"import os\nprint({IS_FORK})\n")
    ended = job.run("--preload", "traced", "-q", "train.py")
    assert (ended.stdout, ended.stderr) == ("True\n", "")
    asked = (job.path / "asked").read_text().split() if (job.path / "asked").exists() else []
    assert not [name for name in asked if name.startswith(RANKS)]
