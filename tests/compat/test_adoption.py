"""``elastic_launch.compat``: what becomes ours in a program that uses torch's launcher, and what stays torch's."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import elastic_launch
from elastic_launch import ChildFailedError, LaunchConfig, ProcessFailure, SignalException, compat, errors, legacy
from elastic_launch.run import config_from_args, parse_args

TORCH = {
    "torch/__init__.py": "",
    "torch/distributed/__init__.py": "",
    "torch/distributed/launcher/__init__.py": "from torch.distributed.launcher.api import *",
    "torch/distributed/launcher/api.py": "LaunchConfig = elastic_launch = launch_agent = other = 'torchs'",
    "torch/distributed/run.py": (
        "from torch.distributed.launcher.api import LaunchConfig, elastic_launch\n"
        "main = get_args_parser = parse_args = config_from_args = run = parse_min_max_nnodes = None\n"
        "determine_local_world_size = None\n"
        "other = 'torchs'\n"
        "if __name__ == '__main__': print('as a program:', other, elastic_launch.__module__)\n"
    ),
    "torch/distributed/launch.py": "from torch.distributed.run import get_args_parser, run",
}
"""Modules as they are in torch."""
PROGRAM = """
import runpy, sys
if early: import torch.distributed.launch, torch.distributed.launcher
import elastic_launch.compat as compat
if not early: print(sorted(name for name in sys.modules if name.startswith(("torch", "argparse", "elastic_launch."))))
from torch.distributed.run import main
import torch.distributed.launch as launch, torch.distributed.launcher as launcher, torch.distributed.run as run
from elastic_launch import LaunchConfig, elastic_launch, launch_agent
ours = [main is run.main is compat.main, launch.run is run.run is compat.run, run.elastic_launch is elastic_launch]
for module in (launcher, launcher.api):
    ours += [module.LaunchConfig is LaunchConfig, module.launch_agent is launch_agent]
print(all(ours), run.other, launcher.other, type(run.__loader__).__name__, run.__spec__.loader is run.__loader__)
del sys.modules["torch.distributed.run"]
runpy.run_module("torch.distributed.run", run_name="__main__")
run.main(["--nproc-per-node", "1", "train.py", "--config", "x"])
"""


@pytest.mark.parametrize("early", [True, False])
def test_torchs_names_are_ours_whether_its_modules_are_loaded_or_not(tmp_path: Path, early: bool) -> None:
    for name, text in TORCH.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:])")
    code = f"import sys; sys.path.insert(0, '.'); early = {early}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = [] if early else ["['elastic_launch.compat']"]
    lines += ["True torchs torchs SourceFileLoader True", "as a program: torchs elastic_launch.launch"]
    assert done.stdout.splitlines() == [*lines, "['--config', 'x']"], done.stderr


def test_options_that_torchrun_lacks_are_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    parser = compat.get_args_parser()
    parser.add_argument("--config", type=int)
    parser.add_argument("--events", action="append")
    args = parser.parse_args(["--config", "7", "--events", "a", "train.py"])
    monkeypatch.setenv("PET_CRASH_LOOP", "5")
    config, _, _ = compat.config_from_args(args)
    assert (config.events, config.crash_loop) == (None, 5)


def theirs(monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> list[type[Exception]]:
    """Load a module of torch's with exceptions whose constructors differ from ours."""

    def create(self: Exception, *args: object) -> None:
        raise AssertionError

    loaded = ModuleType(module)
    for name in names:
        setattr(loaded, name, type(name, (Exception,), {"__init__": create}))
    monkeypatch.setitem(sys.modules, module, loaded)
    return [getattr(loaded, name) for name in names]


def test_errors_are_torchs_where_torchs_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ProcessFailure(local_rank=1, pid=4711, exitcode=-9)

    def make() -> list[Exception]:
        found: list[Exception] = [ChildFailedError("train.py", {1: failure}, "report")]
        found += [SignalException(msg="stopped", sigval=signal.SIGTERM), errors.RendezvousTimeoutError("late")]
        return found

    before = make()
    elastic = "torch.distributed.elastic"
    kinds = theirs(monkeypatch, f"{elastic}.multiprocessing.errors", "ChildFailedError")
    kinds += theirs(monkeypatch, f"{elastic}.multiprocessing.api", "SignalException")
    kinds += theirs(monkeypatch, f"{elastic}.rendezvous.api", "RendezvousTimeoutError")
    for kind, earlier, error in zip(kinds, before, make(), strict=True):
        assert isinstance(error, kind)
        assert isinstance(error, type(earlier))
        assert not isinstance(earlier, kind)
        assert (str(error), type(error).__qualname__) == (str(earlier), type(earlier).__qualname__)
        assert vars(error) == vars(earlier)
    again = [pickle.loads(pickle.dumps(error)) for error in make()]
    for kind, earlier, error in zip(kinds, before, again, strict=True):
        assert isinstance(error, kind)
        assert isinstance(error, type(earlier))
        assert vars(error) == vars(earlier)
    assert [error.exit_code for error in again] == [137, 143, 75]


