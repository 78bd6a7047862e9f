"""Standing asks over the in-memory network: who hears them, when they are published, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.dht import RecordRules
from aci_p2p.gossip import Asks, Market, asks, open_asks, open_market
from aci_p2p.gossip.asks import FOLLOW_S
from aci_p2p.network import Network
from aci_p2p.network.limits import MAX_TOPICS_PER_PEER
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.pacing import ASKS_PER_SECOND, BURST, RENEW_MS
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.validation import ACCEPTED, Reason, Validation
from tests.protocol.asking import ASK, chance
from tests.protocol.driver import MODEL_ROOT, NETWORK, NOW, alter

TOPIC: Final = f"/aci/{NETWORK}/asks/{MODEL_ROOT.hex()}/1"
LATENCY: Final = 0.01


def clock() -> int:
    """Virtual time, from NOW."""
    return NOW + virtual_clock()


def take(forwarder: NodeId, data: bytes) -> Validation:
    """Whatever comes."""
    return ACCEPTED


@dataclass
class Trader:
    """A node with asks; what it offers can be changed."""

    network: Network
    market: Market
    asks: Asks
    offers: list[Ask] = field(default_factory=list[Ask])

    def offer(self, *offers: Ask) -> None:
        """Ask this from now on."""
        self.offers[:] = offers
        self.asks.offer(lambda: self.offers, lambda: True)

    def book(self, root: bytes = MODEL_ROOT) -> dict[NodeId, Ask]:
        """What it knows."""
        return {ask.sender: ask.body for ask in self.asks.book.view(root, clock())}


@asynccontextmanager
async def open_trader(hub: MemoryHub, number: int, *others: Trader) -> AsyncGenerator[Trader]:
    key, rules = KeyPair(number.to_bytes(32)), RecordRules(NETWORK, clock)
    async with (
        hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as network,
        open_market(network, NETWORK, clock, random=chance(number)) as market,
        open_asks(network, market, Sealer(key, NETWORK), clock, random=chance(number)) as opened,
    ):
        for other in others:
            await network.connect(other.network.addresses[0])
        yield Trader(network, market, opened)


async def test_followers_hear_what_is_asked(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as seller, open_trader(hub, 2, seller) as buyer, open_trader(hub, 3, buyer) as far:
        buyer.asks.follow(MODEL_ROOT)
        far.asks.follow(MODEL_ROOT)
        seller.offer(ASK)
        await trio.sleep(2)
        assert buyer.book() == far.book() == {seller.network.node_id: ASK}
        # Nobody hears itself.
        assert seller.book() == {}
        # It is there before it expires, time and again, and forgotten when it does.
        for _ in range(20):
            await trio.sleep(30)
            far.asks.follow(MODEL_ROOT)
            buyer.asks.follow(MODEL_ROOT)
            assert far.book() == {seller.network.node_id: ASK}
        statistics = far.asks.statistics()
        assert (statistics.models, statistics.held, statistics.refused) == (1, 1, {})
        assert statistics.heard == seller.asks.statistics().published
        assert 25 < statistics.heard < 40


async def test_who_comes_later_has_the_book_at_once(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as seller:
        seller.offer(ASK)
        await trio.sleep(2)
        async with open_trader(hub, 2, seller) as buyer:
            began = trio.current_time()
            assert await buyer.asks.wait_for_asks(MODEL_ROOT, 5)
            assert trio.current_time() - began < 20 * LATENCY
            assert seller.asks.statistics().published == 1
            assert not await buyer.asks.wait_for_asks(bytes(32), 5)
            assert trio.current_time() - began > 5


async def test_changes_are_told_at_once(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as seller, open_trader(hub, 2, seller) as buyer:
        buyer.asks.follow(MODEL_ROOT)
        seller.offer(ASK)
        await trio.sleep(5)
        for change in (replace(ASK, free_slots=0), replace(ASK, output_token_price=99)):
            seller.offer(change)
            seller.asks.look_again()
            await trio.sleep(5 * LATENCY)
            assert buyer.book() == {seller.network.node_id: change}
            await trio.sleep(5)
        said = seller.asks.statistics().published
        # One more slot or less can wait.
        seller.offer(replace(ASK, output_token_price=99, free_slots=3))
        await trio.sleep(1)
        assert seller.asks.statistics().published == said


async def test_what_is_served_no_more_is_taken_back(autojump_clock: MockClock, hub: MemoryHub) -> None:
    other = alter(ASK, model_root=bytes([9]) * 32)
    async with open_trader(hub, 2) as buyer:
        async with open_trader(hub, 1, buyer) as seller:
            buyer.asks.follow(MODEL_ROOT)
            buyer.asks.follow(other.model_root)
            seller.offer(ASK, other)
            await trio.sleep(2)
            assert buyer.book() == {seller.network.node_id: ASK}
            assert buyer.book(other.model_root) == {seller.network.node_id: other}
            seller.offer(other)
            await trio.sleep(5 * LATENCY)
            assert buyer.book() == {}
            assert seller.asks.models == (other.model_root,)
        # Who leaves takes back the rest.
        await trio.sleep(5 * LATENCY)
        assert buyer.book(other.model_root) == {}


async def test_interest_ends(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as seller, open_trader(hub, 2, seller) as buyer:
        seller.offer(ASK)
        buyer.asks.follow(MODEL_ROOT)
        await trio.sleep(FOLLOW_S - 1)
        buyer.asks.follow(MODEL_ROOT)
        await trio.sleep(FOLLOW_S - 1)
        assert buyer.asks.statistics().models == 1
        assert buyer.book()
        await trio.sleep(2)
        assert buyer.asks.statistics().models == 0
        assert buyer.book() == {}
        assert buyer.network.node_id not in seller.network.topic_peers(TOPIC)
        # And begins again.
        assert await buyer.asks.wait_for_asks(MODEL_ROOT, 5)


@pytest.fixture
def two_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than two models are followed."""
    monkeypatch.setattr(asks, "MAX_FOLLOWED", 2)


