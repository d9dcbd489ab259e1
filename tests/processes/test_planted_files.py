"""Files, links and pipes that another user has planted where the job's files go."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_launch.config import Std
from elastic_launch.errors import UnavailableError
from elastic_launch.host.files import belongs_to_another, open_regular, replaceable_part
from elastic_launch.logs.job_files import DefaultLogsSpecs, JobFiles
from elastic_launch.operate.logs import LogFile, Output, show_last
from elastic_launch.operate.ui.tail import Tail
from elastic_launch.workers import bootstrap
from tests.support.jobs import Job
from tests.support.waiting import DEADLINE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


def plant(path: Path, kind: str, target: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the user's."""
    path = tmp_path / "precious"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_only_a_regular_file_is_opened(tmp_path: Path, precious: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.mkdir() if kind == "directory" else plant(path, kind, precious)
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDWR):
        with pytest.raises(OSError):  # noqa: PT011 - each kind has an error of its own
            open_regular(str(path), flags)
    assert precious.read_text() == "precious"
    with open(precious, "w", opener=open_regular) as file:
        file.write("new")
    assert precious.read_text() == "new"


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_log_goes_nowhere_else(job: Job, precious: Path, kind: str) -> None:
    folder = job.path / "logs/j1/attempt_0/0"
    folder.mkdir(parents=True)
    plant(folder / "stdout.log", kind, precious)
    script = job.script("print('out')")
    done = job.run("--nproc-per-node", "1", "--rdzv-id", "j1", "--log-dir", "logs", "-r", "1", script)
    assert done.returncode == 0
    assert "the rest of this output is not kept; the job continues" in done.stderr
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_stacks_of_a_hung_worker_go_nowhere_else(job: Job, precious: Path, kind: str) -> None:
    """A pipe without a reader held up the agent, whatever signals it got."""
    script = job.script("signal.signal(15, signal.SIG_IGN); mark('up'); wait()")
    process = job.start(
        "--nproc-per-node", "1", "--rdzv-id", "j1", "--log-dir", "logs", "--shutdown-timeout", "1", script
    )
    job.wait_for("0.0 up")
    plant(job.path / "logs/j1/attempt_0/0/stacks.log", kind, precious)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 143
    assert precious.read_text() == "precious"


def test_a_worker_does_not_wait_for_a_pipe_in_place_of_its_error_file(job: Job) -> None:
    script = job.script("os.mkfifo(os.environ['TORCHELASTIC_ERROR_FILE'])\nraise ValueError('boom')")
    done = job.run("--nproc-per-node", "1", "--log-dir", "logs", script)
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_an_error_file_is_written_beside_nothing_planted(tmp_path: Path, precious: Path, kind: str) -> None:
    path = tmp_path / "error.json"
    plant(Path(f"{path}.{os.getpid()}"), kind, precious)
    bootstrap.write_record({"message": "boom"}, str(path))
    assert bootstrap.read_record(str(path)) == {"message": "boom"}
    assert stat.S_ISREG(path.lstat().st_mode)
    assert precious.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["error.json", "precious"]


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_an_error_file_is_not_read_elsewhere(tmp_path: Path, kind: str) -> None:
    record = tmp_path / "record"
    record.write_text('{"message": "boom"}')
    plant(tmp_path / "error.json", kind, record)
    code = f"from elastic_launch.workers.bootstrap import read_record; read_record({str(tmp_path / 'error.json')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert "OSError" in run.stderr


# --- directories


@needs_root
@pytest.mark.parametrize("theirs", ["logs", "logs/j1"])
def test_a_directory_that_another_user_has_put_there_is_refused(tmp_path: Path, theirs: str) -> None:
    shared = tmp_path / "shared"
    (shared / "logs/j1").mkdir(parents=True)
    for path in (shared, shared / "logs"):
        path.chmod(0o1777)
    os.chown(shared / theirs, STRANGER, STRANGER)
    specs = DefaultLogsSpecs(str(shared / "logs"), redirects=Std.ALL)
    with pytest.raises(UnavailableError, match=f"^--log-dir={shared}/logs: {shared}/{theirs} belongs to another user"):
        JobFiles(specs, "j1", str(tmp_path))


@needs_root
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    for path in (shared, mine):
        path.mkdir()
    shared.chmod(0o1777)
    (shared / "j1").symlink_to(mine)
    os.chown(shared / "j1", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(UnavailableError, match="shared/j1 belongs to another user"):
        JobFiles(DefaultLogsSpecs(str(shared)), "j1", str(tmp_path))


@needs_root
def test_a_directory_that_an_administrator_has_given_to_a_group_is_used(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir(mode=0o2775)
    os.chown(tmp_path / "project", STRANGER, STRANGER)
    assert belongs_to_another(str(tmp_path / "project/j1")) == ""


def test_who_can_replace_the_files_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    JobFiles(DefaultLogsSpecs(str(tmp_path / "open/logs")), "j1", str(tmp_path), log=said.append)
    [line] = said
    assert line.endswith(f"every user may replace files below {tmp_path}/open, which has no sticky bit")
    (tmp_path / "open").chmod(0o1777)
    JobFiles(DefaultLogsSpecs(str(tmp_path / "open/logs")), "j1", str(tmp_path), log=said.append)
    assert len(said) == 1
    assert replaceable_part("/nowhere/at/all") == ""


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_who_shows_logs_follows_no_link_and_waits_for_no_pipe(
    tmp_path: Path, precious: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good").write_text("good\n")
    plant(tmp_path / "planted", kind, precious)
    good, planted = (LogFile(0, rank, "stdout", str(tmp_path / name)) for rank, name in enumerate(("good", "planted")))
    assert show_last([good, planted], 10, Output(titles=False)) == {good.path: 5}
    assert capfd.readouterr().out == "good\n"
    assert [Tail(good).read(), Tail(planted).read()] == ["good\n", ""]
