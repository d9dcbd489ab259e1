"""Choose what ``--preload auto`` imports: find a program and its own modules for ``core.preload``, which reads them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder

from elastic_launch.core.preload import SLOW, Plan, Source, plan
from elastic_launch.host.files import without_waiting
from elastic_launch.parsing import AUTO

_MAX_SIZE = 1 << 20
"""Most bytes of a file that is read. Nobody writes more by hand."""


def choose(
    is_module: bool,
    target: str,
    environ: Mapping[str, str],
    per_rank: str,
    detail: Callable[[str], None],
    is_main: bool = True,
) -> list[str]:
    """Return what to import ahead of a program, as ``preload_keeper`` takes it; nothing if workers start cold.

    Args:
        is_module: whether ``target`` is the name of a module, and not a script.
        target: the program.
        environ: the workers' environment.
        per_rank: the option by which the workers differ, if one does.
        detail: is told what was chosen, and why nothing more.
        is_main: whether the program's ``__name__`` is ``"__main__"`` in the workers.
    """
    if per_rank:
        detail(f"--preload auto: workers start cold, because they differ from the beginning with {per_rank}")
        return []
    try:
        found, reason = plan_preload(is_module, target, environ, is_main)
    except Exception as error:  # a directory that has been removed, for example: the workers will tell
        found, reason = (), f"cannot look at {target}: {error or type(error).__name__}"
    if not found:
        reason = reason or f"{target} imports nothing at its top level that takes long and is known to be safe"
        detail(f"--preload auto: workers start cold: {reason}")
        return []
    modules = dict.fromkeys(each.module for each in found if each.module.partition(".")[0] in SLOW)
    detail(f"--preload auto: workers are forked with {', '.join(modules)}{reason and f'; nothing after {reason}'}")
    return [AUTO, *(":".join((each.module, *each.names)) for each in found)]


def plan_preload(is_module: bool, target: str, environ: Mapping[str, str], is_main: bool = True) -> Plan:
    """Return what can be imported ahead of a program; the arguments are those of ``choose``."""
    search = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    file = f"{target}/__main__.py" if os.path.isdir(target) else target
    if not environ.get("PYTHONSAFEPATH"):
        search.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.realpath(file)))
    modules = _Modules(search)
    if not is_module:
        name, program = "", _read(file)
    else:
        name, program = target, modules.own(target)
        if program and program.is_package:
            name = f"{target}.__main__"
            program = modules.own(name)
    if program is None:
        return Plan((), f"there is no source of {target} beside it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the workers show what the parser warns of
        return plan(program, name, is_main, modules, sys.stdlib_module_names)


class _Modules:
    """Modules of which those in some directories are the program's own. See ``core.preload.Modules``."""

    def __init__(self, search: list[str]) -> None:
        self._search = search
        self._locations: dict[str, list[str]] = {}
        """Where the modules of each of the program's own packages are, by the package's name."""
        self._found: dict[str, Source | None] = {}

    def own(self, name: str) -> Source | None:
        """Return a module of the program's own."""
        package = ""
        for part in name.split("."):  # from the outermost package, because no name is too long for that
            package = f"{package}.{part}" if package else part
            if package not in self._found:
                self._found[package] = self._find(package)
        return self._found[name]

    def exists(self, name: str) -> bool:
        """Return whether there is such a module."""
        return bool(self._spec(name)) or ("." not in name and _is_installed(name))

    def _find(self, name: str) -> Source | None:
        if name == "elastic_launch" or (spec := self._spec(name)) is None:
            return None
        if spec.origin is None:
            if "." not in name and _is_installed(name):
                return None  # it goes before a directory of that name without __init__.py
            self._locations[name] = list(spec.submodule_search_locations or [])
            return Source(self._locations[name][0], b"", is_package=True)
        if (source := _read(spec.origin)) and spec.submodule_search_locations is not None:
            self._locations[name] = list(spec.submodule_search_locations)
            return source._replace(is_package=True)
        return source

    def _spec(self, name: str) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if package:
            self.own(package)
            # By its full name, Python would look for the package of a directory without __init__.py in sys.modules.
            return PathFinder.find_spec(last, self._locations[package]) if package in self._locations else None
        if BuiltinImporter.find_spec(name) or FrozenImporter.find_spec(name):
            return None  # they go before everything else
        return PathFinder.find_spec(name, self._search)


def _is_installed(name: str) -> bool:
    """Return whether this Python has a module of that name, or could have."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, None)
        except Exception:
            return True  # not one of Python's own finders: who knows
        if spec is not None and (spec.origin is not None or spec.loader is not None):
            return True
    return False


def _read(path: str) -> Source | None:
    """Read a file of Python; None if it is something else, such as a pipe, which only one process can read."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None  # a pipe's writer would notice even that it is opened
        with open(path, "rb", opener=without_waiting) as file:
            text = file.read(_MAX_SIZE + 1)
        if len(text) <= _MAX_SIZE and b"\0" not in text:
            return Source(path, text)
    return None
