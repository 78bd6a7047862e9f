"""The order book: the live asks of each model that we look at, the cheapest first. Sans-I/O.

What it holds are claims of providers; a bid is firm. Who sells worse than it asks is found out by its quote.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sortedcontainers import SortedKeyList

from aci_p2p.protocol.chance import Chance
from aci_p2p.protocol.envelope import Envelope, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import Opener
from aci_p2p.protocol.messages import SECOND, Offer
from aci_p2p.protocol.pricing import asked_prices, check_capacity, max_input_tokens
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.validation import Decision, Reason, require

MAX_ASKS_PER_MODEL: Final = 512
"""Asks of one model: twice what a topic carries while an ask lives (`pacing.ASKS_PER_SECOND`)."""
MAX_ASKS: Final = 4_096
"""Asks of all models, below 10 MB."""
ASK_GAP_MS: Final = SECOND // 2
"""Shortest time between two asks of one provider for a model; honest ones leave two seconds, or restart."""
REFERENCE_INPUT: Final = 512
"""Prompt tokens of the job by whose price asks are sorted: a question with some text to it."""
REFERENCE_OUTPUT: Final = 256
"""Its output tokens: an answer of some paragraphs."""
SPREAD_MILLI: Final = 100
"""Asks within a tenth of each other's price are as good: who asks them is drawn, so that not all ask the same one."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A live ask, and what it is sorted by."""

    ask: Envelope[Ask]
    """The ask; with 0 slots it only tells that earlier ones are void."""
    input_price: int
    """Base units for each prompt token at the load that it tells."""
    output_price: int
    """The same for each output token."""
    reference: int
    """What the reference job costs, base units."""

    @property
    def expires_at(self) -> int:
        """Unix milliseconds."""
        return self.ask.header.expires_at

    @property
    def rank(self) -> tuple[int, bytes]:
        """The cheapest first; of equal ones always the same."""
        return self.reference, self.ask.sender.public_key


class _Shelf:
    """The asks of one model."""

    def __init__(self) -> None:
        self.known: dict[NodeId, _Entry] = {}
        """The last ask of each provider."""
        self.by_price: SortedKeyList[_Entry, tuple[int, bytes]] = SortedKeyList(key=lambda entry: entry.rank)
        """Those that offer something."""
        self.by_expiry: SortedKeyList[_Entry, int] = SortedKeyList(key=lambda entry: entry.expires_at)
        """All of them."""

    def add(self, entry: _Entry) -> None:
        """In the place of the last one of its provider."""
        if (last := self.known.get(entry.ask.sender)) is not None:
            self.remove(last)
        self.known[entry.ask.sender] = entry
        self.by_expiry.add(entry)
        if entry.ask.body.slots:
            self.by_price.add(entry)

    def remove(self, entry: _Entry) -> None:
        """Forget one that is there."""
        del self.known[entry.ask.sender]
        self.by_expiry.remove(entry)
        if entry.ask.body.slots:
            self.by_price.remove(entry)


