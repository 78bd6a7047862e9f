"""What the consumer's and the provider's state machines have in common: effects, the stored record, the transition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, TypeAlias, TypeVar

from aci_p2p.protocol.envelope import Envelope, Sealer, kind_of, open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.lifecycle import FINAL_STATES, LIMITS, TRANSITIONS, Party, State, Trigger, advance
from aci_p2p.protocol.messages import KINDS, MAX_DETAIL_BYTES, Abort, AbortCode, BidSummary, Conversation, Kind, Offer
from aci_p2p.protocol.selection import Ranking
from aci_p2p.protocol.validation import Decision, Reason, require

JOB_PROTOCOL: Final = "/aci/job/1.0.0"
"""Stream protocol of a job between consumer and provider, from award to receipt."""

WAITING: Final = (State.REVEALED, State.PENDING)
"""States in which a job waits without a stream, for hours."""

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored before the message of its transition is sent."""

    job_id: bytes
    """32 bytes."""
    role: Party
    """CONSUMER or PROVIDER: which side we are."""
    state: State
    """Where the job stands."""
    updated_at: int
    """When it got there, Unix milliseconds."""
    model_root: bytes
    """Weights root, 32 bytes."""
    peer: NodeId | None
    """The other side, once there is one."""
    price: int
    """What the job costs, base units: at the consumer all that it has promised, at the provider its own share."""
    blame: Party
    """Who failed, if anybody did."""
    detail: str
    """Why it ended, in words, or empty."""
    proof: bytes
    """The proof: a proof file at the consumer, the signed statement at the provider; empty until it exists."""
    receipt: bytes
    """The consumer's signed receipt; empty until receipted."""


class PaymentState(Enum):
    """How far a payment is."""

    RUNNING = "running"
    """The provider still works for it: the next voucher takes its place."""
    OWED = "owed"
    """It is final at the consumer, which tells the provider until that has answered."""
    SETTLED = "settled"
    """Both sides hold it."""


@dataclass(frozen=True, slots=True)
class Payment:
    """What one provider of a job is paid, as it is stored beside the job."""

    job_id: bytes
    """32 bytes."""
    role: Party
    """CONSUMER or PROVIDER: which side we are."""
    peer: NodeId
    """The other side."""
    amount: int
    """Promised by the consumer, base units."""
    statement: bytes
    """The consumer's signed voucher or receipt."""
    state: PaymentState
    """How far it is; at the provider always SETTLED."""


def recovered(job: JobRecord, now: int) -> JobRecord | None:
    """The job's record after a restart, if it changes: an interrupted one ends, as its table allows."""
    if job.state in WAITING:
        return timed_out(job, now)
    if job.state is State.RECEIPTED:
        return replace(job, state=advance(job.state, Trigger.RECORD), updated_at=now)
    if (job.state, Trigger.CANCEL) in TRANSITIONS:
        return replace(job, state=advance(job.state, Trigger.CANCEL), updated_at=now, detail="the node stopped")
    return None


def timed_out(job: JobRecord, now: int) -> JobRecord | None:
    """The record of a job that waited for as long as it may, without a stream; None when it stays."""
    if job.state not in WAITING or now < job.updated_at + LIMITS[job.state].timeout_ms:
        return None
    state = advance(job.state, Trigger.TIMEOUT)
    if job.state is State.PENDING:
        return replace(job, state=state, updated_at=now)
    return replace(job, state=state, updated_at=now, blame=LIMITS[job.state].blame, detail="no receipt came")


# Effects, performed by the shell in order.


@dataclass(frozen=True, slots=True)
class Persist:
    """Store the record durably before going on."""

    record: JobRecord
    """Replaces the job's former record."""
    payments: tuple[Payment, ...] = ()
    """Replace the former ones to the same peers, in the same transaction."""


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Publish the offer."""

    offer: Envelope[Offer]
    """What to publish."""


@dataclass(frozen=True, slots=True)
class AskForQuotes:
    """Ask the best of the providers whose prices are known for a firm quote; answered by `QuotesAsked`."""

    offer: Envelope[Offer]
    """What they are asked about."""
    exclude: frozenset[NodeId]
    """Whom not to ask."""


@dataclass(frozen=True, slots=True)
class ReleaseQuotes:
    """The quotes that did not win are not needed any more."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Open the job's stream to a provider, or take the one of its quote; answered by `StreamEnded` if that fails."""

    provider: NodeId
    """Whom to dial."""
    addresses: tuple[str, ...]
    """Where."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame on the job's stream."""

    data: bytes
    """An envelope."""


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Close the job's stream, if it is open. Nothing of it is reported any more, what already waits included."""


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send `TimerFired` at a time; replaces the timer that was set."""

    at: int
    """Unix milliseconds."""


@dataclass(frozen=True, slots=True)
class BidSeen:
    """A bid arrived in time; for people who watch."""

    bid: BidSummary
    """The bid."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A provider was chosen; for people who watch."""

    provider: NodeId
    """The winner."""
    ranking: Ranking
    """The order and the reason."""


