"""The market over the in-memory network: who hears which offers and bids, and what is refused or lost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.dht import RecordRules
from aci_p2p.gossip import Market, market, open_market, topic
from aci_p2p.gossip.market import MAX_WAITING_JOBS, OFFER_QUEUE, RECENT_OFFERS, MarketStatistics
from aci_p2p.network import GossipMessage, Network, Subscription
from aci_p2p.network.limits import MAX_REJECTS_PER_MINUTE
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import MAX_SKEW_MS, Envelope, Sealer
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer
from aci_p2p.protocol.replay import MAX_PER_SENDER
from aci_p2p.protocol.terms import Verification
from aci_p2p.protocol.validation import ACCEPTED, Decision, Reason, Validation
from tests.protocol.driver import NETWORK, NOW, PRICES, alter

LATENCY: Final = 0.01
MODEL: Final = bytes(32)


def is_quiet(statistics: MarketStatistics) -> bool:
    """Nothing waits, and nothing was lost."""
    topics = (statistics.offers, statistics.bids)
    lost = statistics.job_bids_dropped + sum(topic.dropped for topic in topics)
    return not lost and not statistics.waiting_jobs and not any(topic.waiting for topic in topics)


def clock() -> int:
    """Virtual time, from NOW."""
    return NOW + virtual_clock()


@dataclass(frozen=True)
class Trader:
    """A node of the market."""

    network: Network
    market: Market
    sealer: Sealer

    def offer(self, number: int = 0, *, at: int = 0, lifetime_ms: int = 60_000, **changes: object) -> Envelope[Offer]:
        """An offer of its own for each number, made `at` milliseconds from now."""
        now = clock() + at
        nonce = number.to_bytes(32)
        body = Offer(
            job_id=derive_job_id(self.sealer.node_id, bytes(32), nonce),
            model_root=MODEL,
            input_commitment=bytes(32),
            nonce_commitment=nonce,
            input_bytes=10,
            input_turns=1,
            max_tokens=10,
            temperature_milli=0,
            max_price=10**18,
            max_latency_ms=1_000,
            bid_deadline=now + 2_000,
            verification=Verification.OPTIMISTIC,
            priority_fee=0,
        )
        return self.sealer.seal(alter(body, **changes), now, lifetime_ms=lifetime_ms)

    def bid(self, offer: Envelope[Offer], *, at: int = 0, **changes: object) -> Envelope[Bid]:
        """A bid for an offer, made `at` milliseconds from now."""
        body = Bid(
            job_id=offer.body.job_id, offer_digest=offer.digest, model_root=offer.body.model_root, **PRICES,
            latency_ms=1, addresses=(),
            quantisation="none", region="",
        )  # fmt: skip
        return self.sealer.seal(alter(body, **changes), clock() + at)

    async def heard(self) -> list[Envelope[Offer]]:
        """The offers that arrive within a second."""
        offers: list[Envelope[Offer]] = []
        with trio.move_on_after(1):
            while True:
                offers.append(await self.market.next_offer())
        return offers


OpenTraders = Callable[[int], AbstractAsyncContextManager[list[Trader]]]


async def received(channel: trio.MemoryReceiveChannel[Envelope[Bid]]) -> list[Envelope[Bid]]:
    """The bids that arrive within a second."""
    bids: list[Envelope[Bid]] = []
    with trio.move_on_after(1):
        async for bid in channel:
            bids.append(bid)  # noqa: PERF401 - those before the timeout count
    return bids


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub(latency=LATENCY)


@asynccontextmanager
async def open_raw(hub: MemoryHub, number: int) -> AsyncGenerator[Network]:
    """A node without a market, which can publish what no honest one would."""
    key, rules = KeyPair(number.to_bytes(32)), RecordRules(NETWORK, clock)
    async with hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as network:
        yield network


@asynccontextmanager
async def open_trader(hub: MemoryHub, number: int) -> AsyncGenerator[Trader]:
    async with (
        open_raw(hub, number) as network,
        open_market(network, NETWORK, clock) as opened,
        opened.take_part(MODEL),
    ):
        yield Trader(network, opened, Sealer(KeyPair(number.to_bytes(32)), NETWORK))


@pytest.fixture
def open_traders(hub: MemoryHub) -> OpenTraders:
    """Opens traders of which each is connected to the one before it."""

    @asynccontextmanager
    async def open_all(count: int) -> AsyncGenerator[list[Trader]]:
        async with AsyncExitStack() as stack:
            traders = [await stack.enter_async_context(open_trader(hub, number)) for number in range(1, count + 1)]
            for left, right in pairwise(traders):
                await right.network.connect(left.network.addresses[0])
            yield traders

    return open_all


# Delivery.


async def test_an_offer_and_its_bids(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(3) as (a, b, c):
        offer = a.offer()
        with a.market.bids(offer.body.job_id) as bids:
            await a.market.publish_offer(offer)
            # Both hear it, the farther through the nearer.
            assert await b.market.next_offer() == offer
            assert await c.market.next_offer() == offer
            sent = [b.bid(offer), c.bid(offer)]
            await b.market.publish_bid(sent[0])
            await c.market.publish_bid(sent[1])
            assert await received(bids) == sent
        for trader in (a, b, c):
            assert is_quiet(trader.market.statistics())
            assert trader.network.statistics().gossip_refused == {}
            assert await trader.heard() == []
        assert [trader.market.statistics().offers_heard for trader in (a, b, c)] == [0, 1, 1]
        assert [trader.market.statistics().bids_heard for trader in (a, b, c)] == [2, 1, 1]


async def test_an_offer_a_second_is_no_flood(autojump_clock: MockClock, hub: MemoryHub) -> None:
    """From one key for twelve minutes, from a new process each minute; a third node brings copies."""
    async with open_trader(hub, 1) as provider, open_trader(hub, 3) as third:
        await third.network.connect(provider.network.addresses[0])
        for minute in range(12):
            async with open_trader(hub, 2) as consumer:
                for other in (provider, third):
                    await consumer.network.connect(other.network.addresses[0])
                await trio.sleep(1)
                for second in range(60):
                    offer = consumer.offer(100 * minute + second)
                    with consumer.market.bids(offer.body.job_id) as bids:
                        await consumer.market.publish_offer(offer)
                        heard = await provider.market.next_offer()
                        assert heard == offer
                        await provider.market.publish_bid(provider.bid(heard))
                        assert (await bids.receive()).sender == provider.network.node_id
                    await trio.sleep(1)
                assert consumer.network.statistics().gossip_refused == {}
            for trader in (provider, third):
                assert trader.network.statistics().gossip_refused == {}
        assert provider.market.statistics().offers_heard == third.market.statistics().offers_heard == 12 * 60
        assert len(provider.market._view._replay) <= 2 * MAX_PER_SENDER


async def test_offers_arrive_in_order(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b):
        offers = [a.offer(number) for number in range(20)]
        for offer in offers:
            await a.market.publish_offer(offer)
        await trio.sleep(1)
        assert b.market.statistics().offers.waiting == 20
        assert b.market.statistics().offers_heard == 20
        recent = b.market.recent_offers()
        assert [heard.offer for heard in recent] == offers[: -RECENT_OFFERS - 1 : -1]
        assert all(NOW <= heard.heard_at <= clock() for heard in recent)
        assert await b.heard() == offers


async def test_bids_go_to_the_job_that_waits(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b):
        first, second, third = (a.offer(number) for number in range(3))
        with a.market.bids(first.body.job_id) as first_bids, a.market.bids(second.body.job_id) as second_bids:
            assert a.market.statistics().waiting_jobs == 2
            sent = [b.bid(offer) for offer in (first, second, third, first)]
            for bid in sent:
                await b.market.publish_bid(bid)
            assert await received(first_bids) == [sent[0], sent[3]]
            assert await received(second_bids) == [sent[1]]
        late = b.bid(first)
        await b.market.publish_bid(late)
        with a.market.bids(third.body.job_id) as third_bids, a.market.bids(first.body.job_id) as first_bids:
            assert await received(third_bids) == []
            assert await received(first_bids) == [late]
        assert is_quiet(a.market.statistics())
        assert is_quiet(b.market.statistics())


async def test_an_offer_of_ours_is_not_delivered_to_us(
    autojump_clock: MockClock, hub: MemoryHub, open_traders: OpenTraders
) -> None:
    """Not even when it comes back from a peer after we were started anew."""
    async with open_traders(1) as (a,):
        offer = a.offer()
    async with open_traders(1) as (a,), open_raw(hub, 9) as echo:
        await echo.connect(a.network.addresses[0])
        await echo.publish(a.market.offer_topic(MODEL), offer.data)
        assert await a.heard() == []
        assert a.network.statistics().gossip_accepted == 1
        assert is_quiet(a.market.statistics())


async def test_markets_of_two_networks_are_apart(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with (
        open_trader(hub, 1) as a,
        open_raw(hub, 2) as network,
        open_market(network, "aci-other", clock) as other,
        other.take_part(MODEL),
    ):
        await network.connect(a.network.addresses[0])
        await a.market.publish_offer(a.offer())
        with trio.move_on_after(1) as scope:
            await other.next_offer()
        assert scope.cancelled_caught
        assert network.statistics().gossip_accepted == 0


async def test_a_market_is_left_with_its_block(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_raw(hub, 1) as network, open_trader(hub, 2) as other:
        await other.network.connect(network.addresses[0])
        for _ in range(2):
            async with open_market(network, NETWORK, clock) as opened, opened.take_part(MODEL):
                for topic in (opened.offer_topic(MODEL), opened.bid_topic(MODEL)):
                    assert list(other.network.topic_peers(topic)) == [network.node_id]
            assert other.network.topic_peers(opened.offer_topic(MODEL)) == ()
            assert other.network.topic_peers(opened.bid_topic(MODEL)) == ()


# Refusal.


def forged(envelope: Envelope[Offer] | Envelope[Bid]) -> bytes:
    return envelope.data[:-1] + bytes([envelope.data[-1] ^ 1])


def sealed_anew(trader: Trader, body: Offer | Bid, network: str = NETWORK) -> bytes:
    """A message by a sealer that begins anew: of the same millisecond, it repeats the first sequence number."""
    return Sealer(trader.sealer._key, network).seal(body, clock()).data


MakeBad = Callable[[Trader], bytes]

BAD_OFFERS: Final[list[tuple[MakeBad, Reason]]] = [
    (lambda _: b"", Reason.NOT_CANONICAL),
    (lambda _: bytes(2_000), Reason.TOO_LARGE),
    (lambda _: b"\xa0", Reason.MALFORMED),
    (lambda a: forged(a.offer(7)), Reason.BAD_SIGNATURE),
    (lambda a: a.offer(7, at=-60_000).data, Reason.EXPIRED),
    (lambda a: a.offer(7, at=MAX_SKEW_MS + 1_000).data, Reason.FROM_FUTURE),
    (lambda a: sealed_anew(a, a.offer(7).body, "aci-other"), Reason.WRONG_NETWORK),
    (lambda a: a.bid(a.offer(7)).data, Reason.WRONG_KIND),
    (lambda a: a.offer(7, job_id=bytes(32)).data, Reason.BAD_JOB_ID),
    (lambda a: a.offer(7, max_tokens=0).data, Reason.MALFORMED),
    (lambda a: a.offer(7, bid_deadline=NOW + 20_000).data, Reason.BAD_DEADLINE),
    # Offer 0 has gone out before, and this is an older one.
    (lambda a: sealed_anew(a, a.offer(0, max_price=1).body), Reason.REPLAYED),
    (lambda a: sealed_anew(a, a.offer(7).body), Reason.REPLAYED),
]


@pytest.mark.parametrize(("make", "reason"), BAD_OFFERS, ids=lambda value: getattr(value, "value", "offer"))
async def test_a_bad_offer_is_refused_by_its_reason(
    autojump_clock: MockClock, open_traders: OpenTraders, make: MakeBad, reason: Reason
) -> None:
    async with open_traders(3) as (a, b, c):
        offers = [a.offer(0), a.offer(1)]
        await a.market.publish_offer(offers[0])
        await a.network.publish(a.market.offer_topic(MODEL), make(a))
        await a.market.publish_offer(offers[1])
        assert await b.heard() == offers
        assert await c.heard() == offers
        assert b.network.statistics().gossip_refused == {reason: 1}
        # It went no further.
        assert c.network.statistics().gossip_refused == {}
        assert c.network.statistics().gossip_accepted == len(offers)


BAD_BIDS: Final[list[tuple[Callable[[Trader, Envelope[Offer]], bytes], Reason]]] = [
    (lambda _, __: b"", Reason.NOT_CANONICAL),
    (lambda b, offer: forged(b.bid(offer)), Reason.BAD_SIGNATURE),
    (lambda b, offer: b.bid(offer, at=-60_000).data, Reason.EXPIRED),
    (lambda b, offer: b.bid(offer, at=MAX_SKEW_MS + 1_000).data, Reason.FROM_FUTURE),
    (lambda b, offer: sealed_anew(b, b.bid(offer).body, "aci-other"), Reason.WRONG_NETWORK),
    (lambda _, offer: offer.data, Reason.WRONG_KIND),
    # The first bid has gone out before.
    (lambda b, offer: sealed_anew(b, b.bid(offer, latency_ms=2).body), Reason.REPLAYED),
    # The node between has seen the offer, and holds the bid to it.
    (lambda b, offer: b.bid(offer, offer_digest=bytes(32)).data, Reason.WRONG_JOB),
    (lambda b, offer: b.bid(offer, latency_ms=2).data, Reason.DUPLICATE_BID),
]


@pytest.mark.parametrize(("make", "reason"), BAD_BIDS, ids=lambda value: getattr(value, "value", "bid"))
async def test_a_bad_bid_is_refused_by_its_reason(
    autojump_clock: MockClock,
    open_traders: OpenTraders,
    make: Callable[[Trader, Envelope[Offer]], bytes],
    reason: Reason,
) -> None:
    async with open_traders(3) as (a, b, c):
        offer, other = a.offer(0), a.offer(1)
        for known in (offer, other):
            await a.market.publish_offer(known)
        await c.heard()
        with a.market.bids(offer.body.job_id) as bids, a.market.bids(other.body.job_id) as other_bids:
            # The sealer's first, so that one that begins anew repeats its number.
            sent = [c.bid(offer), c.bid(other)]
            await c.market.publish_bid(sent[0])
            await c.network.publish(c.market.bid_topic(MODEL), make(c, offer))
            await c.market.publish_bid(sent[1])
            assert await received(bids) == sent[:1]
            assert await received(other_bids) == sent[1:]
        assert b.network.statistics().gossip_refused == {reason: 1}
        assert a.network.statistics().gossip_refused == {}
        assert a.network.statistics().gossip_accepted == len(sent)


async def test_a_message_seen_before_is_not_delivered_again(
    autojump_clock: MockClock, hub: MemoryHub, open_traders: OpenTraders
) -> None:
    """Whoever brings it; after its lifetime it has expired, after the network has forgotten it too."""
    async with open_traders(2) as (a, b), open_raw(hub, 9) as echo:
        offer = a.offer()
        await a.market.publish_offer(offer)
        assert await b.heard() == [offer]
        await echo.connect(b.network.addresses[0])
        await echo.publish(b.market.offer_topic(MODEL), offer.data)
        assert await b.heard() == []
        await trio.sleep(300)
        async with open_raw(hub, 10) as late:
            await late.connect(b.network.addresses[0])
            await late.publish(b.market.offer_topic(MODEL), offer.data)
            assert await b.heard() == []
        assert b.network.statistics().gossip_refused == {Reason.EXPIRED: 1}


@pytest.mark.parametrize("reason", [Reason.BAD_SIGNATURE, Reason.EXPIRED])
async def test_who_forwards_what_no_honest_node_does_is_left(
    autojump_clock: MockClock, open_traders: OpenTraders, reason: Reason
) -> None:
    async with open_traders(2) as (a, b):
        for number in range(MAX_REJECTS_PER_MINUTE):
            is_forged = reason is Reason.BAD_SIGNATURE
            data = forged(a.offer(number)) if is_forged else a.offer(number, at=-60_000).data
            await a.network.publish(a.market.offer_topic(MODEL), data)
        await trio.sleep(1)
        assert b.network.statistics().gossip_refused == {reason: MAX_REJECTS_PER_MINUTE}
        # Who was late may be honest.
        assert (a.network.node_id in b.network.peers) is (reason is Reason.EXPIRED)


def test_what_the_network_is_told(hub: MemoryHub) -> None:
    """IGNORE where the forwarder may be honest, REJECT where it is not."""

    async def main() -> None:
        async with open_trader(hub, 1) as a, open_trader(hub, 2) as b:
            offer = a.offer()
            bid = a.bid(offer)
            node = a.network.node_id
            judge_offer, judge_bid = b.market._models[MODEL].offers.validate, b.market._models[MODEL].bids.validate
            reject, ignore = Decision.REJECT, Decision.IGNORE
            assert judge_offer(node, forged(offer)) == Validation(reject, Reason.BAD_SIGNATURE)
            assert judge_offer(node, offer.data) == ACCEPTED
            assert judge_offer(node, offer.data) == Validation(ignore, Reason.REPLAYED)
            assert judge_bid(node, offer.data) == Validation(reject, Reason.WRONG_KIND)
            assert judge_bid(node, bid.data) == ACCEPTED
            assert judge_bid(node, bid.data) == Validation(ignore, Reason.REPLAYED)

    trio.run(main, clock=MockClock())


# Limits.


async def test_a_provider_that_lags_loses_offers(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b):
        offers = [a.offer(number) for number in range(OFFER_QUEUE + 5)]
        for offer in offers:
            await a.market.publish_offer(offer)
        await trio.sleep(1)
        statistics = b.market.statistics()
        assert (statistics.offers.waiting, statistics.offers.dropped) == (OFFER_QUEUE, 5)
        assert await b.heard() == offers[5:]
        again = a.offer(OFFER_QUEUE + 5)
        await a.market.publish_offer(again)
        assert await b.heard() == [again]
        assert b.market.statistics().offers.dropped == 5


async def test_a_job_that_lags_loses_bids(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b):
        offer = a.offer()
        with a.market.bids(offer.body.job_id) as bids:
            sent = [b.bid(offer) for _ in range(MAX_BIDS + 3)]
            for bid in sent:
                await b.market.publish_bid(bid)
            await trio.sleep(1)
            assert a.market.statistics().job_bids_dropped == 3
            assert await received(bids) == sent[:MAX_BIDS]


async def test_a_job_that_reads_no_more_harms_nobody(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b):
        first, second = a.offer(0), a.offer(1)
        with a.market.bids(first.body.job_id) as closed, a.market.bids(second.body.job_id) as bids:
            closed.close()
            sent = [b.bid(first), b.bid(second)]
            for bid in sent:
                await b.market.publish_bid(bid)
            assert await received(bids) == sent[1:]
            assert a.market.statistics().job_bids_dropped == 1


async def test_jobs_that_wait_are_limited(
    autojump_clock: MockClock, open_traders: OpenTraders, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_WAITING_JOBS == 1_024
    monkeypatch.setattr(market, "MAX_WAITING_JOBS", 2)
    async with open_traders(1) as (a,):
        with a.market.bids(b"1"), a.market.bids(b"2"):
            with pytest.raises(ResourceError, match="2 jobs wait for bids already"), a.market.bids(b"3"):
                pass
            assert a.market.statistics().waiting_jobs == 2
        with a.market.bids(b"3"):
            assert a.market.statistics().waiting_jobs == 1


async def test_only_the_author_of_a_flood_is_blamed_for_it(
    autojump_clock: MockClock, open_traders: OpenTraders
) -> None:
    async with open_traders(3) as (a, b, c):
        for number in range(MAX_PER_SENDER):
            assert b.market._models[MODEL].offers.validate(a.network.node_id, a.offer(number).data) == ACCEPTED
        more = [a.offer(MAX_PER_SENDER + number).data for number in range(2)]
        ignored = Validation(Decision.IGNORE, Reason.FLOODED)
        assert b.market._models[MODEL].offers.validate(c.network.node_id, more[0]) == ignored
        assert b.market._models[MODEL].offers.validate(a.network.node_id, more[1]) == replace(
            ignored, decision=Decision.REJECT
        )


class Delivered(Subscription):
    """A subscription that holds what a test says."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)

    async def receive(self) -> GossipMessage:
        if not self.messages:
            await trio.sleep_forever()
        return GossipMessage(KeyPair(bytes(32)).node_id, self.messages.pop(0))

    @property
    def dropped(self) -> int:
        return 0


