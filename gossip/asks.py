"""Standing asks over pubsub: a topic for each model, the order book that it fills, and what we ask ourselves.

Who serves a model takes part in its topics, those of its market among them, and publishes asks as `AskPacer` says. Who
wants to know follows the model: the topics are joined at the first interest, and left some minutes after the last.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Final

import trio

from aci_p2p.clock import Clock, trio_deadline
from aci_p2p.gossip.market import Market
from aci_p2p.gossip.topic import Topic, open_topic
from aci_p2p.network.api import Network
from aci_p2p.protocol.envelope import Envelope, Sealer, header_of
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.orderbook import OrderBook
from aci_p2p.protocol.pacing import AskPacer
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require
from aci_p2p.tasks import Notice, open_background

FOLLOW_S: Final = 300.0
"""Seconds for which a model's asks are heard after the last interest in it: who asks once asks again."""
MAX_FOLLOWED: Final = 16
"""Models followed at once, and not served; the one that interests us the least recently makes room."""
MAX_OFFERED: Final = 32
"""Models that we serve: with those followed, at three topics each, below `limits.MAX_TOPICS_PER_PEER`."""
LEAVE_S: Final = 1.0
"""Seconds to take back our asks when we leave."""
LINGER_S: Final = 0.2
"""Seconds for what was said last to arrive, before connections close: one way between continents."""

log = logging.getLogger("aci_p2p.gossip")


@dataclass(frozen=True, slots=True)
class AsksStatistics:
    """A snapshot of the asks of all models."""

    models: int
    """Models whose topics we take part in."""
    held: int
    """Asks in the order book."""
    heard: int
    """Valid asks that came."""
    refused: Mapping[Reason, int]
    """Asks that were ignored or rejected, by the reason."""
    published: int
    """Asks of ours."""


