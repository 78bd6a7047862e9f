"""Attacks by gossip and through the DHT: floods, forged records, clocks that are off."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from aci_p2p.clock import system_clock
from aci_p2p.network import PeerUnreachable
from aci_p2p.network.libp2p import gossip, kademlia
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.upstream import RPC, Record
from aci_p2p.network.libp2p.upstream import GossipsubMessage as GossipMessage
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.envelope import Sealer, open_envelope
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.publications import CapabilityRecord
from tests.scenarios.attackers import DISCONNECT_S, Arena, Attack, at_once, peer_of
from tests.scenarios.honest_node import NETWORK
from tests.scenarios.messages import MODEL_ROOT, make_offer

OFFERS_TOPIC: Final = f"/aci/{NETWORK}/offers/{MODEL_ROOT.hex()}/1"
"""Where the swarm's offers go."""
FLOODERS: Final = 2
"""Flooding attackers: every fifth peer of a swarm of ten."""
FLOOD_INTERVAL_S: Final = 0.01
"""Between two messages of one flooder, seconds: together ten times what all honest nodes publish."""
HOUR_MS: Final = 3_600_000

Author = Callable[[KeyPair, int], bytes]
"""Makes a flooder's message from its key and the message's number."""


def publication(data: bytes, **fields: bytes) -> bytes:
    """An RPC with one message for the offers' topic."""
    message = GossipMessage(topicIDs=[OFFERS_TOPIC], data=data, **fields)
    return prefixed(RPC(publish=[message]).SerializeToString())


INVALID_MESSAGES: Final[tuple[Callable[[int], bytes], ...]] = (
    lambda number: publication(b"with an author %d" % number, from_id=b"\x12\x20" + bytes(32), seqno=b"1"),
    lambda number: publication(b"with a bad key %d" % number, signature=b"s" * 64, key=b"\xff\xff\xff"),
    lambda number: publication(b"no offer %d" % number),
    lambda number: publication(b"%20000d" % number),
)
"""Another one each time: the same again would be known already."""


def forged(key: KeyPair, number: int) -> bytes:
    """An offer that looks well but is not signed by whom it names."""
    data = bytearray(make_offer(Sealer(key, NETWORK), system_clock(), b"%d" % number).data)
    data[-1] ^= 1
    return bytes(data)


def signed(key: KeyPair, number: int) -> bytes:
    """A good offer of the flooder's own."""
    return make_offer(Sealer(key, NETWORK), system_clock() + number % 50, b"%d" % number).data


def signed_by_many(key: KeyPair, number: int) -> bytes:
    """A good offer, of another consumer each time."""
    author = KeyPair(hashlib.sha256(key.seed + b"%d" % number).digest())
    return make_offer(Sealer(author, NETWORK), system_clock(), b"%d" % number).data


def an_hour_late(key: KeyPair, number: int) -> bytes:
    """A good offer by a clock that is an hour slow."""
    return make_offer(Sealer(key, NETWORK), system_clock() - HOUR_MS + number, b"%d" % number).data


def an_hour_early(key: KeyPair, number: int) -> bytes:
    """A good offer by a clock that is an hour fast."""
    return make_offer(Sealer(key, NETWORK), system_clock() + HOUR_MS + number, b"%d" % number).data


def flood(author: Author, *, seconds: float | None = None) -> Attack:
    """Flooders publish to all nodes: for so many `seconds`, else until all have disconnected them."""

    async def attack(arena: Arena) -> None:
        async def one(_number: int, key: KeyPair) -> None:
            async with neighbour_of_all(arena, key) as neighbour:
                sent = 0
                with trio.move_on_after(seconds) if seconds else trio.fail_after(DISCONNECT_S):
                    while neighbour.host.peers:
                        await neighbour.send(publication(author(key, sent)))
                        sent += 1
                        await trio.sleep(FLOOD_INTERVAL_S)

        await at_once(one, [arena.key(number) for number in range(FLOODERS)])

    return attack


