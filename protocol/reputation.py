"""A consumer's own experience with providers: how likely each is to answer. Pure; integers; time is an argument.

Only the consumer's own jobs count, by its signed receipts and by verdicts: what others say of a provider may come from
the provider itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.envelope import open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Receipt
from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.protocol.selection import Standing
from aci_p2p.protocol.terms import MAX_EXPERIENCE, SUCCESS_MILLI_MAX, Passing
from aci_p2p.protocol.validation import MessageRefused

HALF_LIFE_MS: Final = 14 * 24 * 3_600 * 1_000
"""Milliseconds after which an outcome counts half: hardware and owners change within weeks."""
FULL_WEIGHT: Final = 1_000
"""Thousandths: most that one job counts, however dear. A failure counts so much, since nothing tells what it spoilt."""
LEAST_WEIGHT: Final = 250
"""Thousandths: what an answer counts that cost next to nothing. Who fails one in 17 then is as good as a stranger."""
FULL_WEIGHT_PAID: Final = ONE_ACI // 1_000
"""Base units from which on an answer counts in full: 250 tokens for the default price."""
PRIOR_GOOD: Final = 4_000
"""Thousandths of answers that every provider begins with."""
PRIOR_BAD: Final = 1_000
"""Thousandths of failures that every provider begins with: four in five of the unknown are expected to answer."""
MAX_STANDINGS: Final = 2_048
"""Providers and models remembered, those heard of last: more than a consumer deals with in a half-life."""
MAX_OUTCOMES: Final = 32
"""Outcomes remembered of each, the latest: enough to tell 95% from 99%; below 10 MB in all."""
_ANSWERED: Final = (State.PENDING, State.CHALLENGED, State.FINAL, State.DISMISSED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one job with one provider."""

    job_id: bytes
    """32 bytes."""
    provider: NodeId
    """Who had the job."""
    model_root: bytes
    """Weights root of the model, 32 bytes."""
    good: bool
    """Whether it answered; otherwise it was to blame."""
    paid: int
    """What the answer cost, base units."""
    at: int
    """When, Unix milliseconds."""

    @property
    def weight(self) -> int:
        """How much it counts when it is fresh, thousandths."""
        if not self.good:
            return FULL_WEIGHT
        return LEAST_WEIGHT + (FULL_WEIGHT - LEAST_WEIGHT) * min(self.paid, FULL_WEIGHT_PAID) // FULL_WEIGHT_PAID


class Reputation:
    """One consumer's experience. Bounded."""

    def __init__(self, own: NodeId, network: str) -> None:
        """`own`: the consumer whose experience it is, on `network`."""
        self._own = own
        self._network = network
        self._outcomes: OrderedDict[tuple[NodeId, bytes], OrderedDict[bytes, Outcome]] = OrderedDict()

    def __len__(self) -> int:
        """Providers and models remembered."""
        return len(self._outcomes)

    def note(self, job: JobRecord, receipt: Receipt | None = None) -> None:
        """Take a job into account as it stands; again, after a verdict, for what it has become.

        `receipt`: the one that we signed for it, where it is at hand; None: it is read from the record.
        """
        for outcome in outcomes(job, self._own, self._network, receipt):
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        """Take an outcome into account; a later one of the same job and provider replaces it."""
        key = outcome.provider, outcome.model_root
        known = self._outcomes.setdefault(key, OrderedDict())
        known[outcome.job_id] = outcome
        known.move_to_end(outcome.job_id)
        if len(known) > MAX_OUTCOMES:
            known.popitem(last=False)
        self._outcomes.move_to_end(key)
        if len(self._outcomes) > MAX_STANDINGS:
            self._outcomes.popitem(last=False)

    def standing(self, provider: NodeId, model_root: bytes, now: int) -> Standing:
        """What is to be expected of a provider with a model."""
        good = bad = 0
        for outcome in self._outcomes.get((provider, model_root), OrderedDict()).values():
            weight = decayed(outcome.weight, now - outcome.at)
            if outcome.good:
                good += weight
            else:
                bad += weight
        success = (PRIOR_GOOD + good) * SUCCESS_MILLI_MAX // (PRIOR_GOOD + PRIOR_BAD + good + bad)
        return Standing(success, min(good + bad, MAX_EXPERIENCE))


def decayed(weight: int, age_ms: int) -> int:
    """What is left of a weight: half after each half-life, and in a straight line from one to the next."""
    halvings, rest = divmod(max(age_ms, 0), HALF_LIFE_MS)
    return (weight * (2 * HALF_LIFE_MS - rest) // (2 * HALF_LIFE_MS)) >> halvings


def outcomes(job: JobRecord, own: NodeId, network: str, receipt: Receipt | None = None) -> Iterable[Outcome]:
    """What a stored job says about providers: nothing, unless it was ours as a consumer; `receipt` as in `note`."""
    if job.role is not Party.CONSUMER:
        return
    receipt = receipt or _own_receipt(job, own, network)
    if receipt:
        failed = {passed.provider for passed in receipt.passed if passed.why is Passing.FAILED}
        # Others went on from what these had begun.
        failed |= {share.provider for share in receipt.shares[:-1]}
        for provider in sorted(failed):
            yield Outcome(job.job_id, provider, job.model_root, good=False, paid=0, at=job.updated_at)
    if job.peer is None:
        return
    if job.blame is Party.PROVIDER or job.state is State.UPHELD:
        yield Outcome(job.job_id, job.peer, job.model_root, good=False, paid=0, at=job.updated_at)
    elif job.state in _ANSWERED and receipt is not None and receipt.provider == job.peer:
        yield Outcome(job.job_id, job.peer, job.model_root, good=True, paid=receipt.shares[-1].price, at=job.updated_at)


def _own_receipt(job: JobRecord, own: NodeId, network: str) -> Receipt | None:
    if not job.receipt:
        return None
    try:
        receipt = open_envelope(job.receipt, Receipt, network=network, now=None)
    except MessageRefused:
        return None
    return receipt.body if receipt.sender == own and receipt.body.job_id == job.job_id else None
