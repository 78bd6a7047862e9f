"""Catching up on a topic: whom to ask when, what to fetch, whom not to ask again, and how much to give. Pure.

Gossip loses messages: to full queues, to partitions, to nodes that join late. So each node asks one neighbour at a
time what its log has since last time, and fetches what it has not seen. Time is in seconds of any steady clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.protocol.catchup import MAX_FETCH, NO_EPOCH, News, Since
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.wire import Malformed

PULL_S: Final = 5.0
"""Seconds between two questions, give or take half of it, while they bring something."""
MAX_PULL_S: Final = 15.0
"""The same after several that brought nothing: a quarter of an offer's life."""
PULL_GROWTH: Final = 1.5
"""Factor from one to the other."""
NEWCOMER_GAP_S: Final = 1.0
"""Seconds between questions to new neighbours, which are asked at once otherwise: many may come together."""
MIN_QUIET_S: Final = 10.0
"""Seconds for which a neighbour that failed us is left alone; doubled each time."""
MAX_QUIET_S: Final = 600.0
"""Longest such time, seconds."""
MAX_NEIGHBOURS: Final = 512
"""Neighbours whose logs we remember our place in: as many as a node has connections."""

EXCHANGES_PER_S: Final = 1.0
"""Questions that one neighbour may ask on average; an honest one asks a fifth of it."""
EXCHANGES_BURST: Final = 16.0
"""Questions at once: a whole log in pages, twice over."""
BYTES_PER_S: Final = 128 * 1024.0
"""Messages that one neighbour may fetch on average, bytes a second."""
BYTES_BURST: Final = 4 * 1024 * 1024.0
"""Messages at once, bytes: a whole log twice over."""


@dataclass(slots=True)
class _Neighbour:
    epoch: bytes = NO_EPOCH
    sequence: int = 0
    failures: int = 0
    quiet_until: float = 0.0


class CatchUp:
    """One node's place in its neighbours' logs of one topic."""

    def __init__(self, random: Random) -> None:
        """`random` picks neighbours and moments."""
        self._random = random
        self._neighbours: OrderedDict[NodeId, _Neighbour] = OrderedDict()
        self._asked: set[NodeId] = set()
        self._pause = PULL_S
        self._last = float("-inf")
        self._due = float("-inf")

    def next_peer(self, peers: Sequence[NodeId], now: float) -> NodeId | None:
        """Whom of the topic's connected peers to ask now, if anybody: a new one soon, else any when it is time."""
        self._asked.intersection_update(peers)
        ready = [peer for peer in peers if self._quiet_until(peer) <= now]
        new = [peer for peer in ready if peer not in self._asked]
        if new and now - self._last >= NEWCOMER_GAP_S:
            chosen = self._random.choice(new)
        elif ready and now >= self._due:
            chosen = self._random.choice(ready)
        else:
            return None
        self._asked.add(chosen)
        self._last = now
        self._schedule(now)
        return chosen

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
        between, or never existed.
        """
        neighbour = self._neighbour(peer)
        neighbour.epoch, neighbour.sequence = news.epoch, news.sequence
        if wanted and not fetched:
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
        """Whether a neighbour may ask another question."""
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
