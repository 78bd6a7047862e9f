"""Gossip over the host's streams: one stream to each neighbour, one from it, and the router between them.

Every queue is bounded. A neighbour that reads slowly loses messages, never memory of ours. What a neighbour sends is
read no faster than we judge it, by turns with the others' messages; one that floods, or whose messages have to be
rejected, is ignored more and more and thrown out in the end (`score`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from random import Random

import trio
from google.protobuf.message import DecodeError

from aci_p2p.network.api import GossipMessage, GossipValidator, PeerUnreachable, Subscription
from aci_p2p.network.delivery import GossipJournal, QueuedSubscription, judge
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.router import HEARTBEAT_SECONDS, Incoming, Router
from aci_p2p.network.libp2p.score import MALFORMED_PENALTY
from aci_p2p.network.libp2p.upstream import RPC
from aci_p2p.network.libp2p.varint import prefixed, split_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Reason, Validation

PROTOCOL = "/meshsub/1.1.0"
"""Stream protocol id of gossipsub v1.1."""
MAX_RPC_BYTES = 256 << 10
"""Longest RPC that we read, bytes: sixteen of the largest messages."""
MAX_RPC_ENTRIES = 512
"""Messages, subscriptions and control entries of each kind in one RPC that we handle: some milliseconds of work."""
BATCH_BYTES = 64 << 10
"""RPCs waiting for one neighbour are joined up to this size, bytes."""
BATCH_RPCS = 128
"""RPCs joined at most; each holds few entries, so that the whole stays below MAX_RPC_ENTRIES."""
MAX_OUTBOX_BYTES = 2 << 20
"""Waiting for one neighbour, bytes; beyond it messages to that neighbour are lost."""
MAX_WAITING_BYTES = 16 << 20
"""Waiting for all neighbours together, bytes; beyond it those lose messages for whom more than an equal share waits."""
READ_BYTES = 64 << 10
"""Taken from the muxer at once, bytes."""
LINGER_SECONDS = 1.0
"""How long the rest of a neighbour's gossip stream is read after it has opened a newer one, seconds."""
RETRY_SECONDS = 1.0
"""Time before a gossip stream that broke is opened again, seconds; doubled each time."""
MAX_RETRY_SECONDS = 60.0
"""Longest time between two attempts, seconds: the peer may not speak gossipsub at all."""

_MALFORMED = Validation(Decision.REJECT, Reason.MALFORMED)


def _parse(encoded: bytes) -> RPC:
    """Read an RPC; raises DecodeError or ValueError when it is malformed or holds too much."""
    rpc = RPC.FromString(encoded)
    most = max(len(rpc.publish), len(rpc.subscriptions))
    if rpc.HasField("control"):
        control = rpc.control
        most = max(most, len(control.ihave), len(control.iwant), len(control.graft), len(control.prune))
    if most > MAX_RPC_ENTRIES:
        msg = "the RPC has too many entries"
        raise ValueError(msg)
    return rpc


class _Waiting:
    """How much waits for all neighbours together."""

    def __init__(self) -> None:
        self.bytes = 0
        self.neighbours = 0

    def admits(self, held: int, size: int) -> bool:
        """Whether `size` bytes more may wait for a neighbour for which `held` bytes wait."""
        if self.bytes + size <= MAX_WAITING_BYTES:
            return True
        return held + size <= MAX_WAITING_BYTES // self.neighbours


