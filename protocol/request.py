"""What a consumer's job is made of before it is offered."""

from __future__ import annotations

from dataclasses import dataclass, field

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import Conversation
from aci_p2p.protocol.terms import ANY_PROVIDER, SelectionTerms, Verification
from aci_p2p.protocol.wire import to_value


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a consumer wants."""

    model_root: bytes
    """Weights root of the model, 32 bytes."""
    conversation: Conversation
    """What the model is asked."""
    max_tokens: int
    """Most output tokens."""
    temperature_milli: int
    """Thousandths; 0 is greedy."""
    max_price: int
    """Most to pay for the whole job, base units."""
    max_latency_ms: int
    """Longest promised time to the first token, milliseconds."""
    bid_window_ms: int
    """How long to wait for bids, milliseconds."""
    expected_bidders: frozenset[NodeId]
    """Providers known to serve the model: once all have bid there is nobody to wait for. Empty: wait out the window."""
    terms: SelectionTerms = ANY_PROVIDER
    """What is asked of the provider beyond price and latency."""
    verification: Verification = Verification.OPTIMISTIC
    """How the answer is to be checked."""
    priority_fee: int = 0
    """What is paid to be served before others, base units."""

    def __post_init__(self) -> None:
        """Raise LocalError on what no node would forward."""
        if not self.conversation.turns or self.max_tokens < 1:
            msg = "a job needs a prompt and at least one token to answer it"
            raise LocalError(msg)
        # They go out with the receipt, when it is too late to refuse them.
        to_value(self.terms)
        if not 0 < self.bid_window_ms <= MAX_BID_WINDOW_MS:
            msg = f"bids are awaited for 1 to {MAX_BID_WINDOW_MS} ms, not {self.bid_window_ms}"
            raise LocalError(msg)


@dataclass(frozen=True, slots=True)
class JobSecrets:
    """Fresh randomness for one job, 32 bytes each."""

    salt: bytes = field(repr=False)
    """Hides the prompt in the offer."""
    nonce: bytes = field(repr=False)
    """Our part of the sampling seed."""
