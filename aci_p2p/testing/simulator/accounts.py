"""What is promised and paid in a simulated world, as the judge computes it from what was signed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from aci_p2p.protocol.envelope import MAX_SKEW_MS, Envelope, header_of
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment, PaymentState
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Bid, Offer, Proof, Receipt, Share, Tokens, Voucher
from aci_p2p.protocol.pricing import max_input_tokens, price
from aci_p2p.testing.simulator.choosing import best_first
from aci_p2p.testing.simulator.invariant import Invariant, fail, require
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.statements import Statements

RECEIPTED: Final = (State.RECEIPTED, State.PENDING, State.CHALLENGED, State.FINAL)
"""States of a job that its consumer has signed for."""
MOST_UNPAID: Final = 32
"""Tokens that a provider sends unpaid, as specified; the part that reaches this number is sent whole."""


@dataclass(slots=True)
class _Leg:
    """What has come of one award."""

    first_token: int
    """Tokens that were there before."""
    tokens: int = 0
    """Its own."""


@dataclass(slots=True)
class _Account:
    """One job's money."""

    promised: dict[NodeId, Payment] = field(default_factory=dict[NodeId, Payment])
    """On the disk of an honest consumer, by provider."""
    held: dict[NodeId, Payment] = field(default_factory=dict[NodeId, Payment])
    """On the disks of honest providers."""
    legs: dict[bytes, _Leg] = field(default_factory=dict[bytes, _Leg])
    """What has come to an honest consumer, by the digest of the bid."""
    receipted: JobRecord | None = None
    """The honest consumer's record, once it has signed a receipt."""
    proved: set[NodeId] = field(default_factory=set[NodeId])
    """Honest providers that hold a receipt for their proof."""


