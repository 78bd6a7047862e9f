"""What the tests of asks share."""

from __future__ import annotations

from random import Random
from typing import Final

from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.publications import Ask
from tests.protocol.driver import ENGINE, MODEL_ROOT, NETWORK, NOW, alter

ASK: Final = Ask(
    model_root=MODEL_ROOT, model_name="model", engine=ENGINE, context=8_192, input_token_price=10,
    output_token_price=40, price_curve=(), slots=4, free_slots=4, latency_ms=300, region="eu-west", addresses=(),
)  # fmt: skip


def sealer(number: int) -> Sealer:
    """Of a provider."""
    return Sealer(KeyPair(number.to_bytes(32)), NETWORK)


def ask_of(number: int, *, at: int = 0, lifetime_ms: int = 60_000, **changes: object) -> Envelope[Ask]:
    """An ask of a provider, `at` milliseconds after NOW."""
    return sealer(number).seal(alter(ASK, **changes), NOW + at, lifetime_ms=lifetime_ms)


def chance(seed: int = 1) -> Random:
    """Randomness that repeats."""
    return Random(seed)  # noqa: S311 - is to repeat
