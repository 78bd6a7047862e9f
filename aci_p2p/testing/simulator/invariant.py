"""What must hold in every simulated world, by name, and what is raised when it does not."""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn


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
    """Jobs move as the table of transitions says; none is won again by who has worked for it."""
    ONE_RESULT = "one result for a job"
    """At most one provider has proved the answer of a job."""
    RECEIPTS = "no money without a receipt"
    """Who counts money has a receipt for it."""
    PRICES = "prices are as bid"
    """A job costs what was bid for it."""
    REPLAYS = "receipts replay to their winner"
    """What a receipt says of the choice leads to the provider that it names."""
    LIMITS = "nobody pays for more than was asked"
    """No more tokens are paid for than were asked for and came, and no more than the most."""
    MONEY = "money is conserved"
    """A provider holds no more than its consumer's disk promises it, and all of it once that says so."""
    UNPAID = "little is unpaid"
    """A provider sends no more than it risks before it is paid for what it has sent."""
    DEBTS = "debts are paid"
    """Once the world is calm, every provider holds what it is owed."""
    ANSWERS = "honest answers are true"
    """An answer of honest providers is the one that the model gives, however many went on from one another."""
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
