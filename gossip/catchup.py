"""Catching up on a topic: whom to ask when, what to fetch, whom not to ask again, and how much to give. Pure.

Gossip loses messages: to full queues, to partitions, to nodes that join late. So each node tells some neighbours when
its log has grown, and asks one at a time what its log has since last time, and fetches what it has not seen: a new
neighbour at once, one that is ahead soon, and any now and then, the less often the longer nothing is new. Time is in
seconds of any steady clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Final

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.protocol.catchup import MAX_FETCH, NO_EPOCH, Head, News, Since
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.wire import Malformed

PULL_S: Final = 5.0
"""Seconds between two questions, give or take half of it, while they bring something."""
BUSY_PULL_S: Final = 15.0
"""The same while gossip brings messages: a quarter of an offer's life."""
MAX_PULL_S: Final = 7_200.0
"""The same after many that brought nothing: who misses something is told of it anyway, by neighbours that have it."""
PULL_GROWTH: Final = 3.0
"""Factor from one to the next that brings nothing."""
NEWCOMER_GAP_S: Final = 1.0
"""Seconds between questions to new neighbours and to those that are ahead, asked at once otherwise: many may be."""
ANNOUNCE_DELAY_S: Final = 2.0
"""Seconds from a message to the announcement of our log, give or take half of it: gossip is faster where it works."""
ANNOUNCE_GAP_S: Final = 8.0
"""Seconds from one announcement to the next."""
ANNOUNCE_TO: Final = 4
"""Neighbours that hear it. With as many from all sides, one in fifty nodes that missed a message is told by nobody, and
learns of it from the next."""
MIN_QUIET_S: Final = 10.0
"""Seconds for which a neighbour that failed us is left alone; doubled each time."""
MAX_QUIET_S: Final = 600.0
"""Longest such time, seconds."""
MAX_NEIGHBOURS: Final = 512
"""Neighbours whose logs we remember our place in: as many as a node has connections."""

EXCHANGES_PER_S: Final = 1.0
"""Questions and announcements of one neighbour on average; an honest one makes a third of it."""
EXCHANGES_BURST: Final = 16.0
"""The same at once: a whole log in pages, twice over."""
BYTES_PER_S: Final = 128 * 1024.0
"""Messages that one neighbour may fetch on average, bytes a second."""
BYTES_BURST: Final = 4 * 1024 * 1024.0
"""Messages at once, bytes: a whole log twice over."""


@dataclass(slots=True)
class _Neighbour:
    epoch: bytes = NO_EPOCH
    sequence: int = 0
    promised: int = 0
    """What it said is the latest number in its epoch, when that made us ask."""
    failures: int = 0
    quiet_until: float = 0.0


