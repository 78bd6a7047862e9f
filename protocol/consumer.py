"""The consumer's side of a job: offer, choose, send the prompt, take the answer, go on elsewhere when a provider fails,
check the proof, sign the receipt. Sans-I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from aci_p2p.protocol.admission import RETRY_MS
from aci_p2p.protocol.commitments import derive_job_id, input_commitment, nonce_commitment
from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    AskForQuotes,
    BidSeen,
    Broadcast,
    Cancel,
    Chosen,
    CloseStream,
    Deliver,
    Effect,
    Failed,
    FailedOver,
    Finished,
    FrameArrived,
    Job,
    OpenStream,
    Payment,
    PaymentState,
    ReleaseQuotes,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.leg import FROM_PROVIDER, Leg, Output, payments_of
from aci_p2p.protocol.lifecycle import Party, State, Trigger
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import (
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    Commit,
    Input,
    Offer,
    Opening,
    Proof,
    Receipt,
    Reveal,
    Share,
    Tokens,
)
from aci_p2p.protocol.pricing import worst_price
from aci_p2p.protocol.proof import MAGIC, ProofFile, ProofInvalid, encode_proof
from aci_p2p.protocol.reputation import Reputation
from aci_p2p.protocol.request import JobCancelled, JobRequest, JobSecrets, PromptRefused, ProviderFault
from aci_p2p.protocol.round import (
    MAX_UNANSWERED,
    QUOTE_PATIENCE_MS,
    QUOTE_WAIT_MS,
    SEEK_MS,
    BidArrived,
    QuoteRefused,
    QuotesAsked,
    Round,
)
from aci_p2p.protocol.sealing import seal_opening
from aci_p2p.protocol.selection import Knowledge, SelectionRule, StakeTable
from aci_p2p.protocol.terms import Passing
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.validation import MessageRefused


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the job."""


ConsumerEvent: TypeAlias = (
    Start | QuotesAsked | QuoteRefused | BidArrived | FrameArrived | StreamEnded | TimerFired | Cancel
)
"""What a consumer's job reacts to."""

_PROMPT_FAULTS: Final = (AbortCode.PROMPT_TOO_LONG, AbortCode.INVALID_PROMPT)


