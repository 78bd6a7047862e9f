"""Attackers of the simulated market, by name."""

from typing import Final

from aci_p2p.testing.simulator.adversaries.base import Attacker, Part
from aci_p2p.testing.simulator.adversaries.consumers import OfferSpam, PaymentRefusal, SilentWinner
from aci_p2p.testing.simulator.adversaries.gossipers import (
    BidSpam,
    Censor,
    ForgedBid,
    LyingClock,
    Malformed,
    OtherNetwork,
    Replay,
    StaleBid,
    SybilBids,
)
from aci_p2p.testing.simulator.adversaries.providers import (
    BidDumping,
    CutShort,
    FailsAfterWinning,
    QuantisedModel,
    TruncatedResult,
    WithheldResult,
    WrongModel,
    WrongPrompt,
)

STRATEGIES: Final[dict[str, type[Attacker]]] = {
    strategy.name: strategy
    for strategy in (
        BidDumping, BidSpam, Censor, CutShort, FailsAfterWinning, ForgedBid, LyingClock, Malformed, OfferSpam,
        OtherNetwork, PaymentRefusal, QuantisedModel, Replay, SilentWinner, StaleBid, SybilBids, TruncatedResult,
        WithheldResult, WrongModel, WrongPrompt,
    )
}  # fmt: skip
"""Every strategy, by name."""

__all__ = ["STRATEGIES", "Attacker", "Part"]