class _Outbox:
    """What waits for one neighbour."""

    def __init__(self, all_waiting: _Waiting) -> None:
        self._all_waiting = all_waiting
        self._all_waiting.neighbours += 1
        self._waiting: deque[tuple[int, RPC]] = deque()
        self._bytes = 0
        self._arrived = trio.Event()
        self._moved = False
        self.scope = trio.CancelScope()

    def close(self) -> None:
        """The neighbour is gone: end the task that writes to it."""
        self._all_waiting.neighbours -= 1
        self._count(-self._bytes)
        self._waiting.clear()
        self.scope.cancel()

    def move(self) -> None:
        """There is a better connection to the neighbour: have the stream opened anew."""
        self._moved = True
        self._arrived.set()

    def put(self, rpc: RPC) -> bool:
        """Queue; False when there is no room."""
        size = rpc.ByteSize()
        if self._bytes + size > MAX_OUTBOX_BYTES or not self._all_waiting.admits(self._bytes, size):
            return False
        self._waiting.append((size, rpc))
        self._count(size)
        self._arrived.set()
        return True

    def _count(self, size: int) -> None:
        self._bytes += size
        self._all_waiting.bytes += size

    async def take(self) -> RPC | None:
        """Wait for something to send; returns as much as fits in one batch, None to go on with a new stream."""
        while not self._waiting and not self._moved:
            self._arrived = trio.Event()
            await self._arrived.wait()
        if self._moved:
            self._moved = False
            return None
        batch, size = RPC(), 0
        for _ in range(min(BATCH_RPCS, len(self._waiting))):
            if size and size + self._waiting[0][0] > BATCH_BYTES:
                break
            part_size, part = self._waiting.popleft()
            self._count(-part_size)
            size += part_size
            batch.MergeFrom(part)
        return batch


