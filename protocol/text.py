"""Making a peer's text safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without control and format characters (terminal escapes, bidirectional overrides), on one line."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def printable_lines(text: str) -> str:
    """The text without control and format characters, line breaks and tabs kept."""
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)
