"""Gossip bookkeeping that every implementation of the seam shares: judging, deduplication, bounded delivery."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict, deque

import trio

from aci_p2p.network.api import MAX_GOSSIP_BYTES, GossipMessage, GossipValidator, Subscription
from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.limits import (
    MAX_KNOWN_PEERS,
    MAX_REJECTS_PER_MINUTE,
    MAX_SEEN,
    REJECT_WINDOW_SECONDS,
    SEEN_SECONDS,
)
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Reason, Validation
from aci_p2p.tasks import Notice

PATIENCE_PER_SECOND = 0.1
"""Share of their time that readers may wait for slow consumers of a topic."""
MAX_PATIENCE_SECONDS = 1.0
"""Longest that they wait for one at a time, seconds: some turns of the event loop on a machine that has ten times more
to do than it can."""

log = logging.getLogger("aci_p2p.network")


def message_id(topic: str, data: bytes) -> bytes:
    """What makes a gossip message the same message: SHA-256 over its topic and payload, 32 bytes."""
    return hashlib.sha256(topic.encode() + b"\0" + data).digest()


class QueuedSubscription(Subscription):
    """A bounded queue of validated messages of one topic; when full, the oldest makes room.

    Readers of neighbours wait for a full queue with `wait_for_room`, but only a little, and only while its consumer
    takes messages: a burst passes undiminished, and one slow consumer does not stop the gossip of all topics.
    """

    def __init__(self, validator: GossipValidator, capacity: int) -> None:
        """`capacity`: messages queued at most."""
        self.validator = validator
        self._messages: deque[GossipMessage] = deque(maxlen=capacity)
        self._dropped = 0
        self._arrived = trio.Event()
        self._taken = Notice()
        self._patience = TokenBucket.full(PATIENCE_PER_SECOND, MAX_PATIENCE_SECONDS, 0.0)
        self._waited_until = 0.0
        self._is_consumed = False

    @property
    def is_full(self) -> bool:
        """Whether another message would cost the oldest."""
        return len(self._messages) == self._messages.maxlen

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether it is full, but its consumer takes messages."""
        return self._is_consumed and self.is_full

    @property
    def is_crowded(self) -> bool:
        """Whether its consumer should have a turn before more is delivered."""
        capacity = self._messages.maxlen
        return capacity is not None and 2 * len(self._messages) >= capacity

    async def wait_for_room(self) -> None:
        """Wait until there is room for a message, for as long as we have patience."""
        while self.is_worth_waiting_for:
            started = trio.current_time()
            self._patience.refill(started)
            with trio.move_on_after(max(self._patience.level, 0.0)) as scope:
                await self._taken.wait()
            # What several readers wait together counts once.
            ended = trio.current_time()
            self._patience.level -= max(ended - max(started, self._waited_until), 0.0)
            self._waited_until = ended
            if scope.cancelled_caught:
                # The time may have gone to other processes: the consumer has had no turn yet.
                await trio.lowlevel.checkpoint()
                self._is_consumed = not self.is_full

    @property
    def dropped(self) -> int:
        return self._dropped

    def deliver(self, message: GossipMessage) -> bool:
        """Queue a message; False when an older one was lost to make room."""
        full = self.is_full
        self._dropped += full
        self._messages.append(message)
        self._arrived.set()
        return not full

    async def receive(self) -> GossipMessage:
        await trio.lowlevel.checkpoint()
        while not self._messages:
            self._arrived = trio.Event()
            await self._arrived.wait()
        self._is_consumed = True
        self._taken.notify()
        return self._messages.popleft()


def judge(validator: GossipValidator, forwarder: NodeId, data: bytes) -> Validation:
    """Run a validator contained: one that raises has a bug, and the message is ignored."""
    if len(data) > MAX_GOSSIP_BYTES:
        return Validation(Decision.REJECT, Reason.TOO_LARGE)
    try:
        return validator(forwarder, data)
    except Exception:
        log.exception("the validator failed on a message of %d bytes from %s", len(data), forwarder.short)
        return Validation(Decision.IGNORE, Reason.VALIDATOR_FAILED)


class SeenCache:
    """Message ids seen lately, at most MAX_SEEN, for SEEN_SECONDS each."""

    def __init__(self) -> None:
        self._expiry: OrderedDict[bytes, float] = OrderedDict()

    def add(self, message_id: bytes, now: float) -> bool:
        """Remember an id at time `now`, seconds; False when it is already known."""
        while self._expiry and (len(self._expiry) > MAX_SEEN or next(iter(self._expiry.values())) <= now):
            self._expiry.popitem(last=False)
        if message_id in self._expiry:
            return False
        self._expiry[message_id] = now + SEEN_SECONDS
        return True

    def __contains__(self, message_id: bytes) -> bool:
        return message_id in self._expiry


class GossipJournal:
    """Counts what happened to gossip, and which forwarder has sent too much that had to be rejected."""

    def __init__(self) -> None:
        self.accepted = 0
        self.dropped = 0
        self.refused: Counter[str] = Counter()
        self._rejects: OrderedDict[NodeId, deque[float]] = OrderedDict()

    def refuse(self, forwarder: NodeId, validation: Validation) -> bool:
        """Count a refusal; True when the forwarder has now had its REJECTs of the minute and is to be disconnected."""
        self.refused[str(validation.reason)] += 1
        if validation.decision is not Decision.REJECT:
            return False
        now = trio.current_time()
        times = self._rejects.setdefault(forwarder, deque(maxlen=MAX_REJECTS_PER_MINUTE))
        times.append(now)
        self._rejects.move_to_end(forwarder)
        if len(self._rejects) > MAX_KNOWN_PEERS:
            self._rejects.popitem(last=False)
        return len(times) == MAX_REJECTS_PER_MINUTE and times[0] > now - REJECT_WINDOW_SECONDS
