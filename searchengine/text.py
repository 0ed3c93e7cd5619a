"""Text that can be shown: file names may hold newlines, terminal escapes and bytes that are no text at all."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what would break a line or a terminal: ``a\\nb`` is shown as ``a\\\\nb``, a stray byte as ``\\\\xff``."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
