"""Nodes behind NATs, with real routers: reachability, relays, holes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.conftest import REPOSITORY
from tests.network.driver import make_key
from tests.network.namespaces import Laboratory, Nat

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

RELAY, PROVIDER, CONSUMER, HELPER = (make_key(number).node_id for number in range(1, 5))
RELAY_ADDRESS = f"/ip4/11.0.0.1/tcp/9400/p2p/{RELAY}"
EVERYWHERE = "/ip4/0.0.0.0/tcp/9400"


class Node:
    """A node on a machine of the laboratory."""

    def __init__(self, laboratory: Laboratory, machine: str, number: int, *listen: str) -> None:
        self.id = make_key(number).node_id
        self._process = laboratory.start(
            machine,
            sys.executable,
            "-m",
            "tests.network.nat_node",
            str(number),
            *listen,
            env=dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # It has started when it answers.
        self.do("describe")

    def do(self, command: str, argument: object = "") -> Any:  # noqa: ANN401 - what the program answers
        """Have the node do something; fails as it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command} {argument}\n".encode())
        self._process.stdin.flush()
        answer = cast("dict[str, Any]", json.loads(self._process.stdout.readline()))
        assert "ok" in answer, answer
        return answer["ok"]

    def until(self, condition: Callable[[dict[str, Any]], object], seconds: float = 40) -> dict[str, Any]:
        """Wait until what the node says of itself fulfils a condition."""
        deadline = time.monotonic() + seconds
        while not condition(description := self.do("describe")):
            assert time.monotonic() < deadline, description
            time.sleep(0.2)
        return cast("dict[str, Any]", description)

    def is_relayed(self, peer: object) -> set[bool]:
        """Whether the connections to a peer go through a relay."""
        return {relayed for other, relayed, _ in self.do("describe")["connections"] if other == str(peer)}


def build(laboratory: Laboratory, nats: dict[str, Nat]) -> None:
    """A public segment with a relay and a helper, and machines behind a NAT each."""
    laboratory.add_segment("public")
    for machine, address in (("relay", "11.0.0.1/24"), ("helper", "11.0.0.2/24")):
        laboratory.add_machine(machine)
        laboratory.attach(machine, "public", address)
    for number, (machine, nat) in enumerate(nats.items(), 1):
        home = f"home{number}"
        laboratory.add_segment(home)
        outside, inside = ("public", f"11.0.0.{10 * number}/24"), (home, f"10.0.{number}.1/24")
        laboratory.add_router(f"router{number}", outside, inside, nat)
        laboratory.add_machine(machine)
        laboratory.attach(machine, home, f"10.0.{number}.2/24", gateway=f"10.0.{number}.1")


def meet(laboratory: Laboratory) -> tuple[Node, Node, Node]:
    """A relay, and a provider and a consumer that know it: the provider has found out that it needs it."""
    relay = Node(laboratory, "relay", 1, EVERYWHERE)
    helper = Node(laboratory, "helper", 4, EVERYWHERE)
    helper.do("connect", RELAY_ADDRESS)
    provider = Node(laboratory, "provider", 2, EVERYWHERE)
    consumer = Node(laboratory, "consumer", 3, EVERYWHERE)
    for node in (provider, consumer):
        node.do("connect", RELAY_ADDRESS)
    provider.until(lambda said: said["reachability"] == "private")
    relay.until(lambda said: said["reachability"] == "public")
    provider.until(lambda said: any("/p2p-circuit" in address for address in said["addresses"]))
    return relay, provider, consumer


def circuit_of(node: Node) -> str:
    """The first circuit that a node announces."""
    addresses = cast("list[str]", node.do("describe")["addresses"])
    return next(address for address in addresses if "/p2p-circuit" in address)


def test_a_hole_is_punched_where_both_nats_keep_ports(laboratory: Laboratory) -> None:
    build(laboratory, {"provider": Nat.PORT_PRESERVING, "consumer": Nat.PORT_PRESERVING})
    _, provider, consumer = meet(laboratory)
    assert consumer.do("connect", circuit_of(provider)) == str(PROVIDER)
    consumer.do("open", PROVIDER)
    assert consumer.do("say", PROVIDER) == "hello"
    consumer.until(lambda _: False in consumer.is_relayed(PROVIDER))
    provider.until(lambda said: said["statistics"]["holes_punched"] == 1)
    # The stream goes on where it was opened.
    assert consumer.do("say", PROVIDER) == "hello"


def test_a_strict_nat_leaves_the_relay(laboratory: Laboratory) -> None:
    build(laboratory, {"provider": Nat.PORT_PRESERVING, "consumer": Nat.RANDOM_PORTS})
    _, provider, consumer = meet(laboratory)
    assert consumer.do("connect", circuit_of(provider)) == str(PROVIDER)
    consumer.do("open", PROVIDER)
    provider.until(lambda said: said["statistics"]["holes_failed"])
    assert consumer.is_relayed(PROVIDER) == {True}
    assert consumer.do("say", PROVIDER) == "hello"


def test_a_public_consumer_is_dialled_back(laboratory: Laboratory) -> None:
    build(laboratory, {"provider": Nat.RANDOM_PORTS})
    laboratory.add_machine("consumer")
    laboratory.attach("consumer", "public", "11.0.0.3/24")
    _, provider, consumer = meet(laboratory)
    assert consumer.do("connect", circuit_of(provider)) == str(PROVIDER)
    consumer.do("open", PROVIDER)
    consumer.until(lambda _: False in consumer.is_relayed(PROVIDER))
    assert consumer.do("say", PROVIDER) == "hello"
