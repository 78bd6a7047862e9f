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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import cast

import trio

from aci_p2p.network.api import MAX_RECORD_BYTES, MAX_RECORD_KEY_BYTES, RecordSelector, RecordValidator
from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.checks import check_provider_key, check_record
from aci_p2p.network.libp2p.addresses import TcpAddress, parse_all
from aci_p2p.network.libp2p.connections import MAX_CONNECTIONS
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.kad_avoided import Avoided
from aci_p2p.network.libp2p.kad_lookup import Lookup
from aci_p2p.network.libp2p.kad_stores import ProviderStore, RecordStore
from aci_p2p.network.libp2p.kad_streams import QueryStreams
from aci_p2p.network.libp2p.kad_table import (
    BUCKET_SIZE,
    RoutingTable,
    closest,
    diverse,
    network_of,
    position,
    position_of,
)
from aci_p2p.network.libp2p.upstream import KademliaMessage as Message
from aci_p2p.network.libp2p.upstream import Record
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/aci/kad/1.0.0"
"""Stream protocol id: ACI's own DHT, apart from the public IPFS one."""
CONCURRENCY = 6
"""Queries of one lookup under way at once (Kademlia's alpha), on all its paths together."""
QUERY_SECONDS = 3.0
"""Time for one peer to answer, dialling it included, seconds."""
PATIENCE_SECONDS = 0.5
"""Once somebody has given what was looked for, how long to wait for others who may know better, seconds."""
LOOKUP_SECONDS = 12.0
"""Time for a whole lookup, seconds: four rounds of peers that do not answer."""
STORE_QUERY_SECONDS = 2.0
"""Time for one peer to answer when we store something, seconds: others will keep it, too. When for so long nobody has
answered a lookup before it, those who are still to be asked are most likely made up."""
STORE_LOOKUP_SECONDS = 6.0
"""Time for the whole lookup before storing, seconds: three rounds of peers that do not answer."""
MAX_STORED_KEYS = 512
"""Keys of ours of which is remembered who keeps them: 128 models, twice, and ourselves, and those of yesterday."""
ANSWERS_WANTED = 3
"""Answers with something in them after which a lookup ends: one stale or lying holder does not decide."""
PATHS_WANTED = 2
"""Paths of a lookup on which something must have been found before it ends early."""
REQUESTS_PER_SECOND = 50.0
"""Requests of one peer that are answered, on average; more of them wait."""
REQUEST_BURST = 200.0
"""Requests of one peer answered at once: it announces some dozens of models."""
MAX_DEBT_SECONDS = 2.0
"""A request that would wait longer resets its stream, seconds: less than honest peers wait for an answer."""
MAX_CHECKS = 32
"""Peers of which is asked whether they are still there, because others want their place in the routing table."""
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


class _Findings:
    """What a lookup has found so far, and on how many paths."""

    def __init__(self, wanted: int = 1) -> None:
        """`wanted`: things after which it is enough."""
        self._wanted = wanted
        self._named: dict[object, list[int]] = {}
        self._answers = 0
        self._paths: set[int] = set()

    def add(self, things: Iterable[object], path: int) -> None:
        """An answer on a path holds these things."""
        distinct = set(things)
        for thing in distinct:
            self._named.setdefault(thing, []).append(path)
        if distinct:
            self._answers += 1
            self._paths.add(path)

    def is_enough(self, paths: int) -> bool:
        """Whether a lookup on so many paths can end."""
        is_confirmed = self._answers >= ANSWERS_WANTED and len(self._paths) >= min(PATHS_WANTED, paths)
        return is_confirmed and len(self._named) >= self._wanted

    def __bool__(self) -> bool:
        return bool(self._named)

    def best_named(self) -> list[object]:
        """What was found, that first which most paths know, then that which most peers know."""
        return sorted(self._named, key=lambda thing: (-len(set(self._named[thing])), -len(self._named[thing])))


def _nothing(_peer: NodeId, _answer: Message) -> Sequence[object]:
    """What a lookup collects that only wants the closest peers."""
    return ()


