"""Attackers of a swarm: each function attacks some nodes and returns when it is over.

Those that hold a connection and misbehave on it go on until they are disconnected, and fail after DISCONNECT_S.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

import trio

from aci_p2p.network import PeerUnreachable
from aci_p2p.network.libp2p import identify
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.negotiation import NegotiationError, encode_message
from aci_p2p.network.libp2p.secure import ConnectionLost, SecureChannel
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.tasks import open_background
from tests.network.attack import DATA, PING, SYN, WINDOW_UPDATE, Target, frame, noise
from tests.scenarios.honest import HonestSwarm
from tests.scenarios.honest_node import FAILING, HOLDING

DISCONNECT_S: Final = 30.0
"""Within which an attacker that holds a connection must be disconnected, seconds."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arena:
    """Whom an attack is aimed at, and who attacks."""

    name: str
    """The attack's; decides the attackers' keys, since an attacker that was thrown out is not let in again."""
    swarm: HonestSwarm
    """All honest nodes."""

    @property
    def targets(self) -> Sequence[Target]:
        """The same, as targets."""
        return self.swarm.targets

    async def ask(self, number: int, do: str, **details: object) -> Any:  # noqa: ANN401 - a JSON document
        """Let one of the nodes do something (see `HonestNode.obey`)."""
        return await trio.to_thread.run_sync(partial(self.swarm.nodes[number].ask, do, **details))

    def key(self, number: int) -> KeyPair:
        """The key of one attacker."""
        return KeyPair(hashlib.sha256(f"{self.name} {number}".encode()).digest())

    def some(self, count: int) -> list[Target]:
        """So many of the targets, others for each attack."""
        start = sum(self.name.encode())
        return [self.targets[(start + number) % len(self.targets)] for number in range(count)]


Attack = Callable[[Arena], Awaitable[None]]
"""Attacks the targets of an arena."""


async def at_once(function: Callable[[int, T], Awaitable[None]], items: Iterable[T]) -> None:
    """Run a function over numbered items, all at once."""
    async with trio.open_nursery() as nursery:
        for number, item in enumerate(items):
            nursery.start_soon(function, number, item)


async def until_closed(stream: trio.SocketStream) -> None:
    """Hold a TCP connection until the other side ends it."""
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(1 << 16):
            pass


async def insist(connect: Callable[[], Awaitable[T]]) -> T:
    """Connect, again and again if need be: of many handshakes at once a node gives up the oldest."""
    with trio.fail_after(DISCONNECT_S):
        while True:
            with suppress(ConnectionLost, NegotiationError, PeerUnreachable):
                return await connect()
            await trio.sleep(0.1)


@asynccontextmanager
async def peer_of(targets: Sequence[Target], key: KeyPair) -> AsyncGenerator[Host]:
    """An authenticated peer of some nodes: what it sends on its streams is up to the attack."""
    async with open_background() as nursery:
        host = Host(key, nursery)
        for target in targets:
            await insist(partial(host.dial, target.node_id, (TcpAddress.parse(target.address),)))
        yield host


@asynccontextmanager
async def secured(target: Target, key: KeyPair) -> AsyncGenerator[SecureChannel]:
    """An encrypted connection on which the attacker speaks yamux by hand, until disconnected or done."""
    channel = await insist(partial(target.secure, key))
    try:
        with trio.fail_after(DISCONNECT_S), suppress(ConnectionLost):
            yield channel
    finally:
        await channel.close()


def tcp_garbage(cases: Iterable[Sequence[bytes]]) -> Attack:
    """Strangers that send garbage in place of a handshake, and hold on."""

    async def attack(arena: Arena) -> None:
        async def one(_number: int, pair: tuple[Target, Sequence[bytes]]) -> None:
            target, chunks = pair
            with trio.fail_after(DISCONNECT_S):
                async with await target.tcp() as stream:
                    with suppress(trio.BrokenResourceError):
                        for chunk in chunks:
                            await stream.send_all(chunk)
                            await trio.sleep(0.01)
                    await until_closed(stream)

        await at_once(one, [(target, chunks) for target in arena.some(3) for chunks in cases])

    return attack


