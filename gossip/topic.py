"""A topic of signed envelopes: broadcast by gossip, and what gossip loses is fetched from neighbours' logs.

Each node keeps a log of what it has accepted or published (`log`), serves it, tells some neighbours when it has grown,
and asks what it has missed: each new neighbour at once, those that are ahead soon, any now and then (`catchup`).
Whatever way a message comes, it passes the same check and is delivered once. What is fetched is not broadcast again:
the others fetch it too. While nothing is new, next to nothing happens.
"""

from __future__ import annotations

import heapq
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Final, Generic, Self, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.gossip.catchup import ANNOUNCE_DELAY_S, ANNOUNCE_GAP_S, ANNOUNCE_TO, CatchUp, Quotas
from aci_p2p.gossip.flooding import FloodWitness
from aci_p2p.gossip.inbox import Inbox
from aci_p2p.gossip.log import TopicLog
from aci_p2p.network import Network, PeerUnreachable, Stream, StreamClosed, Subscription
from aci_p2p.network.delivery import message_id
from aci_p2p.protocol.catchup import (
    EPOCH_BYTES,
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    Fetch,
    Fetched,
    Head,
    News,
    Since,
    decode,
    encode,
)
from aci_p2p.protocol.cbor import CborError
from aci_p2p.protocol.envelope import Envelope, header_of
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.replay import MAX_PER_SENDER
from aci_p2p.protocol.validation import ACCEPTED, Decision, MessageRefused, Reason, Validation
from aci_p2p.protocol.wire import Malformed
from aci_p2p.tasks import Notice, open_background

PROTOCOL_PREFIX: Final = "/aci/catch-up/1.0.0"
"""Stream protocol id of a topic's log, followed by the topic's name."""
HEAD_PROTOCOL_PREFIX: Final = "/aci/log-head/1.0.0"
"""Stream protocol id of announcements of a topic's log, followed by the topic's name."""
MAX_CHECKED: Final = 2_048
"""Checked messages on their way from gossip to the inbox, where they wait only while the machine is busy: as many as
four authors may have."""
MAX_REMEMBERED: Final = 16_384
"""Messages of a topic remembered as delivered until they expire: four times the log."""
MAX_PUBLISHED: Final = MAX_PER_SENDER * 3 // 4
"""Live messages that we publish ourselves; a quarter less than others allow us, since clocks differ."""
MAX_REFUSED: Final = 1_024
"""Ids remembered of messages that the check refused, so that they are not fetched again."""
MAX_PAGES: Final = 8
"""Answers of one neighbour read in a row: a whole log."""
ANSWER_S: Final = 5.0
"""Time for a neighbour to answer, seconds; it has the messages in memory."""
TURN_S: Final = 15.0
"""Time for all answers of one neighbour in a row, seconds: while it takes them, no other is asked."""
REQUEST_S: Final = 30.0
"""Time for a neighbour to ask its next question, seconds: it checks signatures in between."""

_MALFORMED: Final = Validation(Decision.REJECT, Reason.MALFORMED)

T = TypeVar("T")
A = TypeVar("A", News, Fetched)
Check = Callable[[bytes, int], Envelope[T]]
"""Checks a message and opens its envelope: (payload, Unix milliseconds); raises MessageRefused."""

log = logging.getLogger("aci_p2p.gossip")


@dataclass(frozen=True, slots=True)
class TopicStatistics:
    """A snapshot of a topic's queue and log."""

    waiting: int
    """Messages not yet taken by the consumer."""
    dropped: int
    """Messages lost because the consumer lagged."""
    log_messages: int
    """Messages in the log."""
    log_bytes: int
    """Their payload, bytes."""
    exchanges: int
    """Questions that we have asked neighbours."""
    failed_exchanges: int
    """Those that a neighbour did not answer to the end."""
    caught_up: int
    """Messages that gossip had not brought and that were fetched and accepted."""
    served: int
    """Messages that neighbours have fetched from us."""


