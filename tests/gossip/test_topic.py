"""Topics that catch up: what gossip does not bring is fetched, checked and delivered once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import system_clock, virtual_clock
from aci_p2p.gossip import Topic, catchup, open_topic
from aci_p2p.gossip import topic as topics
from aci_p2p.gossip.inbox import QUEUE, Inbox
from aci_p2p.network import Network, Stream, StreamClosed
from aci_p2p.network.delivery import message_id
from aci_p2p.network.limits import MAX_REJECTS_PER_MINUTE
from aci_p2p.network.memory import MemoryHub
from aci_p2p.network.memory_endpoint import MemoryNetwork
from aci_p2p.protocol.catchup import MAX_MESSAGE_BYTES, NO_EPOCH, Fetch, Fetched, Head, News, Since, decode, encode
from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import Abort, AbortCode
from aci_p2p.protocol.replay import MAX_PER_SENDER
from aci_p2p.protocol.validation import ACCEPTED, Decision, MessageRefused, Reason, Validation
from tests.network.driver import Opener, eventually, open_on

NETWORK = "aci-test"
NAME = "test/topic"
PROTOCOL = topics.PROTOCOL_PREFIX + NAME
EPOCH = b"an epoch"


@dataclass
class Node:
    """A member of the topic."""

    number: int
    network: Network
    topic: Topic[Abort]
    sealer: Sealer
    clock: Callable[[], int]
    checked: list[bytes]

    def seal(self, text: str, *, lifetime_ms: int = 60_000) -> Envelope[Abort]:
        """A message of ours."""
        return self.sealer.seal(Abort(bytes(32), AbortCode.BUSY, text), self.clock(), lifetime_ms=lifetime_ms)

    async def say(self, *texts: str, lifetime_ms: int = 60_000) -> None:
        """Publish messages of ours."""
        for text in texts:
            await self.topic.publish(self.seal(text, lifetime_ms=lifetime_ms))

    async def heard(self, seconds: float) -> list[str]:
        """What arrives within so many seconds, in order."""
        found: list[str] = []
        with trio.move_on_after(seconds):
            async for envelope in self.topic:
                found.append(envelope.body.detail)  # noqa: PERF401 - those before the timeout count
        return found

    async def connect(self, other: Network) -> None:
        """Connect to another."""
        await self.network.connect(other.addresses[0])


def make_key(number: int) -> KeyPair:
    """As the networks of these tests make them."""
    return KeyPair(number.to_bytes(32))


@asynccontextmanager
async def join(
    network: Network, number: int, clock: Callable[[], int] = virtual_clock, capacity: int = QUEUE
) -> AsyncGenerator[Node]:
    """Join the topic; messages that say `bad` are refused."""
    checked: list[bytes] = []

    def check(data: bytes, now: int) -> Envelope[Abort]:
        checked.append(data)
        envelope = open_envelope(data, Abort, network=NETWORK, now=now)
        if envelope.body.detail.startswith("bad"):
            raise MessageRefused(Decision.REJECT, Reason.MALFORMED)
        if envelope.body.detail.startswith("flood"):
            raise MessageRefused(Decision.IGNORE, Reason.FLOODED)
        return envelope

    random = Random(number)  # noqa: S311 - the same moments in every run
    async with open_topic(network, NAME, check, clock, inbox=Inbox(capacity), random=random) as topic:
        yield Node(number, network, topic, Sealer(make_key(number), NETWORK), clock, checked)


@asynccontextmanager
async def open_node(hub: MemoryHub, number: int, capacity: int = QUEUE) -> AsyncGenerator[Node]:
    """A member on a hub."""
    async with open_on(hub, number) as network, join(network, number, capacity=capacity) as node:
        yield node


# Both networks.


async def test_message_reaches_the_others_once(open_network: Opener) -> None:
    async with (
        open_network(1) as first,
        open_network(2) as second,
        join(first, 1, system_clock) as a,
        join(second, 2, system_clock) as b,
    ):
        await b.connect(first)
        await eventually(lambda: first.topic_peers(NAME))
        await a.say("hello")
        assert await b.heard(0.3) == ["hello"]
        assert await a.heard(0.1) == []
        assert b.topic.statistics().log_messages == a.topic.statistics().log_messages == 1


async def test_newcomer_learns_what_was_said_before(open_network: Opener) -> None:
    async with open_network(1) as first, open_network(2) as second, join(first, 1, system_clock) as a:
        await a.say(*(f"{number}" for number in range(100)))
        # Longer than gossip repeats anything.
        first_topic = a.topic.statistics()
        assert (first_topic.log_messages, first_topic.waiting) == (100, 0)
        async with join(second, 2, system_clock) as b:
            await b.connect(first)
            await eventually(lambda: b.topic.statistics().log_messages == 100)
            assert sorted(map(int, await b.heard(0.2))) == list(range(100))
            statistics = b.topic.statistics()
            assert statistics.dropped == statistics.failed_exchanges == 0


async def test_own_and_fetched_messages_can_be_fetched_on(open_network: Opener) -> None:
    """From the first to the third through the log of the second."""
    async with open_network(2) as second, join(second, 2, system_clock) as b:
        async with open_network(1) as first, join(first, 1, system_clock) as a:
            await a.say("hello")
            await b.connect(first)
            await eventually(lambda: b.topic.statistics().log_messages)
        await b.say("and me")
        async with open_network(3) as third, join(third, 3, system_clock) as c:
            await c.connect(second)
            await eventually(lambda: c.topic.statistics().log_messages == 2)
            assert sorted(await c.heard(0.1)) == ["and me", "hello"]


async def test_one_opens_a_topic_once(open_network: Opener) -> None:
    async with open_network(1) as network, join(network, 1):
        with pytest.raises(LocalError):
            async with join(network, 1):
                pass


# Loss.


async def test_who_was_cut_off_catches_up_within_seconds(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b, open_node(hub, 3) as c:
        await b.connect(a.network)
        await c.connect(a.network)
        await a.say("before")
        for node in (b, c):
            assert await node.heard(1) == ["before"]
        hub.cut_off(c.network.node_id)
        await a.say(*(f"{number}" for number in range(50)))
        await b.say("mine")
        assert len(await b.heard(1)) == 50
        assert await c.heard(20) == []
        hub.restore(c.network.node_id)
        await c.connect(b.network)
        started = trio.current_time()
        await eventually(lambda: c.topic.statistics().log_messages == 52)
        assert trio.current_time() - started < 0.5
        assert sorted(await c.heard(1)) == sorted([*(f"{number}" for number in range(50)), "mine"])
        statistics = c.topic.statistics()
        assert (statistics.caught_up, statistics.failed_exchanges) == (51, 0)
        assert b.topic.statistics().served == 51
        # `before` was not fetched again, and nobody else was bothered with what everybody has.
        assert len(c.checked) == 52
        assert a.topic.statistics().caught_up <= 1


def lose(node: Node, text: str) -> None:
    """Have a node publish something that gossip loses on the way to everybody."""
    envelope = node.seal(text, lifetime_ms=60_000)
    node.topic._remember(message_id(NAME, envelope.data), envelope)


async def test_what_gossip_lost_is_told_within_seconds(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b:
        await b.connect(a.network)
        # Until nobody expects anything any more.
        await trio.sleep(24 * 3_600)
        lose(a, "lost")
        started = trio.current_time()
        assert (await b.topic.receive()).body.detail == "lost"
        assert trio.current_time() - started < 1.5 * catchup.ANNOUNCE_DELAY_S + 0.5
        lose(a, "another")
        assert (await b.topic.receive()).body.detail == "another"
        assert trio.current_time() - started < 3 * catchup.ANNOUNCE_DELAY_S + catchup.ANNOUNCE_GAP_S + 1


async def test_what_is_told_of_is_passed_on_from_neighbour_to_neighbour(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(hub, number)) for number in range(1, 6)]
        for left, right in pairwise(nodes):
            await right.connect(left.network)
        await trio.sleep(3_600)
        lose(nodes[0], "lost")
        started = trio.current_time()
        assert (await nodes[-1].topic.receive()).body.detail == "lost"
        assert trio.current_time() - started < len(nodes) * (1.5 * catchup.ANNOUNCE_DELAY_S + 0.5)


async def test_without_announcements_a_question_now_and_then_finds_it(
    autojump_clock: MockClock, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "ANNOUNCE_TO", 0)
    async with open_node(hub, 1) as a, open_node(hub, 2) as b:
        await b.connect(a.network)
        await trio.sleep(24 * 3_600)
        await a.say("heard")
        lose(a, "lost")
        # Gossip brings one, so that there may be more.
        started = trio.current_time()
        assert (await b.heard(1)) == ["heard"]
        assert (await b.topic.receive()).body.detail == "lost"
        assert trio.current_time() - started < 1.5 * catchup.BUSY_PULL_S + 0.5


async def test_what_everybody_has_is_told_but_not_asked_for(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b:
        await b.connect(a.network)
        await trio.sleep(24 * 3_600)
        before = [node.topic.statistics().exchanges for node in (a, b)]
        await a.say(*(f"{number}" for number in range(10)))
        await trio.sleep(catchup.BUSY_PULL_S / 2)
        assert [node.topic.statistics().exchanges for node in (a, b)] == before


async def test_an_idle_topic_does_next_to_nothing(
    autojump_clock: MockClock, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(hub, number)) for number in range(1, 6)]
        for number, node in enumerate(nodes):
            for other in nodes[:number]:
                await node.connect(other.network)
        await nodes[0].say("something")
        await trio.sleep(24 * 3_600)
        opened = 0
        open_stream = MemoryNetwork.open_stream

        def count(network: MemoryNetwork, peer: NodeId, protocol: str) -> AbstractAsyncContextManager[Stream]:
            nonlocal opened
            opened += 1
            return open_stream(network, peer, protocol)

        monkeypatch.setattr(MemoryNetwork, "open_stream", count)
        await trio.sleep(24 * 3_600)
        rarely = 24 * 3_600 / catchup.MAX_PULL_S * len(nodes)
        assert rarely / 2 < opened < rarely * 2


# Announcements.


async def tell(network: Network, peer: NodeId, frame: bytes) -> None:
    """Send one frame where heads are announced."""
    async with network.open_stream(peer, topics.HEAD_PROTOCOL_PREFIX + NAME) as stream:
        await stream.send(frame)
        await trio.sleep(0.1)


@pytest.mark.parametrize("frame", [b"", b"junk", encode(Since(NO_EPOCH, 0)), encode(News(EPOCH, 1, 1, ()))])
async def test_a_malformed_announcement_is_counted(autojump_clock: MockClock, hub: MemoryHub, frame: bytes) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as evil:
        await evil.connect(a.network.addresses[0])
        await tell(evil, a.network.node_id, frame)
        assert a.network.statistics().gossip_refused == {Reason.MALFORMED: 1}


async def test_who_announces_and_falls_asleep_is_left(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as evil:
        await evil.connect(a.network.addresses[0])
        async with evil.open_stream(a.network.node_id, topics.HEAD_PROTOCOL_PREFIX + NAME) as stream:
            with pytest.raises(StreamClosed), trio.fail_after(topics.REQUEST_S + 1):
                await stream.receive()
        assert a.network.statistics().gossip_refused == {}
        assert a.network.statistics().handler_failures == 0


async def test_who_announces_what_it_has_not_makes_nobody_ask_for_long(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    """Each announcement of a longer log, or of another one, costs one question at most, and lies cost the liar."""
    async with open_node(hub, 1) as a, open_node(hub, 2) as liar:
        await liar.connect(a.network)
        await trio.sleep(3_600)
        before = a.topic.statistics().exchanges
        for number in range(1, 600):
            await tell(liar.network, a.network.node_id, encode(Head(liar.topic._log.head().epoch, number, ())))
            await trio.sleep(0.9)
        # Ten minutes: left alone for 10, 20, 40, 80, 160, 320 seconds.
        assert 4 <= a.topic.statistics().exchanges - before <= 7
        assert a.network.statistics().gossip_refused == {}


async def test_announcements_share_the_quota_of_questions(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as evil:
        await evil.connect(a.network.addresses[0])
        heard: list[NodeId] = []
        told = a.topic._catchup.told

        def count(peer: NodeId, head: Head, is_known: Callable[[bytes], bool]) -> bool:
            heard.append(peer)
            return told(peer, head, is_known)

        a.topic._catchup.told = count  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(tell, evil, a.network.node_id, encode(Head(EPOCH, number, ())))
        assert len(heard) == catchup.EXCHANGES_BURST


async def test_two_halves_of_a_partition_learn_of_each_other(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with (
        open_node(hub, 1) as a,
        open_node(hub, 2) as b,
        open_node(hub, 3) as c,
        open_node(hub, 4) as d,
    ):
        await b.connect(a.network)
        await d.connect(c.network)
        await a.say("left")
        await c.say("right")
        await trio.sleep(5)
        await b.connect(c.network)
        await trio.sleep(25)
        for node, expected in ((a, {"right"}), (b, {"left", "right"}), (c, {"left"}), (d, {"left", "right"})):
            heard = await node.heard(1)
            assert (set(heard), len(heard)) == (expected, len(expected))


async def test_message_that_comes_both_ways_is_delivered_once(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b, open_on(hub, 9) as echo:
        envelope = a.seal("hello")
        a.topic._remember(message_id(NAME, envelope.data), envelope)
        await b.connect(a.network)
        assert await b.heard(3) == ["hello"]
        await echo.connect(b.network.addresses[0])
        await echo.publish(NAME, envelope.data)
        assert await b.heard(3) == []
        assert b.network.statistics().gossip_refused == {Reason.REPLAYED: 1}
        assert b.checked == [envelope.data]


async def test_expired_messages_are_not_offered(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b:
        await a.say("short", lifetime_ms=2_000)
        await a.say("long")
        await trio.sleep(2)
        await b.connect(a.network)
        assert await b.heard(3) == ["long"]
        assert b.network.statistics().gossip_refused == {}
        assert a.topic.statistics().log_messages == 1


async def test_a_long_log_is_read_in_pages(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2, capacity=2_000) as b:
        for number in range(1_200):
            envelope = a.seal(f"{number}")
            a.topic._remember(message_id(NAME, envelope.data), envelope)
        await b.connect(a.network)
        assert await b.heard(3) == [f"{number}" for number in range(1_200)]
        assert b.topic.statistics().exchanges == 3


async def test_fetching_waits_for_a_consumer_that_works(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2, capacity=4) as b:
        await a.say(*(f"{number}" for number in range(30)))
        found: list[str] = []
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                async for envelope in b.topic:
                    found.append(envelope.body.detail)
                    await trio.sleep(0.05)

            # So that the consumer is known to take messages.
            envelope = a.seal("first")
            b.topic._inbox.put(envelope)
            await b.connect(a.network)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert found == ["first", *(f"{number}" for number in range(30))]
        assert b.topic.statistics().dropped == 0


async def test_without_a_consumer_the_newest_are_kept(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2, capacity=4) as b:
        await a.say(*(f"{number}" for number in range(30)))
        await b.connect(a.network)
        await trio.sleep(3)
        statistics = b.topic.statistics()
        assert (statistics.waiting, statistics.dropped, statistics.log_messages) == (4, 26, 30)
        assert await b.heard(1) == ["26", "27", "28", "29"]


# Limits.


async def test_one_publishes_no_more_than_others_allow(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a:
        assert topics.MAX_PUBLISHED < MAX_PER_SENDER
        await a.say("early", lifetime_ms=1_000)
        await a.say(*["another"] * (topics.MAX_PUBLISHED - 1))
        with pytest.raises(ResourceError, match="384 messages of ours"):
            await a.say("too much")
        await trio.sleep(1)
        await a.say("instead")
        with pytest.raises(ResourceError):
            await a.say("too much")


async def test_what_is_remembered_is_bounded(
    autojump_clock: MockClock, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(topics, "MAX_REFUSED", 3)
    async with open_node(hub, 1) as a:
        for number in range(6):
            assert a.topic.validate(a.network.node_id, a.seal(f"{number}").data) == ACCEPTED
            assert a.topic.validate(a.network.node_id, b"%d" % number).decision is Decision.REJECT
        assert (len(a.topic._remembered), len(a.topic._refused)) == (3, 3)
        await trio.sleep(60)
        assert a.topic.validate(a.network.node_id, a.seal("new").data) == ACCEPTED
        assert len(a.topic._remembered) == 1


async def test_flood_is_blamed_on_its_author_and_not_on_who_passes_it_on(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    async with open_node(hub, 1) as a, open_node(hub, 2) as b:
        flood = a.seal("flood").data
        assert b.topic.validate(b.network.node_id, flood) == Validation(Decision.IGNORE, Reason.FLOODED)
        assert b.topic.validate(a.network.node_id, flood) == Validation(Decision.REJECT, Reason.FLOODED)
        for _ in range(767):
            assert b.topic.validate(b.network.node_id, flood).decision is Decision.IGNORE
        assert b.topic.validate(b.network.node_id, flood) == Validation(Decision.REJECT, Reason.FLOODED)


async def test_who_asks_too_often_is_not_answered(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as other:
        await a.say("hello")
        await other.connect(a.network.addresses[0])
        answers = 0
        for _ in range(30):
            async with other.open_stream(a.network.node_id, PROTOCOL) as stream:
                await stream.send(encode(Since(NO_EPOCH, 0)))
                try:
                    assert decode(News, await stream.receive(), max_bytes=1 << 20).head == 1
                except StreamClosed:
                    continue
                answers += 1
        assert 16 <= answers <= 18
        assert other.node_id in a.network.peers


async def test_who_fetches_too_much_is_cut_short(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as other:
        await a.say(*["x" * 500] * 32)
        await other.connect(a.network.addresses[0])
        sent, started = 0, trio.current_time()
        async with other.open_stream(a.network.node_id, PROTOCOL) as stream:
            await stream.send(encode(Since(NO_EPOCH, 0)))
            news = decode(News, await stream.receive(), max_bytes=1 << 20)
            with pytest.raises(StreamClosed):
                while True:
                    await stream.send(encode(Fetch(news.identifiers)))
                    fetched = decode(Fetched, await stream.receive(), max_bytes=1 << 20)
                    assert len(fetched.messages) == 32
                    sent += sum(map(len, fetched.messages))
        refilled = catchup.BYTES_PER_S * (trio.current_time() - started)
        assert sent == pytest.approx((4 << 20) + refilled, rel=0.02)


@pytest.mark.parametrize("after", [0, 1])
async def test_who_asks_and_then_sleeps_is_left(autojump_clock: MockClock, hub: MemoryHub, after: int) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as other:
        await other.connect(a.network.addresses[0])
        async with other.open_stream(a.network.node_id, PROTOCOL) as stream:
            if after:
                await stream.send(encode(Since(NO_EPOCH, 0)))
                await stream.receive()
            started = trio.current_time()
            with pytest.raises(StreamClosed):
                await stream.receive()
            assert trio.current_time() - started == pytest.approx(topics.REQUEST_S, abs=0.1)


NONSENSE = [b"", b"\xff", encode(Fetch(())), encode(Since(NO_EPOCH, 0)) + b"\0", bytes(2_000)]


@pytest.mark.parametrize("question", NONSENSE, ids=range(len(NONSENSE)))
async def test_nonsense_for_a_question_is_counted(autojump_clock: MockClock, hub: MemoryHub, question: bytes) -> None:
    async with open_node(hub, 1) as a, open_on(hub, 9) as other:
        await other.connect(a.network.addresses[0])
        for _ in range(MAX_REJECTS_PER_MINUTE):
            async with other.open_stream(a.network.node_id, PROTOCOL) as stream:
                await stream.send(question)
                with pytest.raises(StreamClosed):
                    await stream.receive()
        assert a.network.statistics().gossip_refused == {Reason.MALFORMED: MAX_REJECTS_PER_MINUTE}
        assert not a.network.peers


# Hostile neighbours.

Serve = Callable[[Stream], Awaitable[None]]


@asynccontextmanager
async def open_liar(hub: MemoryHub, number: int, serve: Serve, victim: Node) -> AsyncGenerator[Network]:
    """A neighbour of the victim that says of its log whatever it likes."""

    def accept(_forwarder: NodeId, _data: bytes) -> Validation:
        return ACCEPTED

    async with open_on(hub, number) as network, network.subscribe(NAME, accept, capacity=1):
        with network.serve(PROTOCOL, serve):
            await network.connect(victim.network.addresses[0])
            yield network


def answering(*answers: bytes) -> Serve:
    """Answers each question with the next of these."""

    async def serve(stream: Stream) -> None:
        for answer in answers:
            await stream.receive()
            await stream.send(answer)
        await stream.receive()

    return serve


async def sleep(_stream: Stream) -> None:
    """Never answers."""
    await trio.sleep_forever()


def news(*identifiers: bytes, sequence: int | None = None, head: int | None = None) -> bytes:
    """An answer about so many messages."""
    last = len(identifiers) if sequence is None else sequence
    return encode(News(EPOCH, last, last if head is None else head, identifiers))


def other_ids(count: int) -> Iterable[bytes]:
    """Ids of messages that do not exist."""
    return (number.to_bytes(32) for number in range(count))


JUNK = b"no envelope"
LIARS: dict[str, tuple[Serve, dict[str, int]]] = {
    "garbage": (answering(b"\xff"), {Reason.MALFORMED: 1}),
    "another message": (answering(encode(Fetched(()))), {Reason.MALFORMED: 1}),
    "ahead of itself": (answering(news(sequence=5, head=3)), {Reason.MALFORMED: 1}),
    "unasked for": (answering(news(bytes(32)), encode(Fetched((JUNK,)))), {Reason.MALFORMED: 1}),
    "twice": (
        answering(news(message_id(NAME, JUNK)), encode(Fetched((JUNK, JUNK)))),
        {"not_canonical": 1},
    ),
    "junk": (answering(news(message_id(NAME, JUNK)), encode(Fetched((JUNK,)))), {Reason.NOT_CANONICAL: 1}),
    "garbage for messages": (answering(news(bytes(32)), b"\xff"), {Reason.MALFORMED: 1}),
    "empty promises": (answering(news(*other_ids(20)), encode(Fetched(()))), {}),
    "silence": (sleep, {}),
    "hangs up": (answering(), {}),
    "silence after the news": (answering(news(bytes(32))), {}),
}


@pytest.mark.parametrize("name", LIARS)
async def test_liar_is_left_alone_and_the_honest_are_heard(
    autojump_clock: MockClock, hub: MemoryHub, name: str
) -> None:
    serve, refused = LIARS[name]
    async with open_node(hub, 1) as victim, open_node(hub, 2) as honest:
        await honest.say("hello")
        async with open_liar(hub, 9, serve, victim):
            await trio.sleep(2)
            await victim.connect(honest.network)
            assert await victim.heard(7) == ["hello"]
            assert victim.network.statistics().gossip_refused == refused
            statistics = victim.topic.statistics()
            assert statistics.caught_up == 1
            assert statistics.failed_exchanges == (name != "empty promises")


async def test_endless_log_ends(autojump_clock: MockClock, hub: MemoryHub) -> None:
    """It always has more, and never what it has."""
    asked = 0

    async def serve(stream: Stream) -> None:
        nonlocal asked
        since = decode(Since, await stream.receive(), max_bytes=1 << 20)
        asked += 1
        identifiers = tuple((since.sequence + number).to_bytes(32) for number in range(1, 513))
        await stream.send(encode(News(EPOCH, since.sequence + 512, 2**40, identifiers)))
        while True:
            await stream.receive()
            await stream.send(encode(Fetched(())))

    async with open_node(hub, 1) as victim, open_liar(hub, 9, serve, victim):
        await trio.sleep(600)
        # Left alone for 10, 20, 40 ... seconds.
        assert 4 <= asked <= 7


async def test_who_answers_slowly_keeps_nobody_from_the_others(autojump_clock: MockClock, hub: MemoryHub) -> None:
    """Each answer comes in time, and all of them together would take minutes."""

    async def serve(stream: Stream) -> None:
        await stream.receive()
        await stream.send(news(*other_ids(512)))
        while True:
            await stream.receive()
            await trio.sleep(topics.ANSWER_S - 0.1)
            await stream.send(encode(Fetched(())))

    async with open_node(hub, 1) as victim, open_node(hub, 2) as honest:
        await honest.say("hello")
        async with open_liar(hub, 9, serve, victim):
            await trio.sleep(2)
            await victim.connect(honest.network)
            assert await victim.heard(topics.TURN_S + 5) == ["hello"]


async def test_log_that_grows_as_fast_as_it_is_read_has_its_turn_only(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    sealer = Sealer(make_key(9), NETWORK)
    asked: list[float] = []

    async def serve(stream: Stream) -> None:
        since = decode(Since, await stream.receive(), max_bytes=1 << 20)
        asked.append(trio.current_time())
        data = sealer.seal(Abort(bytes(32), AbortCode.BUSY, f"{since.sequence}"), virtual_clock()).data
        await stream.send(news(message_id(NAME, data), sequence=since.sequence + 1, head=2**40))
        await stream.receive()
        await stream.send(encode(Fetched((data,))))
        await stream.receive()

    async with open_node(hub, 1) as victim, open_liar(hub, 9, serve, victim):
        await trio.sleep(3)
        assert len(asked) == topics.MAX_PAGES
        await trio.sleep(7)
        assert len(asked) >= 2 * topics.MAX_PAGES
        assert victim.topic.statistics().caught_up == len(asked)


async def test_large_messages_fit_a_frame(autojump_clock: MockClock, hub: MemoryHub) -> None:
    largest = [bytes([number]) * MAX_MESSAGE_BYTES for number in range(32)]
    identifiers = [message_id(NAME, data) for data in largest]
    serve = answering(news(*identifiers), encode(Fetched(tuple(largest))))
    async with open_node(hub, 1) as victim, open_liar(hub, 9, serve, victim):
        await trio.sleep(3)
        assert victim.network.statistics().gossip_refused == {Reason.TOO_LARGE: 1}


async def test_neighbour_that_stalls_over_libp2p(open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "ANSWER_S", 0.2)
    async with (
        open_libp2p(1) as first,
        open_libp2p(2) as second,
        open_libp2p(9) as third,
        join(first, 1, system_clock) as victim,
        join(second, 2, system_clock) as honest,
    ):
        await honest.say("hello")
        with third.serve(PROTOCOL, sleep):
            async with third.subscribe(NAME, lambda _peer, _data: ACCEPTED, capacity=1):
                await third.connect(first.addresses[0])
                await eventually(lambda: victim.topic.statistics().failed_exchanges == 1)
                assert third.node_id in first.peers
                await victim.connect(second)
                await eventually(lambda: victim.topic.statistics().log_messages == 1)
                assert await victim.heard(0.1) == ["hello"]
