"""Token buckets: how much a peer may send, in bursts and on average. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """Holds at most `burst` tokens, and gains `rate` a second."""

    rate: float
    """Tokens a second."""
    burst: float
    """Tokens that it holds at most, and at first."""
    level: float
    """Tokens in it; negative after a debt."""
    updated: float
    """When `level` was right, seconds."""

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> TokenBucket:
        """A full bucket at `now`, seconds."""
        return cls(rate, burst, burst, now)

    def refill(self, now: float) -> None:
        """Add what has come in since the last time."""
        self.level = min(self.burst, self.level + self.rate * (now - self.updated))
        self.updated = now

    def take(self, tokens: float, now: float) -> bool:
        """Take tokens if there are so many; False when not."""
        self.refill(now)
        if self.level < tokens:
            return False
        self.level -= tokens
        return True
