"""The life of a job as a table: which event leads where, how long a state may last, and whose fault it is if it does.

The table is the specification; the diagram in `spec/lifecycle.md` is made from it. After h11's `_state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from aci_p2p.protocol.errors import LocalError


class State(Enum):
    """Where a job stands."""

    DRAFT = "draft"
    OFFERED = "offered"
    AWARDED = "awarded"
    ACCEPTED = "accepted"
    STREAMING = "streaming"
    UNPAID = "unpaid"
    COMMITTED = "committed"
    REVEALED = "revealed"
    RECEIPTED = "receipted"
    PENDING = "pending"
    CHALLENGED = "challenged"
    FINAL = "final"
    EXPIRED = "expired"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    PROVIDER_FAULT = "provider_fault"
    CONSUMER_FAULT = "consumer_fault"
    UPHELD = "upheld"
    DISMISSED = "dismissed"
    INCONCLUSIVE = "inconclusive"


class Trigger(Enum):
    """What moves a job."""

    OFFER = "offer"
    """The consumer broadcasts its offer."""
    AWARD = "award"
    """The consumer chooses a bid."""
    ACCEPT = "accept"
    """The provider binds itself."""
    DECLINE = "decline"
    """The provider cannot take the award after all; the next bid may."""
    NO_BID = "no bid"
    """There were bids, and none is left that meets the offer."""
    INPUT = "input"
    """The provider has the prompt, and it opens the commitments."""
    TOKENS = "tokens"
    """A part of the answer."""
    HOLD = "hold"
    """The provider stops: as much as it risks is not paid for."""
    VOUCHER = "voucher"
    """The consumer promises to pay for what has come so far."""
    COMMIT = "commit"
    """The provider commits to its output."""
    REVEAL = "reveal"
    """The provider opens its commitment with a proof that verifies."""
    RECEIPT = "receipt"
    """The consumer signs for the answer."""
    RECORD = "record"
    """The receipt is stored and awaits its challenge window."""
    CHALLENGE = "challenge"
    """Somebody disputes the answer."""
    UPHOLD = "uphold"
    """Validators find against the provider."""
    DISMISS = "dismiss"
    """Validators find for the provider."""
    CANCEL = "cancel"
    """One side gives the job up without blame."""
    FAIL_OVER = "fail over"
    """The provider vanished or could not go on; the next may go on from what has come."""
    PROVIDER_FAILS = "provider fails"
    """The provider broke the protocol, vanished or could not go on, and nobody takes its place."""
    CONSUMER_FAILS = "consumer fails"
    """The consumer broke the protocol or vanished."""
    TIMEOUT = "timeout"
    """The state lasted longer than it may."""


class Party(Enum):
    """Who must act next in a state, and is to blame if the state times out."""

    CONSUMER = "consumer"
    PROVIDER = "provider"
    VALIDATORS = "validators"
    NOBODY = "nobody"
    """Waiting is the point (the challenge window), or the state is final."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a state may last."""

    timeout_ms: int
    """Milliseconds from entering the state (STREAMING: from the last tokens)."""
    blame: Party
    """Who failed to act."""
    leads_to: State
    """Where the timeout leads."""


_SECOND: Final = 1_000
_HOUR: Final = 3_600 * _SECOND
CHALLENGE_WINDOW_MS: Final = 24 * _HOUR
"""Optimistic verification: a result is accepted unless challenged within a day."""

LIMITS: Final[dict[State, Limit]] = {
    State.DRAFT: Limit(60 * _SECOND, Party.CONSUMER, State.EXPIRED),
    State.OFFERED: Limit(10 * _SECOND, Party.CONSUMER, State.EXPIRED),
    State.AWARDED: Limit(5 * _SECOND, Party.PROVIDER, State.OFFERED),
    State.ACCEPTED: Limit(5 * _SECOND, Party.CONSUMER, State.CONSUMER_FAULT),
    State.STREAMING: Limit(60 * _SECOND, Party.PROVIDER, State.PROVIDER_FAULT),
    State.UNPAID: Limit(10 * _SECOND, Party.CONSUMER, State.CONSUMER_FAULT),
    State.COMMITTED: Limit(10 * _SECOND, Party.PROVIDER, State.PROVIDER_FAULT),
    State.REVEALED: Limit(_HOUR, Party.CONSUMER, State.CONSUMER_FAULT),
    State.RECEIPTED: Limit(60 * _SECOND, Party.NOBODY, State.PENDING),
    State.PENDING: Limit(CHALLENGE_WINDOW_MS, Party.NOBODY, State.FINAL),
    State.CHALLENGED: Limit(CHALLENGE_WINDOW_MS, Party.VALIDATORS, State.INCONCLUSIVE),
}
"""OFFERED: the longest bid window (`market.MAX_BID_WINDOW_MS`); an offer's own deadline may end it earlier.
AWARDED: a round trip between continents takes under one second, a busy node under four.
ACCEPTED: the slot is held for a prompt that is ready; the largest takes four seconds at a megabit a second.
STREAMING: a large model loads and reads a long prompt within a minute; then each part of the answer renews it.
REVEALED: the provider has done its work and holds no slot; a consumer that stopped may come back and settle."""

