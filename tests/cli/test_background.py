"""Output that nobody reads holds nobody up."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import trio

from aci_p2p.cli.output import QUEUE_TEXTS, Background, write_text

LONG = "x" * 1_000_000
"""More than any pipe holds."""


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], IO[str]]]:
    """Both ends of a pipe."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w", encoding="utf-8") as writer:
        yield reader, writer


def test_what_is_written_arrives(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as file, Background(file) as background:
        background.write("é")
        background.write("\ud800\n")
        assert background.fileno() == file.fileno()
        assert not background.isatty()
        assert background.writable()
    assert path.read_bytes() == "é?\n".encode()


def test_a_pipe_that_nobody_reads_drops_what_is_too_much(pipe: tuple[IO[bytes], IO[str]]) -> None:
    reader, writer = pipe
    background = Background(writer)
    background.write(LONG)
    # The thread has taken that one; it is in the pipe or waits for it.
    while background._texts.qsize():
        time.sleep(0.001)
    for number in range(QUEUE_TEXTS + 5):
        background.write(f"{number}\n")
    last = f"{QUEUE_TEXTS - 1}\n"
    received = b""
    # Past the reader's own buffer, which may take in more than is asked of it.
    while not received.endswith(last.encode()):
        received += os.read(reader.fileno(), 10_000)
    background.write("after\n")
    while not received.endswith(b"after\n"):
        received += os.read(reader.fileno(), 10_000)
    assert received.endswith(f"{last}[5 lines of output were dropped]\nafter\n".encode())
    background.close()
    assert background.closed


def test_a_closed_pipe_is_no_error(pipe: tuple[IO[bytes], IO[str]]) -> None:
    reader, writer = pipe
    reader.close()
    with Background(writer) as background:
        background.write("a")
        background.write("b")
    with Background(None) as background:
        background.write("a")
        assert not background.isatty()
        with pytest.raises(io.UnsupportedOperation):
            background.fileno()


async def test_a_slow_reader_does_not_stop_the_event_loop(pipe: tuple[IO[bytes], IO[str]]) -> None:
    reader, writer = pipe
    writer.write("before ")
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_text, writer, LONG)
        await trio.sleep(0.05)
        while len(received) < len("before ") + len(LONG):
            received += await trio.to_thread.run_sync(os.read, reader.fileno(), 100_000)
    assert received.decode() == "before " + LONG
    with trio.move_on_after(0.05) as scope:
        await write_text(writer, LONG)
    assert scope.cancelled_caught


async def test_what_is_no_real_file_is_written_at_once() -> None:
    file = io.StringIO()
    await write_text(file, "text")
    assert file.getvalue() == "text"


async def test_a_shared_terminal_that_does_not_block(pipe: tuple[IO[bytes], IO[str]]) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_text, writer, LONG)
        while len(received) < len(LONG):
            received += await trio.to_thread.run_sync(os.read, reader.fileno(), 100_000)
    assert received.decode() == LONG


def test_a_node_without_outputs(home: Path) -> None:
    command = (
        "exec \"$0\" -c 'from aci_p2p.cli import main; main()' join --no-serve --listen /ip4/127.0.0.1/tcp/0 "
        "<&- >&- 2>&-"
    )
    node = subprocess.Popen(["/bin/sh", "-c", command, sys.executable], env={**os.environ, "ACI_HOME": str(home)})
    while not (home / "keys" / "node.key").exists():
        assert node.poll() is None
        time.sleep(0.01)
    node.terminate()
    assert node.wait(30) == 0
