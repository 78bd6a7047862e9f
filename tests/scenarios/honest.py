"""The test's end of an honest swarm: each node runs in a process of its own, whose memory can be measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final, cast

from aci_p2p.protocol.identity import NodeId
from tests.conftest import REPOSITORY
from tests.network.attack import Target

NEIGHBOURS: Final = 6
"""Peers that each node has found before a test begins."""
MEET_S: Final = 150.0
"""Longest time for that, seconds."""
SETTLE_S: Final = 5.0
"""Longest wait for offers that are still under way when a window ends, seconds."""


@dataclass(frozen=True, slots=True)
class Window:
    """What became of the offers of some seconds."""

    expected: int
    """Pairs of an offer and a node that should hear it."""
    missed: tuple[int, ...]
    """Offers that did not reach each node."""

    @property
    def delivered(self) -> float:
        """Share of the pairs that came about, 0 to 1."""
        return 1 - sum(self.missed) / self.expected


class HonestProcess:
    """Speaks to the process of one node. Calls block: within trio, call them in a thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = Lock()
        node_id, address = self._read()
        self.target = Target(NodeId.parse(node_id), address)

    def ask(self, do: str, **details: object) -> Any:  # noqa: ANN401 - a JSON document
        """Let the node do one thing (see `HonestNode.obey`)."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
            return self._read()

    def _read(self) -> Any:  # noqa: ANN401 - a JSON document
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the node has ended with {self._process.wait()}"
        return json.loads(line)

    def memory(self) -> int:
        """Resident memory, bytes."""
        return self._status("VmRSS")

    def peak_memory(self) -> int:
        """Largest resident memory since `reset_peak`, bytes."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        """Begin to measure `peak_memory`."""
        # proc(5): 5 resets the peak resident set size.
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
        raise KeyError(name)


class HonestSwarm:
    """All nodes of a swarm. Calls block: within trio, call them in a thread."""

    def __init__(self, nodes: list[HonestProcess]) -> None:
        self.nodes = nodes

    @property
    def targets(self) -> list[Target]:
        """The nodes, for those who attack them."""
        return [node.target for node in self.nodes]

    def begin(self) -> None:
        """Count the offers that are published from now on."""
        for node in self.nodes:
            node.ask("begin")
            node.reset_peak()

    def end(self) -> Window:
        """What became of the offers since `begin`; those under way are waited for."""
        published = [set(cast("list[str]", node.ask("end"))) for node in self.nodes]
        everything = set[str]().union(*published)
        deadline = time.monotonic() + SETTLE_S
        while True:
            missed = tuple(
                len(everything - own - set(node.ask("heard"))) for node, own in zip(self.nodes, published, strict=True)
            )
            if not any(missed) or time.monotonic() > deadline:
                return Window(len(everything) * (len(self.nodes) - 1), missed)
            time.sleep(0.05)

    def connected_to(self, peer: NodeId) -> list[int]:
        """Numbers of the nodes that are connected to a peer."""
        return [number for number, node in enumerate(self.nodes) if str(peer) in node.ask("peers")]


@contextmanager
def open_honest_swarm(count: int, home: Path) -> Generator[HonestSwarm]:
    """A swarm of `count` nodes for the block, with their files below `home`; all must end well."""
    with ExitStack() as stack:

        def start(number: int, *bootstrap: str) -> subprocess.Popen[str]:
            process = stack.enter_context(_start(home / str(number), bootstrap))
            stack.callback(process.kill)
            return process

        first = start(0)
        nodes = [HonestProcess(first)]
        processes = [first, *(start(number, nodes[0].target.address) for number in range(1, count))]
        nodes += [HonestProcess(process) for process in processes[1:]]
        deadline = time.monotonic() + MEET_S
        while any(len(node.ask("peers")) < min(NEIGHBOURS, count - 1) for node in nodes):
            assert time.monotonic() < deadline, "the nodes do not find each other"
            time.sleep(0.1)
        yield HonestSwarm(nodes)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(20) for process in processes] == [0] * count


def _start(home: Path, bootstrap: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.scenarios.honest_node", str(home), *bootstrap],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
