"""Making a peer's text safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without control and format characters (terminal escapes, bidirectional overrides), on one line."""
    return "".join(char if char.isprintable() else " " for char in text).strip()
