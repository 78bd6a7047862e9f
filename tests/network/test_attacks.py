"""Attacks on connections, the muxer and streams: a hostile peer costs itself its connection and nobody else anything.

After each attack an honest third peer must connect, exchange a frame, gossip and use the DHT (fixture `victim`).
"""

from __future__ import annotations

import gc
import resource
import socket
import struct
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.peer.id import ID  # pyright: ignore[reportMissingTypeStubs]
from libp2p.security.noise.transport import Transport as NoiseTransport

from aci_p2p.network import MAX_FRAME_BYTES, PeerUnreachable, Stream, StreamClosed
from aci_p2p.network.libp2p import admission, host, identify, yamux
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.negotiation import NegotiationError, encode_message, select_outbound
from aci_p2p.network.libp2p.network import Libp2pNetwork
from aci_p2p.network.libp2p.ping import PROTOCOL as PING_PROTOCOL
from aci_p2p.network.libp2p.secure import ConnectionLost, RawChannel, SecureChannel, Security
from aci_p2p.network.libp2p.varint import encode_varint, prefixed
from aci_p2p.network.libp2p.yamux import StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_STREAMS, MAX_STREAMS_PER_PEER
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.attack import (
    ACK,
    ATTACKER,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Victim,
    frame,
    noise,
    until_ended,
    until_refused,
)
from tests.network.driver import ECHO, PATIENCE_S, eventually, make_key, wait_for_ever

TCP_GARBAGE = {
    "random": [noise(4096)],
    "nothing": [],
    "http": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "huge varint": [b"\xff" * 9 + b"\x01", noise(100_000)],
    "endless varint": [b"\xff" * 1000],
    "not text": [encode_message("/multistream/1.0.0"), b"\x05\xff\xfe\xfd\xfc\n"],
    "noise then garbage": [encode_message("/multistream/1.0.0") + encode_message("/noise"), noise(5000)],
    "noise then silence": [encode_message("/multistream/1.0.0") + encode_message("/noise"), b"\x00\x20"],
    "many proposals": [encode_message("/multistream/1.0.0"), encode_message("/nope") * 100],
}


@pytest.mark.parametrize("chunks", TCP_GARBAGE.values(), ids=TCP_GARBAGE)
async def test_garbage_on_tcp(victim: Victim, chunks: list[bytes]) -> None:
    for _ in range(5):
        stream = await victim.tcp()
        try:
            for chunk in chunks:
                await stream.send_all(chunk)
                await trio.sleep(0.01)
        except trio.BrokenResourceError:
            pass
        await stream.aclose()


