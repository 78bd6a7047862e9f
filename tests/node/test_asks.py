"""Standing asks of whole nodes: what providers publish, what consumers see, and prices that follow the load."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI, ProviderConfig
from aci_p2p.control.market import ModelSummary, read_market, summarise_market
from aci_p2p.control.wire import BadRequest
from aci_p2p.network.limits import MAX_STREAMS_TO_PEER
from aci_p2p.node import Node
from aci_p2p.protocol.publications import Ask, PriceStep
from tests.node.conftest import MODEL, ROOT, OpenTestNode, ScriptedExecutor


@asynccontextmanager
async def opened(opener: OpenTestNode, **options: Any) -> AsyncGenerator[tuple[Node, Node]]:  # noqa: ANN401 - the fixture's
    """A provider and a consumer that knows it."""
    async with (
        opener("provider", executor=ScriptedExecutor(pace=1.0), **options) as provider,
        opener("consumer", provider.addresses[:1]) as consumer,
    ):
        yield provider, consumer


def book(node: Node) -> list[Ask]:
    return [ask.body for ask in node.asks.book.view(ROOT, node.clock())]


async def configured(provider: Node, **changes: Any) -> ProviderConfig:  # noqa: ANN401 - fields of the class
    """Give a provider another configuration."""
    config = provider.config.provider
    assert config
    changed = replace(config, **changes)
    await provider.provide(changed)
    return changed


async def test_a_search_fills_the_book(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with opened(open_test_node) as (provider, consumer):
        await configured(provider, region="eu-west")
        assert book(consumer) == []
        await consumer.find_providers(ROOT)
        await trio.sleep(1)
        (ask,) = book(consumer)
        assert (ask.model_name, ask.slots, ask.free_slots, ask.region) == (MODEL, 2, 2, "eu-west")
        assert (ask.input_token_price, ask.output_token_price, ask.price_curve) == (1, 100, ())
        assert ask.addresses == tuple(provider.addresses)
        assert ask.engine.name == "scripted/1"


async def test_the_book_and_bids_follow_the_load(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with opened(open_test_node) as (provider, consumer), ACI(consumer) as aci:
        curve = (PriceStep(500, 1_500),)
        await configured(provider, price_curve=curve)
        assert provider.provider
        assert provider.provider.capabilities()[0].price_curve == curve
        assert await consumer.asks.wait_for_asks(ROOT, 5)
        await trio.sleep(5)
        async with aci.stream(model=ROOT.hex(), prompt="count") as first:
            async for _ in first:
                break
            await trio.sleep(1)
            (ask,) = book(consumer)
            # Half loaded: one more job costs half as much again.
            assert (ask.free_slots, ask.price_curve) == (1, curve)
            (entry,) = (await read_market(consumer, ROOT.hex()))["models"][0]["asks"]
            assert (entry["output_token_price"], entry["free_slots"]) == ("150", 1)
            second = await aci.inference(model=ROOT.hex(), prompt="count")
            assert second.receipt.body.price == (10 * 2 + 4 * 150) * 5 // 4


async def test_a_provider_without_asks_only_bids(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with opened(open_test_node) as (provider, consumer), ACI(consumer) as aci:
        assert await consumer.asks.wait_for_asks(ROOT, 5)
        await configured(provider, asks=False)
        await trio.sleep(1)
        assert book(consumer) == []
        assert provider.asks.models == (ROOT,)
        assert (await aci.inference(model=ROOT.hex(), prompt="count")).text
        await configured(provider, asks=True)
        assert await consumer.asks.wait_for_asks(ROOT, 5)


async def test_who_is_stopped_takes_its_asks_back(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with open_test_node("consumer") as consumer:
        async with open_test_node("provider", consumer.addresses[:1], executor=ScriptedExecutor()) as provider:
            assert await consumer.asks.wait_for_asks(ROOT, 5)
            assert provider.provider
            await trio.sleep(3)
            await provider.provider.drain(0)
            await trio.sleep(1)
            assert [ask.free_slots for ask in book(consumer)] == [0]
        await trio.sleep(0.1)
        assert book(consumer) == []


@pytest.mark.parametrize("asks", [True, False])
async def test_more_jobs_at_once_than_one_provider_has_streams_wait(
    autojump_clock: MockClock, open_test_node: OpenTestNode, *, asks: bool
) -> None:
    jobs = MAX_STREAMS_TO_PEER + 12
    async with opened(open_test_node) as (provider, consumer), ACI(consumer) as aci:
        await configured(provider, slots=jobs, asks=asks)
        assert await consumer.asks.wait_for_asks(ROOT, 5) is asks
        most = 0

        async def ask() -> None:
            nonlocal most
            async with aci.stream(model=ROOT.hex(), prompt="count") as answer:
                async for _ in answer:
                    assert provider.provider
                    most = max(most, provider.provider.statistics().running)

        async with trio.open_nursery() as nursery:
            for _ in range(jobs):
                nursery.start_soon(ask)
                # Within the time of the first, and slower than bids are counted (MAX_PER_CONSUMER).
                await trio.sleep(0.05)
        assert most == MAX_STREAMS_TO_PEER
        assert provider.provider
        assert provider.provider.statistics().finished == jobs
        # The limit is ours: nobody is blamed for it.
        assert consumer.reputation.standing(provider.node_id, ROOT, consumer.clock()).success_milli > 900


async def test_prices_follow_how_busy_a_provider_is(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with opened(open_test_node, slots=1) as (provider, consumer), ACI(consumer) as aci:
        await configured(provider, price="auto", price_floor=90, price_ceiling=120, input_token_price=10)
        role = provider.provider
        assert role

        def prices() -> tuple[int, int]:
            (record,) = role.capabilities()
            return record.input_token_price, record.output_token_price

        assert prices() == (10, 100)
        # Idle, it becomes cheaper, down to the floor; prompt tokens keep their proportion.
        await trio.sleep(61)
        assert prices() == (10, 95)
        await trio.sleep(600)
        assert prices() == (9, 90)
        await consumer.asks.wait_for_asks(ROOT, 5)
        assert [ask.output_token_price for ask in book(consumer)] == [90]
        # Busy, dearer again.
        began = trio.current_time()
        while trio.current_time() < began + 190:
            await aci.inference(model=ROOT.hex(), prompt="count")
        dearer = prices()
        assert 100 < dearer[1] <= 120
        # Configured again, it goes on from where it is; a fixed price is what it says.
        await configured(provider, price_floor=80)
        assert prices() == dearer
        await configured(provider, price="fixed")
        assert prices() == (10, 100)
        await trio.sleep(600)
        assert prices() == (10, 100)


async def test_the_market_of_a_running_node(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with opened(open_test_node) as (provider, consumer):
        report = await read_market(consumer, ROOT.hex())
        (market,) = report["models"]
        (entry,) = market["asks"]
        assert market["model_root"] == ROOT.hex()
        assert (entry["provider"], entry["own"], entry["slots"]) == (str(provider.node_id), False, 2)
        assert 0 <= entry["age_s"] < 10
        assert await read_market(consumer, "") == await read_market(consumer, ROOT.hex())
        assert await summarise_market(consumer) == [
            ModelSummary(ROOT.hex(), 1, int(entry["output_token_price"]), slots=2, free_slots=2)
        ]
        # A provider sees itself.
        (entry,) = (await read_market(provider, ""))["models"][0]["asks"]
        assert (entry["own"], entry["age_s"]) == (True, 0)
        assert await summarise_market(provider) == await summarise_market(consumer)
        began = trio.current_time()
        assert (await read_market(consumer, "ab" * 32))["models"][0]["asks"] == []
        assert len(await summarise_market(consumer)) == 1
        assert trio.current_time() - began < 8
        for wrong in ("zz", "ab"):
            with pytest.raises(BadRequest, match="64 hex digits"):
                await read_market(consumer, wrong)
