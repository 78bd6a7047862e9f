"""The provider's side of a job: accept, run the prompt, stream while it is paid, commit, reveal. Sans-I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from aci_p2p.protocol.commitments import (
    derive_seed,
    input_bytes,
    input_commitment,
    nonce_commitment,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.errors import AciError, RemoteError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    Cancel,
    CloseStream,
    Effect,
    Failed,
    Finished,
    FrameArrived,
    HoldGeneration,
    Job,
    Payment,
    PaymentState,
    ResumeGeneration,
    StartGeneration,
    StopGeneration,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.leg import VOUCHER_TOKENS
from aci_p2p.protocol.lifecycle import LIMITS, Party, State, Trigger, advance
from aci_p2p.protocol.messages import (
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    Commit,
    Finish,
    Input,
    Kind,
    Offer,
    Opening,
    Proof,
    Reveal,
    Share,
    Tokens,
    Voucher,
)
from aci_p2p.protocol.pricing import max_input_tokens, share_of
from aci_p2p.protocol.publications import Engine
from aci_p2p.protocol.sealing import Binding, OpeningKey
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require


class ConsumerFault(RemoteError):
    """The consumer broke the protocol or vanished."""

    code = "consumer_fault"

    def __init__(self, consumer: NodeId, problem: str) -> None:
        super().__init__(f"consumer {consumer.short} failed: {problem}")
        self.consumer = consumer


class JobAborted(ResourceError):
    """The job ended early on our side."""

    code = "job_aborted"


@dataclass(frozen=True, slots=True)
class ProviderSecrets:
    """Fresh randomness for one job, 32 bytes each."""

    nonce: bytes = field(repr=False)
    """Our part of the sampling seed."""
    salt: bytes = field(repr=False)
    """Hides the output in our commitment until we reveal."""
    kem_seed: bytes = field(repr=False)
    """Makes the key to which the prompt is sealed."""


@dataclass(frozen=True, slots=True)
class Produced:
    """The model produced a part of the answer."""

    tokens: tuple[int, ...]
    """Token ids."""
    text: str
    """Their text, whole characters only."""
    input_tokens: int
    """Prompt tokens, chat template included."""


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """The model finished its answer."""

    finish: Finish
    """Why it ended."""
    input_tokens: int
    """Prompt tokens, chat template included."""
    engine: Engine
    """What ran it."""


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """The model could not answer."""

    abort: AbortCode
    """Why, for the consumer."""
    detail: str
    """The same in words."""


ProviderEvent: TypeAlias = (
    FrameArrived | StreamEnded | TimerFired | Cancel | Produced | GenerationEnded | GenerationFailed
)
"""What a provider's job reacts to."""


