"""One provider's part of a job, as the consumer sees it: what it was awarded, what has come, what it is owed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from aci_p2p.protocol.commitments import derive_seed, output_commitment, output_root, text_digest, tokens_digest
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Payment, PaymentState
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Accept, Award, Bid, Commit, Finish, Kind, Offer, Proof, Share, Tokens, Voucher
from aci_p2p.protocol.pricing import max_input_tokens, share_of
from aci_p2p.protocol.proof import MAX_ANSWER_BYTES, check_offer_match
from aci_p2p.protocol.sealing import Binding
from aci_p2p.protocol.validation import Decision, Reason, require

VOUCHER_TOKENS: Final = 32
"""Output tokens that a provider produces unpaid: what either side risks, beside the reading of the prompt."""
VOUCHER_STEP: Final = 16
"""Output tokens after which a consumer sends a voucher: half of VOUCHER_TOKENS, so that the provider need not stop
while one is on its way."""
FROM_PROVIDER: Final[dict[State, tuple[Kind, ...]]] = {
    State.AWARDED: (Kind.ACCEPT, Kind.ABORT),
    State.STREAMING: (Kind.TOKENS, Kind.COMMIT, Kind.ABORT),
    State.COMMITTED: (Kind.REVEAL, Kind.ABORT),
}
"""What a provider may send in each state in which the consumer waits for it on the stream."""


class Output:
    """The answer so far, of all providers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        """Token ids."""
        self.text: list[str] = []
        """Their text, in parts."""
        self.text_bytes = 0
        """UTF-8 bytes of the text."""