@dataclass(frozen=True, slots=True)
class FailedOver:
    """A provider failed, and another is sought to go on; for people who watch."""

    provider: NodeId
    """Who failed."""
    problem: str
    """How, in words."""
    tokens: int
    """Output tokens that had come by then."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """A part of the answer for the user."""

    tokens: tuple[int, ...]
    """Token ids."""
    text: str
    """Their text."""


@dataclass(frozen=True, slots=True)
class StartGeneration:
    """Run the model; answered by `Produced`, then `GenerationEnded` or `GenerationFailed`."""

    conversation: Conversation
    """What the model is asked."""
    max_input_tokens: int
    """Most prompt tokens, template included, that the offer's price covers."""
    max_tokens: int
    """Most tokens to produce."""
    temperature_milli: int
    """Thousandths; 0 is greedy."""
    seed: bytes
    """Sampling seed, 32 bytes."""
    accepted: tuple[int, ...]
    """Output tokens of others, behind which it goes on."""


@dataclass(frozen=True, slots=True)
class HoldGeneration:
    """Produce nothing more until `ResumeGeneration`."""


@dataclass(frozen=True, slots=True)
class ResumeGeneration:
    """Go on producing."""


@dataclass(frozen=True, slots=True)
class StopGeneration:
    """Stop running the model, if it runs."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done: the consumer has its answer, and the provider has revealed its own."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended without an answer."""

    error: AciError
    """Why, and whose fault it is."""


Effect: TypeAlias = (
    Persist
    | Broadcast
    | AskForQuotes
    | ReleaseQuotes
    | OpenStream
    | Send
    | CloseStream
    | SetTimer
    | BidSeen
    | Chosen
    | FailedOver
    | Deliver
    | StartGeneration
    | HoldGeneration
    | ResumeGeneration
    | StopGeneration
    | Finished
    | Failed
)
"""What a job asks of its shell."""


# Events that both sides know.


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """A frame came on the job's stream."""

    data: bytes
    """The frame."""


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The job's stream could not be opened, ended or broke."""

    detail: str
    """Why, in words."""
    is_crowded: bool = False
    """Whether it could not be opened because as many of ours are open as the peer serves: no fault of the peer's."""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time of the last `SetTimer` has come."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Our user or our shutdown gives the job up."""


class Job:
    """State, transition and record of one job on one side."""

    role: Party

    def __init__(self, sealer: Sealer, state: State) -> None:
        self._sealer = sealer
        self._state = state
        self._price = 0
        self._blame = Party.NOBODY
        self._detail = ""
        self._proof_bytes = b""
        self._receipt_bytes = b""
        self._record: JobRecord | None = None

    @property
    def record(self) -> JobRecord | None:
        """What is stored of the job; None before its first transition."""
        return self._record

    @property
    def state(self) -> State:
        """Where the job stands."""
        return self._state

    @property
    def price(self) -> int:
        """What the job costs so far, base units, as its record has it."""
        return self._price

    @property
    def over(self) -> bool:
        """Whether nothing more will happen on the stream."""
        return self._state in FINAL_STATES or self._state is State.PENDING

    @property
    def job_id(self) -> bytes:
        """32 bytes."""
        raise NotImplementedError

    def _identity(self) -> tuple[bytes, NodeId | None]:
        """Model root and other side, for the record."""
        raise NotImplementedError

    def _advance(self, trigger: Trigger, now: int, payments: tuple[Payment, ...] = ()) -> list[Effect]:
        """Move, and store the move with what is promised by it; the timer of the new state is set behind it."""
        self._state = advance(self._state, trigger)
        effects: list[Effect] = [self._persist(now, payments)]
        if not self.over:
            effects.append(SetTimer(now + LIMITS[self._state].timeout_ms))
        return effects

    def _persist(self, now: int, payments: tuple[Payment, ...]) -> Persist:
        root, peer = self._identity()
        self._record = JobRecord(
            job_id=self.job_id, role=self.role, state=self._state, updated_at=now, model_root=root, peer=peer,
            price=self._price, blame=self._blame, detail=self._detail, proof=self._proof_bytes,
            receipt=self._receipt_bytes,
        )  # fmt: skip
        return Persist(self._record, payments)

    def _send(self, body: Any, now: int) -> Send:  # noqa: ANN401 - any message class
        return Send(self._sealer.seal(body, now).data)

    def _abort(self, code: AbortCode, detail: str, now: int) -> Send:
        text = detail.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore")
        return self._send(Abort(self.job_id, code, text), now)

    def _read_frame(self, data: bytes, sender: NodeId, allowed: tuple[Kind, ...], now: int) -> Envelope[Any]:
        """Check a frame of the job's stream. Raises MessageRefused."""
        kind = kind_of(data)
        # A kind that this side may send in this state.
        require(kind in allowed, Decision.REJECT, Reason.WRONG_KIND)
        envelope: Envelope[Any] = open_envelope(data, KINDS[kind].body, network=self._sealer.network, now=now)
        # Signed by the party of the job, whoever holds the stream.
        require(envelope.sender == sender, Decision.REJECT, Reason.WRONG_SENDER)
        # About this job.
        require(envelope.body.job_id == self.job_id, Decision.REJECT, Reason.WRONG_JOB)
        return envelope
