"""The DHT node over libp2p: who is asked, what is stored, how much is answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network import Network, PeerUnreachable
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import kad_table, kademlia, open_libp2p_network
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.kademlia import Kademlia, KademliaError
from aci_p2p.network.libp2p.network import Libp2pNetwork
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.upstream import Record
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.attack import Victim
from tests.network.driver import STRANGER, Opener, eventually, make_key, select_record, validate_record

KEY = "/aci/node/test"
MODEL = bytes(32)


async def ask(host: Host, peer: NodeId, *messages: KadMessage) -> list[KadMessage]:
    """The answers to requests on one stream."""
    stream = await host.open_stream(peer, kademlia.PROTOCOL)
    answers: list[KadMessage] = []
    for message in messages:
        await stream.write(prefixed(message.SerializeToString()))
        answers.append(KadMessage.FromString(await read_prefixed(stream, 1 << 18)))
    stream.close()
    return answers


def put(value: bytes) -> KadMessage:
    return KadMessage(type=KadMessage.PUT_VALUE, key=KEY.encode(), record=Record(key=KEY.encode(), value=value))


async def test_a_rollback_is_answered_with_what_is_newer(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        answers = await ask(attacker, victim.node_id, put(b"version 2"), put(b"version 1"), put(b"version 3"))
        assert [answer.record.value for answer in answers] == [b"version 2", b"version 2", b"version 3"]
        assert await victim.network.get_record(KEY) == b"version 3"


async def test_a_record_that_has_been_kept_too_long_is_not_given(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aci_p2p.network.libp2p.kad_stores.RECORD_SECONDS", 0.05)
    async with victim.attacked_by_host() as attacker:
        await ask(attacker, victim.node_id, put(b"version 1"))
        await trio.sleep(0.1)
        (answer,) = await ask(attacker, victim.node_id, KadMessage(type=KadMessage.GET_VALUE, key=KEY.encode()))
        assert answer.record.value == b""


class SilentHost:
    """As much of a host as a DHT node needs that is only asked."""

    node_id = make_key(1).node_id
    peers: Sequence[NodeId] = ()


async def test_who_asks_too_much_waits_and_then_is_refused(autojump_clock: MockClock) -> None:
    node = Kademlia(SilentHost(), validate_record, select_record, None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    start = trio.current_time()
    for _ in range(int(kademlia.REQUEST_BURST)):
        await node._take_turn(STRANGER)
    assert trio.current_time() == start
    for _ in range(100):
        await node._take_turn(STRANGER)
    assert trio.current_time() - start == pytest.approx(100 / kademlia.REQUESTS_PER_SECOND)
    # Others are answered meanwhile.
    middle = trio.current_time()
    await node._take_turn(make_key(7).node_id)
    assert trio.current_time() == middle

    refused = 0

    async def hurry() -> None:
        nonlocal refused
        try:
            await node._take_turn(STRANGER)
        except KademliaError:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(hurry)
    waited = trio.current_time() - middle
    assert waited <= kademlia.MAX_DEBT_SECONDS + 1
    assert refused >= 500 - kademlia.REQUESTS_PER_SECOND * (kademlia.MAX_DEBT_SECONDS + 1)


async def test_the_rates_of_peers_are_bounded(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kademlia, "MAX_CONNECTIONS", 3)
    node = Kademlia(SilentHost(), validate_record, select_record, None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    for number in range(2, 9):
        await node._take_turn(make_key(number).node_id)
    assert list(node._rates) == [make_key(number).node_id for number in (6, 7, 8)]


@asynccontextmanager
async def open_named_only(number: int) -> AsyncGenerator[Network]:
    config = NetworkConfig(named_only=True)
    async with open_libp2p_network(
        make_key(number), config, record_validator=validate_record, record_selector=select_record
    ) as network:
        yield network


async def test_a_node_that_dials_only_whom_it_is_told(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b, open_named_only(9) as careful:
        await b.connect(a.addresses[0])
        await careful.connect(a.addresses[0])
        await b.put_record(KEY, b"value")
        await b.provide(MODEL)
        # It asks those it is connected to, and hears of others,
        assert await careful.get_record(KEY) == b"value"
        await careful.find_providers(MODEL, 10)
        careful.learn_addresses(b.node_id, b.addresses)
        # but never dials them, whoever of them may dial it.
        for address in (f"/p2p/{b.node_id}", f"/p2p/{STRANGER}"):
            with suppress(PeerUnreachable):
                await careful.connect(address)
        assert isinstance(careful, Libp2pNetwork)
        assert careful._host.known(b.node_id) == ()
        outbound = {connection.peer for connection in careful.connections() if connection.outbound}
        assert outbound == {a.node_id}
        # Whom it was told of it may dial again.
        assert await careful.connect(f"/p2p/{a.node_id}") == a.node_id
        assert await careful.connect(b.addresses[0]) == b.node_id


async def test_a_peer_is_dialled_wherever_it_is_known_to_be(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        with pytest.raises(PeerUnreachable):
            await a.connect(f"/p2p/{b.node_id}")
        a.learn_addresses(b.node_id, b.addresses)
        assert await a.connect(f"/p2p/{b.node_id}") == b.node_id
        assert await a.connect(f"/p2p/{b.node_id}") == b.node_id
        assert list(a.peers) == [b.node_id]


async def test_a_silent_peer_loses_its_place_to_one_that_wants_it(
    open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kad_table, "BUCKET_SIZE", 1)
    async with open_libp2p(1) as a:
        assert isinstance(a, Libp2pNetwork)
        table = a._kademlia._table
        bits = [
            (kad_table.position_of(make_key(number).node_id) ^ kad_table.position_of(a.node_id)).bit_length()
            for number in range(200)
        ]
        first, second = [number for number in range(2, 200) if bits[number] == 256][:2]
        async with open_libp2p(first) as b:
            await b.connect(a.addresses[0])
            await eventually(lambda: b.node_id in table)
        await eventually(lambda: not a.peers)
        async with open_libp2p(second) as c:
            await c.connect(a.addresses[0])
            await eventually(lambda: c.node_id in table)
            assert b.node_id not in table


async def test_liars_in_the_table_do_not_hide_a_record(open_libp2p: Opener) -> None:
    """Five nodes that answer everything with each other and nothing else; a lookup goes around them."""

    async def lie(_peer: NodeId, stream: YamuxStream) -> None:
        while True:
            request = KadMessage.FromString(await read_prefixed(stream, 1 << 18))
            answer = KadMessage(type=request.type, key=request.key)
            for liar in liars:
                peer = answer.closerPeers.add()
                peer.id = liar.node_id.peer_id
                peer.addrs.extend(address.to_bytes() for address in liar.addresses)
            await stream.write(prefixed(answer.SerializeToString()))

    async with open_background() as nursery, AsyncExitStack() as stack:
        honest = [await stack.enter_async_context(open_libp2p(number)) for number in range(1, 5)]
        consumer = honest[0]
        liars = [Host(make_key(number), nursery) for number in range(50, 55)]
        for liar in liars:
            stack.enter_context(liar.serve(kademlia.PROTOCOL, lie))
            await liar.dial(consumer.node_id, (TcpAddress.parse(consumer.addresses[0]),))
        for one in honest[1:]:
            await one.connect(consumer.addresses[0])
        await honest[3].put_record(KEY, b"value")
        await honest[3].provide(MODEL)
        with trio.fail_after(5):
            assert await consumer.get_record(KEY) == b"value"
            assert honest[3].node_id in await consumer.find_providers(MODEL, 10)
