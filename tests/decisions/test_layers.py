"""What import-linter cannot express (see ``[tool.importlinter]`` in pyproject.toml for who may import whom)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "elastic_launch"
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))
NEVER = (
    "torch",
    "grpc",
    "etcd3",
    "prometheus_client",
    "logging",
    "asyncio",
    "psutil",
    "subprocess",
    "tempfile",
    "json",
    "tomllib",
    "difflib",
    "shlex",
)
"""What the agent does not import before the first worker runs: torch and gRPC start threads, the rest is slow."""


def imports(path: Path) -> list[str]:
    """The modules that a file imports, wherever in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse((PACKAGE.parent / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if "core" in path.parts], ids=str)
def test_decisions_are_pure(path: Path) -> None:
    allowed = {
        "__future__",
        "_ast",
        "json",
        "re",
        "signal",
        "time",
        "typing",
        "collections",
        "dataclasses",
        "enum",
        "types",
        "elastic_launch",
    }
    assert {module.split(".")[0] for module in imports(path)} <= allowed
    text = (PACKAGE.parent / path).read_text()
    assert not [call for call in ("time.time(", "monotonic(", "open(") if call in text]


def test_only_one_place_reads_the_environment() -> None:
    readers = [str(path) for path in MODULES if "os.environ" in (PACKAGE.parent / path).read_text()]
    # What runs in processes of its own reads theirs.
    assert readers == [
        "elastic_launch/env.py",
        "elastic_launch/store/etcd/member_main.py",
        "elastic_launch/store/tcpstore_server_main.py",
        "elastic_launch/workers/bootstrap.py",
        "elastic_launch/workers/error_handler.py",
        "elastic_launch/workers/forked.py",
        "elastic_launch/workers/function_main.py",
        "elastic_launch/workers/health_check_main.py",
        "elastic_launch/workers/keeper_main.py",
        "elastic_launch/workers/preload_main.py",
        "elastic_launch/workers/step_hook.py",
    ]


def test_tests_share_only_support() -> None:
    """Helpers and fixtures live in ``tests/support`` and in files named conftest.py. Programs may use the tests."""
    borrowed = re.compile(r"^ *(?:from|import) tests\.(?!support\b|chaos\b|simulation\.__main__)", re.MULTILINE)
    files = (PACKAGE.parent / "tests").rglob("*.py")
    assert not [file for file in files if file.name != "__main__.py" and borrowed.search(file.read_text())]


def test_agent_imports_nothing_slow_before_its_workers_run(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("")
    code = (
        "import sys; from elastic_launch.run import main; main(['--nproc-per-node', '2', 'x.py']);"
        f"print([name for name in {NEVER} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
