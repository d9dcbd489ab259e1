"""The command line: its meaning, its help, and its error messages."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_launch import LaunchConfig, Std, UsageError, __version__
from elastic_launch.cli import main as cli
from elastic_launch.cli import plan
from elastic_launch.cli.options import EPILOG, GROUPS, OPTIONS, OWN, SHORT_USAGE, VERSION, read_options
from elastic_launch.host import signals
from elastic_launch.parsing import (
    parse_filters,
    parse_ranks,
    parse_rdzv_conf,
    parse_seconds,
    parse_signals,
    split_endpoint,
)
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.run import (
    config_from_args,
    determine_local_world_size,
    get_args_parser,
    parse_args,
    parse_min_max_nnodes,
)
from elastic_launch.store.client import NotAStoreError
from elastic_launch.workers import BOOTSTRAP


@pytest.fixture(autouse=True)
def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")


def config(*args: str) -> LaunchConfig:
    return config_from_args(parse_args([*args, "train.py"]))[0]


def usage_error(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the message of a usage error, as the program prints it."""
    assert cli_status(*args) == 2
    return capfd.readouterr().err


def cli_status(*args: str) -> object:
    """Return the exit status of the program, run in this process without leaving its signal handlers behind."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "owns_process", signals.owns_process)
        patch.setattr(sys, "argv", ["elastic-run", *args])
        try:
            return cli.main()
        except SystemExit as exit_:
            return exit_.code
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


C10D = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h:1"]
WRONG = [
    (["--nnodes", "3:1"], "--nnodes='3:1': must be a number of nodes"),
    (["--nnodes", "0"], "--nnodes='0': must be"),
    (["--nnodes", "a:b"], "--nnodes='a:b': must be"),
    (["--nnodes", "1:2:3"], "--nnodes='1:2:3': must be"),
    (["--nproc-per-node", "-1"], "--nproc-per-node=-1: must be a number from 1 to 65536, or auto"),
    (["--nproc-per-node", "0"], "--nproc-per-node=0: must be a number from 1 to 65536, or auto"),
    (["--rdzv-conf", "abc"], "--rdzv-conf='abc': must be KEY=VALUE"),
    (["--rdzv-conf", "=1"], "--rdzv-conf='=1': must be KEY=VALUE"),
    (
        ["--rdzv-backend", "zookeeper"],
        "rendezvous backend 'zookeeper': unknown; choose one of c10d, etcd, etcd-v2, static",
    ),
    (["-m", "--no-python"], "-m/--module cannot be combined with --no-python"),
    (["--local-ranks-filter", "x"], "--local-ranks-filter='x': must be local ranks"),
    (["-r", "0:9"], "--redirects='0:9': must be 0 (none), 1 (stdout)"),
    (["-t", "4"], "--tee='4': must be 0 (none), 1 (stdout)"),
    (["--signals-to-handle", "SIGTERM,SIGFOO"], "--signals-to-handle='SIGFOO': must be names of signals"),
    (["--signals-to-handle", "SIGKILL"], "--signals-to-handle='SIGKILL': must be names of signals"),
    (["--master-port", "65536"], "--master-port='65536': must be a port number from 0 to 65535"),
    (["--master-port", "http"], "--master-port='http': must be a port number"),
    (["--shutdown-timeout", "-1"], "--shutdown-timeout='-1': must be a number of at least 0"),
    (["--monitor-interval", "-0.1"], "--monitor-interval='-0.1': must be a number of seconds, at least 0"),
    (["--monitor-interval", "nan"], "--monitor-interval='nan': must be a number of seconds"),
    (["--max-restarts", "-1"], "--max-restarts='-1': must be a number of at least 0"),
    (["--max-restarts", "1_0"], "--max-restarts='1_0': must be a number of at least 0"),
    (["--node-rank", "1"], "--node-rank=1: must be below the number of nodes, 1"),
    (["--start-method", "thread"], "--start-method='thread': must be one of spawn, fork, forkserver"),
    (["--numa-binding", "cpu"], "--numa-binding='cpu': must be one of node, socket, exclusive, core-complex"),
    (["--nproc-per-node", "9" * 20], "must be a number from 1 to 65536, or auto"),
    (["--max-restarts", "9" * 5000], "must be a number of at least 0"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--ma", "1"], "ambiguous option: --ma"),
    # Several nodes.
    (["--nnodes", "2"], "--nnodes=2: several nodes need a rendezvous endpoint: pass --rdzv-backend c10d"),
    (["--nnodes", "1:4", "--rdzv-backend", "c10d"], "4 nodes need a rendezvous endpoint: pass --rdzv-backend c10d"),
    (["--nnodes", "2", "--master-addr", "h", "--node-rank", "2"], "--node-rank=2: must be below the number of nodes"),
    ([*C10D, "--rdzv-conf", "join_timeout=soon"], "--rdzv-conf join_timeout='soon': must be a number of seconds"),
    ([*C10D, "--rdzv-conf", "keep_alive_max_attempt=1"], "keep_alive_max_attempt=1: must be a number of at least 2"),
    ([*C10D, "--rdzv-conf", "is_host=perhaps"], "is_host=perhaps: must be true or false"),
    ([*C10D[:-1], "h:99999"], "'h:99999': port '99999': must be a port number from 0 to 65535"),
    (
        ["--logs-specs", "mine"],
        "--logs-specs=mine: unknown; choose one of default, or install a package that offers it",
    ),
    (["--numa-binding", "moon"], "'moon': must be one of node, socket, exclusive, core-complex"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_usage_error_is_one_line(args: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = usage_error(capfd, *args, "train.py")
    assert words in text
    assert text.count("\n") == 1
    assert text.startswith("elastic-run: ")


def test_script_that_cannot_be_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "script nowhere.py: no such file" in usage_error(capfd, "nowhere.py")
    assert "for a module, pass -m" in usage_error(capfd, "json.tool")
    assert "--no-python no-such-program: no such program" in usage_error(capfd, "--no-python", "no-such-program")
    assert "the script to run is missing" in usage_error(capfd, "--standalone")
    assert f"script {tmp_path}: a directory without a __main__.py" in usage_error(capfd, str(tmp_path))


def test_unreadable_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root can read every file
    assert "script train.py: not readable by this user" in usage_error(capfd, "train.py")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PET_NNODES", "3:1", "PET_NNODES='3:1': must be a number of nodes"),
        ("PET_MAX_RESTARTS", "many", "PET_MAX_RESTARTS='many': must be a number of at least 0"),
        ("PET_MODULE", "yes", "PET_MODULE='yes': must be 1 or 0"),
        ("PYTHON_EXEC", "/no/python", "PYTHON_EXEC=/no/python: no such program"),
        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT='soon': must be a number"),
    ],
)
def test_error_names_the_variable(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    text = usage_error(capfd, "train.py")
    assert words in text
    assert text.count("\n") == 1


def test_option_overrides_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "many")
    assert parse_args(["--max-restarts", "2", "train.py"]).max_restarts == 2


OURS: dict[str, Any] = {
    "config": None,
    "cluster": None,
    "dry_run": False,
    "preload": None,
    "standby": True,
    "restart_window": 0.0,
    "restart_backoff": "0",
    "fatal_exit_codes": "",
    "node_failure_limit": 0,
    "crash_loop": 3,
    "events": None,
    "hang_timeout": "auto",
    "hang_action": "report",
    "token_file": "",
    "store_gate": False,
    "health_check": "",
    "health_check_timeout": 60,
    "hang_native": False,
    "start_timeout": 0,
    "quiet": False,
    "verbose": False,
}
"""Options that torchrun lacks."""


def test_defaults() -> None:
    assert vars(parse_args(["train.py"])) == {
        "nnodes": "1:1",
        "nproc_per_node": "1",
        "rdzv_backend": "static",
        "rdzv_endpoint": "",
        "rdzv_id": "none",
        "rdzv_conf": "",
        "standalone": False,
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "start_method": "spawn",
        **OURS,
        "event_log_handler": "null",
        "role": "default",
        "module": False,
        "no_python": False,
        "run_path": False,
        "log_dir": None,
        "redirects": "0",
        "tee": "0",
        "local_ranks_filter": "",
        "duplicate_stdout_filters": [],
        "duplicate_stderr_filters": [],
        "node_rank": 0,
        "master_addr": "127.0.0.1",
        "master_port": None,
        "local_addr": None,
        "logs_specs": None,
        "numa_binding": None,
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "shutdown_timeout": None,
        "virtual_local_rank": False,
        "training_script": "train.py",
        "training_script_args": [],
    }


@pytest.mark.torch
@pytest.mark.parametrize(
    ("words", "has_one", "preload"),
    [
        ([], False, ["auto"]),
        ([], True, []),
        (["--preload", "none"], False, []),
        (["--preload", "auto"], True, ["auto"]),
    ],
)
def test_what_is_preloaded_by_default(
    words: list[str], has_one: bool, preload: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("train.py").touch()
    monkeypatch.setattr("elastic_launch.cli.command.has_accelerator", lambda: has_one)
    args = parse_args([*words, "train.py"])
    config = config_from_args(args)[0]
    assert config.preload == preload
    shown = {setting.name: setting.value for setting in plan.settings(args, config, {})}
    assert shown["preload"] == ("auto" if preload else plan.NONE), "--dry-run shows what holds"


def test_torchrun_has_the_same_options_and_defaults() -> None:
    code = (
        "import torch.distributed.run as run\n"
        "parser = run.get_args_parser()\n"
        "print(sorted(flag for action in parser._actions for flag in action.option_strings))\n"
        "print(vars(run.parse_args(['train.py'])))\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    torchrun = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    flags, defaults = torchrun.stdout.splitlines()
    ours = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    own = {flag for option in OPTIONS if option.dest in OURS for flag in option.flags}
    assert sorted(ours - own - {"--version", "--completion", "--adopt"}) == eval(flags)
    assert vars(parse_args(["train.py"])) == {**eval(defaults), **OURS}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.name))
def test_every_option_has_both_spellings_and_a_variable(option: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {"nnodes": "2:3", "rdzv_conf": "a=b", "redirects": "3", "tee": "0:1", "local_ranks_filter": "0,1"}
    samples |= {"rdzv_backend": "c10d", "start_method": "fork", "numa_binding": "node", "signals_to_handle": "SIGTERM"}
    samples |= {"preload": "torch,mylib.data", "restart_backoff": "1:60", "fatal_exit_codes": "2,64-78"}
    samples |= {"config": "job.toml"}
    Path("job.toml").touch()
    samples |= {"hang_action": "restart", "cluster": "slurm"}
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")
    text = samples.get(option.dest, "7")
    is_flag = isinstance(option.default, bool)
    words = [] if is_flag else [text]
    by_flag = {flag: getattr(parse_args([flag, *words, "train.py"]), option.dest) for flag in option.flags}
    turning_on = {flag for flag in option.flags if option.default is True and not flag.startswith("--no-")}
    assert all(by_flag.pop(flag) is True for flag in turning_on)
    monkeypatch.setenv(f"PET_{option.dest.upper()}", str(int(not option.default)) if is_flag else text)
    by_variable = getattr(parse_args(["train.py"]), option.dest)
    assert [*by_flag.values()] == [by_variable] * len(by_flag)
    assert by_variable != option.default


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NUMA_BINDING", "")
    monkeypatch.setenv("PET_NNODES", "")
    assert (parse_args(["train.py"]).numa_binding, parse_args(["train.py"]).nnodes) == (None, "1:1")


def test_variable_of_a_flag_can_be_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MODULE", "0")
    assert parse_args(["train.py"]).module is False


@pytest.mark.parametrize(
    "args",
    [
        ["--mo", "1"],
        ["--nnodes", "bad"],
        ["--help"],
        ["--version"],
        ["-m", "x"],
        ["--", "--"],
        ["-1"],
        ["--standalone"],
    ],
)
def test_nothing_after_the_script_is_read(args: list[str]) -> None:
    parsed = parse_args(["--nproc-per-node", "2", "train.py", *args])
    assert (parsed.training_script, parsed.training_script_args) == ("train.py", args)
    assert parsed.standalone is False


@pytest.mark.parametrize(
    ("before", "dest", "value"),
    [
        (["--nproc_per", "2"], "nproc_per_node", "2"),
        (["--nproc-per-node=2"], "nproc_per_node", "2"),
        (["--stand"], "standalone", True),
        (["-r3"], "redirects", "3"),
        (["-m"], "module", True),
        (["--max-r", "3"], "max_restarts", 3),
        (["--rdzv_conf=timeout=1,a=b"], "rdzv_conf", "timeout=1,a=b"),
        (["--standalone", "--"], "standalone", True),
        (["--standb"], "standby", True),
        (["--no-st"], "standby", False),
    ],
)
def test_unique_abbreviations_and_joined_values(before: list[str], dest: str, value: object) -> None:
    parsed = parse_args([*before, "train.py", "--x"])
    assert getattr(parsed, dest) == value
    assert (parsed.training_script, parsed.training_script_args) == ("train.py", ["--x"])


def test_other_programs_can_use_the_parser() -> None:
    known, rest = get_args_parser().parse_known_args(["--nnodes", "2", "--zzz", "train.py", "--lr", "1"])
    assert (known.nnodes, known.training_script_args, rest) == ("2", ["--lr", "1"], ["--zzz"])
    assert isinstance(known, argparse.Namespace)
    parser = get_args_parser()
    parser.add_argument("--mine")
    parser.add_argument("--mine-too", action="store_true")
    parsed = parser.parse_args(["--mine", "value", "--mine-too", "train.py"])
    assert (parsed.mine, parsed.mine_too, parsed.training_script) == ("value", True, "train.py")


def test_parser_can_be_the_parent_of_a_programs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")
    monkeypatch.setenv("PET_STANDALONE", "1")
    parser = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False)
    parser.add_argument("--mine", action="store_true")
    parsed = parser.parse_args(["--nproc_per_node", "2", "-t", "3", "train.py", "--lr", "1"])
    assert isinstance(parsed, argparse.Namespace)
    expected = {**vars(parse_args(["--nproc-per-node", "2", "-t3", "train.py", "--lr", "1"])), "mine": False}
    assert vars(parsed) == expected
    assert config_from_args(parsed)[0].max_restarts == 3
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_parser_has_real_defaults(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    parser = get_args_parser()
    parser.add_argument("--mine", action="store_true")
    assert [parser.get_default(name) for name in ("nproc_per_node", "node_rank", "mine", "module")] == [
        "1",
        0,
        *[False] * 2,
    ]
    assert parser.parse_args(["train.py"]).mine is False
    parser.set_defaults(nproc_per_node=4)
    assert config_from_args(parser.parse_args(["train.py"]))[0].nproc_per_node == 4
    monkeypatch.setenv("PET_NODE_RANK", "3")
    assert get_args_parser().get_default("node_rank") == 3
    parser = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-restarts", "x", "train.py"])
    assert "--max-restarts='x': must be a number of at least 0" in capfd.readouterr().err


def test_values_that_a_program_sets_after_parsing_count() -> None:
    args: Any = parse_args(["train.py"])
    args.nproc_per_node, args.nnodes, args.node_rank, args.max_restarts = 2, 2, "1", "3"
    args.master_addr, args.master_port, args.tee = "127.0.0.1", "4242", Std.ALL
    args.training_script_args, args.module = ["--lr", "1"], True
    made, _, command = config_from_args(args)
    assert (made.min_nodes, made.nproc_per_node, made.rdzv_configs["rank"], made.max_restarts) == (2, 2, 1, 3)
    assert (made.rdzv_endpoint, command[2:]) == ("127.0.0.1:4242", ["module", "train.py", "--lr", "1"])
    args.node_rank = "last"
    with pytest.raises(UsageError, match="--node-rank='last': must be a number"):
        config_from_args(args)


def test_namespace_may_be_the_programs_own() -> None:
    args = argparse.Namespace(**vars(parse_args(["train.py"])))
    args.nnodes, args.nproc_per_node, args.node_rank = "2", "2", 1
    del args.preload, args.standby, args.health_check  # it was written for torchrun
    assert config_from_args(args)[0].rdzv_endpoint == "127.0.0.1:0"


def test_options_that_torchrun_lacks_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(OURS) == OWN
    parser = get_args_parser(own=False)
    parser.add_argument("--config", type=int)
    args = parser.parse_args(["--config", "7", "train.py"])
    assert args.config == 7
    monkeypatch.setenv("PET_RESTART_WINDOW", "60")
    assert (read_options(args, own=False).config, read_options(args, own=False).restart_window) == (None, 60)


def test_local_rank_is_an_argument_without_use_env() -> None:
    args = parse_args(["train.py", "-x"])
    args.use_env = False
    assert config_from_args(args)[2][2:] == ["script", "train.py", "--local-rank=${local_rank}", "-x"]
    args.no_python = True
    with pytest.raises(UsageError, match="--no-python needs --use-env"):
        config_from_args(args)


def test_command_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*args: str) -> tuple[Any, list[str]]:
        return config_from_args(parse_args(args))[1:]

    python = [sys.executable, "-u", BOOTSTRAP]
    assert command("train.py", "-x") == (python[0], [*python[1:], "script", "train.py", "-x"])
    assert command("-m", "pkg.mod", "-x") == (python[0], [*python[1:], "module", "pkg.mod", "-x"])
    assert command("--no-python", "true", "-x") == ("true", ["-x"])
    assert command("-", "-x") == (python[0], ["-u", "-", "-x"])
    assert command("--no-python", "--run-path", "train.py")[0] == sys.executable
    monkeypatch.setenv("PYTHON_EXEC", "/bin/sh")
    assert command("train.py")[0] == "/bin/sh"
    assert command("--run-path", "train.py")[0] == sys.executable


def test_config_holds_the_options() -> None:
    made = config(
        "--nproc-per-node", "3", "--max-restarts", "2", "--role", "trainer", "--rdzv-id", "j", "--log-dir", "l"
    )
    assert (made.nproc_per_node, made.max_restarts, made.role, made.run_id) == (3, 2, "trainer", "j")
    assert made.logs_specs is not None
    assert made.logs_specs.root_log_dir == "l"
    assert config("--rdzv-conf", "timeout=9").rdzv_configs == {"timeout": "9", "rank": 0}
    assert config("--master-addr", "h", "--master-port", "7").rdzv_endpoint == "h:7"
    assert config("--master-addr", "::1").rdzv_endpoint == "[::1]:0"
    assert config("--standalone", "--rdzv-id", "j").run_id == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h", ("h", 0)),
        ("h:1", ("h", 1)),
        ("[::1]:2", ("::1", 2)),
        ("[::1]", ("::1", 0)),
        ("::1", ("::1", 0)),
        ("10.0.0.1:29500", ("10.0.0.1", 29500)),
    ],
)
def test_endpoint(text: str, expected: tuple[str, int]) -> None:
    assert split_endpoint(text) == expected


@pytest.mark.parametrize("text", ["h:x", "h:65536", "h:", "h:-1"])
def test_endpoint_with_a_bad_port(text: str) -> None:
    with pytest.raises(UsageError, match="must be a port number"):
        split_endpoint(text)


def test_text_forms() -> None:
    assert parse_min_max_nnodes("1:4") == (1, 4)
    assert parse_min_max_nnodes("2") == (2, 2)
    assert parse_rdzv_conf(" a=1, b = x=y ,") == {"a": "1", "b": "x=y"}
    assert parse_rdzv_conf("'a=1,b=2'") == {"a": "1", "b": "2"}
    assert parse_ranks("0, 2") == {0, 2}
    assert parse_ranks("") is None
    assert parse_signals("SIGTERM, SIGUSR1") == {15, 10}
    assert parse_filters("a,b,,c") == ["a", "b,c"]
    assert (parse_seconds("0.5"), parse_seconds("0")) == (0.5, 0)
    with pytest.raises(UsageError, match="--option='0': must be a number of seconds above 0"):
        parse_seconds("0", "--option=", above_zero=True)
    assert Std.from_str("3") == Std.ALL
    assert Std.from_str("0:1,12:2") == {0: Std.OUT, 12: Std.ERR}
    assert determine_local_world_size("4") == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_nodes": 2},
        {"min_nodes": 0},
        {"nproc_per_node": 0},
        {"max_restarts": -1},
        {"shutdown_timeout": -1},
        {"signals_to_handle": "SIGFOO"},
    ],
)
def test_config_from_python_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LaunchConfig(**{"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1, **wrong})


def test_defect_of_the_launcher_is_reported_as_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("elastic_launch.cli.command.run", fail)
    assert cli_status("train.py") == 70
    text = capfd.readouterr().err
    assert "RuntimeError: a defect" in text
    assert "this is a defect of the launcher" in text


def test_help(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 110):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli_status("--help") == 0
        text = capfd.readouterr().out
        assert all(f"--{option.name}" in text for option in OPTIONS)
        assert re.findall(r"^(\w.+):$", text, re.MULTILINE)[1 : len(GROUPS) + 1] == list(GROUPS)
        assert "--nproc_per_node 2" in text
        assert max(map(len, text.splitlines())) <= columns
        assert text.endswith(EPILOG.partition("\n\n")[2]), "examples keep their lines"


def test_examples_of_the_help_can_be_typed() -> None:
    examples = re.findall(r"^    elastic-run (.+)$", EPILOG.replace("\\\n", ""), re.MULTILINE)
    scripts = [parse_args(example.split()).training_script for example in examples]
    assert scripts == ["train.py", "train.py", "mypackage.train"]


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    assert cli_status("--version") == 0
    assert capfd.readouterr() == (f"elastic-run {__version__} (Python {python})\n", "")
    assert cli_status("--standalone", "--version", "nowhere.py") == 0
    assert "expected one argument" in usage_error(capfd, "--nnodes", "--version")
    torchruns = [flag for option in OPTIONS if option.dest not in OURS for flag in option.flags]
    assert not [flag for flag in torchruns if flag.startswith("--ve")], "--version makes its abbreviations ambiguous"


def test_no_argument_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    text = usage_error(capfd)
    assert text.startswith("usage: elastic-run [OPTION ...] SCRIPT [ARGUMENT ...]\n")
    assert "elastic-run --help" in text
    [example] = [line.split() for line in text.splitlines() if line.startswith("    ")]
    made, _, (*_, script) = config_from_args(parse_args(example[1:]))
    assert (example[0], made.nproc_per_node, script) == ("elastic-run", 2, "train.py")


@pytest.mark.parametrize("module", ["elastic_launch", "elastic_launch.run"])
def test_module_is_the_program(module: str) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-W", "error", "-m", module, *args], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run("--version") == (0, f"{VERSION}\n", "")
    assert run() == (2, "", SHORT_USAGE)
    Path("train.py").write_text("import sys; sys.exit(7)")
    assert run("train.py")[0] == 7


def test_help_and_version_import_nothing_heavy() -> None:
    code = "import sys; from elastic_launch.cli.options import get_args_parser; parser = get_args_parser()\n"
    code += (
        "heavy = {'elastic_launch.agent', 'elastic_launch.launch', 'logging', 'json', 'importlib.metadata', 'shutil'}\n"
    )
    code += "print(sorted(heavy & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_rank_has_one_choice_of_streams() -> None:
    with pytest.raises(UsageError, match="'0:1,0:2': has rank 0 twice"):
        Std.from_str("0:1,0:2")


@pytest.mark.parametrize("words", [["-r", "7:1"], ["-t", "1:3,7:1"], ["--local-ranks-filter", "0,7"]])
def test_ranks_that_are_not_there_are_warned_about(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").touch()
    config_from_args(parse_args(["--nproc-per-node", "2", *words, str(tmp_path / "train.py")]))
    assert capfd.readouterr().err.endswith(": this node has no local rank 7, only 0 to 1\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_directory_that_may_not_be_searched_is_no_missing_script(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    (folder / "train.py").touch()
    code = (
        "import os, sys\n"
        "from elastic_launch.run import config_from_args, parse_args\n"
        "os.chdir('/'); args = parse_args(sys.argv[1:]); os.setuid(12345)\n"
        "try: config_from_args(args)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(folder / "train.py")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == f"script {folder}/train.py: a directory of its path may not be searched by this user\n"


def test_heartbeats_without_a_pause_are_refused() -> None:
    config = LaunchConfig(2, 2, 1, rdzv_endpoint="localhost", rdzv_configs={"keep_alive_interval": "1e-9"})
    with pytest.raises(UsageError, match=r"keep_alive_interval='1e-9': must be at least 0\.01 seconds"):
        create_rendezvous(config, {}, print)


def test_an_own_store_that_starts_slowly_is_not_taken_for_another_program() -> None:
    backend = C10dBackend("localhost", 29400, True, {})
    error = NotAStoreError("the store accepts connections, but", certain=False)
    assert backend.explain(error) is error
    backend.serves = True
    assert "which this node hosts, is still starting" in str(backend.explain(error))
