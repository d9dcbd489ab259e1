"""Let programs that were written for torch's launcher run on this one, without a change of theirs.

``import elastic_launch.compat`` does that for one process: from then on, the functions of ``torch.distributed.run``,
and ``LaunchConfig``, ``elastic_launch`` and ``launch_agent`` of ``torch.distributed.launcher``, are ours. Everything
else in these modules stays torch's, and no file of torch is touched.

``elastic-run --adopt -- PROGRAM`` and ``ELASTIC_LAUNCH_AS_TORCHRUN=1`` do it for a tree of processes. There the file
``compat.pth``, which Python reads when it starts, calls ``start``. So commands that are torch's launcher are handed
over, too.

This module is imported in every process of such a tree. So it imports next to nothing before a launch.
"""

from __future__ import annotations

import os
import sys

import elastic_launch

TYPE_CHECKING = False  # mypy knows this name; importing typing would cost every process milliseconds
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, NoReturn

    from elastic_launch.config import LaunchConfig

SWITCH = "ELASTIC_LAUNCH_AS_TORCHRUN"
"""The variable that ``compat.pth`` looks at."""
PTH = "elastic_launch_compat.pth"
"""The name of ``compat.pth`` in site-packages."""

_LAUNCHER = ("LaunchConfig", "elastic_launch", "launch_agent")
_RUN = ("main", "get_args_parser", "parse_args", "config_from_args", "run")
REPLACED = {
    "torch.distributed.launcher.api": _LAUNCHER,
    "torch.distributed.launcher": _LAUNCHER,
    "torch.distributed.run": (*_RUN, "parse_min_max_nnodes", "determine_local_world_size", *_LAUNCHER[:2]),
    "torch.distributed.launch": ("get_args_parser", "run"),
}
"""Names that become ours, by the module of torch that has them."""
COMMANDS = {"torch.distributed.run": "elastic_launch", "torch.distributed.launch": "elastic_launch.legacy"}
"""Modules that are torch's launcher as commands, and which of ours takes over."""


# ---- torch.distributed.run. Attributes that torch lacks are the program's own, so they are no options of ours.


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line; see ``elastic_launch.run.main``. Our own options can be given as variables only."""
    run(parse_args(args))


def get_args_parser() -> argparse.ArgumentParser:
    """Return a parser that has the options of torchrun, and no others."""
    from elastic_launch.cli.options import get_args_parser

    return get_args_parser(own=False)


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; see ``elastic_launch.run.parse_args``."""
    return get_args_parser().parse_args(args)


def config_from_args(args: argparse.Namespace) -> tuple[LaunchConfig, Callable[..., Any] | str, list[str]]:
    """Return the settings, the command and its arguments; see ``elastic_launch.run.config_from_args``."""
    from elastic_launch.cli.command import config_from_args
    from elastic_launch.cli.options import read_options

    return config_from_args(read_options(args, own=False))


def run(args: argparse.Namespace) -> None:
    """Run the job that a parsed command line describes; see ``elastic_launch.run.run``."""
    from elastic_launch.cli.command import run
    from elastic_launch.cli.options import read_options

    run(read_options(args, own=False))


# ---- imports


class _Finder:
    """Finds the modules of ``REPLACED`` as the other finders do, and has their names replaced once they are loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in REPLACED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # some packages' finders are too old to have it
            if find and finder is not self and (spec := find(name, path, target)):
                if spec.loader:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Loads a module as its own loader does, which is the one that it shows afterwards."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what runpy asks for

    def exec_module(self, module: ModuleType) -> None:
        spec: ModuleSpec | None = module.__spec__
        if spec:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _replace(module)


def _replace(module: ModuleType) -> None:
    import elastic_launch.run as ours

    for name in REPLACED[module.__name__]:
        place = globals() if name in _RUN else vars(ours)
        value = getattr(elastic_launch, name) if name in _LAUNCHER else place[name]
        setattr(module, name, value)


def _install() -> None:
    """Replace the names, now where torch's modules are loaded, and later where they are not."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in REPLACED:
        if name in sys.modules:
            _replace(sys.modules[name])


# ---- commands


def start() -> None:
    """Hand over to ``elastic-run`` if this process is torch's launcher; ``compat.pth`` calls this as Python starts."""
    place = len(sys.orig_argv) - len(sys.argv)  # of the script or the module, which "-m" may be a part of
    if place < 1:
        return  # Python is part of another program
    word, command = sys.orig_argv[place] if sys.argv[0] == "-m" else sys.argv[0], None
    if sys.argv[0] == "-m":
        for theirs, ours in COMMANDS.items():
            if word == theirs or (word.startswith("-") and word.endswith(f"m{theirs}")):
                command = [word.removesuffix(theirs) + ours]
    elif os.path.basename(word) == "torchrun" and _is_torchs(word):
        command = ["-m", COMMANDS["torch.distributed.run"]]
    if command:
        # With -P, the files of the working directory are not taken for modules.
        os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:place], *command, *sys.argv[1:]])


def _is_torchs(script: str) -> bool:
    try:
        with open(script, "rb") as file:
            return b"torch.distributed.run" in file.read(4096)
    except OSError:
        return False


def adopt(args: argparse.Namespace) -> NoReturn:
    """Become a program that starts torch's launcher, and have it and its children start ours: ``elastic-run --adopt``.

    Args:
        args: as from ``parse_args``. The options that were given become variables, so that they hold for the jobs
            that the program starts, unless it sets them.

    Raises:
        UsageError: the program cannot be executed, or Python would not call ``start``.
    """
    from elastic_launch.cli.options import OPTIONS
    from elastic_launch.env import environment
    from elastic_launch.errors import UsageError

    if not any(os.path.exists(os.path.join(folder, PTH)) for folder in sys.path):
        raise UsageError(
            f"--adopt: no {PTH} in the site-packages of {sys.executable}: install elastic-launch there with pip, "
            "rather than only put it on the path"
        )
    environ = {**environment(), SWITCH: "1"}
    for option in OPTIONS:
        if option.dest in args.given and option.dest != "config":
            environ[option.variable] = _text(getattr(args, option.dest))
    try:
        os.execvpe(args.training_script, [args.training_script, *args.training_script_args], environ)
    except OSError as error:
        raise UsageError(f"--adopt {args.training_script}: {error.strerror}") from error


def _text(value: Any) -> str:
    """Return a value as its option would have it; a comma in a list is doubled."""
    if isinstance(value, list):
        return ",".join(each.replace(",", ",,") for each in value)
    return str(int(value) if isinstance(value, bool) else value)


_install()
