"""Attacks that cannot be carried out yet, for what they attack is not built: each says what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from aci_p2p.protocol.messages import Kind


@dataclass(frozen=True, slots=True)
class UnbuiltAttack:
    """An attack on something that does not exist."""

    name: str
    """What it will be called."""
    goal: str
    """What it wants."""
    kind: str
    """Name of the message kind without which it cannot be expressed."""
    waits_for: str
    """What has to be built."""

    @property
    def is_expressible(self) -> bool:
        """Whether what it attacks exists by now; then it belongs among the strategies."""
        return self.kind in Kind.__members__ or find_spec("aci_p2p.chain") is not None


DISPUTES: Final = "attestations, disputes and validators"
REDUNDANCY: Final = "immediate verification by several providers"

UNBUILT: Final = (
    UnbuiltAttack("copied result", "be paid for what another provider computed", "AGREEMENT", REDUNDANCY),
    UnbuiltAttack("equivocation", "tell two consumers of one result different things", "AGREEMENT", REDUNDANCY),
    UnbuiltAttack("colluding providers", "agree on a wrong answer", "AGREEMENT", REDUNDANCY),
    UnbuiltAttack("lazy validator", "be paid for verdicts without computing them", "VERDICT", DISPUTES),
    UnbuiltAttack("colluding validators", "have an honest provider slashed", "VERDICT", DISPUTES),
    UnbuiltAttack("false challenge", "have an honest answer refunded", "CHALLENGE", DISPUTES),
    UnbuiltAttack("challenge censorship", "let the challenge window pass in silence", "CHALLENGE", DISPUTES),
)
"""Every one of them."""
