"""The consumer's side of a job: offer, choose, send the prompt, check the answer, sign the receipt. Sans-I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from aci_p2p.protocol.commitments import (
    derive_job_id,
    derive_seed,
    input_bytes,
    input_commitment,
    nonce_commitment,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.errors import AciError, LocalError, RemoteError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    BidSeen,
    Broadcast,
    Cancel,
    Chosen,
    CloseStream,
    Deliver,
    Effect,
    Failed,
    Finished,
    FrameArrived,
    Job,
    OpenStream,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party, State, Trigger
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import (
    MAX_BIDS,
    SECOND,
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    BidSummary,
    Commit,
    Conversation,
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
from aci_p2p.protocol.pricing import price, worst_price
from aci_p2p.protocol.proof import MAGIC, MAX_ANSWER_BYTES, ProofFile, ProofInvalid, check_offer_match, encode_proof
from aci_p2p.protocol.sealing import Binding, seal_opening
from aci_p2p.protocol.selection import Ranking, SelectionRule
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require


class NoBids(ResourceError):
    """Nobody bid in time, or no bid meets the offer, or every chosen provider declined."""

    code = "no_bids"

    def __init__(self, message: str, *, bids: int, hint: str) -> None:
        """`bids`: how many arrived."""
        super().__init__(message, hint=hint)
        self.bids = bids


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

    def __post_init__(self) -> None:
        """Raise LocalError on what no node would forward."""
        if not self.conversation.turns or self.max_tokens < 1:
            msg = "a job needs a prompt and at least one token to answer it"
            raise LocalError(msg)
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


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the job."""


@dataclass(frozen=True, slots=True)
class BidArrived:
    """A checked bid came over gossip."""

    bid: Envelope[Bid]
    """The bid."""


ConsumerEvent: TypeAlias = Start | BidArrived | FrameArrived | StreamEnded | TimerFired | Cancel
"""What a consumer's job reacts to."""

_PROMPT_FAULTS: Final = (AbortCode.PROMPT_TOO_LONG, AbortCode.INVALID_PROMPT)


