"""The one-screen view: what it shows in whatever room there is, and terminals that take their time or go away."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import trio
from rich.cells import cell_len
from rich.text import Text

from aci_p2p.cli.live import Terminal, open_live, render
from aci_p2p.cli.output import can_be_live
from aci_p2p.cli.screen import View
from aci_p2p.control import Event, Journal, PeersReport, StatusReport, ask
from aci_p2p.control.market import ModelSummary
from aci_p2p.control.observer import Observer
from tests.cli.views import CONSUMER, HOSTILE, NODE, book, peer, status, view

COMMAND = (sys.executable, "-c", "from aci_p2p.cli import main; main()")
START_S = 30.0
"""Seconds for a process to come up on a busy machine."""
ENTERED = b"\x1b[?1049h"
LEFT = b"\x1b[?25h\x1b[?1049l"


def lines_of(shown: View, columns: int, lines: int, *, utf8: bool = True) -> list[str]:
    """The screen's lines without colours."""
    return Text.from_ansi(render(shown, os.terminal_size((columns, lines)), utf8=utf8)).plain.split("\n")


@pytest.mark.parametrize("lines", [1, 4, 5, 6, 9, 12, 16, 24, 32, 60, 200])
@pytest.mark.parametrize("columns", [1, 20, 40, 72, 80, 109, 110, 120, 250])
def test_it_fits_every_terminal(columns: int, lines: int) -> None:
    shown = lines_of(view(), columns, lines)
    assert len(shown) <= max(lines, 5)
    assert {cell_len(line) for line in shown} == {max(columns, 20)}


def test_what_is_shown() -> None:
    text = "\n".join(lines_of(view(), 160, 50))
    for part in (
        "aci-p2p 0.1.0  network aci-test  running for 3 d 4 h",
        NODE,
        f"/ip4/192.0.2.1/tcp/9400/p2p/{NODE}  and 1 more",
        "private through 1 relay  bootstrap 1 of 2  120 MiB  34 files  41 tasks  2 warnings  0 errors",
        "jobs  1 of 4 slots",
        "31 done, 2 failed, 0.0123 ACI earned; 1 ACI with all jobs",
        f"7f4b5ff3  for {CONSUMER[-8:]}  67 tokens  22.8/s  4 s  smollm2",
        "serving smollm2",
        "checkpoints  none: no chain configured",
        "12 offers and 12 bids in the last minute",
        "120 and 120 in all, 2 lost; 15 bids of ours, 2 open",
        "2 providers  3 of 8 slots free  from 0.000004 ACI  smollm2-135m-instruct",
        "1 provider   0 of 1 slot free   from 0.000001 ACI  00000000",
        f" 0 s ago  00000000  of {CONSUMER[-8:]}  160 tokens  <= 1 ACI  smollm2-135m-instruct",
        "peers  7: 3 in, 5 out",
        f"{CONSUMER[-8:]}  in  direct  12.3 ms",
        "18:57:30 info    event 99",
    ):
        assert part in text


def test_a_small_one_keeps_what_matters() -> None:
    shown = lines_of(view(), 60, 20)
    text = "\n".join(shown)
    for part in ("node 12D3KooW", "jobs  1 of 4 slots", "7f4b5ff3", "peers  7", "event 99"):
        assert part in text
    # The log ends with the last line.
    assert "event 99" in shown[-2]


def test_a_node_that_begins() -> None:
    empty = status()
    empty["provider"] = None
    empty["addresses"], empty["bootstrap"], empty["jobs"] = [], [], []
    empty["market"]["recent_offers"] = []
    empty["reachability"] = {"state": "unknown", "why": "", "relays": []}
    text = "\n".join(lines_of(View(empty, (), (), (), 0), 100, 40))
    for part in ("nobody can dial it", "it serves no model", "connected to nobody yet", "nothing yet", "no chain"):
        assert part in text


def test_a_peers_text_reaches_no_terminal() -> None:
    bad = status()
    bad["node"]["version"] = bad["addresses"][0] = HOSTILE
    assert bad["provider"]
    bad["provider"]["running"][0]["model"] = HOSTILE
    bad["market"]["recent_offers"][0]["model_root"] = HOSTILE
    events = (Event("2026-11-24T18:57:30.123Z", "info", "node", HOSTILE, {"x": HOSTILE}),)
    shown = render(View(bad, (peer(agent=HOSTILE, address=HOSTILE),), book(), events, 0), os.terminal_size((140, 60)))
    for part in ("\x1b[2J", "\x07", "\u202e", "\r", "\U0001f604"):
        assert part not in shown
    assert "[red]x[/red] :smile:" in Text.from_ansi(shown).plain


