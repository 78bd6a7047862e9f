"""What must hold in every simulated world, whatever fails and whoever cheats.

The judge knows every message that was signed, and computes for itself what a message must look like to be believed: it
shares no checks with the nodes. It watches honest nodes alone; cheats may do to themselves what they like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NoReturn

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
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import LIMITS, TRANSITIONS, Party, State
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
    Receipt,
    Reveal,
    Tokens,
)
from aci_p2p.protocol.pricing import max_input_tokens, price, worst_price
from aci_p2p.protocol.provider import ProviderJob
from aci_p2p.protocol.terms import ANY_PROVIDER, SelectionTerms
from aci_p2p.testing.simulator.choosing import best_first
from aci_p2p.testing.simulator.driver import Driver
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.statements import Statements

RECEIPTED: Final = (State.RECEIPTED, State.PENDING, State.CHALLENGED, State.FINAL)
"""States of a job that somebody has signed for."""
_STEPS: Final = frozenset((state, target) for (state, _), target in TRANSITIONS.items())
_FORWARD: Final = (State.ACCEPTED, State.STREAMING, State.COMMITTED, State.REVEALED, State.PENDING)
"""Where a frame that is believed leads."""
_STORED_BEFORE: Final[dict[type[Any], State]] = {
    Award: State.AWARDED,
    Accept: State.ACCEPTED,
    Input: State.STREAMING,
    Tokens: State.STREAMING,
    Commit: State.COMMITTED,
    Reveal: State.REVEALED,
    Receipt: State.RECEIPTED,
}
"""What is on its sender's disk when a message is sent."""


class Invariant(StrEnum):
    """What must hold."""

    TRUE_WORDS = "only true words count"
    """Nobody believes, and no honest node says, what nobody has signed."""
    FRESH = "nothing expired counts"
    """Nobody believes what has expired."""
    OWN_JOBS = "a job belongs to who offers it"
    """A job's id is derived from who offers it."""
    BIDS_ANSWER = "bids answer the offer"
    """Bids that are weighed are for this offer, and cost what they say."""
    OWN_PARTIES = "a job heeds its own parties"
    """A job moves on the word of its two parties alone."""
    COMMITTED = "answers open their commitments"
    """An answer is the one that was committed to."""
    AS_OFFERED = "prompts are what was offered"
    """A prompt is the one that was committed to."""
    STORED_FIRST = "stored before it is said"
    """A transition is on disk before anything is said of it."""
    FIRM_BIDS = "only firm bids are awarded"
    """A bid is awarded while it is firm, and once."""
    BEST_WINS = "the best bid wins"
    """The best of the bids that are left is awarded."""
    TABLE = "states follow the table"
    """Jobs move as the table of transitions says; none is won twice."""
    ONE_RESULT = "one result for a job"
    """At most one provider is paid for a job."""
    RECEIPTS = "no money without a receipt"
    """Who counts money has a receipt for it."""
    PRICES = "prices are as bid"
    """A job costs what was bid for it."""
    REPLAYS = "receipts replay to their winner"
    """What a receipt says of the choice leads to the provider that it names."""
    LIMITS = "nobody pays for more than was asked"
    """No more tokens are paid for than were asked for, and no more than the most."""
    MONEY = "money is conserved"
    """Both sides of a job agree on what was paid."""
    BOUNDED = "queues are bounded"
    """Queues stay within their limits, and jobs within the slots."""
    TIMELY = "states time out"
    """No job stays in a state for longer than that may last."""
    ENDS = "every job ends"
    """Once the world is calm, no job is left open."""
    RECOVERS = "the market recovers"
    """Once the world is calm, everybody is answered."""


class InvariantBroken(AssertionError):
    """Something happened that must never happen."""

    def __init__(self, invariant: Invariant, detail: str) -> None:
        """`detail`: what broke it."""
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        """Which one."""


def fail(invariant: Invariant, detail: str) -> NoReturn:
    """Raise InvariantBroken."""
    raise InvariantBroken(invariant, detail)


def require(condition: object, invariant: Invariant, detail: str) -> None:
    """Raise InvariantBroken unless something holds."""
    if not condition:
        fail(invariant, detail)


@dataclass(slots=True)
class _Account:
    """What both sides of a job have on their disks, once it is signed for."""

    consumer: JobRecord | None = None
    providers: dict[int, JobRecord] = field(default_factory=dict[int, JobRecord])
    signers: dict[bytes, NodeId] = field(default_factory=dict[bytes, NodeId])
    """Receipts that were checked, and who signed them."""


