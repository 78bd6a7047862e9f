"""Everything that the nodes of a world have signed: what the judge holds their beliefs against."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final, TypeVar

from aci_p2p.protocol.envelope import Envelope, envelope_digest
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.publications import Ask, CapabilityRecord, NodeRecord

MAX_KEPT: Final = 1 << 17
"""Messages kept, the latest: those of the minutes for which a message counts, floods included."""

B = TypeVar("B")


class Statements:
    """Signed messages by digest, and offers by job."""

    def __init__(self) -> None:
        self._signed: OrderedDict[bytes, Envelope[Any]] = OrderedDict()
        self._records: OrderedDict[bytes, Envelope[Any]] = OrderedDict()
        self._offers: OrderedDict[bytes, Envelope[Offer]] = OrderedDict()

    def add(self, envelope: Envelope[Any]) -> None:
        """A node has signed a message."""
        # Records count for an hour, and must not be forgotten over what counts for a minute; asks are as many as they.
        kept = self._records if isinstance(envelope.body, NodeRecord | CapabilityRecord | Ask) else self._signed
        kept[envelope.digest] = envelope
        if len(kept) > MAX_KEPT:
            kept.popitem(last=False)
        if isinstance(envelope.body, Offer):
            # The first is the true one: a job's id belongs to who made it up.
            self._offers.setdefault(envelope.body.job_id, envelope)
            if len(self._offers) > MAX_KEPT:
                self._offers.popitem(last=False)

    def read(self, data: bytes) -> Envelope[Any] | None:
        """The message that somebody signed in exactly this form; None: nobody did."""
        digest = envelope_digest(data)
        return self._signed.get(digest) or self._records.get(digest)

    def get(self, digest: bytes, body_type: type[B]) -> Envelope[B] | None:
        """A signed message of a kind, by its digest."""
        envelope = self._signed.get(digest)
        return envelope if envelope is not None and isinstance(envelope.body, body_type) else None

    def offer(self, job_id: bytes) -> Envelope[Offer] | None:
        """The first offer of a job."""
        return self._offers.get(job_id)
