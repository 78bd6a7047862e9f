"""Attacks on gossip: bad messages are counted against their forwarder, pointless ones are ignored."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio
import trio.lowlevel

from aci_p2p.network import MAX_GOSSIP_BYTES, Network, PeerUnreachable
from aci_p2p.network.libp2p import gossip, router
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.network import Libp2pNetwork
from aci_p2p.network.libp2p.score import GOSSIP_THRESHOLD, GRAYLIST_THRESHOLD
from aci_p2p.network.libp2p.upstream import RPC, ControlGraft, ControlIHave, ControlIWant, ControlMessage, ControlPrune
from aci_p2p.network.libp2p.upstream import GossipsubMessage as Message
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import StreamReset, YamuxStream
from aci_p2p.protocol.identity import NodeId
from tests.network.attack import ATTACKER, Victim, judge, noise, until_ended
from tests.network.driver import ECHO, TOPIC, Opener, eventually, make_key


def publication(**fields: object) -> bytes:
    """An RPC with one message on the topic."""
    return prefixed(RPC(publish=[Message(topicIDs=[TOPIC], **fields)]).SerializeToString())  # type: ignore[arg-type]


REJECTED_GOSSIP = {
    "bad protobuf": prefixed(b"\xff" * 50),
    "random": b"\x32" + noise(50),
    "huge": b"\xff\xff\xff\xff\x0f" + b"x" * 1000,
    "bad varint": b"\xff" * 20,
    "with an author": publication(data=b"1", from_id=b"\x12\x20" + noise(32), seqno=b"1"),
    "with a bad key": publication(data=b"1", signature=b"s" * 64, key=b"\xff\xff\xff"),
    "no number": publication(data=b"not a number"),
    "too large": publication(data=b"1" * 20_000),
    "too many subscriptions": prefixed(
        RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid="x")] * 1000).SerializeToString()
    ),
    "too many grafts": prefixed(
        RPC(control=ControlMessage(graft=[ControlGraft(topicID=TOPIC)] * 1000)).SerializeToString()
    ),
}


@pytest.mark.parametrize("data", REJECTED_GOSSIP.values(), ids=REJECTED_GOSSIP)
async def test_bad_gossip_is_counted(victim: Victim, data: bytes) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        await stream.write(data)
        await eventually(lambda: victim.network.statistics().gossip_refused)
        assert sum(victim.network.statistics().gossip_refused.values()) == 1
        assert victim.network.statistics().gossip_accepted == 0


HARMLESS_GOSSIP = {
    "empty": prefixed(b""),
    "no topic": prefixed(RPC(publish=[Message(data=b"1")]).SerializeToString()),
    "two topics": prefixed(RPC(publish=[Message(data=b"1", topicIDs=[TOPIC, "test/other"])]).SerializeToString()),
    "topic nobody has": prefixed(RPC(publish=[Message(data=b"1", topicIDs=["test/nobody"])]).SerializeToString()),
    "bad sender record": prefixed(RPC(senderRecord=b"\xff" * 40).SerializeToString()),
    "many topics": prefixed(
        RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=str(n)) for n in range(500)]).SerializeToString()
    ),
    "long topic": prefixed(RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid="x" * 100_000)]).SerializeToString()),
    "topic that is not text": prefixed(b"\x0a\x08\x08\x01\x12\x04\xff\xfe\xff\xfe"),
    "control nonsense": prefixed(
        RPC(
            control=ControlMessage(
                ihave=[ControlIHave(topicID=TOPIC, messageIDs=[b"\xff\xff", b""])],
                iwant=[ControlIWant(messageIDs=[b"\xff", b""])],
                graft=[ControlGraft(topicID="nope"), ControlGraft(topicID=TOPIC)],
                prune=[ControlPrune(topicID="nope", backoff=2**63), ControlPrune(topicID=TOPIC, backoff=2**63)],
            )
        ).SerializeToString()
    ),
    "many announcements": prefixed(
        RPC(
            control=ControlMessage(
                ihave=[ControlIHave(topicID=TOPIC, messageIDs=[noise(32) for _ in range(100)]) for _ in range(50)]
            )
        ).SerializeToString()
    ),
    "cut off": publication(data=b"1" * 1000)[:500],
}


@pytest.mark.parametrize("data", HARMLESS_GOSSIP.values(), ids=HARMLESS_GOSSIP)
async def test_pointless_gossip_is_ignored(victim: Victim, data: bytes) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        await stream.write(data)
        await trio.sleep(0.05)
        assert list(victim.network.peers) == [ATTACKER.node_id]
        stream.close()
        await trio.sleep(0.02)
    assert victim.network.statistics().gossip_accepted == 0


async def test_spammer_is_thrown_out(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        with trio.fail_after(5), pytest.raises(StreamReset):
            for number in range(100_000):
                await stream.write(publication(data=b"spam %d" % number))
                await trio.lowlevel.checkpoint()
        await eventually(lambda: not victim.network.peers)
        await eventually(lambda: not attacker.peers)
        with pytest.raises(PeerUnreachable):
            await attacker.dial(victim.network.node_id, (TcpAddress.parse(victim.address),))
        with pytest.raises(PeerUnreachable, match="thrown out"):
            async with victim.network.open_stream(ATTACKER.node_id, ECHO):
                pass


async def test_many_gossip_streams_of_one_peer(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        streams = [await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL) for _ in range(20)]
        for stream in streams[:-1]:
            await until_ended(stream)


async def test_connection_lost_in_the_middle_of_gossip(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        await stream.write(publication(data=b"1" * 1000)[:500])


def rpc(*, times: int, **fields: list[object]) -> bytes:
    """An RPC whose entries are repeated."""
    return prefixed(RPC(**{name: entries * times for name, entries in fields.items()}).SerializeToString())  # type: ignore[arg-type]


FLOODS = {
    "one message again and again": rpc(times=100, publish=[Message(data=b"1", topicIDs=[TOPIC])]),
    "messages for nobody": rpc(times=100, publish=[Message(data=b"1", topicIDs=["test/nobody"])]),
    "subscriptions": rpc(times=100, subscriptions=[RPC.SubOpts(subscribe=True, topicid=TOPIC)]),
    "announcements": prefixed(
        RPC(
            control=ControlMessage(ihave=[ControlIHave(topicID=TOPIC, messageIDs=[noise(32)])] * 100)
        ).SerializeToString()
    ),
    "requests": prefixed(
        RPC(control=ControlMessage(iwant=[ControlIWant(messageIDs=[noise(32)])] * 100)).SerializeToString()
    ),
    "prunes": prefixed(RPC(control=ControlMessage(prune=[ControlPrune(topicID=TOPIC)] * 100)).SerializeToString()),
    "nothing": prefixed(b"") * 100,
    "bulk": prefixed(RPC(senderRecord=bytes(200_000)).SerializeToString()),
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
async def test_flooder_is_thrown_out(victim: Victim, data: bytes) -> None:
    """Soon, and not for a burst."""
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        for _ in range(10):
            await stream.write(data)
        await trio.sleep(0.05)
        (connection,) = victim.network.connections()
        assert connection.score > GRAYLIST_THRESHOLD
        with trio.fail_after(10), pytest.raises(StreamReset):
            while True:
                await stream.write(data)
                await trio.lowlevel.checkpoint()
        await eventually(lambda: not victim.network.peers)
        assert victim.network.statistics().gossip_refused["flooded"] > 0


async def test_who_asks_into_our_mesh_again_and_again_is_thrown_out(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        grafts = RPC(control=ControlMessage(graft=[ControlGraft(topicID=TOPIC)] * 20))
        await stream.write(prefixed(grafts.SerializeToString()))
        await eventually(lambda: not victim.network.peers)


async def test_liar_about_messages_is_not_believed_for_long(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "PROMISE_SECONDS", 0.1)
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        for _ in range(12):
            ihave = ControlIHave(topicID=TOPIC, messageIDs=[noise(32)])
            await stream.write(prefixed(RPC(control=ControlMessage(ihave=[ihave])).SerializeToString()))
        await eventually(lambda: victim.network.connections()[0].score < GOSSIP_THRESHOLD)
        assert list(victim.network.peers) == [ATTACKER.node_id]


async def test_score_of_a_neighbour_is_told(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
        await stream.write(publication(data=b"no number") + publication(data=b"nor this"))
        await eventually(lambda: victim.network.connections()[0].score == -1)


async def test_neighbour_that_does_not_read_costs_nobody_anything(victim: Victim, open_libp2p: Opener) -> None:
    """Its messages are lost and counted; the others get theirs."""
    publications = 2 * gossip.MAX_OUTBOX_BYTES // MAX_GOSSIP_BYTES

    async def wait(_peer: NodeId, _stream: YamuxStream) -> None:
        await trio.sleep_forever()

    async with victim.attacked_by_host() as attacker, open_libp2p(5) as honest:
        with attacker.serve(gossip.PROTOCOL, wait):
            stream = await attacker.open_stream(victim.network.node_id, gossip.PROTOCOL)
            await stream.write(
                prefixed(RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=TOPIC)]).SerializeToString())
            )
            await honest.connect(victim.address)
            async with honest.subscribe(TOPIC, judge, capacity=2 * publications) as subscription:
                await eventually(lambda: len(victim.network.topic_peers(TOPIC)) == 2)
                for number in range(publications):
                    await victim.network.publish(TOPIC, b"%d" % number + b"0" * (MAX_GOSSIP_BYTES - 10))
                    await trio.sleep(0.001)
                await eventually(lambda: honest.statistics().gossip_accepted == publications)
                assert subscription.dropped == 0
        assert victim.network.statistics().gossip_dropped > 0


def has_accepted(network: Network, count: int) -> bool:
    """Whether so many messages have come."""
    return network.statistics().gossip_accepted == count


async def test_what_waits_for_many_that_do_not_read_is_bounded(
    victim: Victim, open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have an outbox; all of theirs together may not fill our memory, nor keep others from getting theirs."""
    monkeypatch.setattr(gossip, "MAX_WAITING_BYTES", 32 * MAX_GOSSIP_BYTES)
    assert isinstance(victim.network, Libp2pNetwork)
    waiting = victim.network._gossip._waiting
    subscription = prefixed(RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=TOPIC)]).SerializeToString())
    async with AsyncExitStack() as stack:
        for number in range(4):
            # It serves no gossip, so that all waits.
            attacker = await stack.enter_async_context(victim.attacked_by_host(make_key(50 + number)))
            stream = await attacker.open_stream(victim.node_id, gossip.PROTOCOL)
            await stream.write(subscription)
        honest = await stack.enter_async_context(open_libp2p(5))
        await honest.connect(victim.address)
        await stack.enter_async_context(honest.subscribe(TOPIC, judge, capacity=100))
        await eventually(lambda: len(victim.network.topic_peers(TOPIC)) == 5)
        for number in range(1, 65):
            await victim.network.publish(TOPIC, b"%d" % number + b"0" * (MAX_GOSSIP_BYTES - 10))
            await eventually(partial(has_accepted, honest, number))
            assert waiting.bytes <= gossip.MAX_WAITING_BYTES
        assert waiting.bytes > gossip.MAX_WAITING_BYTES // 2
        assert waiting.neighbours == 5
    await eventually(lambda: waiting.neighbours == waiting.bytes == 0)