async def reset_connections(arena: Arena) -> None:
    """Connections that are reset at once."""
    for target in arena.some(3):
        for _ in range(20):
            with socket.socket() as connection:
                connection.connect(("127.0.0.1", target.port))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.lowlevel.checkpoint()


async def silent_connections(arena: Arena) -> None:
    """300 connections to one node on which nothing is said."""
    (target,) = arena.some(1)

    async def hold(_number: int, target: Target) -> None:
        async with await target.tcp() as stream:
            with trio.fail_after(DISCONNECT_S):
                await until_closed(stream)

    await at_once(hold, [target] * 300)


async def slow_loris(arena: Arena) -> None:
    """Handshakes that go on for ever, a byte at a time."""
    opening = encode_message("/multistream/1.0.0") + encode_message("/noise") + struct.pack(">H", 32)

    async def drip(_number: int, target: Target) -> None:
        async with await target.tcp() as stream:
            with trio.fail_after(DISCONNECT_S), suppress(trio.BrokenResourceError):
                for byte in opening + bytes(32):
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.5)

    await at_once(drip, arena.some(2) * 60)


def yamux_garbage(cases: Iterable[bytes]) -> Attack:
    """Authenticated peers that break the muxer's rules."""

    async def attack(arena: Arena) -> None:
        async def one(number: int, data: bytes) -> None:
            (target,) = arena.some(1)
            async with secured(target, arena.key(number)) as channel:
                await channel.write(data)
                await _read(channel)

        await at_once(one, cases)

    return attack


def yamux_nonsense(cases: Iterable[bytes]) -> Attack:
    """Frames that the muxer may ignore."""

    async def attack(arena: Arena) -> None:
        async def one(number: int, data: bytes) -> None:
            (target,) = arena.some(1)
            async with secured(target, arena.key(number)) as channel:
                await channel.write(data)
                await trio.sleep(1)

        await at_once(one, cases)

    return attack


async def window_overrun(arena: Arena) -> None:
    """More data than the window of a stream allows, to handlers that do not read."""
    opening = encode_message("/multistream/1.0.0") + encode_message(HOLDING)

    async def one(number: int, target: Target) -> None:
        async with secured(target, arena.key(number)) as channel:
            await channel.write(frame(DATA, SYN, 1, len(opening), opening))
            chunk = bytes(60_000)
            while True:
                await channel.write(frame(DATA, 0, 1, len(chunk), chunk))

    await at_once(one, arena.some(5))


async def full_windows(arena: Arena) -> None:
    """As much data as the windows of many streams allow together, to handlers that do not read."""
    opening = encode_message("/multistream/1.0.0") + encode_message(HOLDING)

    async def one(number: int, target: Target) -> None:
        async with secured(target, arena.key(number)) as channel:
            chunk = bytes(30_000)
            for stream in range(1, 129, 2):
                await channel.write(frame(DATA, SYN, stream, len(opening), opening))
                for _ in range(8):
                    await channel.write(frame(DATA, 0, stream, len(chunk), chunk))
            await _read(channel)

    await at_once(one, arena.some(5))


async def stream_exhaustion(arena: Arena) -> None:
    """Streams without end, none of which is ever used."""

    async def one(number: int, target: Target) -> None:
        async with secured(target, arena.key(number)) as channel, open_background() as nursery:
            nursery.start_soon(_read, channel)
            for start in range(1, 1 << 31, 200):
                opened = range(start, start + 200, 2)
                await channel.write(b"".join(frame(WINDOW_UPDATE, SYN, stream, 0) for stream in opened))
                await trio.sleep(0.02)

    await at_once(one, arena.some(3))


async def _read(channel: SecureChannel) -> None:
    """Take what comes until the connection ends."""
    with suppress(ConnectionLost):
        while True:
            await channel.receive()


