"""Process lines of output as bytes: redrawn lines, lines that match, and the end of a stream as text.

Progress bars redraw a line after a carriage return. Such a line counts as what it showed last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_REDRAWN = re.compile(rb"^[^\n]*\r(?=[^\r\n])", re.MULTILINE)
# Carriage returns at the end of a line belong to its end. Without the anchor, a long line would take quadratic time.

_ESCAPES = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]?"  # colors and cursor movements
    rb"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # titles and links
    rb"|\x1b[ -/]*[0-Z\\`-~]?"
)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*\x1b?|[ -/]*)\Z")
"""The beginning of such a sequence at the end of a block."""
_COLOUR = re.compile(rb"\x1b\[[0-9;:]*m")
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r")) + b"\x7f"


def last_states(lines: bytes) -> bytes:
    """Return complete lines without what was overwritten in them."""
    return _REDRAWN.sub(b"", lines) if b"\r" in lines else lines


def last_state(line: bytearray) -> None:
    """Remove from an unfinished line what was overwritten in it."""
    del line[: line.rfind(b"\r", 0, len(line.rstrip(b"\r"))) + 1]


def without_escapes(begun: bytes, block: bytes) -> tuple[bytes, bytes]:
    """Return a block of a stream without escape sequences, and what must be given with the next block.

    Args:
        begun: what the call for the block before returned as second value; empty at the beginning.
        block: the next bytes of the stream. Where it is divided into blocks makes no difference.

    >>> without_escapes(b"", b"\x1b[31mred\x1b[")
    (b'red', b'\x1b[')
    """
    if not begun and b"\x1b" not in block:
        return block, b""
    data = begun + block
    if unfinished := _UNFINISHED.search(data):
        data, begun = data[: unfinished.start()], unfinished[0]
    else:
        begun = b""
    # Of a sequence, only its kind and its last byte decide how it goes on. A picture can be one of many megabytes.
    return _ESCAPES.sub(b"", data), begun[:2] + begun[2:][-1:]


def contained(lines: bytes) -> bytes:
    """Return lines for a terminal that others share: colours end with their line, other control sequences are left out.

    >>> contained(b"\x1b[31mred\n\x1b[2Jplain\n")
    b'\x1b[31mred\x1b[0m\nplain\n'
    """
    if b"\x1b" not in lines:
        return lines
    return b"\n".join(_contained(line) if b"\x1b" in line else line for line in lines.split(b"\n"))


def _contained(line: bytes) -> bytes:
    line = _ESCAPES.sub(lambda found: found[0] if _COLOUR.fullmatch(found[0]) else b"", line)
    last = line.rfind(b"\x1b")
    if last < 0 or line.startswith((b"\x1b[0m", b"\x1b[m"), last):
        return line
    text = line.rstrip(b"\r")
    return text + b"\x1b[0m" + line[len(text) :]


def matching(lines: bytes, texts: Iterable[bytes]) -> bytes:
    """Return those of the complete lines that contain one of the texts."""
    texts = [text for text in texts if text in lines]  # for speed: most blocks contain none
    if not texts:
        return b""
    return b"".join(line + b"\n" for line in lines[:-1].split(b"\n") if any(text in line for text in texts))


def end_as_text(data: bytes, is_whole: bool, lines: int, size: int) -> str:
    """Return the last lines of a stream as text without control sequences.

    Args:
        data: the stream, or its last bytes.
        is_whole: True if ``data`` is the whole stream. False if it may begin in the middle of a line.
        lines: maximum number of lines.
        size: maximum number of bytes; a longer last line loses its beginning.
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