async def test_followed_models_have_a_bound(autojump_clock: MockClock, hub: MemoryHub, two_followed: None) -> None:
    first, second, third = (bytes([number]) * 32 for number in (1, 2, 3))
    async with open_trader(hub, 1) as node:
        node.offer(ASK)
        for root in (first, second, first, third):
            node.asks.follow(root)
            await trio.sleep(1)
        assert set(node.asks.models) == {MODEL_ROOT, first, third}
        # One that is dropped and wanted again before it has ended stays.
        node.asks.follow(second)
        node.asks.follow(first)
        await trio.sleep(1)
        assert first in node.asks.models


async def test_who_serves_takes_part_in_the_market_and_may_ask_nothing(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    async with open_trader(hub, 1) as seller, open_trader(hub, 2, seller) as buyer:
        await buyer.asks.join(MODEL_ROOT)
        speaks = False
        seller.offers[:] = [ASK]
        seller.asks.offer(lambda: seller.offers, lambda: speaks)
        topics = [f"/aci/{NETWORK}/{kind}/{MODEL_ROOT.hex()}/1" for kind in ("offers", "bids", "asks")]
        await trio.sleep(400)
        assert all(buyer.network.topic_peers(topic) == (seller.network.node_id,) for topic in topics)
        assert seller.asks.offered(MODEL_ROOT) is None
        assert seller.asks.statistics().published == 0
        # The buyer has left them meanwhile.
        assert not any(seller.network.topic_peers(topic) for topic in topics)
        speaks = True
        seller.asks.look_again()
        assert await buyer.asks.wait_for_asks(MODEL_ROOT, 5)


async def test_joining_waits_until_all_topics_are_joined(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as node, trio.open_nursery() as nursery:
        assert not node.asks.models
        for _ in range(3):
            nursery.start_soon(node.asks.join, MODEL_ROOT)
        await node.asks.join(MODEL_ROOT)
        # Would raise if it had not joined.
        node.market._topics(MODEL_ROOT)


async def test_a_model_that_a_job_waits_for_makes_room_last(
    autojump_clock: MockClock, hub: MemoryHub, two_followed: None
) -> None:
    first, second, third = (bytes([number]) * 32 for number in (1, 2, 3))
    async with open_trader(hub, 1) as node:
        with node.asks.hold(first):
            for root in (second, third):
                await trio.sleep(1)
                await node.asks.join(root)
            await trio.sleep(1)
            assert set(node.asks.models) == {first, third}
        await node.asks.join(second)
        await trio.sleep(1)
        assert set(node.asks.models) == {third, second}


async def test_who_follows_many_at_once_drops_each_once(
    autojump_clock: MockClock, hub: MemoryHub, two_followed: None
) -> None:
    async with open_trader(hub, 1) as node:
        for number in range(9):
            node.asks.follow(bytes([number]) * 32)
        await trio.sleep(1)
        assert set(node.asks.models) == {bytes([7]) * 32, bytes([8]) * 32}


async def test_what_is_dropped_and_joined_again_is_joined(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as node:
        for ticks in range(12):
            await node.asks.join(MODEL_ROOT)
            node.asks._models[MODEL_ROOT].drop()
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            await node.asks.join(MODEL_ROOT)
            # Would raise if it had not joined.
            node.market._topics(MODEL_ROOT)


def test_neighbours_take_as_many_topics_as_a_node_has() -> None:
    exchange = 1
    assert 3 * (asks.MAX_FOLLOWED + asks.MAX_OFFERED) + exchange <= MAX_TOPICS_PER_PEER


async def test_offered_models_have_a_bound(
    autojump_clock: MockClock, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "MAX_OFFERED", 1)
    async with open_trader(hub, 1) as node:
        node.offer(ASK, alter(ASK, model_root=bytes(32)))
        assert node.asks.models == (MODEL_ROOT,)


async def test_what_is_refused_is_counted(autojump_clock: MockClock, hub: MemoryHub) -> None:
    key, rules = KeyPair(bytes([9]) * 32), RecordRules(NETWORK, clock)
    async with open_trader(hub, 1) as node:
        async with hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as liar:
            await liar.connect(node.network.addresses[0])
            node.asks.follow(MODEL_ROOT)
            sealer = Sealer(key, NETWORK)
            async with liar.subscribe(TOPIC, take, capacity=1):
                await trio.sleep(1)
                for body in (alter(ASK, model_root=bytes(32)), ASK, alter(ASK, free_slots=9)):
                    await liar.publish(TOPIC, sealer.seal(body, clock()).data)
                    await trio.sleep(1)
        statistics = node.asks.statistics()
        assert statistics.heard == 1
        assert statistics.refused == {Reason.WRONG_MODEL: 1, Reason.MALFORMED: 1}


async def test_an_ask_of_an_earlier_life_is_not_ours_to_buy(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as witness:
        witness.asks.follow(MODEL_ROOT)
        async with open_trader(hub, 2, witness) as seller:
            seller.offer(ASK)
            await trio.sleep(2)
        async with open_trader(hub, 2, witness) as again:
            again.asks.follow(MODEL_ROOT)
            await trio.sleep(5)
            assert again.book() == {}
            assert again.asks.statistics().refused.get(Reason.REPLAYED)


async def test_a_dozen_providers_fill_a_book(autojump_clock: MockClock, hub: MemoryHub) -> None:
    """What more of them say is the pacer's matter (`tests/protocol/test_pacing.py`)."""
    async with trio.open_nursery() as nursery, open_trader(hub, 100) as buyer:
        buyer.asks.follow(MODEL_ROOT)

        async def sell(number: int) -> None:
            async with open_trader(hub, number, buyer) as seller:
                seller.offer(replace(ASK, output_token_price=number))
                await trio.sleep_forever()

        for number in range(1, 13):
            nursery.start_soon(sell, number)
        await trio.sleep(5)
        assert sorted(ask.output_token_price for ask in buyer.book().values()) == list(range(1, 13))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_crowd(hub: MemoryHub, other: Trader) -> AsyncGenerator[Callable[[int], Awaitable[None]]]:
    """A node that passes on asks of as many providers as it is told, in a moment."""
    rules = RecordRules(NETWORK, clock)
    opening = hub.open_network(KeyPair(bytes([9]) * 32), record_validator=rules.validate, record_selector=rules.select)
    async with opening as network, network.subscribe(TOPIC, take, capacity=1):
        await network.connect(other.network.addresses[0])
        await trio.sleep(1)

        async def speak(count: int) -> None:
            for number in range(1_000, 1_000 + count):
                ask = Sealer(KeyPair(number.to_bytes(32)), NETWORK).seal(ASK, clock())
                await network.publish(TOPIC, ask.data)
            await trio.sleep(3 * LATENCY)

        yield speak


def interval_ms(seller: Trader) -> float:
    """How often it speaks."""
    pacer = seller.asks._models[MODEL_ROOT]._pacer
    assert pacer
    return pacer.interval_ms


async def test_a_rush_is_answered_at_once(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as seller, open_crowd(hub, seller) as speak:
        seller.offer(ASK)
        await trio.sleep(2)
        assert interval_ms(seller) == RENEW_MS
        await speak(2 * BURST)
        assert interval_ms(seller) > 1.5 * RENEW_MS


async def test_what_was_said_before_is_no_rush(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_trader(hub, 1) as witness:
        witness.asks.follow(MODEL_ROOT)
        async with open_crowd(hub, witness) as speak:
            await speak(2 * BURST)
        async with open_trader(hub, 2, witness) as seller:
            seller.offer(ASK)
            await trio.sleep(2)
            assert len(seller.book()) == 2 * BURST
            # As long as is fair among so many.
            assert interval_ms(seller) == pytest.approx((2 * BURST + 1) * 1_000 / ASKS_PER_SECOND, rel=0.01)