class Leg:
    """What one provider has done for a job since its award."""

    def __init__(self, offer: Envelope[Offer], bid: Envelope[Bid], award: Envelope[Award], output: Output) -> None:
        """It goes on behind what is in `output`, and adds to it."""
        self.bid = bid
        """Under which it works."""
        self.first_token = len(output.tokens)
        """Where its own tokens begin."""
        self.voucher: Payment | None = None
        """The last promise to pay for them."""
        self.provider_nonce = b""
        """Its part of the seed."""
        self.commitment = b""
        """To its output."""
        self._offer = offer
        self._award = award
        self._output = output
        self._first_part = len(output.text)
        self._input_tokens: int = 0
        self._vouched = 0
        self._flushed = False

    @property
    def provider(self) -> NodeId:
        """Who it is."""
        return self.bid.sender

    @property
    def own_tokens(self) -> int:
        """Output tokens that have come of it."""
        return len(self._output.tokens) - self.first_token

    @property
    def own_text(self) -> str:
        """Their text."""
        return "".join(self._output.text[self._first_part :])

    @property
    def is_due(self) -> bool:
        """Whether a voucher should be sent."""
        return self.own_tokens - self._vouched >= VOUCHER_STEP

    def binding(self, sealer: Sealer) -> Binding:
        """What the prompt is sealed for."""
        return Binding(sealer.network, self._offer.body.job_id, sealer.node_id, self.provider, self._award.digest)

    def accept(self, accept: Accept) -> None:
        """The provider binds itself. Raises MessageRefused."""
        # Accepts our award, not one of an earlier attempt.
        require(accept.award_digest == self._award.digest, Decision.REJECT, Reason.WRONG_JOB)
        self.provider_nonce = accept.provider_nonce

    def take(self, part: Tokens) -> None:
        """The next part of the answer. Raises MessageRefused."""
        output = self._output
        # Continues where the last part ended.
        require(part.index == len(output.tokens), Decision.REJECT, Reason.OUT_OF_ORDER)
        # Carries tokens; text alone comes once, at the end, or a drip of it would hold the job for ever.
        require(bool(part.tokens or part.text) and not self._flushed, Decision.REJECT, Reason.MALFORMED)
        # Counts the prompt once and for all, and no more tokens than it can have.
        same = part.input_tokens == self._input_tokens or not self._input_tokens
        possible = 0 < part.input_tokens <= max_input_tokens(self._offer.body)
        require(same and possible, Decision.REJECT, Reason.BAD_COMMITMENT)
        # No more than was asked for.
        total = len(output.tokens) + len(part.tokens)
        require(total <= self._offer.body.max_tokens, Decision.REJECT, Reason.TOO_MANY_TOKENS)
        size = output.text_bytes + len(part.text.encode())
        # No more text than a proof file holds.
        require(size <= MAX_ANSWER_BYTES, Decision.REJECT, Reason.TOO_LARGE)
        self._input_tokens = part.input_tokens
        self._flushed = not part.tokens
        output.tokens += part.tokens
        output.text.append(part.text)
        output.text_bytes = size

    def commit(self, commit: Commit) -> None:
        """The provider fixes its output."""
        self.commitment = commit.commitment

    def share(self) -> Share:
        """What it is owed for what has come."""
        return share_of(
            self._offer.body,
            self.bid,
            input_tokens=self._input_tokens,
            first_token=self.first_token,
            output_tokens=self.own_tokens,
        )

    def promise(self, sealer: Sealer, state: PaymentState, now: int) -> Payment:
        """Sign for what has come so far."""
        share = self.share()
        self._vouched = self.own_tokens
        statement = sealer.seal(Voucher(self._offer.body.job_id, share), now).data
        self.voucher = Payment(self._offer.body.job_id, Party.CONSUMER, self.provider, share.price, statement, state)
        return self.voucher

    def fail(self) -> None:
        """It has failed: text that closed its answer is taken back, for whoever goes on gives it anew."""
        if self._flushed:
            self._output.text_bytes -= len(self._output.text.pop().encode())

    def check_proof(self, proof: Envelope[Proof], salt: bytes, consumer_nonce: bytes) -> None:
        """Check a proof against everything we saw. Raises MessageRefused, ProofInvalid."""
        body, job_id, tokens = proof.body, self._offer.body.job_id, self._output.tokens
        # The provider's own statement.
        require(proof.sender == self.provider, Decision.REJECT, Reason.WRONG_SENDER)
        check_offer_match(body, self._offer)
        # Given under the bid that won.
        require(body.bid_digest == self.bid.digest, Decision.REJECT, Reason.WRONG_JOB)
        seed = derive_seed(consumer_nonce, self.provider_nonce, job_id)
        # Sampled with the seed that both sides fixed.
        nonces_hold = body.provider_nonce == self.provider_nonce and body.seed == seed
        require(nonces_hold, Decision.REJECT, Reason.BAD_COMMITMENT)
        # About the tokens and the text that we were sent.
        tokens_hold = body.tokens_hash == tokens_digest(job_id, tokens)
        require(tokens_hold and body.output_tokens == len(tokens), Decision.REJECT, Reason.BAD_COMMITMENT)
        require(body.text_hash == text_digest(job_id, self.own_text), Decision.REJECT, Reason.BAD_COMMITMENT)
        # Claims what is its own: what it was given is not, and the prompt has the tokens that it always had.
        counted = self._input_tokens in (0, body.input_tokens) and body.first_token == self.first_token
        require(counted, Decision.REJECT, Reason.BAD_COMMITMENT)
        # An answer, and one that ended for the stated reason.
        cut = body.finish is Finish.LENGTH
        ended = body.output_tokens == self._offer.body.max_tokens if cut else body.output_tokens > 0
        require(ended, Decision.REJECT, Reason.BAD_COMMITMENT)
        # Opens the commitment made before.
        root = output_root(body.tokens_hash, body.text_hash)
        opened = output_commitment(job_id, self.provider, root, salt) == self.commitment
        require(opened, Decision.REJECT, Reason.BAD_COMMITMENT)
        self._input_tokens = body.input_tokens


def payments_of(job_id: bytes, shares: Iterable[Share], statement: bytes) -> tuple[Payment, ...]:
    """What each provider of a job is owed under the receipt `statement`."""
    owed = PaymentState.OWED
    return tuple(Payment(job_id, Party.CONSUMER, share.provider, share.price, statement, owed) for share in shares)
