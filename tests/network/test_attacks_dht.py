"""Attacks on the DHT: bad requests reset their stream, bad answers do not stop a lookup."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable

import pytest
import trio

from aci_p2p.network.libp2p import identify, kademlia
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.network import Libp2pNetwork
from aci_p2p.network.libp2p.upstream import Identify as Identity
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.upstream import Record
from aci_p2p.network.libp2p.varint import encode_varint, prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.tasks import open_background
from tests.network.attack import ATTACKER, Victim, noise, until_ended
from tests.network.driver import STRANGER, Opener, eventually, make_key

KAD_GARBAGE = {
    "bad protobuf": prefixed(b"\xff" * 60),
    "bad varint": b"\xff" * 20,
    "random": b"\x05" + noise(300),
    "empty": prefixed(b""),
    "huge": encode_varint(1 << 40),
    "no key": prefixed(KadMessage(type=KadMessage.GET_VALUE).SerializeToString()),
    "long key": prefixed(KadMessage(type=KadMessage.FIND_NODE, key=bytes(1000)).SerializeToString()),
    "key that is not text": prefixed(
        KadMessage(
            type=KadMessage.PUT_VALUE, key=b"\xff\xfe", record=Record(key=b"\xff\xfe", value=b"v")
        ).SerializeToString()
    ),
    "record under another key": prefixed(
        KadMessage(
            type=KadMessage.PUT_VALUE, key=b"/aci/a", record=Record(key=b"/aci/b", value=b"v")
        ).SerializeToString()
    ),
    "record outside the namespace": prefixed(
        KadMessage(
            type=KadMessage.PUT_VALUE, key=b"/ipns/a", record=Record(key=b"/ipns/a", value=b"v")
        ).SerializeToString()
    ),
    "record too large": prefixed(
        KadMessage(
            type=KadMessage.PUT_VALUE, key=b"/aci/a", record=Record(key=b"/aci/a", value=bytes(5000))
        ).SerializeToString()
    ),
    "bad record": prefixed(
        KadMessage(
            type=KadMessage.PUT_VALUE, key=b"/aci/a", record=Record(key=b"/aci/a", value=b"bad")
        ).SerializeToString()
    ),
    "short provider key": prefixed(KadMessage(type=KadMessage.ADD_PROVIDER, key=b"\x12\x20k").SerializeToString()),
    "no multihash": prefixed(KadMessage(type=KadMessage.ADD_PROVIDER, key=bytes(34)).SerializeToString()),
}
MULTIHASH = b"\x12\x20" + bytes(32)
PING = prefixed(KadMessage(type=KadMessage.PING).SerializeToString())


@pytest.mark.parametrize("data", KAD_GARBAGE.values(), ids=KAD_GARBAGE)
async def test_bad_dht_request_resets_its_stream(victim: Victim, data: bytes) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, kademlia.PROTOCOL)
        await stream.write(data)
        await until_ended(stream)
    assert await victim.network.get_record("/aci/a") is None


async def test_nobody_provides_in_anothers_name(victim: Victim) -> None:
    stranger = KadMessage.Peer(id=STRANGER.peer_id)
    claim = KadMessage(type=KadMessage.ADD_PROVIDER, key=MULTIHASH, providerPeers=[stranger])
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, kademlia.PROTOCOL)
        await stream.write(prefixed(claim.SerializeToString()) + PING)
        assert await stream.read(1000) == PING
        assert list(await victim.network.find_providers(bytes(32), 10)) == []


def poisoned(request_type: KadMessage.MessageType) -> KadMessage:
    """An answer full of peers that do not exist and addresses that lead nowhere."""
    peers = [KadMessage.Peer(id=noise(38), addrs=[noise(8), b""]) for _ in range(100)]
    peers += [
        KadMessage.Peer(
            id=KeyPair(noise(32)).node_id.peer_id, addrs=[TcpAddress("ip4", "127.0.0.1", 1).to_bytes()] * 20
        )
        for _ in range(10)
    ]
    record = Record(key=b"/aci/test/y", value=b"bad")
    return KadMessage(type=request_type, key=b"k", record=record, closerPeers=peers, providerPeers=peers)


KAD_ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "bad protobuf": lambda _: prefixed(b"\xff" * 60),
    "bad varint": lambda _: b"\xff" * 20,
    "huge": lambda _: encode_varint(1 << 40),
    "other type": lambda _: prefixed(KadMessage(type=KadMessage.PING, key=b"k").SerializeToString()),
    "poison": lambda raw: prefixed(poisoned(KadMessage.FromString(raw).type).SerializeToString()),
    "nothing": lambda _: b"",
}


async def test_longest_answer_is_read(victim: Victim, open_libp2p: Opener) -> None:
    names = [TcpAddress("dns", f"{number:03}.{'x' * 240}.invalid", 1).to_bytes() for number in range(8)]
    async with open_libp2p(4) as honest:
        for number in range(100, 140):
            async with open_background() as nursery:
                provider = Host(make_key(number), nursery)
                await provider.dial(victim.network.node_id, (TcpAddress.parse(victim.address),))
                stream = await provider.open_stream(victim.network.node_id, kademlia.PROTOCOL)
                ourselves = KadMessage.Peer(id=provider.node_id.peer_id, addrs=names)
                claim = KadMessage(type=KadMessage.ADD_PROVIDER, key=MULTIHASH, providerPeers=[ourselves])
                await stream.write(prefixed(claim.SerializeToString()) + PING)
                await stream.read(1000)
        await honest.connect(victim.address)
        assert len(await honest.find_providers(bytes(32), 100)) == 40


@pytest.mark.parametrize("answer", KAD_ANSWERS.values(), ids=KAD_ANSWERS)
async def test_bad_dht_answers_do_not_stop_a_lookup(
    victim: Victim, open_libp2p: Opener, answer: Callable[[bytes], bytes]
) -> None:
    async def misbehave(_peer: NodeId, stream: YamuxStream) -> None:
        raw = await stream.read(4096)
        await stream.write(answer(raw[1:]))

    async with victim.attacked_by_host() as attacker, open_libp2p(4) as honest:
        with attacker.serve(kademlia.PROTOCOL, misbehave):
            await honest.connect(victim.address)
            await honest.put_record("/aci/test/y", b"a value")
            await honest.provide(bytes(32))
            with trio.fail_after(10):
                assert await victim.network.get_record("/aci/test/y") == b"a value"
                assert honest.node_id in await victim.network.find_providers(bytes(32), 100)


async def test_who_draws_a_lookup_out_keeps_nobody_from_storing(
    victim: Victim, open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its answers names others that are nearer, of which each takes its time not to answer."""
    monkeypatch.setattr(kademlia, "STORE_LOOKUP_SECONDS", 1.0)
    numbers = itertools.count(1000)
    asked = False

    async def mislead(_peer: NodeId, stream: YamuxStream) -> None:
        nonlocal asked
        asked = True
        request = KadMessage.FromString(await read_prefixed(stream, 4096))
        nowhere = [TcpAddress("ip4", "127.0.0.1", hole.getsockname()[1]).to_bytes()]
        closer = [
            KadMessage.Peer(id=make_key(number).node_id.peer_id, addrs=nowhere)
            for number in itertools.islice(numbers, 20)
        ]
        answer = KadMessage(type=request.type, key=request.key, closerPeers=closer)
        await stream.write(prefixed(answer.SerializeToString()))

    async def introduce(_peer: NodeId, stream: YamuxStream) -> None:
        await stream.write(prefixed(Identity(protocols=[kademlia.PROTOCOL]).SerializeToString()))

    # It takes connections and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as hole:
        async with open_background() as nursery, open_libp2p(4) as honest:
            await honest.connect(victim.address)
            attacker = Host(ATTACKER, nursery)
            with attacker.serve(kademlia.PROTOCOL, mislead), attacker.serve(identify.PROTOCOL, introduce):
                await attacker.dial(victim.node_id, (TcpAddress.parse(victim.address),))
                await eventually(lambda: asked)
                with trio.fail_after(10):
                    await victim.network.put_record("/aci/test/y", b"a value")
                    await victim.network.provide(bytes(32))
        assert isinstance(honest, Libp2pNetwork)
        now = trio.current_time()
        assert honest._kademlia._records.get("/aci/test/y", now) == b"a value"
        assert honest._kademlia._providers.get(MULTIHASH, now) == [victim.node_id]