class ProviderJob(Job):
    """One job, from the provider's side. `handle` turns events into effects; it does no I/O."""

    role = Party.PROVIDER

    def __init__(self, sealer: Sealer, offer: Envelope[Offer], bid: Envelope[Bid], secrets: ProviderSecrets) -> None:
        """`bid` is our bid for `offer`; the first frame should be its award."""
        super().__init__(sealer, State.OFFERED)
        self._offer = offer
        self._bid = bid
        self._secrets = secrets
        self._opening_key: tuple[OpeningKey, Binding] | None = None
        self._opening: Opening | None = None
        self._seed = b""
        self._accepted: tuple[int, ...] = ()
        self._accepted_tokens = 0
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._held: deque[Produced] = deque()
        self._ended: GenerationEnded | None = None
        self._paid = 0
        self._input_tokens = 0

    @property
    def job_id(self) -> bytes:
        """32 bytes, from the offer."""
        return self._offer.body.job_id

    @property
    def paid(self) -> int:
        """What was promised while it ran, base units."""
        return self._share(self._paid).price if self._paid else 0

    @property
    def over(self) -> bool:
        """Whether nothing more will happen on the stream: what is owed is settled elsewhere."""
        return super().over or self._state is State.REVEALED

    @property
    def opening(self) -> Opening:
        """The prompt as it was sealed to us; only once it has come."""
        assert self._opening is not None  # callers come after it
        return self._opening

    def handle(self, event: ProviderEvent, now: int) -> list[Effect]:  # noqa: PLR0911 - one for each event
        """React to an event at `now` (Unix milliseconds). Events after the end, or out of place, have no effect."""
        if self.over:
            return []
        match event:
            case FrameArrived(data):
                return self._on_frame(data, now)
            case Produced(tokens, text) if self._state in _WORKING and (tokens or text):
                self._held.append(event)
                return self._send_held(now) if self._state is State.STREAMING else []
            case GenerationEnded() if self._state in _WORKING:
                self._ended = event
                return self._send_held(now) if self._state is State.STREAMING else []
            case GenerationFailed(code, detail):
                return self._on_failure(code, detail, now)
            case StreamEnded(detail):
                return self._consumer_fails(detail, now)
            case TimerFired() if self._state is not State.OFFERED:
                return self._on_timer(now)
            case Cancel():
                return self._on_failure(AbortCode.CANCELLED, "the provider is shutting down", now)
            case _:
                return []

    def _identity(self) -> tuple[bytes, NodeId | None]:
        return self._offer.body.model_root, self._offer.sender

    def _on_frame(self, data: bytes, now: int) -> list[Effect]:
        allowed: tuple[Kind, ...] = _FROM_CONSUMER.get(self._state, (Kind.ABORT,))
        try:
            frame = self._read_frame(data, self._offer.sender, allowed, now)
            return self._on_message(frame, now)
        except MessageRefused as error:
            farewell: list[Effect] = [self._abort(AbortCode.PROTOCOL, error.message, now)]
            if self._state is State.OFFERED:
                return self._leave(error, farewell)
            return self._consumer_fails(error.message, now, farewell=farewell)

    def _on_message(self, frame: Envelope[Any], now: int) -> list[Effect]:
        match frame.body:
            case Award():
                return self._on_award(frame, now)
            case Input():
                return self._on_input(frame.body, now)
            case Voucher():
                return self._on_voucher(frame, now)
            case _:
                return self._on_abort(frame.body, now)

    def _on_award(self, award: Envelope[Award], now: int) -> list[Effect]:
        # Awards the bid that we made.
        require(award.body.bid_digest == self._bid.digest, Decision.REJECT, Reason.WRONG_JOB)
        # While the bid is firm.
        require(now < self._bid.header.expires_at, Decision.IGNORE, Reason.EXPIRED)
        # Leaves something to do, or an answer to be proved.
        require(award.body.accepted_tokens <= self._offer.body.max_tokens, Decision.REJECT, Reason.TOO_MANY_TOKENS)
        self._accepted_tokens = award.body.accepted_tokens
        awarded = self._advance(Trigger.AWARD, now)
        ours, key = self._sealer, OpeningKey(self._secrets.kem_seed)
        binding = Binding(ours.network, self.job_id, self._offer.sender, ours.node_id, award.digest)
        self._opening_key = key, binding
        accept = Accept(self.job_id, award.digest, self._secrets.nonce, key.public)
        return [*awarded, *self._advance(Trigger.ACCEPT, now), self._send(accept, now)]

    def _on_input(self, frame: Input, now: int) -> list[Effect]:
        assert self._opening_key is not None  # made when we accepted
        key, binding = self._opening_key
        # Sealed to us, for this job.
        opening = self._opening = key.open(frame.sealed, binding)
        self._opening_key = None
        offer = self._offer.body
        # The prompt and the nonce that the offer committed to, of the size it declared.
        holds = (
            input_commitment(opening.conversation, opening.salt) == offer.input_commitment
            and nonce_commitment(opening.consumer_nonce) == offer.nonce_commitment
            and input_bytes(opening.conversation) == offer.input_bytes
            and len(opening.conversation.turns) == offer.input_turns
            and len(opening.accepted) == self._accepted_tokens
        )
        require(holds, Decision.REJECT, Reason.BAD_COMMITMENT)
        self._accepted = opening.accepted
        self._seed = derive_seed(opening.consumer_nonce, self._secrets.nonce, self.job_id)
        run = StartGeneration(
            conversation=opening.conversation,
            max_input_tokens=max_input_tokens(offer),
            max_tokens=offer.max_tokens,
            temperature_milli=offer.temperature_milli,
            seed=self._seed,
            accepted=opening.accepted,
        )
        return [*self._advance(Trigger.INPUT, now), run]

    def _send_held(self, now: int) -> list[Effect]:
        """Send what the model has produced, as long as no more than we risk is unpaid."""
        effects: list[Effect] = []
        while self._held and len(self._tokens) - self._paid < VOUCHER_TOKENS:
            effects += self._send_part(self._held.popleft(), now)
        if self._held:
            return [*effects, *self._advance(Trigger.HOLD, now), HoldGeneration()]
        if self._ended:
            return [*effects, *self._on_end(self._ended, now)]
        return effects

    def _send_part(self, part: Produced, now: int) -> list[Effect]:
        index = self._accepted_tokens + len(self._tokens)
        frame = Tokens(self.job_id, index, part.tokens, part.text, part.input_tokens)
        self._tokens += part.tokens
        self._text.append(part.text)
        self._input_tokens = part.input_tokens
        # Not stored: the state stays, and what is owed is stored with the voucher.
        _, timer = self._advance(Trigger.TOKENS, now)
        return [timer, self._send(frame, now)]

    def _on_voucher(self, voucher: Envelope[Voucher], now: int) -> list[Effect]:
        share = voucher.body.share
        # For more than was promised before, and no more than we have sent.
        require(self._paid < share.output_tokens <= len(self._tokens), Decision.REJECT, Reason.BAD_VOUCHER)
        # For us, at the prices of our bid.
        require(share == self._share(share.output_tokens), Decision.REJECT, Reason.BAD_VOUCHER)
        self._paid = share.output_tokens
        self._price = share.price
        payment = Payment(
            self.job_id, Party.PROVIDER, self._offer.sender, share.price, voucher.data, PaymentState.SETTLED
        )
        was_held = self._state is State.UNPAID
        effects = self._advance(Trigger.VOUCHER, now, (payment,))
        if was_held:
            effects.append(ResumeGeneration())
        return effects + self._send_held(now)

    def _share(self, output_tokens: int) -> Share:
        """What we are owed when so many of our tokens are paid for."""
        return share_of(
            self._offer.body,
            self._bid,
            input_tokens=self._input_tokens,
            first_token=self._accepted_tokens,
            output_tokens=output_tokens,
        )

    def _on_end(self, ended: GenerationEnded, now: int) -> list[Effect]:
        offer = self._offer.body
        tokens = (*self._accepted, *self._tokens)
        tokens_hash = tokens_digest(self.job_id, tokens)
        text_hash = text_digest(self.job_id, "".join(self._text))
        self._input_tokens = ended.input_tokens
        proof = self._sealer.seal(
            Proof(
                job_id=self.job_id,
                consumer=self._offer.sender,
                offer_digest=self._offer.digest,
                bid_digest=self._bid.digest,
                model_root=offer.model_root,
                input_commitment=offer.input_commitment,
                input_tokens=ended.input_tokens,
                output_tokens=len(tokens),
                tokens_hash=tokens_hash,
                text_hash=text_hash,
                finish=ended.finish,
                temperature_milli=offer.temperature_milli,
                seed=self._seed,
                provider_nonce=self._secrets.nonce,
                engine=ended.engine,
                first_token=self._accepted_tokens,
            ),
            now,
        )
        self._proof_bytes = proof.data
        self._price = self._share(len(self._tokens)).price
        salt, provider = self._secrets.salt, self._sealer.node_id
        commitment = output_commitment(self.job_id, provider, output_root(tokens_hash, text_hash), salt)
        committed = [*self._advance(Trigger.COMMIT, now), self._send(Commit(self.job_id, commitment), now)]
        revealed = [*self._advance(Trigger.REVEAL, now), self._send(Reveal(self.job_id, salt, proof.data), now)]
        return [*committed, *revealed, CloseStream(), Finished()]

    def _on_failure(self, code: AbortCode, detail: str, now: int) -> list[Effect]:
        farewell: list[Effect] = [self._abort(code, detail, now)]
        if self._state is State.OFFERED:
            return self._leave(JobAborted(detail), farewell)
        self._detail = detail
        trigger = Trigger.CANCEL
        if code in (AbortCode.EXECUTOR_FAILED, AbortCode.MODEL_UNAVAILABLE):
            trigger = Trigger.PROVIDER_FAILS
            self._blame = Party.PROVIDER
        return self._end(trigger, JobAborted(detail), now, farewell)

    def _on_abort(self, abort: Abort, now: int) -> list[Effect]:
        detail = printable(abort.detail) or abort.abort.name.lower().replace("_", " ")
        # It may tire of waiting; whether we were too slow is not ours to say.
        if abort.abort in (AbortCode.CANCELLED, AbortCode.TIMEOUT):
            self._detail = detail
            return self._end(Trigger.CANCEL, JobAborted(detail), now)
        return self._consumer_fails(detail, now)

    def _on_timer(self, now: int) -> list[Effect]:
        limit = LIMITS[self._state]
        if limit.blame is Party.CONSUMER:
            silent: list[Effect] = [self._abort(AbortCode.TIMEOUT, "the consumer did not act in time", now)]
            return self._consumer_fails("it went silent", now, Trigger.TIMEOUT, silent)
        self._blame = Party.PROVIDER
        self._detail = "the model made no progress in time"
        farewell: list[Effect] = [self._abort(AbortCode.EXECUTOR_FAILED, self._detail, now)]
        return self._end(Trigger.TIMEOUT, JobAborted(self._detail), now, farewell)

    def _consumer_fails(
        self, problem: str, now: int, trigger: Trigger = Trigger.CONSUMER_FAILS, farewell: list[Effect] | None = None
    ) -> list[Effect]:
        error = ConsumerFault(self._offer.sender, problem)
        if self._state is State.OFFERED:
            return self._leave(error, [])
        self._detail = problem
        self._blame = Party.CONSUMER
        return self._end(trigger, error, now, farewell)

    def _leave(self, error: AciError, farewell: list[Effect]) -> list[Effect]:
        """End before anything was awarded: there is no job to store, and nobody to blame."""
        self._state = advance(self._state, Trigger.CANCEL)
        return [*farewell, CloseStream(), Failed(error)]

    def _end(self, trigger: Trigger, error: AciError, now: int, farewell: list[Effect] | None = None) -> list[Effect]:
        return [*self._advance(trigger, now), StopGeneration(), *(farewell or []), CloseStream(), Failed(error)]


_WORKING: Final = (State.STREAMING, State.UNPAID)
"""States in which the model may produce."""
_FROM_CONSUMER: Final[dict[State, tuple[Kind, ...]]] = {
    State.OFFERED: (Kind.AWARD,),
    State.ACCEPTED: (Kind.INPUT, Kind.ABORT),
    State.STREAMING: (Kind.VOUCHER, Kind.ABORT),
    State.UNPAID: (Kind.VOUCHER, Kind.ABORT),
}
"""What a consumer may send in each state; it may abort in any."""
