"""What this process takes of the machine: figures that must not grow while it runs for months."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

_KIB: Final = 1_024
_SELF: Final = Path("/proc/self")
_DESCRIPTORS: Final = (_SELF / "fd", Path("/dev/fd"))
"""Where Linux and macOS list our file descriptors."""


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """A snapshot of this process."""

    pid: int
    """Process id."""
    memory_bytes: int
    """Resident memory, bytes; where only the highest is known, that."""
    peak_memory_bytes: int
    """The highest resident memory so far, bytes."""
    file_descriptors: int | None
    """Open ones; None where it cannot be known."""
    file_descriptor_limit: int
    """How many may be open."""
    threads: int
    """Threads of Python."""
    tasks: int
    """trio tasks that have not ended."""
    cpu_s: float
    """Seconds of computation, of all threads."""


def process_figures() -> ProcessFigures:
    """The figures of this moment. Must be called under trio."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # Kilobytes on Linux, bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else _KIB)
    limit = file_descriptor_limit()
    return ProcessFigures(
        pid=os.getpid(),
        memory_bytes=_resident_bytes() or peak,
        peak_memory_bytes=peak,
        file_descriptors=_descriptors(limit),
        file_descriptor_limit=limit,
        threads=threading.active_count(),
        tasks=trio.lowlevel.current_statistics().tasks_living,
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
    )


def file_descriptor_limit() -> int:
    """How many file descriptors this process, and those that it starts, may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _resident_bytes() -> int:
    try:
        pages = int((_SELF / "statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _descriptors(limit: int) -> int | None:
    for folder in _DESCRIPTORS:
        try:
            # One of them is the listing's own.
            return sum(1 for _ in folder.iterdir()) - 1
        except OSError as error:
            if error.errno == errno.EMFILE:
                # None is left for the listing.
                return limit
    return None
