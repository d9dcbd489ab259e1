"""What mkdocs does besides: text from the code goes into the pages, and files beside ``docs/`` onto the site."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import reference  # noqa: E402 - beside this file

BESIDE = re.compile(r"\]\(\.\./([\w./-]+)")
"""A link to what is not below ``docs/``; GitHub follows it, too."""
GENERATED = re.compile(r"<!-- generated: (\w+) -->")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to beside ``docs/``."""
    for page in (ROOT / "docs").glob("*.md"):
        for name in set(BESIDE.findall(page.read_text())):
            if not files.get_file_from_path(f"source/{name}") and (ROOT / name).is_file():
                files.append(File.generated(config, f"source/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what is generated, and lead links beside ``docs/`` to their copies."""
    markdown = GENERATED.sub(lambda found: getattr(reference, found[1])(), markdown)
    return BESIDE.sub(r"](source/\1", markdown)