async def test_a_flood_of_bids_costs_no_offer(
    autojump_clock: MockClock, open_traders: OpenTraders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are checked before they are queued, and what was checked is remembered within limits."""
    monkeypatch.setattr(topic, "MAX_CHECKED", OFFER_QUEUE)
    async with open_traders(2) as (a, b), trio.open_nursery() as nursery:
        offer = a.offer(0)
        assert b.market._models[MODEL].offers.validate(a.network.node_id, offer.data) == ACCEPTED
        bids = [a.bid(offer, job_id=number.to_bytes(32)) for number in range(2 * OFFER_QUEUE - 10)]
        for bid in bids:
            assert b.market._models[MODEL].bids.validate(a.network.node_id, bid.data) == ACCEPTED
        remembered = [
            *b.market._models[MODEL].offers._checked.values(),
            *b.market._models[MODEL].bids._checked.values(),
        ]
        assert remembered == [offer, *bids[-OFFER_QUEUE:]]
        nursery.start_soon(b.market._models[MODEL].offers.deliver, Delivered(offer.data))
        assert await b.heard() == [offer]
        assert not b.market._models[MODEL].offers._checked
        nursery.cancel_scope.cancel()


async def test_a_message_that_was_not_checked_is_not_delivered(
    autojump_clock: MockClock, open_traders: OpenTraders
) -> None:
    async with open_traders(2) as (a, b), trio.open_nursery() as nursery:
        unchecked, checked = a.offer(0), a.offer(1)
        b.market._models[MODEL].offers.validate(a.network.node_id, checked.data)
        nursery.start_soon(
            b.market._models[MODEL].offers.deliver, Delivered(unchecked.data, checked.data, checked.data)
        )
        assert await b.heard() == [checked]
        nursery.cancel_scope.cancel()


# Reachability.


async def test_waiting_until_peers_have_joined(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as a, open_raw(hub, 2) as b, open_raw(hub, 3) as c, trio.open_nursery() as nursery:
        for other in (b, c):
            await other.connect(a.network.addresses[0])
        start = trio.current_time()

        async def join(network: Network, after: float) -> None:
            await trio.sleep(after)
            async with open_market(network, NETWORK, clock) as market, market.take_part(MODEL):
                await trio.sleep_forever()

        nursery.start_soon(join, b, 1)
        nursery.start_soon(join, c, 2)
        await a.market.wait_until_reachable(MODEL, [], 10)
        assert trio.current_time() == start
        await a.market.wait_until_reachable(MODEL, [b.node_id], 10)
        assert 1 <= trio.current_time() - start < 1.1
        await a.market.wait_until_reachable(MODEL, [b.node_id, c.node_id], 10)
        assert 2 <= trio.current_time() - start < 2.1
        await a.market.wait_until_reachable(MODEL, [b.node_id, KeyPair(bytes(32)).node_id], 10)
        assert 12 <= trio.current_time() - start < 12.2
        nursery.cancel_scope.cancel()


# Models.

OTHER: Final = bytes([1]) * 32


async def test_models_are_apart(autojump_clock: MockClock, hub: MemoryHub, open_traders: OpenTraders) -> None:
    """Who takes part in one model carries nothing of another; one queue holds the offers for all of ours."""
    async with open_traders(3) as (a, b, c), a.market.take_part(OTHER), c.market.take_part(OTHER):
        await a.network.connect(c.network.addresses[0])
        await trio.sleep(1)
        both = [a.offer(1), a.offer(2, model_root=OTHER)]
        for offer in both:
            await a.market.publish_offer(offer)
        assert await b.heard() == both[:1]
        assert sorted(offer.digest for offer in await c.heard()) == sorted(offer.digest for offer in both)
        assert b.network.statistics().gossip_accepted == 1
        assert c.market.statistics().offers_heard == 2
        with a.market.bids(both[1].body.job_id) as bids:
            bid = c.bid(both[1])
            await c.market.publish_bid(bid)
            assert await received(bids) == [bid]


async def test_members_take_part_in_any_of_our_models(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(2) as (a, b), b.market.take_part(OTHER):
        nodes = frozenset({b.network.node_id})
        await trio.sleep(1)
        assert a.market.members() == (nodes, nodes)
    async with open_traders(1) as (a,):
        assert a.market.members() == (frozenset(), frozenset())


async def test_nothing_is_said_where_no_part_is_taken(autojump_clock: MockClock, open_traders: OpenTraders) -> None:
    async with open_traders(1) as (a,):
        offer = a.offer(model_root=OTHER)
        with pytest.raises(LocalError, match="no part"):
            await a.market.publish_offer(offer)
        with pytest.raises(LocalError, match="no part"):
            await a.market.publish_bid(a.bid(offer))
        async with a.market.take_part(OTHER):
            # It was not remembered as said.
            await a.market.publish_offer(offer)
        with pytest.raises(LocalError, match="no part"):
            await a.market.publish_offer(a.offer(1, model_root=OTHER))