class Asks:
    """Standing asks of one network. Made by `open_asks`."""

    def __init__(
        self, network: Network, market: Market, sealer: Sealer, clock: Clock, random: Random, tasks: trio.Nursery
    ) -> None:
        """`sealer` signs our asks; `clock` gives Unix milliseconds; `tasks` runs the topics."""
        self.book = OrderBook(sealer.network)
        """What others ask."""
        self.changed = Notice()
        """Told of every ask that comes, and when a model's topics are joined."""
        self._network = network
        self._market = market
        self._sealer = sealer
        self._clock = clock
        self._random = random
        self._tasks = tasks
        self._models: dict[bytes, _Model] = {}
        self._describe: Callable[[], Sequence[Ask]] = tuple
        self._speaks: Callable[[], bool] = bool
        self._heard = self._published = 0
        self._refused: Counter[Reason] = Counter()

    @property
    def models(self) -> tuple[bytes, ...]:
        """Weights roots of the models whose topics we take part in."""
        return tuple(self._models)

    def follow(self, model_root: bytes) -> None:
        """Take part in a model's topics from now on, until FOLLOW_S seconds after the last call."""
        model = self._models.get(model_root)
        if model is None:
            followed = [one for root, one in self._models.items() if one.is_followed and self.served(root) is None]
            if len(followed) >= MAX_FOLLOWED:
                min(followed, key=lambda one: (one.held, one.followed_until)).drop()
            model = self._join(model_root)
        model.followed_until = trio.current_time() + FOLLOW_S

    @contextmanager
    def hold(self, model_root: bytes) -> Generator[None]:
        """Follow a model, and let the others make room first within the block: a job of ours waits there for bids."""
        self.follow(model_root)
        model = self._models[model_root]
        model.held += 1
        try:
            yield
        finally:
            model.held -= 1

    async def join(self, model_root: bytes) -> None:
        """Follow a model, and wait until its topics are joined."""
        await trio.lowlevel.checkpoint()
        self.follow(model_root)
        while not self._models[model_root].joined:
            await self.changed.wait()
            # It may have made room for another meanwhile.
            self.follow(model_root)

    def offer(self, describe: Callable[[], Sequence[Ask]], speaks: Callable[[], bool]) -> None:
        """Serve from now on what `describe` says at the time: take part in the topics, and publish it while `speaks`.

        Of more than MAX_OFFERED models the first ones.
        """
        self._describe, self._speaks = describe, speaks
        self.look_again()

    def look_again(self) -> None:
        """What we serve may differ."""
        for ask in self._describe()[:MAX_OFFERED]:
            if ask.model_root not in self._models:
                self._join(ask.model_root)
        for model in self._models.values():
            model.look.notify()

    def offered(self, model_root: bytes) -> Ask | None:
        """What we ask for a model, if we serve it and say so."""
        return self.served(model_root) if self._speaks() else None

    def served(self, model_root: bytes) -> Ask | None:
        """What we would ask for a model, if we serve it."""
        return next((ask for ask in self._describe()[:MAX_OFFERED] if ask.model_root == model_root), None)

    async def wait_for_asks(self, model_root: bytes, timeout_s: float) -> bool:
        """Follow a model, and wait until the book has an ask for it; whether it has after `timeout_s` seconds."""
        self.follow(model_root)
        with trio.move_on_after(timeout_s):
            while not self.book.providers(model_root, self._clock()):
                await self.changed.wait()
        return self.book.providers(model_root, self._clock()) > 0

    def statistics(self) -> AsksStatistics:
        """A snapshot of the counters."""
        return AsksStatistics(
            models=len(self._models),
            held=len(self.book),
            heard=self._heard,
            refused=dict(self._refused),
            published=self._published,
        )

    def check(self, model_root: bytes, data: bytes, now: int) -> Envelope[Ask]:
        """Check an ask that came on a model's topic, hold it, and count it. Raises MessageRefused."""
        try:
            # Not ours, of an earlier life.
            require(header_of(data).sender != self._network.node_id, Decision.IGNORE, Reason.REPLAYED)
            ask = self.book.check(model_root, data, now)
        except MessageRefused as error:
            self._refused[error.validation.reason] += 1
            raise
        self._heard += 1
        self.changed.notify()
        return ask

    async def publish(self, topic: Topic[Ask], ask: Ask) -> None:
        """Sign and broadcast what we ask."""
        try:
            await topic.publish(self._sealer.seal(ask, self._clock()))
            self._published += 1
        except AciError as error:
            log.warning("no ask", extra={"fields": {"model": ask.model_name, "error": error}})

    async def take_back(self) -> None:
        """Say that what we asked holds no more, and ask nothing from now on."""
        self._describe = tuple
        before = self._published
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LEAVE_S):
            for model in tuple(self._models.values()):
                await model.take_back()
            if self._published > before and self._network.peers:
                await trio.sleep(LINGER_S)

    def _join(self, model_root: bytes) -> _Model:
        model = _Model(self, model_root, self._clock, self._random)
        self._models[model_root] = model
        self._tasks.start_soon(self._run, model)
        return model

    async def _run(self, model: _Model) -> None:
        name = f"/aci/{self._sealer.network}/asks/{model.root.hex()}/1"
        while True:
            with model.scope:
                async with (
                    self._market.take_part(model.root),
                    open_topic(self._network, name, model.check, self._clock, random=self._random) as topic,
                ):
                    await model.take_part(topic)
            if not model.is_wanted:
                break
            # It interests us again, since it was dropped.
            model.scope = trio.CancelScope()
        del self._models[model.root]
        self.book.forget(model.root)


