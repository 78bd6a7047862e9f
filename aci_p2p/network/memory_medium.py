"""What lies between the endpoints of an in-memory network: an ideal cable, or an imagined internet; whole or split."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import inf
from random import Random
from typing import Final

import trio

from aci_p2p.network.model import NetworkModel, Place, can_dial
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

HANDSHAKE_TRIPS: Final = 6
"""One-way trips before a new connection can be used: TCP, noise and the negotiations."""
DIAL_S: Final = 5.0
"""How long a dial waits for somebody behind a partition, seconds, as the transport does."""
KEEP_ALIVE_S: Final = 30.0
"""How long a connection outlives a partition, seconds, as the transport's keep-alive allows."""

INBOX_MESSAGES: Final = 4096
"""Gossip messages on their way to one endpoint; more are lost."""
TURN_MESSAGES: Final = 64
"""Those of one moment that are handled before other tasks have a turn: some milliseconds' work."""

Note = Callable[[str, NodeId, NodeId, bytes], None]
"""Hears what happens: ("frame" | "gossip" | "connected" | "disconnected", from, to, payload)."""


class Medium:
    """Delays, losses and partitions. Without a model every two endpoints are `latency` apart and nothing is lost."""

    def __init__(self, latency: float, model: NetworkModel | None, random: Random, note: Note | None) -> None:
        """`latency`: seconds one way, where there is no model; `random` draws what the model leaves to chance."""
        self.places: dict[NodeId, Place] = {}
        """Where each node stands; drawn from the model when it first appears, unless it was put here before."""
        self.note = note
        """Hears what happens; None: nobody does."""
        self.cuts = 0
        """How often partitions have come or gone."""
        self._latency = latency
        self._model = model
        self._random = random
        self._groups: dict[NodeId, int] = {}
        self._free_at: dict[tuple[NodeId, NodeId], float] = {}
        self._held: list[tuple[NodeId, NodeId, NodeId | None, Callable[[], None]]] = []

    def settle(self, node: NodeId) -> None:
        """Give a node its place."""
        if node not in self.places:
            self.places[node] = self._model.place(self._random) if self._model else Place()

    def can_dial(self, source: NodeId, target: NodeId) -> bool:
        """Whether a direct connection can be made, hole punching included."""
        return can_dial(self.places[source], self.places[target])

    def latency_s(self, source: NodeId, target: NodeId, relay: NodeId | None = None) -> float:
        """Seconds one way, without jitter, through a relay if there is one between."""
        if self._model is None:
            return self._latency * (1 if relay is None else 2)
        stops = [self.places[node].region for node in (source, relay, target) if node is not None]
        return sum(self._model.one_way_ms[a][b] for a, b in pairwise(stops)) / 1000

    def handshake_s(self, source: NodeId, target: NodeId, relay: NodeId | None) -> float:
        """Seconds that it takes to connect."""
        return (2 if self._model is None else HANDSHAKE_TRIPS) * self.latency_s(source, target, relay)

    def lookup_s(self, source: NodeId) -> float:
        """Seconds that asking the DHT takes: a round trip to the farthest region."""
        if self._model is None:
            return 2 * self._latency
        return 2 * max(self._model.one_way_ms[self.places[source].region]) / 1000

    def arrival(self, source: NodeId, target: NodeId, relay: NodeId | None, size: int) -> float:
        """When a frame of `size` bytes that is sent now arrives, on trio's clock; inf while a partition is between."""
        if self.is_cut(source, target, relay):
            return inf
        now = trio.current_time()
        if self._model is None:
            return now + self.latency_s(source, target, relay)
        # A link sends one frame after the other.
        begins = max(now, self._free_at.get((source, target), 0.0))
        self._free_at[source, target] = begins + size / self._model.bandwidth
        return self._free_at[source, target] + self._way_s(source, target, relay, 0)

    def gossip_s(self, source: NodeId, target: NodeId, relay: NodeId | None, size: int) -> Sequence[float]:
        """Delays in seconds after which a gossip message arrives: none when it is lost, two when it is duplicated."""
        if self.is_cut(source, target, relay):
            return ()
        if self._model is None:
            return (self.latency_s(source, target, relay),)
        way = (self.places[source], self.places[target if relay is None else relay])
        delays = self._model.deliveries_s(*way, size, self._random)
        rest = 0.0 if relay is None else self._way_s(relay, target, None, size)
        return [delay + rest for delay in delays]

    def _way_s(self, source: NodeId, target: NodeId, relay: NodeId | None, size: int) -> float:
        if relay is not None:
            return self._way_s(source, relay, None, size) + self._way_s(relay, target, None, size)
        assert self._model is not None  # asked only where there is one
        return self._model.delay_s(self.places[source], self.places[target], size, self._random)

    def is_cut(self, a: NodeId, b: NodeId, relay: NodeId | None = None) -> bool:
        """Whether a partition is between two nodes, or between them and the relay that they need."""
        if not self._groups:
            return False
        return len({self._groups.get(node, 0) for node in (a, b, relay) if node is not None}) > 1

    def split(self, groups: Sequence[Iterable[NodeId]]) -> None:
        """Let only members of the same group reach each other; those in none are one more group."""
        self.cuts += 1
        self._groups = {node: number for number, group in enumerate(groups, 1) for node in group}
        self._release()

    def join(self) -> None:
        """End the partition."""
        self.split(())

    def carry(self, source: NodeId, target: NodeId, relay: NodeId | None, action: Callable[[], None]) -> None:
        """Let something that `source` did be felt at `target`: at once, or when no partition is between any more."""
        if self.is_cut(source, target, relay):
            self._held.append((source, target, relay, action))
        else:
            action()

    def _release(self) -> None:
        held, self._held = self._held, []
        for source, target, relay, action in held:
            self.carry(source, target, relay, action)


class Inbox:
    """Gossip on its way to one endpoint, at most INBOX_MESSAGES."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, tuple[NodeId, str, bytes]]] = []
        self._count = 0
        self._changed = trio.Event()

    def put(self, delay: float, message: tuple[NodeId, str, bytes]) -> bool:
        """Let a message (forwarder, topic, data) arrive in `delay` seconds; False when too many are on their way."""
        if len(self._waiting) >= INBOX_MESSAGES:
            return False
        self._count += 1
        entry = (trio.current_time() + delay, self._count, message)
        heapq.heappush(self._waiting, entry)
        if self._waiting[0] is entry:
            self._changed.set()
        return True

    async def take(self) -> list[tuple[NodeId, str, bytes]]:
        """Wait for the next arrivals: those of one moment, in their order, TURN_MESSAGES at most."""
        await trio.lowlevel.checkpoint()
        while True:
            arrived: list[tuple[NodeId, str, bytes]] = []
            now = trio.current_time()
            while self._waiting and self._waiting[0][0] <= now and len(arrived) < TURN_MESSAGES:
                arrived.append(heapq.heappop(self._waiting)[2])
            if arrived:
                return arrived
            due = self._waiting[0][0] if self._waiting else inf
            self._changed = trio.Event()
            with trio.move_on_at(due):
                await self._changed.wait()


def parse_address(address: str) -> tuple[str, NodeId | None]:
    """The number of an endpoint, and who is expected there; raises LocalError."""
    match address.split("/"):
        case ["", "memory", number] if number.isdecimal():
            return number, None
        case ["", "memory", number, "p2p", peer] if number.isdecimal():
            return number, NodeId.parse(peer)
        case _:
            msg = f"{address!r} is not an in-memory address"
            raise LocalError(msg, hint="it looks like /memory/1/p2p/12D3KooW...")
