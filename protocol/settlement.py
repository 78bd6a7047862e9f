"""Settling: how a provider learns what it is owed for a job whose stream has ended. Sans-I/O.

The consumer sends its signed receipt, or the last voucher of a job that ended without one, and repeats it until the
provider has answered that it holds it. Saying so twice changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from aci_p2p.protocol.envelope import Envelope, envelope_digest, kind_of, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment, PaymentState
from aci_p2p.protocol.lifecycle import Party, State, Trigger, advance
from aci_p2p.protocol.messages import Kind, Receipt, Settled, Share, Voucher
from aci_p2p.protocol.validation import Decision, Reason, require

SETTLE_PROTOCOL: Final = "/aci/settle/1.0.0"
"""Stream protocol: a statement from the consumer, `Settled` from the provider, until the consumer closes."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What a consumer has signed about a job, as one provider reads it."""

    job_id: bytes
    """32 bytes."""
    share: Share
    """That provider's share."""
    receipt: Envelope[Receipt] | None
    """The receipt; None: it is a voucher."""
    sender: NodeId
    """Who signed it."""
    data: bytes
    """The envelope."""


def read_statement(data: bytes, provider: NodeId, *, network: str) -> Statement:
    """Check a voucher or a receipt for `provider`. Raises MessageRefused.

    A promise to pay holds whenever it is read, and whatever its consumer's clock said.
    """
    kind = kind_of(data)
    # A promise to pay.
    require(kind in (Kind.VOUCHER, Kind.RECEIPT), Decision.REJECT, Reason.WRONG_KIND)
    if kind is Kind.VOUCHER:
        voucher = open_envelope(data, Voucher, network=network, now=None)
        # For us.
        require(voucher.body.share.provider == provider, Decision.REJECT, Reason.BAD_VOUCHER)
        return Statement(voucher.body.job_id, voucher.body.share, None, voucher.sender, data)
    receipt = open_envelope(data, Receipt, network=network, now=None)
    shares = [share for share in receipt.body.shares if share.provider == provider]
    # For us, once.
    require(len(shares) == 1, Decision.REJECT, Reason.BAD_VOUCHER)
    return Statement(receipt.body.job_id, shares[0], receipt, receipt.sender, data)


def settle(
    statement: Statement, job: JobRecord | None, held: Payment | None, now: int
) -> tuple[tuple[JobRecord, ...], Payment] | None:
    """What a provider stores of a statement about its `job`, for which it holds a payment; None: it knows as much.

    Raises MessageRefused.
    """
    # About a job of ours.
    require(job is not None and job.role is Party.PROVIDER, Decision.IGNORE, Reason.WRONG_JOB)
    assert job is not None  # required above
    # Signed by its consumer.
    require(statement.sender == job.peer, Decision.REJECT, Reason.WRONG_SENDER)
    receipt, amount = statement.receipt, statement.share.price
    is_ours = receipt is not None and receipt.body.proof_digest == envelope_digest(job.proof)
    if is_ours and job.state is State.REVEALED:
        # For all that our bid asks for.
        require(amount == job.price, Decision.REJECT, Reason.BAD_VOUCHER)
        state = advance(job.state, Trigger.RECEIPT)
        receipted = replace(job, state=state, updated_at=now, receipt=statement.data)
        pending = replace(receipted, state=advance(state, Trigger.RECORD))
        return (receipted, pending), _payment(statement, amount)
    if job.state is State.REVEALED and (held is None or amount >= held.amount):
        # The answer did not reach it whole: it pays for what has come, and another may have gone on from there.
        state, detail = advance(job.state, Trigger.CANCEL), "the consumer has not the whole answer"
        ended = replace(job, state=state, price=amount, updated_at=now, detail=detail)
        return (ended,), _payment(statement, amount)
    if held and amount <= held.amount:
        return None
    # While it runs, its own stream is the place for that.
    require(job.state not in _RUNNING, Decision.IGNORE, Reason.WRONG_JOB)
    known = replace(job, price=amount, receipt=statement.data if receipt else job.receipt)
    return (known,), _payment(statement, amount)


def acknowledgement(statement: Statement, held: Payment | None) -> Settled:
    """What the provider answers: the most that it holds."""
    return Settled(statement.job_id, held.amount if held else 0)


def acknowledged(payment: Payment, data: bytes, *, network: str, now: int) -> Payment:
    """Our payment, once its provider has answered. Raises MessageRefused."""
    answer = open_envelope(data, Settled, network=network, now=now)
    # Signed by who is paid.
    require(answer.sender == payment.peer, Decision.REJECT, Reason.WRONG_SENDER)
    # About this job.
    require(answer.body.job_id == payment.job_id, Decision.REJECT, Reason.WRONG_JOB)
    # It holds all of it.
    require(answer.body.amount >= payment.amount, Decision.IGNORE, Reason.BAD_VOUCHER)
    return replace(payment, state=PaymentState.SETTLED)


def _payment(statement: Statement, amount: int) -> Payment:
    return Payment(statement.job_id, Party.PROVIDER, statement.sender, amount, statement.data, PaymentState.SETTLED)


_RUNNING: Final = (State.ACCEPTED, State.STREAMING, State.UNPAID, State.COMMITTED)
"""States of a job that a provider works for."""
