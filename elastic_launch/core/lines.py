"""Layer 1: lines of output, as bytes: redraws, matches, the end of a stream as text. Pure.

A line that was redrawn (progress bars write carriage returns) counts as what it showed last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_REDRAWN = re.compile(rb"^[^\n]*\r(?=[^\r\n])", re.MULTILINE)
# Carriage returns at the end of a line are part of its end. Anchored: else a long line costs its length squared.

_ESCAPES = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and movements
    rb"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # titles and links
    rb"|\x1b[ -/]*[0-Z\\`-~]?"
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r")) + b"\x7f"


def last_states(lines: bytes) -> bytes:
    """Lines as they look once they are ended: of each what followed the last redraw."""
    return _REDRAWN.sub(b"", lines) if b"\r" in lines else lines


def last_state(line: bytearray) -> None:
    """Cut from an unfinished line what was redrawn since."""
    del line[: line.rfind(b"\r", 0, len(line.rstrip(b"\r"))) + 1]


def matching(lines: bytes, texts: Iterable[bytes]) -> bytes:
    """Those lines that contain one of the texts; all are ended."""
    texts = [text for text in texts if text in lines]  # in most blocks none is
    if not texts:
        return b""
    return b"".join(line + b"\n" for line in lines[:-1].split(b"\n") if any(text in line for text in texts))


def end_as_text(data: bytes, is_whole: bool, lines: int, size: int) -> str:
    """The end of a stream, for people: without control sequences.

    Args:
        data: the stream, or its end.
        is_whole: whether ``data`` begins where the stream began; else it may begin within a line.
        lines: of these at most so many,
        size: and at most so many bytes; of a longer last line its end.
    """
    shown = last_states(_ESCAPES.sub(b"", data).translate(None, _CONTROLS)).replace(b"\r", b"")
    found = shown.rstrip().split(b"\n")
    if not is_whole and len(found) > 1:
        del found[0]
    kept = b"\n".join(found[-lines:])
    if len(kept) > size:
        kept = kept[-size:]
        _, end, rest = kept.partition(b"\n")
        kept = rest if end else kept
    return kept.decode(errors="replace").strip("\n")
