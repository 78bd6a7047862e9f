"""Writing to terminals and pipes that may take their time, while the node goes on answering its peers."""

from __future__ import annotations

import io
import os
import queue
import select
import threading
from contextlib import suppress
from typing import IO, Final

import trio

QUEUE_TEXTS: Final = 1_024
"""Texts that wait for a slow terminal, before new ones are dropped: minutes of log."""
CLOSE_S: Final = 1.0
"""Seconds for what still waits to be written at the end."""


def can_be_live(file: IO[str]) -> bool:
    """Whether a file is a terminal that can be drawn on."""
    return file.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")


class Background(io.TextIOBase):
    """A text file that never makes its writer wait: a thread writes to the descriptor behind it.

    What comes while QUEUE_TEXTS texts wait is dropped, and the number of dropped texts is written once there is room.
    After an error, such as a closed pipe, everything is.
    """

    encoding = "utf-8"

    def __init__(self, file: IO[str] | None) -> None:
        """`file`: where it goes in the end, such as `sys.stderr`; None, as a closed one is: nowhere."""
        self._descriptor = None if file is None else file.fileno()
        self._texts: queue.Queue[str | None] = queue.Queue(QUEUE_TEXTS)
        self._dropped = 0
        # Directly to the descriptor: a thread stuck in a Python file would hold its lock when Python ends.
        self._thread = threading.Thread(target=self._work, daemon=True, name="output")
        self._thread.start()

    def fileno(self) -> int:
        """The descriptor that is written to. Raises OSError when there is none."""
        if self._descriptor is None:
            raise io.UnsupportedOperation
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str, /) -> int:
        """Have `text` written; returns at once."""
        try:
            if self._dropped:
                self._texts.put_nowait(f"[{self._dropped} lines of output were dropped]\n")
                self._dropped = 0
            self._texts.put_nowait(text)
        except queue.Full:
            self._dropped += 1
        return len(text)

    def close(self) -> None:
        """Wait until what waits is written, for CLOSE_S seconds at most."""
        if not self.closed:
            with suppress(queue.Full):
                self._texts.put_nowait(None)
                self._thread.join(CLOSE_S)
            super().close()

    def _work(self) -> None:
        descriptor = self._descriptor
        while (text := self._texts.get()) is not None:
            try:
                if descriptor is not None:
                    write_all(descriptor, text.encode(errors="replace"))
            except OSError:
                descriptor = None


async def write_text(file: IO[str], text: str) -> None:
    """Write all of `text`, however long its reader takes; the event loop runs on meanwhile. Raises OSError.

    When cancelled, part of it may be written.
    """
    try:
        descriptor = file.fileno()
    except OSError:
        # Not a real file.
        file.write(text)
        return
    file.flush()
    data = text.encode(getattr(file, "encoding", None) or "utf-8", errors="replace")
    await trio.to_thread.run_sync(write_all, descriptor, data, abandon_on_cancel=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting as long as it takes. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            # Another program made the terminal that we share non-blocking.
            select.select((), (descriptor,), ())
