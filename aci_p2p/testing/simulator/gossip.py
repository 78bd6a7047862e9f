"""Gossip among simulated nodes: how soon a message reaches whom, and who stops it.

Thousands of nodes cannot each handle each copy of each message. What a message takes is computed once for each
publisher: the shortest paths over a random graph of meshes, through nodes that are up and forward. The checks run for
real at the publisher's neighbours, whose judgement decides whether it spreads, and at those whom it concerns.
Neighbours keep accounts and scores of each other as real ones do, and look at nothing that a flooder sends.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from aci_p2p.gossip.topic import MAX_PUBLISHED
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.messages import Bid, Offer
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.guard import NeighbourGuard
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.scenario import Fault
from aci_p2p.testing.simulator.transport import Transport

DEGREE: Final = 6
"""Mesh neighbours that each node looks for (gossipsub's D)."""
WITNESSES: Final = 3
"""Neighbours of an honest publisher whose judgement is computed; one that accepts is enough for a message to spread."""
SHIFT: Final = 1 << 20
"""More than the nodes of any world."""
CATCH_UP_MS: Final = 5_000
"""After how long a message that was lost on every way is pulled from a neighbour."""
MAX_WAITING: Final = 4_096
"""Messages of a topic that wait for a partition's end: as many as a node's log of it holds."""
OVERTAKEN: Final = 10
"""A message that is overtaken takes up to so many times longer."""

B = TypeVar("B")
Listener = Callable[[Envelope[B]], None]
"""Hears an accepted message; called once for each copy that the checks let through."""


class Topic(Generic[B]):
    """One topic: who checks its messages how, and whom they concern."""

    def __init__(
        self,
        name: str,
        gossip: Gossip,
        check: Callable[[SimNode, bytes], Envelope[B]],
        concerned: Callable[[Envelope[B]], list[tuple[SimNode, Listener[B]]]],
    ) -> None:
        """`check` raises MessageRefused; `concerned` tells who listens to a message."""
        self._name = name
        self._gossip = gossip
        self._check = check
        self._concerned = concerned
        self._waiting: list[tuple[bytes, SimNode, Listener[B]]] = []
        self._own: defaultdict[int, list[int]] = defaultdict(list)

    def say(self, origin: SimNode, envelope: Envelope[B]) -> None:
        """Let an honest node broadcast a message of its own, unless too many of its are out, as `gossip.Topic` does."""
        out = self._own[origin.index]
        if len(out) >= MAX_PUBLISHED:
            out[:] = [expires_at for expires_at in out if expires_at > origin.clock]
            if len(out) >= MAX_PUBLISHED:
                self._gossip.unsaid += 1
                return
        out.append(envelope.header.expires_at)
        self.publish(origin, envelope.data)

    def restarted(self, node: SimNode) -> None:
        """A node has forgotten what it said."""
        self._own.pop(node.index, None)

    def publish(self, origin: SimNode, data: bytes) -> None:
        """Let a node broadcast bytes, whatever they are."""
        gossip = self._gossip
        arrivals = gossip.arrivals(origin)
        witnesses = [one for one in gossip.neighbours(origin) if one.honest and one.index in arrivals]
        if not witnesses:
            return
        if origin.honest:
            del witnesses[WITNESSES:]
        first = min(arrivals[one.index] for one in witnesses)
        gossip.world.after(first, self._spread, origin, data, arrivals, witnesses)

    def _spread(self, origin: SimNode, data: bytes, arrivals: dict[int, int], witnesses: list[SimNode]) -> None:
        """The publisher's neighbours judge; if one accepts, those whom the message concerns get it in their time."""
        gossip = self._gossip
        judged = {one.index: self._witness(one, origin, data) for one in witnesses if one.up}
        accepted = next((envelope for envelope in judged.values() if envelope), None)
        if accepted is None:
            return
        gossip.bytes_sent += len(data) * len(arrivals)
        for node, listener in self._concerned(accepted):
            if node is origin:
                continue
            if node.index in judged:
                # It has judged already, as a neighbour, and would take this for a replay.
                if (envelope := judged[node.index]) is not None:
                    listener(envelope)
            elif node.index not in arrivals:
                self._waiting.append((data, node, listener))
                del self._waiting[:-MAX_WAITING]
            else:
                for delay in gossip.copies(arrivals[node.index]):
                    gossip.world.after(delay, self._arrive, data, node, listener)

    def _witness(self, node: SimNode, origin: SimNode, data: bytes) -> Envelope[B] | None:
        """The judgement of one of the publisher's neighbours."""
        gossip, now = self._gossip, self._gossip.world.now
        guard = gossip.guard(node)
        if not guard.admits(origin.node_id, len(data), now):
            gossip.unread += 1
            return None
        try:
            envelope = self._check(node, data)
        except MessageRefused as error:
            gossip.refused[error.validation.reason.value] += 1
            guard.refused(origin.node_id, self._name, data, error, now)
            return None
        guard.accepted(len(data))
        return envelope

    def _arrive(self, data: bytes, node: SimNode, listener: Listener[B]) -> None:
        if not node.up:
            return
        try:
            envelope = self._check(node, data)
        except MessageRefused as error:
            self._gossip.refused[error.validation.reason.value] += 1
            return
        listener(envelope)

    def catch_up(self) -> None:
        """The network is whole again: what did not reach somebody is pulled."""
        waiting, self._waiting = self._waiting, []
        for data, node, listener in waiting:
            self._gossip.world.after(CATCH_UP_MS, self._arrive, data, node, listener)


class Gossip:
    """The meshes, and what is published over them."""

    def __init__(self, transport: Transport, nodes: list[SimNode]) -> None:
        self.world = transport.world
        """Clock, queue and trace."""
        self.refused: Counter[str] = Counter()
        """Messages that a check refused, by reason."""
        self.unread = 0
        """Messages of flooders that nobody looked at."""
        self.disturbed: Counter[Fault] = Counter()
        """Messages that the network lost, doubled or held back."""
        self.unsaid = 0
        """Messages that honest nodes kept to themselves, for too many of theirs were out."""
        self.bytes_sent = 0
        """Bytes that all nodes together received."""
        self.offers: Topic[Offer] = Topic("offers", self, _check_offer, self._providers_of)
        """The topic of offers."""
        self.bids: Topic[Bid] = Topic("bids", self, _check_bid, self._consumer_of)
        """The topic of bids."""
        self.providers: dict[bytes, dict[SimNode, Listener[Offer]]] = {}
        """Weights root -> who wants to hear its offers."""
        self.consumers: dict[bytes, tuple[SimNode, Listener[Bid]]] = {}
        """Job id -> who waits for its bids."""
        self.eavesdroppers: list[tuple[SimNode, Listener[Offer], Listener[Bid]]] = []
        """Attackers that react to whatever they hear."""
        self._transport = transport
        self._nodes = nodes
        self._random = self.world.dice["gossip"]
        self._meshes: dict[int, list[SimNode]] = {node.index: [] for node in nodes}
        self._guards: dict[int, NeighbourGuard] = {}
        self._arrivals: dict[int, dict[int, int]] = {}
        self._wire()

    def _wire(self) -> None:
        """A random graph in which every node has DEGREE neighbours of its own choice, and those that chose it."""
        for node in self._nodes:
            mesh = self._meshes[node.index]
            for other in self._random.sample(self._nodes, min(DEGREE + 1, len(self._nodes))):
                if other is not node and other not in mesh:
                    mesh.append(other)
                    self._meshes[other.index].append(node)

    def changed(self) -> None:
        """Somebody came or went, or the network was split or healed: ways are computed anew when needed."""
        self._arrivals.clear()

    def healed(self) -> None:
        """A partition is over."""
        self.changed()
        self.offers.catch_up()
        self.bids.catch_up()

    def neighbours(self, node: SimNode) -> list[SimNode]:
        """Mesh neighbours."""
        return self._meshes[node.index]

    def guard(self, node: SimNode) -> NeighbourGuard:
        """What a node holds against its neighbours."""
        guard = self._guards.get(node.index)
        if guard is None:
            guard = self._guards[node.index] = NeighbourGuard()
        return guard

    def restarted(self, node: SimNode) -> None:
        """A node has forgotten what it held against its neighbours."""
        self._guards.pop(node.index, None)
        self.offers.restarted(node)
        self.bids.restarted(node)
        self.changed()

    def copies(self, arrival: int) -> list[int]:
        """When the copies of a message arrive somewhere, given the way's time: later if lost on it, perhaps twice."""
        model, random = self._transport.model, self._random
        if random.random() < model.loss:
            self.disturbed[Fault.LOSS] += 1
            arrival += CATCH_UP_MS
        late = round(arrival * (1 + model.jitter * random.random()))
        if random.random() < model.reordering:
            self.disturbed[Fault.REORDERING] += 1
            late += random.randint(1, OVERTAKEN * arrival + 1)
        if random.random() < model.duplication:
            self.disturbed[Fault.DUPLICATION] += 1
            return [late, late + arrival + 1]
        return [late]

    def arrivals(self, origin: SimNode) -> dict[int, int]:
        """Milliseconds to every node that a message of `origin` reaches (Dijkstra)."""
        known = self._arrivals.get(origin.index)
        if known is None:
            known = self._arrivals[origin.index] = self._ways(origin)
        return known

    def _ways(self, origin: SimNode) -> dict[int, int]:
        ways: dict[int, int] = {}
        latency, meshes, nodes = self._transport.model.one_way_ms, self._meshes, self._nodes
        is_cut = self._transport.is_cut if self._transport.is_split else None
        # One heap entry is a number: milliseconds, then the node's index.
        queue, soonest = [origin.index], {origin.index: origin.index}
        while queue:
            so_far, index = divmod(heapq.heappop(queue), SHIFT)
            if index in ways:
                continue
            ways[index] = so_far
            node = nodes[index]
            if node is not origin and not node.forwards:
                continue
            row = latency[node.place.region]
            for other in meshes[index]:
                number = other.index
                entry = (so_far + row[other.place.region] + 1) * SHIFT + number
                if entry < soonest.get(number, entry + 1) and other.up and not (is_cut and is_cut(node, other)):
                    soonest[number] = entry
                    heapq.heappush(queue, entry)
        del ways[origin.index]
        return ways

    def _providers_of(self, offer: Envelope[Offer]) -> list[tuple[SimNode, Listener[Offer]]]:
        concerned = list(self.providers.get(offer.body.model_root, {}).items())
        return concerned + [(node, hear) for node, hear, _ in self.eavesdroppers]

    def _consumer_of(self, bid: Envelope[Bid]) -> list[tuple[SimNode, Listener[Bid]]]:
        consumer = self.consumers.get(bid.body.job_id)
        return ([consumer] if consumer else []) + [(node, hear) for node, _, hear in self.eavesdroppers]


# A message comes on the topic of the model that it names: elsewhere it would be refused before anything else.


def _check_offer(node: SimNode, data: bytes) -> Envelope[Offer]:
    return node.view.check_offer(node.read(data, Offer).body.model_root, data, node.clock)


def _check_bid(node: SimNode, data: bytes) -> Envelope[Bid]:
    return node.view.check_bid(node.read(data, Bid).body.model_root, data, node.clock)