@dataclass(slots=True)
class _Choice:
    """A consumer's choice among bids."""

    weighed: dict[bytes, BidSummary] = field(default_factory=dict[bytes, BidSummary])
    """Bids by their digests."""
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
        self._accounts: dict[bytes, _Account] = {}
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
        signed, offer = self._statements.get(bid.bid_digest, Bid), self._statements.offer(job_id)
        holds = (
            signed is not None
            and offer is not None
            and (signed.sender, signed.body.job_id, signed.body.offer_digest) == (bid.provider, job_id, offer.digest)
            and (bid.worst_price, bid.latency_ms)
            == (worst_price(offer.body, signed.body).total, signed.body.latency_ms)
        )
        require(holds, Invariant.BIDS_ANSWER, f"node {node.index} weighs a bid for something else")
        self._choices[job_id].weighed[bid.bid_digest] = bid

    def wanted(self, job_id: bytes, terms: SelectionTerms) -> None:
        """A consumer begins a job, and holds its providers to some terms."""
        self._choices[job_id].terms = terms

    def moved(self, driver: Driver, before: State, frame: bytes) -> None:
        """A frame was handled by a job's machine, which was in a state before."""
        node, machine = driver.node, driver.machine
        after = machine.state
        if not node.honest or after not in _FORWARD or (after is before and before is not State.STREAMING):
            return
        if after is before and machine.role is Party.PROVIDER:
            # Whatever it was, it had no effect: a provider that streams heeds nothing but an abort.
            return
        envelope = self._believed(node, frame)
        peer, job_id = self._peer(driver), machine.job_id
        own = envelope.sender == peer and envelope.body.job_id == job_id
        require(own, Invariant.OWN_PARTIES, f"{driver} of node {node.index} heeds another")
        match envelope.body:
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
        choice = self._choices[job_id]
        return choice.weighed[choice.awarded[-1]].provider if choice.awarded else None

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
        require(holds, Invariant.AS_OFFERED, f"{driver} of node {driver.node.index}")

    # What a node says.

    def published(self, node: SimNode, offer: Envelope[Offer]) -> None:
        """A consumer broadcasts an offer."""
        if node.honest:
            self._after_storing(node, Party.CONSUMER, offer.body.job_id, State.OFFERED)

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
        offer = self._statements.offer(award.job_id)
        assert offer is not None  # its bids were compared with it
        left = {bid.provider for bid in firm.values()}
        order = best_first(choice.weighed.values(), choice.terms, offer.digest)
        best = next(bid for bid in order if bid.provider in left)
        require(chosen is best, Invariant.BEST_WINS, name)
        choice.awarded.append(award.bid_digest)

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
        if (before, record.state) not in _STEPS:
            name = record.job_id.hex()[:8]
            msg = f"job {name} of node {node.index} went from {before.value} to {record.state.value}"
            fail(Invariant.TABLE, msg)
        self._last[key] = record
        if record.state in RECEIPTED:
            self._settle(node, record)

    def _settle(self, node: SimNode, record: JobRecord) -> None:
        account = self._accounts.setdefault(record.job_id, _Account())
        if record.role is Party.CONSUMER:
            account.consumer = record
        else:
            account.providers[node.index] = record
        name = f"job {record.job_id.hex()[:8]}"
        require(len(account.providers) <= 1, Invariant.ONE_RESULT, f"several providers were paid for {name}")
        signer = account.signers.get(record.receipt)
        if signer is None:
            signer = account.signers[record.receipt] = self._check_receipt(record, name)
        for provider in account.providers.values():
            paid = account.consumer
            if paid is None and not self._honest(signer):
                continue
            agreed = paid is not None and (paid.receipt, paid.price) == (provider.receipt, provider.price)
            require(agreed, Invariant.MONEY, f"the two sides of {name} disagree")

    def _check_receipt(self, record: JobRecord, name: str) -> NodeId:
        """Compute what a job costs from what was signed about it; who signed for it."""
        receipt = self._statements.read(record.receipt)
        if receipt is None or not isinstance(receipt.body, Receipt):
            fail(Invariant.RECEIPTS, f"{name} has none")
        body = receipt.body
        proof = self._statements.get(body.proof_digest, Proof)
        bid = self._statements.get(proof.body.bid_digest, Bid) if proof else None
        offer = self._statements.offer(record.job_id)
        if proof is None or bid is None or offer is None or body.job_id != record.job_id:
            fail(Invariant.RECEIPTS, f"{name}: its receipt is for something else")
        used = {"input_tokens": proof.body.input_tokens, "output_tokens": proof.body.output_tokens}
        charges = price(offer.body, bid.body, **used)
        owed = charges.total
        require(body.charges == charges, Invariant.PRICES, f"{name}: other items")
        require(body.price == record.price == owed, Invariant.PRICES, f"{name}: {body.price} for {owed}")
        within = used["output_tokens"] <= offer.body.max_tokens and used["input_tokens"] <= max_input_tokens(offer.body)
        require(within and owed <= offer.body.max_price, Invariant.LIMITS, name)
        if self._honest(receipt.sender):
            out = {passed.provider for passed in body.passed}
            order = best_first(body.bids, body.terms, offer.digest)
            best = next((weighed.provider for weighed in order if weighed.provider not in out), None)
            require(best == body.provider, Invariant.REPLAYS, name)
        return receipt.sender

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

    # What came of it.

    def income(self) -> dict[int, int]:
        """What each honest provider has receipts for, base units, by node."""
        totals: dict[int, int] = {}
        for account in self._accounts.values():
            for index, record in account.providers.items():
                totals[index] = totals.get(index, 0) + record.price
        return totals

    def paid_to(self) -> dict[NodeId, int]:
        """What honest consumers have signed for, base units, by whom they paid."""
        totals: dict[NodeId, int] = {}
        for account in self._accounts.values():
            if account.consumer and account.consumer.peer:
                totals[account.consumer.peer] = totals.get(account.consumer.peer, 0) + account.consumer.price
        return totals

    def spending(self) -> int:
        """What honest consumers have signed for, base units."""
        return sum(self.paid_to().values())
