"""Measure the cost of output that goes to files and the console at once: ``-t 3``, 8 workers, the console a file.

Every line is looked up on the console, so that a launcher which is fast because it loses lines is found out. Times are
from the first line of the first worker to the launcher's end. The CPU time is that of the launcher, its start included.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from common import COMMANDS, OURS, PEER, Samples, environment, fail, machine, row, table

WORKERS = 8
OPTIONS = ["--standalone", "--nproc-per-node", str(WORKERS), "-t", "3"]
# Both launchers run scripts with `python -u`. The worker notes when it began and, at its end, its own CPU time.
WORKER = """\
import os, resource, sys, time
begin = time.monotonic()
mode, lines, marks = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rank = os.environ["RANK"]
if mode == "blocks":
    with open(1, "w", closefd=False) as out:
        for number in range(lines):
            out.write(f"{rank} {number}\\n")
else:
    for number in range(lines):
        sys.stdout.write(f"{rank} {number}\\n")
used = resource.getrusage(resource.RUSAGE_SELF)
with open(marks, "a") as file:
    file.write(f"{begin} {used.ru_utime + used.ru_stime}\\n")
"""
MODES = {"blocks": "blocks", "lines": "`python -u`, line by line"}
FASTER = {"blocks": 5, "lines": 2.5}
LINE = re.compile(rb"\[default(\d)\]:(\d) (\d+)")
OWN = re.compile(rb"elastic-run: |[IWE]\d{4} ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the workers' output, ours and torchrun's.")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="launches of each (default: 3)")
    parser.add_argument("--lines", type=int, default=1_000_000, metavar="N", help="of each worker (default: 1,000,000)")
    args = parser.parse_args()

    rows, faults = [], []
    for mode, how in MODES.items():
        seconds: Samples = {OURS: [], PEER: []}
        cpu: Samples = {OURS: [], PEER: []}
        for _ in range(args.runs):
            for name in COMMANDS:
                took, used, lost, torn = measure(name, mode, args.lines)
                seconds[name].append(took)
                cpu[name].append(used)
                faults.append(f"{name}, {mode}: {lost:,} lines lost, {torn:,} torn")
        rows.append(row(f"{how}: time, s", seconds, 2, ratio_limit=1 / FASTER[mode]))
        rows.append(row(f"{how}: CPU time of the launcher, s", cpu, 2, ratio_limit=1 / 10))

    print(f"{WORKERS} workers × {args.lines:,} lines, {args.runs} launches of each\n")
    print(table(rows))
    print("\nOf each launch's lines on the console:\n")
    print("\n".join(f"- {fault}" for fault in faults))
    print(f"\n{machine([OURS, *OPTIONS, 'worker.py'])}")


def measure(name: str, mode: str, lines: int) -> tuple[float, float, int, int]:
    """Return seconds from the first line to the end, CPU seconds of the launcher, lines lost and lines torn."""
    with tempfile.TemporaryDirectory() as folder, Path(folder, "console").open("w+b") as console:
        script, marks = Path(folder, "worker.py"), Path(folder, "marks")
        script.write_text(WORKER)
        command = [*COMMANDS[name], *OPTIONS, "--log-dir", f"{folder}/logs", str(script), mode, str(lines), str(marks)]
        process = subprocess.Popen(command, env=environment(folder), stdout=console, stderr=console)
        _, status, usage = os.wait4(process.pid, 0)
        end = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            fail(f"exit status {process.returncode}", command, console)
        begins, workers_cpu = zip(*(map(float, line.split()) for line in marks.read_text().splitlines()), strict=True)
        lost, torn = check(Path(console.name), lines)
        # The usage of the launcher includes that of the workers it waited for, which is known.
        return end - min(begins), usage.ru_utime + usage.ru_stime - sum(workers_cpu), lost, torn


def check(console: Path, lines: int) -> tuple[int, int]:
    """Return how many lines never arrived whole, and how many arrived that no worker wrote."""
    seen = [bytearray(lines) for _ in range(WORKERS)]
    torn = 0
    with console.open("rb") as file:
        for line in file:
            found = LINE.fullmatch(line[:-1])
            if found and found[1] == found[2] and int(found[3]) < lines and not seen[int(found[1])][int(found[3])]:
                seen[int(found[1])][int(found[3])] = 1
            elif not OWN.match(line):
                torn += 1
    return sum(numbers.count(0) for numbers in seen), torn


if __name__ == "__main__":
    main()