class Topic(Generic[T]):
    """One topic of one node. Made by `open_topic`."""

    def __init__(
        self, network: Network, name: str, check: Check[T], clock: Clock, *, inbox: Inbox[Envelope[T]], random: Random
    ) -> None:
        """See `open_topic`."""
        self._network = network
        self.name = name
        self._check = check
        self._clock = clock
        self._log = TopicLog(random.randbytes(EPOCH_BYTES))
        self._random = random
        self._catchup = CatchUp(random)
        self._quotas = Quotas()
        self._witness = FloodWitness()
        self._own_expiries: list[int] = []
        self._remembered: OrderedDict[bytes, int] = OrderedDict()
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self._checked: OrderedDict[bytes, Envelope[T]] = OrderedDict()
        self._inbox = inbox
        self._log_grew = Notice()
        self._look = Notice()
        self._exchanges = self._failed_exchanges = self._caught_up = self._served = 0

    async def publish(self, envelope: Envelope[T]) -> None:
        """Broadcast a message of ours, and keep it for those who miss it. Our own topic does not deliver it.

        Raises ResourceError while MAX_PUBLISHED of ours have not expired: more would be refused, and held against us.
        """
        now = self._clock()
        while self._own_expiries and self._own_expiries[0] <= now:
            heapq.heappop(self._own_expiries)
        if len(self._own_expiries) >= MAX_PUBLISHED:
            msg = f"{len(self._own_expiries)} messages of ours are out on {self.name} already"
            raise ResourceError(msg, hint="wait until some of them expire, or run another node")
        heapq.heappush(self._own_expiries, envelope.header.expires_at)
        self._remember(message_id(self.name, envelope.data), envelope)
        await self._network.publish(self.name, envelope.data)

    async def receive(self) -> Envelope[T]:
        """Wait for the next message."""
        return await self._inbox.receive()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope[T]:
        return await self.receive()

    def statistics(self) -> TopicStatistics:
        """A snapshot of queue and log."""
        self._log.trim(self._clock())
        return TopicStatistics(
            waiting=len(self._inbox),
            dropped=self._inbox.dropped,
            log_messages=len(self._log),
            log_bytes=self._log.payload_bytes,
            exchanges=self._exchanges,
            failed_exchanges=self._failed_exchanges,
            caught_up=self._caught_up,
            served=self._served,
        )

    def validate(self, forwarder: NodeId, data: bytes) -> Validation:
        """Judge a message that gossip brings (a `GossipValidator`)."""
        identifier = message_id(self.name, data)
        if self._is_remembered(identifier):
            # Gossip brings late what was fetched from a log; its forwarder may not know.
            return Validation(Decision.IGNORE, Reason.REPLAYED)
        try:
            envelope = self._check(data, self._clock())
        except MessageRefused as error:
            self._refuse(identifier)
            return self._blame(forwarder, data, error.validation)
        self._remember(identifier, envelope)
        if self._catchup.heard(trio.current_time()):
            self._look.notify()
        self._checked[identifier] = envelope
        if len(self._checked) > MAX_CHECKED:
            # As many as the subscription can hold; older ones were dropped there too.
            self._checked.popitem(last=False)
        return ACCEPTED

    def _blame(self, forwarder: NodeId, data: bytes, validation: Validation) -> Validation:
        """A forwarder may have seen less of an author who floods; not so the author, nor who brings too much."""
        if validation.reason is Reason.FLOODED:
            header = header_of(data)
            if header.sender == forwarder or self._witness.is_flooding(forwarder, header, self._clock()):
                return Validation(Decision.REJECT, Reason.FLOODED)
        return validation

    async def deliver(self, subscription: Subscription) -> None:
        """Hand what gossip has brought to the consumer, until cancelled."""
        async for message in subscription:
            envelope = self._checked.pop(message_id(self.name, message.data), None)
            if envelope is not None:
                self._inbox.put(envelope)

    def _remember(self, identifier: bytes, envelope: Envelope[T]) -> None:
        now, expires_at = self._clock(), envelope.header.expires_at
        self._log.add(identifier, envelope.data, expires_at, now)
        self._log_grew.notify()
        self._remembered[identifier] = expires_at
        while len(self._remembered) > MAX_REMEMBERED or next(iter(self._remembered.values()), now + 1) <= now:
            self._remembered.popitem(last=False)

    def _is_remembered(self, identifier: bytes) -> bool:
        expires_at = self._remembered.get(identifier)
        return expires_at is not None and expires_at > self._clock()

    def _refuse(self, identifier: bytes) -> None:
        self._refused[identifier] = None
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    # Serving our log.

    async def serve(self, stream: Stream) -> None:
        """Answer a neighbour's questions about our log, within its quotas (a `StreamHandler`)."""
        peer = stream.peer
        if not self._quotas.take_exchange(peer, trio.current_time()):
            return
        try:
            with trio.fail_after(REQUEST_S):
                request = decode(Since, await stream.receive(), max_bytes=MAX_REQUEST_BYTES)
                await stream.send(encode(self._log.since(request, self._clock())))
            while True:
                with trio.fail_after(REQUEST_S):
                    fetch = decode(Fetch, await stream.receive(), max_bytes=MAX_REQUEST_BYTES)
                    if not await self._serve_fetch(stream, fetch):
                        return
        except trio.TooSlowError:
            log.debug("%s asks about %s and falls asleep", peer.short, self.name)
        except (CborError, Malformed):
            await self._network.report(peer, self.name, _MALFORMED)

    async def _serve_fetch(self, stream: Stream, fetch: Fetch) -> bool:
        """Send messages; False when their asker has had its share."""
        found = (self._log.get(identifier, self._clock()) for identifier in fetch.identifiers)
        messages = tuple(data for data in found if data is not None)
        if not self._quotas.take_bytes(stream.peer, sum(map(len, messages)), trio.current_time()):
            return False
        await stream.send(encode(Fetched(messages)))
        self._served += len(messages)
        return True

    # Telling neighbours how far our log is.

    async def announce(self) -> None:
        """Tell some neighbours when our log has grown, until cancelled."""
        told = 0
        while True:
            while self._log.sequence == told:
                await self._log_grew.wait()
            await trio.sleep(ANNOUNCE_DELAY_S * self._random.uniform(0.5, 1.5))
            head, peers = self._log.head(), self._network.topic_peers(self.name)
            told = head.sequence
            for peer in self._random.sample(peers, min(ANNOUNCE_TO, len(peers))):
                await self._tell(peer, head)
            await trio.sleep(ANNOUNCE_GAP_S)

    async def _tell(self, peer: NodeId, head: Head) -> None:
        with trio.move_on_after(ANSWER_S):
            try:
                async with self._network.open_stream(peer, HEAD_PROTOCOL_PREFIX + self.name) as stream:
                    await stream.send(encode(head))
            except (StreamClosed, PeerUnreachable):
                log.debug("%s cannot be told about %s", peer.short, self.name, exc_info=True)

    async def hear(self, stream: Stream) -> None:
        """Take note of how far a neighbour's log is (a `StreamHandler`)."""
        peer = stream.peer
        if not self._quotas.take_exchange(peer, trio.current_time()):
            return
        try:
            with trio.fail_after(REQUEST_S):
                head = decode(Head, await stream.receive(), max_bytes=MAX_REQUEST_BYTES)
        except trio.TooSlowError:
            log.debug("%s begins to tell about %s and falls asleep", peer.short, self.name)
        except (CborError, Malformed):
            await self._network.report(peer, self.name, _MALFORMED)
        else:
            if self._catchup.told(peer, head, self._is_known):
                self._look.notify()

    # Asking neighbours.

    async def catch_up(self) -> None:
        """Ask neighbours what we have missed, until cancelled."""
        while True:
            peers = self._network.topic_peers(self.name)
            if (peer := self._catchup.next_peer(peers, trio.current_time())) is not None:
                await self._ask(peer)
            else:
                with trio.move_on_at(self._catchup.next_due(peers)):
                    await self._look.wait()

    async def watch(self) -> None:
        """Look whom to ask when neighbours have changed, until cancelled."""
        while True:
            await self._network.changed()
            self._look.notify()

    async def _ask(self, peer: NodeId) -> None:
        turn = _Turn()
        try:
            for _ in range(MAX_PAGES):
                self._exchanges += 1
                if not await self._exchange(peer, turn):
                    break
        except (StreamClosed, PeerUnreachable, MessageRefused, trio.TooSlowError):
            log.debug("%s does not answer about %s", peer.short, self.name, exc_info=True)
        except (CborError, Malformed) as error:
            log.debug("%s answers nonsense about %s: %s", peer.short, self.name, error.message)
            await self._network.report(peer, self.name, _MALFORMED)
        else:
            return
        self._failed_exchanges += 1
        self._catchup.failed(peer, trio.current_time())

    async def _exchange(self, peer: NodeId, turn: _Turn) -> bool:
        """One question and what follows from its answer; whether there is more to ask at once."""
        request = self._catchup.request(peer)
        with trio.CancelScope() as opening:
            opening.deadline = trio.current_time() + ANSWER_S
            async with self._network.open_stream(peer, PROTOCOL_PREFIX + self.name) as stream:
                opening.deadline = float("inf")
                news = await turn.ask(stream, request, News)
                self._catchup.judge(request, news)
                batches = self._catchup.batches(news, self._is_known)
                fetched = 0
                for batch in batches:
                    fetched += await self._fetch(stream, batch, turn)
            wanted = sum(map(len, batches))
            self._catchup.succeeded(peer, news, wanted=wanted, fetched=fetched, now=trio.current_time())
            return news.head > news.sequence and (fetched > 0 or not wanted)
        raise trio.TooSlowError

    def _is_known(self, identifier: bytes) -> bool:
        return self._is_remembered(identifier) or identifier in self._refused or identifier in self._log

    async def _fetch(self, stream: Stream, batch: tuple[bytes, ...], turn: _Turn) -> int:
        """Fetch messages and treat each as if gossip had brought it; how many came."""
        fetched = await turn.ask(stream, Fetch(batch), Fetched)
        missing = set(batch)
        for data in fetched.messages:
            identifier = message_id(self.name, data)
            if identifier not in missing:
                msg = "a message that was not asked for"
                raise Malformed(msg)
            missing.remove(identifier)
            if not self._is_known(identifier):
                await self._accept(stream.peer, identifier, data)
        return len(fetched.messages)

    async def _accept(self, peer: NodeId, identifier: bytes, data: bytes) -> None:
        try:
            envelope = self._check(data, self._clock())
        except MessageRefused as error:
            self._refuse(identifier)
            await self._network.report(peer, self.name, error.validation)
            if error.validation.decision is Decision.REJECT:
                # No honest log has it.
                raise
            return
        self._remember(identifier, envelope)
        self._caught_up += 1
        # Unlike gossip, fetching can wait for a slow consumer, if there is one.
        await self._inbox.wait_for_room()
        self._inbox.put(envelope)


