"""How far a long step has come, for whoever draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class Stage(StrEnum):
    """What is being done."""

    WAITING = "waiting for another process"
    DOWNLOADING = "downloading"
    CHECKING = "checking"
    EXTRACTING = "extracting"
    CONVERTING = "converting"
    HASHING = "hashing"


@dataclass(frozen=True, slots=True)
class Progress:
    """One report."""

    stage: Stage
    """What is being done."""
    done: int
    """Bytes done in this stage."""
    total: int
    """Bytes in all; 0 when unknown."""


Report: TypeAlias = Callable[[Progress], None]
"""Called several times a second. It may raise, which stops the work and undoes what was begun: this is how the work is
cancelled when it runs in a thread."""


def silent(_progress: Progress) -> None:
    """Report to nobody."""
