"""Those who abuse gossip: floods, forgeries, replays, lies about the time, silence."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aci_p2p.protocol import cbor
from aci_p2p.protocol.envelope import VERSION, Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer, Share, Voucher
from aci_p2p.protocol.terms import Price
from aci_p2p.testing.simulator.adversaries.base import Eavesdropper
from aci_p2p.testing.simulator.node import NETWORK, SimNode, TellingSealer

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.simulation import Simulation

SPAM: Final = MAX_BIDS + 6
"""Bids of a spammer for each offer: more than a consumer weighs."""
SYBILS: Final = MAX_BIDS + 6
"""Keys of a Sybil attacker: the same."""
KEPT: Final = 64
"""Messages that a replaying attacker has at hand."""
REPLAY_MS: Final = 1_000
"""Milliseconds between two old messages that are said again."""
HOUR_MS: Final = 3_600_000
"""How wrong a lying clock is, milliseconds."""
NOISE: Final = 500
"""Most bytes of a message that is noise."""
PAYS_MS: Final = (2_000, 20_000)
"""How long after a bid its job is over, shortest and longest, milliseconds."""
WORTHLESS: Final = 10**11
"""Base units that are promised for nothing: more than any job costs."""
_VERSION_FIELD: Final = 1


class BidSpam(Eavesdropper):
    """Answers each offer with seventy bids."""

    name = "bid spam"
    goal = "bury honest bids, so that consumers never see them"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid, and bid again."""
        for number in range(SPAM):
            bid = replace(self.bid_for(offer), output_token_price=number)
            self.gossip.bids.publish(self.node, self.node.sealer.seal(bid, self.node.clock).data)


class SybilBids(Eavesdropper):
    """Bids under many names, and serves under none."""

    name = "sybil bids"
    goal = "fill every consumer's list of bids before honest ones arrive"

    def __init__(self, simulation: Simulation, node: SimNode) -> None:
        """Makes the keys."""
        super().__init__(simulation, node)
        dice = simulation.world.dice
        keys = [KeyPair(dice.secret(f"sybil/{node.index}/{number}")) for number in range(SYBILS)]
        self._sealers = [TellingSealer(key, simulation.signed) for key in keys]

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid under every name."""
        for sealer in self._sealers:
            self.gossip.bids.publish(self.node, sealer.seal(self.bid_for(offer), self.node.clock).data)


class ForgedBid(Eavesdropper):
    """Bids in the names of honest providers, with signatures of its own."""

    name = "forged bid"
    goal = "win jobs in the names of others, who then fail them"

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        """Underbid it in its own name."""
        if bid.sender == self.node.node_id:
            return
        cheaper = replace(bid.body, output_token_price=0, input_token_price=0)
        mine = Sealer(self.node.key, NETWORK).seal(cheaper, self.node.clock).data
        self.gossip.bids.publish(self.node, mine.replace(self.node.node_id.public_key, bid.sender.public_key))


class ForgedVoucher(Eavesdropper):
    """Promises providers much money for the jobs of others, in its own name."""

    name = "forged voucher"
    goal = "have worthless promises taken in place of good ones, so that providers are not paid"

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        """Pay for it when its job is over, if it has won."""
        self.world.after(self.node.random.randint(*PAYS_MS), self._pay, bid)

    def _pay(self, bid: Envelope[Bid]) -> None:
        provider = self.simulation.by_id.get(bid.sender)
        if provider is not None and self.node.up:
            share = Share(bid.sender, bid.digest, 1, 0, 1, Price(WORTHLESS, 0, 0, 0))
            voucher = self.node.sealer.seal(Voucher(bid.body.job_id, share), self.node.clock)
            self.node.transport.dial(self.node, provider).send(voucher.data)


class OtherTerms(Eavesdropper):
    """Bids for an offer that was never made, under the number of one that was."""

    name = "other terms"
    goal = "be awarded under terms that its consumer never offered"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid for the other one."""
        bid = replace(self.bid_for(offer), offer_digest=bytes(len(offer.digest)))
        self.gossip.bids.publish(self.node, self.node.sealer.seal(bid, self.node.clock).data)


class StolenOffer(Eavesdropper):
    """Offers the jobs of others as its own."""

    name = "stolen offer"
    goal = "take the place of an honest offer, so that nobody serves it"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Say the same in its own name."""
        if offer.sender != self.node.node_id:
            stolen = self.node.sealer.seal(offer.body, self.node.clock)
            self.gossip.offers.publish(self.node, stolen.data)


class Replay(Eavesdropper):
    """Says again what others said, at once and later."""

    name = "replay"
    goal = "have old offers served and old bids awarded a second time"

    def begin(self) -> None:
        """Listen, and say again."""
        super().begin()
        self._offers: deque[bytes] = deque(maxlen=KEPT)
        self._bids: deque[bytes] = deque(maxlen=KEPT)
        self.every(REPLAY_MS, self._say_again)

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Keep it, and say it at once."""
        self._offers.append(offer.data)
        self.gossip.offers.publish(self.node, offer.data)

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        """Keep it, and say it at once."""
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

    name = "replay from another network"
    goal = "have what was signed for a test network count in this one"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid in the other network."""
        foreign = Sealer(self.node.key, "aci-test").seal(self.bid_for(offer), self.node.clock)
        self.gossip.bids.publish(self.node, foreign.data)


class OtherVersion(Eavesdropper):
    """Says messages of a version that does not exist yet."""

    name = "replay as another version"
    goal = "have a message count that its readers cannot understand"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid in the other version."""
        value = cbor.decode(self.node.sealer.seal(self.bid_for(offer), self.node.clock).data)
        assert isinstance(value, dict)  # every envelope is a map
        value[_VERSION_FIELD] = VERSION + 1
        self.gossip.bids.publish(self.node, cbor.encode(value))


class StaleBid(Eavesdropper):
    """Answers each offer with a bid that has expired."""

    name = "stale bid"
    goal = "be awarded a bid that binds it to nothing any more"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid an hour ago."""
        old = self.node.sealer.seal(self.bid_for(offer), self.node.clock - HOUR_MS)
        self.gossip.bids.publish(self.node, old.data)


class LyingClock(Eavesdropper):
    """Dates its bids an hour ahead."""

    name = "lying clock"
    goal = "hold bids that never expire, and be the freshest everywhere"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Bid in an hour."""
        early = self.node.sealer.seal(self.bid_for(offer), self.node.clock + HOUR_MS)
        self.gossip.bids.publish(self.node, early.data)


class Malformed(Eavesdropper):
    """Says noise, cut-off messages and messages with flipped bits."""

    name = "malformed message"
    goal = "crash those who read it"

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Say something that is none."""
        random = self.node.random
        cut = offer.data[: random.randrange(len(offer.data))]
        flipped = bytearray(offer.data)
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        for data in (random.randbytes(random.randrange(1, NOISE)), cut, bytes(flipped)):
            self.gossip.offers.publish(self.node, data)
            self.gossip.bids.publish(self.node, data)


class Censor(Eavesdropper):
    """Forwards nothing of what it should."""

    name = "censoring relay"
    goal = "keep offers and bids from those behind it"

    def begin(self) -> None:
        """Fall silent."""
        super().begin()
        self.node.forwards = False
        self.gossip.changed()
