"""Frames on a yamux stream: unsigned varint length, then that many bytes."""

from __future__ import annotations

from aci_p2p.network.api import MAX_FRAME_BYTES, Stream, StreamClosed
from aci_p2p.network.checks import check_frame
from aci_p2p.network.libp2p.varint import VarintError, prefixed, split_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import NodeId

READ_BYTES = 64 << 10
"""Taken from the muxer at once, bytes."""


class FramedStream(Stream):
    """The seam's stream over a yamux stream."""

    def __init__(self, peer: NodeId, raw: YamuxStream) -> None:
        self._peer = peer
        self._raw = raw
        self._received = bytearray()

    @property
    def peer(self) -> NodeId:
        return self._peer

    async def send(self, frame: bytes) -> None:
        check_frame(frame)
        try:
            await self._raw.write(prefixed(frame))
        except StreamReset:
            msg = f"{self._peer.short} closed the stream"
            raise StreamClosed(msg) from None
        except BaseException:
            # Cancelled in the middle of a frame: whatever followed would be read as part of it.
            self._raw.reset()
            raise

    async def receive(self) -> bytes:
        try:
            # A cancelled read loses nothing: what has arrived of the frame stays in the buffer.
            while (frame := split_prefixed(self._received, MAX_FRAME_BYTES)) is None:
                self._received += await self._raw.read(READ_BYTES)
        except EndOfStream:
            msg = f"{self._peer.short} ended the stream"
            raise StreamClosed(msg) from None
        except StreamReset:
            msg = f"{self._peer.short} reset the stream"
            raise StreamClosed(msg) from None
        except VarintError as error:
            self._raw.reset()
            msg = f"{self._peer.short} sent a bad frame: {error}"
            raise StreamClosed(msg) from None
        return frame
