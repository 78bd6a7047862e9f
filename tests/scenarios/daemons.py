"""`aci-p2p join` as people run it: daemons in processes and homes of their own, asked over their control sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, cast

import pytest

from aci_p2p.config import NodeConfig
from aci_p2p.control import NoNode, NotReady, ask
from aci_p2p.executor import ModelStore
from tests.executor.tiny import write_tiny_model

COMMAND: Final = (sys.executable, "-c", "from aci_p2p.cli import main; main()")
LOOPBACK: Final = "/ip4/127.0.0.1/tcp/0"
START_S: Final = 150.0
"""Longest wait for what a daemon should do soon, seconds: many start at once, on few cores."""


Launch = Callable[[Sequence[str], dict[str, str], IO[bytes]], "subprocess.Popen[bytes]"]
"""Starts a command with an environment; what it says goes to the file."""


def _launch(command: Sequence[str], env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def environment(home: Path) -> dict[str, str]:
    """What a command runs with that has its files below `home`."""
    return {**os.environ, "ACI_HOME": str(home), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def until(condition: Callable[[], object], *, seconds: float = START_S, every: float = 0.02) -> float:
    """Wait until a condition holds, looking again and again; seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"nothing came of it within {seconds:g} s"
        time.sleep(every)
    return time.monotonic() - began


class Daemon:
    """One `aci-p2p join`, started and killed as often as a test wants."""

    def __init__(self, home: Path, *arguments: str, listen: str = LOOPBACK, launch: Launch | None = None) -> None:
        """`launch` starts its process; by default on this machine."""
        self.home = home
        self._arguments = ("join", "--no-live", "--listen", listen, *arguments)
        self._launch = launch or _launch
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `wait` says when it is up."""
        self.home.mkdir(exist_ok=True, parents=True)
        with (self.home / "log").open("ab") as log:
            self._process = self._launch((*COMMAND, *self._arguments), environment(self.home), log)

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it without a word: `kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it in good order."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait(START_S) == 0, self.log
        self._process = None

    @property
    def log(self) -> str:
        """What it has said since its first start."""
        return (self.home / "log").read_text()

    @property
    def is_up(self) -> bool:
        """Whether it answers on its control socket."""
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"{self.home.name} has ended: {self.log}")
        try:
            self.ask("status")
        except (NoNode, NotReady):
            return False
        return True

    def ask(self, command: str, argument: str = "") -> Any:  # noqa: ANN401 - a JSON document
        """What it answers on its control socket. Raises NoNode, NotReady."""
        config = NodeConfig(home=self.home, key="node")
        return cast("Any", ask(config.control_socket_path, command, argument))

    @property
    def peers(self) -> set[str]:
        """Peer ids of those whom it is connected to."""
        return {one["peer"] for one in self.ask("peers")["peers"]}

    @property
    def address(self) -> str:
        """Where it can be dialled."""
        return cast("str", self.ask("status")["addresses"][0])

    def find(self, model_root: str) -> tuple[list[str], float]:
        """Peer ids of the providers of a model that it finds, and the seconds that this took."""
        began = time.monotonic()
        report = self.ask("providers", model_root)
        return [one["provider"] for one in report["providers"]], time.monotonic() - began


@contextmanager
def killed_at_the_end(daemons: Sequence[Daemon]) -> Generator[None]:
    """None of the daemons outlives the block."""
    try:
        yield
    finally:
        for daemon in daemons:
            daemon.kill()


def add_tiny_model(home: Path, source: Path) -> str:
    """Put a tiny model called `rare` into a home's store, of files made in `source`; its root in hex."""
    return ModelStore(home / "models").add_directory(write_tiny_model(source), "rare").root.hex()


def run_command(home: Path, *arguments: str, timeout: float = START_S) -> subprocess.CompletedProcess[str]:
    """Run `aci-p2p` to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment(home),
    )
