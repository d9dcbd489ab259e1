"""Write what the reference and the man pages say of options, from the tables of the code."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable
from importlib import import_module

import elastic_launch
from elastic_launch.cli.completion import ALL
from elastic_launch.cli.options import EPILOG, GROUPS, OPTIONS, Option
from elastic_launch.errors import ExitCode
from elastic_launch.operate.__main__ import COMMANDS
from elastic_launch.rendezvous.factory import SETTINGS

GENERAL = [option for option in ALL if option not in OPTIONS]


def options_table() -> str:
    """Return the options of ``elastic-run`` as Markdown, a table for each group."""
    parts = []
    for title, options in {**GROUPS, "help": GENERAL}.items():
        rows = ["| option | default | meaning | variable |", "|---|---|---|---|"]
        for option in options:
            default = "" if option.default in (None, "", [], False) else f"`{_default(option)}`"
            variable = f"`{option.variable}`" if options is not GENERAL else ""
            rows.append(f"| {_spelling(option)} | {default} | {_cell(option.help)} | {variable} |")
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def exit_statuses() -> str:
    """Return the launcher's own exit statuses as the rows of a table."""
    docs = _attribute_docs()
    return "\n".join(f"| {code.value} | {_cell(docs[code.name])} |" for code in ExitCode)


def rendezvous_settings() -> str:
    """Return the names of the settings in ``--rdzv-conf``."""
    return ", ".join(f"`{name}`" for name in SETTINGS)


def commands() -> str:
    """Return the subcommands of ``elastic-job`` with their options, as Markdown."""
    parts = []
    for name in COMMANDS:
        parts.append(f"### elastic-job {name}\n\n```text\n{command_help(name)}```")
    return "\n\n".join(parts)


def command_help(name: str) -> str:
    """Return what ``elastic-job NAME --help`` prints on 80 columns."""
    before, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            import_module(f"elastic_launch.operate.{COMMANDS[name][0]}").main(["--help"])
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update({"COLUMNS": before} if before else {})
    return out.getvalue()


def man_pages() -> dict[str, str]:
    """Return the man pages in roff, by file name."""
    return {"elastic-run.1": _man_of_run(), "elastic-job.1": _man_of_job()}


def _man_of_run() -> str:
    sections = []
    for title, options in {**GROUPS, "help": GENERAL}.items():
        sections.append(f".SS {_roff(title[0].upper() + title[1:])}")
        for option in options:
            flags = ", ".join(rf"\fB{_roff(flag)}\fR" for flag in option.shown_flags)
            value = rf" \fI{_roff(option.metavar)}\fR" if option.metavar else ""
            default = "" if option.default in (None, "", [], False) else f" (default: {_default(option)})"
            sections += [".TP", flags + value, _roff(option.help + default)]
    hints, *examples = EPILOG.strip().split("\n\n")
    shown = [f".PP\n{_roff(text)}" if text[0] != " " else f".PP\n.nf\n{_roff(text)}\n.fi" for text in examples]
    return _page(
        "elastic-run",
        "start, supervise and restart the workers of a distributed training job",
        r"\fBelastic-run\fR [\fIOPTION\fR ...] \fISCRIPT\fR [\fIARGUMENT\fR ...]",
        {
            "DESCRIPTION": _roff(hints),
            "OPTIONS": "\n".join(sections),
            "EXIT STATUS": "0 if all workers exited with 0; that of the worker that was the cause; 128 + N if signal N "
            "killed that worker or ended the job.\n"
            + "\n".join(f".TP\n{code.value}\n{_roff(_attribute_docs()[code.name])}" for code in ExitCode),
            "EXAMPLES": "\n".join(shown),
        },
        "elastic-job(1), torchrun",
    )


def _man_of_job() -> str:
    helps = [f".SS elastic-job {name}\n.nf\n{_roff(command_help(name))}.fi" for name in COMMANDS]
    return _page(
        "elastic-job",
        "look at running jobs of elastic-run, stop and restart them",
        r"\fBelastic-job\fR \fICOMMAND\fR [\fIJOB\fR] [\fIOPTION\fR ...]",
        {
            "DESCRIPTION": "JOB is a job's id, the beginning of it, or the pid of its agent; with only one job it may "
            "be left out.",
            "COMMANDS": "\n".join(helps),
            "EXIT STATUS": "0 if all is well, 2 if the arguments are wrong, 3 if no such job runs.",
        },
        "elastic-run(1)",
    )


def _page(name: str, what: str, synopsis: str, sections: dict[str, str], see_also: str) -> str:
    parts = [
        f'.TH {name.upper()} 1 "" "elastic-launch {elastic_launch.__version__}"',
        f".SH NAME\n{_roff(f'{name} - {what}')}",
        f".SH SYNOPSIS\n{synopsis}",
        *(f".SH {title}\n{text}" for title, text in sections.items()),
        f".SH SEE ALSO\n{see_also}",
    ]
    return "\n".join(parts) + "\n"


def _roff(text: str) -> str:
    """Escape what roff would take for markup."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^(?=[.'])", r"\\&", escaped, flags=re.MULTILINE)


def _default(option: Option) -> str:
    return "on" if option.default is True else str(option.default)


def _spelling(option: Option) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    return ", ".join(f"`{flag}{value}`" for flag in option.shown_flags)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _attribute_docs() -> dict[str, str]:
    """Return the docstrings below the members of ``ExitCode``, which only its source has."""
    import ast
    import inspect

    body: Iterable[ast.stmt] = ast.parse(inspect.getsource(ExitCode)).body[0].body  # type: ignore[attr-defined]
    docs, name = {}, ""
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = str(node.value.value).replace("``", "`")
    return docs


NAMESPACES = ("worker", "run", "events", "metrics", "timer.client", "timer.server", "utils", "utils.data")
"""Modules that users import as such."""


def api() -> str:
    """Return what mkdocstrings is to show: the names of the package, and the modules that users import as such."""
    names = [f"::: elastic_launch.{name}" for name in elastic_launch.__all__]
    modules = [
        f"## {module}\n\n::: elastic_launch.{module}\n    options: {{show_root_heading: false}}"
        for module in NAMESPACES
    ]
    return "\n\n".join(["## The package", *names, *modules])