class Accounts:
    """Who has promised what to whom, and who holds it. Raises InvariantBroken at the first breach."""

    def __init__(self, statements: Statements, honest: Callable[[NodeId], bool]) -> None:
        """`honest`: whether an identity belongs to an honest node."""
        self._statements = statements
        self._honest = honest
        self._jobs: defaultdict[bytes, _Account] = defaultdict(_Account)
        self._sent: Counter[tuple[NodeId, bytes]] = Counter()
        self._paid: dict[tuple[NodeId, bytes], int] = {}

    # What is worked, as honest nodes see it.

    def awarded(self, job_id: bytes, bid_digest: bytes, first_token: int) -> None:
        """A consumer has given the job to a bid, behind so many tokens."""
        self._jobs[job_id].legs[bid_digest] = _Leg(first_token)

    def came(self, job_id: bytes, bid_digest: bytes, tokens: int) -> None:
        """A consumer has accepted tokens of a provider."""
        self._jobs[job_id].legs[bid_digest].tokens += tokens

    def has_worked(self, node: SimNode, job_id: bytes) -> bool:
        """Whether a provider has sent anything of an answer."""
        return self._sent.get((node.node_id, job_id), 0) > 0

    def sent(self, node: SimNode, part: Tokens) -> None:
        """A provider sends a part of an answer."""
        key = node.node_id, part.job_id
        unpaid = self._sent[key] - self._paid.get(key, 0)
        require(unpaid < MOST_UNPAID, Invariant.UNPAID, f"node {node.index} sends behind {unpaid} unpaid tokens")
        self._sent[key] += len(part.tokens)

    # What is on disks.

    def promised(self, node: SimNode, payment: Payment) -> None:
        """A payment is on the disk of an honest node."""
        account, name = self._jobs[payment.job_id], f"job {payment.job_id.hex()[:8]} of node {node.index}"
        is_consumer = payment.role is Party.CONSUMER
        consumer, provider = (node.node_id, payment.peer) if is_consumer else (payment.peer, node.node_id)
        offer = self._statements.offer(payment.job_id)
        own = offer is not None and offer.sender == consumer
        require(own, Invariant.OWN_PARTIES, f"{name}: it is the job of another")
        share = self._share(payment, consumer, provider, name)
        if is_consumer:
            self._owes(account, payment, share, name)
            return
        key = provider, payment.job_id
        self._paid[key] = max(self._paid.get(key, 0), share.output_tokens)
        account.held[provider] = payment
        promise = account.promised.get(provider)
        covered = not self._honest(consumer) or (promise is not None and promise.amount >= payment.amount)
        require(covered, Invariant.MONEY, f"{name}: it holds what nobody has promised")

    def _owes(self, account: _Account, payment: Payment, share: Share, name: str) -> None:
        known = account.promised.get(payment.peer)
        account.promised[payment.peer] = payment
        require(known is None or known.amount <= payment.amount, Invariant.MONEY, f"{name} takes a promise back")
        leg = account.legs.get(share.bid_digest)
        own = leg is not None and share.first_token == leg.first_token and share.output_tokens <= leg.tokens
        require(own, Invariant.LIMITS, f"{name}: more is paid for than came")
        offer, total = self._statements.offer(payment.job_id), sum(one.amount for one in account.promised.values())
        require(offer is not None and total <= offer.body.max_price, Invariant.LIMITS, f"{name}: {total} is too much")
        if payment.state is PaymentState.SETTLED and self._honest(payment.peer):
            held = account.held.get(payment.peer)
            agreed = held is not None and held.amount == payment.amount
            require(agreed, Invariant.MONEY, f"{name}: its provider does not hold what is settled")

    def _share(self, payment: Payment, consumer: NodeId, provider: NodeId, name: str) -> Share:
        """What was signed for a payment: the provider's part, at the prices of its bid."""
        statement = self._statements.read(payment.statement)
        if statement is None or not isinstance(statement.body, Voucher | Receipt):
            fail(Invariant.RECEIPTS, f"{name}: nobody has promised it")
        body = statement.body
        shares = (body.share,) if isinstance(body, Voucher) else body.shares
        own = [share for share in shares if share.provider == provider]
        require(statement.sender == consumer, Invariant.OWN_PARTIES, f"{name}: another has promised it")
        right = len(own) == 1 and body.job_id == payment.job_id and own[0].price == payment.amount
        require(right, Invariant.RECEIPTS, f"{name}: what was promised is something else")
        if self._honest(consumer):
            # Who cheats may promise anything, and more than is due is no harm to whom it is promised.
            self._priced(own[0], name)
        return own[0]

    def _priced(self, share: Share, name: str) -> Envelope[Offer]:
        """The offer of the bid under which a share was worked, at whose prices it must be."""
        bid = self._statements.get(share.bid_digest, Bid)
        offer = self._statements.get(bid.body.offer_digest, Offer) if bid else None
        if bid is None or offer is None or bid.sender != share.provider:
            fail(Invariant.PRICES, f"{name}: there is no such bid")
        read = share.input_tokens + share.first_token
        charges = price(offer.body, bid.body, input_tokens=read, output_tokens=share.output_tokens)
        require(share.charges == charges, Invariant.PRICES, f"{name}: {share.price} for {charges.total}")
        within = (
            share.first_token + share.output_tokens <= offer.body.max_tokens
            and share.input_tokens <= max_input_tokens(offer.body)
        )
        require(within, Invariant.LIMITS, name)
        return offer

    def receipted(self, node: SimNode, record: JobRecord) -> None:
        """An honest node has a job that is signed for."""
        account, name = self._jobs[record.job_id], f"job {record.job_id.hex()[:8]} of node {node.index}"
        receipt = self._statements.read(record.receipt)
        if receipt is None or not isinstance(receipt.body, Receipt):
            fail(Invariant.RECEIPTS, f"{name} has none")
        body: Receipt = receipt.body
        self._check_receipt(record.job_id, receipt, name)
        if record.role is Party.CONSUMER:
            account.receipted = record
            require(record.price == body.price, Invariant.PRICES, f"{name}: it costs {record.price}")
            return
        account.proved.add(node.node_id)
        require(len(account.proved) == 1, Invariant.ONE_RESULT, f"several providers have proved {name}")
        require(body.provider == node.node_id, Invariant.RECEIPTS, f"{name}: its receipt names another")
        require(record.price == body.shares[-1].price, Invariant.PRICES, f"{name}: it costs {record.price}")
        if self._honest(receipt.sender):
            same = account.receipted is not None and account.receipted.receipt == record.receipt
            require(same, Invariant.MONEY, f"{name}: the two sides disagree")

    def _check_receipt(self, job_id: bytes, receipt: Envelope[Receipt], name: str) -> None:
        """Compute what a job costs from what was signed about it."""
        body = receipt.body
        proof = self._statements.get(body.proof_digest, Proof)
        offer = self._statements.get(body.offer_digest, Offer)
        if proof is None or offer is None or not body.shares or job_id != body.job_id:
            fail(Invariant.RECEIPTS, f"{name}: its receipt is for something else")
        last = body.shares[-1]
        same = (proof.sender, proof.body.bid_digest) == (last.provider, last.bid_digest)
        require(same and offer.sender == receipt.sender, Invariant.RECEIPTS, f"{name}: its receipt is of others")
        tokens = 0
        for share in body.shares:
            self._priced(share, name)
            require(share.first_token == tokens, Invariant.LIMITS, f"{name}: tokens are paid for twice")
            tokens += share.output_tokens
        total = sum(share.price for share in body.shares)
        require(tokens == proof.body.output_tokens, Invariant.LIMITS, f"{name}: {tokens} tokens are paid for")
        require(body.price == total, Invariant.PRICES, f"{name}: {body.price} for {total}")
        if self._honest(receipt.sender):
            out = {passed.provider for passed in body.passed}
            order = best_first(body.bids, body.terms, offer)
            best = next((weighed.provider for weighed in order if weighed.provider not in out), None)
            require(best == body.provider, Invariant.REPLAYS, name)

    # What came of it.

    def owed(self, now: int) -> list[str]:
        """What honest nodes owe each other, and is not settled, in words; what was signed in time to come is not."""
        found: list[str] = []
        for job_id, account in self._jobs.items():
            for provider, payment in account.promised.items():
                signed_at = header_of(payment.statement).issued_at
                is_due = payment.state is not PaymentState.SETTLED and signed_at <= now + MAX_SKEW_MS
                if is_due and self._honest(provider):
                    found.append(f"{payment.amount} for job {job_id.hex()[:8]} to {provider.short}")
        return found

    def promised_for(self, job_id: bytes) -> dict[NodeId, int]:
        """What an honest consumer has signed for in a job, base units, by provider."""
        account = self._jobs.get(job_id)
        return {provider: payment.amount for provider, payment in account.promised.items()} if account else {}

    def held_for(self, job_id: bytes) -> int:
        """What honest providers hold for a job, base units."""
        account = self._jobs.get(job_id)
        return sum(payment.amount for payment in account.held.values()) if account else 0

    def income(self) -> dict[NodeId, int]:
        """What each honest provider holds, base units."""
        totals: Counter[NodeId] = Counter()
        for account in self._jobs.values():
            totals.update({provider: payment.amount for provider, payment in account.held.items()})
        return dict(totals)

    def paid_to(self) -> dict[NodeId, int]:
        """What honest consumers have signed for, base units, by whom they pay."""
        totals: Counter[NodeId] = Counter()
        for account in self._jobs.values():
            totals.update({provider: payment.amount for provider, payment in account.promised.items()})
        return dict(totals)
