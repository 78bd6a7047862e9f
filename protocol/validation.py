"""What becomes of a peer's message: ACCEPT, IGNORE or REJECT, with the reason (gossipsub v1.1 extended validators)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from aci_p2p.protocol.errors import RemoteError


class Decision(Enum):
    """What the network does with a message, in gossipsub v1.1 terms."""

    ACCEPT = "accept"
    """Deliver and forward."""
    IGNORE = "ignore"
    """Drop silently; the forwarder may be honest (late, duplicate, not ours)."""
    REJECT = "reject"
    """Drop and hold it against the forwarder: no honest node forwards this."""


class Reason(StrEnum):
    """Why a message was accepted, ignored or rejected; logged and counted under this name."""

    OK = "ok"
    TOO_LARGE = "too_large"
    NOT_CANONICAL = "not_canonical"
    MALFORMED = "malformed"
    UNKNOWN_VERSION = "unknown_version"
    WRONG_NETWORK = "wrong_network"
    WRONG_KIND = "wrong_kind"
    WRONG_SENDER = "wrong_sender"
    WRONG_JOB = "wrong_job"
    BAD_LIFETIME = "bad_lifetime"
    EXPIRED = "expired"
    FROM_FUTURE = "from_future"
    REPLAYED = "replayed"
    FLOODED = "flooded"
    BAD_SIGNATURE = "bad_signature"
    BAD_JOB_ID = "bad_job_id"
    BAD_DEADLINE = "bad_deadline"
    DUPLICATE_BID = "duplicate_bid"
    TOO_MANY_BIDS = "too_many_bids"
    BAD_COMMITMENT = "bad_commitment"
    BAD_SEAL = "bad_seal"
    OUT_OF_ORDER = "out_of_order"
    TOO_MANY_TOKENS = "too_many_tokens"
    BAD_VOUCHER = "bad_voucher"
    BAD_RECORD_KEY = "bad_record_key"
    WRONG_MODEL = "wrong_model"
    VALIDATOR_FAILED = "validator_failed"


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome of checking one message."""

    decision: Decision
    """What to do with it."""
    reason: Reason
    """Why."""


ACCEPTED = Validation(Decision.ACCEPT, Reason.OK)
"""The message passed every check."""


class MessageRefused(RemoteError):
    """A peer's message failed a check."""

    code = "message_refused"

    def __init__(self, decision: Decision, reason: Reason, detail: str = "") -> None:
        """`decision` is IGNORE or REJECT; `detail` says more than the reason where there is more to say."""
        super().__init__(f"message refused: {reason.replace('_', ' ')}" + (f" ({detail})" if detail else ""))
        self.validation = Validation(decision, reason)


def require(condition: bool, decision: Decision, reason: Reason) -> None:  # noqa: FBT001 - reads as a sentence
    """One check on a peer's message; raises MessageRefused unless it holds."""
    if not condition:
        raise MessageRefused(decision, reason)
