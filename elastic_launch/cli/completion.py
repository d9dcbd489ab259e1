"""Scripts with which a shell completes the command line: ``elastic-run --completion bash``.

They are made from the table of options and hold all that they need, so completing a word starts no Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from elastic_launch.cli.options import CLUSTERS, NUMA_MODES, OPTIONS, SHELLS, START_METHODS, Option
from elastic_launch.job import HangAction
from elastic_launch.rendezvous import BUILT_IN

CHOICES: dict[str, tuple[str, ...]] = {
    "nproc-per-node": ("auto", "cpu", "gpu", "xpu"),
    "rdzv-backend": BUILT_IN,
    "cluster": CLUSTERS,
    "preload": ("auto", "none"),
    "start-method": START_METHODS,
    "numa-binding": NUMA_MODES,
    "redirects": ("0", "1", "2", "3"),
    "tee": ("0", "1", "2", "3"),
    "event-log-handler": ("null", "console"),
    "hang-action": tuple(HangAction),
    "completion": SHELLS,
}
"""Values to offer, by the option's name; there may be others."""
FILE, DIRECTORY = "FILE", "DIR"
"""Metavars of options whose values are paths."""


def _no_value(text: str) -> bool:
    return True


ALL = (
    *OPTIONS,
    Option("adopt", False, _no_value, "", "SCRIPT is a program that starts torchrun; it starts elastic-run instead"),
    Option("help", False, _no_value, "", "show this help message and exit", "-h"),
    Option("version", False, _no_value, "", "show the version and exit"),
    Option("completion", "", str, "SHELL", "print a script that completes this command line in a shell"),
)
"""All options of the parser."""


def script(shell: str) -> str:
    """Return the script for a shell.

    Args:
        shell: one of ``SHELLS``.
    """
    makers: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return makers[shell]()


def _spellings(options: Iterable[Option]) -> str:
    """Return all spellings of options, also those with underscores."""
    return " ".join(flag for option in options for flag in option.flags)


def _with_value() -> list[Option]:
    return [option for option in ALL if option.metavar]


# ---- bash

_BASH = r"""# Completes elastic-run in bash: source this, or put it as elastic-run into
# ~/.local/share/bash-completion/completions.
_elastic_run() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} with_value=' @WITH_VALUE@ '
    local i word kind=script
    # bash splits --option=value into three words
    if [[ $cur == = ]]; then cur=
    elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}
    elif [[ $prev == --*=* ]]; then prev=
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --) ((i + 1 < COMP_CWORD)) && kind=argument; break ;;
            -m | --module) kind=module ;;
            --no-python | --no_python) kind=program ;;
            -?*)
                if [[ ${COMP_WORDS[i+1]} == = ]]; then ((i += 2))
                elif [[ $with_value == *" $word "* ]]; then ((i++))
                fi ;;
            *) kind=argument; break ;;
        esac
    done
    COMPREPLY=()
    if [[ $kind == argument ]]; then compopt -o default; return; fi
    if [[ $with_value == *" $prev "* ]]; then
        case $prev in
@VALUES@
        esac
        return
    fi
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '@OPTIONS@' -- "$cur")
        return
    fi
    compopt -o filenames
    case $kind in
        script) mapfile -t COMPREPLY < <(compgen -f -X '!*.py' -- "$cur"; compgen -d -- "$cur") ;;
        program) mapfile -t COMPREPLY < <(compgen -c -- "$cur"; compgen -f -- "$cur") ;;
    esac
}
complete -F _elastic_run elastic-run
"""


def _bash() -> str:
    values = []
    for option in _with_value():
        if option.name in CHOICES:
            offer = f"compgen -W '{' '.join(CHOICES[option.name])}'"
        elif option.metavar in (FILE, DIRECTORY):
            offer = "compgen -f" if option.metavar == FILE else "compgen -d"
        else:
            continue
        compopt = "compopt -o filenames; " if option.metavar in (FILE, DIRECTORY) else ""
        names = " | ".join(option.flags)
        values.append(f'            {names}) {compopt}mapfile -t COMPREPLY < <({offer} -- "$cur") ;;')
    return (
        _BASH.replace("@WITH_VALUE@", _spellings(_with_value()))
        .replace("@VALUES@", "\n".join(values))
        .replace("@OPTIONS@", " ".join(flag for option in ALL for flag in option.shown_flags if flag.startswith("--")))
    )


# ---- zsh

_ZSH = r"""#compdef elastic-run
# Completes elastic-run in zsh: put this as _elastic-run into a directory of $fpath, or source it after compinit.
_elastic-run() {
    local -a specs
    specs=(
@SPECS@
    )
    if ((words[(I)(-m|--module)])); then
        specs+=('1:module:' '*:argument:_files')
    elif ((words[(I)--no[-_]python])); then
        specs+=('1:program:_command_names' '*:argument:_files')
    else
        specs+=('1:script:_files -g "*.py"' '*:argument:_files')
    fi
    _arguments -S -A '-*' $specs
}
if [[ $funcstack[1] == _elastic-run ]]; then _elastic-run "$@"; else compdef _elastic-run elastic-run; fi
"""


def _zsh() -> str:
    specs = []
    for option in ALL:
        flags = option.shown_flags
        help_ = "[" + _escaped(option.help, "[]:") + "]"
        value = ""
        if option.metavar:
            actions = {FILE: "_files", DIRECTORY: "_files -/"}
            action = (
                f"({' '.join(CHOICES[option.name])})" if option.name in CHOICES else actions.get(option.metavar, " ")
            )
            value = f":{_escaped(option.metavar, ':')}:{action}"
        for flag in flags:
            form = flag if not value else f"{flag}=" if flag.startswith("--") else f"{flag}+"
            specs.append("        " + _quoted(f"({' '.join(flags)}){form}{help_}{value}"))
    return _ZSH.replace("@SPECS@", "\n".join(specs))


def _escaped(text: str, special: str) -> str:
    return "".join(f"\\{character}" if character in special else character for character in text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# ---- fish

_FISH = r"""# Completes elastic-run in fish: save this as ~/.config/fish/completions/elastic-run.fish, or source it.
function __elastic_run_before_script --description 'Whether the script is still to come'
    set -l words (commandline -opc)
    set -l skip no
    for word in $words[2..-1]
        if test $skip = yes
            set skip no
        else if contains -- $word @WITH_VALUE@
            set skip yes
        else if not string match -q -- '-?*' $word
            return 1
        end
    end
    return 0
end
complete -c elastic-run -f -n __elastic_run_before_script
@COMPLETIONS@
complete -c elastic-run -k -n __elastic_run_before_script -a '(__fish_complete_suffix .py)'
complete -c elastic-run -F -n 'not __elastic_run_before_script'
"""


def _fish() -> str:
    lines = []
    for option in ALL:
        words = ["complete -c elastic-run -n __elastic_run_before_script"]
        words += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.shown_flags]
        if option.name in CHOICES:
            words.append(f"-x -a '{' '.join(CHOICES[option.name])}'")
        elif option.metavar:
            offers = {FILE: "-r -F", DIRECTORY: "-x -a '(__fish_complete_directories)'"}
            words.append(offers.get(option.metavar, "-x"))
        description = option.help.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(" ".join([*words, f"-d '{description}'"]))
    return _FISH.replace("@WITH_VALUE@", _spellings(_with_value())).replace("@COMPLETIONS@", "\n".join(lines))
