"""A node under attack, and hostile peers that speak each layer by hand."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio

from aci_p2p.network import Network
from aci_p2p.network.libp2p import yamux
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.negotiation import select_outbound
from aci_p2p.network.libp2p.secure import ConnectionLost, SecureChannel, Security
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.validation import ACCEPTED, Decision, Reason, Validation
from aci_p2p.tasks import open_background
from tests.network.driver import ECHO, TOPIC, Opener, eventually

ATTACKER = KeyPair(b"attacker".ljust(32))
HEADER = struct.Struct(">BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
noise = random.Random(7).randbytes  # noqa: S311 - the same garbage in every run


def judge(_forwarder: NodeId, data: bytes) -> Validation:
    """The victim's gossip rule: accepts numbers."""
    return ACCEPTED if data.isdigit() else Validation(Decision.REJECT, Reason.NOT_CANONICAL)


class Target:
    """A node that can be attacked: who it is and where it listens."""

    def __init__(self, node_id: NodeId, address: str) -> None:
        self.node_id = node_id
        self.address = address
        self.port = TcpAddress.parse(address).port

    async def tcp(self) -> trio.SocketStream:
        """A bare TCP connection to it."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def secure(self, key: KeyPair = ATTACKER) -> SecureChannel:
        """An encrypted connection to it on which the attacker speaks yamux by hand."""
        stream = await self.tcp()
        try:
            secure = await Security(key).secure_outbound(stream, self.node_id)
            await select_outbound(secure, yamux.PROTOCOL)
        except BaseException:
            await stream.aclose()
            raise
        return secure

    @asynccontextmanager
    async def attacked_by_host(self, key: KeyPair = ATTACKER) -> AsyncGenerator[Host]:
        """An authenticated peer with a host of its own: what it sends on its streams is up to the test."""
        async with open_background() as nursery:
            attacker = Host(key, nursery)
            await attacker.dial(self.node_id, (TcpAddress.parse(self.address),))
            yield attacker


class Victim(Target):
    """An endpoint under attack, and the proof that it still serves honest peers."""

    def __init__(self, network: Network, open_libp2p: Opener) -> None:
        super().__init__(network.node_id, network.addresses[0])
        self.network = network
        self._open_libp2p = open_libp2p
        self._numbers = itertools.count(10**6)

    async def serves_honest_peers(self) -> None:
        """Raises unless a third peer can connect, exchange a frame, gossip both ways and use the DHT."""
        with trio.fail_after(10):
            async with self._open_libp2p(3) as honest:
                await honest.connect(self.address)
                async with honest.open_stream(self.network.node_id, ECHO) as stream:
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"
                await self._gossips_with(honest)
                await honest.put_record("/aci/test/x", b"value")
                assert await self.network.get_record("/aci/test/x") == b"value"

    async def _gossips_with(self, honest: Network) -> None:
        async with honest.subscribe(TOPIC, judge, capacity=8) as subscription:
            sent, answered = b"%d" % next(self._numbers), b"%d" % next(self._numbers)
            await self.network.publish(TOPIC, sent)
            while (await subscription.receive()).data != sent:
                pass
            accepted = self.network.statistics().gossip_accepted
            await honest.publish(TOPIC, answered)
            await eventually(lambda: self.network.statistics().gossip_accepted == accepted + 1)


async def until_refused(channel: SecureChannel) -> None:
    """Read until the victim hangs up."""
    with trio.fail_after(5), pytest.raises(ConnectionLost):
        while True:
            await channel.receive()


async def until_ended(stream: YamuxStream) -> None:
    """Read until the victim ends or resets the stream."""
    with trio.fail_after(5), pytest.raises((EndOfStream, StreamReset)):
        while True:
            await stream.read(1 << 16)


def frame(kind: int, flags: int, stream_id: int, length: int, payload: bytes = b"") -> bytes:
    """A yamux frame, well-formed or not."""
    return HEADER.pack(0, kind, flags, stream_id, length) + payload
