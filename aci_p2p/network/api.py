"""The seam between ACI and its transport: streams, pubsub and a DHT, and nothing of libp2p.

Two implementations: `aci_p2p.network.libp2p` (TCP, noise, yamux, gossipsub, Kademlia) and `aci_p2p.network.memory`
(one process, virtual time). Everything above speaks of `NodeId`, byte frames and multiaddr strings only.

A peer can never raise into the caller's task tree: handlers and validators run contained, and what a peer does wrong
shows as a closed stream, a dropped message or a typed error from the call that was waiting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from aci_p2p.protocol.errors import LocalError, RemoteError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Validation

MAX_FRAME_BYTES = 1 << 20
"""Largest frame on a stream, bytes: a long prompt (128 Ki tokens of text) fits, a memory bomb does not."""
MAX_GOSSIP_BYTES = 16 << 10
"""Largest gossip message, bytes: offers and bids take under 1 KiB; prompts never go through gossip."""
MAX_RECORD_BYTES = 4 << 10
"""Largest DHT value, bytes: a signed node or capability record."""
MAX_RECORD_KEY_BYTES = 128
"""Longest DHT key, bytes: go-libp2p and py-libp2p refuse longer ones; the longest of ours has 113."""


class StreamClosed(RemoteError):
    """The peer ended or reset the stream, or the connection under it was lost."""

    code = "stream_closed"


class PeerUnreachable(ResourceError):
    """No address of the peer could be dialled, or it speaks none of our protocols."""

    code = "peer_unreachable"


class NoFreeStream(PeerUnreachable):
    """As many streams of the protocol are open to the peer as it serves; one of them has to end first."""

    code = "no_free_stream"


class AddressInUse(ResourceError):
    """A listen address is taken by another program."""

    code = "address_in_use"


class DialledOurselves(LocalError):
    """The peer to dial is this node, or the one that answered was."""

    code = "dialled_ourselves"


class Stream(ABC):
    """A bidirectional, encrypted stream of frames to one peer. Closed by the block that opened it."""

    @property
    @abstractmethod
    def peer(self) -> NodeId:
        """The authenticated other side."""

    @abstractmethod
    async def send(self, frame: bytes) -> None:
        """Send one frame of at most MAX_FRAME_BYTES, waiting for flow control. Raises StreamClosed."""

    @abstractmethod
    async def receive(self) -> bytes:
        """Receive one frame. Raises StreamClosed on a clean end, a reset or an oversized frame."""


@dataclass(frozen=True, slots=True)
class GossipMessage:
    """A validated pubsub message."""

    forwarder: NodeId
    """The neighbour that sent it to us (not its author: the author signs inside `data`)."""
    data: bytes
    """The payload, at most MAX_GOSSIP_BYTES."""


class Subscription(ABC):
    """Validated messages of one topic, oldest first. Bounded: when full, the oldest is dropped and counted."""

    @abstractmethod
    async def receive(self) -> GossipMessage:
        """Wait for the next message."""

    @property
    @abstractmethod
    def dropped(self) -> int:
        """Messages lost to a full queue since the subscription opened."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GossipMessage:
        return await self.receive()


class Reachability(StrEnum):
    """Whether others can open connections to us."""

    UNKNOWN = "unknown"
    """Nobody has tried yet."""
    PUBLIC = "public"
    """Others have dialled us back."""
    PRIVATE = "private"
    """Others have tried in vain: a NAT or a firewall is between."""


def are_local(addresses: Sequence[str]) -> bool:
    """Whether these addresses can be dialled from this machine alone; not so if there are none."""
    return bool(addresses) and all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in addresses)


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A connection to a peer, as `aci-p2p peers` shows it."""

    peer: NodeId
    """The other side."""
    address: str
    """Multiaddr at which it was dialled or from which it came."""
    outbound: bool
    """Whether we dialled."""
    relay: NodeId | None
    """The relay in between; None when the connection is direct."""
    age_s: float
    """Seconds since it was made."""
    round_trip_ms: float | None
    """Milliseconds from ping to answer, lately; None before the first answer."""
    streams: int
    """Open streams on it."""
    agent: str
    """What the peer says its program is; empty before it said."""
    score: float
    """What its gossip has earned it (gossipsub v1.1 peer score); negative: misbehaves."""


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A peer that was connected lately, and where."""

    peer: NodeId
    """Its identity."""
    addresses: tuple[str, ...]
    """Multiaddrs at which it can be dialled, those that have worked first."""


@dataclass(frozen=True, slots=True)
class NetworkStatistics:
    """A snapshot of what the network holds and has refused."""

    peers: int
    """Connected peers."""
    inbound: int
    """Connections that peers have dialled."""
    outbound: int
    """Connections that we have dialled."""
    relayed: int
    """Those of both through relays."""
    relays: int
    """Relays that lead others to us."""
    reservations: int
    """Peers that we relay for."""
    circuits: int
    """Connections of others that go through us."""
    holes_punched: int
    """Relayed connections that we have turned into direct ones (DCUtR)."""
    holes_failed: int
    """Those with which it was tried in vain."""
    trimmed: int
    """Connections closed because there were too many."""
    banned: int
    """Peers thrown out lately, neither dialled nor let in for a while."""
    handshakes: int
    """Inbound connections that are not authenticated yet."""
    handshakes_refused: int
    """Inbound connections refused because too many came from one source."""
    dials: int
    """Searches for a peer at its addresses, successful or not."""
    dial_failures: int
    """Those in vain."""
    streams: int
    """Open streams that this seam knows of, both directions."""
    gossip_accepted: int
    """Gossip messages delivered."""
    gossip_refused: dict[str, int]
    """Gossip messages ignored or rejected, by reason."""
    gossip_dropped: int
    """Gossip messages lost to full queues: of subscriptions, or on their way to slow neighbours."""
    handler_failures: int
    """Stream handlers ended by an error (a peer's fault or our bug; never fatal)."""


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream; the stream is closed when it returns, reset when it raises."""
GossipValidator = Callable[[NodeId, bytes], Validation]
"""Judges one message before it is delivered or forwarded: (forwarder, data). Must not block or raise.

