"""The streams that DHT queries go over, kept open for a while: over a new one, a query costs three times as much.

go-libp2p keeps one for each peer, too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import trio

from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.upstream import KademliaMessage as Message
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import NodeId

KEEP_SECONDS: Final = 10.0
"""A stream without a query for this long is closed, seconds: well before the peer ends it."""
MAX_KEPT: Final = 128
"""Streams kept without a query; above, the one that has waited longest is closed. A lookup asks some sixty peers."""


@dataclass(frozen=True, slots=True)
class _Kept:
    stream: YamuxStream
    """On which everything asked was answered."""
    until: float
    """When it is closed, in trio's time."""


class QueryStreams:
    """One kept stream for each peer that was asked of late."""

    def __init__(self, host: Host, protocol: str, max_answer: int) -> None:
        """`max_answer`: longest answer, bytes."""
        self._host = host
        self._protocol = protocol
        self._max_answer = max_answer
        self._kept: OrderedDict[NodeId, _Kept] = OrderedDict()
        """The one that is closed first comes first."""
        self._has_kept = trio.Event()

    async def run(self) -> None:
        """Close what nobody needs any more, until cancelled."""
        while True:
            first = next(iter(self._kept.values()), None)
            if first is None:
                self._has_kept = trio.Event()
                await self._has_kept.wait()
            elif first.until > trio.current_time():
                await trio.sleep_until(first.until)
            else:
                self._kept.popitem(last=False)
                first.stream.close()

    def drop(self, peer: NodeId) -> None:
        """Close what is kept to a peer: another connection to it is better."""
        if (kept := self._kept.pop(peer, None)) is not None:
            kept.stream.close()

    async def ask(self, peer: NodeId, requests: list[Message]) -> Message:
        """The one answer to requests that do nothing more when they come twice.

        Raises PeerUnreachable, EndOfStream, StreamReset; VarintError, DecodeError for what is no message.
        """
        data = b"".join(prefixed(request.SerializeToString()) for request in requests)
        if (kept := self._kept.pop(peer, None)) is not None:
            try:
                answer = await self._exchange(peer, kept.stream, data, requests[-1])
            except (EndOfStream, StreamReset):
                # The peer need not keep it as long as we do.
                pass
            else:
                # What it sent too much before would be taken for the answer otherwise.
                if _is_answer(answer, requests[-1]):
                    return answer
        stream = await self._host.open_stream(peer, self._protocol, eager=True)
        return await self._exchange(peer, stream, data, requests[-1])

    async def _exchange(self, peer: NodeId, stream: YamuxStream, data: bytes, last: Message) -> Message:
        is_good = False
        try:
            await stream.write(data)
            answer = Message.FromString(await read_prefixed(stream, self._max_answer))
            is_good = _is_answer(answer, last)
            return answer
        finally:
            # After a query that was given up, its answer would be taken for that to the next.
            if is_good and peer not in self._kept:
                self._keep(peer, stream)
            else:
                stream.close()

    def _keep(self, peer: NodeId, stream: YamuxStream) -> None:
        self._kept[peer] = _Kept(stream, trio.current_time() + KEEP_SECONDS)
        self._has_kept.set()
        if len(self._kept) > MAX_KEPT:
            _, oldest = self._kept.popitem(last=False)
            oldest.stream.close()


def _is_answer(answer: Message, request: Message) -> bool:
    return answer.type == request.type and answer.key == request.key