async def asks_and_does_not_read(arena: Arena) -> None:
    """Pings without end whose answers are not read."""

    async def one(number: int, target: Target) -> None:
        async with secured(target, arena.key(number)) as channel:
            while True:
                await channel.write(frame(PING, SYN, 0, 7) * 4000)

    await at_once(one, arena.some(2))


def stream_garbage(protocol: str, cases: Iterable[bytes | Callable[[int], bytes]]) -> Attack:
    """Authenticated peers that send garbage on the streams of a protocol, again and again until disconnected.

    A case is the same each time, or depends on how often it was sent before.
    """

    async def attack(arena: Arena) -> None:
        async def one(number: int, case: bytes | Callable[[int], bytes]) -> None:
            (target,) = arena.some(1)
            async with peer_of([target], arena.key(number)) as host:
                with trio.fail_after(DISCONNECT_S):
                    for sent in count():
                        if not host.peers:
                            return
                        data = case if isinstance(case, bytes) else case(sent)
                        await _send_and_hear(host, target.node_id, protocol, data)

        await at_once(one, cases)

    return attack


def stream_nonsense(protocol: str, cases: Iterable[bytes]) -> Attack:
    """Authenticated peers that send what is pointless but harmless on the streams of a protocol."""

    async def attack(arena: Arena) -> None:
        async def one(number: int, data: bytes) -> None:
            (target,) = arena.some(1)
            async with peer_of([target], arena.key(number)) as host:
                with trio.move_on_after(1.5):
                    while host.peers:
                        await _send_and_hear(host, target.node_id, protocol, data)

        await at_once(one, cases)

    return attack


async def _send_and_hear(host: Host, peer: NodeId, protocol: str, data: bytes) -> None:
    """Send once on a stream of its own, and read what comes for a moment."""
    stream: YamuxStream | None = None
    with trio.move_on_after(0.05), suppress(PeerUnreachable, StreamReset, EndOfStream):
        stream = await host.open_stream(peer, protocol)
        await stream.write(data)
        while True:
            await stream.read(1 << 16)
    if stream is not None:
        stream.reset()
    await trio.sleep(0.01)


async def undecided_streams(arena: Arena) -> None:
    """Streams that never agree on a protocol."""
    garbage = (b"", noise(100), encode_message("/multistream/1.0.0") + b"\x05nope\n", b"\xff" * 12)
    (target,) = arena.some(1)
    async with peer_of([target], arena.key(0)) as host:
        connection = host.connection(target.node_id)
        assert connection is not None
        for data in garbage * 10:
            with suppress(StreamReset):
                await connection.muxer.open_stream().write(data)
        await trio.sleep(1)


async def failing_handlers(arena: Arena) -> None:
    """Calls of a handler that has a bug."""
    (target,) = arena.some(1)
    async with peer_of([target], arena.key(0)) as host:
        for _ in range(50):
            await _send_and_hear(host, target.node_id, FAILING, b"")


def bad_answers(protocol: str, cases: Iterable[Callable[[bytes], bytes]], *, asked: bool = True) -> Attack:
    """Peers that answer the swarm's own requests badly."""

    async def attack(arena: Arena) -> None:
        async def one(number: int, answer: Callable[[bytes], bytes]) -> None:
            async def serve(_peer: NodeId, stream: YamuxStream) -> None:
                # One byte tells the length of the request.
                request = await stream.read(1 << 16) if asked else b""
                await stream.write(answer(request[1:]))

            (target,) = arena.some(1)
            async with peer_of([target], arena.key(number)) as host:
                with host.serve(protocol, serve):
                    await trio.sleep(1.5)

        await at_once(one, cases)

    return attack


async def bad_identify_answers(arena: Arena) -> None:
    """Peers that answer with garbage when they are asked who they are."""
    await bad_answers(identify.PROTOCOL, [lambda _: prefixed(noise(500)), lambda _: b"\xff" * 20], asked=False)(arena)