class Neighbour:
    """A peer with a gossip stream to each node, on which it says what it likes."""

    def __init__(self, host: Host, streams: dict[NodeId, YamuxStream]) -> None:
        self.host = host
        self._streams = streams

    async def send(self, data: bytes) -> None:
        """Send the same to all that still hear us."""
        for stream in self._streams.values():
            with suppress(StreamReset):
                await stream.write(data)


@asynccontextmanager
async def neighbour_of_all(arena: Arena, key: KeyPair) -> AsyncGenerator[Neighbour]:
    """A peer that is connected to all nodes and subscribed to their offers."""

    async def drain(_peer: NodeId, stream: YamuxStream) -> None:
        with suppress(StreamReset, EndOfStream):
            while True:
                await stream.read(1 << 16)

    hello = RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=OFFERS_TOPIC)])
    async with peer_of(arena.targets, key) as host:
        with host.serve(gossip.PROTOCOL, drain):
            streams = {
                target.node_id: await host.open_stream(target.node_id, gossip.PROTOCOL) for target in arena.targets
            }
            neighbour = Neighbour(host, streams)
            await neighbour.send(prefixed(hello.SerializeToString()))
            yield neighbour


async def lost_in_the_middle(arena: Arena) -> None:
    """Peers that vanish in the middle of a gossip message."""
    for number, target in enumerate(arena.some(5)):
        async with peer_of([target], arena.key(number)) as host:
            stream = await host.open_stream(target.node_id, gossip.PROTOCOL)
            await stream.write(publication(b"x" * 1000)[:500])


async def record_forgery(arena: Arena) -> None:
    """Records of a provider forged, aged and signed by others, stored at all nodes and given to those who ask."""
    root = hashlib.sha256(arena.name.encode()).digest()
    key, older = await arena.ask(0, "announce", root=root.hex())
    _, newest = await arena.ask(0, "announce", root=root.hex())
    older, newest = bytes.fromhex(older), bytes.fromhex(newest)
    attacker = arena.key(0)
    body = open_envelope(newest, CapabilityRecord, network=NETWORK, now=None).body
    own = Sealer(attacker, NETWORK).seal(body, system_clock() + 1).data
    lies = [older, newest[:-1] + bytes([newest[-1] ^ 1]), own]

    async def answer_falsely(_peer: NodeId, stream: YamuxStream) -> None:
        with suppress(StreamReset, EndOfStream):
            for number in range(100):
                request = KadMessage.FromString((await stream.read(4096))[1:])
                record = Record(key=request.key, value=lies[number % len(lies)])
                answer = KadMessage(type=request.type, key=request.key, record=record)
                await stream.write(prefixed(answer.SerializeToString()))

    async with neighbour_of_all(arena, attacker) as neighbour:
        with neighbour.host.serve(kademlia.PROTOCOL, answer_falsely):
            for target in arena.targets:
                for lie in lies:
                    await _store(neighbour.host, target.node_id, key, lie)
            found = {await arena.ask(number, "get", key=key) for number in range(len(arena.targets))}
    assert found == {newest.hex()}


async def record_flood(arena: Arena) -> None:
    """Forged records stored again and again, until the attacker is disconnected."""
    (target,) = arena.some(1)
    lie = Sealer(arena.key(1), NETWORK)
    key = "/aci/capability/x"
    async with peer_of([target], arena.key(0)) as host:
        with trio.fail_after(DISCONNECT_S):
            while host.peers:
                await _store(host, target.node_id, key, lie.node_id.public_key)


async def _store(host: Host, peer: NodeId, key: str, value: bytes) -> None:
    """Ask a node to store a record; it may refuse."""
    raw = key.encode()
    message = KadMessage(type=KadMessage.PUT_VALUE, key=raw, record=Record(key=raw, value=value))
    with trio.move_on_after(1), suppress(PeerUnreachable, StreamReset, EndOfStream):
        stream = await host.open_stream(peer, kademlia.PROTOCOL)
        try:
            await stream.write(prefixed(message.SerializeToString()))
            await stream.read(1 << 16)
        finally:
            stream.reset()
