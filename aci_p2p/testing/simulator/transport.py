"""Streams between simulated nodes: in order, without loss while both are up, late when they cannot reach each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from aci_p2p.network.model import NetworkModel, Place, can_dial
from aci_p2p.protocol.identity import NodeId
from aci_p2p.testing.simulator.world import World

HANDSHAKE_TRIPS: Final = 6
"""One-way trips before the first frame can be sent: TCP, noise and the protocol's negotiation."""
DIAL_MS: Final = 5_000
"""How long a dial waits for somebody who does not answer, as the transport does."""
KEEP_ALIVE_MS: Final = 30_000
"""How long a connection outlives a cut, as the transport's keep-alive allows."""
UNANSWERED: Final = "it does not answer"
"""What a dial in vain ends with."""
MAX_ENDS: Final = 4_096
"""Ends remembered before those that are over are sorted out."""
RELAY_TRIPS: Final = 2
"""How many times longer the way through a relay is."""


class Endpoint(Protocol):
    """A simulated node, as streams see it."""

    index: int
    place: Place
    up: bool
    streams: dict[End, None]

    @property
    def node_id(self) -> NodeId:
        """Its identity."""
        ...

    def accept(self, end: End) -> None:
        """A peer has opened a stream to us."""
        ...


class End:
    """One side of a stream. Frames sent before it is connected, or across a cut, wait."""

    def __init__(self, transport: Transport, owner: Endpoint, other: Endpoint) -> None:
        self.owner = owner
        self.other = other
        self.open = True
        self.peer: End | None = None
        self.on_frame: Callable[[bytes], None] = _ignore
        self.on_end: Callable[[str], None] = _ignore
        self._transport = transport
        self._held: list[bytes | None] = []
        self._last_arrival = 0
        owner.streams[self] = None

    def send(self, frame: bytes) -> None:
        """Send a frame; lost when the stream is over."""
        if self.open:
            self._transmit(frame)

    def close(self) -> None:
        """End the stream behind what was sent; nothing more is reported here."""
        if self.open:
            self.open = False
            self.owner.streams.pop(self, None)
            self._transmit(None)

    def lose(self, detail: str) -> None:
        """The connection is gone, or was never made."""
        if self.open:
            self.open = False
            self.owner.streams.pop(self, None)
            self.on_end(detail)

    def connect(self, peer: End) -> None:
        """The other side is there: what has waited is sent."""
        self.peer = peer
        self.release()

    def release(self) -> None:
        """Send what has waited."""
        held, self._held = self._held, []
        for frame in held:
            self._transmit(frame)

    def _transmit(self, frame: bytes | None) -> None:
        transport = self._transport
        if self.peer is None or transport.is_cut(self.owner, self.other):
            self._held.append(frame)
            return
        world = transport.world
        arrival = world.now + transport.delay_ms(self.owner, self.other, len(frame or b""))
        self._last_arrival = max(arrival, self._last_arrival)
        world.at(self._last_arrival, self._arrive, self.peer, frame)

    def _arrive(self, peer: End, frame: bytes | None) -> None:
        if not peer.open:
            return
        if frame is None:
            peer.lose("the stream ended")
        else:
            peer.on_frame(frame)


class Transport:
    """All streams of one simulated network."""

    def __init__(self, world: World, model: NetworkModel) -> None:
        self.world = world
        self.model = model
        self._random = world.dice["network"]
        self._groups: dict[int, int] = {}
        self._cuts = 0
        self._ends: dict[End, None] = {}

    def delay_ms(self, source: Endpoint, target: Endpoint, size: int) -> int:
        """Milliseconds that a frame takes."""
        direct = can_dial(source.place, target.place) or can_dial(target.place, source.place)
        seconds = self.model.delay_s(source.place, target.place, size, self._random)
        return max(1, round(1000 * seconds * (1 if direct else RELAY_TRIPS)))

    @property
    def is_split(self) -> bool:
        """Whether a partition is in force."""
        return bool(self._groups)

    def is_cut(self, a: Endpoint, b: Endpoint) -> bool:
        """Whether a partition is between two nodes."""
        return self._groups.get(a.index, 0) != self._groups.get(b.index, 0)

    def partition(self, groups: dict[int, int]) -> None:
        """Split the network: node index -> group; nodes that are not named are in group 0."""
        self._groups = groups
        self._cuts += 1
        self.world.after(KEEP_ALIVE_MS, self._give_up, self._cuts)

    def heal(self) -> None:
        """Join all groups again."""
        self._groups = {}
        self._cuts += 1
        for end in self._living():
            end.release()

    def _give_up(self, cut: int) -> None:
        if cut == self._cuts:
            for end in self._living():
                if self.is_cut(end.owner, end.other):
                    end.lose("the connection was lost")

    def _living(self) -> list[End]:
        """Ends from which something may still be sent."""
        ends = [end for end in self._ends if end.open or (end.peer is not None and end.peer.open)]
        self._ends = dict.fromkeys(ends)
        return ends

    def dial(self, source: Endpoint, target: Endpoint) -> End:
        """Open a stream; it is lost when nobody answers."""
        near = End(self, source, target)
        one_way = self.delay_ms(source, target, 0)
        if not target.up:
            self.world.after(2 * one_way, near.lose, UNANSWERED)
        elif self.is_cut(source, target):
            self.world.after(DIAL_MS, near.lose, UNANSWERED)
        else:
            self.world.after(self.handshake_trips(source, target) * one_way, self._connect, near)
        return near

    def handshake_trips(self, _source: Endpoint, _target: Endpoint) -> int:
        """One-way trips before the first frame of a stream; benchmarks, where connections are kept, have others."""
        return HANDSHAKE_TRIPS

    def _connect(self, near: End) -> None:
        source, target = near.owner, near.other
        if not source.up or not near.open:
            return
        if not target.up or self.is_cut(source, target):
            near.lose(UNANSWERED)
            return
        far = End(self, target, source)
        self._ends[near] = self._ends[far] = None
        if len(self._ends) > MAX_ENDS:
            self._living()
        far.connect(near)
        target.accept(far)
        near.connect(far)

    def crash(self, node: Endpoint) -> None:
        """A node dies: its kernel resets the connections, which the others learn one trip later."""
        for end in tuple(node.streams):
            end.open = False
            peer = end.peer
            if peer is not None and peer.open:
                self.world.after(self.delay_ms(node, end.other, 0), peer.lose, "the connection was lost")
        node.streams.clear()


def _ignore(_: object) -> None:
    """Nobody listens."""