class ConsumerJob(Job):
    """One job, from the consumer's side. `handle` turns events into effects; it does no I/O."""

    role = Party.CONSUMER

    def __init__(self, sealer: Sealer, request: JobRequest, secrets: JobSecrets, rule: SelectionRule) -> None:
        """`rule` orders the bids."""
        super().__init__(sealer, State.DRAFT)
        self._request = request
        self._secrets = secrets
        self._rule = rule
        self._commitments = (input_commitment(request.conversation, secrets.salt), nonce_commitment(secrets.nonce))
        self._job_id = derive_job_id(sealer.node_id, *self._commitments)
        self._opening = Opening(request.conversation, secrets.salt, secrets.nonce)
        self._offer: Envelope[Offer] | None = None
        self._bids: dict[bytes, Envelope[Bid]] = {}
        self._summaries: list[BidSummary] = []
        self._ranking: Ranking | None = None
        self._attempt = 0
        self._last_decline = ""
        self._award_digest = b""
        self._provider_nonce = b""
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._text_bytes = 0
        self._flushed = False
        self._commitment = b""
        self._proof: Envelope[Proof] | None = None
        self._receipt: Envelope[Receipt] | None = None

    @property
    def job_id(self) -> bytes:
        """32 bytes, derived from the consumer and its commitments."""
        return self._job_id

    @property
    def offer(self) -> Envelope[Offer]:
        """The signed offer; only after `Start`."""
        assert self._offer is not None  # callers come after Start
        return self._offer

    def handle(self, event: ConsumerEvent, now: int) -> list[Effect]:  # noqa: PLR0911 - one for each event
        """React to an event at `now` (Unix ms); out of place it has no effect. `Start` may raise LocalError."""
        if self.over:
            return []
        match event:
            case Start() if self._state is State.DRAFT:
                return self._start(now)
            case BidArrived(bid) if self._state is State.OFFERED:
                return self._on_bid(bid, now)
            case FrameArrived(data) if self._state in _ALLOWED:
                return self._on_frame(data, now)
            case StreamEnded(detail) if self._state in _ALLOWED:
                return self._on_stream_end(detail, now)
            case TimerFired() if self._state is not State.DRAFT:
                return self._on_timer(now)
            case Cancel():
                return self._cancel(now)
            case _:
                return []

    @property
    def proof(self) -> Envelope[Proof]:
        """The provider's signed statement; only when finished."""
        assert self._proof is not None  # callers come after Finished
        return self._proof

    @property
    def receipt(self) -> Envelope[Receipt]:
        """Our signed receipt; only when finished."""
        assert self._receipt is not None  # callers come after Finished
        return self._receipt

    def proof_file(self) -> ProofFile:
        """The answer with its proof and openings; only when finished."""
        return ProofFile(
            magic=MAGIC,
            network=self._sealer.network,
            proof=self.proof.data,
            offer=self.offer.data,
            conversation=self._request.conversation,
            salt=self._secrets.salt,
            consumer_nonce=self._secrets.nonce,
            tokens=tuple(self._tokens),
            text="".join(self._text),
        )

    def _identity(self) -> tuple[bytes, NodeId | None]:
        return self._request.model_root, self._provider.provider if self._attempt else None

    @property
    def _provider(self) -> BidSummary:
        assert self._ranking is not None  # set before the first attempt
        return self._ranking.ranked[self._attempt - 1]

    def _start(self, now: int) -> list[Effect]:
        request = self._request
        self._offer = self._sealer.seal(
            Offer(
                job_id=self._job_id,
                model_root=request.model_root,
                input_commitment=self._commitments[0],
                nonce_commitment=self._commitments[1],
                input_bytes=input_bytes(request.conversation),
                input_turns=len(request.conversation.turns),
                max_tokens=request.max_tokens,
                temperature_milli=request.temperature_milli,
                max_price=request.max_price,
                max_latency_ms=request.max_latency_ms,
                bid_deadline=now + request.bid_window_ms,
            ),
            now,
        )
        return [*self._advance(Trigger.OFFER, now), Broadcast(self._offer), SetTimer(now + request.bid_window_ms)]

    def _on_bid(self, bid: Envelope[Bid], now: int) -> list[Effect]:
        if (
            any(summary.provider == bid.sender for summary in self._summaries)
            or len(self._bids) >= MAX_BIDS
            or bid.body.job_id != self._job_id
            or bid.body.offer_digest != self.offer.digest
            or bid.sender == self._sealer.node_id
        ):
            return []
        summary = BidSummary(
            provider=bid.sender,
            bid_digest=bid.digest,
            worst_price=worst_price(self.offer.body, bid.body),
            latency_ms=bid.body.latency_ms,
        )
        self._bids[bid.digest] = bid
        self._summaries.append(summary)
        effects: list[Effect] = [BidSeen(summary)]
        expected = self._request.expected_bidders
        if expected and expected <= {summary.provider for summary in self._summaries}:
            effects += self._choose(now)
        return effects

    def _choose(self, now: int) -> list[Effect]:
        """Rank once, then award the best bid that is still firm and has not declined."""
        if self._ranking is None:
            self._ranking = self._rule.rank(self.offer.body, self.offer.digest, self._summaries)
        while self._attempt < len(self._ranking.ranked):
            self._attempt += 1
            bid = self._bids[self._provider.bid_digest]
            if now < bid.header.expires_at:
                return self._award(bid, self._ranking, now)
            self._last_decline = f"{bid.sender.short}: its bid has expired"
        return self._no_bid(self._ranking, now)

    def _award(self, bid: Envelope[Bid], ranking: Ranking, now: int) -> list[Effect]:
        award = self._sealer.seal(Award(self._job_id, bid.digest), now)
        self._award_digest = award.digest
        return [
            Chosen(bid.sender, ranking),
            *self._advance(Trigger.AWARD, now),
            OpenStream(bid.sender, bid.body.addresses),
            Send(award.data),
        ]

    def _no_bid(self, ranking: Ranking, now: int) -> list[Effect]:
        if self._last_decline:
            message = f"every chosen provider declined; the last: {self._last_decline}"
            hint = "try again in a moment"
        elif ranking.refused:
            message = ranking.why
            hint = "raise the maximum price or latency, or wait for cheaper providers"
        else:
            message = f"nobody bid within {self._request.bid_window_ms / SECOND:g} s"
            hint = "check that a provider of this model is connected, or wait longer for bids"
        self._detail = message
        trigger = Trigger.NO_BID if self._bids else Trigger.TIMEOUT
        return self._end(trigger, NoBids(message, bids=len(self._bids), hint=hint), now)

    def _on_timer(self, now: int) -> list[Effect]:
        if self._state is State.OFFERED:
            return self._choose(now)
        farewell: list[Effect] = [self._abort(AbortCode.TIMEOUT, "the provider did not act in time", now)]
        if self._state is State.AWARDED:
            return self._decline("it did not answer the award in time", now, Trigger.TIMEOUT, farewell)
        return self._provider_fails("it went silent", now, Trigger.TIMEOUT, farewell)

    def _on_stream_end(self, detail: str, now: int) -> list[Effect]:
        if self._state is State.AWARDED:
            return self._decline(detail, now)
        return self._provider_fails(detail, now)

    def _decline(
        self, detail: str, now: int, trigger: Trigger = Trigger.DECLINE, farewell: list[Effect] | None = None
    ) -> list[Effect]:
        self._last_decline = f"{self._provider.provider.short}: {detail}"
        return [*self._advance(trigger, now), *(farewell or []), CloseStream(), *self._choose(now)]

    def _cancel(self, now: int) -> list[Effect]:
        self._detail = "cancelled"
        farewell: list[Effect] = []
        if self._state in _ALLOWED:
            farewell.append(self._abort(AbortCode.CANCELLED, "the consumer cancelled", now))
        return self._end(Trigger.CANCEL, JobCancelled("the job was cancelled"), now, farewell)

    def _end(self, trigger: Trigger, error: AciError, now: int, farewell: list[Effect] | None = None) -> list[Effect]:
        return [*self._advance(trigger, now), *(farewell or []), CloseStream(), Failed(error)]

    def _provider_fails(
        self, problem: str, now: int, trigger: Trigger = Trigger.PROVIDER_FAILS, farewell: list[Effect] | None = None
    ) -> list[Effect]:
        self._detail = problem
        self._blame = Party.PROVIDER
        error = ProviderFault(self._provider.provider, problem, tokens=len(self._tokens))
        return self._end(trigger, error, now, farewell)

    def _on_frame(self, data: bytes, now: int) -> list[Effect]:
        try:
            frame = self._read_frame(data, self._provider.provider, _ALLOWED[self._state], now)
            return self._on_message(frame.body, now)
        except (MessageRefused, ProofInvalid) as error:
            farewell: list[Effect] = [self._abort(AbortCode.PROTOCOL, error.message, now)]
            if self._state is State.AWARDED:
                return self._decline(error.message, now, farewell=farewell)
            return self._provider_fails(error.message, now, farewell=farewell)

    def _on_message(self, body: Any, now: int) -> list[Effect]:  # noqa: ANN401 - any message class
        match body:
            case Accept():
                return self._on_accept(body, now)
            case Tokens():
                return self._on_tokens(body, now)
            case Commit():
                self._commitment = body.commitment
                return self._advance(Trigger.COMMIT, now)
            case Reveal():
                return self._on_reveal(body, now)
            case _:
                return self._on_abort(body, now)

    def _on_accept(self, accept: Accept, now: int) -> list[Effect]:
        # Accepts our award, not one of an earlier attempt.
        require(accept.award_digest == self._award_digest, Decision.REJECT, Reason.WRONG_JOB)
        self._provider_nonce = accept.provider_nonce
        ours = self._sealer
        binding = Binding(ours.network, self._job_id, ours.node_id, self._provider.provider, self._award_digest)
        sealed = Input(self._job_id, seal_opening(self._opening, accept.kem_key, binding))
        return [*self._advance(Trigger.ACCEPT, now), *self._advance(Trigger.INPUT, now), self._send(sealed, now)]

    def _on_tokens(self, part: Tokens, now: int) -> list[Effect]:
        # Continues where the last part ended.
        require(part.index == len(self._tokens), Decision.REJECT, Reason.OUT_OF_ORDER)
        # Carries tokens; text alone comes once, at the end, or a drip of it would hold the job for ever.
        require(bool(part.tokens or part.text) and not self._flushed, Decision.REJECT, Reason.MALFORMED)
        self._flushed = not part.tokens
        # No more than was asked for.
        total = len(self._tokens) + len(part.tokens)
        require(total <= self._request.max_tokens, Decision.REJECT, Reason.TOO_MANY_TOKENS)
        self._text_bytes += len(part.text.encode())
        # No more text than a proof file holds.
        require(self._text_bytes <= MAX_ANSWER_BYTES, Decision.REJECT, Reason.TOO_LARGE)
        self._tokens += part.tokens
        self._text.append(part.text)
        # Not stored: the state stays, and the text is worth nothing without its proof.
        _, timer = self._advance(Trigger.TOKENS, now)
        return [timer, Deliver(part.tokens, part.text)]

    def _on_reveal(self, reveal: Reveal, now: int) -> list[Effect]:
        proof = open_envelope(reveal.proof, Proof, network=self._sealer.network, now=now)
        self._check_proof(proof, reveal.salt)
        self._proof = proof
        self._proof_bytes = encode_proof(self.proof_file())
        revealed = self._advance(Trigger.REVEAL, now)
        used = {"input_tokens": proof.body.input_tokens, "output_tokens": proof.body.output_tokens}
        self._price = price(self._bids[self._provider.bid_digest].body, **used)
        self._receipt = self._sealer.seal(
            Receipt(
                job_id=self._job_id,
                provider=self._provider.provider,
                offer_digest=self.offer.digest,
                proof_digest=proof.digest,
                price=self._price,
                rule=self._rule.name,
                bids=tuple(self._summaries),
                **used,
            ),
            now,
        )
        self._receipt_bytes = self._receipt.data
        receipted = self._advance(Trigger.RECEIPT, now)
        recorded = self._advance(Trigger.RECORD, now)
        return [*revealed, *receipted, Send(self._receipt.data), *recorded, CloseStream(), Finished()]

    def _check_proof(self, proof: Envelope[Proof], salt: bytes) -> None:
        """Check a proof against everything we saw. Raises MessageRefused, ProofInvalid."""
        body, provider = proof.body, self._provider.provider
        # The provider's own statement.
        require(proof.sender == provider, Decision.REJECT, Reason.WRONG_SENDER)
        check_offer_match(body, self.offer)
        # Given under the bid that won.
        require(body.bid_digest == self._provider.bid_digest, Decision.REJECT, Reason.WRONG_JOB)
        seed = derive_seed(self._secrets.nonce, self._provider_nonce, self._job_id)
        # Sampled with the seed that both sides fixed.
        nonces_hold = body.provider_nonce == self._provider_nonce and body.seed == seed
        require(nonces_hold, Decision.REJECT, Reason.BAD_COMMITMENT)
        # About the tokens and the text that we were sent.
        tokens_hold = body.tokens_hash == tokens_digest(self._job_id, self._tokens)
        require(tokens_hold and body.output_tokens == len(self._tokens), Decision.REJECT, Reason.BAD_COMMITMENT)
        text_holds = body.text_hash == text_digest(self._job_id, "".join(self._text))
        require(text_holds, Decision.REJECT, Reason.BAD_COMMITMENT)
        # An answer, and one that ended for the stated reason.
        cut = body.finish is Finish.LENGTH
        ended = body.output_tokens == self._request.max_tokens if cut else body.output_tokens > 0
        require(ended, Decision.REJECT, Reason.BAD_COMMITMENT)
        # Opens the commitment made before.
        root = output_root(body.tokens_hash, body.text_hash)
        opened = output_commitment(self._job_id, provider, root, salt) == self._commitment
        require(opened, Decision.REJECT, Reason.BAD_COMMITMENT)

    def _on_abort(self, abort: Abort, now: int) -> list[Effect]:
        detail = printable(abort.detail) or abort.abort.name.lower().replace("_", " ")
        if self._state is State.AWARDED:
            # It has not seen the prompt, so whatever ails it is no word on the job.
            return self._decline(detail, now)
        if abort.abort in _PROMPT_FAULTS and self._state is State.STREAMING and not self._tokens:
            self._detail = detail
            return self._end(Trigger.CANCEL, PromptRefused(detail, hint="shorten the prompt or max_tokens"), now)
        return self._provider_fails(detail, now)


_ALLOWED: Final[dict[State, tuple[Kind, ...]]] = {
    State.AWARDED: (Kind.ACCEPT, Kind.ABORT),
    State.STREAMING: (Kind.TOKENS, Kind.COMMIT, Kind.ABORT),
    State.COMMITTED: (Kind.REVEAL, Kind.ABORT),
}
"""What a provider may send in each state in which the consumer waits for it on the stream."""
