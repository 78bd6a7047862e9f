"""Those who abuse the DHT: they keep what others store there, and lie about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.testing.simulator.adversaries.base import Eavesdropper

INVENTED: Final = 40
"""Providers that are made up for each model: more than a search returns."""


class Eclipse(Eavesdropper):
    """Keeps the first record that it sees, forges others, withholds the rest, and names providers that do not exist."""

    name = "eclipse"
    goal = "keep consumers from finding honest providers"

    def begin(self) -> None:
        """Take over what its node keeps for the DHT."""
        super().begin()
        dice = self.world.dice
        self._first: dict[str, bytes] = {}
        self._invented = [
            KeyPair(dice.secret(f"invented/{self.node.index}/{number}")).node_id for number in range(INVENTED)
        ]
        self.simulation.directory.shelves[self.node.index] = self

    def keep(self, key: str, value: bytes) -> None:
        """The first version of a record is kept for ever."""
        self._first.setdefault(key, value)

    def record(self, key: str) -> bytes | None:
        """A third of the records is withheld, a third forged, and a third old."""
        value = self._first.get(key)
        if value is None:
            return None
        choice = key.encode()[-1] % 3
        if choice == 0:
            return None
        if choice == 1:
            return value[:-1] + bytes([value[-1] ^ 1])
        return value

    def keep_provider(self, root: bytes, provider: NodeId) -> None:
        """Nobody is kept."""

    def providers(self, root: bytes) -> Sequence[NodeId]:
        """Nobody that exists."""
        del root
        return self._invented
