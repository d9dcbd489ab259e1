"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<key>not run|file): (?P<value>.*?) -->\n\n?)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
SHOWN_ONLY = ("text",)
"""Languages of blocks that show output."""


class Block(NamedTuple):
    """A block of code in a page."""

    place: str
    """``PAGE:LINE``."""
    language: str
    text: str
    file: str
    """Name of the file that the block is; empty: it is none."""
    reason: str
    """Why it is not run; empty: it is."""

    @property
    def commands(self) -> list[str]:
        """What a person would type: the lines of a script, or those after a prompt."""
        joined = self.text.replace("\\\n", " ")
        lines = joined.splitlines()
        return [line[2:] for line in lines if line.startswith("$ ")] if self.language == "console" else lines


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        about = {match["key"]: match["value"]}
        lines = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        place = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(place, match["language"], lines, about.get("file", ""), about.get("not run", "")))
    return found
