"""Serving models: the provider's role, what runs its models, and what sets its prices."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.config import ProviderConfig
from aci_p2p.dht import Discovery
from aci_p2p.executor import Executor, ModelStore, open_process_executor
from aci_p2p.gossip import Asks, Market
from aci_p2p.gossip.asks import MAX_OFFERED
from aci_p2p.network import Network
from aci_p2p.protocol.bidding import Offering
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.job import JOB_PROTOCOL
from aci_p2p.protocol.settlement import SETTLE_PROTOCOL
from aci_p2p.protocol.terms import MAX_LABEL_BYTES
from aci_p2p.provider import ProviderRole
from aci_p2p.repricing import Repricing
from aci_p2p.store import Store
from aci_p2p.tasks import open_background

log = logging.getLogger("aci_p2p.node")

CHANGE_GAP_S: Final = 0.05
"""Seconds between two looks at what jobs have changed of what a provider announces and asks; the first is at once."""


class Serving:
    """What a node serves. Made by `open_serving`."""

    def __init__(
        self, role: ProviderRole, executor: Executor, repricing: Repricing, models: ModelStore, config: ProviderConfig
    ) -> None:
        self.role = role
        """Bids, and runs jobs."""
        self.executor = executor
        """Runs the models."""
        self.config = config
        """What it was told last."""
        self._repricing = repricing
        self._models = models

    async def provide(self, config: ProviderConfig) -> None:
        """Serve from now on what `config` says; raises LocalError when a model cannot be served, and goes on as before.

        Nobody is told yet.
        """
        self._repricing.offer(await _offerings(self.executor, self._models, config), config)
        self.config = config


@asynccontextmanager
async def open_serving(
    config: ProviderConfig,
    *,
    network: Network,
    market: Market,
    discovery: Discovery,
    asks: Asks,
    store: Store,
    sealer: Sealer,
    models_path: Path,
    open_executor: Callable[[], AbstractAsyncContextManager[Executor]] | None,
    clock: Clock,
    entropy: Callable[[int], bytes],
) -> AsyncGenerator[Serving]:
    """Serve models within the block, which has to announce them; at its end, jobs that run are handed back.

    `open_executor`: None takes a worker process with the numpy reference. Raises LocalError when one cannot be served.
    """
    models = ModelStore(models_path)
    opening = open_executor() if open_executor else open_process_executor(models, threads=config.threads)
    async with opening as executor, open_background() as nursery:
        offerings = await _offerings(executor, models, config)
        change = trio.Event()

        def changed() -> None:
            change.set()

        async def tell_changes() -> None:
            nonlocal change
            while True:
                await change.wait()
                change = trio.Event()
                discovery.look_again()
                asks.look_again()
                await trio.sleep(CHANGE_GAP_S)

        role = ProviderRole(
            network=network, market=market, executor=executor, store=store, sealer=sealer,
            clock=clock, entropy=entropy, offerings=offerings, slots=config.slots, on_change=changed,
        )  # fmt: skip
        repricing = Repricing(role, clock, changed)
        repricing.offer(offerings, config)
        serving = Serving(role, executor, repricing, models, config)
        with network.serve(JOB_PROTOCOL, role.serve), network.serve(SETTLE_PROTOCOL, role.settle):
            nursery.start_soon(role.bid_on_offers)
            nursery.start_soon(tell_changes)
            nursery.start_soon(repricing.run)
            # Who finds us in the DHT finds us on the model's topics, too.
            asks.offer(role.asks, lambda: serving.config.asks)
            try:
                yield serving
            finally:
                await asks.take_back()
                await role.hand_back()


async def _offerings(executor: Executor, models: ModelStore, config: ProviderConfig) -> list[Offering]:
    """What a configuration serves, its models checked, and loaded unless that is to wait. Raises LocalError."""
    names = config.models or tuple(model.name for model in models.list())
    if not names:
        msg = "there is no model in the store"
        raise LocalError(msg, hint="fetch one with: aci-p2p models pull")
    if len(names) > MAX_OFFERED:
        log.warning("of %d models the first %d are served, as many as a node may offer", len(names), MAX_OFFERED)
        names = names[:MAX_OFFERED]
    found = [await executor.load(name) if config.preload else models.open(name) for name in names]
    return [
        Offering(
            name=model.name,
            root=model.root,
            context=model.context,
            input_token_price=config.input_token_price,
            output_token_price=config.output_token_price,
            quantisation=_quantisation(executor, model.name),
            region=config.region,
            price_curve=config.price_curve,
        )
        for model in found
    ]


def _quantisation(executor: Executor, model: str) -> str:
    """The weight format as bids carry it."""
    return executor.describe(model).quantisation.encode()[:MAX_LABEL_BYTES].decode(errors="ignore")
