"""The report of real jobs, and the command that writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_launch.errors import UnavailableError
from elastic_launch.operate import report
from tests.support.jobs import TWO, Job

CRASH = (
    "if rank == 1 and restart == 0: wait_for('0.0 up'); raise ValueError('<boom>')\nmark('up')\nif restart == 0: wait()"
)


def program(job: Job, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elastic_launch.operate.report", *args]
    return subprocess.run(command, cwd=job.path, capture_output=True, text=True)


@pytest.fixture
def crashed(job: Job) -> Job:
    """A job that has failed once, and then succeeded."""
    words = ("--max-restarts", "1", "--log-dir", "logs", "--rdzv-id", "night/1")
    assert job.run(*TWO, *words, job.script(CRASH)).returncode == 0
    return job


def test_report_of_a_log_directory_of_a_job_s_directory_and_of_a_file(crashed: Job) -> None:
    pages = []
    for path in ("logs", "logs/night%2F1", "logs/night%2F1/events.jsonl"):
        done = program(crashed, path, "-o", "report.html")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pages.append((crashed.path / "report.html").read_text())
    assert len(set(pages)) == 1
    assert "<h1>Job night/1</h1>" in pages[0]
    assert "ValueError: &lt;boom&gt;" in pages[0]


def test_markdown_to_standard_output_or_a_file(crashed: Job) -> None:
    done = program(crashed, "logs", "--format", "md")
    assert "## Recovery times" in done.stdout
    assert program(crashed, "logs", "-o", "report.md").returncode == 0
    assert (crashed.path / "report.md").read_text() == done.stdout


def test_what_cannot_be_read_is_in_the_report(crashed: Job) -> None:
    (crashed.path / "empty").mkdir()
    done = program(crashed, "logs", "missing", "empty", "train.py", "--format", "md")
    assert done.returncode == 0
    for problem in (
        "missing: No such file or directory",
        "empty: has no events.jsonl",
        "train.py: left out what is no",
    ):
        assert problem in done.stdout.replace("\\", "")


def test_no_events_at_all_is_an_error_that_says_where_they_come_from(job: Job) -> None:
    done = program(job, "nowhere", "-o", "r.html")
    assert done.returncode == 69
    assert done.stderr == (
        "elastic-job: no events in nowhere (nowhere: No such file or directory); "
        "jobs write them with --log-dir or --events\n"
    )
    assert not (job.path / "r.html").exists()


def test_a_report_that_cannot_be_written_is_an_error(crashed: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(crashed.path)
    with pytest.raises(UnavailableError, match=r"-o nowhere/r.html: No such file or directory; choose another file"):
        report.main(["logs", "-o", "nowhere/r.html"])


def test_a_report_imports_nothing_of_the_agent(tmp_path: Path) -> None:
    code = "import sys; from elastic_launch.operate import report\n"
    code += "print([name for name in sys.modules if '.agent' in name or name == 'torch'])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True) == "[]\n"
