"""From a stream of bytes to an encrypted, authenticated connection: multistream-select, then py-libp2p's Noise XX.

The bytes come over TCP or through a relay. The handshake and the ciphers are py-libp2p's; what follows the handshake is
framed here (https://github.com/libp2p/specs/blob/master/noise/README.md#wire-format): its way through seven coroutines
costs a tenth of a job (spec/decisions/0005).

Noise is the only security offered, so a plaintext dialler is refused at negotiation. The identity that the handshake
proves must be an Ed25519 key; whoever has another kind of key is refused.
"""

from __future__ import annotations

from typing import Any, Final, Protocol, cast

import trio

from aci_p2p.network.libp2p.negotiation import select_inbound, select_outbound
from aci_p2p.network.libp2p.upstream import (
    ID,
    NOISE,
    ConnectionType,
    IRawConnection,
    ISecureConn,
    NoiseTransport,
    NoiseTransportReadWriter,
    SecureSession,
    create_ed25519_key_pair,
    create_x25519_key_pair,
)
from aci_p2p.protocol.identity import KeyPair, NodeId

RECEIVE_BYTES = 64 << 10
"""Read from the stream at once, bytes: about one Noise message of the largest size."""
LENGTH_BYTES: Final = 2
"""Of the length before each Noise message, big-endian."""
MAX_PLAINTEXT_BYTES: Final = 65_519
"""Of a Noise message: 65,535 less 16 for its tag."""


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
            await self._fill()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def read_messages(self) -> list[bytes]:
        """Receive one or more Noise messages, as many as have come. Raises ConnectionLost."""
        while not (messages := self._take_messages()):
            await self._fill()
        return messages

    def _take_messages(self) -> list[bytes]:
        messages: list[bytes] = []
        buffer, offset = self._buffer, 0
        while len(buffer) >= (start := offset + LENGTH_BYTES):
            end = start + int.from_bytes(buffer[offset:start], "big")
            if len(buffer) < end:
                break
            messages.append(bytes(buffer[start:end]))
            offset = end
        del buffer[:offset]
        return messages

    async def _fill(self) -> None:
        try:
            received = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            received = b""
        if not received:
            msg = "the peer closed the connection"
            raise ConnectionLost(msg)
        self._buffer += received

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


class Cipher(Protocol):
    """The state of an encrypted connection: each call counts."""

    def encrypt(self, data: bytes, /) -> bytes:
        """The next message to send, for at most MAX_PLAINTEXT_BYTES."""
        ...

    def decrypt(self, data: bytes, /) -> bytes:
        """What the next received message holds; raises when it is not genuine."""
        ...


class SecureChannel:
    """An encrypted connection to an authenticated peer."""

    def __init__(self, channel: RawChannel, cipher: Cipher, peer: NodeId) -> None:
        """`channel` after the handshake that `cipher` and `peer` come from."""
        self._channel = channel
        self._cipher = cipher
        self._received = bytearray()
        self._fault = ""
        self.peer = peer

    async def receive(self) -> bytearray:
        """What has come: a byte at least, two Noise messages of the largest size at most. Raises ConnectionLost."""
        if not self._received:
            await self._fill()
        received, self._received = self._received, bytearray()
        return received

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes. Raises ConnectionLost."""
        while len(self._received) < count:
            await self._fill()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    async def _fill(self) -> None:
        """Receive something. What is genuine is delivered first, however the stream was cut; then all is over."""
        before = len(self._received)
        for message in () if self._fault else await self._channel.read_messages():
            try:
                plaintext = self._cipher.decrypt(message)
            except Exception:  # noqa: BLE001 - whatever the cipher finds, nothing behind it is the peer's
                self._fault = "the peer sent a message that is not genuine"
                break
            if not plaintext:
                self._fault = "the peer sent an empty message"
                break
            self._received += plaintext
        if len(self._received) == before:
            raise ConnectionLost(self._fault)

    async def write(self, data: bytes) -> None:
        """Send bytes, split into Noise messages as needed. Raises ConnectionLost."""
        messages = bytearray()
        for offset in range(0, len(data), MAX_PLAINTEXT_BYTES):
            message = self._cipher.encrypt(data[offset : offset + MAX_PLAINTEXT_BYTES])
            messages += len(message).to_bytes(LENGTH_BYTES, "big")
            messages += message
        await self._channel.write(bytes(messages))

    async def close(self) -> None:
        """Close the connection underneath."""
        await self._channel.close()


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
        return _authenticated(channel, await self._noise.get_pattern().handshake_outbound(channel, expected))

    async def secure_inbound(self, stream: ByteStream) -> SecureChannel:
        """Encrypt a connection that a peer dialled; raises LocalError when its key is not Ed25519."""
        channel = RawChannel(stream, is_initiator=False)
        await select_inbound(channel, (str(NOISE),))
        return _authenticated(channel, await self._noise.get_pattern().handshake_inbound(channel))


def _authenticated(channel: RawChannel, connection: ISecureConn) -> SecureChannel:
    cipher = cast("NoiseTransportReadWriter", cast("SecureSession", connection).conn)
    return SecureChannel(channel, cipher, NodeId.from_peer_id(connection.get_remote_peer().to_bytes()))
