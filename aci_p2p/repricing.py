"""Moves a provider's prices with its load, if its owner wants that (`--price auto`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.config import ProviderConfig
from aci_p2p.protocol.autoprice import AutoPrice
from aci_p2p.protocol.bidding import Offering
from aci_p2p.protocol.pricing import MAX_TOKEN_PRICE, format_amount, load_milli
from aci_p2p.provider import ProviderRole
from aci_p2p.tasks import Notice

SAMPLE_S: Final = 1.0
"""Seconds between looks at the load: short jobs are seen too."""

log = logging.getLogger("aci_p2p.provider")


class Repricing:
    """The prices of one provider."""

    def __init__(self, role: ProviderRole, clock: Clock, on_change: Callable[[], None]) -> None:
        """`on_change` is called when prices have moved; `clock` gives Unix milliseconds."""
        self._role = role
        self._clock = clock
        self._on_change = on_change
        self._offerings: Sequence[Offering] = ()
        self._prices: AutoPrice | None = None
        self._configured = Notice()

    def offer(self, offerings: Sequence[Offering], config: ProviderConfig) -> None:
        """Serve this for the prices that `config` says: fixed ones, or where the price is now, within its bounds."""
        price = self._prices.price if self._prices else config.output_token_price
        self._offerings = offerings
        self._prices = None
        if config.price == "auto":
            floor, ceiling = config.price_bounds
            self._prices = AutoPrice(price, floor=floor, ceiling=ceiling, now=self._clock())
        self._role.region = config.region
        self._apply(config.slots)
        self._configured.notify()

    async def run(self) -> None:
        """Follow the load, until cancelled."""
        while True:
            if self._prices is None:
                await self._configured.wait()
            else:
                self._follow(self._prices)
                await trio.sleep(SAMPLE_S)

    def _follow(self, prices: AutoPrice) -> None:
        work = self._role.statistics()
        if not prices.note(load_milli(work.slots, max(work.slots - work.running, 0)), self._clock()):
            return
        # A model that turned out to be damaged was withdrawn.
        served = {record.model_root for record in self._role.capabilities()}
        self._offerings = [offering for offering in self._offerings if offering.root in served]
        self._apply(work.slots)
        self._on_change()
        log.info("price", extra={"fields": {"output_token": format_amount(prices.price)}})

    def _apply(self, slots: int) -> None:
        served = self._offerings
        if self._prices is not None:
            served = [_at(offering, self._prices.price) for offering in served]
        self._role.offer(served, slots)


def _at(offering: Offering, output_price: int) -> Offering:
    """An offering with another price of output tokens; that of prompt tokens keeps its proportion."""
    base = offering.output_token_price
    input_price = -(-offering.input_token_price * output_price // base) if base else offering.input_token_price
    return replace(offering, input_token_price=min(input_price, MAX_TOKEN_PRICE), output_token_price=output_price)
