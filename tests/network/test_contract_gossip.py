"""What the network seam promises of gossip, over both implementations."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from aci_p2p.network import MAX_GOSSIP_BYTES, GossipMessage
from aci_p2p.network.limits import MAX_REJECTS_PER_MINUTE
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import ACCEPTED, Decision, Reason, Validation
from tests.network.driver import TOPIC, Opener, OpenLine, eventually, joined, told


def accept(_forwarder: NodeId, _data: bytes) -> Validation:
    """Everything is fine."""
    return ACCEPTED


class Judge:
    """A validator that keeps what it has seen and decides by the first word."""

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()

    def __call__(self, _forwarder: NodeId, data: bytes) -> Validation:
        self.seen[data] += 1
        match data.split()[0]:
            case b"ignore":
                return Validation(Decision.IGNORE, Reason.EXPIRED)
            case b"reject":
                return Validation(Decision.REJECT, Reason.BAD_SIGNATURE)
            case b"raise":
                raise ZeroDivisionError
            case _:
                return ACCEPTED


async def test_message_reaches_a_subscriber(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, accept, capacity=8) as subscription:
        await joined(a, b)
        await a.publish(TOPIC, b"hello")
        with trio.fail_after(5):
            assert await subscription.receive() == GossipMessage(a.node_id, b"hello")
        assert b.statistics().gossip_accepted == 1


async def test_message_published_right_after_connecting_arrives(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b, b.subscribe(TOPIC, accept, capacity=8) as subscription:
        await a.connect(b.addresses[0])
        await a.publish(TOPIC, b"hello")
        with trio.fail_after(5):
            assert (await subscription.receive()).data == b"hello"


async def test_commands_in_a_row_with_one_key_are_all_heard(open_network: Opener) -> None:
    topics = [f"{TOPIC}/{number}" for number in range(3)]
    async with open_network(1) as a, AsyncExitStack() as stack:
        heard = [await stack.enter_async_context(a.subscribe(topic, accept, capacity=8)) for topic in topics]
        for command in range(15):
            data = b"%d" % command
            async with open_network(2) as b:
                await b.connect(a.addresses[0])
                async with AsyncExitStack() as command_stack:
                    for topic in topics:
                        await command_stack.enter_async_context(b.subscribe(topic, accept, capacity=8))
                        await b.publish(topic, data)
                    with trio.fail_after(5):
                        assert [await one.receive() for one in heard] == [GossipMessage(b.node_id, data)] * len(heard)
                await told(a, lambda: not any(map(a.topic_peers, topics)))
        assert not a.statistics().gossip_refused


async def test_message_is_forwarded_and_names_its_forwarder(open_line: OpenLine) -> None:
    async with (
        open_line(3) as (a, b, c),
        b.subscribe(TOPIC, accept, capacity=8),
        c.subscribe(TOPIC, accept, capacity=8) as subscription,
    ):
        await joined(a, b)
        await joined(b, c)
        await a.publish(TOPIC, b"hello")
        with trio.fail_after(5):
            assert await subscription.receive() == GossipMessage(b.node_id, b"hello")


async def test_message_is_delivered_once_over_many_paths(open_line: OpenLine) -> None:
    judge = Judge()
    async with (
        open_line(3) as (a, b, c),
        a.subscribe(TOPIC, accept, capacity=8),
        b.subscribe(TOPIC, accept, capacity=8),
        c.subscribe(TOPIC, judge, capacity=8) as subscription,
    ):
        await c.connect(a.addresses[0])
        await joined(a, b, c)
        await joined(b, c)
        for number in range(5):
            await a.publish(TOPIC, b"message %d" % number)
        with trio.fail_after(5):
            received = {(await subscription.receive()).data for _ in range(5)}
        await trio.sleep(0.1)
        assert received == {b"message %d" % number for number in range(5)}
        assert set(judge.seen.values()) == {1}
        assert c.statistics().gossip_accepted == 5


async def test_own_message_does_not_come_back(open_line: OpenLine) -> None:
    async with (
        open_line(2) as (a, b),
        a.subscribe(TOPIC, accept, capacity=8) as own,
        b.subscribe(TOPIC, accept, capacity=8) as subscription,
    ):
        await joined(a, b)
        await a.publish(TOPIC, b"hello")
        with trio.fail_after(5):
            await subscription.receive()
        with trio.move_on_after(0.1) as scope:
            await own.receive()
        assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"ignore me", "expired"), (b"reject me", "bad_signature"), (b"raise hell", "validator_failed")],
    ids=["ignore", "reject", "raise"],
)
async def test_refused_message_is_neither_delivered_nor_forwarded(
    open_line: OpenLine, data: bytes, reason: str
) -> None:
    far = Judge()
    async with (
        open_line(3) as (a, b, c),
        b.subscribe(TOPIC, Judge(), capacity=8) as middle,
        c.subscribe(TOPIC, far, capacity=8) as subscription,
    ):
        await joined(a, b)
        await joined(b, c)
        await a.publish(TOPIC, data)
        await eventually(lambda: b.statistics().gossip_refused == {reason: 1})
        await a.publish(TOPIC, b"fine")
        with trio.fail_after(5):
            assert (await middle.receive()).data == b"fine"
            assert (await subscription.receive()).data == b"fine"
        assert set(far.seen) == {b"fine"}
        assert b.statistics().gossip_accepted == 1


async def test_forwarder_of_rejected_messages_is_disconnected(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, Judge(), capacity=8):
        await joined(a, b)
        for number in range(MAX_REJECTS_PER_MINUTE - 1):
            await a.publish(TOPIC, b"reject %d" % number)
        await eventually(lambda: b.statistics().gossip_refused == {"bad_signature": MAX_REJECTS_PER_MINUTE - 1})
        assert list(b.peers) == [a.node_id]
        await a.publish(TOPIC, b"reject the last straw")
        await eventually(lambda: not b.peers)
        await eventually(lambda: not a.peers)


async def test_forwarder_of_ignored_messages_stays(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, Judge(), capacity=8):
        await joined(a, b)
        for number in range(3 * MAX_REJECTS_PER_MINUTE):
            await a.publish(TOPIC, b"ignore %d" % number)
        await eventually(lambda: b.statistics().gossip_refused == {"expired": 3 * MAX_REJECTS_PER_MINUTE})
        assert list(b.peers) == [a.node_id]


async def test_a_validator_that_raises_is_our_bug_and_nobody_is_blamed(
    open_line: OpenLine, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, Judge(), capacity=8):
        await joined(a, b)
        for number in range(3 * MAX_REJECTS_PER_MINUTE):
            await a.publish(TOPIC, b"raise %d" % number)
        await eventually(lambda: b.statistics().gossip_refused == {"validator_failed": 3 * MAX_REJECTS_PER_MINUTE})
        assert list(b.peers) == [a.node_id]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3 * MAX_REJECTS_PER_MINUTE
    assert errors[0].name == "aci_p2p.network"
    assert errors[0].exc_info is not None
    assert errors[0].exc_info[0] is ZeroDivisionError


async def test_full_subscription_loses_the_oldest(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, accept, capacity=3) as subscription:
        await joined(a, b)
        for number in range(10):
            await a.publish(TOPIC, b"message %d" % number)
        await eventually(lambda: b.statistics().gossip_accepted == 10)
        assert subscription.dropped == 7
        assert b.statistics().gossip_dropped == 7
        kept = [(await anext(subscription)).data for _ in range(3)]
        assert kept == [b"message 7", b"message 8", b"message 9"]


async def test_topics_are_apart(open_line: OpenLine) -> None:
    async with (
        open_line(2) as (a, b),
        b.subscribe(TOPIC, accept, capacity=8) as subscription,
        b.subscribe("test/other", accept, capacity=8) as other,
    ):
        await joined(a, b)
        await a.publish("test/other", b"same bytes")
        await a.publish(TOPIC, b"same bytes")
        with trio.fail_after(5):
            assert (await subscription.receive()).data == b"same bytes"
            assert (await other.receive()).data == b"same bytes"


async def test_leaving_a_topic_ends_delivery(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        async with b.subscribe(TOPIC, accept, capacity=8):
            await joined(a, b)
        await eventually(lambda: not a.topic_peers(TOPIC))
        await a.publish(TOPIC, b"into the void")
        async with b.subscribe(TOPIC, accept, capacity=8) as subscription:
            await joined(a, b)
            await a.publish(TOPIC, b"hello again")
            with trio.fail_after(5):
                while (await subscription.receive()).data != b"hello again":
                    pass


async def test_topics_that_peers_join_and_leave_are_told(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(told, a, lambda: list(a.topic_peers(TOPIC)) == [b.node_id])
        await trio.testing.wait_all_tasks_blocked()
        async with b.subscribe(TOPIC, accept, capacity=8):
            while nursery.child_tasks:
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(told, a, lambda: not a.topic_peers(TOPIC))
            await trio.testing.wait_all_tasks_blocked()


async def test_one_subscription_a_topic(open_network: Opener) -> None:
    async with open_network(1) as network, network.subscribe(TOPIC, accept, capacity=8):
        with pytest.raises(LocalError):
            async with network.subscribe(TOPIC, accept, capacity=8):
                pass


async def test_oversized_message_is_our_own_fault(open_network: Opener) -> None:
    async with open_network(1) as network:
        await network.publish(TOPIC, bytes(MAX_GOSSIP_BYTES))
        with pytest.raises(LocalError):
            await network.publish(TOPIC, bytes(MAX_GOSSIP_BYTES + 1))


async def test_largest_message_arrives(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), b.subscribe(TOPIC, accept, capacity=8) as subscription:
        await joined(a, b)
        await a.publish(TOPIC, b"x" * MAX_GOSSIP_BYTES)
        with trio.fail_after(5):
            assert (await subscription.receive()).data == b"x" * MAX_GOSSIP_BYTES


async def test_burst_arrives_complete(open_line: OpenLine) -> None:
    async with (
        open_line(3) as (a, b, c),
        b.subscribe(TOPIC, accept, capacity=1000),
        c.subscribe(TOPIC, accept, capacity=1000) as subscription,
    ):
        await joined(a, b)
        await joined(b, c)
        for number in range(500):
            await a.publish(TOPIC, b"%d" % number)
        await eventually(lambda: c.statistics().gossip_accepted == 500)
        assert subscription.dropped == 0


async def test_burst_is_not_lost_to_a_small_queue_that_is_consumed(open_line: OpenLine) -> None:
    received: list[bytes] = []
    async with open_line(2) as (a, b), b.subscribe(TOPIC, accept, capacity=16) as subscription:
        await joined(a, b)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                async for message in subscription:
                    received.append(message.data)  # noqa: PERF401 - until cancelled

            for number in range(500):
                await a.publish(TOPIC, b"%d" % number)
                if number % 64 == 0:
                    await trio.sleep(0.001)
            await eventually(lambda: len(received) == 500)
            nursery.cancel_scope.cancel()
        assert subscription.dropped == 0


async def test_reported_messages_count_like_forwarded_ones(open_line: OpenLine) -> None:
    rejected, ignored = Validation(Decision.REJECT, Reason.MALFORMED), Validation(Decision.IGNORE, Reason.EXPIRED)
    async with open_line(2) as (a, b):
        for _ in range(3 * MAX_REJECTS_PER_MINUTE):
            await b.report(a.node_id, TOPIC, ignored)
        for _ in range(MAX_REJECTS_PER_MINUTE - 1):
            await b.report(a.node_id, TOPIC, rejected)
        assert b.statistics().gossip_refused == {"expired": 48, "malformed": 15}
        assert list(b.peers) == [a.node_id]
        await b.report(a.node_id, TOPIC, rejected)
        await eventually(lambda: not b.peers)
        await eventually(lambda: not a.peers)
        await b.report(a.node_id, TOPIC, rejected)
