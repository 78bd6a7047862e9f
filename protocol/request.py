"""What a consumer asks of the network, and the errors that it may meet."""

from __future__ import annotations

from dataclasses import dataclass, field

from aci_p2p.protocol.commitments import input_bytes
from aci_p2p.protocol.errors import LocalError, RemoteError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import MAX_SHARES, Conversation, Offer
from aci_p2p.protocol.terms import ANY_PROVIDER, SelectionTerms, Verification
from aci_p2p.protocol.wire import to_value


class NoBids(ResourceError):
    """Nobody bid in time, or no bid meets the offer, or every chosen provider declined."""

    code = "no_bids"

    def __init__(self, message: str, *, bids: int, hint: str, retry_at: int | None = None) -> None:
        """`bids`: how many arrived; `retry_at`: when a provider that is busy has room, by its word, Unix ms."""
        super().__init__(message, hint=hint)
        self.bids = bids
        self.retry_at = retry_at


class ImpossibleJob(NoBids):
    """No provider that is known can take the job, so that it was not offered."""

    code = "impossible_job"

    def __init__(self, why: str, *, hint: str) -> None:
        """`why`: what nobody has, and by how much."""
        super().__init__(why, bids=0, hint=hint)


class PromptRefused(LocalError):
    """The provider cannot run this prompt: too long for the model, or its template refuses it."""

    code = "prompt_refused"


class JobCancelled(LocalError):
    """Our side gave the job up."""

    code = "cancelled"


class ProviderFault(RemoteError):
    """The provider broke the protocol, vanished or could not go on."""

    code = "provider_fault"

    def __init__(self, provider: NodeId, problem: str, *, tokens: int) -> None:
        """`tokens`: output tokens that had arrived."""
        super().__init__(
            f"provider {provider.short} failed after {tokens} tokens: {problem}",
            hint="run the command again: another provider may take the job",
        )
        self.provider = provider
        self.tokens = tokens


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
    avoid: frozenset[NodeId] = frozenset()
    """Providers that are not to have the job."""
    max_providers: int = 1
    """Providers that may begin, one after the other: the next goes on where one has failed."""
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
        if not 0 < self.max_providers <= MAX_SHARES:
            msg = f"a job has 1 to {MAX_SHARES} providers, not {self.max_providers}"
            raise LocalError(msg)
        # They go out with the receipt, when it is too late to refuse them.
        to_value(self.terms)
        if not 0 < self.bid_window_ms <= MAX_BID_WINDOW_MS:
            msg = f"bids are awaited for 1 to {MAX_BID_WINDOW_MS} ms, not {self.bid_window_ms}"
            raise LocalError(msg)

    def offer(self, job_id: bytes, commitments: tuple[bytes, bytes], bid_deadline: int) -> Offer:
        """The offer of this job; `commitments` to its prompt and nonce, `bid_deadline` in Unix milliseconds."""
        return Offer(
            job_id=job_id,
            model_root=self.model_root,
            input_commitment=commitments[0],
            nonce_commitment=commitments[1],
            input_bytes=input_bytes(self.conversation),
            input_turns=len(self.conversation.turns),
            max_tokens=self.max_tokens,
            temperature_milli=self.temperature_milli,
            max_price=self.max_price,
            max_latency_ms=self.max_latency_ms,
            bid_deadline=bid_deadline,
            verification=self.verification,
            priority_fee=self.priority_fee,
        )


@dataclass(frozen=True, slots=True)
class JobSecrets:
    """Fresh randomness for one job, 32 bytes each."""

    salt: bytes = field(repr=False)
    """Hides the prompt in the offer."""
    nonce: bytes = field(repr=False)
    """Our part of the sampling seed."""
