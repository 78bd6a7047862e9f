"""Jobs that nobody can take are known before they are offered, and by how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.feasibility import why_impossible
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.publications import CapabilityRecord, Engine, PriceStep
from aci_p2p.protocol.request import JobRequest
from aci_p2p.protocol.selection import StakeTable
from aci_p2p.protocol.terms import ANY_PROVIDER, Verification
from tests.protocol.driver import MODEL_ROOT, NETWORK, NOW, PROVIDER, REQUEST, RIVAL, alter

ENGINE = Engine("fake/1", "fp32-ref", "cpu", "q4_0")
STAKES = StakeTable({PROVIDER.node_id: 5, RIVAL.node_id: 7})
PROMPT = 36 + 2 * 16 + 128
"""Most tokens of the request's prompt."""


def record(key: KeyPair = PROVIDER, **changes: object) -> Envelope[CapabilityRecord]:
    body = CapabilityRecord(MODEL_ROOT, "model", 100, ENGINE, 10, 1_000, 2, (), 2, ())
    return Sealer(key, NETWORK).seal(alter(body, **changes), NOW)


def why(*records: Envelope[CapabilityRecord], **changes: object) -> str:
    request: JobRequest = alter(REQUEST, **changes)
    return why_impossible(request, records, STAKES)


def test_a_job_that_somebody_may_take() -> None:
    assert not why(record())
    asked = replace(ANY_PROVIDER, min_stake=7, quantisations=("q4_0",), regions=("mars",), latency_value=9)
    assert not why(record(RIVAL), terms=asked)


@pytest.mark.parametrize("records", [(), (record(slots=0, free_slots=0),)])
def test_nobody_has_the_model(records: tuple[Envelope[CapabilityRecord], ...]) -> None:
    assert why(*records) == "no provider has the model"


def test_nobody_has_room() -> None:
    assert not why(record(), record(RIVAL, context=70), max_tokens=99)
    assert why(record(), max_tokens=100) == "no provider has room for 100 tokens: the longest context is 100"


def test_nobody_has_the_weights() -> None:
    asked = replace(ANY_PROVIDER, quantisations=("none", "fp16"))
    there = record(), record(RIVAL, engine=replace(ENGINE, quantisation="q8\x1b[31m"))
    assert why(*there, terms=asked) == "no provider computes in none or fp16: there is q4_0, q8 [31m"
    assert not why(*there, record(RIVAL, engine=replace(ENGINE, quantisation="none")), terms=asked)


def test_nobody_has_the_stake() -> None:
    asked = replace(ANY_PROVIDER, min_stake=10**18 + 7)
    assert why(record(), record(RIVAL), terms=asked) == (
        "no provider has the stake asked for: the largest of 2 is 0.000000000000000007 ACI, 1 ACI below"
    )


def test_nobody_is_cheap_enough() -> None:
    """Eight tokens and the longest prompt, and a quarter more for verification."""
    least = (10 * PROMPT + 1_000 * 8) * 5 // 4
    assert not why(record(), max_price=least)
    dear = why(record(), record(RIVAL, output_token_price=2_000), max_price=least - 3)
    assert dear == (
        "the maximum price is 0.000000000000000003 ACI under the cheapest of 2 providers, "
        f"which may cost {format_amount(least)}"
    )
    assert why(record(), max_price=least, priority_fee=1)
    assert why(record(), max_price=least, verification=Verification.IMMEDIATE)
    # Only those count that have the stake.
    asked = replace(ANY_PROVIDER, min_stake=6)
    assert "cheapest of 1 providers" in why(
        record(), record(RIVAL, output_token_price=2_000), max_price=least, terms=asked
    )


def test_a_price_curve_may_make_it_possible() -> None:
    least = (10 * PROMPT + 1_000 * 8) // 2 * 5 // 4
    curve = PriceStep(500, 500), PriceStep(900, 3_000)
    assert not why(record(price_curve=curve), max_price=least)
    assert why(record(price_curve=curve), max_price=least - 1)