_PATH: Final[dict[tuple[State, Trigger], State]] = {
    (State.DRAFT, Trigger.OFFER): State.OFFERED,
    (State.OFFERED, Trigger.AWARD): State.AWARDED,
    (State.OFFERED, Trigger.NO_BID): State.REJECTED,
    (State.AWARDED, Trigger.ACCEPT): State.ACCEPTED,
    (State.AWARDED, Trigger.DECLINE): State.OFFERED,
    (State.ACCEPTED, Trigger.INPUT): State.STREAMING,
    (State.STREAMING, Trigger.TOKENS): State.STREAMING,
    (State.STREAMING, Trigger.VOUCHER): State.STREAMING,
    (State.STREAMING, Trigger.HOLD): State.UNPAID,
    (State.UNPAID, Trigger.VOUCHER): State.STREAMING,
    (State.STREAMING, Trigger.COMMIT): State.COMMITTED,
    (State.COMMITTED, Trigger.REVEAL): State.REVEALED,
    (State.REVEALED, Trigger.RECEIPT): State.RECEIPTED,
    (State.RECEIPTED, Trigger.RECORD): State.PENDING,
    (State.PENDING, Trigger.CHALLENGE): State.CHALLENGED,
    (State.CHALLENGED, Trigger.UPHOLD): State.UPHELD,
    (State.CHALLENGED, Trigger.DISMISS): State.DISMISSED,
}
_SERVED: Final = (State.ACCEPTED, State.STREAMING, State.UNPAID, State.COMMITTED)
"""States in which a provider works for the job."""

TRANSITIONS: Final[dict[tuple[State, Trigger], State]] = {
    **_PATH,
    **{
        (state, Trigger.CANCEL): State.CANCELLED
        for state in (State.DRAFT, State.OFFERED, State.AWARDED, *_SERVED, State.REVEALED)
    },
    **{(state, Trigger.FAIL_OVER): State.OFFERED for state in _SERVED if state is not State.UNPAID},
    **{(state, Trigger.PROVIDER_FAILS): State.PROVIDER_FAULT for state in (State.OFFERED, *_SERVED)},
    **{(state, Trigger.CONSUMER_FAILS): State.CONSUMER_FAULT for state in (State.AWARDED, *_SERVED)},
    **{(state, Trigger.TIMEOUT): limit.leads_to for state, limit in LIMITS.items()},
}
"""The whole table; a pair that is missing is illegal. A provider that vanishes is replaced, before it has accepted
(DECLINE) and later (FAIL_OVER); once one has revealed, only the consumer can fail."""

FINAL_STATES: Final = frozenset(State) - LIMITS.keys()
"""States that nothing leaves."""


class IllegalTransition(LocalError):
    """A trigger that the job's state does not allow: a bug, or a peer's message out of order."""

    code = "illegal_transition"

    def __init__(self, state: State, trigger: Trigger) -> None:
        super().__init__(f"a job that is {state.value} has no {trigger.value}")
        self.state = state
        self.trigger = trigger


def advance(state: State, trigger: Trigger) -> State:
    """The state that `trigger` leads to. Raises IllegalTransition."""
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise IllegalTransition(state, trigger) from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> draft"]
    arrows: dict[tuple[State, State], list[str]] = {}
    for (state, trigger), target in TRANSITIONS.items():
        label = trigger.value
        if trigger is Trigger.TIMEOUT:
            limit = LIMITS[state]
            label = f"timeout {limit.timeout_ms // _SECOND} s ({limit.blame.value})"
        arrows.setdefault((state, target), []).append(label)
    lines += [f"    {a.value} --> {b.value}: {', '.join(labels)}" for (a, b), labels in arrows.items()]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL_STATES]
    return "\n".join(lines)
