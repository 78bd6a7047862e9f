"""Twenty daemons on one machine: a rare model is found soon, the bootstrap node is not missed, and nodes come back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles

import pytest

from aci_p2p.protocol.proof import verify_proof
from tests.scenarios.daemons import COMMAND, Daemon, add_tiny_model, killed_at_the_end, run_command, until

pytestmark = [pytest.mark.scenario, pytest.mark.slow, pytest.mark.timeout(600)]

DAEMONS = 20
"""All together."""
RESTARTED = 10
"""Those that are killed and come back."""
FIND_S = 2.0
"""Within which 95% of the daemons find the only provider, seconds."""
BACK_S = 10.0
"""Within which those that were killed are back, the start of their processes included, seconds."""
JOIN_S = 10.0
"""The same beyond the start of as many bare interpreters, where that alone takes the time: a machine that is busy."""
NEIGHBOURS = 3
"""Connections of a node that is back."""


@dataclass(frozen=True, slots=True)
class Swarm:
    """The daemons of one test."""

    bootstrap: Daemon
    """Whom all others were told of."""
    provider: Daemon
    """Who alone serves the rare model."""
    others: list[Daemon]
    """The rest."""
    root: str
    """Weights root of the rare model, in hex."""

    def finds_the_provider(self, daemon: Daemon, provider: str) -> bool:
        """Whether a daemon has neighbours and finds the provider."""
        return is_connected(daemon) and daemon.find(self.root)[0] == [provider]


def is_connected(daemon: Daemon) -> bool:
    """Whether a daemon is up and has neighbours."""
    return daemon.is_up and len(daemon.peers) >= NEIGHBOURS


def start_interpreters(count: int) -> float:
    """Seconds until so many processes have loaded what a daemon loads, and have done nothing else."""
    command = (
        *COMMAND[:2],
        "from aci_p2p.cli.loading import loading\nwith loading(): import aci_p2p.cli.join, aci_p2p.network.libp2p",
    )
    began = time.monotonic()
    processes = [subprocess.Popen(command) for _ in range(count)]
    assert [process.wait() for process in processes] == [0] * count
    return time.monotonic() - began


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """Daemons that are all up and know each other."""
    bootstrap = Daemon(tmp_path / "bootstrap", "--no-serve")
    bootstrap.start()
    with killed_at_the_end([bootstrap]):
        until(lambda: bootstrap.is_up)
        arguments = ("--bootstrap", bootstrap.address)
        provider = Daemon(tmp_path / "provider", *arguments)
        root = add_tiny_model(provider.home, tmp_path / "tiny")
        others = [Daemon(tmp_path / f"node-{number}", *arguments, "--no-serve") for number in range(DAEMONS - 2)]
        with killed_at_the_end([provider, *others]):
            for daemon in (provider, *others):
                daemon.start()
            for daemon in (provider, *others):
                until(partial(is_connected, daemon))
            yield Swarm(bootstrap, provider, others, root)


def test_a_swarm_without_its_bootstrap_node(swarm: Swarm, tmp_path: Path) -> None:
    provider = swarm.provider.ask("status")["node"]["id"]

    latencies: list[float] = []
    for daemon in (swarm.bootstrap, *swarm.others):
        found, took = daemon.find(swarm.root)
        assert found == [provider], daemon.log
        latencies.append(took)
    slowest = quantiles(latencies, n=20)[-1]
    sys.stdout.write(f"{len(latencies)} daemons find the provider, 95% of them within {slowest:.2f} s\n")
    assert slowest < FIND_S

    swarm.bootstrap.kill()
    asked = swarm.others[0]
    proof = tmp_path / "answer.aciproof"
    ask = ("infer", "--bootstrap", asked.address, "--model", swarm.root, "--max-tokens", "8", "--json")
    result = run_command(tmp_path / "consumer", *ask, "--proof", str(proof), "Hello!")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["provider"] == provider
    assert str(verify_proof(proof.read_bytes()).proof.sender) == provider

    restarted = swarm.others[-RESTARTED:]
    for daemon in restarted:
        daemon.kill()
    began = time.monotonic()
    for daemon in restarted:
        daemon.start()
    with ThreadPoolExecutor(RESTARTED) as pool:
        # Seldom, as looking at ten daemons takes time that they need to start.
        waits = [
            pool.submit(until, partial(swarm.finds_the_provider, daemon, provider), every=0.2) for daemon in restarted
        ]
        for wait in waits:
            wait.result()
    back = time.monotonic() - began
    bare = start_interpreters(RESTARTED)
    sys.stdout.write(f"{RESTARTED} daemons are back after {back:.1f} s; their imports alone take {bare:.1f} s\n")
    assert back < BACK_S or back < bare + JOIN_S
