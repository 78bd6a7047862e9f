"""Standing asks of simulated providers: when they are said, and what of them a consumer has heard.

A node's order book is filled when it looks into it, from what has reached it by then: thousands of nodes could not each
keep each ask of each model that they may use.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.pacing import LIFETIME_MS, AskPacer
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.quotes import QUOTES
from aci_p2p.testing.simulator.gossip import Gossip
from aci_p2p.testing.simulator.node import SimNode

KEPT: Final = 2
"""Asks of one provider that somebody may have heard last: the one before is on its way for longer than two seconds."""


@dataclass(frozen=True, slots=True)
class _Said:
    """An ask that was broadcast."""

    ask: Envelope[Ask]
    """The ask."""
    at: int
    """When, Unix milliseconds of true time."""
    arrivals: dict[int, int]
    """Milliseconds to every node that it reached."""


class AskBoard:
    """The topics of asks."""

    def __init__(self, gossip: Gossip) -> None:
        """`gossip`: over which they are said."""
        self.said: Counter[bytes] = Counter()
        """Asks so far, by model."""
        self._gossip = gossip
        self._asks: dict[bytes, dict[NodeId, deque[_Said]]] = {}

    def say(self, node: SimNode, ask: Ask) -> None:
        """Let a node broadcast what it asks."""
        self.said[ask.model_root] += 1
        said = _Said(node.sealer.seal(ask, node.clock), node.world.now, self._gossip.arrivals(node))
        self._asks.setdefault(ask.model_root, {}).setdefault(node.node_id, deque(maxlen=KEPT)).append(said)

    def others(self, node: SimNode, root: bytes) -> int:
        """How many other providers have a live ask for a model."""
        since = node.world.now - LIFETIME_MS
        asks = self._asks.get(root, {})
        last = [said[-1] for who, said in asks.items() if who != node.node_id]
        return sum(one.at > since and one.ask.body.slots > 0 for one in last)

    def best(self, node: SimNode, offer: Envelope[Offer], exclude: Collection[NodeId]) -> list[Envelope[Ask]]:
        """Whom a node should ask for quotes, by what it has heard since its start."""
        root, now, book = offer.body.model_root, node.world.now, node.order_book()
        for said in self._asks.get(root, {}).values():
            for one in said:
                way = one.arrivals.get(node.index)
                if way is None or one.at < node.started_at or one.at + way > now:
                    continue
                try:
                    book.check(root, one.ask.data, node.clock)
                except MessageRefused as error:
                    self._gossip.refused[error.validation.reason.value] += 1
        out = {*exclude, node.node_id}
        return book.best(root, offer=offer.body, k=QUOTES, now=node.clock, exclude=out, random=node.random)


class Asking:
    """Says what a provider asks, as often as its pacer wants it."""

    def __init__(self, node: SimNode, board: AskBoard, describe: Callable[[], Ask]) -> None:
        """`describe`: what it asks now. Says nothing before `start`."""
        self._node = node
        self._board = board
        self._describe = describe
        self._run = 0
        self._pacer: AskPacer | None = None
        self._heard = 0

    def start(self) -> None:
        """Begin, or begin again after a crash."""
        self._run += 1
        self._pacer = AskPacer(self._node.random, self._node.world.now)
        self._heard = self._board.said[self._describe().model_root]
        self._look(self._run)

    def stop(self) -> None:
        """Take back what is asked."""
        self._run += 1
        self._pacer = None
        self._board.say(self._node, replace(self._describe(), slots=0, free_slots=0))

    def _look(self, run: int) -> None:
        pacer, now, ask = self._pacer, self._node.world.now, self._describe()
        if run != self._run or pacer is None or not self._node.up:
            return
        said = self._board.said[ask.model_root]
        pacer.observe(said - self._heard, self._board.others(self._node, ask.model_root), now)
        self._heard = said
        if pacer.is_due(ask, now):
            self._board.say(self._node, ask)
            self._heard += 1
            pacer.published(ask, now)
        self._node.world.at(max(pacer.next_look(ask, now), now + 1), self._look, run)

    def changed(self) -> None:
        """A slot was taken, or is free again."""
        if self._pacer is not None:
            self._run += 1
            self._look(self._run)
