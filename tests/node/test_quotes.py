"""The streams of quotes: which stay open for the award, and which are closed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from aci_p2p.gossip import Asks
from aci_p2p.jobs import SharedEvent, StreamPump
from aci_p2p.network import Network
from aci_p2p.protocol.round import BidArrived, QuoteRefused, QuotesAsked
from aci_p2p.quotes import Quotes
from aci_p2p.tasks import open_background
from tests.protocol.driver import CONSUMER, NOW, PROVIDER, make_bid, make_offer

OFFER = make_offer()


class QuotingStream:
    """Answers an offer with a bid, and says nothing more."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False
        self._frames = [make_bid(OFFER).data]

    async def send(self, frame: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(frame)

    async def receive(self) -> bytes:
        if not self._frames:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return self._frames.pop()


class QuotingNetwork:
    """One provider, which quotes."""

    node_id = CONSUMER.node_id

    def __init__(self) -> None:
        self.stream = QuotingStream()

    def learn_addresses(self, *_args: object) -> None:
        """It is known."""

    @asynccontextmanager
    async def open_stream(self, *_args: object, eager: bool) -> AsyncGenerator[QuotingStream]:
        assert eager
        await trio.lowlevel.checkpoint()
        try:
            yield self.stream
        finally:
            self.stream.closed = True


class ShortBook:
    """An order book with the ask of that provider."""

    def best(self, *_args: object, **_terms: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(sender=PROVIDER.node_id, body=SimpleNamespace(addresses=()))]

    def is_full(self, *_args: object) -> bool:
        return False


@pytest.fixture
def network() -> QuotingNetwork:
    return QuotingNetwork()


@pytest.fixture
def quotes(network: QuotingNetwork) -> Quotes:
    return Quotes(
        cast("Network", network),
        cast("Asks", SimpleNamespace(book=ShortBook())),
        lambda: NOW + int(trio.current_time() * 1_000),
        Random(1),  # noqa: S311 - not a secret
    )


async def hear_nothing(_event: SharedEvent, _pump: StreamPump) -> None:
    """A job that is not interested in its stream."""
    await trio.lowlevel.checkpoint()


async def ignore(_event: QuotesAsked | QuoteRefused | BidArrived) -> None:
    """A job that has other things to do first."""
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def asked(quotes: Quotes) -> AsyncGenerator[None]:
    """Within the block the provider has quoted."""
    async with open_background() as tasks:
        tasks.start_soon(quotes.ask, OFFER, (), ignore)
        await wait_all_tasks_blocked()
        yield


async def test_a_quote_that_the_job_has_not_heard_of_yet_is_not_given_back(
    autojump_clock: MockClock, network: QuotingNetwork, quotes: Quotes
) -> None:
    async with asked(quotes):
        quotes.release(unheard=False)
        await wait_all_tasks_blocked()
        assert not network.stream.closed
        pump = StreamPump(hear_nothing)
        assert quotes.award(PROVIDER.node_id, pump)
        await pump.send(b"award")
        await wait_all_tasks_blocked()
        assert network.stream.sent == [OFFER.data, b"award"]
        pump.close()


async def test_a_quote_that_the_job_has_passed_over_is_given_back(
    autojump_clock: MockClock, network: QuotingNetwork, quotes: Quotes
) -> None:
    async with asked(quotes):
        quotes.weighed(PROVIDER.node_id)
        quotes.release(unheard=False)
        await wait_all_tasks_blocked()
        assert network.stream.closed
        assert not quotes.award(PROVIDER.node_id, StreamPump(hear_nothing))


async def test_a_job_that_is_over_gives_all_quotes_back(
    autojump_clock: MockClock, network: QuotingNetwork, quotes: Quotes
) -> None:
    async with asked(quotes):
        quotes.release(unheard=True)
        await wait_all_tasks_blocked()
        assert network.stream.closed
