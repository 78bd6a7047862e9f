"""Storing in the DHT among peers that lie or are silent: kademlia nodes without a wire, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network.libp2p import kad_avoided, kademlia
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.kad_avoided import Avoided
from aci_p2p.network.libp2p.kad_streams import KEEP_SECONDS
from aci_p2p.network.libp2p.kad_table import closest, position
from aci_p2p.network.libp2p.kademlia import Kademlia
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import StreamReset
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.driver import STRANGER, make_key, select_record, validate_record

ROUND_TRIP_SECONDS = 0.05
MODEL = bytes(32)
KEYS = [f"/aci/test/{number}" for number in range(8)]

Answer = Callable[[NodeId, KadMessage], KadMessage | None]
"""What a peer says to a request; None: nothing, for ever."""


class Wire:
    """Everybody, each with all others as its connected peers; who is not known here takes no connection."""

    def __init__(self, honest: int) -> None:
        self.answers: dict[NodeId, Answer] = {}
        self.open_streams = 0
        self.nodes = [self.open_node(number) for number in range(1, honest + 1)]
        for node in self.nodes:
            self.answers[node._host.node_id] = node._answer

    def open_node(self, number: int) -> Kademlia:
        return Kademlia(cast("Host", WiredHost(self, number)), validate_record, select_record, Random(number))  # noqa: S311

    def holders(self, key: str) -> list[bytes | None]:
        """What all nodes but the first keep."""
        return [node._records.get(key, trio.current_time()) for node in self.nodes[1:]]


class WiredHost:
    """As much of a host as a DHT node needs."""

    addresses = (TcpAddress("ip4", "192.0.2.1", 4001),)
    connections = SimpleNamespace(preferred=dict[NodeId, Connection]().get)

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire = wire
        self.node_id = make_key(number).node_id

    @property
    def peers(self) -> Sequence[NodeId]:
        return [peer for peer in self.wire.answers if peer != self.node_id]

    def known(self, _peer: NodeId) -> Sequence[TcpAddress]:
        return self.addresses

    def usable_by(self, _peer: NodeId, addresses: Sequence[TcpAddress]) -> Sequence[TcpAddress]:
        return addresses

    def believed(self, addresses: Sequence[TcpAddress], _teller: NodeId) -> Sequence[TcpAddress]:
        return addresses

    def learn(self, *_args: object, **_kwargs: object) -> None:
        """Everybody is known."""

    async def open_stream(self, peer: NodeId, _protocol: str, *, eager: bool) -> WiredStream:
        if peer not in self.wire.answers:
            await trio.sleep_forever()
        return WiredStream(self.wire, self.node_id, peer)


class WiredStream:
    """Carries requests to a peer, and its answers back."""

    def __init__(self, wire: Wire, asker: NodeId, peer: NodeId) -> None:
        self._wire = wire
        self._asker = asker
        self._peer = peer
        self._received = b""
        wire.open_streams += 1

    async def write(self, data: bytes) -> None:
        await trio.sleep(ROUND_TRIP_SECONDS)
        if (answer_to := self._wire.answers.get(self._peer)) is None:
            raise StreamReset
        while data:
            length, start = (data[0], 1) if data[0] < 0x80 else (data[0] - 0x80 + (data[1] << 7), 2)
            request, data = KadMessage.FromString(data[start : start + length]), data[start + length :]
            if (answer := answer_to(self._asker, request)) is not None:
                self._received += prefixed(answer.SerializeToString())

    async def read_exactly(self, count: int) -> bytes:
        if not self._received:
            await trio.sleep_forever()
        data, self._received = self._received[:count], self._received[count:]
        return data

    def close(self) -> None:
        self._wire.open_streams -= 1


class Inventor:
    """Names three others in each answer, nearer to a key than all before, and none of them exists."""

    def __init__(self, key: str = KEYS[0]) -> None:
        crowd = [NodeId(number.to_bytes(32)) for number in range(1, 1000)]
        self._names = closest(crowd, position(key.encode()), 300)

    def __call__(self, _asker: NodeId, request: KadMessage) -> KadMessage:
        names = [self._names.pop() for _ in range(3)]
        closer = [KadMessage.Peer(id=name.peer_id, addrs=[WiredHost.addresses[0].to_bytes()]) for name in names]
        return KadMessage(type=request.type, key=request.key, closerPeers=closer)


def keep_nothing(_asker: NodeId, request: KadMessage) -> KadMessage | None:
    """Answer lookups well, and what is to be kept not at all."""
    if request.type != KadMessage.FIND_NODE:
        return None
    return KadMessage(type=request.type, key=request.key)


async def test_who_names_others_that_do_not_exist_delays_a_store_by_one_silence(autojump_clock: MockClock) -> None:
    wire = Wire(6)
    wire.answers[STRANGER] = Inventor()
    await wire.nodes[0].put_record(KEYS[0], b"value")
    assert trio.current_time() <= kademlia.STORE_QUERY_SECONDS + 5 * ROUND_TRIP_SECONDS
    assert wire.holders(KEYS[0]) == [b"value"] * 5
    begun = trio.current_time()
    await wire.nodes[0].provide(MODEL)
    assert trio.current_time() - begun <= kademlia.STORE_QUERY_SECONDS + 5 * ROUND_TRIP_SECONDS


async def test_who_goes_on_answering_a_lookup_does_not_draw_it_out_for_ever(autojump_clock: MockClock) -> None:
    """All that the inventor names exist and name others in turn, each after a while."""
    wire = Wire(6)
    invent = Inventor()

    def answer(asker: NodeId, request: KadMessage) -> KadMessage:
        said = invent(asker, request)
        wire.answers.update({NodeId.from_peer_id(peer.id): answer for peer in said.closerPeers})
        return said

    wire.answers[STRANGER] = answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.network.test_kad_storing.ROUND_TRIP_SECONDS", 1.0)
        await wire.nodes[0].put_record(KEYS[0], b"value")
    assert trio.current_time() <= 8


async def test_what_is_taken_back_is_told_to_its_keepers_at_once(autojump_clock: MockClock) -> None:
    """Within the second that leaving takes, whoever draws out the lookup before."""
    wire = Wire(6)
    for key in KEYS:
        await wire.nodes[0].put_record(key, b"1")
    wire.answers[STRANGER] = Inventor()
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            for key in KEYS:
                nursery.start_soon(wire.nodes[0].put_record, key, b"2")
    assert [wire.holders(key) for key in KEYS] == [[b"2"] * 5] * len(KEYS)


async def test_who_never_keeps_anything_is_no_longer_asked(autojump_clock: MockClock) -> None:
    wire = Wire(6)
    wire.answers[STRANGER] = keep_nothing
    node = wire.nodes[0]
    times: list[float] = []
    for number in range(6):
        begun = trio.current_time()
        await node.put_record(f"/aci/test/{number}", b"value")
        times.append(trio.current_time() - begun)
        # It says hello again and again.
        await trio.sleep(kad_avoided.AVOID_SECONDS)
        node.add_peer(STRANGER)
    assert max(times[:4]) <= kademlia.STORE_QUERY_SECONDS + 5 * ROUND_TRIP_SECONDS
    assert max(times[4:]) <= 5 * ROUND_TRIP_SECONDS
    assert STRANGER not in node._table


async def test_the_keys_whose_keepers_are_known_are_bounded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kademlia, "MAX_STORED_KEYS", 3)
    wire = Wire(2)
    for key in KEYS:
        await wire.nodes[0].put_record(key, b"value")
    assert list(wire.nodes[0]._keepers) == [key.encode() for key in KEYS[-3:]]
    assert wire.nodes[0]._keepers[KEYS[-1].encode()] == (wire.nodes[1]._host.node_id,)


async def test_who_keeps_no_more_is_replaced(autojump_clock: MockClock) -> None:
    wire = Wire(3)
    node, second, third = wire.nodes
    await node.put_record(KEYS[0], b"1")
    del wire.answers[second._host.node_id]
    await node.put_record(KEYS[0], b"2")
    assert node._keepers[KEYS[0].encode()] == (third._host.node_id,)


async def test_streams_are_used_again_and_closed_in_the_end(autojump_clock: MockClock) -> None:
    wire = Wire(4)
    async with open_background() as tasks:
        tasks.start_soon(wire.nodes[0].run)
        for key in KEYS:
            await wire.nodes[0].put_record(key, b"value")
        assert wire.open_streams == 3
        await trio.sleep(KEEP_SECONDS + 1)
        assert wire.open_streams == 0


async def test_an_answer_to_something_else_is_none(autojump_clock: MockClock) -> None:
    wire = Wire(1)
    wire.answers[STRANGER] = lambda _asker, request: KadMessage(type=KadMessage.PING, key=request.key)
    assert await wire.nodes[0]._ask(STRANGER, KadMessage(type=KadMessage.PING), 1.0) is not None
    assert await wire.nodes[0]._ask(STRANGER, KadMessage(type=KadMessage.GET_VALUE, key=b"key"), 1.0) is None


def test_failures_at_one_time_are_one_failure() -> None:
    avoided = Avoided()
    for _ in range(100):
        avoided.failed(STRANGER, 0.0)
    assert avoided.peers(0.0) == {STRANGER}
    assert avoided.forgive(STRANGER, 1.0)
    assert avoided.peers(1.0) == set()


def test_who_fails_again_and_again_is_left_out_for_long() -> None:
    avoided = Avoided()
    for _ in range(int(kad_avoided.FAILURES_FORGIVEN)):
        avoided.failed(STRANGER, 0.0)
        assert avoided.forgive(STRANGER, 0.0)
    avoided.failed(STRANGER, 0.0)
    assert not avoided.forgive(STRANGER, 0.0)
    assert avoided.peers(kad_avoided.LONG_AVOID_SECONDS - 1) == {STRANGER}
    assert avoided.forgive(STRANGER, kad_avoided.LONG_AVOID_SECONDS)


def test_who_cannot_be_reached_may_come_back() -> None:
    avoided = Avoided()
    for _ in range(100):
        avoided.add(STRANGER, 0.0)
        assert avoided.peers(kad_avoided.AVOID_SECONDS - 1) == {STRANGER}
        assert avoided.peers(kad_avoided.AVOID_SECONDS) == set()
        assert avoided.forgive(STRANGER, 1.0)


def test_who_is_avoided_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kad_avoided, "MAX_KNOWN_PEERS", 3)
    avoided = Avoided()
    peers = [NodeId(number.to_bytes(32)) for number in range(9)]
    for peer in peers:
        avoided.failed(peer, 0.0)
    assert avoided.peers(0.0) == set(peers[-3:])
    assert len(avoided._patience) == 3


async def test_unreachable_peers_are_asked_again_when_they_connect_anew(autojump_clock: MockClock) -> None:
    wire = Wire(2)
    node = wire.nodes[0]
    gone = wire.nodes[1]._host.node_id
    answer = wire.answers.pop(gone)
    for _ in range(6):
        assert await node._ask(gone, KadMessage(type=KadMessage.PING), 1.0) is None
        node.add_peer(gone)
    wire.answers[gone] = answer
    node.add_peer(gone)
    await node.put_record(KEYS[0], b"value")
    assert wire.holders(KEYS[0]) == [b"value"]
