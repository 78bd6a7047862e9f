"""What must hold in every simulated world, whatever fails and whoever cheats.

The judge knows every message that was signed, and computes for itself what a message must look like to be believed: it
shares no checks with the nodes. It watches honest nodes alone; cheats may do to themselves what they like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from aci_p2p.protocol.bidding import MAX_OUTSTANDING
from aci_p2p.protocol.commitments import (
    derive_job_id,
    input_bytes,
    input_commitment,
    nonce_commitment,
    output_commitment,
    output_root,
)
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment
from aci_p2p.protocol.lifecycle import FINAL_STATES, LIMITS, TRANSITIONS, Party, State
from aci_p2p.protocol.market import MAX_OFFERS
from aci_p2p.protocol.messages import (
    Accept,
    Award,
    Bid,
    BidSummary,
    Commit,
    Input,
    Offer,
    Opening,
    Proof,
    Reveal,
    Tokens,
    Voucher,
)
from aci_p2p.protocol.pricing import worst_price
from aci_p2p.protocol.provider import ProviderJob
from aci_p2p.protocol.terms import ANY_PROVIDER, SelectionTerms
from aci_p2p.testing.simulator.accounts import RECEIPTED, Accounts
from aci_p2p.testing.simulator.choosing import best_first
from aci_p2p.testing.simulator.driver import Driver
from aci_p2p.testing.simulator.invariant import Invariant, fail, require
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.statements import Statements

_STEPS: Final = frozenset((state, target) for (state, _), target in TRANSITIONS.items())
_FORWARD: Final = (
    State.ACCEPTED,
    State.STREAMING,
    State.UNPAID,
    State.COMMITTED,
    State.REVEALED,
    State.PENDING,
)
"""Where a frame that is believed leads."""
_RESTING: Final = (State.STREAMING, State.UNPAID)
"""States in which a job stays while it believes frames."""
_STORED_BEFORE: Final[dict[type[Any], State]] = {
    Award: State.AWARDED,
    Accept: State.ACCEPTED,
    Input: State.STREAMING,
    Tokens: State.STREAMING,
    Voucher: State.STREAMING,
    Commit: State.COMMITTED,
    Reveal: State.REVEALED,
}
"""What is on its sender's disk when a message is sent."""


@dataclass(slots=True)
class _Choice:
    """A consumer's choice among bids."""

    offer: Envelope[Offer] | None = None
    """The last offer."""
    weighed: dict[bytes, BidSummary] = field(default_factory=dict[bytes, BidSummary])
    """Bids for it by their digests."""
    offered_tokens: int = 0
    """Tokens of the answer that were there when it was made."""
    tokens: list[int] = field(default_factory=list[int])
    """The answer so far."""
    awarded: list[bytes] = field(default_factory=list[bytes])
    """Digests of those that were awarded, in order."""
    commitment: bytes = b""
    """What the provider has committed to."""
    terms: SelectionTerms = ANY_PROVIDER
    """What the consumer asks of its provider."""