async def test_connections_reset_at_once(victim: Victim) -> None:
    for _ in range(20):
        with socket.socket() as connection:
            connection.connect(("127.0.0.1", victim.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await trio.sleep(0.05)


async def test_plaintext_is_refused(victim: Victim) -> None:
    stream = RawChannel(await victim.tcp(), is_initiator=True)
    with pytest.raises(NegotiationError), trio.fail_after(5):
        await select_outbound(stream, "/plaintext/2.0.0")
    await stream.close()
    assert not victim.network.peers


async def test_other_kind_of_key_is_refused(victim: Victim) -> None:
    channel = RawChannel(await victim.tcp(), is_initiator=True)
    await select_outbound(channel, "/noise")
    transport = NoiseTransport(create_secp256k1_key_pair(), noise_privkey=create_x25519_key_pair().private_key)
    connection = await transport.secure_outbound(channel, ID(victim.network.node_id.peer_id))
    with pytest.raises(ConnectionLost), trio.fail_after(5):
        await connection.read(1)
    await channel.close()
    assert not victim.network.peers


async def test_silent_connections_do_not_lock_others_out(victim: Victim) -> None:
    silent = [await victim.tcp() for _ in range(300)]
    await trio.sleep(0.05)
    await victim.serves_honest_peers()
    closed = 0

    async def wait_for_end(stream: trio.SocketStream) -> None:
        nonlocal closed
        ended = not await stream.receive_some(1)
        closed += ended

    async with trio.open_nursery() as nursery:
        for stream in silent:
            nursery.start_soon(wait_for_end, stream)
        await eventually(lambda: closed >= 300 - admission.MAX_HANDSHAKES)
        nursery.cancel_scope.cancel()
    for stream in silent:
        await stream.aclose()


async def test_handshake_that_stalls_is_ended(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_SECONDS", 0.05)
    stream = await victim.tcp()
    await stream.send_all(encode_message("/multistream/1.0.0"))
    with trio.fail_after(PATIENCE_S):
        while await stream.receive_some(100):
            pass
    await stream.aclose()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_handshake_in_drips_is_ended(victim: Victim, monkeypatch: pytest.MonkeyPatch, *, encrypted: bool) -> None:
    """What counts is the time of the whole handshake, not that since the last byte."""
    monkeypatch.setattr(admission, "HANDSHAKE_SECONDS", 0.3)
    stream = await victim.tcp()
    started = trio.current_time()
    drips = encode_message("/multistream/1.0.0") + encode_message("/nope") * 8
    if encrypted:
        channel: SecureChannel | RawChannel = await Security(ATTACKER).secure_outbound(stream, victim.network.node_id)
    else:
        channel = RawChannel(stream, is_initiator=True)
    with trio.fail_after(5), pytest.raises(ConnectionLost):
        for drip in drips:
            await channel.write(bytes([drip]))
            await trio.sleep(0.02)
    assert trio.current_time() - started > 0.2
    assert victim.network.statistics().handshakes == 0
    assert not victim.network.peers
    await channel.close()


YAMUX_GARBAGE = {
    "random": noise(400),
    "other version": b"\x01" + frame(DATA, SYN, 1, 0)[1:],
    "other type": frame(9, 0, 1, 0),
    "stream zero": frame(WINDOW_UPDATE, SYN, 0, 0),
    "id of the other side": frame(WINDOW_UPDATE, SYN, 1000, 0),
    "same stream twice": frame(WINDOW_UPDATE, SYN, 1, 0) * 2,
    "data of four gigabytes": frame(DATA, SYN, 1, 2**32 - 1),
    "data of one byte too many": frame(DATA, SYN, 1, yamux.WINDOW_BYTES + 1),
    "good-bye": frame(GO_AWAY, 0, 0, 1),
}


@pytest.mark.parametrize("data", YAMUX_GARBAGE.values(), ids=YAMUX_GARBAGE)
async def test_bad_frame_ends_the_connection(victim: Victim, data: bytes) -> None:
    channel = await victim.secure()
    await channel.write(data)
    await until_refused(channel)
    await channel.close()
    await eventually(lambda: not victim.network.peers)


YAMUX_NONSENSE = {
    "data for no stream": frame(DATA, 0, 77, 5, b"hello"),
    "window for no stream": frame(WINDOW_UPDATE, 0, 77, 2**32 - 1),
    "end of no stream": frame(WINDOW_UPDATE, FIN, 77, 0) + frame(DATA, RST, 79, 0),
    "pong": frame(PING, ACK, 0, 7),
    "ping": frame(PING, SYN, 0, 7),
    "endless window": frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, 0, 1, 2**32 - 1) * 50,
    "opened and reset": b"".join(
        frame(WINDOW_UPDATE, SYN, number, 0) + frame(WINDOW_UPDATE, RST, number, 0) for number in range(1, 401, 2)
    ),
}


@pytest.mark.parametrize("data", YAMUX_NONSENSE.values(), ids=YAMUX_NONSENSE)
async def test_pointless_frame_is_ignored(victim: Victim, data: bytes) -> None:
    channel = await victim.secure()
    await channel.write(data)
    await trio.sleep(0.05)
    assert list(victim.network.peers) == [ATTACKER.node_id]
    await channel.close()


async def test_overrun_of_the_window_ends_the_connection(victim: Victim) -> None:
    with victim.network.serve("/test/wait/1", wait_for_ever):
        channel = await victim.secure()
        opening = encode_message("/multistream/1.0.0") + encode_message("/test/wait/1")
        await channel.write(frame(DATA, SYN, 1, len(opening), opening))
        chunk = bytes(60_000)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent = 0
        with pytest.raises(ConnectionLost):
            while sent < 64 << 20:
                await channel.write(frame(DATA, 0, 1, len(chunk), chunk))
                sent += len(chunk)
        assert sent < 32 << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
        await channel.close()


async def test_full_windows_of_many_streams_are_bounded(victim: Victim) -> None:
    with victim.network.serve("/test/wait/1", wait_for_ever):
        channel = await victim.secure()
        opening = encode_message("/multistream/1.0.0") + encode_message("/test/wait/1")
        chunk = bytes(30_000)
        sent = 0
        with pytest.raises(ConnectionLost):
            for number in range(1, 101, 2):
                await channel.write(frame(DATA, SYN, number, len(opening), opening))
                for _ in range(8):
                    await channel.write(frame(DATA, 0, number, len(chunk), chunk))
                    sent += len(chunk)
                    await trio.lowlevel.checkpoint()
            await until_refused(channel)
            raise ConnectionLost
        await channel.close()


async def test_flood_of_streams_is_bounded(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        connection = attacker.connection(victim.network.node_id)
        assert connection is not None
        opened = [connection.muxer.open_stream() for _ in range(MAX_STREAMS_PER_PEER + 100)]
        await eventually(lambda: sum(stream._state.reset for stream in opened) == 100)
        await victim.serves_honest_peers()
        assert ATTACKER.node_id in victim.network.peers


async def test_peer_whose_streams_come_to_nothing_is_thrown_out(victim: Victim) -> None:
    channel = await victim.secure()
    with trio.fail_after(5), pytest.raises(ConnectionLost):
        for number in range(1, 1 << 20, 2):
            await channel.write(frame(WINDOW_UPDATE, SYN, number, 0) + frame(WINDOW_UPDATE, RST, number, 0))
            await trio.lowlevel.checkpoint()
    await channel.close()
    with pytest.raises(PeerUnreachable, match="thrown out"):
        async with victim.network.open_stream(ATTACKER.node_id, ECHO):
            pass


async def test_peer_that_asks_and_does_not_read_is_dropped(victim: Victim) -> None:
    channel = await victim.secure()
    with trio.fail_after(20), pytest.raises(ConnectionLost):
        while True:
            await channel.write(frame(PING, SYN, 0, 7) * 4000)
    await channel.close()


async def test_streams_that_never_negotiate(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        connection = attacker.connection(victim.network.node_id)
        assert connection is not None
        for garbage in (b"", noise(100), encode_message("/multistream/1.0.0") + b"\x05nope\n", b"\xff" * 12):
            for _ in range(10):
                stream = connection.muxer.open_stream()
                await stream.write(garbage)
        await trio.sleep(0.05)
        await victim.serves_honest_peers()


@pytest.mark.parametrize("dripping", [False, True])
async def test_streams_without_a_protocol_give_their_slots_back(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, *, dripping: bool
) -> None:
    monkeypatch.setattr(host, "NEGOTIATION_SECONDS", 0.3)
    async with victim.attacked_by_host() as attacker:
        connection = attacker.connection(victim.network.node_id)
        assert connection is not None
        streams = [connection.muxer.open_stream() for _ in range(3 * MAX_STREAMS_PER_PEER)]
        with trio.fail_after(5):
            for drip in encode_message("/multistream/1.0.0") if dripping else ():
                for stream in streams:
                    with suppress(StreamReset):
                        await stream.write(bytes([drip]))
                await trio.sleep(0.02)
        await eventually(lambda: connection.muxer.stream_count <= 2)
        monkeypatch.undo()
        stream = await attacker.open_stream(victim.network.node_id, ECHO)
        await stream.write(prefixed(b"slot"))
        assert await stream.read_exactly(5) == prefixed(b"slot")


FRAME_GARBAGE = {
    "too long": encode_varint(MAX_FRAME_BYTES + 1) + b"x",
    "bad varint": b"\xff" * 20,
    "huge": b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("data", FRAME_GARBAGE.values(), ids=FRAME_GARBAGE)
async def test_bad_frame_on_a_stream(victim: Victim, data: bytes) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, ECHO)
        await stream.write(data)
        await until_ended(stream)
    assert victim.network.statistics().handler_failures == 0


async def test_bad_frame_from_a_server(victim: Victim) -> None:
    refused = trio.Event()

    async def misbehave(_peer: NodeId, stream: YamuxStream) -> None:
        await stream.write(encode_varint(MAX_FRAME_BYTES + 1) + noise(1000))
        with pytest.raises(StreamReset):
            await stream.read(1)
        refused.set()

    async with victim.attacked_by_host() as attacker:
        with attacker.serve(ECHO, misbehave):
            async with victim.network.open_stream(ATTACKER.node_id, ECHO) as stream:
                with pytest.raises(StreamClosed, match="bad frame"), trio.fail_after(5):
                    await stream.receive()
                with trio.fail_after(5):
                    await refused.wait()


async def test_truncated_frame(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        stream = await attacker.open_stream(victim.network.node_id, ECHO)
        await stream.write(b"\x90\x4e" + b"x" * 10)
        stream.close()
        await attacker.close()


async def test_bad_identify_answer(victim: Victim) -> None:
    served = trio.Event()

    async def misbehave(_peer: NodeId, stream: YamuxStream) -> None:
        await stream.write(prefixed(noise(500)))
        served.set()

    async with open_background() as nursery:
        attacker = Host(ATTACKER, nursery)
        with attacker.serve(identify.PROTOCOL, misbehave):
            await attacker.dial(victim.network.node_id, (TcpAddress.parse(victim.address),))
            with trio.fail_after(5):
                await served.wait()


async def test_failing_handler_harms_nobody(victim: Victim) -> None:
    async def fail(_stream: Stream) -> None:
        raise ZeroDivisionError

    with victim.network.serve("/test/fail/1", fail):
        async with victim.attacked_by_host() as attacker:
            for _ in range(50):
                with suppress(PeerUnreachable):
                    await until_ended(await attacker.open_stream(victim.network.node_id, "/test/fail/1"))
    assert victim.network.statistics().handler_failures == 50


async def test_same_peer_connects_again_and_again(victim: Victim) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(victim.attacked_by_host())
        assert list(victim.network.peers) == [ATTACKER.node_id]
        assert isinstance(victim.network, Libp2pNetwork)
        kept = victim.network._host.connections
        await eventually(lambda: len(kept.of(ATTACKER.node_id)) == 1)


@pytest.mark.slow
async def test_inbound_slots_are_given_back(victim: Victim) -> None:
    for _ in range(300):
        channel = await victim.secure()
        await channel.close()
    await eventually(lambda: not victim.network.peers)


def open_descriptors() -> int:
    """File descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_descriptors_are_given_back(victim: Victim) -> None:
    before = open_descriptors()
    for _ in range(50):
        stream = await victim.tcp()
        await stream.send_all(noise(100))
        await stream.aclose()
    await eventually(lambda: open_descriptors() <= before)


async def test_streams_of_many_peers_leave_room_for_others(victim: Victim) -> None:
    """Sixteen peers could hold all streams that we serve, idle, and nobody else could so much as ask who we are."""
    async with AsyncExitStack() as stack:
        for number in range(MAX_STREAMS // MAX_STREAMS_PER_PEER):
            attacker = await stack.enter_async_context(victim.attacked_by_host(make_key(1000 + number)))
            for _ in range(MAX_STREAMS_PER_PEER):
                with suppress(PeerUnreachable):
                    # Those that come last make room among themselves.
                    await attacker.open_stream(victim.node_id, PING_PROTOCOL)
        await victim.serves_honest_peers()
        assert victim.network.statistics().banned == 0


async def test_what_many_connections_hold_together_is_bounded(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stays within its own bound, and hundreds of them could fill any memory."""
    assert isinstance(victim.network, Libp2pNetwork)
    holdings = victim.network._host.holdings
    monkeypatch.setattr(holdings, "_limit", 4 * yamux.WINDOW_BYTES)
    highest = 0

    async def flood(attacker: Host) -> None:
        with suppress(PeerUnreachable, StreamReset):
            stream = await attacker.open_stream(victim.node_id, PING_PROTOCOL)
            while True:
                # The answers are never read, so the questions fill their window.
                await stream.write(bytes(1 << 15))

    async with AsyncExitStack() as stack:
        attackers = [await stack.enter_async_context(victim.attacked_by_host(make_key(number))) for number in (50, 51)]
        floods = await stack.enter_async_context(open_background())
        for attacker in attackers * 3:
            floods.start_soon(flood, attacker)
        with trio.fail_after(10):
            while len(victim.network.peers) == len(attackers):
                highest = max(highest, holdings.total)
                await trio.sleep(0.001)
        assert 2 * yamux.WINDOW_BYTES < highest <= 4 * yamux.WINDOW_BYTES
    await eventually(lambda: not victim.network.peers and holdings.total == 0)