class ConsumerJob(Job):
    """One job, from the consumer's side. `handle` turns events into effects; it does no I/O."""

    role = Party.CONSUMER

    def __init__(
        self,
        sealer: Sealer,
        request: JobRequest,
        secrets: JobSecrets,
        rule: SelectionRule,
        knowledge: Knowledge | None = None,
    ) -> None:
        """`rule` orders the bids by them and by our `knowledge` of their providers; None: all are strangers."""
        super().__init__(sealer, State.DRAFT)
        self._request = request
        self._secrets = secrets
        self._rule = rule
        self._knowledge = knowledge or Knowledge(StakeTable({}), Reputation(sealer.node_id, sealer.network))
        self._commitments = (input_commitment(request.conversation, secrets.salt), nonce_commitment(secrets.nonce))
        self._job_id = derive_job_id(sealer.node_id, *self._commitments)
        self._round: Round | None = None
        self._leg: Leg | None = None
        self._output = Output()
        self._shares: list[Share] = []
        self._excluded = set(request.avoid)
        self._begun = 0
        self._seeks_until = self._unanswered = 0
        self._is_stale = False
        self._last_decline = ""
        self._failure: AciError | None = None
        self._prompt_fault = ""
        self._proof: Envelope[Proof] | None = None
        self._receipt: Envelope[Receipt] | None = None

    @property
    def job_id(self) -> bytes:
        """32 bytes, derived from the consumer and its commitments."""
        return self._job_id

    @property
    def offer(self) -> Envelope[Offer]:
        """The signed offer, the latest if there were several; only after `Start`."""
        return self._current.offer

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer so far."""
        return tuple(self._output.tokens)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._output.text)

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

    def handle(self, event: ConsumerEvent, now: int) -> list[Effect]:  # noqa: PLR0911 - one for each event
        """React to an event at `now` (Unix ms); out of place it has no effect. `Start` may raise LocalError."""
        if self.over:
            return []
        match event:
            case Start() if self._state is State.DRAFT:
                return self._start(now)
            case QuotesAsked() if self._state is State.OFFERED:
                return self._on_asked(event, now)
            case QuoteRefused() if self._state is State.OFFERED:
                return self._on_quote_refused(event, now)
            case BidArrived(bid) if self._state is State.OFFERED:
                return self._on_bid(bid, now)
            case FrameArrived(data) if self._state in FROM_PROVIDER:
                return self._on_frame(data, now)
            case StreamEnded() if self._state in FROM_PROVIDER:
                return self._on_stream_end(event, now)
            case TimerFired() if self._state is not State.DRAFT:
                return self._on_timer(now)
            case Cancel():
                return self._cancel(now)
            case _:
                return []

    def proof_file(self) -> ProofFile:
        """The prover's part of the answer with its proof and openings; only when finished."""
        return ProofFile(
            magic=MAGIC,
            network=self._sealer.network,
            proof=self.proof.data,
            offer=self._current.offer.data,
            conversation=self._request.conversation,
            salt=self._secrets.salt,
            consumer_nonce=self._secrets.nonce,
            tokens=self.tokens,
            text=self._working.own_text,
        )

    def _identity(self) -> tuple[bytes, NodeId | None]:
        return self._request.model_root, self._leg.provider if self._leg else None

    @property
    def _current(self) -> Round:
        assert self._round is not None  # there is one since Start
        return self._round

    @property
    def _working(self) -> Leg:
        assert self._leg is not None  # there is one since the award
        return self._leg

    # Finding a provider.

    def _start(self, now: int) -> list[Effect]:
        self._round = self._new_round(now)
        self._seeks_until = now + SEEK_MS
        return [*self._advance(Trigger.OFFER, now), *self._ask(now)]

    def _new_round(self, now: int) -> Round:
        """An offer of what is left to do."""
        deadline = now + min(QUOTE_WAIT_MS + self._request.bid_window_ms, MAX_BID_WINDOW_MS)
        left = self._request.offer(self._job_id, self._commitments, deadline)
        if self._output.tokens:
            # The fee went to whose tokens came first, and what they are owed is not there any more.
            left = replace(left, max_price=self._request.max_price - self._price, priority_fee=0)
        offer = self._sealer.seal(left, now)
        return Round(offer, self._request.terms, self._rule, self._knowledge, len(self._output.tokens))

    def _ask(self, now: int) -> list[Effect]:
        """Begin a round: ask those whose prices are known."""
        self._current.ends_at = now + QUOTE_WAIT_MS
        return [AskForQuotes(self._current.offer, frozenset(self._excluded)), SetTimer(self._current.ends_at)]

    def _broadcast(self, now: int) -> list[Effect]:
        """Ask everybody."""
        self._current.awaited = None
        self._current.ends_at = min(now + self._request.bid_window_ms, self._current.offer.body.bid_deadline)
        return [Broadcast(self._current.offer), SetTimer(self._current.ends_at)]

    def _on_asked(self, asked: QuotesAsked, now: int) -> list[Effect]:
        self._current.note_busy(asked.retry_at, now)
        if self._current.awaited is None:
            return []
        self._current.awaited |= asked.providers
        return [] if asked.providers else self._broadcast(now)

    def _on_quote_refused(self, refusal: QuoteRefused, now: int) -> list[Effect]:
        # Also when it comes late, and everybody is asked already.
        self._current.note_busy(refusal.retry_at, now)
        awaited = self._current.awaited
        if not awaited or refusal.provider not in awaited:
            return []
        self._last_decline = f"{refusal.provider.short}: {printable(refusal.detail)}"
        awaited.discard(refusal.provider)
        return [] if awaited else self._choose(now)

    def _on_bid(self, bid: Envelope[Bid], now: int) -> list[Effect]:
        current = self._current
        if bid.sender in {self._sealer.node_id, *self._excluded} or (summary := current.take(bid, now)) is None:
            return []
        effects: list[Effect] = [BidSeen(summary)]
        if current.awaited is not None:
            return effects + self._on_quote(bid.sender, now)
        expected = self._request.expected_bidders - self._excluded
        if expected and expected <= current.bidders:
            effects += self._choose(now)
        return effects

    def _on_quote(self, provider: NodeId, now: int) -> list[Effect]:
        current = self._current
        assert current.awaited is not None  # the caller has looked
        current.awaited.discard(provider)
        if not current.awaited:
            return self._choose(now)
        current.ends_at = min(current.ends_at, now + QUOTE_PATIENCE_MS)
        return [SetTimer(max(current.ends_at, now + 1))]

    def _choose(self, now: int) -> list[Effect]:
        """Award the best bid that is left; else ask everybody, once, in time; else there is nobody."""
        current = self._current
        if self._unanswered >= MAX_UNANSWERED:
            return self._no_bid(now)
        bid = current.next(now, self._excluded, self._is_affordable)
        if bid is not None:
            return self._award(bid, now)
        if self._is_stale:
            # Bids from before a provider failed: there may be others by now.
            return self._begin_again(now)
        if current.awaited is not None and now < current.offer.body.bid_deadline:
            return [ReleaseQuotes(), *self._broadcast(now)]
        return self._no_bid(now)

    def _is_affordable(self, bid: Envelope[Bid]) -> bool:
        """Whether the rest of the job stays within the maximum, whatever was paid before."""
        worst = worst_price(self._current.offer.body, bid.body, accepted_tokens=len(self._output.tokens)).total
        return self._price + worst <= self._request.max_price

    def _award(self, bid: Envelope[Bid], now: int) -> list[Effect]:
        award = self._sealer.seal(Award(self._job_id, bid.digest, len(self._output.tokens)), now)
        self._leg = Leg(self._current.offer, bid, award, self._output)
        return [
            Chosen(bid.sender, self._current.rank()),
            *self._advance(Trigger.AWARD, now),
            OpenStream(bid.sender, bid.body.addresses),
            Send(award.data),
        ]

    def _no_bid(self, now: int) -> list[Effect]:
        if self._prompt_fault:
            return self._refuse_prompt(now)
        if self._failure:
            self._blame = Party.PROVIDER
            return self._end(Trigger.PROVIDER_FAILS, self._failure, now)
        error = self._current.why_nobody(self._last_decline, self._request.bid_window_ms)
        self._detail = error.message
        return self._end(Trigger.NO_BID if error.bids else Trigger.TIMEOUT, error, now)

    # What ends an attempt.

    def _on_timer(self, now: int) -> list[Effect]:
        if self._state is State.OFFERED:
            return self._choose(now)
        farewell: list[Effect] = [self._abort(AbortCode.TIMEOUT, "the provider did not act in time", now)]
        if self._state is State.AWARDED:
            self._unanswered += 1
            return self._decline("it did not answer the award in time", now, Trigger.TIMEOUT, farewell)
        return self._provider_fails("it went silent", now, farewell)

    def _on_stream_end(self, ended: StreamEnded, now: int) -> list[Effect]:
        if self._state is not State.AWARDED:
            return self._provider_fails(ended.detail, now)
        why, retry_at = (Passing.DECLINED, now + RETRY_MS) if ended.is_crowded else (Passing.FAILED, None)
        self._current.note_busy(retry_at, now)
        return self._decline(ended.detail, now, why=why)

    def _decline(
        self,
        detail: str,
        now: int,
        trigger: Trigger = Trigger.DECLINE,
        farewell: Sequence[Effect] = (),
        why: Passing = Passing.FAILED,
    ) -> list[Effect]:
        self._last_decline = f"{self._working.provider.short}: {detail}"
        self._current.pass_over(self._working.provider, why)
        if why is Passing.FAILED and self._current.awaited is not None:
            # The quotes of others have expired meanwhile; bids over gossip last.
            self._excluded.add(self._working.provider)
            self._is_stale |= now < self._seeks_until
        return [*self._advance(trigger, now), *farewell, CloseStream(), *self._choose(now)]

    def _cancel(self, now: int) -> list[Effect]:
        self._detail = "cancelled"
        abort = self._abort(AbortCode.CANCELLED, "the consumer cancelled", now)
        farewell = [abort] if self._state in FROM_PROVIDER else []
        return self._end(Trigger.CANCEL, JobCancelled("the job was cancelled"), now, farewell)

    def _refuse_prompt(self, now: int) -> list[Effect]:
        self._detail = self._prompt_fault
        return self._end(Trigger.CANCEL, PromptRefused(self._detail, hint="shorten the prompt or max_tokens"), now)

    def _end(self, trigger: Trigger, error: AciError, now: int, farewell: Sequence[Effect] = ()) -> list[Effect]:
        payments = self._close_leg(now)
        return [*self._advance(trigger, now, payments), *farewell, CloseStream(), Failed(error)]

    def _provider_fails(self, problem: str, now: int, farewell: Sequence[Effect] = ()) -> list[Effect]:
        """The provider cannot go on: another does, from what has come."""
        provider, tokens = self._working.provider, len(self._output.tokens)
        self._failure = ProviderFault(provider, problem, tokens=tokens)
        self._excluded.add(provider)
        self._begun += 1
        self._detail = problem
        if self._begun >= self._request.max_providers:
            self._blame = Party.PROVIDER
            return self._end(Trigger.PROVIDER_FAILS, self._failure, now, farewell)
        self._working.fail()
        self._current.pass_over(provider, Passing.FAILED)
        payments = self._close_leg(now)
        over = self._advance(Trigger.FAIL_OVER, now, payments)
        return [*over, *farewell, CloseStream(), FailedOver(provider, problem, tokens), *self._seek_another(now)]

    def _seek_another(self, now: int) -> list[Effect]:
        """A bid that is still firm, or a new round."""
        self._is_stale, self._seeks_until, self._unanswered = True, now + SEEK_MS, 0
        return self._choose(now) if self._current.has_more(now, self._excluded) else self._begin_again(now)

    def _begin_again(self, now: int) -> list[Effect]:
        self._is_stale, self._round = False, self._new_round(now)
        return [ReleaseQuotes(), *self._ask(now)]

    def _provider_lies(self, error: AciError, now: int, farewell: Sequence[Effect]) -> list[Effect]:
        """What it proves is not what it sent: nobody can go on from there, and nothing more is paid for it."""
        leg, self._detail, self._blame = self._working, error.message, Party.PROVIDER
        fault = ProviderFault(leg.provider, error.message, tokens=len(self._output.tokens))
        payments = (replace(leg.voucher, state=PaymentState.OWED),) if leg.voucher else ()
        return [*self._advance(Trigger.PROVIDER_FAILS, now, payments), *farewell, CloseStream(), Failed(fault)]

    def _close_leg(self, now: int) -> tuple[Payment, ...]:
        """The provider's share is what has come of it."""
        leg = self._leg
        if leg is None or self._state in (State.OFFERED, State.AWARDED) or not leg.own_tokens:
            return ()
        payment = leg.promise(self._sealer, PaymentState.OWED, now)
        self._shares.append(leg.share())
        self._price = sum(share.price for share in self._shares)
        return (payment,)

    # The answer.

    def _on_frame(self, data: bytes, now: int) -> list[Effect]:
        try:
            frame = self._read_frame(data, self._working.provider, FROM_PROVIDER[self._state], now)
            return self._on_message(frame.body, now)
        except (MessageRefused, ProofInvalid) as error:
            farewell: list[Effect] = [self._abort(AbortCode.PROTOCOL, error.message, now)]
            if self._state is State.AWARDED:
                return self._decline(error.message, now, farewell=farewell)
            if self._state is State.COMMITTED:
                return self._provider_lies(error, now, farewell)
            return self._provider_fails(error.message, now, farewell)

    def _on_message(self, body: Any, now: int) -> list[Effect]:  # noqa: ANN401 - any message class
        match body:
            case Accept():
                return self._on_accept(body, now)
            case Tokens():
                return self._on_tokens(body, now)
            case Commit():
                self._working.commit(body)
                return self._advance(Trigger.COMMIT, now)
            case Reveal():
                return self._on_reveal(body, now)
            case _:
                return self._on_abort(body, now)

    def _on_accept(self, accept: Accept, now: int) -> list[Effect]:
        leg = self._working
        leg.accept(accept)
        sealed = Input(self._job_id, seal_opening(self._opening(), accept.kem_key, leg.binding(self._sealer)))
        effects = [*self._advance(Trigger.ACCEPT, now), *self._advance(Trigger.INPUT, now)]
        return [*effects, self._send(sealed, now), ReleaseQuotes()]

    def _opening(self) -> Opening:
        return Opening(self._request.conversation, self._secrets.salt, self._secrets.nonce, self.tokens)

    def _on_tokens(self, part: Tokens, now: int) -> list[Effect]:
        leg = self._working
        leg.take(part)
        deliver = Deliver(part.tokens, part.text)
        if not leg.is_due:
            # Not stored: the state stays, and what is not paid for is worth nothing without its proof.
            _, timer = self._advance(Trigger.TOKENS, now)
            return [timer, deliver]
        payment = leg.promise(self._sealer, PaymentState.RUNNING, now)
        self._price = sum(share.price for share in self._shares) + payment.amount
        return [deliver, *self._advance(Trigger.VOUCHER, now, (payment,)), Send(payment.statement)]

    def _on_reveal(self, reveal: Reveal, now: int) -> list[Effect]:
        proof = open_envelope(reveal.proof, Proof, network=self._sealer.network, now=now)
        self._working.check_proof(proof, reveal.salt, self._secrets.nonce)
        self._proof = proof
        self._proof_bytes = encode_proof(self.proof_file())
        revealed = self._advance(Trigger.REVEAL, now)
        self._shares.append(self._working.share())
        self._price = sum(share.price for share in self._shares)
        self._receipt = self._sealer.seal(
            Receipt(
                job_id=self._job_id,
                offer_digest=self._current.offer.digest,
                proof_digest=proof.digest,
                shares=tuple(self._shares),
                price=self._price,
                rule=self._rule.name,
                bids=tuple(self._current.summaries),
                terms=self._request.terms,
                passed=tuple(self._current.passed),
            ),
            now,
        )
        self._receipt_bytes = self._receipt.data
        receipted = self._advance(Trigger.RECEIPT, now, payments_of(self._job_id, self._shares, self._receipt.data))
        recorded = self._advance(Trigger.RECORD, now)
        return [*revealed, *receipted, *recorded, CloseStream(), Finished()]

    def _on_abort(self, abort: Abort, now: int) -> list[Effect]:
        detail = printable(abort.detail) or abort.abort.name.lower().replace("_", " ")
        if self._state is State.AWARDED:
            self._current.note_busy(abort.retry_at or None, now)
            # It has not seen the prompt, so whatever ails it is no word on the job.
            return self._decline(detail, now, why=Passing.DECLINED)
        if abort.abort in _PROMPT_FAULTS and self._state is State.STREAMING and not self._working.own_tokens:
            is_second = bool(self._prompt_fault)
            self._prompt_fault = detail
            self._excluded.add(self._working.provider)
            self._begun += 1
            if is_second or self._begun >= self._request.max_providers:
                return self._refuse_prompt(now)
            # One could say so to spoil the job: a second opinion is asked.
            self._current.pass_over(self._working.provider, Passing.DECLINED)
            return [*self._advance(Trigger.FAIL_OVER, now), CloseStream(), *self._seek_another(now)]
        return self._provider_fails(detail, now)