class OrderBook:
    """Live asks by model. Bounded; time and randomness are arguments."""

    def __init__(self, network: str, opener: Opener = open_envelope) -> None:
        """`network`: id of the network whose asks these are; `opener` checks envelopes as `open_envelope` does."""
        self._network = network
        self._open = opener
        self._shelves: dict[bytes, _Shelf] = {}

    def __len__(self) -> int:
        """Asks held, withdrawals among them."""
        return sum(len(shelf.known) for shelf in self._shelves.values())

    def check(self, model_root: bytes, data: bytes, now: int) -> Envelope[Ask]:
        """Check a broadcast ask for a model, and hold it. Raises MessageRefused."""
        ask = self._open(data, Ask, network=self._network, now=now)
        body = ask.body
        # About the model whose topic it came on.
        require(body.model_root == model_root, Decision.REJECT, Reason.WRONG_MODEL)
        check_capacity(body)
        self._forget_expired(now)
        shelf = self._shelves.get(model_root)
        last = shelf.known.get(ask.sender) if shelf else None
        if last is not None:
            known = last.ask
            # Newer than what we have; its forwarder may not know.
            require(ask.header.sequence > known.header.sequence, Decision.IGNORE, Reason.REPLAYED)
            # Not too soon after it, unless it takes it back.
            takes_back = body.slots == 0 < known.body.slots
            later = ask.header.issued_at >= known.header.issued_at + ASK_GAP_MS
            require(takes_back or later, Decision.IGNORE, Reason.FLOODED)
        self._hold(ask)
        return ask

    def forget(self, model_root: bytes) -> None:
        """Hold no asks for a model any more."""
        self._shelves.pop(model_root, None)

    def providers(self, model_root: bytes, now: int) -> int:
        """How many providers have a live ask for a model."""
        self._forget_expired(now)
        shelf = self._shelves.get(model_root)
        return len(shelf.by_price) if shelf else 0

    def view(self, model_root: bytes, now: int) -> list[Envelope[Ask]]:
        """The live asks for a model, the cheapest first; those without a free slot are among them."""
        self._forget_expired(now)
        shelf = self._shelves.get(model_root)
        return [entry.ask for entry in shelf.by_price] if shelf else []

    def is_full(self, model_root: bytes, now: int, exclude: Collection[NodeId]) -> bool:
        """Whether there are providers of a model that are not in `exclude`, and none of them has a free slot."""
        asks = [ask for ask in self.view(model_root, now) if ask.sender not in exclude]
        return bool(asks) and not any(ask.body.free_slots for ask in asks)

    def best(
        self, model_root: bytes, *, offer: Offer, k: int, now: int, exclude: Collection[NodeId], random: Chance
    ) -> list[Envelope[Ask]]:
        """At most `k` asks that meet an offer's limits, of providers not in `exclude`, the cheapest first.

        What the whole job costs at most is what counts, at the prices of the load that the ask tells. Asks within
        SPREAD_MILLI of each other have equal chances, which `random` decides.
        """
        self._forget_expired(now)
        shelf = self._shelves.get(model_root)
        inputs, outputs = max_input_tokens(offer), offer.max_tokens
        chosen: list[tuple[int, int, int, _Entry]] = []
        for place, entry in enumerate(shelf.by_price if shelf and k > 0 else ()):
            # No job costs less than this under an ask, and asks only get dearer from here on.
            least = min(entry.reference * inputs // REFERENCE_INPUT, entry.reference * outputs // REFERENCE_OUTPUT)
            if least > offer.max_price or (len(chosen) == k and least * 1_000 > chosen[-1][0]):
                break
            body = entry.ask.body
            price = entry.input_price * inputs + entry.output_price * outputs
            fits = body.latency_ms <= offer.max_latency_ms and outputs < body.context and price <= offer.max_price
            if fits and body.free_slots and entry.ask.sender not in exclude:
                weighed = price * (1_000 + random.randrange(SPREAD_MILLI + 1))
                insort(chosen, (weighed, price, place, entry))
                del chosen[k:]
        chosen.sort(key=lambda one: (one[1], one[0], one[2]))
        return [entry.ask for *_, entry in chosen]

    def _hold(self, ask: Envelope[Ask]) -> None:
        inputs, outputs = asked_prices(ask.body)
        reference = inputs * REFERENCE_INPUT + outputs * REFERENCE_OUTPUT
        shelf = self._shelves.setdefault(ask.body.model_root, _Shelf())
        shelf.add(_Entry(ask, inputs, outputs, reference))
        if len(shelf.known) > MAX_ASKS_PER_MODEL:
            shelf.remove(shelf.by_expiry[0])
        if len(self) > MAX_ASKS:
            fullest = max(self._shelves.values(), key=lambda shelf: len(shelf.known))
            fullest.remove(fullest.by_expiry[0])

    def _forget_expired(self, now: int) -> None:
        for root, shelf in tuple(self._shelves.items()):
            while shelf.by_expiry and shelf.by_expiry[0].expires_at <= now:
                shelf.remove(shelf.by_expiry[0])
            if not shelf.known:
                del self._shelves[root]
