"""The file of ``--config``: what it may hold, what comes first, and its error messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.cli import config_file
from elastic_launch.cli.options import OPTIONS
from elastic_launch.run import config_from_args, parse_args

# Each option as a file may have it, and as words of a command line.
VALUES = [
    ("nnodes = 2", ["--nnodes", "2"]),
    ('nnodes = "2:4"', ["--nnodes", "2:4"]),
    ("nproc_per_node = 8", ["--nproc-per-node", "8"]),
    ("standalone = true", ["--standalone"]),
    ("rdzv-id = 42", ["--rdzv-id", "42"]),
    ('rdzv-endpoint = ["a:1", "b:2"]', ["--rdzv-endpoint", "a:1,b:2"]),
    ('rdzv-conf = "join_timeout=6,is_host=true"', ["--rdzv-conf", "join_timeout=6,is_host=true"]),
    ("[rdzv-conf]\njoin_timeout = 6\nis_host = true", ["--rdzv-conf", "join_timeout=6,is_host=true"]),
    ('rdzv-conf = ["join_timeout=6", "is_host=true"]', ["--rdzv-conf", "join_timeout=6,is_host=true"]),
    ("restart-window = 0.5", ["--restart-window", "0.5"]),
    ('fatal-exit-codes = [2, "64-78"]', ["--fatal-exit-codes", "2,64-78"]),
    ('signals-to-handle = ["SIGTERM", "SIGINT"]', ["--signals-to-handle", "SIGTERM,SIGINT"]),
    ('preload = ["torch", "mylib.data"]', ["--preload", "torch,mylib.data"]),
    ("preload = []", ["--preload", ""]),
    ("redirects = 3", ["--redirects", "3"]),
    ('tee = ["0:1", "1:2"]', ["--tee", "0:1,1:2"]),
    ("local-ranks-filter = [0, 1]", ["--local-ranks-filter", "0,1"]),
    ('duplicate-stderr-filters = ["a", "b,c"]', ["--duplicate-stderr-filters", "a,b,,c"]),
]


@pytest.fixture(autouse=True)
def _in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(text: str, *args: str) -> dict[str, Any]:
    """The values that a command line has with a file of this content."""
    Path("job.toml").write_text(text)
    return vars(parse_args(["--config", "job.toml", *args]))


def error(capfd: pytest.CaptureFixture[str], text: str, *args: str) -> str:
    """The message with which a file of this content is refused."""
    with pytest.raises(SystemExit, match="2"):
        parse(text, *args)
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(("text", "words"), VALUES, ids=[text.replace("\n", " ") for text, _ in VALUES])
def test_natural_values_mean_what_the_command_line_means(text: str, words: list[str]) -> None:
    assert parse(text, "train.py") == {**vars(parse_args([*words, "train.py"])), "config": "job.toml"}


def test_every_list_is_an_option() -> None:
    assert {*config_file.LISTS, *config_file.NOT_IN_FILES} <= {option.name for option in OPTIONS}


def test_script_and_arguments_are_those_of_the_file_unless_they_are_given() -> None:
    text = 'script = "train.py"\nargs = ["--lr", 0.1, "x"]'
    parsed = parse(text)
    assert (parsed["training_script"], parsed["training_script_args"]) == ("train.py", ["--lr", "0.1", "x"])
    parsed = parse(text, "other.py", "--epochs", "2")
    assert (parsed["training_script"], parsed["training_script_args"]) == ("other.py", ["--epochs", "2"])
    assert parse('script = "train.py"', "--max-restarts", "1")["training_script_args"] == []


def test_option_comes_before_variable_before_file_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "max-restarts = 1\nquiet = true\nmodule = true"
    assert parse("", "train.py")["max_restarts"] == 0
    assert parse(text, "train.py")["max_restarts"] == 1
    monkeypatch.setenv("PET_MAX_RESTARTS", "2")
    monkeypatch.setenv("PET_MODULE", "0")
    parsed = parse(text, "train.py")
    assert (parsed["max_restarts"], parsed["quiet"], parsed["module"]) == (2, True, False)
    assert parse(text, "--max-restarts", "3", "train.py")["max_restarts"] == 3


def test_the_source_of_each_value_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_ROLE", "trainer")
    Path("job.toml").write_text('script = "train.py"\nnnodes = 1')
    args: Any = parse_args(["--config", "job.toml", "--max-restarts", "1"])
    assert args.given == {
        "config": "--config",
        "max_restarts": "--max-restarts",
        "role": "PET_ROLE",
        "nnodes": "job.toml",
        "training_script": "job.toml",
    }


def test_variable_names_the_file(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    Path("job.toml").write_text('script = "train.py"\nmax-restarts = 1')
    monkeypatch.setenv("PET_CONFIG", "job.toml")
    assert parse_args([]).max_restarts == 1
    monkeypatch.setenv("PET_CONFIG", "nowhere.toml")
    with pytest.raises(SystemExit):
        parse_args([])
    assert "PET_CONFIG=nowhere.toml: No such file or directory" in capfd.readouterr().err


def test_file_sets_the_master_address_of_a_static_job() -> None:
    Path("train.py").touch()
    Path("job.toml").write_text('nnodes = 2\nmaster-addr = "h"\nnode-rank = 1\nscript = "train.py"')
    made, _, _ = config_from_args(parse_args(["--config", "job.toml"]))
    assert (made.rdzv_endpoint, made.rdzv_configs["rank"]) == ("h:0", 1)


WRONG = [
    ("max-restart = 1", "job.toml: unknown key max-restart: did you mean max-restarts?"),
    ("nproc_per_nod = 1", "job.toml: unknown key nproc_per_nod: did you mean nproc-per-node?"),
    ("zzz = 1", "job.toml: unknown key zzz: must be an option's long name without the dashes, script or args"),
    ('config = "other.toml"', "job.toml: unknown key config"),
    ("[restarts]\nmax-restarts = 1", "job.toml: unknown key restarts"),
    ("max-restarts = 1\nmax_restarts = 2", "job.toml: max-restarts is given twice"),
    ('max-restarts = "many"', "job.toml: max-restarts='many': must be a number of at least 0"),
    ("max-restarts = 1.5", "job.toml: max-restarts='1.5': must be a number of at least 0"),
    ("max-restarts = true", "job.toml: max-restarts=true: must be a number or a text, as in --max-restarts N"),
    ("nnodes = [1, 4]", "job.toml: nnodes=[1, 4]: must be a number or a text, as in --nnodes MIN[:MAX]"),
    ("restart-window = inf", "job.toml: restart-window='inf': must be a number of seconds, at least 0"),
    ('standalone = "yes"', "job.toml: standalone='yes': must be true or false"),
    ("preload = [[1]]", "job.toml: preload=[[1]]: must be a list, or a text as in --preload MODULES"),
    ("preload = ['1']", "job.toml: preload='1': must be names of modules"),
    ("[preload]\na = 1", "job.toml: preload={'a': 1}: must be a list, or a text as in --preload MODULES"),
    ("rdzv-conf = true", "job.toml: rdzv-conf=true: must be a list or a table, or a text as in --rdzv-conf CONF"),
    ("[rdzv-conf]\na = [1]", "job.toml: rdzv-conf={'a': [1]}: must be a list or a table"),
    ("script = 1", "job.toml: script=1: must be a text, the path of the script"),
    ("args = 1", "job.toml: args=1: must be a list of texts and numbers"),
    ("args = ['a', [1]]", "job.toml: args=['a', [1]]: must be a list of texts and numbers"),
    ("nnodes", "--config=job.toml: not a TOML file: Expected '=' after a key"),
    ("", "the script to run is missing"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text.replace("\n", " ") for text, _ in WRONG])
def test_error_names_file_and_key_and_what_is_allowed(text: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in error(capfd, text)


def test_file_that_cannot_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    for path, why in (("nowhere.toml", "No such file or directory"), (os.curdir, "Is a directory")):
        with pytest.raises(SystemExit):
            parse_args(["--config", path, "train.py"])
        assert f"--config={path}: {why}" in capfd.readouterr().err
    Path("latin.toml").write_bytes(b'role = "\xff"')
    with pytest.raises(SystemExit):
        parse_args(["--config", "latin.toml", "train.py"])
    assert "--config=latin.toml: not a TOML file" in capfd.readouterr().err


def test_value_that_another_source_overrides_is_not_read() -> None:
    assert parse('max-restarts = "many"', "--max-restarts", "2", "train.py")["max_restarts"] == 2


def test_example_in_the_docs_is_read() -> None:
    page = (Path(config_file.__file__).parents[2] / "docs/operating.md").read_text()
    example = page.partition("```toml\n")[2].partition("```")[0]
    parsed = parse(example)
    assert (parsed["training_script"], parsed["training_script_args"]) == ("train.py", ["--epochs", "10"])
    assert (parsed["nnodes"], parsed["rdzv_conf"]) == ("2:4", "join_timeout=600")
    assert parsed["duplicate_stderr_filters"] == ["Error", "out of memory, aborting"]