class Kademlia:
    """Our node of the DHT."""

    def __init__(
        self, host: Host, validate: RecordValidator, select: RecordSelector, random: Random, *, may_dial: bool = True
    ) -> None:
        """`random` picks the keys that a refresh looks up; without `may_dial` only connected peers are asked."""
        self._host = host
        self._validate = validate
        self._select = select
        self._random = random
        self._may_dial = may_dial
        self._streams = QueryStreams(host, PROTOCOL, MAX_MESSAGE_BYTES)
        self._table = RoutingTable(host.node_id)
        self._records = RecordStore(position_of(host.node_id))
        self._providers = ProviderStore(position_of(host.node_id))
        self._avoided = Avoided()
        self._keepers: OrderedDict[bytes, tuple[NodeId, ...]] = OrderedDict()
        self._rates: OrderedDict[NodeId, TokenBucket] = OrderedDict()
        self._found_peer = trio.Event()
        self._doubted: dict[NodeId, None] = {}
        self._doubts = trio.Event()

    def add_peer(self, peer: NodeId) -> None:
        """A newly connected peer serves our protocol."""
        if not self._avoided.forgive(peer, trio.current_time()):
            return
        if self._table.add(peer, self._network_of(peer)):
            self._found_peer.set()
        elif (oldest := self._table.oldest_beside(peer)) is not None and len(self._doubted) < MAX_CHECKS:
            self._doubted[oldest] = None
            self._doubts.set()

    def move(self, peer: NodeId) -> None:
        """Another connection to a peer is better than the one before."""
        self._streams.drop(peer)

    def close_peers(self) -> list[NodeId]:
        """The peers in the routing table that are closest to us: connections to them are needed."""
        return self._table.closest(position_of(self._host.node_id), BUCKET_SIZE)

    def avoid(self, peer: NodeId) -> None:
        """Leave a peer out of lookups for a while: it does not answer or does not serve our protocol."""
        self._table.remove(peer)
        self._avoided.add(peer, trio.current_time())

    def _network_of(self, peer: NodeId) -> str | None:
        connection = self._host.connections.preferred(peer)
        return None if connection is None else network_of(connection.source)

    async def run(self) -> None:
        """Keep the routing table good, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            nursery.start_soon(self._check_doubted)
            nursery.start_soon(self._streams.run)

    async def _refresh(self) -> None:
        """Look around when new peers appear, and refresh the table now and then."""
        while True:
            with trio.move_on_after(REFRESH_SECONDS) as refresh:
                await self._found_peer.wait()
            await trio.sleep(SETTLE_SECONDS)
            self._found_peer = trio.Event()
            await self._lookup(self._host.node_id.peer_id, Message.FIND_NODE, _nothing, _Findings())
            if refresh.cancelled_caught:
                await self._lookup(self._random.randbytes(32), Message.FIND_NODE, _nothing, _Findings())
            await trio.sleep(JOIN_INTERVAL_SECONDS)

    async def _check_doubted(self) -> None:
        """Ask peers whose place is wanted whether they are still there; those that are not lose it."""
        while True:
            await self._doubts.wait()
            self._doubts = trio.Event()
            while self._doubted:
                peer = next(iter(self._doubted))
                # The host keeps an eye on those that are connected.
                if peer in self._host.peers:
                    self._table.heard_from(peer)
                else:
                    await self._ask(peer, Message(type=Message.PING))
                del self._doubted[peer]

    async def put_record(self, key: str, value: bytes) -> None:
        """See `Network.put_record`."""
        check_record(key, value)
        self._validate(key, value)
        self._records.put(key, value, trio.current_time())
        raw_key = key.encode()
        record = Record(key=raw_key, value=value)
        await self._store_at_closest(raw_key, Message(type=Message.PUT_VALUE, key=raw_key, record=record))

    async def get_record(self, key: str) -> bytes | None:
        """See `Network.get_record`."""
        check_record(key, b"")
        findings = _Findings()
        if (held := self._records.get(key, trio.current_time())) is not None and self._is_valid(key, held):
            findings.add((held,), 0)
        raw_key = key.encode()

        def collect(_peer: NodeId, answer: Message) -> Sequence[object]:
            value = answer.record.value
            return (value,) if value and answer.record.key == raw_key and self._is_valid(key, value) else ()

        await self._lookup(raw_key, Message.GET_VALUE, collect, findings)
        values = cast("list[bytes]", findings.best_named())
        return values[self._best(key, values)] if values else None

    async def provide(self, key: bytes) -> None:
        """See `Network.provide`."""
        check_provider_key(key)
        multihash = _SHA2_256 + key
        self._providers.add(multihash, self._host.node_id, None, trio.current_time())
        addresses = [address.to_bytes() for address in self._host.addresses]
        ourselves = Message.Peer(id=self._host.node_id.peer_id, addrs=addresses)
        announcement = Message(type=Message.ADD_PROVIDER, key=multihash, providerPeers=[ourselves])
        await self._store_at_closest(multihash, announcement)

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        """See `Network.find_providers`."""
        check_provider_key(key)
        multihash = _SHA2_256 + key
        findings = _Findings(limit)
        findings.add(self._providers.get(multihash, trio.current_time()), 0)

        def collect(peer: NodeId, answer: Message) -> Sequence[object]:
            return self._learn(peer, answer.providerPeers[:MAX_PROVIDERS_PER_ANSWER])

        await self._lookup(multihash, Message.GET_PROVIDERS, collect, findings)
        # One that makes providers up does not crowd out the others.
        return tuple(cast("list[NodeId]", findings.best_named())[:limit])

    async def _store_at_closest(self, key: bytes, message: Message) -> None:
        """Have the peers closest to a key keep what a message brings.

        Those that keep something of ours under that key are told first: what is taken back is so soon, whoever draws
        the lookup out.
        """
        avoided = self._avoided.peers(trio.current_time())
        before = [peer for peer in self._keepers.get(key, ()) if peer not in avoided and self._may_ask(peer)]
        told = await self._send_to(before, message)
        peers = await self._lookup(key, Message.FIND_NODE, _nothing, _Findings(), is_store=True)
        told += await self._send_to([peer for peer in peers if peer not in before], message)
        self._keepers[key] = tuple(closest(told, position(key), BUCKET_SIZE))
        self._keepers.move_to_end(key)
        if len(self._keepers) > MAX_STORED_KEYS:
            self._keepers.popitem(last=False)

    async def _send_to(self, peers: Iterable[NodeId], message: Message) -> list[NodeId]:
        """Send a message to all of the peers at once; those that confirm it in time."""
        confirmed: list[NodeId] = []

        async def send(peer: NodeId) -> None:
            if await self._ask(peer, message, STORE_QUERY_SECONDS) is not None:
                confirmed.append(peer)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(send, peer)
        return confirmed

    async def _lookup(
        self,
        key: bytes,
        kind: Message.MessageType,
        collect: Callable[[NodeId, Message], Sequence[object]],
        findings: _Findings,
        *,
        is_store: bool = False,
    ) -> list[NodeId]:
        """Ask ever closer peers about a key until the closest have all answered or what was found is enough.

        `collect` says what is in an answer; `is_store`: it is for storing, so there is less time. Returns the peers
        that answered, closest first, at most BUCKET_SIZE.
        """
        limit = trio.current_time() + (STORE_LOOKUP_SECONDS if is_store else LOOKUP_SECONDS)
        query_seconds = STORE_QUERY_SECONDS if is_store else QUERY_SECONDS
        lookup = self._begin_lookup(position(key))
        message = Message(type=kind, key=key)
        changed = trio.Event()

        async def work(path: int) -> None:
            nonlocal changed
            while True:
                peer = lookup.next_peer(path)
                if peer is None:
                    if lookup.is_over(path):
                        return
                    await changed.wait()
                    continue
                answer = await self._ask(peer, message, query_seconds)
                if answer is None:
                    lookup.failed(path, peer)
                else:
                    closer = self._learn(peer, answer.closerPeers[:BUCKET_SIZE])
                    lookup.answered(path, peer, [one for one in closer if one != self._host.node_id])
                    findings.add(collect(peer, answer), path)
                    if findings.is_enough(len(lookup.paths)):
                        scope.cancel()
                    elif findings:
                        scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE_SECONDS)
                    elif is_store:
                        scope.deadline = min(limit, trio.current_time() + STORE_QUERY_SECONDS)
                changed.set()
                changed = trio.Event()

        with trio.move_on_at(limit) as scope:
            async with trio.open_nursery() as nursery:
                for worker in range(CONCURRENCY if lookup.paths else 0):
                    nursery.start_soon(work, worker % len(lookup.paths))
        return lookup.closest_answered()

    def _begin_lookup(self, target: int) -> Lookup:
        avoided = self._avoided.peers(trio.current_time())
        known = self._table.closest(target, BUCKET_SIZE)
        # A peer that has connected just now may not have told yet that it belongs in the table.
        others = [
            (peer, self._network_of(peer)) for peer in self._host.peers if peer not in known and peer not in avoided
        ]
        known += diverse(others, BUCKET_SIZE - len(known))
        return Lookup(target, filter(self._may_ask, known), avoided)

    def _may_ask(self, peer: NodeId) -> bool:
        return self._may_dial or peer in self._host.peers

    async def _ask(self, peer: NodeId, message: Message, seconds: float = QUERY_SECONDS) -> Message | None:
        """One request and its answer; None when the peer does not answer well in time."""
        requests = [message]
        if message.type == Message.ADD_PROVIDER:
            # It has no answer of its own; that to a ping behind it says that it was read.
            requests.append(Message(type=Message.PING))
        try:
            with trio.fail_after(seconds):
                answer = await self._streams.ask(peer, requests)
        except Exception:  # whatever is wrong with one peer, the lookup goes on with the others
            log.debug("%s did not answer a DHT query", peer.short, exc_info=True)
            self._table.remove(peer)
            if peer in self._host.peers:
                self._avoided.failed(peer, trio.current_time())
            else:
                self._avoided.add(peer, trio.current_time())
            return None
        self._table.heard_from(peer)
        if (connection := self._host.connections.preferred(peer)) is not None:
            connection.used = trio.current_time()
        return answer if answer.type == requests[-1].type else None

    def _learn(self, teller: NodeId, peers: Iterable[Message.Peer]) -> list[NodeId]:
        """Remember where the peers in an answer can be dialled; those that make no sense are skipped."""
        learnt: list[NodeId] = []
        for peer in peers:
            try:
                node_id = NodeId.from_peer_id(peer.id)
            except LocalError:
                continue
            if node_id != self._host.node_id and self._may_dial:
                self._host.learn(node_id, self._dialable(teller, peer), hearsay=True)
            if node_id == self._host.node_id or self._may_ask(node_id):
                learnt.append(node_id)
        return learnt

    def _dialable(self, teller: NodeId, peer: Message.Peer) -> list[TcpAddress]:
        return self._host.believed(parse_all(peer.addrs, MAX_ADDRESSES_PER_PEER), teller)

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
                await self._take_turn(peer)
                answer = self._answer(peer, request)
                if answer is not None:
                    await stream.write(prefixed(answer.SerializeToString()))

    async def _take_turn(self, peer: NodeId) -> None:
        """Wait until a peer that asks more than its share may be answered; raises KademliaError if that is too long."""
        now = trio.current_time()
        bucket = self._rates.get(peer) or TokenBucket.full(REQUESTS_PER_SECOND, REQUEST_BURST, now)
        self._rates[peer] = bucket
        self._rates.move_to_end(peer)
        if len(self._rates) > MAX_CONNECTIONS:
            self._rates.popitem(last=False)
        bucket.refill(now)
        if bucket.level < -MAX_DEBT_SECONDS * REQUESTS_PER_SECOND:
            msg = "too many requests"
            raise KademliaError(msg)
        bucket.level -= 1
        self._table.heard_from(peer)
        await trio.sleep(max(0.0, -bucket.level / REQUESTS_PER_SECOND))

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
                # What is kept comes back: whoever has an older one learns of it.
                answer.record.CopyFrom(Record(key=request.key, value=self._store(request, now)))
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

    def _store(self, request: Message, now: float) -> bytes:
        """Keep a value unless we have a newer one; the newer of both."""
        value = request.record.value
        key = request.key.decode()
        check_record(key, value)
        if request.record.key != request.key or not self._is_valid(key, value):
            msg = "the record is refused"
            raise KademliaError(msg)
        held = self._records.get(key, now)
        # Storing the same value again prolongs it.
        if held is not None and held != value and self._best(key, (held, value)) == 0:
            return held
        self._records.put(key, value, now)
        return value

    def _add_provider(self, peer: NodeId, request: Message, now: float) -> None:
        if not request.key.startswith(_SHA2_256):
            msg = "what is provided is not named by a SHA-256 multihash"
            raise KademliaError(msg)
        check_provider_key(request.key.removeprefix(_SHA2_256))
        for provider in request.providerPeers:
            if provider.id == peer.peer_id:
                self._host.learn(peer, self._dialable(peer, provider))
                self._providers.add(request.key, peer, self._network_of(peer), now)