class Gossip:
    """Publishing and subscribing over a host."""

    def __init__(self, host: Host, nursery: trio.Nursery, random: Random) -> None:
        """`nursery` holds the tasks that write to neighbours; `random` picks neighbours for the meshes."""
        self._host = host
        self._nursery = nursery
        self._router = Router(self._send, random)
        self._outboxes: dict[NodeId, _Outbox] = {}
        self._waiting = _Waiting()
        self._readers: dict[NodeId, trio.CancelScope] = {}
        self._subscriptions: dict[str, QueuedSubscription] = {}
        self.journal = GossipJournal()
        self.on_subscriptions: list[Callable[[], None]] = []
        """Called when a neighbour may have joined or left topics."""
        host.on_connected.append(self._on_connected)
        host.on_disconnected.append(self._on_disconnected)
        host.on_moved.append(lambda peer: self._outboxes[peer].move())

    def topic_peers(self, topic: str) -> tuple[NodeId, ...]:
        """Neighbours subscribed to a topic."""
        return tuple(self._router.subscribers(topic))

    def mesh_peers(self) -> frozenset[NodeId]:
        """Neighbours in the mesh of a topic: connections to them are needed."""
        return self._router.mesh_peers

    async def run(self) -> None:
        """The heartbeat, until cancelled."""
        while True:
            await trio.sleep(HEARTBEAT_SECONDS)
            self._router.heartbeat(trio.current_time())
            for peer in self._router.scores.banned():
                self._nursery.start_soon(self._host.throw_out, peer)

    def score(self, peer: NodeId) -> float:
        """What a neighbour's gossip has earned it; 0 for strangers."""
        return self._router.scores.score(peer)

    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:
        """See `Network.report`."""
        if validation.decision is Decision.REJECT:
            self._router.scores.reject(peer, topic)
        await self._refuse(peer, validation)

    def _on_connected(self, connection: Connection) -> None:
        # Who comes through a relay has no address of its own.
        address = "" if connection.relay else connection.source.partition("/")[0]
        self._router.add_peer(connection.peer, address, trio.current_time())
        self._outboxes[connection.peer] = _Outbox(self._waiting)
        self._nursery.start_soon(self._write_to, connection.peer, self._outboxes[connection.peer])

    def _on_disconnected(self, peer: NodeId) -> None:
        self._outboxes.pop(peer).close()
        self._router.remove_peer(peer, trio.current_time())

    def _send(self, peer: NodeId, rpc: RPC) -> None:
        outbox = self._outboxes.get(peer)
        if outbox is not None and not outbox.put(rpc):
            self.journal.dropped += len(rpc.publish)

    async def _write_to(self, peer: NodeId, outbox: _Outbox) -> None:
        """Keep a gossip stream to a neighbour for as long as it is connected."""
        with outbox.scope:
            pause = RETRY_SECONDS
            while True:
                if await self._write_stream(peer, outbox):
                    continue
                await trio.sleep(pause)
                pause = min(2 * pause, MAX_RETRY_SECONDS)

    async def _write_stream(self, peer: NodeId, outbox: _Outbox) -> bool:
        """Send on a new stream until it breaks; True when the neighbour is to get another at once."""
        if self._host.connection(peer) is None:
            return False
        try:
            stream = await self._host.open_stream(peer, PROTOCOL)
        except PeerUnreachable:
            return False
        self._router.greet(peer)
        try:
            while (rpc := await outbox.take()) is not None:
                await stream.write(prefixed(rpc.SerializeToString()))
            stream.close()
        except StreamReset:
            return False
        finally:
            stream.reset()
        return True

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """Read a neighbour's gossip stream; a newer one takes its place after LINGER_SECONDS."""
        with trio.CancelScope() as scope:
            if (older := self._readers.get(peer)) is not None:
                older.deadline = trio.current_time() + LINGER_SECONDS
            self._readers[peer] = scope
            try:
                await self._read_stream(peer, stream)
            finally:
                if self._readers.get(peer) is scope:
                    del self._readers[peer]

    async def _read_stream(self, peer: NodeId, stream: YamuxStream) -> None:
        buffer = bytearray()
        while True:
            try:
                while (encoded := split_prefixed(buffer, MAX_RPC_BYTES)) is None:
                    buffer += await stream.read(READ_BYTES)
                rpc = _parse(encoded)
            except (EndOfStream, StreamReset):
                return
            except (DecodeError, ValueError):
                self._router.scores.penalise(peer, MALFORMED_PENALTY)
                await self._refuse(peer, _MALFORMED)
                stream.reset()
                return
            now = trio.current_time()
            if not self._router.admit(peer, rpc, len(encoded), now):
                self.journal.refused[Reason.FLOODED] += max(1, len(rpc.publish))
                await trio.lowlevel.checkpoint()
                continue
            incoming = self._router.receive(peer, rpc, now)
            if rpc.subscriptions:
                for notify in self.on_subscriptions:
                    notify()
            for message in incoming:
                await self._judge(peer, message)

    async def _judge(self, peer: NodeId, incoming: Incoming) -> None:
        # Signatures are checked here: let other tasks run between two messages of a batch.
        await trio.lowlevel.checkpoint()
        subscription = self._subscriptions.get(incoming.topic)
        if subscription is None:
            return
        validation = _MALFORMED if incoming.policy_breach else judge(subscription.validator, peer, incoming.data)
        if validation.decision is Decision.REJECT:
            await self.report(peer, incoming.topic, validation)
            return
        if validation.decision is Decision.IGNORE:
            self._router.ignore(incoming, peer)
            await self._refuse(peer, validation)
            return
        self.journal.accepted += 1
        if subscription.is_worth_waiting_for:
            await subscription.wait_for_room()
        if not subscription.deliver(GossipMessage(peer, incoming.data)):
            self.journal.dropped += 1
        self._router.forward(incoming, peer)

    async def _refuse(self, peer: NodeId, validation: Validation) -> None:
        if self.journal.refuse(peer, validation):
            await self._host.throw_out(peer)

    @asynccontextmanager
    async def subscribe(self, topic: str, validator: GossipValidator, *, capacity: int) -> AsyncGenerator[Subscription]:
        """See `Network.subscribe`."""
        await trio.lowlevel.checkpoint()
        if topic in self._subscriptions:
            msg = f"{topic} is already subscribed"
            raise LocalError(msg)
        subscription = QueuedSubscription(validator, capacity)
        self._subscriptions[topic] = subscription
        self._router.join(topic, trio.current_time())
        try:
            yield subscription
        finally:
            del self._subscriptions[topic]
            self._router.leave(topic, trio.current_time())

    def publish(self, topic: str, data: bytes) -> None:
        """See `Network.publish`."""
        self._router.publish(topic, data, trio.current_time())
