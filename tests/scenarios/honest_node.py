"""One node of an honest swarm, in a process of its own: it broadcasts offers steadily and notes those it hears.

It obeys JSON documents, one a line, on standard input, and answers each with one on standard output; `HonestSwarm` in
`tests/scenarios/honest.py` is the other end. It ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from aci_p2p.clock import system_clock
from aci_p2p.config import NodeConfig
from aci_p2p.dht import capability_key
from aci_p2p.network import Stream
from aci_p2p.node import Node, open_node
from aci_p2p.tasks import open_background
from tests.network.attack import judge
from tests.network.driver import TOPIC
from tests.scenarios.messages import MODEL_ROOT, make_capability, make_offer

NETWORK: Final = "aci-scenario"
"""Network id of the swarm."""
INTERVAL_S: Final = 0.5
"""Seconds between two offers."""
REMEMBERED: Final = 20_000
"""Offers heard last, of attackers too."""
FAILING: Final = "/test/fail/1"
"""A protocol whose handler has a bug."""
HOLDING: Final = "/test/hold/1"
"""A protocol whose handler never reads."""


class HonestNode:
    """The node, and what it has published and heard."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._published: list[str] = []
        self._heard: deque[str] = deque(maxlen=REMEMBERED)
        self._counting = False

    async def publish(self) -> None:
        """Broadcast offers, for ever."""
        number = 0
        while True:
            offer = make_offer(self._node._sealer, system_clock(), b"%d" % number)
            await self._node.asks.join(MODEL_ROOT)
            if self._counting:
                self._published.append(offer.body.job_id.hex())
            await self._node.market.publish_offer(offer)
            number += 1
            await trio.sleep(INTERVAL_S)

    async def listen(self) -> None:
        """Note the offers of others, for ever."""
        while True:
            offer = await self._node.market.next_offer()
            self._heard.append(offer.body.job_id.hex())

    async def obey(self, command: dict[str, Any]) -> object:
        """Do one thing."""
        network = self._node.network
        answer: object = None
        match command["do"]:
            case "begin":
                self._published.clear()
                self._counting = True
            case "end":
                self._counting = False
                answer = self._published
            case "heard":
                answer = list(self._heard)
            case "peers":
                answer = [str(peer) for peer in network.peers]
            case "refused":
                answer = network.statistics().gossip_refused
            case "announce":
                answer = await self._announce(bytes.fromhex(command["root"]))
            case "get":
                value = await network.get_record(command["key"])
                answer = value.hex() if value is not None else None
            case other:
                msg = f"unknown command {other!r}"
                raise ValueError(msg)
        return answer

    async def _announce(self, root: bytes) -> list[str]:
        record = make_capability(root, self._node.addresses)
        value = self._node._sealer.seal(record, system_clock()).data
        key = capability_key(root, self._node.node_id)
        await self._node.network.put_record(key, value)
        await self._node.network.provide(root)
        return [key, value.hex()]


async def fail(_stream: Stream) -> None:
    """A handler with a bug."""
    raise ZeroDivisionError


async def hold(_stream: Stream) -> None:
    """A handler that never reads."""
    await trio.sleep_forever()


async def run(home: Path, bootstrap: tuple[str, ...]) -> None:
    """Run a node with its files below `home` until standard input ends."""
    async with open_node(NodeConfig(home=home, network=NETWORK, bootstrap=bootstrap)) as node:
        honest = HonestNode(node)
        async with node.network.subscribe(TOPIC, judge, capacity=8), open_background() as nursery:
            with node.network.serve(FAILING, fail), node.network.serve(HOLDING, hold):
                nursery.start_soon(honest.listen)
                nursery.start_soon(honest.publish)
                say([str(node.node_id), node.addresses[0]])
                await serve(honest.obey)


def say(answer: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def serve(obey: Callable[[dict[str, Any]], Awaitable[object]]) -> None:
    """Obey standard input until it ends."""
    async with trio.lowlevel.FdStream(sys.stdin.fileno()) as stream:
        buffer = b""
        async for data in stream:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                say(await obey(json.loads(line)))


if __name__ == "__main__":
    trio.run(run, Path(sys.argv[1]), tuple(sys.argv[2:]))