def test_torchs_settings_work() -> None:
    class TorchsConfig:
        """It has some of our fields."""

        min_nodes = max_nodes = 1
        nproc_per_node, max_restarts, run_id, role = 2, 0, "job-7", "trainer"

    config: Any = TorchsConfig()
    assert elastic_launch.elastic_launch(config, "test")("${local_rank}") == {0: None, 1: None}
    assert not isinstance(config, LaunchConfig)


RUN = ["-P", "-m", "elastic_launch"]


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        (["python", "bin/torchrun", "-m", "x"], ["bin/torchrun", "-m", "x"], [*RUN, "-m", "x"]),
        (["python", "-u", "-m", "torch.distributed.run", "x"], ["-m", "x"], ["-P", "-u", *RUN[1:], "x"]),
        (["python", "-umtorch.distributed.run", "x"], ["-m", "x"], ["-P", "-umelastic_launch", "x"]),
        (["python", "-m", "torch.distributed.launch"], ["-m"], ["-P", "-m", "elastic_launch.legacy"]),
        (["python", "-m", "torch.distributed.runner"], ["-m"], None),
        (["python", "-m", "my", "torch.distributed.run"], ["-m", "torch.distributed.run"], None),
        (["python", "other/torchrun", "x"], ["other/torchrun", "x"], None),
        (["python", "bin/nowhere/torchrun"], ["bin/nowhere/torchrun"], None),
        (["python", "-c", "bin/torchrun"], ["-c"], None),
        (["python"], [""], None),
        ([], [""], None),
    ],
)
def test_commands_that_are_torchs_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], argv: list[str], expected: list[str] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("bin", "from torch.distributed.run import main"), ("other", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torchrun").write_text(text)
    executed: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, words: executed.append(words))
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setattr(sys, "argv", argv)
    compat.start()
    assert executed == ([] if expected is None else [[sys.executable, *expected]])


def test_adopt_hands_options_on_as_variables(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('role = "r"\nduplicate-stdout-filters = ["a,b", "c"]\n')
    (tmp_path / compat.PTH).touch()
    show = "echo $ELASTIC_LAUNCH_AS_TORCHRUN $PET_PRELOAD $PET_HANG_NATIVE $PET_ROLE $PET_DUPLICATE_STDOUT_FILTERS"
    show += " -$PET_CONFIG-"
    options = ["--adopt", "--config", "job.toml", "--preload", "a,b", "--hang-native"]
    code = "import sys; sys.path.append('.'); from elastic_launch.cli.main import console; console()"
    command = [sys.executable, "-c", code, *options, "--", "sh", "-c", f"{show} $0; exit 7", "--mo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "1 a,b 1 r a,,b,c -- --mo\n"), done.stderr


def test_a_finder_of_former_times_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = compat._Finder()
    monkeypatch.setattr(sys, "meta_path", [object(), finder])
    assert finder.find_spec("torch.distributed.run") is None


def test_adopt_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / compat.PTH).touch()
    monkeypatch.syspath_prepend(tmp_path)
    args = parse_args(["--adopt", "--", "no-such-program", "--x"])
    with pytest.raises(errors.UsageError, match="--adopt no-such-program: No such file or directory"):
        compat.adopt(args)
    monkeypatch.setattr(compat, "PTH", "nowhere.pth")
    with pytest.raises(errors.UsageError, match=r"--adopt: no nowhere.pth in the site-packages of .*: install"):
        compat.adopt(args)


def test_the_launcher_before_torchrun_passes_the_local_rank(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys; sys.stdout.write(f'{sys.argv[1:]}\\n')")  # in one piece
    command = [sys.executable, "-m", "elastic_launch.legacy", "--nproc_per_node=2", "train.py", "-x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["['--local-rank=0', '-x']", "['--local-rank=1', '-x']"], done.stderr
    args = legacy.parse_args(["--use_env", "--no-python", "true"])
    assert config_from_args(args)[1:] == ("true", [])
