"""From a stream of bytes to an encrypted, authenticated connection: multistream-select, then py-libp2p's Noise XX.

The bytes come over TCP or through a relay.

Noise is the only security offered, so a plaintext dialler is refused at negotiation. The identity that the handshake
proves must be an Ed25519 key; whoever has another kind of key is refused.
"""

from __future__ import annotations

from typing import Any, Protocol

import trio

from aci_p2p.network.libp2p.negotiation import select_inbound, select_outbound
from aci_p2p.network.libp2p.upstream import (
    ID,
    NOISE,
    ConnectionType,
    IRawConnection,
    ISecureConn,
    NoiseTransport,
    create_ed25519_key_pair,
    create_x25519_key_pair,
)
from aci_p2p.protocol.identity import KeyPair, NodeId

RECEIVE_BYTES = 64 << 10
"""Read from the stream at once, bytes: about one Noise message of the largest size."""


class ConnectionLost(Exception):
    """The connection underneath ended or broke."""


class ByteStream(Protocol):
    """What a connection can be built on: a TCP connection (`trio.SocketStream`), or a stream through a relay."""

    async def receive_some(self, max_bytes: int, /) -> bytes | bytearray:
        """The next 1 to `max_bytes` bytes, none at the end. Raises trio.BrokenResourceError."""
        ...

    async def send_all(self, data: bytes, /) -> None:
        """Send bytes. Raises trio.BrokenResourceError."""
        ...

    async def aclose(self) -> None:
        """Close it; never raises but for cancellation, under which it is closed all the same."""
        ...


class RawChannel(IRawConnection):
    """A byte stream as py-libp2p's Noise wants it, with one buffered read in place of two system calls a message.

    `read(n)` returns exactly n bytes: py-libp2p's `read_exactly` otherwise gives up after a hundred short reads.
    """

    def __init__(self, stream: ByteStream, *, is_initiator: bool) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self.is_initiator = is_initiator

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes (at most a Noise message); raises ConnectionLost when the peer ends before."""
        while len(self._buffer) < count:
            try:
                received = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                received = b""
            if not received:
                msg = "the peer closed the connection"
                raise ConnectionLost(msg)
            self._buffer += received
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def read(self, n: int | None = None) -> bytes:
        return await self.read_exactly(n or 1)

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            msg = "the peer closed the connection"
            raise ConnectionLost(msg) from None

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Any]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class SecureChannel:
    """An encrypted connection to an authenticated peer."""

    def __init__(self, connection: ISecureConn, peer: NodeId) -> None:
        self._connection = connection
        self.peer = peer

    async def receive(self) -> bytes:
        """The next Noise message's plaintext, 1 to 65,519 bytes (0 for an empty one)."""
        return await self._connection.read(None)

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes."""
        return await self._connection.read(count)

    async def write(self, data: bytes) -> None:
        """Send bytes, split into Noise messages as needed."""
        await self._connection.write(data)

    async def close(self) -> None:
        """Close the connection underneath."""
        await self._connection.close()


class Security:
    """Our side of every handshake."""

    def __init__(self, key: KeyPair) -> None:
        key_pair = create_ed25519_key_pair(key.seed)
        self._noise = NoiseTransport(key_pair, noise_privkey=create_x25519_key_pair().private_key)

    async def secure_outbound(self, stream: ByteStream, peer: NodeId | None) -> SecureChannel:
        """Encrypt a connection that we dialled; raises when the other side is not `peer` (None: whoever it is)."""
        channel = RawChannel(stream, is_initiator=True)
        await select_outbound(channel, str(NOISE))
        expected = None if peer is None else ID(peer.peer_id)
        return _authenticated(await self._noise.get_pattern().handshake_outbound(channel, expected))

    async def secure_inbound(self, stream: ByteStream) -> SecureChannel:
        """Encrypt a connection that a peer dialled; raises LocalError when its key is not Ed25519."""
        channel = RawChannel(stream, is_initiator=False)
        await select_inbound(channel, (str(NOISE),))
        return _authenticated(await self._noise.get_pattern().handshake_inbound(channel))


def _authenticated(connection: ISecureConn) -> SecureChannel:
    return SecureChannel(connection, NodeId.from_peer_id(connection.get_remote_peer().to_bytes()))
