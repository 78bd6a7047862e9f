"""What one in-memory endpoint keeps of the DHT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aci_p2p.network.api import RecordSelector, RecordValidator
from aci_p2p.network.limits import PROVIDER_SECONDS
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId


class RecordRules(NamedTuple):
    """How an endpoint judges DHT values."""

    validate: RecordValidator
    """Refuses bad values."""
    select: RecordSelector
    """Picks the best of several."""


class RecordShelf:
    """DHT values, and who provides what."""

    def __init__(self, rules: RecordRules) -> None:
        self._rules = rules
        self._records: dict[str, bytes] = {}
        self._providers: dict[bytes, dict[NodeId, float]] = {}

    def store(self, key: str, value: bytes) -> None:
        """Keep a value that a peer puts, when it is valid and not worse than what we have."""
        if not self._is_valid(key, value):
            return
        held = self._records.get(key)
        if held is None or value == held or self._rules.select(key, (held, value)) == 1:
            self._records[key] = value

    def get(self, key: str) -> bytes | None:
        """The value that is kept for a key."""
        return self._records.get(key)

    def best(self, key: str, values: Sequence[bytes]) -> bytes | None:
        """The best of the values that others keep, None when none of them is valid."""
        valid = [value for value in dict.fromkeys(values) if self._is_valid(key, value)]
        return valid[self._rules.select(key, valid)] if valid else None

    def _is_valid(self, key: str, value: bytes) -> bool:
        try:
            self._rules.validate(key, value)
        except AciError:
            return False
        return True

    def add_provider(self, key: bytes, provider: NodeId, now: float) -> None:
        """Note at time `now`, seconds, that somebody provides a key."""
        self._providers.setdefault(key, {})[provider] = now + PROVIDER_SECONDS

    def providers(self, key: bytes, now: float) -> list[NodeId]:
        """Who provides a key, as far as noted and not expired."""
        return [provider for provider, expiry in self._providers.get(key, {}).items() if expiry > now]