def test_few_characters_and_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = view()
    shown.status["node"]["network"] = "é"
    assert "\n".join(lines_of(shown, 120, 30, utf8=False)).isascii()
    assert "\x1b[" in render(shown, os.terminal_size((120, 30)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in render(shown, os.terminal_size((120, 30)))


def test_where_it_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as file, os.fdopen(master, "rb"):
        monkeypatch.setenv("TERM", "xterm")
        assert can_be_live(file)
        assert not can_be_live(io.StringIO())
        monkeypatch.setenv("TERM", "dumb")
        assert not can_be_live(file)
        monkeypatch.delenv("TERM")
        assert not can_be_live(file)


# Terminals.


def read_until(reader: int, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = os.read(reader, 1 << 16)
        assert part, data[-200:]
        data += part
    return data


class Shown:
    """A node as the view asks it."""

    async def status(self) -> StatusReport:
        await trio.lowlevel.checkpoint()
        return status()

    async def peers(self) -> PeersReport:
        await trio.lowlevel.checkpoint()
        return PeersReport(peers=[peer()])

    async def book(self) -> list[ModelSummary]:
        await trio.lowlevel.checkpoint()
        return book()


async def test_the_view_shows_what_the_node_says() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        async with open_live(cast("Observer", Shown()), Journal(), file):
            data = await trio.to_thread.run_sync(read_until, reader, b"\x1b[?2026l")
    os.close(reader)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())
    for part in (NODE, "31 done, 2 failed", "2 providers  3 of 8 slots free", "in  direct"):
        assert part in shown


def test_a_terminal_is_left_as_it_was() -> None:
    reader, writer = os.pipe()
    terminal = Terminal(writer)
    terminal.show("first\nline")
    data = read_until(reader, b"line\x1b[J\x1b[?2026l")
    assert data.startswith(ENTERED + b"\x1b[?25l\x1b[?2026h\x1b[Hfirst\x1b[K\r\nline")
    # The same once more is not worth writing.
    terminal.show("first\nline")
    terminal.show("second")
    assert b"first" not in read_until(reader, b"second\x1b[J")
    terminal.close()
    assert read_until(reader, LEFT).endswith(LEFT)
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_stands_still_holds_nobody_up() -> None:
    reader, writer = os.pipe()
    terminal = Terminal(writer)
    # Nobody reads before they are over.
    for number in range(1_000):
        terminal.show(f"{number} " + "x" * 100_000)
    terminal.close()
    # It goes on: what was overtaken is left out, and the screen is left.
    data = read_until(reader, LEFT)
    assert data.count(b"\x1b[?2026h") <= 3
    os.close(reader)
    os.close(writer)


def test_a_terminal_that_is_gone() -> None:
    reader, writer = os.pipe()
    terminal = Terminal(writer)
    read_until(reader, ENTERED)
    os.close(reader)
    for number in range(10):
        terminal.show(str(number))
        time.sleep(0.01)
    terminal.close()
    # It did not wait until it gave up.
    assert not terminal._thread.is_alive()
    os.close(writer)


# A real node on a terminal.


class Screen:
    """A node on a pseudo-terminal, of which everything is kept that it writes, while it is read."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.master, terminal = pty.openpty()
        self.resize(100, 30)
        self.data = b""
        self.reading = threading.Event()
        self.reading.set()
        self.process = subprocess.Popen(
            [*COMMAND, "join", "--no-serve", "--listen", "/ip4/127.0.0.1/tcp/0", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={**os.environ, "ACI_HOME": str(home), "TERM": "xterm"},
        )
        os.close(terminal)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        # The end of a pseudo-terminal is an error on Linux.
        with suppress(OSError):
            while part := os.read(self.master, 1 << 16):
                self.data += part
                self.reading.wait()

    def close(self) -> None:
        """End the node and its terminal; before its number is given to another one."""
        self.reading.set()
        self.process.kill()
        self.process.wait()
        self.reader.join()
        os.close(self.master)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait_for(self, text: str | bytes) -> None:
        wanted = text.encode() if isinstance(text, str) else text
        deadline = time.monotonic() + START_S
        while wanted not in self.data:
            assert time.monotonic() < deadline, self.data[-2_000:]
            time.sleep(0.02)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    shown = Screen(tmp_path)
    yield shown
    shown.close()


def ask_status(home: Path) -> StatusReport:
    return cast("StatusReport", ask(home / "run" / "node.sock", "status", timeout_s=START_S))


def test_a_node_on_a_terminal(screen: Screen, tmp_path: Path) -> None:
    screen.wait_for(ENTERED)
    screen.wait_for("it serves no model")
    assert ask_status(tmp_path)["process"]["pid"] == screen.process.pid
    screen.data = b""
    screen.resize(61, 11)
    # The header's upper frame, in the new width.
    screen.wait_for("\u256e".encode() + b"\x1b[0m\x1b[K")
    screen.process.send_signal(signal.SIGINT)
    assert screen.process.wait(START_S) == 0
    screen.wait_for(LEFT)
    screen.wait_for("stopped")
    assert screen.data.rindex(b"stopped") > screen.data.rindex(LEFT)


def test_a_terminal_that_is_not_read_holds_no_node_up(screen: Screen, tmp_path: Path) -> None:
    screen.wait_for("it serves no model")
    screen.reading.clear()
    # Frames that change, until the terminal takes no more.
    for number in range(40):
        screen.resize(90 + number % 2, 40)
        time.sleep(0.05)
    first = ask_status(tmp_path)["node"]["uptime_s"]
    time.sleep(0.5)
    assert ask_status(tmp_path)["node"]["uptime_s"] > first
    screen.process.send_signal(signal.SIGTERM)
    assert screen.process.wait(10) == 0


def test_lines_on_a_terminal_if_that_is_wanted(tmp_path: Path) -> None:
    for arguments in (("--no-live",), ("--log-format", "logfmt")):
        shown = Screen(tmp_path / arguments[0], *arguments)
        try:
            shown.wait_for("listening on /ip4/127.0.0.1/tcp/")
            shown.process.send_signal(signal.SIGTERM)
            shown.wait_for("stopped")
            assert shown.process.wait(START_S) == 0
            assert ENTERED not in shown.data
        finally:
            shown.close()