class Judge:
    """Watches what honest nodes believe, say and store. Raises InvariantBroken at the first breach."""

    def __init__(self, honest: Callable[[NodeId], bool]) -> None:
        """`honest`: whether an identity belongs to an honest node."""
        self._honest = honest
        self._statements = Statements()
        self._last: dict[tuple[int, bytes, Party], JobRecord] = {}
        self.accounts = Accounts(self._statements, honest)
        """What is promised and paid."""
        self._choices: defaultdict[bytes, _Choice] = defaultdict(_Choice)
        self.checks = 0
        """How often something was checked."""

    def signed(self, envelope: Envelope[Any]) -> None:
        """A node has signed a message."""
        self._statements.add(envelope)

    # What a node believes.

    def heard(self, node: SimNode, envelope: Envelope[Any]) -> None:
        """A node believes what came over gossip or out of the DHT."""
        if not node.honest:
            return
        self._believed(node, envelope.data)
        if isinstance(envelope.body, Offer):
            body = envelope.body
            own = derive_job_id(envelope.sender, body.input_commitment, body.nonce_commitment)
            require(body.job_id == own, Invariant.OWN_JOBS, f"node {node.index} believes a stolen offer")

    def _believed(self, node: SimNode, data: bytes) -> Envelope[Any]:
        self.checks += 1
        envelope = self._statements.read(data)
        if envelope is None:
            fail(Invariant.TRUE_WORDS, f"node {node.index} believes what nobody has signed")
        require(envelope.header.expires_at > node.clock, Invariant.FRESH, f"node {node.index} believes it")
        return envelope

    def weighed(self, node: SimNode, job_id: bytes, bid: BidSummary) -> None:
        """A consumer takes a bid into its choice."""
        if not node.honest:
            return
        self.checks += 1
        choice = self._choices[job_id]
        signed, offer = self._statements.get(bid.bid_digest, Bid), choice.offer
        holds = (
            signed is not None
            and offer is not None
            and (signed.sender, signed.body.job_id, signed.body.offer_digest) == (bid.provider, job_id, offer.digest)
            and (bid.worst_price, bid.latency_ms)
            == (
                worst_price(offer.body, signed.body, accepted_tokens=choice.offered_tokens).total,
                signed.body.latency_ms,
            )
        )
        require(holds, Invariant.BIDS_ANSWER, f"node {node.index} weighs a bid for something else")
        choice.weighed[bid.bid_digest] = bid

    def wanted(self, job_id: bytes, terms: SelectionTerms) -> None:
        """A consumer begins a job, and holds its providers to some terms."""
        self._choices[job_id].terms = terms

    def moved(self, driver: Driver, before: State, frame: bytes) -> None:
        """A frame was handled by a job's machine, which was in a state before."""
        node, machine = driver.node, driver.machine
        after = machine.state
        if not node.honest or after not in _FORWARD or (after is before and before not in _RESTING):
            return
        envelope = self._believed(node, frame)
        peer, job_id = self._peer(driver), machine.job_id
        own = envelope.sender == peer and envelope.body.job_id == job_id
        require(own, Invariant.OWN_PARTIES, f"{driver} of node {node.index} heeds another")
        match envelope.body:
            case Tokens(_, _, tokens):
                choice = self._choices[job_id]
                choice.tokens += tokens
                self.accounts.came(job_id, choice.awarded[-1], len(tokens))
            case Commit(_, commitment):
                self._choices[job_id].commitment = commitment
            case Reveal():
                self._opened(driver, envelope.body, peer)
            case Input():
                assert isinstance(machine, ProviderJob)  # a consumer takes none
                self._as_offered(driver, machine.opening)
            case _:
                pass

    def _peer(self, driver: Driver) -> NodeId | None:
        job_id = driver.machine.job_id
        if driver.machine.role is Party.PROVIDER:
            offer = self._statements.offer(job_id)
            return offer.sender if offer else None
        awarded = self._choices[job_id].awarded
        bid = self._statements.get(awarded[-1], Bid) if awarded else None
        return bid.sender if bid else None

    def _opened(self, driver: Driver, reveal: Reveal, provider: NodeId | None) -> None:
        job_id = driver.machine.job_id
        proof = self._statements.read(reveal.proof)
        assert provider is not None  # its frame was compared with it
        holds = (
            proof is not None
            and isinstance(proof.body, Proof)
            and proof.sender == provider
            and output_commitment(
                job_id, provider, output_root(proof.body.tokens_hash, proof.body.text_hash), reveal.salt
            )
            == self._choices[job_id].commitment
        )
        require(holds, Invariant.COMMITTED, f"{driver} of node {driver.node.index}")

    def _as_offered(self, driver: Driver, opening: Opening) -> None:
        offer = self._statements.offer(driver.machine.job_id)
        holds = offer is not None and (
            input_commitment(opening.conversation, opening.salt) == offer.body.input_commitment
            and nonce_commitment(opening.consumer_nonce) == offer.body.nonce_commitment
            and input_bytes(opening.conversation) == offer.body.input_bytes
        )
        if offer and self._honest(offer.sender):
            holds = holds and list(opening.accepted) == self._choices[offer.body.job_id].tokens
        require(holds, Invariant.AS_OFFERED, f"{driver} of node {driver.node.index}")

    # What a node says.

    def published(self, node: SimNode, offer: Envelope[Offer]) -> None:
        """A consumer shows an offer to somebody, or to everybody."""
        if not node.honest:
            return
        self._after_storing(node, Party.CONSUMER, offer.body.job_id, State.OFFERED)
        choice = self._choices[offer.body.job_id]
        if choice.offer is not offer:
            choice.offer, choice.offered_tokens = offer, len(choice.tokens)
            choice.weighed.clear()

    def sent(self, driver: Driver, frame: bytes) -> None:
        """A job's frame is sent."""
        node, machine = driver.node, driver.machine
        if not node.honest:
            return
        envelope = self._statements.read(frame)
        if envelope is None:
            fail(Invariant.TRUE_WORDS, f"node {node.index} sends what nobody has signed")
        state = next((state for kind, state in _STORED_BEFORE.items() if isinstance(envelope.body, kind)), None)
        if state is not None:
            self._after_storing(node, machine.role, machine.job_id, state)
        if isinstance(envelope.body, Award):
            self._awarded(node, envelope.body, envelope.header.issued_at)
        elif isinstance(envelope.body, Tokens):
            self.accounts.sent(node, envelope.body)

    def _after_storing(self, node: SimNode, role: Party, job_id: bytes, state: State) -> None:
        self.checks += 1
        last = self._last.get((node.index, job_id, role))
        if last is None or last.state is not state:
            stored = last.state.value if last else "nothing"
            msg = f"node {node.index} says that job {job_id.hex()[:8]} is {state.value}, its disk says {stored}"
            fail(Invariant.STORED_FIRST, msg)

    def _awarded(self, node: SimNode, award: Award, now: int) -> None:
        choice, name = self._choices[award.job_id], f"job {award.job_id.hex()[:8]} of node {node.index}"
        firm: dict[bytes, BidSummary] = {}
        for digest, bid in choice.weighed.items():
            signed = self._statements.get(digest, Bid)
            if digest not in choice.awarded and signed is not None and signed.header.expires_at > now:
                firm[digest] = bid
        chosen = firm.get(award.bid_digest)
        if chosen is None:
            fail(Invariant.FIRM_BIDS, f"{name}: a bid that expired, or was awarded before")
        assert choice.offer is not None  # its bids were compared with it
        left = {bid.provider for bid in firm.values() if self._is_affordable(choice, bid)}
        order = best_first(choice.weighed.values(), choice.terms, choice.offer)
        best = next((bid for bid in order if bid.provider in left), None)
        require(chosen is best, Invariant.BEST_WINS, name)
        require(award.accepted_tokens == len(choice.tokens), Invariant.AS_OFFERED, f"{name}: other tokens were there")
        choice.awarded.append(award.bid_digest)
        self.accounts.awarded(award.job_id, award.bid_digest, award.accepted_tokens)

    def _is_affordable(self, choice: _Choice, bid: BidSummary) -> bool:
        """Whether what is left of the job costs no more than what is left of its money."""
        assert choice.offer is not None  # there are bids for it
        job_id, signed = choice.offer.body.job_id, self._statements.get(bid.bid_digest, Bid)
        first = self._statements.offer(job_id)
        assert first is not None  # both were seen before
        assert signed is not None
        worst = worst_price(choice.offer.body, signed.body, accepted_tokens=len(choice.tokens)).total
        return sum(self.accounts.promised_for(job_id).values()) + worst <= first.body.max_price

    # What a node stores.

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """A node has stored a transition."""
        if not node.honest:
            return
        self.checks += 1
        key = (node.index, record.job_id, record.role)
        last = self._last.get(key)
        # A consumer's record begins as OFFERED, a provider's as AWARDED.
        before = last.state if last else State.DRAFT if record.role is Party.CONSUMER else State.OFFERED
        if (
            record.role is Party.PROVIDER
            and before in FINAL_STATES
            and not self.accounts.has_worked(node, record.job_id)
        ):
            # It lost the job before it had the prompt, and may win it again in another round.
            before = State.OFFERED
        if last is not None and (last.state, last.updated_at) == (record.state, record.updated_at):
            # What is paid for a job that has ended is no transition.
            self._last[key] = record
            return
        if (before, record.state) not in _STEPS:
            name = record.job_id.hex()[:8]
            msg = f"job {name} of node {node.index} went from {before.value} to {record.state.value}"
            fail(Invariant.TABLE, msg)
        self._last[key] = record
        if record.state in RECEIPTED:
            self.accounts.receipted(node, record)

    def promised(self, node: SimNode, payment: Payment) -> None:
        """A node has stored what it pays, or is paid."""
        if node.honest:
            self.checks += 1
            self.accounts.promised(node, payment)

    def answered(self, node: SimNode, job_id: bytes, text: str, expected: str) -> None:
        """A consumer has an answer; `expected` is the true model's."""
        if not node.honest:
            return
        self.checks += 1
        honest = all(self._honest(provider) for provider in self.accounts.promised_for(job_id))
        name = f"job {job_id.hex()[:8]}"
        require(text == expected or not honest, Invariant.ANSWERS, f"{name}: {text!r} for {expected!r}")

    # How much a node holds, and for how long.

    def timely(self, driver: Driver) -> None:
        """A job stays in no state for longer than that may last."""
        self.checks += 1
        age, limit = driver.node.world.now - driver.renewed_at, LIMITS[driver.machine.state].timeout_ms
        msg = f"{driver} of node {driver.node.index} stays so for {age} ms, {limit} at most"
        require(age <= limit or not driver.node.honest, Invariant.TIMELY, msg)

    def bounded(self, node: SimNode, *, outstanding: int, running: int, slots: int) -> None:
        """The queues of a node stay within their limits."""
        self.checks += 1
        if outstanding > MAX_OUTSTANDING or running > slots or len(node.view) > MAX_OFFERS:
            msg = f"node {node.index}: {outstanding} bids, {running} of {slots} slots, {len(node.view)} offers"
            fail(Invariant.BOUNDED, msg)
