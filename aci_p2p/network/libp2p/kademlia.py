"""Kademlia over the host's streams: libp2p's kad-dht messages under our own protocol id.

Takes the place of py-libp2p's `KadDHT`, whose protocol id is fixed, whose lookups of values and providers walk the
whole network, which answers from what it has cached even when others know more, refuses to refresh a record and keeps
its stores in the clock of the wall.

Every call ends within its limit and returns the best that was found; what peers answer is checked and bounded, and a
peer that answers badly is dropped from the routing table.

Source: https://github.com/libp2p/specs/tree/master/kad-dht
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record

from aci_p2p.network.api import MAX_RECORD_BYTES, RecordSelector, RecordValidator
from aci_p2p.network.checks import check_provider_key, check_record
from aci_p2p.network.libp2p.addresses import parse_all
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.kad_table import (
    BUCKET_SIZE,
    ProviderStore,
    RecordStore,
    RoutingTable,
    closest,
    position,
)
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/aci/kad/1.0.0"
"""Stream protocol id: ACI's own DHT, apart from the public IPFS one."""
CONCURRENCY = 5
"""Queries of one lookup under way at once (Kademlia's alpha)."""
QUERY_SECONDS = 4.0
"""Time for one peer to answer, dialling it included, seconds."""
LOOKUP_SECONDS = 12.0
"""Time for a whole lookup or store, seconds: three rounds of peers that do not answer."""
ANSWERS_WANTED = 3
"""Valid values after which a lookup ends: one stale holder does not decide."""
MAX_MESSAGE_BYTES = 64 << 10
"""Longest message, bytes: twenty peers with eight addresses each and a record."""
MAX_KEY_BYTES = 128
"""Longest key, bytes."""
MAX_PROVIDERS_PER_ANSWER = 40
"""Providers in one answer: with their addresses they fit MAX_MESSAGE_BYTES."""
IDLE_SECONDS = 30.0
"""An inbound stream with nothing to answer for this long is ended, seconds."""
SETTLE_SECONDS = 0.1
"""After a new peer was found, how long to wait for more before looking around, seconds."""
JOIN_INTERVAL_SECONDS = 15.0
"""Shortest time between two looks around, seconds: new peers come in crowds."""
REFRESH_SECONDS = 600.0
"""Time between refreshes of the routing table, seconds (libp2p's usual value)."""


class KademliaError(Exception):
    """A peer's message is malformed or breaks a limit."""


