"""Kademlia over the host's streams: libp2p's kad-dht messages under our own protocol id.

Takes the place of py-libp2p's `KadDHT`, whose protocol id is fixed, whose lookups of values and providers walk the
whole network, which answers from what it has cached even when others know more, refuses to refresh a record and keeps
its stores in the clock of the wall.

Every call ends within its limit and returns the best that was found; what peers answer is checked and bounded, and a
peer that answers badly is dropped from the routing table.

Source: https://github.com/libp2p/specs/tree/master/kad-dht
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from random import Random

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record

from aci_p2p.network.api import MAX_RECORD_BYTES, MAX_RECORD_KEY_BYTES, RecordSelector, RecordValidator
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
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER, MAX_KNOWN_PEERS
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/aci/kad/1.0.0"
"""Stream protocol id: ACI's own DHT, apart from the public IPFS one."""
CONCURRENCY = 5
"""Queries of one lookup under way at once (Kademlia's alpha)."""
QUERY_SECONDS = 3.0
"""Time for one peer to answer, dialling it included, seconds."""
PATIENCE_SECONDS = 1.0
"""Once somebody has given what was looked for, how long to wait for others who may know better, seconds."""
AVOID_SECONDS = 60.0
"""How long a peer that did not answer is not asked again, unless it connects anew, seconds."""
LOOKUP_SECONDS = 12.0
"""Time for a whole lookup or store, seconds: three rounds of peers that do not answer."""
ANSWERS_WANTED = 3
"""Answers with something in them after which a lookup ends: one stale or lying holder does not decide."""
MAX_MESSAGE_BYTES = 256 << 10
"""Longest message, bytes: sixty peers with eight addresses of the longest kind each, twice over."""
MAX_PROVIDERS_PER_ANSWER = 40
"""Providers in one answer: with their addresses and twenty closer peers they fit MAX_MESSAGE_BYTES."""
IDLE_SECONDS = 30.0
"""An inbound stream with nothing to answer for this long is ended, seconds."""
SETTLE_SECONDS = 0.1
"""After a new peer was found, how long to wait for more before looking around, seconds."""
JOIN_INTERVAL_SECONDS = 15.0
"""Shortest time between two looks around, seconds: new peers come in crowds."""
REFRESH_SECONDS = 600.0
"""Time between refreshes of the routing table, seconds (libp2p's usual value)."""

_SHA2_256 = b"\x12\x20"
"""Multihash prefix of a SHA-256 digest: on the wire, what is provided is named by its multihash."""

log = logging.getLogger("aci_p2p.network")


class KademliaError(Exception):
    """A peer's message is malformed or breaks a limit."""


class Progress(Enum):
    """How far a lookup has come."""

    NONE = auto()
    """Nothing was found yet."""
    SOME = auto()
    """Something was found; somebody else may know better."""
    ENOUGH = auto()
    """The lookup can end."""


