"""The documentation: its commands run, its links lead somewhere, and what it quotes of the code is there."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from elastic_launch.cli.options import OPTIONS
from elastic_launch.operate.__main__ import COMMANDS
from elastic_launch.run import get_args_parser
from tests.support.pages import PAGES, ROOT, SHOWN_ONLY, Block, blocks
from tests.support.ports import free_port

BLOCKS = [block for page in PAGES for block in blocks(page)]
SOURCES = sorted((ROOT / "elastic_launch").rglob("*.py"))
FLAGS = get_args_parser()._option_string_actions.keys()
PATIENCE = 500.0
"""Seconds for a program that works hard, beside others: those that import torch, and the one that builds the site."""


def runs(block: Block) -> bool:
    return not block.reason and (bool(block.file) or block.language in ("python", "console", "bash"))


# ---- blocks


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_is_known_and_valid(block: Block) -> None:
    """Whatever is not run is parsed, with the options that its commands have."""
    match block.language:
        case "python":
            compile(block.text, block.place, "exec")
        case "toml":
            tomllib.loads(block.text)
        case "json":
            json.loads(block.text)
        case "yaml":
            list(yaml.safe_load_all(block.text))
        case "console" | "bash":
            for command in block.commands:
                check_options(command)
        case language:
            assert language in SHOWN_ONLY or block.reason, "a language that no test knows, and no reason"


def check_options(command: str) -> None:
    """Check that the options of our programs in a command exist, up to the script."""
    words = re.split(r"\s", command.partition("#")[0])
    if "elastic-job" in words:
        name = words[words.index("elastic-job") + 1]
        assert name in COMMANDS or name.isupper(), command
    if "elastic-run" in words:
        before_script = itertools.takewhile(
            lambda word: word != "--" and not word.endswith(".py"), words[words.index("elastic-run") :]
        )
        assert {word.partition("=")[0].rstrip(")") for word in before_script if word.startswith("--")} <= FLAGS, command


TOGETHER = [page for page in PAGES if any(runs(block) for block in blocks(page))]


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("page", TOGETHER, ids=lambda page: page.name)
def test_blocks_run_in_the_order_of_the_page(page: Path, tmp_path: Path) -> None:
    """In one directory for each page, where the earlier blocks have left their files."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("elastic-run", "elastic_launch"), ("elastic-job", "elastic_launch.operate"), ("python", "")):
        words = shlex.join([sys.executable, *(["-m", module] if module else [])])
        (programs / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (programs / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PORT": str(free_port())}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    if "import torch" in page.read_text():
        env["PET_PRELOAD"] = "torch"  # what two workers import in half the time
    for block in filter(runs, blocks(page)):
        if block.file:
            (work / block.file).write_text(block.text)
        else:
            script = block.text if block.language == "python" else "\n".join(["set -e", *block.commands])
            (work / "block").write_text(script)
            command = [sys.executable if block.language == "python" else "bash", "block"]
            done = subprocess.run(
                command,
                cwd=work,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, f"{block.place}:\n{done.stdout}"
            for line in shown_lines(block):
                assert re.search(line, done.stdout, re.MULTILINE), f"{block.place}: {line}\n{done.stdout}"


def shown_lines(block: Block) -> Iterator[str]:
    """Return patterns for the lines that the page shows below a command.

    Left out are those that name a directory or the number of CPUs, and which of two ranks was seen to fail first.
    """
    if block.language == "console":
        for line in block.text.replace("\\\n", " ").splitlines():
            if not line.startswith("$ ") and not re.search("OMP_NUM_THREADS|output of the workers|: stopping ", line):
                yield rf"^{re.escape(line)}"


# ---- what pages quote


@functools.cache
def templates() -> set[str]:
    """Return the texts in the code, with ``…`` for what is filled in."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add(re.sub("…+", "…", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_that_are_explained_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        message
        for row in re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
        for message in row.strip("`").split("` or `")
    ]
    assert len(quoted) > 60
    texts = "\n".join(templates())
    missing = [message for message in quoted if message.strip("…").strip() not in texts]
    assert not missing, "these messages are not in the code"


def test_every_variable_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    prefixes = "TORCHELASTIC_|TORCH_|ELASTIC_LAUNCH_"
    inner = {"ELASTIC_LAUNCH_PART", "TORCH_DEVICE_BACKEND_AUTOLOAD"}  # of the launcher's own processes
    used = {name for text in templates() for name in re.findall(rf"^(?:{prefixes})[A-Z_]+$", text)}
    assert {f"`{name}`" for name in used - inner} <= set(re.findall(r"`[A-Z_]+`", page))


def test_options_that_pages_name_exist() -> None:
    ours = {option.name for option in OPTIONS} | {"help", "version", "completion"}
    for row in re.findall(r"^\| `--([a-z-]+)[ `]", (ROOT / "docs" / "recovery.md").read_text(), re.MULTILINE):
        assert row in ours


# ---- the site


@pytest.mark.timeout(2 * PATIENCE)
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every link and anchor leads somewhere, every docstring can be shown, and the tables are those of the code."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    options = (tmp_path / "site" / "reference.html").read_text()
    assert all(f"--{option.name}" in options and option.variable in options for option in OPTIONS)
    api = (tmp_path / "site" / "api.html").read_text()
    assert "LaunchConfig" in api
    assert "&lt;!-- generated" not in api
    sources = (tmp_path / "site" / "source" / "examples").iterdir()
    assert {path.name for path in sources} >= {"slurm.sbatch", "kubernetes.yaml"}
    foreign = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*rel="stylesheet"|<script src="(https?:[^"]+)"', api)
    assert not foreign, "the site loads nothing from elsewhere"


def test_pictures_are_drawn_from_their_text() -> None:
    run = [sys.executable, "-B", "-c", "import json, pictures; print(json.dumps(pictures.pictures()))"]
    drawn = json.loads(subprocess.check_output(run, cwd=ROOT / "docs" / "tools", text=True))
    for name, text in drawn.items():
        assert (ROOT / "docs" / name).read_text() == text, f"docs/{name}: run python docs/tools/pictures.py"