class _Turn:
    """Questions to one neighbour, which may not make us wait for ever, however often it answers in time."""

    def __init__(self) -> None:
        self._left_s = TURN_S

    async def ask(self, stream: Stream, question: Since | Fetch, answer: type[A]) -> A:
        """Ask, and wait ANSWER_S for the answer. Raises TooSlowError, StreamClosed, CborError, Malformed."""
        began = trio.current_time()
        with trio.fail_after(min(ANSWER_S, self._left_s)):
            await stream.send(encode(question))
            frame = await stream.receive()
        self._left_s -= trio.current_time() - began
        return decode(answer, frame, max_bytes=MAX_ANSWER_BYTES)


@asynccontextmanager
async def open_topic(
    network: Network,
    name: str,
    check: Check[T],
    clock: Clock,
    *,
    inbox: Inbox[Envelope[T]] | None = None,
    random: Random | None = None,
) -> AsyncGenerator[Topic[T]]:
    """Join a topic of signed envelopes within the block.

    `name`: of the topic, the same for all who take part. `check` judges each message once, whichever way it comes, and
    must not block. `clock`: Unix milliseconds, which decide when messages expire. `inbox`: where messages wait for
    `Topic.receive`; several topics may share one. `random` picks the neighbours that are asked and the moments; by
    default the system's. Raises LocalError when the topic is joined already.
    """
    inbox = Inbox() if inbox is None else inbox
    topic = Topic(network, name, check, clock, inbox=inbox, random=random or SystemRandom())
    with network.serve(PROTOCOL_PREFIX + name, topic.serve), network.serve(HEAD_PROTOCOL_PREFIX + name, topic.hear):
        async with (
            network.subscribe(name, topic.validate, capacity=MAX_CHECKED) as subscription,
            open_background() as tasks,
        ):
            tasks.start_soon(topic.deliver, subscription)
            tasks.start_soon(topic.watch)
            tasks.start_soon(topic.catch_up)
            tasks.start_soon(topic.announce)
            yield topic
