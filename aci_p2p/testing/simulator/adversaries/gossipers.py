"""Those who abuse gossip: floods, forgeries, replays, lies about the time, silence."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import Bid, Offer
from aci_p2p.testing.simulator.adversaries.base import Attacker
from aci_p2p.testing.simulator.node import NETWORK, SimNode, TellingSealer

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.simulation import Simulation

FLOOD_MS: Final = 20
"""Milliseconds between two messages of a flood."""
SYBILS: Final = 80
"""Keys of a Sybil attacker: more than the bids that a consumer weighs."""
KEPT: Final = 64
"""Messages that a replaying attacker has at hand."""
HOUR_MS: Final = 3_600_000
"""How wrong a lying clock is, milliseconds."""


class Eavesdropper(Attacker):
    """Reacts to what it hears."""

    def begin(self) -> None:
        # It wants no jobs of its own.
        self.simulation.providers.pop(self.node.index, None)
        self.simulation.consumers.pop(self.node.index, None)
        for listeners in self.gossip.providers.values():
            listeners.pop(self.node, None)
        self.gossip.eavesdroppers.append((self.node, self.hears_offer, self.hears_bid))

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Somebody offers a job."""

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        """Somebody bids."""

    def bid_for(self, offer: Envelope[Offer]) -> Bid:
        """A bid that nobody can beat."""
        return Bid(offer.body.job_id, offer.digest, 0, 1, 1, ())


class BidSpam(Eavesdropper):
    """Answers each offer with a hundred bids."""

    name = "bid spam"
    goal = "bury honest bids, so that consumers never see them"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        for number in range(100):
            bid = replace(self.bid_for(offer), output_token_price=number)
            self.gossip.bids.publish(self.node, self.node.sealer.seal(bid, self.node.clock).data)


class SybilBids(Eavesdropper):
    """Bids under eighty names, and serves under none."""

    name = "sybil bids"
    goal = "fill every consumer's list of bids before honest ones arrive"
    pays = "bids cost nothing before providers have a stake"

    def __init__(self, simulation: Simulation, node: SimNode) -> None:
        super().__init__(simulation, node)
        dice = simulation.world.dice
        keys = [KeyPair(dice.secret(f"sybil/{node.index}/{number}")) for number in range(SYBILS)]
        self._sealers = [TellingSealer(key, simulation.judge.said) for key in keys]

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        for sealer in self._sealers:
            self.gossip.bids.publish(self.node, sealer.seal(self.bid_for(offer), self.node.clock).data)


class ForgedBid(Eavesdropper):
    """Bids in the names of honest providers, with signatures of its own."""

    name = "forged bid"
    goal = "win jobs in the names of others, who then fail them"

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        if bid.sender == self.node.node_id:
            return
        cheaper = replace(bid.body, output_token_price=0, input_token_price=0)
        forged = self._sign_as(bid, cheaper)
        self.gossip.bids.publish(self.node, forged)

    def _sign_as(self, bid: Envelope[Bid], body: Bid) -> bytes:
        """An envelope that names the bid's sender and holds our signature."""
        mine = Sealer(self.node.key, NETWORK).seal(body, self.node.clock).data
        return mine.replace(self.node.node_id.public_key, bid.sender.public_key)


class Replay(Eavesdropper):
    """Says again what others said, at once and later."""

    name = "replay"
    goal = "have old offers served and old bids awarded a second time"

    def begin(self) -> None:
        super().begin()
        self._offers: deque[bytes] = deque(maxlen=KEPT)
        self._bids: deque[bytes] = deque(maxlen=KEPT)
        self.every(1_000, self._say_again)

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        self._offers.append(offer.data)
        self.gossip.offers.publish(self.node, offer.data)

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        self._bids.append(bid.data)
        self.gossip.bids.publish(self.node, bid.data)

    def _say_again(self) -> None:
        random = self.node.random
        if self._offers:
            self.gossip.offers.publish(self.node, random.choice(self._offers))
        if self._bids:
            self.gossip.bids.publish(self.node, random.choice(self._bids))


class OtherNetwork(Eavesdropper):
    """Signs its messages for another network, and says them in this one."""

    name = "other network"
    goal = "have what was signed for a test network count in this one"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        foreign = Sealer(self.node.key, "aci-test").seal(self.bid_for(offer), self.node.clock)
        self.gossip.bids.publish(self.node, foreign.data)


class StaleBid(Eavesdropper):
    """Answers each offer with a bid that has expired."""

    name = "stale bid"
    goal = "be awarded a bid that binds it to nothing any more"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        old = self.node.sealer.seal(self.bid_for(offer), self.node.clock - HOUR_MS)
        self.gossip.bids.publish(self.node, old.data)


class LyingClock(Eavesdropper):
    """Dates its bids an hour ahead."""

    name = "lying clock"
    goal = "hold bids that never expire, and be the freshest everywhere"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        early = self.node.sealer.seal(self.bid_for(offer), self.node.clock + HOUR_MS)
        self.gossip.bids.publish(self.node, early.data)


class Malformed(Eavesdropper):
    """Says noise, cut-off messages and messages with flipped bits."""

    name = "malformed message"
    goal = "crash those who read it"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        random = self.node.random
        cut = offer.data[: random.randrange(len(offer.data))]
        flipped = bytearray(offer.data)
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        for data in (random.randbytes(random.randrange(1, 500)), cut, bytes(flipped)):
            self.gossip.offers.publish(self.node, data)
            self.gossip.bids.publish(self.node, data)


class Censor(Eavesdropper):
    """Forwards nothing of what it should."""

    name = "censoring relay"
    goal = "keep offers and bids from those behind it"

    def begin(self) -> None:
        super().begin()
        self.node.forwards = False
        self.gossip.changed()