One that raises is a bug of ours, for which no neighbour is to blame: the error is logged, and the message IGNOREd.
"""


class Network(ABC):
    """A running network endpoint. Made only by `async with`."""

    @property
    @abstractmethod
    def node_id(self) -> NodeId:
        """Our identity."""

    @property
    @abstractmethod
    def addresses(self) -> Sequence[str]:
        """Our dialable multiaddrs, each ending in `/p2p/<peer id>`: at most MAX_ADDRESSES (protocol/messages.py).

        Those come first that most others can dial. Loopback is left out when there are others, but for one address at
        the end if there is room: for nodes on the same machine.
        """

    @property
    @abstractmethod
    def peers(self) -> Sequence[NodeId]:
        """Connected peers."""

    @property
    @abstractmethod
    def reachability(self) -> Reachability:
        """Whether others can open connections to us, as far as we know."""

    @abstractmethod
    async def changed(self) -> None:
        """Wait until the peers, the topics that they have joined, our addresses or our reachability change.

        What changes while nobody waits is not told: look first, and then wait, without a checkpoint between. May return
        for less than a change.
        """

    @abstractmethod
    def connections(self) -> Sequence[ConnectionInfo]:
        """All connections, the oldest first."""

    @abstractmethod
    def known_peers(self) -> Sequence[KnownPeer]:
        """Peers that were connected while this endpoint is open, the latest first: worth keeping for the next start."""

    @abstractmethod
    async def connect(self, address: str) -> NodeId:
        """Dial a multiaddr, with `/p2p/<peer id>` if it matters who answers; a no-op when connected to that peer.

        `/p2p/<peer id>` alone dials the peer wherever it is known to be. Names are resolved with the system's resolver
        and all their IP addresses tried; `/dnsaddr` is not for here.
        Raises LocalError for what is no address (DialledOurselves for one that leads to us), PeerUnreachable.
        """

    @abstractmethod
    def learn_addresses(self, peer: NodeId, addresses: Sequence[str]) -> None:
        """Remember where a peer may be dialled, as it says in a verified record, in place of what it has said before.

        Skipped are malformed addresses, and those that a stranger may not make us dial: of this machine or of a local
        network, unless all of our peers or we ourselves are there, too.
        """

    @abstractmethod
    def open_stream(self, peer: NodeId, protocol: str, *, eager: bool = False) -> AbstractAsyncContextManager[Stream]:
        """Open a stream, dialling if needed. Closed at the end, reset on error or cancel.

        Raises PeerUnreachable; NoFreeStream while limits.MAX_STREAMS_TO_PEER of the protocol are open to the peer.

        An `eager` one saves a round trip where the peer has served the protocol before: that it does so no more is then
        known from the first `receive`, which raises StreamClosed.
        """

    @abstractmethod
    def serve(self, protocol: str, handler: StreamHandler) -> AbstractContextManager[None]:
        """Serve inbound streams of a protocol within the block, each in a contained task; cancelled at its end."""

    @abstractmethod
    def subscribe(
        self, topic: str, validator: GossipValidator, *, capacity: int
    ) -> AbstractAsyncContextManager[Subscription]:
        """Join a topic within the block; `capacity` messages are queued at most. One subscription a topic."""

    @abstractmethod
    def topic_peers(self, topic: str) -> Sequence[NodeId]:
        """Connected peers known to have joined a topic: those whom a publication can reach directly."""

    @abstractmethod
    async def publish(self, topic: str, data: bytes) -> None:
        """Broadcast at most MAX_GOSSIP_BYTES to a topic. Lossy by nature: no error says that nobody heard.

        Works without a subscription; our own subscription does not get it.
        """

    @abstractmethod
    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:
        """Count a topic's message that a peer sent outside of pubsub, as if it had forwarded it: not ACCEPTed.

        Like a validator's REJECTs, these lead to a disconnection when there are too many.
        """

    @abstractmethod
    async def put_record(self, key: str, value: bytes) -> None:
        """Store a value of at most MAX_RECORD_BYTES under `/aci/...` at the closest DHT nodes. Best effort.

        It is kept for RECORD_SECONDS (`limits`) at most: repeat it some times within.
        """

    @abstractmethod
    async def get_record(self, key: str) -> bytes | None:
        """Look a value up in the DHT. A hint: callers verify its signature."""

    @abstractmethod
    async def provide(self, key: bytes) -> None:
        """Announce in the DHT that we provide `key` (a SHA-256 digest, 32 bytes). Best effort.

        It is kept for PROVIDER_SECONDS (`limits`): repeat it some times within.
        """

    @abstractmethod
    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        """At most `limit` nodes that announced `key`. A hint: callers verify their signed records."""

    @abstractmethod
    def statistics(self) -> NetworkStatistics:
        """A snapshot of the counters."""


RecordValidator = Callable[[str, bytes], None]
"""Judges a DHT value before it is stored or returned: (key, value); raises AciError to refuse it."""
RecordSelector = Callable[[str, Sequence[bytes]], int]
"""Index of the best (newest) of several valid values for a key."""
