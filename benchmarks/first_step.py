"""Where the time goes from the command to the first optimizer step of the digits example, cold and warm.

The phases follow each other. Each ends when the last rank, or the agent, has come to its end. The ranks note the time
at their first line, after their imports, when their process group has formed, and after the first step. The agent's
part is read from its events. All use the clock of the host.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from common import COMMANDS, OURS, machine, wall_time

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_ddp.py"
WAYS = ("none", "auto", "torch._dynamo,sklearn.datasets,sklearn.model_selection")
PHASES = {
    "agent: from the command to the ranks": "formed",
    "keeper, imports ahead, fork: to the first line": "begin",
    "imports of the program": "imported",
    "torch's rendezvous": "met",
    "data, model, DDP, first step": "step",
}
"""What each phase is called, by the note that ends it."""
NOTES = (
    (
        "import argparse\n",
        "import os as _os\nimport time as _time\nimport argparse\n_notes = {'begin': _time.time()}\n",
    ),
    ("def main() -> None:\n", "_notes['imported'] = _time.time()\n\n\ndef main() -> None:\n"),
    ('dist.init_process_group("gloo")\n', 'dist.init_process_group("gloo")\n    _notes["met"] = _time.time()\n'),
    (
        "            optimizer.step()\n",
        "            optimizer.step()\n"
        "            if 'step' not in _notes:\n"
        "                _notes['step'] = _time.time()\n"
        "                print(_notes, file=open(_os.environ['NOTES'], 'a'))\n",
    ),
)
"""What is replaced in the example, so that it notes the time."""


def main() -> None:
    parser = argparse.ArgumentParser(description="From the command to the first step, by phases.")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="launches of each (default: 3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], metavar="N", help="default: 2 8")
    args = parser.parse_args()
    columns = [(ranks, way) for ranks in args.ranks for way in WAYS]
    samples: dict[tuple[int, str], list[dict[str, float]]] = {column: [] for column in columns}
    for _ in range(args.runs):
        for ranks, way in columns:
            samples[ranks, way].append(measure(ranks, way))
    print(f"Seconds, medians of {args.runs}\n")
    print(f"| | {' | '.join(f'{ranks} ranks, {way}' for ranks, way in columns)} |\n|---|{'---|' * len(columns)}")
    for phase in (*PHASES, "together"):
        cells = [f"{median(sample[phase] for sample in samples[column]):.2f}" for column in columns]
        print(f"| {phase} | {' | '.join(cells)} |")
    print(f"\n{machine([OURS, '--preload', '...', '--nproc-per-node', 'N', 'digits_ddp.py'])}")


def measure(ranks: int, way: str) -> dict[str, float]:
    """Launch the example once. Returns the seconds that each phase took."""
    with tempfile.TemporaryDirectory() as folder:
        text = EXAMPLE.read_text()
        for old, new in NOTES:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        script, notes, events = (Path(folder, name) for name in ("digits_ddp.py", "notes", "events"))
        script.write_text(text)
        command = [*COMMANDS[OURS], "--standalone", "--nproc-per-node", str(ranks), "--events", str(events)]
        os.environ["NOTES"] = str(notes)
        begin = time.time()
        wall_time([*command, "--preload", way, str(script), "--epochs", "1"], folder)
        formed = [json.loads(line) for line in events.read_text().splitlines()]
        ends = {"formed": next(each["time"] for each in formed if each["name"] == "formed")}
        found = [json.loads(line.replace("'", '"')) for line in notes.read_text().splitlines()]
        assert len(found) == ranks
        ends |= {name: max(each[name] for each in found) for name in found[0]}
    seconds, last = {"together": ends["step"] - begin}, begin
    for phase, name in PHASES.items():
        seconds[phase], last = ends[name] - last, ends[name]
    return seconds


if __name__ == "__main__":
    main()