class CatchUp:
    """One node's place in its neighbours' logs of one topic."""

    def __init__(self, random: Random) -> None:
        """`random` picks neighbours and moments."""
        self._random = random
        self._neighbours: OrderedDict[NodeId, _Neighbour] = OrderedDict()
        self._asked: set[NodeId] = set()
        self._ahead: set[NodeId] = set()
        self._pause = PULL_S
        self._last = float("-inf")
        self._due = float("-inf")

    def next_peer(self, peers: Sequence[NodeId], now: float) -> NodeId | None:
        """Whom of the topic's connected peers to ask now, if anybody: new ones, those ahead, others in time."""
        self._asked.intersection_update(peers)
        self._ahead.intersection_update(peers)
        ready = [peer for peer in peers if self._quiet_until(peer) <= now]
        new = [peer for peer in ready if self._is_urgent(peer)]
        if new and now >= self._last + NEWCOMER_GAP_S:
            chosen = self._random.choice(new)
        elif ready and now >= self._due:
            chosen = self._random.choice(ready)
        else:
            return None
        self._asked.add(chosen)
        self._ahead.discard(chosen)
        self._last = now
        self._schedule(now)
        return chosen

    def next_due(self, peers: Sequence[NodeId]) -> float:
        """When there is somebody to ask, seconds, unless something changes before; `inf` for never."""
        urgent = [self._quiet_until(peer) for peer in peers if self._is_urgent(peer)]
        every = [self._quiet_until(peer) for peer in peers]
        return min(max(self._last + NEWCOMER_GAP_S, min(urgent, default=inf)), max(self._due, min(every, default=inf)))

    def _is_urgent(self, peer: NodeId) -> bool:
        return peer not in self._asked or peer in self._ahead

    def heard(self, now: float) -> bool:
        """Gossip has brought a message, so there may be others; whether the next question comes sooner for it."""
        if self._pause <= BUSY_PULL_S:
            return False
        self._pause = BUSY_PULL_S
        before = self._due
        self._schedule(now)
        self._due = min(before, self._due)
        return self._due < before

    def told(self, peer: NodeId, head: Head, is_known: Callable[[bytes], bool]) -> bool:
        """A neighbour says how far its log is; whether that makes us ask it, soon."""
        neighbour = self._neighbour(peer)
        missing = head.sequence - neighbour.sequence if head.epoch == neighbour.epoch else head.sequence
        if missing <= 0:
            return False
        if missing <= len(head.latest) and all(map(is_known, head.latest[-missing:])):
            neighbour.epoch, neighbour.sequence = head.epoch, head.sequence
            return False
        neighbour.promised = head.sequence
        self._ahead.add(peer)
        return True

    def request(self, peer: NodeId) -> Since:
        """What to ask a neighbour."""
        neighbour = self._neighbours.get(peer, _Neighbour())
        return Since(neighbour.epoch, neighbour.sequence)

    def judge(self, request: Since, news: News) -> None:
        """Check an answer against what was asked. Raises Malformed when no honest log gives it."""
        after = request.sequence if news.epoch == request.epoch else 0
        fault = (
            "goes back in its own epoch" if news.sequence < after
            else "is ahead of its log" if news.sequence > news.head
            else "has more messages than numbers" if len(news.identifiers) > news.sequence - after
            else "names a message twice" if len(set(news.identifiers)) < len(news.identifiers)
            else "ends without reason" if news.head > news.sequence and not news.identifiers
            else ""
        )  # fmt: skip
        if fault:
            msg = f"the answer {fault}"
            raise Malformed(msg)

    def batches(self, news: News, is_known: Callable[[bytes], bool]) -> list[tuple[bytes, ...]]:
        """The ids to fetch, MAX_FETCH at a time, the oldest first."""
        wanted = [identifier for identifier in news.identifiers if not is_known(identifier)]
        return [tuple(wanted[start : start + MAX_FETCH]) for start in range(0, len(wanted), MAX_FETCH)]

    def succeeded(self, peer: NodeId, news: News, *, wanted: int, fetched: int, now: float) -> None:
        """An exchange came to its end: `wanted` messages were new to us, `fetched` of them came.

        A neighbour that announces and then has nothing is left alone for a while: its messages may have expired in
        between, or never existed; nor is a log shorter than it was said to be, unless its node has started again.
        """
        neighbour = self._neighbour(peer)
        neighbour.epoch, neighbour.sequence = news.epoch, news.sequence
        promised, neighbour.promised = neighbour.promised, 0
        if (wanted and not fetched) or news.head < promised:
            self._leave_alone(neighbour, now)
            return
        neighbour.failures = 0
        self._pause = PULL_S if fetched else min(self._pause * PULL_GROWTH, MAX_PULL_S)
        self._schedule(now)

    def failed(self, peer: NodeId, now: float) -> None:
        """An exchange broke off; what it has brought so far stays, and its place in the log is as before."""
        self._leave_alone(self._neighbour(peer), now)

    def _leave_alone(self, neighbour: _Neighbour, now: float) -> None:
        neighbour.quiet_until = now + min(MIN_QUIET_S * 2**neighbour.failures, MAX_QUIET_S)
        neighbour.failures = min(neighbour.failures + 1, 16)

    def _schedule(self, now: float) -> None:
        self._due = now + self._pause * self._random.uniform(0.5, 1.5)

    def _quiet_until(self, peer: NodeId) -> float:
        neighbour = self._neighbours.get(peer)
        return neighbour.quiet_until if neighbour else float("-inf")

    def _neighbour(self, peer: NodeId) -> _Neighbour:
        neighbour = self._neighbours.setdefault(peer, _Neighbour())
        self._neighbours.move_to_end(peer)
        if len(self._neighbours) > MAX_NEIGHBOURS:
            self._neighbours.popitem(last=False)
        return neighbour


class Quotas:
    """How much of a log each neighbour may still ask for."""

    def __init__(self) -> None:
        self._quotas: OrderedDict[NodeId, tuple[TokenBucket, TokenBucket]] = OrderedDict()

    def take_exchange(self, peer: NodeId, now: float) -> bool:
        """Whether a neighbour may ask another question, or announce its log."""
        exchanges, _ = self._quota(peer, now)
        return exchanges.take(1, now)

    def take_bytes(self, peer: NodeId, size: int, now: float) -> bool:
        """Whether a neighbour may have another `size` bytes of messages."""
        _, payload = self._quota(peer, now)
        return payload.take(size, now)

    def _quota(self, peer: NodeId, now: float) -> tuple[TokenBucket, TokenBucket]:
        quota = self._quotas.get(peer)
        if quota is None:
            exchanges = TokenBucket.full(EXCHANGES_PER_S, EXCHANGES_BURST, now)
            quota = self._quotas[peer] = exchanges, TokenBucket.full(BYTES_PER_S, BYTES_BURST, now)
        self._quotas.move_to_end(peer)
        if len(self._quotas) > MAX_NEIGHBOURS:
            self._quotas.popitem(last=False)
        return quota
