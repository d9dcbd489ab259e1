"""Compare the bootstrap with plain Python: the same program must behave the same under both."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from elastic_launch.workers import BOOTSTRAP
from tests.support.leaks import wait_for_children
from tests.support.waiting import DEADLINE

PYTHON = sys.executable

# Prints what a program can see of how it was started. It imports nothing that would change sys.modules.
VIEW = """
import sys
main = sys.modules["__main__"]
assert vars(main) is globals()
loader = globals().get("__loader__")
print(sys.argv, getattr(sys, "orig_argv", None))
print(sys.path)
print(list(sys.modules), sorted(sys.path_importer_cache), sep="\\n")
for name in list(globals()):
    if name != "loader":
        print(name, "=", type(globals()[name]) if name in ("__loader__", "__spec__") else globals()[name])
print(getattr(loader, "name", None), getattr(loader, "path", None), sys.flags, sys.excepthook is sys.__excepthook__)
"""
RAISE = """
def fail(number):
    raise ValueError("boom %d" % number)

fail(7)
"""
FORMS = (
    "relative",
    "dotted",
    "absolute",
    "link",
    "folder",
    "zip",
    "compiled",
    "compiled-bare",
    "module",
    "package",
    "sub",
)


@dataclasses.dataclass(frozen=True)
class Both:
    """What plain Python and the bootstrap made of one program."""

    plain: subprocess.CompletedProcess[str]
    ours: subprocess.CompletedProcess[str]
    error: dict[str, Any] | None
    """The content of the error file; None if there is none."""

    def check(self, returncode: int, message: str | None) -> str:
        """Check that both behaved alike and as given, and that the error file agrees. Return its call stack."""
        shown = [(self.normal(run.stdout), self.normal(run.stderr)) for run in (self.plain, self.ours)]
        assert shown[1] == shown[0]
        assert (self.plain.returncode, self.ours.returncode) == (returncode, returncode), self.plain.stderr
        assert (self.error and self.error["message"]["message"]) == message
        return str(self.error["message"]["extraInfo"]["py_callstack"]) if self.error else ""

    @staticmethod
    def normal(text: str) -> str:
        # The bootstrap's frame counts towards the recursion limit.
        return re.sub(r"repeated \d+ more times|0x[0-9a-f]+", "...", text)


def both(folder: Path, kind: str, program: str, *args: str, options: tuple[str, ...] = (), **environ: str) -> Both:
    """Run a program in `folder`/work, under plain Python and under the bootstrap."""
    errors = folder / "errors"
    errors.mkdir()
    path = errors / "error.json"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TORCHELASTIC"))}
    runs = []
    for start in (["-m", program] if kind == "module" else [program], [BOOTSTRAP, kind, program]):
        runs.append(
            subprocess.run(
                [PYTHON, *options, "-u", *start, *args],
                cwd=folder / "work",
                env={**inherited, "TORCHELASTIC_ERROR_FILE": str(path), **environ},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=DEADLINE,
                check=False,
            )
        )
        assert len(runs) == 2 or not list(errors.iterdir())
    assert [entry.name for entry in errors.iterdir()] in ([], ["error.json"])  # and no temporary file
    return Both(runs[0], runs[1], json.loads(path.read_text()) if path.exists() else None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    return work


def assignment(work: Path, form: str, source: str) -> tuple[str, str]:
    """Write a program in one of the forms that Python runs. Return its kind and its name."""
    if form in ("folder", "zip"):
        app = work / "app"
        app.mkdir()
        (app / "__main__.py").write_text(source)
        if form == "folder":
            return "script", "app"
        with zipfile.ZipFile(work / "app.zip", "w") as archive:
            archive.write(app / "__main__.py", "__main__.py")
        return "script", "app.zip"
    if form in ("module", "package", "sub"):
        package = work / "package"
        package.mkdir()
        (package / "__init__.py").write_text("import sys\nprint(sys.argv, vars(sys.modules['__main__']))\n")
        for file in (work / "program.py", package / "__main__.py", package / "program.py"):
            file.write_text(source)
        return "module", {"module": "program", "package": "package", "sub": "package.program"}[form]
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    script = elsewhere / "script.py"
    script.write_text(source)
    if form.startswith("compiled"):
        name = "elsewhere/script.pyc" if form == "compiled" else "elsewhere/script"
        compile_it = f"import py_compile; py_compile.compile('elsewhere/script.py', cfile={name!r}, doraise=True)"
        subprocess.run([PYTHON, "-c", compile_it], cwd=work, check=True)
        return "script", name
    (work / "link.py").symlink_to("elsewhere/script.py")
    names = {
        "relative": "elsewhere/script.py",
        "dotted": "./elsewhere/../link.py",
        "absolute": script,
        "link": "link.py",
    }
    return "script", str(names[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [(), ("-P",), ("-I",), ("-O", "-W", "error", "-X", "utf8")], ids=" ".join)
def test_a_program_sees_what_plain_python_shows(
    tmp_path: Path, work: Path, form: str, options: tuple[str, ...]
) -> None:
    kind, program = assignment(work, form, VIEW)
    if kind == "module" and {"-P", "-I"} & set(options):
        options = options[1:]  # they hide the module; the next test has PYTHONSAFEPATH instead
    args = ("--rank=1", "-m", "two words", "", "\N{SNOWMAN}", "--", "\udcff")
    run = both(tmp_path, kind, program, *args, options=options)
    run.check(0, None)
    assert "two words" in run.ours.stdout
    if form in ("relative", "dotted", "absolute", "link"):
        assert not list(work.rglob("__pycache__"))


def test_a_safe_path_leaves_out_the_directory_of_a_module(tmp_path: Path, work: Path) -> None:
    kind, program = assignment(work, "module", VIEW)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work / "program.py").rename(elsewhere / "program.py")
    run = both(tmp_path, kind, program, PYTHONSAFEPATH="1", PYTHONPATH=str(elsewhere))
    run.check(0, None)
    assert repr(str(work)) not in run.ours.stdout


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_is_shown_as_by_plain_python_and_is_written(tmp_path: Path, work: Path, form: str) -> None:
    before = time.time()
    run = both(tmp_path, *assignment(work, form, RAISE))
    stack, stderr = run.check(1, "ValueError: boom 7"), run.plain.stderr
    if form == "zip":  # the traceback module finds source lines in it, the interpreter does not
        stack, stderr = (re.sub(r"(?m)^    .*\n", "", text) for text in (stack, stderr))
    assert stack == stderr
    assert run.error is not None
    extra = run.error["message"]["extraInfo"]
    assert before <= extra["time"] <= time.time()
    assert extra["timestamp"] == str(int(extra["time"]))


# Scripts, their exit statuses, and the messages in their error files.
SCRIPTS: dict[str, tuple[str, int, str | None]] = {
    "chained by from": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e\n",
        1,
        "KeyError: 'k'",
    ),
    "chained by context": ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    {}['k']\n", 1, "KeyError: 'k'"),
    "in an imported module": ("import helper\nhelper.fail()\n", 1, "RuntimeError: in helper"),
    "while importing": ("import broken\n", 1, "SyntaxError: '(' was never closed (broken.py, line 1)"),
    "missing import": ("import no_such_thing\n", 1, "ModuleNotFoundError: No module named 'no_such_thing'"),
    "group": ("raise ExceptionGroup('two', [ValueError(1), KeyError(2)])", 1, "ExceptionGroup: two (2 sub-exceptions)"),
    "notes": ("e = ValueError('v')\ne.add_note('a note')\nraise e\n", 1, "ValueError: v"),
    "lines": ("raise ValueError('one\\ntwo \\u2603 \\udcff')", 1, "ValueError: one\ntwo \u2603 \udcff"),
    "broken str": (
        "class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E('e')\n",
        1,
        "E: <exception str() failed>",
    ),
    "traceback hidden": (
        "class E(Exception):\n    __traceback__ = property(lambda self: None)\n"
        "    def with_traceback(self, tb):\n        1 / 0\nraise E('e')\n",
        1,
        "E: e",
    ),
    "frozen": (
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass E(Exception):\n    a: int\nraise E(1)\n",
        1,
        "E: 1",
    ),
    "recursion": ("def f():\n    f()\nf()\n", 1, "RecursionError: maximum recursion depth exceeded"),
    "memory": ("bytearray(1 << 62)\n", 1, "MemoryError: "),
    "base exception": ("class E(BaseException):\n    pass\nraise E('e')\n", 1, "E: e"),
    "stop iteration": ("next(iter(()))\n", 1, "StopIteration: "),
    "syntax": ("def f(:\n    pass\n", 1, "SyntaxError: invalid syntax (script.py, line 1)"),
    "indentation": (
        "if True:\npass\n",
        1,
        "IndentationError: expected an indented block after 'if' statement on line 1 (script.py, line 2)",
    ),
    "interrupt": ("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", -2, "KeyboardInterrupt: "),
    "interrupt raised": ("raise KeyboardInterrupt('by hand')\n", -2, "KeyboardInterrupt: by hand"),
    "terminated": ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n", -15, None),
    "exit": ("import sys\nsys.exit()\n", 0, None),
    "exit 0": ("import sys\nsys.exit(0)\n", 0, None),
    "exit 42": ("import sys\nsys.exit(42)\n", 42, None),
    "exit true": ("import sys\nsys.exit(True)\n", 1, None),
    "exit text": ("import sys\nsys.exit('no data')\n", 1, "SystemExit: no data"),
    "exit value": ("import sys\nsys.exit((1, 2))\n", 1, "SystemExit: (1, 2)"),
    "exit while handling": ("import sys\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    sys.exit(3)\n", 3, None),
    "os._exit": ("import os\nos._exit(5)\n", 5, None),
    "caught": ("import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()\n", 0, None),
    "thread": (
        "import threading\ndef f():\n    1 / 0\nt = threading.Thread(target=f)\nt.start()\nt.join()\n",
        0,
        None,
    ),
    "hook": (
        "import sys, traceback\n"
        "def hook(kind, value, tb):\n"
        "    assert value.__traceback__ is tb and sys.last_traceback is tb and sys.excepthook is hook\n"
        "    print(kind, [frame.name for frame in traceback.extract_tb(tb)])\n"
        "sys.excepthook = hook\n"
        "raise ValueError('v')\n",
        1,
        "ValueError: v",
    ),
    "hook that exits": (
        "import sys\nsys.excepthook = lambda *_: sys.exit(9)\nraise ValueError('v')\n",
        9,
        "ValueError: v",
    ),
    "hook that fails": (
        "import sys\ndef hook(*_):\n    1 / 0\nsys.excepthook = hook\nraise ValueError('v')\n",
        1,
        "ValueError: v",
    ),
    "hook deleted": ("import sys\ndel sys.excepthook\nraise ValueError('v')\n", 1, "ValueError: v"),
    "source": (
        "import inspect, linecache\n"
        "def f():\n    return 'f'\n"
        "print(inspect.getsource(f), linecache.getline(__file__, 2), inspect.getfile(f), inspect.getmodule(f))\n",
        0,
        None,
    ),
    "cookie": ("# coding: latin-1\nprint(ascii('\udce9'))\n", 0, None),
    "warnings": (
        "import warnings\nprint(1 is 1)\nwarnings.warn('old', DeprecationWarning)\nwarnings.warn('new')\n",
        0,
        None,
    ),
    "annotations": ("x: int = 1\nprint(__annotations__)\n", 0, None),
    "future": ("from __future__ import annotations\ndef f(x: nothing): ...\nprint(f.__annotations__)\n", 0, None),
    "no future": ("def f(x: list[int]): ...\nprint(f.__annotations__)\n", 0, None),
}
# The order in which objects are freed depends on references. A function here would leave all to the collector.
FINISH = """
import atexit, sys, threading, helper
first, _second = helper.Last("first"), helper.Last("second")
in_cycle = [helper.Last("cycle")]
in_cycle.append(in_cycle)
sys.kept = helper.Last("kept")
atexit.register(print, "at exit")
threading.Thread(target=helper.late).start()
"""
HELPER = """
import sys, threading
def fail():
    raise RuntimeError("in helper")
