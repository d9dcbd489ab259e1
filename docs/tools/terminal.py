"""Make ``docs/report.svg``, a picture of a terminal, from what a real job prints: ``python docs/tools/terminal.py``."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

SCRIPT = """\
import os
import sys
import time


def train(rank, restart):
    for step in range(20):
        time.sleep(0.01)
        if rank == 1 and step == 15:
            raise ValueError("loss is nan")


rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
train(rank, restart)
time.sleep(2)
"""
COMMAND = ["--standalone", "--nproc-per-node", "4", "--max-restarts", "1", "--shutdown-timeout", "5", "train.py"]
COLOURS = {"31": "#ff6b6b", "33": "#e5c07b"}
COLUMNS, LINE, CHARACTER = 92, 18, 7.85


def run() -> str:
    """Return what the job shows on a terminal."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(SCRIPT)
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "elastic_launch", *COMMAND]
        process = subprocess.Popen(words, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 1 << 16):
                seen += block
        except OSError:
            pass  # the last process with the terminal has ended
        os.close(ours)
        process.wait()
    text = seen.decode().replace("\r", "").replace(folder, "/home/me").replace(socket.gethostname(), "host-a")
    return f"$ elastic-run {' '.join(COMMAND)}\n{text}"


def picture(text: str) -> str:
    """Return a text with colours as SVG."""
    lines = text.rstrip("\n").split("\n")
    height = 46 + LINE * len(lines)
    width = round(24 + CHARACTER * COLUMNS)
    rows = []
    for number, line in enumerate(lines):
        spans, colour = [], ""
        for part in re.split(r"(\x1b\[[\d;]*m)", line[: COLUMNS + 20]):
            if part.startswith("\x1b"):
                colour = COLOURS.get(part[2:-1].split(";")[-1], "")
            elif part:
                fill = f' fill="{colour}"' if colour else ""
                spans.append(f"<tspan{fill}>{escape(part)}</tspan>")
        rows.append(f'<text x="12" y="{46 + LINE * number}" xml:space="preserve">{"".join(spans)}</text>')
    dots = "".join(
        f'<circle cx="{18 + 18 * i}" cy="16" r="5" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
        "<title>What a job that failed prints</title>\n"
        "<style>text { font: 13px ui-monospace, 'DejaVu Sans Mono', Menlo, monospace; fill: #d7dae0 }</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#1b1e25"/>\n{dots}\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("report.svg").write_text(picture(run()))
