"""Draw the pictures of ``docs/concepts.md`` from text: ``python docs/tools/pictures.py`` writes them."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[1]

LANES = {
    "rounds": """
        host-a | 0-27 round 0: ranks 0-7 | 30-66 round 1: ranks 0-7 | 71-100 round 2: ranks 0-7
        host-b | 0-27 round 0: ranks 8-15 | 30-52 round 1: ranks 8-15 | 52 host-b is lost !
        host-c | 10-71 spare: waits ~ | 71-100 round 2: ranks 8-15
        | 27 rank 9 fails: restart 1 of 3 ! | 71 no restart used
        """,
    "lease": """
        host-b: agent | 0-30 heartbeats are answered | 30-74 cut off from the store ~
        host-b: workers | 0-54 train | 54-74 save a checkpoint | 54 SIGTERM | 74 SIGKILL !
        the others | 0-88 train, or wait in a collective | 89-100 next round
        | 30 last answer | 74 the lease ends | 88 deadline
        """,
    "cause": """
        rank 0 | 0-52 trains | 52 connection closed by peer
        rank 1 | 0-40 trains | 40 ValueError: loss is nan !
        rank 2 | 0-57 trains | 57 connection closed by peer
        the report | 66-100 cause: rank 1, then: ranks 0, 2
        """,
}
"""Lanes by picture: a name, then ``FROM-TO text`` for bars and ``AT text`` for moments, in percent of the width.

``~`` at the end: a bar of somebody who waits; ``!``: a moment that is a failure. A lane without a name has the moments
that concern all.
"""
TREE = """
elastic-run (agent) | decides; one per node
  store | helper process: where the nodes meet
  elastic-keeper | parent of the workers: reaps what they leave
    worker, rank 0 | your script
      data loader | whatever it starts
    worker, rank 1 | your script
"""
STYLE = """
  .paper { fill: #fbfbfd; stroke: #d0d4dc } text { font: 13px system-ui, sans-serif; fill: #1f2430 }
  .bar { fill: #cfe3ff; stroke: #5b8def } .wait { fill: #eceef2; stroke: #a4abb8; stroke-dasharray: 4 3 }
  .line { stroke: #7a8190; stroke-dasharray: 3 3; fill: none } .solid { stroke: #7a8190; fill: none }
  .at { fill: #5b6270 } .bad { fill: #d13438 } .small { font-size: 12px } .name { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1e222b; stroke: #3a404d } text { fill: #e4e7ee } .bar { fill: #24406e; stroke: #6f9df5 }
    .wait { fill: #2b303b; stroke: #7a8190 } .at { fill: #b4bac6 } .bad { fill: #ff7b80 }
  }"""
LEFT, RIGHT, WIDTH, LANE = 140, 24, 820, 58


def lanes(text: str, title: str) -> str:
    """Draw lanes, with bars and moments on them, along one axis of time."""
    rows = [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]
    parts, height = [], 30 + LANE * len(rows)
    for number, (name, *marks) in enumerate(rows):
        top = 22 + LANE * number
        if name:
            parts.append(f'<text class="name" x="16" y="{top + 22}">{escape(name)}</text>')
        for mark in marks:
            begin, end, words, kind = re.fullmatch(r"(\d+)(?:-(\d+))? (.*?)( [!~])?", mark).groups()  # type: ignore[union-attr]
            x = _x(begin)
            if end:
                style = "wait" if kind else "bar"
                width = _x(end) - x
                parts.append(f'<rect class="{style}" x="{x}" y="{top + 4}" width="{width}" height="26" rx="5"/>')
                parts.append(f'<text class="small" x="{x + 8}" y="{top + 22}">{escape(words)}</text>')
            else:
                style = "bad" if kind else "at"
                low, high = (top + 4, top + 30) if name else (22, top + 4)
                parts.append(f'<path class="line" d="M{x} {low}V{high}"/>')
                parts.append(f'<circle class="{style}" cx="{x}" cy="{high}" r="4"/>')
                anchor, aside, below = ("end", -8, 14) if int(begin) > 60 else ("start", 8, 14)
                if not name:
                    anchor, aside, below = "middle", 0, 18
                parts.append(
                    f'<text class="small {style}" x="{x + aside}" y="{high + below}" text-anchor="{anchor}">'
                    f"{escape(words)}</text>"
                )
    return _svg(parts, height, title)


def tree(text: str, title: str) -> str:
    """Draw a tree of processes, with a remark on each."""
    parts, above = [], dict[int, int]()
    lines = text.strip("\n").splitlines()
    for number, line in enumerate(lines):
        name, _, remark = line.partition(" | ")
        depth = (len(name) - len(name.lstrip())) // 2
        x, y = 24 + 56 * depth, 20 + 46 * number
        if depth:
            parts.append(f'<path class="solid" d="M{x - 36} {above[depth - 1] + 32}V{y + 16}H{x}"/>')
        parts.append(f'<rect class="bar" x="{x}" y="{y}" width="200" height="32" rx="5"/>')
        parts.append(f'<text class="name" x="{x + 12}" y="{y + 21}">{escape(name.strip())}</text>')
        parts.append(f'<text class="small" x="{x + 214}" y="{y + 21}">{escape(remark)}</text>')
        above[depth] = y
    return _svg(parts, 26 + 46 * len(lines), title)


def pictures() -> dict[str, str]:
    """Return all pictures by file name."""
    drawn = {f"{name}.svg": lanes(text, name) for name, text in LANES.items()}
    return {"processes.svg": tree(TREE, "the processes of a node")} | drawn


def _x(percent: str) -> int:
    return LEFT + round(int(percent) / 100 * (WIDTH - LEFT - RIGHT))


def _svg(parts: list[str], height: int, title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}\n</style>\n"
        f'<rect class="paper" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="8"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    for name, text in pictures().items():
        (DOCS / name).write_text(text)
