"""Completion of the command line, in real shells that somebody types into."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_launch.cli import completion
from elastic_launch.cli.completion import script
from elastic_launch.cli.options import SHELLS, get_args_parser
from tests.support.consoles import raw_terminal
from tests.support.jobs import Job
from tests.support.waiting import DEADLINE

COMMANDS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
# The shells print what they have been given, instead of a launch.
FUNCTIONS = {
    "bash": "elastic-run() { printf 'GOT'; printf '<%s>' \"$@\"; echo END; }\n",
    "zsh": "elastic-run() { printf 'GOT'; printf '<%s>' \"$@\"; echo END; }\nautoload -U compinit; compinit -D -u\n",
    "fish": "function elastic-run; printf GOT; printf '<%s>' $argv; echo END; end\n",
}
PROMPTS = {
    "bash": "PS1='READY> '\nbind 'set enable-bracketed-paste off'\n",
    "zsh": "PROMPT='READY> '\nunset zle_bracketed_paste\nunsetopt PROMPT_SP\n",
    "fish": "function fish_prompt; printf 'READY> '; end\n",
}


class Shell:
    """An interactive shell in a terminal, which completes."""

    def __init__(self, name: str, folder: Path) -> None:
        assert shutil.which(name), f"install {name}: its completion is tested in it"
        setup = folder / f"setup.{name}"
        setup.write_text(FUNCTIONS[name] + script(name) + PROMPTS[name])
        self.fd, theirs = raw_terminal()
        os.set_blocking(self.fd, False)
        self.process = subprocess.Popen(
            COMMANDS[name],
            cwd=folder / "work",
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # a shell wants a terminal of its own
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "xterm", "LANG": "C.UTF-8"},
        )
        os.close(theirs)
        self.seen = b""
        try:
            self.type(f" . {setup}\n")
            self.wait_for("READY> ")
        except BaseException:
            self.close()
            raise

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Wait until the shell has shown something since the last call. Returns the first group of the pattern."""
        end = time.monotonic() + DEADLINE
        while not (found := re.search(pattern.encode(), self.seen)):
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.fd, 1 << 16)
            except OSError:
                raise AssertionError(f"the shell has ended: {self.seen!r}") from None
        self.seen = self.seen[found.end() :]
        return found[found.re.groups and 1].decode()

    def complete(self, *typed: str) -> list[str]:
        """Type words, each of which may end with a tab, and return the words that the shell makes of them."""
        text = "".join(word if word.endswith(("\t", " ")) else f"{word} " for word in typed)
        self.type(f"elastic-run {text}\n")
        words = self.wait_for("GOT((?:<[^>]*>)+)END")
        self.wait_for("READY> ")
        return re.findall("<([^>]*)>", words)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.fd)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    work = tmp_path / "work"
    (work / "logs").mkdir(parents=True)
    for name in ("train.py", "trace.txt", "log.txt", "job.toml", "data.bin"):
        (work / name).touch()
    shell = Shell(request.param, tmp_path)
    yield shell
    shell.close()


def test_options_values_and_files_are_completed(shell: Shell) -> None:
    def complete(*typed: str) -> list[str]:
        # zsh writes --option=VALUE, and drops the slash of a directory when a blank follows.
        return " ".join(shell.complete(*typed)).replace("=", " ").replace("/", "").split()

    assert complete("--rdzv-b\t", "c1\t", "trai\t") == ["--rdzv-backend", "c10d", "train.py"]
    completed = complete("--num\t", "core\t", "-r", "3", "--standa\t", "train.py")
    assert completed == ["--numa-binding", "core-complex", "-r", "3", "--standalone", "train.py"]
    completed = complete("--log-d\t", "lo\t", " ", "--conf\t", "jo\t", "train.py")
    assert completed == ["--log-dir", "logs", "--config", "job.toml", "train.py"]


def test_value_may_follow_an_equals_sign(shell: Shell) -> None:
    assert shell.complete("--start-method=forks\t", "train.py") == ["--start-method=forkserver", "train.py"]


def test_what_follows_the_script_is_its_own(shell: Shell) -> None:
    """Neither options nor scripts are offered there, but files are."""
    completed = shell.complete("--max-restarts", "3", "train.py", "--stand\t", " ", "da\t")
    assert completed == ["--max-restarts", "3", "train.py", "--stand", "data.bin"]


def test_values_are_not_taken_for_the_script(shell: Shell) -> None:
    """Not even with an underscore in the option's name."""
    completed = shell.complete("--nproc_per_node", "2", "--role", "x", "trai\t")
    assert completed == ["--nproc_per_node", "2", "--role", "x", "train.py"]


def test_program_of_any_kind_is_completed(shell: Shell) -> None:
    assert shell.complete("--no-python", "./trace\t") == ["--no-python", "./trace.txt"]


def test_every_option_of_the_parser_is_offered() -> None:
    parser = get_args_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    names = {flag for flag in flags if "_" not in flag}
    assert {flag for option in completion.ALL for flag in option.shown_flags if flag.startswith("--")} == names
    assert completion.CHOICES.keys() <= {option.name for option in completion.ALL}
    for shell in SHELLS:
        text = script(shell)
        missing = [name for name in names if (f" -l {name[2:]} " if shell == "fish" else name) not in text]
        assert not missing, shell


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_printed_for_the_shell_to_read(shell: str, job: Job) -> None:
    result = job.run("--completion", shell)
    assert (result.returncode, result.stdout, result.stderr) == (0, script(shell), "")
    checked = subprocess.run([shell, "-n"], input=result.stdout, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_unknown_shell_is_a_usage_error(job: Job) -> None:
    result = job.run("--completion", "tcsh")
    assert result.returncode == 2
    assert "choose from 'bash', 'zsh', 'fish'" in result.stderr
    assert result.stderr.count("\n") == 1