class _Model:
    """One model's topic, and what we say there."""

    def __init__(self, asks: Asks, root: bytes, clock: Clock, random: Random) -> None:
        self.root = root
        """Weights root."""
        self.followed_until = -float("inf")
        """When our interest ends, seconds of trio's clock."""
        self.look = Notice()
        """What we ask may differ, or others asked."""
        self.scope = trio.CancelScope()
        """Ends the part that we take."""
        self.joined = False
        """Whether we take part in all its topics."""
        self.held = 0
        """Jobs of ours that wait for it."""
        self._asks = asks
        self._clock = clock
        self._random = random
        self._topic: Topic[Ask] | None = None
        self._pacer: AskPacer | None = None
        self._said: Ask | None = None
        self._accepted = 0
        self._observed = 0

    @property
    def is_wanted(self) -> bool:
        """Whether we serve or follow it."""
        return self._asks.served(self.root) is not None or self.is_followed

    @property
    def is_followed(self) -> bool:
        """Whether it interests us."""
        return self.followed_until > trio.current_time()

    def drop(self) -> None:
        """Follow it no more."""
        self.followed_until = -float("inf")
        self.joined = False
        self.scope.cancel()

    def check(self, data: bytes, now: int) -> Envelope[Ask]:
        """As Asks.check."""
        ask = self._asks.check(self.root, data, now)
        self._accepted += 1
        self.look.notify()
        return ask

    async def take_part(self, topic: Topic[Ask]) -> None:
        """Hear what others ask, and publish what we do, until we neither serve nor follow the model."""
        self._topic, self._accepted, self._observed = topic, 0, 0
        self.joined = True
        self._asks.changed.notify()
        async with open_background() as tasks:
            tasks.start_soon(_drain, topic)
            while self.is_wanted:
                ask = self._asks.offered(self.root)
                if ask is None:
                    await self.take_back()
                    deadline = self.followed_until if self._asks.served(self.root) is None else float("inf")
                else:
                    deadline = await self._speak(topic, ask)
                with trio.move_on_at(deadline):
                    await self.look.wait()
            self.joined = False
            await self.take_back()

    async def take_back(self) -> None:
        """Publish that what we asked holds no more, if somebody may believe it."""
        pacer, said, self._pacer = self._pacer, self._said, None
        if self._topic is not None and pacer is not None and said is not None and pacer.is_out(self._clock()):
            await self._asks.publish(self._topic, _nothing(said))

    async def _speak(self, topic: Topic[Ask], ask: Ask) -> float:
        """Publish what we ask when it is due; returns when to look again, seconds of trio's clock."""
        now = self._clock()
        pacer = self._pacer = self._pacer or AskPacer(self._random, now)
        # What neighbours' logs bring was on the topic before.
        heard = self._accepted - topic.statistics().caught_up
        pacer.observe(max(heard - self._observed, 0), self._asks.book.providers(self.root, now), now)
        self._observed = heard
        if pacer.is_due(ask, now):
            pacer.published(ask, now)
            self._said = ask
            await self._asks.publish(topic, ask)
        now = self._clock()
        return trio_deadline(pacer.next_look(ask, now), now)


async def _drain(topic: Topic[Ask]) -> None:
    """Take what was checked, and so is in the book already, until cancelled."""
    async for _ in topic:
        pass


def _nothing(ask: Ask) -> Ask:
    """What takes an ask back."""
    return Ask(
        model_root=ask.model_root,
        model_name=ask.model_name,
        engine=ask.engine,
        context=ask.context,
        input_token_price=0,
        output_token_price=0,
        price_curve=(),
        slots=0,
        free_slots=0,
        latency_ms=0,
        region="",
        addresses=(),
    )


@asynccontextmanager
async def open_asks(
    network: Network, market: Market, sealer: Sealer, clock: Clock, *, random: Random | None = None
) -> AsyncGenerator[Asks]:
    """Standing asks of a network within the block: nothing is joined before `follow` or `offer`.

    The topics of `market` are joined and left together with those of the asks. `clock` gives Unix milliseconds;
    `random` is as in `open_topic`, and picks the moments of our asks.
    """
    async with open_background() as tasks:
        asks = Asks(network, market, sealer, clock, random or SystemRandom(), tasks)
        try:
            yield asks
        finally:
            await asks.take_back()
