"""The parts of messages that say what a job is worth: prices by item, and what a consumer asks of its provider."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final

from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.wire import Amount, EnumOf, ListOf, Node, Text, Wire

MAX_LABEL_BYTES: Final = 32
"""Bytes of a quantisation or a region; the longest names of clouds' regions have 24."""
MAX_CHOICES: Final = 8
"""Quantisations, or regions, that a consumer may name: who takes more takes any."""
MAX_PASSED: Final = 64
"""Providers that may be passed over: as many as are weighed (`messages.MAX_BIDS`)."""
SUCCESS_MILLI_MAX: Final = 1_000
"""Thousandths of certainty that a provider answers: all."""
MAX_EXPERIENCE: Final = 1_000_000
"""Thousandths of a job: experience of a thousand jobs, beyond which more says nothing new."""

LABEL: Final = Text(MAX_LABEL_BYTES)
FEE: Final = Amount(14)
"""Below 2^112 base units, 5 * 10^15 ACI: together with the dearest bid still an amount."""


class Verification(IntEnum):
    """How an answer is checked."""

    OPTIMISTIC = 1
    """Accepted unless challenged within a day."""
    IMMEDIATE = 2
    """Run by three providers, of whom two must agree."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a job costs, item by item."""

    compute: Annotated[int, Wire(1, Amount())]
    """The provider's price for the tokens, base units."""
    licence: Annotated[int, Wire(2, Amount())]
    """For the model's owner, base units."""
    verification: Annotated[int, Wire(3, Amount())]
    """For checking the answer, base units."""
    priority: Annotated[int, Wire(4, FEE)]
    """What the consumer adds to be served first, base units."""

    @property
    def total(self) -> int:
        """Their sum, base units."""
        return self.compute + self.licence + self.verification + self.priority


@dataclass(frozen=True, slots=True)
class SelectionTerms:
    """What a consumer asks of its provider beyond the offer, and what waiting and failing cost it."""

    min_stake: Annotated[int, Wire(1, Amount())]
    """Least stake of a provider, base units."""
    latency_value: Annotated[int, Wire(2, FEE)]
    """What a second until the first token costs the consumer, base units."""
    retry_cost: Annotated[int, Wire(3, FEE)]
    """What a provider's failure costs the consumer, base units."""
    quantisations: Annotated[tuple[str, ...], Wire(4, ListOf(LABEL, MAX_CHOICES))]
    """Weight formats that will do; none: any."""
    regions: Annotated[tuple[str, ...], Wire(5, ListOf(LABEL, MAX_CHOICES))]
    """Regions that will do; none: any."""


ANY_PROVIDER: Final = SelectionTerms(min_stake=0, latency_value=0, retry_cost=0, quantisations=(), regions=())
"""Whoever is cheapest."""


class Passing(IntEnum):
    """Why a provider that ranked higher does not have the job."""

    DECLINED = 1
    """It had no room for the job any more, and said so."""
    FAILED = 2
    """It broke the protocol, was silent or could not go on."""
    EXPIRED = 3
    """Its bid was not firm any more when its turn came."""
    TOO_DEAR = 4
    """What others were paid before left too little for it."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A provider that was chosen, and does not have the job."""

    provider: Annotated[NodeId, Wire(1, Node())]
    """Who."""
    why: Annotated[Passing, Wire(2, EnumOf(Passing))]
    """Why."""
