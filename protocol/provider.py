"""The provider's side of a job: accept, run the prompt, stream, commit, reveal, collect the receipt. Sans-I/O."""

from __future__ import annotations

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
    Job,
    StartGeneration,
    StopGeneration,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import LIMITS, Party, State, Trigger, advance
from aci_p2p.protocol.messages import (
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    Commit,
    Engine,
    Finish,
    Input,
    Kind,
    Offer,
    Opening,
    Proof,
    Receipt,
    Reveal,
    Tokens,
)
from aci_p2p.protocol.pricing import max_input_tokens, price
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
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._proof: Envelope[Proof] | None = None

    @property
    def job_id(self) -> bytes:
        """32 bytes, from the offer."""
        return self._offer.body.job_id

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
            case Produced(tokens, text) if self._state is State.STREAMING and (tokens or text):
                return self._on_produced(tokens, text, now)
            case GenerationEnded(finish, input_tokens, engine) if self._state is State.STREAMING:
                return self._on_end(finish, input_tokens, engine, now)
            case GenerationFailed(code, detail) if self._state is not State.REVEALED:
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
        allowed: tuple[Kind, ...] = _ALLOWED.get(self._state, (Kind.ABORT,))
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
            case Receipt():
                return self._on_receipt(frame, now)
            case _:
                return self._on_abort(frame.body, now)

    def _on_award(self, award: Envelope[Award], now: int) -> list[Effect]:
        # Awards the bid that we made.
        require(award.body.bid_digest == self._bid.digest, Decision.REJECT, Reason.WRONG_JOB)
        # While the bid is firm.
        require(now < self._bid.header.expires_at, Decision.IGNORE, Reason.EXPIRED)
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
        )
        require(holds, Decision.REJECT, Reason.BAD_COMMITMENT)
        self._seed = derive_seed(opening.consumer_nonce, self._secrets.nonce, self.job_id)
        run = StartGeneration(
            conversation=opening.conversation,
            max_input_tokens=max_input_tokens(offer),
            max_tokens=offer.max_tokens,
            temperature_milli=offer.temperature_milli,
            seed=self._seed,
        )
        return [*self._advance(Trigger.INPUT, now), run]

    def _on_produced(self, tokens: tuple[int, ...], text: str, now: int) -> list[Effect]:
        part = Tokens(self.job_id, len(self._tokens), tokens, text)
        self._tokens += tokens
        self._text.append(text)
        # Not stored: the state stays, and only the proof is owed for.
        _, timer = self._advance(Trigger.TOKENS, now)
        return [timer, self._send(part, now)]

    def _on_end(self, finish: Finish, input_tokens: int, engine: Engine, now: int) -> list[Effect]:
        offer = self._offer.body
        tokens_hash = tokens_digest(self.job_id, self._tokens)
        text_hash = text_digest(self.job_id, "".join(self._text))
        self._proof = self._sealer.seal(
            Proof(
                job_id=self.job_id,
                consumer=self._offer.sender,
                offer_digest=self._offer.digest,
                bid_digest=self._bid.digest,
                model_root=offer.model_root,
                input_commitment=offer.input_commitment,
                input_tokens=input_tokens,
                output_tokens=len(self._tokens),
                tokens_hash=tokens_hash,
                text_hash=text_hash,
                finish=finish,
                temperature_milli=offer.temperature_milli,
                seed=self._seed,
                provider_nonce=self._secrets.nonce,
                engine=engine,
            ),
            now,
        )
        self._proof_bytes = self._proof.data
        used = {"input_tokens": input_tokens, "output_tokens": len(self._tokens)}
        self._price = price(self._bid.body, **used)
        salt, provider = self._secrets.salt, self._sealer.node_id
        commitment = output_commitment(self.job_id, provider, output_root(tokens_hash, text_hash), salt)
        committed = [*self._advance(Trigger.COMMIT, now), self._send(Commit(self.job_id, commitment), now)]
        revealed = [*self._advance(Trigger.REVEAL, now), self._send(Reveal(self.job_id, salt, self._proof.data), now)]
        return [*committed, *revealed]

    def _on_receipt(self, receipt: Envelope[Receipt], now: int) -> list[Effect]:
        body, proof = receipt.body, self._proof
        assert proof is not None  # a receipt is allowed only once we have revealed
        # Signs for our proof, under this offer, and owes what our bid says.
        holds = (
            body.provider == self._sealer.node_id
            and body.offer_digest == self._offer.digest
            and body.proof_digest == proof.digest
            and body.price == self._price
            and body.input_tokens == proof.body.input_tokens
            and body.output_tokens == proof.body.output_tokens
        )
        require(holds, Decision.REJECT, Reason.BAD_COMMITMENT)
        self._receipt_bytes = receipt.data
        receipted = self._advance(Trigger.RECEIPT, now)
        return [*receipted, *self._advance(Trigger.RECORD, now), CloseStream(), Finished()]

    def _on_failure(self, code: AbortCode, detail: str, now: int) -> list[Effect]:
        if self._state is State.REVEALED:
            # The answer is out; without a receipt the job counts against the consumer, whoever closes first.
            return self._consumer_fails("no receipt before the end", now)
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
        # It may tire of waiting; whether we were too slow is not ours to say. Once the answer is out it owes a receipt.
        blameless = abort.abort in (AbortCode.CANCELLED, AbortCode.TIMEOUT) and self._state is not State.REVEALED
        if blameless:
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


_ALLOWED: Final[dict[State, tuple[Kind, ...]]] = {
    State.OFFERED: (Kind.AWARD,),
    State.ACCEPTED: (Kind.INPUT, Kind.ABORT),
    State.REVEALED: (Kind.RECEIPT, Kind.ABORT),
}
"""What a consumer may send in each state; it may abort in any."""
