"""Searching providers by more than one way, without waiting for the slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.dht.search import PATIENCE_S
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import NodeRecord
from tests.dht.driver import OTHER_ROOT, ROOT, OpenPeers


async def test_a_provider_is_found_when_the_dht_fails(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_nobody(_key: bytes, _limit: int) -> Sequence[NodeId]:
        return ()

    async with open_peers(4) as (_, provider, consumer, other):
        monkeypatch.setattr(consumer.network, "find_providers", find_nobody)
        await provider.announce(provider.capability())
        await trio.sleep(10)
        assert await consumer.found() == [provider.node_id]
        assert await other.found(OTHER_ROOT) == []


async def test_a_search_does_not_wait_for_the_slow(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(4) as (_, consumer, quick, tarpit):
        for provider in (quick, tarpit):
            await provider.announce(provider.capability())
        connect = consumer.network.connect

        async def slow(address: str) -> NodeId:
            if str(tarpit.node_id) in address:
                await trio.sleep(3)
            return await connect(address)

        monkeypatch.setattr(consumer.network, "connect", slow)
        start = trio.current_time()
        assert await consumer.found() == [quick.node_id, tarpit.node_id]
        assert PATIENCE_S <= trio.current_time() - start < PATIENCE_S + 0.5
        # Who wants no more than there are does not wait at all.
        start = trio.current_time()
        assert await consumer.found(limit=1) == [quick.node_id]
        assert trio.current_time() - start < PATIENCE_S
        # The other one is connected all the same.
        await trio.sleep(4)
        assert tarpit.node_id in consumer.network.peers


async def test_searches_at_once_for_one_model_are_one(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(3) as (_, provider, consumer):
        await provider.announce(provider.capability())
        find, asked = consumer.network.find_providers, 0

        async def count(key: bytes, limit: int) -> Sequence[NodeId]:
            nonlocal asked
            asked += 1
            return await find(key, limit)

        monkeypatch.setattr(consumer.network, "find_providers", count)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(consumer.found)
        assert asked == 1
        await consumer.found()
        assert asked == 2


async def test_the_free_come_before_the_busy(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(4) as (consumer, *providers):
        for index, provider in enumerate(providers):
            await provider.announce(replace(provider.capability(), free_slots=4 if index == 1 else 0))
        assert (await consumer.found())[0] == providers[1].node_id
        assert len(await consumer.found()) == 3


async def test_what_changes_is_announced(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, provider, consumer):
        current = provider.capability()
        await provider.discovery.announce(lambda: (NodeRecord((), (), "aci-p2p/1"), (current,)))
        await trio.sleep(20)
        current = replace(current, free_slots=0)
        provider.discovery.look_again()
        await trio.sleep(2)
        (record,) = await consumer.discovery.find_providers(ROOT)
        assert record.body.free_slots == 0