def _nothing(_answer: Message) -> Progress:
    """What a lookup collects that only wants the closest peers."""
    return Progress.NONE


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
        self._avoided: OrderedDict[NodeId, float] = OrderedDict()
        self._found_peer = trio.Event()

    def add_peer(self, peer: NodeId) -> None:
        """A newly connected peer serves our protocol."""
        self._avoided.pop(peer, None)
        if self._table.add(peer):
            self._found_peer.set()

    def close_peers(self) -> list[NodeId]:
        """The peers in the routing table that are closest to us: connections to them are needed."""
        return self._table.closest(position(self._host.node_id.peer_id), BUCKET_SIZE)

    def avoid(self, peer: NodeId) -> None:
        """Leave a peer out of lookups for a while: it does not answer or does not serve our protocol."""
        self._table.remove(peer)
        self._avoided[peer] = trio.current_time() + AVOID_SECONDS
        self._avoided.move_to_end(peer)
        if len(self._avoided) > MAX_KNOWN_PEERS:
            self._avoided.popitem(last=False)

    async def run(self) -> None:
        """Look around when new peers appear, and refresh the table now and then, until cancelled."""
        while True:
            with trio.move_on_after(REFRESH_SECONDS) as refresh:
                await self._found_peer.wait()
            await trio.sleep(SETTLE_SECONDS)
            self._found_peer = trio.Event()
            await self._lookup(self._host.node_id.peer_id, Message.FIND_NODE, _nothing)
            if refresh.cancelled_caught:
                await self._lookup(self._random.randbytes(32), Message.FIND_NODE, _nothing)
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

        def collect(value: bytes | None) -> Progress:
            nonlocal answers
            if value is not None and self._is_valid(key, value):
                answers += 1
                if value not in values:
                    values.append(value)
            if answers >= ANSWERS_WANTED:
                return Progress.ENOUGH
            return Progress.SOME if answers else Progress.NONE

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
        multihash = _SHA2_256 + key
        self._providers.add(multihash, self._host.node_id, trio.current_time())
        addresses = [address.to_bytes() for address in self._host.addresses]
        ourselves = Message.Peer(id=self._host.node_id.peer_id, addrs=addresses)
        announcement = Message(type=Message.ADD_PROVIDER, key=multihash, providerPeers=[ourselves])
        await self._send_to_closest(multihash, announcement)

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        """See `Network.find_providers`."""
        check_provider_key(key)
        multihash = _SHA2_256 + key
        mentions = Counter(self._providers.get(multihash, trio.current_time()))
        answers = 0

        def collect(answer: Message) -> Progress:
            nonlocal answers
            named = set(self._learn(answer.providerPeers[:MAX_PROVIDERS_PER_ANSWER]))
            mentions.update(named)
            answers += bool(named)
            if answers >= ANSWERS_WANTED and len(mentions) >= limit:
                return Progress.ENOUGH
            return Progress.SOME if mentions else Progress.NONE

        await self._lookup(multihash, Message.GET_PROVIDERS, collect)
        # Those that most peers name come first: one that makes providers up does not crowd out the others.
        return tuple(provider for provider, _ in mentions.most_common(limit))

    async def _send_to_closest(self, key: bytes, message: Message) -> None:
        with trio.move_on_after(LOOKUP_SECONDS):
            peers = await self._lookup(key, Message.FIND_NODE, _nothing)
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(self._ask, peer, message)

    async def _lookup(
        self, key: bytes, kind: Message.MessageType, collect: Callable[[Message], Progress]
    ) -> list[NodeId]:
        """Ask ever closer peers about a key until the closest have all answered or `collect` says it is enough.

        Returns the peers that answered, closest first, at most BUCKET_SIZE.
        """
        now = trio.current_time()
        avoided = {peer for peer, until in self._avoided.items() if until > now}
        known = self._table.closest(position(key), BUCKET_SIZE)
        # A peer that has connected just now may not have told yet that it belongs in the table.
        lookup = _Lookup(position(key), {*known, *self._host.peers}, avoided)
        message = Message(type=kind, key=key)

        async def work() -> None:
            while (peer := await lookup.next_peer()) is not None:
                answer = await self._ask(peer, message)
                if answer is None:
                    lookup.failed(peer)
                    continue
                lookup.answered(peer, self._learn(answer.closerPeers[:BUCKET_SIZE]))
                progress = collect(answer)
                if progress is Progress.ENOUGH:
                    scope.cancel()
                elif progress is Progress.SOME:
                    scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE_SECONDS)

        with trio.move_on_after(LOOKUP_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(CONCURRENCY):
                    nursery.start_soon(work)
        return lookup.closest_answered()

    async def _ask(self, peer: NodeId, message: Message) -> Message | None:
        """One request and its answer; None when the peer does not answer well in time."""
        requests = [message]
        if message.type == Message.ADD_PROVIDER:
            # It has no answer of its own; that to a ping behind it says that it was read.
            requests.append(Message(type=Message.PING))
        try:
            with trio.fail_after(QUERY_SECONDS):
                stream = await self._host.open_stream(peer, PROTOCOL)
                try:
                    await stream.write(b"".join(prefixed(request.SerializeToString()) for request in requests))
                    answer = Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
                finally:
                    stream.close()
        except Exception:  # whatever is wrong with one peer, the lookup goes on with the others
            log.debug("%s did not answer a DHT query", peer.short, exc_info=True)
            self.avoid(peer)
            return None
        return answer if answer.type == requests[-1].type else None

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
                if answer is not None:
                    await stream.write(prefixed(answer.SerializeToString()))

    def _answer(self, peer: NodeId, request: Message) -> Message | None:
        if request.type == Message.PING:
            return Message(type=Message.PING)
        if not 0 < len(request.key) <= MAX_RECORD_KEY_BYTES:
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
                return None
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
        if not request.key.startswith(_SHA2_256):
            msg = "what is provided is not named by a SHA-256 multihash"
            raise KademliaError(msg)
        check_provider_key(request.key.removeprefix(_SHA2_256))
        for provider in request.providerPeers:
            if provider.id == peer.peer_id:
                self._host.learn(peer, parse_all(provider.addrs, MAX_ADDRESSES_PER_PEER))
                self._providers.add(request.key, peer, now)


class _Lookup:
    """Which peers a lookup has asked, is asking, and should ask next."""

    def __init__(self, target: int, peers: set[NodeId], avoided: set[NodeId]) -> None:
        self._target = target
        self._waiting = peers - avoided
        self._asking: set[NodeId] = set()
        self._answered: set[NodeId] = set()
        self._failed = avoided
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
