"""Running the real command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.scenarios.daemons import Daemon, add_tiny_model, killed_at_the_end, until

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

COMMAND = (sys.executable, "-c", "from aci_p2p.cli import main; main()")
LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
START_S = 30.0
"""Seconds for a process to come up on a busy machine."""
SOON_S = 15.0
"""Longest time for what should happen at once, seconds: half of START_S, and of what a provider grants its jobs."""

Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An ACI home of its own."""
    return tmp_path / "home"


@pytest.fixture
def cli(home: Path) -> Cli:
    """Runs `aci-p2p` with arguments, in `home`; output is text, nothing is raised."""

    def run(
        *arguments: str, stdin: str = "", timeout: float = 50, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "ACI_HOME": str(home), "NO_COLOR": "1", **(env or {})},
        )

    return run


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line of a command that must have failed with `code`, saying so in one line and no more."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("aci-p2p: ")
    return lines[0]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts `aci-p2p` with arguments; whatever still runs at the end is killed."""
    running: list[Process] = []
    # What a shell starts in the background ignores Ctrl-C, and so does what that starts, unless somebody handles it.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*arguments: str, at: Path = home) -> Process:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "ACI_HOME": str(at), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        )
        running.append(process)
        return process

    yield run
    signal.signal(signal.SIGINT, ours)
    for process in running:
        process.kill()
        process.communicate()


def wait_for(process: Process, prefix: str) -> str:
    """Read standard output up to the line that starts with `prefix`; the rest of that line."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
        if not line and process.poll() is not None:
            break
    pytest.fail(f"no line {prefix!r}: {process.communicate()[1]}")


def wait_for_text(process: Process, characters: int = 1) -> None:
    """Wait until an answer begins to stream."""
    assert process.stdout is not None
    assert process.stdout.read(characters)


def finish(process: Process, timeout: float = START_S) -> subprocess.CompletedProcess[str]:
    """Wait for a process to end."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Daemon]:
    """A running node that serves a model called `rare`."""
    daemon = Daemon(tmp_path / "provider")
    add_tiny_model(daemon.home, tmp_path / "tiny")
    daemon.start()
    with killed_at_the_end([daemon]):
        until(lambda: daemon.is_up)
        yield daemon