class Kademlia:
    """Our node of the DHT."""

    def __init__(self, host: Host, validate: RecordValidator, select: RecordSelector, random: Random) -> None:
        """`random` picks the keys that a refresh looks up."""
        self._host = host
        self._validate = validate
        self._select = select
        self._random = random
        self._table = RoutingTable(host.node_id)
        self._records = RecordStore()
        self._providers = ProviderStore()
        self._found_peer = trio.Event()

    @property
    def table_size(self) -> int:
        """Peers in the routing table."""
        return len(self._table)

    def add_peer(self, peer: NodeId) -> None:
        """A connected peer serves our protocol."""
        if self._table.add(peer):
            self._found_peer.set()

    async def run(self) -> None:
        """Look around when new peers appear, and refresh the table now and then, until cancelled."""
        while True:
            with trio.move_on_after(REFRESH_SECONDS) as refresh:
                await self._found_peer.wait()
            await trio.sleep(SETTLE_SECONDS)
            self._found_peer = trio.Event()
            await self._lookup(self._host.node_id.peer_id, Message.FIND_NODE, lambda _: False)
            if refresh.cancelled_caught:
                await self._lookup(self._random.randbytes(32), Message.FIND_NODE, lambda _: False)
            await trio.sleep(JOIN_INTERVAL_SECONDS)

    async def put_record(self, key: str, value: bytes) -> None:
        """See `Network.put_record`."""
        check_record(key, value)
        self._validate(key, value)
        self._records.put(key, value, trio.current_time())
        raw_key = key.encode()
        record = Record(key=raw_key, value=value)
        await self._send_to_closest(raw_key, Message(type=Message.PUT_VALUE, key=raw_key, record=record))

    async def get_record(self, key: str) -> bytes | None:
        """See `Network.get_record`."""
        check_record(key, b"")
        values: list[bytes] = []
        answers = 0

        def collect(value: bytes | None) -> bool:
            nonlocal answers
            if value is not None and self._is_valid(key, value):
                answers += 1
                if value not in values:
                    values.append(value)
            return answers >= ANSWERS_WANTED

        collect(self._records.get(key, trio.current_time()))
        raw_key = key.encode()
        await self._lookup(
            raw_key,
            Message.GET_VALUE,
            lambda answer: collect(answer.record.value if answer.record.key == raw_key else None),
        )
        return values[self._best(key, values)] if values else None

    async def provide(self, key: bytes) -> None:
        """See `Network.provide`."""
        check_provider_key(key)
        self._providers.add(key, self._host.node_id, trio.current_time())
        addresses = [address.to_bytes() for address in self._host.addresses]
        ourselves = Message.Peer(id=self._host.node_id.peer_id, addrs=addresses)
        await self._send_to_closest(key, Message(type=Message.ADD_PROVIDER, key=key, providerPeers=[ourselves]))

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        """See `Network.find_providers`."""
        check_provider_key(key)
        found = dict.fromkeys(self._providers.get(key, trio.current_time()))

        def collect(answer: Message) -> bool:
            found.update(dict.fromkeys(self._learn(answer.providerPeers[:MAX_PROVIDERS_PER_ANSWER])))
            return len(found) >= limit

        await self._lookup(key, Message.GET_PROVIDERS, collect)
        return tuple(found)[:limit]

    async def _send_to_closest(self, key: bytes, message: Message) -> None:
        with trio.move_on_after(LOOKUP_SECONDS):
            peers = await self._lookup(key, Message.FIND_NODE, lambda _: False)
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(self._ask, peer, message)

    async def _lookup(self, key: bytes, kind: Message.MessageType, collect: Callable[[Message], bool]) -> list[NodeId]:
        """Ask ever closer peers about a key until the closest have all answered or `collect` says it is enough.

        Returns the peers that answered, closest first, at most BUCKET_SIZE.
        """
        lookup = _Lookup(position(key), [*self._table.closest(position(key), BUCKET_SIZE), *self._host.peers])
        message = Message(type=kind, key=key)

        async def work() -> None:
            while (peer := await lookup.next_peer()) is not None:
                answer = await self._ask(peer, message)
                if answer is None:
                    lookup.failed(peer)
                else:
                    lookup.answered(peer, self._learn(answer.closerPeers[:BUCKET_SIZE]))
                    if collect(answer):
                        nursery.cancel_scope.cancel()

        with trio.move_on_after(LOOKUP_SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(CONCURRENCY):
                    nursery.start_soon(work)
        return lookup.closest_answered()

    async def _ask(self, peer: NodeId, message: Message) -> Message | None:
        """One request and its answer; None when the peer does not answer well in time."""
        try:
            with trio.fail_after(QUERY_SECONDS):
                stream = await self._host.open_stream(peer, PROTOCOL)
                try:
                    await stream.write(prefixed(message.SerializeToString()))
                    answer = Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
                finally:
                    stream.close()
        except Exception:  # noqa: BLE001 - whatever is wrong with one peer, the lookup goes on with the others
            self._table.remove(peer)
            return None
        return answer if answer.type == message.type else None

    def _learn(self, peers: Iterable[Message.Peer]) -> list[NodeId]:
        """Remember where the peers in an answer can be dialled; those that make no sense are skipped."""
        learnt: list[NodeId] = []
        for peer in peers:
            try:
                node_id = NodeId.from_peer_id(peer.id)
            except LocalError:
                continue
            if node_id != self._host.node_id:
                self._host.learn(node_id, parse_all(peer.addrs, MAX_ADDRESSES_PER_PEER), hearsay=True)
            learnt.append(node_id)
        return learnt

    def _is_valid(self, key: str, value: bytes) -> bool:
        if len(value) > MAX_RECORD_BYTES:
            return False
        try:
            self._validate(key, value)
        except AciError:
            return False
        return True

    def _best(self, key: str, values: Sequence[bytes]) -> int:
        return self._select(key, values) if len(values) > 1 else 0

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """Answer one peer's stream; raises on whatever is malformed, which resets the stream."""
        while True:
            with trio.fail_after(IDLE_SECONDS):
                request = Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
                answer = self._answer(peer, request)
                await stream.write(prefixed(answer.SerializeToString()))

    def _answer(self, peer: NodeId, request: Message) -> Message:
        if not 0 < len(request.key) <= MAX_KEY_BYTES:
            msg = "the key is empty or too long"
            raise KademliaError(msg)
        now = trio.current_time()
        answer = Message(type=request.type, key=request.key)
        match request.type:
            case Message.PUT_VALUE:
                self._store(request, now)
                answer.record.CopyFrom(request.record)
                return answer
            case Message.ADD_PROVIDER:
                self._add_provider(peer, request, now)
                return answer
            case Message.PING:
                return answer
            case Message.GET_VALUE:
                value = self._records.get(request.key.decode(errors="replace"), now)
                if value is not None:
                    answer.record.CopyFrom(Record(key=request.key, value=value))
            case Message.GET_PROVIDERS:
                providers = self._providers.get(request.key, now)[:MAX_PROVIDERS_PER_ANSWER]
                answer.providerPeers.extend(self._describe(provider, peer) for provider in providers)
            case _:
                pass
        nearest = self._table.closest(position(request.key), BUCKET_SIZE)
        described = (self._describe(one, peer) for one in nearest if one != peer)
        answer.closerPeers.extend(one for one in described if one.addrs)
        return answer

    def _describe(self, peer: NodeId, asker: NodeId) -> Message.Peer:
        addresses = self._host.addresses if peer == self._host.node_id else self._host.known(peer)
        usable = self._host.usable_by(asker, addresses)
        return Message.Peer(id=peer.peer_id, addrs=[address.to_bytes() for address in usable])

    def _store(self, request: Message, now: float) -> None:
        value = request.record.value
        key = request.key.decode()
        check_record(key, value)
        if request.record.key != request.key or not self._is_valid(key, value):
            msg = "the record is refused"
            raise KademliaError(msg)
        held = self._records.get(key, now)
        # Storing the same value again prolongs it.
        if held is None or held == value or self._best(key, (held, value)) == 1:
            self._records.put(key, value, now)

    def _add_provider(self, peer: NodeId, request: Message, now: float) -> None:
        check_provider_key(request.key)
        for provider in request.providerPeers:
            if provider.id == peer.peer_id:
                self._host.learn(peer, parse_all(provider.addrs, MAX_ADDRESSES_PER_PEER))
                self._providers.add(request.key, peer, now)


class _Lookup:
    """Which peers a lookup has asked, is asking, and should ask next."""

    def __init__(self, target: int, peers: Iterable[NodeId]) -> None:
        self._target = target
        self._waiting = set(peers)
        self._asking: set[NodeId] = set()
        self._answered: set[NodeId] = set()
        self._failed: set[NodeId] = set()
        self._changed = trio.Event()

    async def next_peer(self) -> NodeId | None:
        """The next peer to ask: the nearest one not asked yet, while it is among the BUCKET_SIZE nearest alive."""
        while True:
            alive = closest(self._waiting | self._asking | self._answered, self._target, BUCKET_SIZE)
            for peer in alive:
                if peer in self._waiting:
                    self._waiting.discard(peer)
                    self._asking.add(peer)
                    return peer
            if not self._asking:
                return None
            await self._changed.wait()

    def answered(self, peer: NodeId, closer: Iterable[NodeId]) -> None:
        """A peer has answered, with peers closer to the target."""
        self._asking.discard(peer)
        self._answered.add(peer)
        self._waiting.update(set(closer) - self._asking - self._answered - self._failed)
        self._notify()

    def failed(self, peer: NodeId) -> None:
        """A peer has not answered."""
        self._asking.discard(peer)
        self._failed.add(peer)
        self._notify()

    def closest_answered(self) -> list[NodeId]:
        """Peers that answered, nearest first."""
        return closest(self._answered, self._target, BUCKET_SIZE)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
