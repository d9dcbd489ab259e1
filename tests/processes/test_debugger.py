"""A debugger that follows child processes, as those of editors do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.debug_adapter import Editor
from tests.support.jobs import TWO, Job
from tests.support.ports import free_port

FUNCTION = """
from elastic_launch import LaunchConfig, elastic_launch
def work():
    os.write(1, b"rank %b\\n" % os.environb[b"RANK"])
if __name__ == "__main__": elastic_launch(LaunchConfig(1, 1, 2, max_restarts=0, preload=["json"]), work)()
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("is_function", [False, True])
def test_breakpoints_in_all_workers(job: Job, is_function: bool) -> None:
    script = job.path / "train.py"
    script.write_text(
        f"import os{FUNCTION}" if is_function else "import os\n\nos.write(1, b'rank %b\\n' % os.environb[b'RANK'])"
    )
    launcher = () if is_function else ("-m", "elastic_launch", "--preload", "json", *TWO)
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-Xfrozen_modules=off", "-m", "debugpy", "--listen", f"127.0.0.1:{port}"),
            *("--wait-for-client", *launcher, str(script)),
        ],
        cwd=job.path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    job.processes.append(process)
    line = 4 if is_function else 3
    editor = Editor(port, script, line)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{error}\n{error.stdout!r}\n{error.stderr!r}\n" + "\n".join(editor.log))
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0", "rank 1"]
    assert "elastic-run: a debugger follows the workers, so they start without preloaded modules" in err
    editor.wait()
    assert editor.stops == [line, line]
