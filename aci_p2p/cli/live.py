"""The one-screen view of a running node: drawn here, written to the terminal by a thread."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TextIO

import trio
from rich.console import Console

from aci_p2p.cli.output import CLOSE_S, write_all
from aci_p2p.cli.screen import View, draw
from aci_p2p.clock import system_clock
from aci_p2p.control import Journal
from aci_p2p.control.observer import Observer
from aci_p2p.protocol.errors import AciError
from aci_p2p.tasks import open_background

FRAME_S: Final = 0.5
"""Seconds between two frames."""
FALLBACK_SIZE: Final = os.terminal_size((80, 24))
"""Of a terminal that does not say."""
MIN_SIZE: Final = os.terminal_size((20, 5))
"""What is drawn for a smaller one, of which it then shows a part."""

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
"""To the alternate screen, cursor hidden (xterm's control sequences, which all terminals of today know)."""
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_BEGIN: Final = "\x1b[?2026h\x1b[H"
"""Show nothing until _END, from the top left."""
_END: Final = "\x1b[J\x1b[?2026l"
_NEXT_LINE: Final = "\x1b[K\r\n"

log = logging.getLogger("aci_p2p.live")


class Terminal:
    """Shows frames on a terminal that may take its time or be gone: a frame that the next one overtakes is left out."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` of the terminal."""
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._frame: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="screen")
        self._thread.start()

    def show(self, frame: str) -> None:
        """Have a frame shown; returns at once."""
        with self._changed:
            self._frame = frame
            self._changed.notify()

    def close(self) -> None:
        """Leave the screen as it was found; waits for a terminal that takes its time, for CLOSE_S seconds at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        try:
            self._write(_ENTER)
            shown: str | None = None
            while (frame := self._next()) is not None:
                if frame != shown:
                    self._write(_BEGIN + frame.replace("\n", _NEXT_LINE) + _END)
                    shown = frame
            self._write(_LEAVE)
        except OSError:
            # The terminal is gone; SIGHUP says so to those who care.
            return

    def _next(self) -> str | None:
        with self._changed:
            while self._frame is None and not self._closing:
                self._changed.wait()
            frame, self._frame = self._frame, None
            return None if self._closing else frame

    def _write(self, text: str) -> None:
        write_all(self._descriptor, text.encode(errors="replace"))


@asynccontextmanager
async def open_live(observer: Observer, journal: Journal, file: TextIO) -> AsyncGenerator[None]:
    """Show the view on a terminal within the block."""
    terminal = Terminal(file.fileno())
    utf8 = file.encoding.lower().replace("-", "") == "utf8"
    try:
        async with open_background() as tasks:
            tasks.start_soon(_run, observer, journal, terminal, file.fileno(), utf8)
            yield
    finally:
        terminal.close()


async def _run(observer: Observer, journal: Journal, terminal: Terminal, descriptor: int, utf8: bool) -> None:  # noqa: FBT001
    while True:
        try:
            view = View(
                status=await observer.status(),
                peers=(await observer.peers())["peers"],
                book=await observer.book(),
                events=tuple(journal.events),
                now_ms=system_clock(),
            )
        except AciError as error:
            log.warning("the view is not current", extra={"fields": {"error": error}})
        else:
            # In a thread: it takes milliseconds, in which the node has others to serve.
            draw = partial(render, view, _size(descriptor), utf8=utf8)
            terminal.show(await trio.to_thread.run_sync(draw))
        await trio.sleep(FRAME_S)


def render(view: View, size: os.terminal_size, *, utf8: bool = True) -> str:
    """A frame of at most `size.lines` lines of `size.columns` columns, with colours unless NO_COLOR is set."""
    width, height = max(size.columns, MIN_SIZE.columns), max(size.lines, MIN_SIZE.lines)
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        highlight=False,
        legacy_windows=False,
        no_color=bool(os.environ.get("NO_COLOR")),
    )
    with console.capture() as captured:
        console.print(draw(view, width, height, utf8=utf8), end="")
    text = captured.get().rstrip("\n")
    return text if utf8 else text.encode("ascii", "replace").decode("ascii")


def _size(descriptor: int) -> os.terminal_size:
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return FALLBACK_SIZE
    return size if size.columns and size.lines else FALLBACK_SIZE
