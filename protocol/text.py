"""Making a peer's text safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without control and format characters (terminal escapes, bidirectional overrides), on one line."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def printable_lines(text: str) -> str:
    """The text without control and format characters; line breaks, tabs and joiners are kept."""
    return "".join(char if char.isprintable() or char in "\n\t\u200c\u200d" else " " for char in text)