class Last:
    def __init__(self, name):
        self.name = name
    def __del__(self, print=print):
        print("freed", self.name)
def late():
    threading.main_thread().join()
    print("thread ended", sys.excepthook is sys.__excepthook__)
"""
SCRIPTS["finish"] = (FINISH, 0, None)
SCRIPTS["finish with exit"] = (FINISH + "sys.exit(4)\n", 4, None)
SCRIPTS["finish with failure"] = (FINISH + "raise ValueError('v')\n", 1, "ValueError: v")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_as_under_plain_python(tmp_path: Path, work: Path, name: str) -> None:
    source, returncode, message = SCRIPTS[name]
    (work / "script.py").write_text(source, encoding="utf-8", errors="surrogateescape")
    (work / "helper.py").write_text(HELPER)
    (work / "broken.py").write_text("f(\n")
    run = both(tmp_path, "script", "script.py")
    stack = run.check(returncode, message)
    assert "bootstrap" not in stack
    if run.error and run.plain.stderr.startswith("Traceback"):
        assert Both.normal(stack.encode(errors="backslashreplace").decode()) == Both.normal(run.plain.stderr)


def test_of_an_exception_that_cannot_be_shown_whole_its_own_lines_are_kept(tmp_path: Path) -> None:
    """Python itself shows an error of its own."""
    script, error_file = tmp_path / "script.py", tmp_path / "error.json"
    script.write_text("class E(Exception):\n    __notes__ = property(lambda self: 1 / 0)\nraise E('e')\n")
    command = [sys.executable, "-u", BOOTSTRAP, "script", str(script)]
    environ = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(error_file)}
    assert subprocess.run(command, env=environ, capture_output=True).returncode == 1
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "E: e"
    stack = message["extraInfo"]["py_callstack"]
    begin = f'Traceback (most recent call last):\n  File "{script}", line 3, in <module>\n'
    assert (stack[: len(begin)], stack[-6:]) == (begin, "\nE: e\n")


@pytest.mark.parametrize(
    ("kind", "program", "content", "returncode", "message"),
    [
        ("script", "nope.py", None, 2, "FileNotFoundError: [Errno 2] No such file or directory: '{work}/nope.py'"),
        ("script", "elsewhere", None, 1, "IsADirectoryError: [Errno 21] Is a directory: '{work}/elsewhere'"),
        ("script", "a.py", b"x = 1\nx = '\xe9'\n", 1, "SyntaxError: (unicode error) 'utf-8' codec can't decode byte"),
        ("script", "a.py", b"# coding: nope\n", 1, "SyntaxError: unknown encoding: nope"),
        ("script", "a.py", b"x = '\0'\n", 1, "SyntaxError: source code string cannot contain null bytes"),
        ("script", "a.pyc", b"not compiled", 1, "ImportError: bad magic number in '__main__'"),
        ("module", "nope", None, 1, "SystemExit: {python}: No module named nope"),
        ("module", "package.nope", None, 1, "SystemExit: {python}: No module named package.nope"),
        (
            "module",
            "nope.sub",
            None,
            1,
            "SystemExit: {python}: Error while finding module specification for 'nope.sub'",
        ),
        ("module", "elsewhere", None, 1, "SystemExit: {python}: No module named elsewhere.__main__; 'elsewhere' is a"),
        ("module", "a", b"import nope\n", 1, "ModuleNotFoundError: No module named 'nope'"),
        ("module", "a", b"def f(:\n", 1, "SyntaxError: invalid syntax (a.py, line 1)"),
        ("module", "sys", None, 1, "SystemExit: {python}: No code object available for sys"),
    ],
)
def test_what_cannot_be_run_gets_python_s_own_message(
    tmp_path: Path, work: Path, kind: str, program: str, content: bytes | None, returncode: int, message: str
) -> None:
    assignment(work, "package", "")
    (work / "elsewhere").mkdir()
    if content is not None:
        (work / (program if kind == "script" else f"{program}.py")).write_bytes(content)
    run = both(tmp_path, kind, program)
    assert run.error is not None
    said = run.error["message"]["message"]
    assert said.startswith(message.format(work=work, python=PYTHON))
    run.check(returncode, said)


def test_a_module_runs_in_a_removed_working_directory(tmp_path: Path, work: Path) -> None:
    _, program = assignment(work, "module", VIEW)
    outputs = []
    for start in (["-m"], [BOOTSTRAP, "module"]):
        (tmp_path / "gone").mkdir()
        command = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "gone"), PYTHON, *start, program]
        env = {**os.environ, "PYTHONPATH": str(work)}
        outputs.append(subprocess.run(command, env=env, capture_output=True, timeout=DEADLINE, check=True).stdout)
    assert outputs[1] == outputs[0]


FORK = """
import os, sys
child = os.fork()
if child == 0:
    raise ValueError("child")
