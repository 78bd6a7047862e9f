"""Comparing our clock with those of connected peers: every node tells its time to whoever asks.

An answer comes over the peer's authenticated connection, so nobody in between can change it. A peer may lie, which is
why the median of several counts, and why it is only shown to the user: no clock is ever set by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.network.api import Network, Stream, StreamHandler
from aci_p2p.protocol.errors import AciError, RemoteError
from aci_p2p.protocol.identity import NodeId

CLOCK_PROTOCOL: Final = "/aci/clock/1.0.0"
"""Stream protocol id: an empty frame, answered by Unix milliseconds in TIME_BYTES bytes, the highest first."""
TIME_BYTES: Final = 8
"""Bytes of an answer: a time until long after the sun."""
MAX_ASKED: Final = 8
"""Peers asked at once: a majority of liars among them is unlikely, and nobody is bothered."""
ANSWER_S: Final = 5.0
"""Seconds for an answer; a question may have to wait as long."""


@dataclass(frozen=True, slots=True)
class ClockReading:
    """How a peer's clock differs from ours."""

    peer: NodeId
    """Whose clock."""
    ahead_ms: float
    """Milliseconds that it is ahead of ours, give or take half the round trip."""
    round_trip_ms: float
    """Milliseconds from the question to the answer."""


def clock_service(clock: Clock) -> StreamHandler:
    """Answers one question: what time it is."""

    async def answer(stream: Stream) -> None:
        with trio.move_on_after(ANSWER_S):
            if not await stream.receive():
                await stream.send(clock().to_bytes(TIME_BYTES))

    return answer


async def read_peer_clocks(network: Network, clock: Clock) -> list[ClockReading]:
    """Ask MAX_ASKED connected peers at most; those that do not answer in time are left out."""
    readings: list[ClockReading] = []

    async def ask(peer: NodeId) -> None:
        try:
            with trio.move_on_after(ANSWER_S):
                readings.append(await _read(network, peer, clock))
        except AciError:
            # It is gone, does not know the question, or answers nonsense: others are asked as well.
            return

    async with trio.open_nursery() as nursery:
        for peer in network.peers[:MAX_ASKED]:
            nursery.start_soon(ask, peer)
    return readings


def median_ahead_ms(readings: Sequence[ClockReading]) -> float:
    """How far most peers are ahead of us, milliseconds; half of them may lie. There is at least one."""
    return median(reading.ahead_ms for reading in readings)


async def _read(network: Network, peer: NodeId, clock: Clock) -> ClockReading:
    """Raises AciError when the peer does not tell."""
    async with network.open_stream(peer, CLOCK_PROTOCOL) as stream:
        # Opening took a round trip of its own, which must not count.
        asked, started = clock(), trio.current_time()
        await stream.send(b"")
        answer = await stream.receive()
        round_trip_ms = (trio.current_time() - started) * 1_000
    if len(answer) != TIME_BYTES:
        msg = f"{len(answer)} bytes are no time"
        raise RemoteError(msg)
    return ClockReading(peer, int.from_bytes(answer) - asked - round_trip_ms / 2, round_trip_ms)
