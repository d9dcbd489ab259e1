"""What ``--preload auto`` imports ahead of a program, and why nothing more."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

from elastic_launch.core.preload import SLOW
from elastic_launch.core.preload_reader import HARMLESS, PER_RANK, QUICK
from elastic_launch.workers import preload_plan
from tests.support.training_scripts import SCRIPTS, Script


def choose(script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> tuple[list[str], str]:
    """Return the slow modules that are chosen, and what is said about it."""
    for path, text in {**script.files, script.program: script.text}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.chdir(folder)
    said: list[str] = []
    target = script.module or script.program
    words = preload_plan.choose(bool(script.module), target, environ, "", said.append)
    assert words[:1] in ([], ["auto"])
    assert len(said) == 1
    return [name for word in words for name in word.split(":")[:1] if name.partition(".")[0] in SLOW], said[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_forty_programs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = SCRIPTS[name]
    installed = preload_plan._is_installed
    monkeypatch.setattr(preload_plan, "_is_installed", lambda each: each in SLOW or installed(each))
    chosen, said = choose(script, tmp_path, monkeypatch)
    assert (chosen, script.reason in said) == (script.imports.split(), True), said
    assert bool(chosen) == ("forked with" in said)
    if not script.reason:
        assert "nothing after" not in said


def test_there_are_forty() -> None:
    assert len(SCRIPTS) == 40
    assert not (SLOW | QUICK) & PER_RANK


@pytest.mark.parametrize(
    "statement",
    [
        "print(1)",
        "x.y = 1",
        "x[0] = 1",
        "x += [1]",
        "del x",
        "for i in []: pass",
        "while x: pass",
        "with x: pass",
        "assert f()",
        "raise x",
        "if x: pass",
        "import this",
        "import elsewhere",
        "from site import main",
        "@x\ndef f(): pass",
        "@x.y\nclass C: pass",
        "def f(x=g()): pass",
        "def f(*, x=g()): pass",
        "def f(x: g()): pass",
        "def f() -> g(): pass",
        "class C(g()): pass",
        "class C(metaclass=g()): pass",
        "class C:\n    f()",
        "class C:\n    def __init_subclass__(cls): pass",
        "class C:\n    async def __class_getitem__(cls, item): pass",
        "class C:\n    def __set_name__(self, owner, name): pass",
        "class C(type): pass",
        "def __getattr__(name): pass",
        "class C: pass\ndef __getattr__(name): pass",
        "x: g()",
        "x = g()",
        "x = [g() for _ in y]",
        "x = y if g() else z",
        "x = f'{g()}'",
        "x = g().strip()",
        "x = y.strip()",
        "x = lambda y=g(): y",
        "x = sorted([1], key=lambda _: g())",
        "x = {**g()}",
        "x = y[g()]",
        "int = g\nx = int(1)",
        "from own import int\nx = int(1)",
        "from os import path\npath = g\nx = path.join('a')",
        "try: f()\nexcept ImportError: pass",
        "try: import nowhere\nexcept ValueError: pass",
        "try: import nowhere\nexcept ImportError: f()",
        "try: import json\nexcept ImportError: pass\nelse: f()",
        "try: import json\nfinally: f()",
        "import nowhere",
        "import own.nothing",
        "from . import own",
        "exec('')",
        "match x:\n    case _: pass",
        "async def f(x=g()): pass",
        "(x := g())",
        "global x",
    ],
)
def test_what_could_make_a_difference_ends_the_search(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"elsewhere", "torch", "numpy"}
    monkeypatch.setattr(preload_plan, "_is_installed", lambda name: name in elsewhere | set(sys.stdlib_module_names))
    script = Script(f"import torch\n{statement}\nimport numpy\n", "", files={"own.py": "int = print\n"})
    chosen, said = choose(script, tmp_path, monkeypatch)
    assert chosen == ["torch"]
    assert "; nothing after " in said


@pytest.mark.parametrize(
    "statement",
    [
        '"""Text."""',
        "x = y = 1, [2], {3: 4}, {5}",
        "x, (y, *z) = 1, (2, 3)",
        "x: int = 1 + 2 * -3",
        "x: int",
        "x = a.b[c:d] if not e else f < g and h",
        "x = lambda y: print(y)",
        "def f(x: int = 1, *args, y=(), **more) -> None: print(x)",
        "async def f(): await x",
        "class C:\n    def __getattr__(self, name): pass\nclass D(C): pass",
        "class C(A, B):\n    '''Text.'''\n    x: int = 1\n    @property\n    def f(self): print()\n"
        "    @f.setter\n    def f(self, x): pass",
        "import functools\n@functools.lru_cache(maxsize=None)\ndef f(): pass",
        "from functools import lru_cache as cached\n@cached\ndef f(): pass",
        "from __future__ import annotations\nx: g() = 1\ndef f(x: g()) -> g(): pass",
        "import typing as t\nif t.TYPE_CHECKING: import elsewhere\nelse: pass",
        "if __name__ == '__main__': pass",
        "if '__main__' == __name__: pass",
        "import os.path as p, re\nx = p.join(os.getenv('A', ''), 'b').lower()\ny = re.compile('a')",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')",
        "try:\n    import nowhere\nexcept (ValueError, ImportError):\n    nowhere = None\nelse:\n    f()",
        "try: import nowhere\nexcept: pass",
        "try: import own.nothing\nexcept ModuleNotFoundError: pass",
        "import own\nfrom own import x, nothing",
        "pass",
        "import yaml, tqdm",
    ],
)
def test_what_makes_no_difference(statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"elsewhere", "torch", "numpy", "yaml", "tqdm"} | set(sys.stdlib_module_names)
    monkeypatch.setattr(preload_plan, "_is_installed", names.__contains__)
    script = Script(f"{statement}\nimport numpy\n", "", files={"own.py": "x = 1\n"})
    assert choose(script, tmp_path, monkeypatch)[0] == ["numpy"]


def test_a_module_of_functions_is_not_the_main_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("import torch\nif __name__ == '__main__':\n    start()\nimport numpy\n")
    monkeypatch.chdir(tmp_path)
    assert preload_plan.choose(False, "train.py", {}, "", print, is_main=False) == ["auto", "torch", "numpy"]
    assert preload_plan.choose(False, "train.py", {}, "", print) == ["auto", "torch"]


def test_names_are_imported_as_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(
        "import os, torch\nfrom transformers import (\n    AutoModel,\n    Trainer,\n)\nimport json\n"
    )
    monkeypatch.chdir(tmp_path)
    words = preload_plan.choose(False, "train.py", {}, "", print)
    assert words == ["auto", "os", "torch", "transformers:AutoModel:Trainer"]


def test_modules_on_pythonpath_and_without_the_program_s_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text("import numpy\n")
    (tmp_path / "beside.py").write_text("import torch\n")
    script = Script("import mine\nimport beside\n", "")
    path = {"PYTHONPATH": f"{os.pathsep}{tmp_path / 'src'}"}
    assert choose(script, tmp_path, monkeypatch, **path)[0] == ["numpy", "torch"]
    assert choose(script, tmp_path, monkeypatch, **path, PYTHONSAFEPATH="1")[0] == ["numpy"]


@pytest.mark.parametrize(
    "content",
    [
        b"import torch\n\0",
        b"syntax error here =\nimport torch\n",
        b"\xff\xfeimport torch",
        b"x = " + b"-" * 100_000 + b"1\nimport torch\n",
    ],
    ids=["zero", "syntax", "encoding", "nested"],
)
def test_what_cannot_be_read_starts_cold(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(content)
    said: list[str] = []
    assert preload_plan.choose(False, str(tmp_path / "train.py"), {}, "", said.append) == []
    assert preload_plan.choose(False, str(tmp_path / "missing.py"), {}, "", said.append) == []
    assert preload_plan.choose(False, str(tmp_path), {}, "--numa-binding", said.append) == []
    assert "--numa-binding" in said[-1]


def test_a_module_whose_name_has_very_many_parts_starts_cold() -> None:
    assert preload_plan.choose(True, "a" + ".a" * 2 * sys.getrecursionlimit(), {}, "", lambda text: None) == []


def test_a_directory_without_init_in_a_package_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "mine/__init__.py": "",
        "mine/parts/model.py": "import torch\n",
        "mine/parts/deep/data.py": "import numpy\n",
    }
    text = "import mine.parts.model\nfrom mine.parts.deep import data\n"
    script = Script(text, "", files=files)
    assert choose(script, tmp_path, monkeypatch)[0] == ["torch", "numpy"]
    assert preload_plan.choose(True, "mine.parts.model", {}, "", print) == ["auto", "torch"]


def test_in_a_directory_that_has_been_removed_workers_start_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    said: list[str] = []
    assert preload_plan.choose(True, "this", {}, "", said.append) == []
    assert said == ["--preload auto: workers start cold: cannot look at this: [Errno 2] No such file or directory"]
    tmp_path.mkdir()


def test_a_program_in_a_pipe_is_left_to_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one process can read it, and its writer would notice if another one opened it."""
    path = str(tmp_path / "train.py")
    os.mkfifo(path)
    opened: list[str] = []

    def opener(path: str, flags: int) -> int:
        opened.append(path)
        return os.open(path, flags | os.O_NONBLOCK)

    monkeypatch.setattr(preload_plan, "without_waiting", opener)
    assert preload_plan.choose(False, path, {}, "", lambda text: None) == []
    assert not opened


def test_warnings_are_left_to_the_workers(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import numpy\nx = '\\d'\nimport torch\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        preload_plan.choose(False, str(tmp_path / "train.py"), {}, "", lambda text: None)
    assert not caught


def test_harmless_functions_exist() -> None:
    import importlib

    for name in HARMLESS:
        owner, _, attribute = name.rpartition(".")
        module = importlib.import_module("os" if owner == "os.environ" else owner or "builtins")
        assert hasattr(module.environ if owner == "os.environ" else module, attribute)
