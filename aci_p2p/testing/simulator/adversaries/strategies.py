"""Every strategy, by name."""

from __future__ import annotations

from typing import Final

from aci_p2p.testing.simulator.adversaries.base import Attacker
from aci_p2p.testing.simulator.adversaries.consumers import (
    AwardTwice,
    DoubleSpend,
    ForgedReceipt,
    OfferSpam,
    OtherPrompt,
    PaymentRefusal,
    QuoteSpam,
    SilentWinner,
)
from aci_p2p.testing.simulator.adversaries.gossipers import (
    BidSpam,
    Censor,
    ForgedBid,
    ForgedVoucher,
    LyingClock,
    Malformed,
    OtherNetwork,
    OtherTerms,
    OtherVersion,
    Replay,
    StaleBid,
    StolenOffer,
    SybilBids,
)
from aci_p2p.testing.simulator.adversaries.keepers import Eclipse
from aci_p2p.testing.simulator.adversaries.providers import (
    BidDumping,
    CutShort,
    FailsAfterWinning,
    Impostor,
    LooseCommitment,
    QuantisedModel,
    SlowStream,
    TooLong,
    TruncatedResult,
    WithheldResult,
    WrongModel,
    WrongPrompt,
)

STRATEGIES: Final[dict[str, type[Attacker]]] = {
    strategy.name: strategy
    for strategy in (
        AwardTwice, BidDumping, BidSpam, Censor, CutShort, DoubleSpend, Eclipse, FailsAfterWinning, ForgedBid,
        ForgedReceipt, ForgedVoucher, Impostor, LooseCommitment, LyingClock, Malformed, OfferSpam, OtherNetwork,
        OtherPrompt, OtherTerms, OtherVersion, PaymentRefusal, QuantisedModel, QuoteSpam, Replay, SilentWinner,
        SlowStream, StaleBid, StolenOffer, SybilBids, TooLong, TruncatedResult, WithheldResult, WrongModel, WrongPrompt,
    )
}  # fmt: skip
"""Every strategy, by name."""
