"""What is published: a wheel and a source archive, built and used as a stranger would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from elastic_launch import __version__
from elastic_launch.cli.completion import script
from elastic_launch.cli.options import OPTIONS
from tests.support.pythons import pythons
from tests.support.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
WORKER = """
import os, sys
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(3)
os.write(1, (sys.argv[1] + os.environ["RANK"] + "\\n").encode())
"""

PATIENCE = 5 * DEADLINE
"""Seconds for a program that works hard, beside others."""

pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.timeout(2 * PATIENCE)]


def run(*command: str | Path, **env: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=inherited | env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive; the wheel is built from the archive, as installers do."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel, source


def test_wheel_is_pure_and_complete(built: tuple[Path, Path]) -> None:
    wheel, source = built
    assert wheel.name == f"elastic_launch-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        shared = {
            name.partition(".data/data/share/")[2]: opened.read(name).decode()
            for name in names
            if ".data/data/share/" in name
        }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "elastic_launch").rglob("*.py")}
    assert modules | {"elastic_launch_compat.pth"} <= names
    assert {"elastic_launch/py.typed", "elastic_launch/operate/ui/index.html"} <= names
    assert not [name for name in names if "tests" in name or name.endswith(".pyc")]
    assert shared["bash-completion/completions/elastic-run"] == script("bash")
    assert shared.keys() >= {"zsh/site-functions/_elastic-run", "fish/vendor_completions.d/elastic-run.fish"}
    manual = shared["man/man1/elastic-run.1"].replace(r"\-", "-")
    assert all(f"--{option.name}" in manual for option in OPTIONS)
    assert all(f"elastic-job {name}" in shared["man/man1/elastic-job.1"].replace(r"\-", "-") for name in ("ps", "ui"))
    assert not (source / "build").exists(), "the build leaves nothing in the source"


def test_wheel_works_in_a_fresh_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)
    pip = [sys.executable, "-m", "pip", "--python", str(env / "bin/python"), "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[0])
    assert run(env / "bin/elastic-run", "--version").startswith(f"elastic-run {__version__} ")
    assert "usage: elastic-run" in run(env / "bin/elastic-run", "--help")
    assert run(env / "bin/elastic-job", "--version") == f"elastic-job {__version__}\n"
    assert (env / "share/man/man1/elastic-run.1").exists()
    (tmp_path / "train.py").write_text(WORKER)
    words = ("-q", "--nproc-per-node", "2", "--max-restarts", "1", tmp_path / "train.py", "rank ")
    shown = run(env / "bin/elastic-run", *words, OMP_NUM_THREADS="1")
    assert sorted(shown.splitlines()[-2:]) == ["rank 0", "rank 1"]


def test_every_python_on_this_host(built: tuple[Path, Path], tmp_path: Path) -> None:
    """The header of the tests' output says which these are."""
    with zipfile.ZipFile(built[0]) as opened:
        opened.extractall(tmp_path / "site")
    (tmp_path / "train.py").write_text(WORKER)
    words = ("-q", "--nproc-per-node", "2", "--max-restarts", "1", tmp_path / "train.py", "rank ")
    for version, python in pythons().items():
        environ = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        command = (python, "-W", "error", "-m", "elastic_launch")
        assert run(*command, "--version", **environ) == f"elastic-run {__version__} (Python {version})\n"
        assert sorted(run(*command, *words, **environ).splitlines()[-2:]) == ["rank 0", "rank 1"], version


def test_source_archive_has_tests_that_run(built: tuple[Path, Path]) -> None:
    words = ("-p", "no:cacheprovider", "-q", "tests/decisions/test_text.py")
    source = built[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