print("child's status", os.waitpid(child, 0)[1])
"""
MULTIPROCESSING = """
import multiprocessing, sys
class Point:
    def __init__(self, x):
        self.x = x
def work(point, queue):
    queue.put((point, Point(point.x + 1), __name__))
    raise ValueError("child")
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(Point(1), queue), name="child")
    child.start()
    first, second, name = queue.get()
    child.join()
    print(type(first) is Point, type(second) is Point, second.x, name, child.exitcode, type(first).__module__)
"""


@pytest.mark.parametrize("end", ["", "raise ValueError('parent')\n"])
def test_a_forked_child_does_not_write_its_parent_s_error(tmp_path: Path, work: Path, end: str) -> None:
    (work / "script.py").write_text(FORK + end)
    run = both(tmp_path, "script", "script.py")
    run.check(1 if end else 0, "ValueError: parent" if end else None)
    assert "ValueError: child" in run.ours.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("form", ["link", "module"])  # no child finds the `__main__` of a package or a zip file
def test_processes_of_multiprocessing_find_main_and_write_nothing(
    tmp_path: Path, work: Path, form: str, method: str
) -> None:
    run = both(tmp_path, *assignment(work, form, MULTIPROCESSING), method)
    wait_for_children()
    run.plain.stderr, run.ours.stderr = (re.sub(r"(?m)^Process .*", "", one.stderr) for one in (run.plain, run.ours))
    run.check(0, None)
    assert "ValueError: child" in run.ours.stderr


def test_an_existing_error_file_is_not_replaced(tmp_path: Path, work: Path) -> None:
    (work / "script.py").write_text(
        "import os\nwith open(os.environ['MINE'], 'w') as file:\n    file.write('\"mine\"')\nraise ValueError('v')\n"
    )
    mine = tmp_path / "mine.json"
    run = both(tmp_path, "script", "script.py", MINE=str(mine), TORCHELASTIC_ERROR_FILE=str(mine))
    assert run.ours.stderr == run.plain.stderr
    assert mine.read_text() == '"mine"'


def test_what_torch_s_record_wrote_stays(tmp_path: Path, work: Path) -> None:
    (work / "script.py").write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise ValueError('boom')\nmain()\n"
    )
    path = tmp_path / "error.json"
    command = [PYTHON, "-u", BOOTSTRAP, "script", "script.py"]
    env = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(path)}
    run = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert run.returncode == 1
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "ValueError: boom"
    assert message["extraInfo"].keys() == {"py_callstack", "timestamp"}  # ours would have a "time"
    assert "bootstrap" not in message["extraInfo"]["py_callstack"] + run.stderr


@pytest.mark.parametrize(
    "path", ["", "{work}/missing/error.json", "{work}/script.py/error.json", "{work}/" + 300 * "x"]
)
def test_an_error_file_that_cannot_be_written_changes_nothing(tmp_path: Path, work: Path, path: str) -> None:
    (work / "script.py").write_text(RAISE)
    run = both(tmp_path, "script", "script.py", TORCHELASTIC_ERROR_FILE=path.format(work=work))
    run.check(1, None)
    assert [entry.name for entry in work.iterdir()] == ["script.py"]


def test_an_error_file_that_cannot_be_written_completely_is_removed(tmp_path: Path, work: Path) -> None:
    # The kernel then refuses every write to a file, as on a full disk.
    (work / "script.py").write_text("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + RAISE)
    both(tmp_path, "script", "script.py").check(1, None)


def test_without_an_error_file_a_failure_is_shown(work: Path) -> None:
    (work / "script.py").write_text(RAISE)
    env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_ERROR_FILE"}
    command = [PYTHON, BOOTSTRAP, "script", "script.py"]
    run = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (run.returncode, run.stderr.splitlines()[-1]) == (1, "ValueError: boom 7")


def test_the_error_file_is_the_one_set_at_the_start(tmp_path: Path, work: Path) -> None:
    (work / "script.py").write_text("import os\nos.environ.clear()\nos.chdir('/')\n" + RAISE)
    both(tmp_path, "script", "script.py").check(1, "ValueError: boom 7")


def test_a_module_beside_the_script_does_not_replace_the_standard_library_s(tmp_path: Path, work: Path) -> None:
    (work / "script.py").write_text("import atexit\natexit.register(lambda: __import__('late'))\n" + RAISE)
    (work / "json.py").write_text("print('not that json')\n")
    (work / "late.py").write_text("print('late')\n")
    run = both(tmp_path, "script", "script.py")
    run.check(1, "ValueError: boom 7")
    assert run.ours.stdout == "late\n"
