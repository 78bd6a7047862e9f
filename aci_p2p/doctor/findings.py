"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from aci_p2p.protocol.errors import AciError


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be, or of no importance here."""
    WARNING = "warning"
    """The node works, but worse than it could."""
    PROBLEM = "problem"
    """Something does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    """What was looked at: a word or two."""
    level: Level
    """How bad it is."""
    message: str
    """What was found."""
    action: str = ""
    """What to do: a command or a setting; empty when all is well."""


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, message)


def warning(check: str, message: str, action: str) -> Finding:
    """The node works, but worse than it could."""
    return Finding(check, Level.WARNING, message, action)


def problem(check: str, message: str, action: str) -> Finding:
    """Something does not work."""
    return Finding(check, Level.PROBLEM, message, action)


def problem_of(check: str, error: AciError, action: str = "") -> Finding:
    """What an error says; `action` for one that does not say what to do."""
    return problem(check, error.message, error.hint or action)
