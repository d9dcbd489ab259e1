"""Measure how long a launch takes. Its two workers import nothing, so that only the launcher counts.

Also list the most expensive imports of our agent, and check that torch is not among them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import (
    COMMANDS,
    OPTIONS,
    OURS,
    PEER,
    Samples,
    environment,
    machine,
    parse_runs,
    row,
    spread,
    table,
    wall_time,
)

IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)$")  # own and cumulative µs, module

ENTRY = "from elastic_launch.cli.main import console; console()"  # as the script elastic-run does


def main() -> None:
    runs = parse_runs("Wall time of a launch, ours and torchrun's.", default=10)
    bare_name = "python -u"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "worker.py")
        script.write_text("import os\n")
        commands = {name: [*command, *OPTIONS, str(script)] for name, command in COMMANDS.items()}
        commands[bare_name] = [sys.executable, "-u", str(script)]
        for command in commands.values():  # a first run compiles modules and fills the page cache
            wall_time(command, folder)
        samples: Samples = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                samples[name].append(wall_time(command, folder))

    bare = median(samples[bare_name])
    added = {name: [seconds - bare for seconds in samples[name]] for name in (OURS, PEER)}
    print(f"Launch of 2 workers to the end, seconds, {runs} runs each\n")
    print(table([row("wall time", samples, 3, ratio_limit=1 / 12), row("beyond bare python", added, 3)]))
    print(f"\n`python -u worker.py` alone: {spread(samples[bare_name], 3)} s")
    print(machine([OURS, *OPTIONS, "worker.py"]), end="\n\n")
    print_imports()


def print_imports(top: int = 10) -> None:
    # The quickest of several measurements: disturbances only ever add to the cost.
    imports = min((measure_imports() for _ in range(5)), key=lambda found: sum(own for own, _, _ in found))
    if any(name.split(".")[0] == "torch" for _, _, name in imports):
        raise SystemExit("the agent imports torch")
    total = sum(own for own, _, _ in imports) / 1000
    print(f"The agent imports {len(imports)} modules in {total:.1f} ms, torch is not among them; the costliest:\n")
    print("| module | with what it imports, ms | itself, ms |\n|---|---|---|")
    for own, cumulative, name in sorted(imports, key=lambda one: one[1], reverse=True)[:top]:
        print(f"| {name} | {cumulative / 1000:.1f} | {own / 1000:.1f} |")


def measure_imports() -> list[tuple[int, int, str]]:
    """Return what a launch imports beyond a bare interpreter, in the order of completion.

    Each import is a tuple of own µs, cumulative µs and module.

    Measures a whole launch, because ``import elastic_launch.cli.main`` alone imports next to nothing. The workers'
    imports do not count, because the option applies to the agent's interpreter only.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "worker.py")
        script.touch()
        command = [sys.executable, "-X", "importtime", "-c", ENTRY, *OPTIONS, str(script)]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    found = [match.groups() for line in done.stderr.splitlines() if (match := IMPORT_LINE.match(line))]
    # The start of the interpreter itself ends with the module site.
    start = [name for _, _, name in found].index("site") + 1
    return [(int(own), int(cumulative), name) for own, cumulative, name in found[start:]]


if __name__ == "__main__":
    main()
