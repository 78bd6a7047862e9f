"""What is published, and when."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from random import Random
from typing import Final

import pytest

from aci_p2p.dht.announcing import CHANGE_GAP_S, JITTER, REANNOUNCE_S, RETRY_S, SPREAD_GAP_S, Announcer, is_material
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord, PriceStep
from tests.protocol.driver import ENGINE, PRICES

NODE: Final = NodeRecord(("/a",), ("provider",), "aci-p2p/1")
MODEL: Final = CapabilityRecord(
    model_root=bytes(32), model_name="model", context=8_192, engine=ENGINE, **PRICES, slots=8, addresses=("/a",),
    free_slots=8, price_curve=(),
)  # fmt: skip
OTHER: Final = replace(MODEL, model_root=bytes([1]) * 32)
LATEST: Final = REANNOUNCE_S * (1 + JITTER)


@pytest.fixture
def announcer() -> Announcer:
    announcer = Announcer(Random(5))  # noqa: S311 - the same in every run
    announcer.update(NODE, [MODEL])
    return announcer


def test_published_once_and_renewed_in_time(announcer: Announcer) -> None:
    assert announcer.due(8, 0) == [NODE, MODEL]
    assert announcer.due(8, REANNOUNCE_S * (1 - JITTER) - 1) == []
    assert sorted(map(str, announcer.due(8, LATEST))) == sorted(map(str, [NODE, MODEL]))
    assert announcer.due(8, LATEST, renew=True) == [NODE, MODEL]
    assert announcer.current == (NODE, MODEL)


def test_all_is_renewed_together(announcer: Announcer) -> None:
    """So that an idle node wakes once for it."""
    announcer.due(8, 0)
    announcer.update(NODE, [replace(MODEL, free_slots=0)])
    announcer.due(8, REANNOUNCE_S / 2)
    assert len(announcer.due(8, LATEST)) == 2
    assert REANNOUNCE_S * (1 - JITTER) <= announcer.next_due(8) - LATEST <= LATEST


def test_it_says_when_to_look_again(announcer: Announcer) -> None:
    assert announcer.next_due(8) == -inf
    announcer.due(8, 0)
    assert REANNOUNCE_S * (1 - JITTER) <= announcer.next_due(8) <= LATEST
    # So many connections that all is told again.
    assert announcer.next_due(31) > SPREAD_GAP_S
    assert announcer.next_due(32) == SPREAD_GAP_S
    # A change that others should hear of, when they have heard of the last for a while.
    announcer.update(NODE, [replace(MODEL, free_slots=7)])
    assert announcer.next_due(8) > CHANGE_GAP_S
    announcer.update(NODE, [replace(MODEL, free_slots=0)])
    assert announcer.next_due(8) == CHANGE_GAP_S
    announcer.due(8, CHANGE_GAP_S)
    announcer.failed(NODE, CHANGE_GAP_S)
    assert announcer.next_due(8) == CHANGE_GAP_S + RETRY_S
    # A model that is new, one that is not served any more.
    announcer.update(NODE, [replace(MODEL, free_slots=0), OTHER])
    assert announcer.next_due(8) == -inf
    announcer.due(8, CHANGE_GAP_S)
    announcer.update(NODE, [OTHER])
    assert announcer.next_due(8) == -inf
    assert Announcer(Random(5)).next_due(8) == inf  # noqa: S311 - no secret


def test_nothing_is_due_before_it_says_so(announcer: Announcer) -> None:
    now = 0.0
    announcer.due(8, now)
    for _ in range(20):
        due = announcer.next_due(8)
        assert announcer.due(8, due - 1e-3) == []
        assert announcer.due(8, due) == [NODE, MODEL]


def test_a_new_model_is_published_at_once(announcer: Announcer) -> None:
    announcer.due(8, 0)
    announcer.update(NODE, [MODEL, OTHER])
    assert announcer.due(8, 1) == [OTHER]


def test_a_model_that_is_not_served_any_more_is_taken_back_once(announcer: Announcer) -> None:
    announcer.update(NODE, [MODEL, OTHER])
    announcer.due(8, 0)
    announcer.update(NODE, [OTHER])
    assert announcer.due(8, 1) == [replace(MODEL, slots=0, free_slots=0, addresses=())]
    assert announcer.due(8, 2) == []
    announcer.update(NODE, [MODEL, OTHER])
    assert announcer.due(8, 3) == [MODEL]


def test_everything_is_taken_back_in_the_end(announcer: Announcer) -> None:
    announcer.update(NODE, [replace(MODEL, price_curve=(PriceStep(500, 2_000),)), OTHER])
    announcer.due(8, 0)
    assert announcer.withdraw() == [replace(one, slots=0, free_slots=0, addresses=()) for one in (MODEL, OTHER)]
    assert announcer.withdraw() == []


def test_changes_are_published_but_not_each(announcer: Announcer) -> None:
    announcer.due(8, 0)
    busier = replace(MODEL, free_slots=2)
    announcer.update(NODE, [busier])
    assert announcer.due(8, CHANGE_GAP_S - 1) == []
    assert announcer.due(8, CHANGE_GAP_S) == [busier]
    moved = replace(NODE, addresses=("/b",))
    announcer.update(moved, [busier])
    assert announcer.due(8, CHANGE_GAP_S + 1) == [moved]


@pytest.mark.parametrize(
    ("free", "later", "material"),
    [(8, 8, False), (8, 5, False), (8, 4, True), (8, 0, True), (1, 0, True), (0, 1, True), (1, 2, False), (1, 5, True)],
)
def test_which_free_slots_are_worth_telling(free: int, later: int, material: bool) -> None:  # noqa: FBT001 - a table
    assert is_material(replace(MODEL, free_slots=free), replace(MODEL, free_slots=later)) is material


def test_every_other_change_is_worth_telling() -> None:
    assert is_material(MODEL, replace(MODEL, input_token_price=1, free_slots=7))
    assert is_material(MODEL, replace(MODEL, addresses=()))
    assert not is_material(replace(MODEL, slots=1, free_slots=1), replace(MODEL, slots=1, free_slots=1))
    assert not is_material(replace(MODEL, slots=0, free_slots=0), replace(MODEL, slots=0, free_slots=0))
    assert is_material(NODE, replace(NODE, software="aci-p2p/2"))
    assert not is_material(NODE, NODE)


def test_published_again_while_our_connections_multiply(announcer: Announcer) -> None:
    """Those who look for us know others than the few whom we knew at first."""
    announcer.due(1, 0)
    assert announcer.due(3, SPREAD_GAP_S) == []
    assert announcer.due(4, SPREAD_GAP_S - 0.1) == []
    assert announcer.due(4, SPREAD_GAP_S) == [NODE, MODEL]
    assert announcer.due(15, 2 * SPREAD_GAP_S) == []
    assert announcer.due(16, 2 * SPREAD_GAP_S) == [NODE, MODEL]
    # All of them lost, and others found: nobody there knows us.
    assert announcer.due(0, 3 * SPREAD_GAP_S) == []
    assert announcer.due(1, 3 * SPREAD_GAP_S) == [NODE, MODEL]


def test_a_change_of_one_model_does_not_count_as_telling_all(announcer: Announcer) -> None:
    announcer.due(2, 0)
    announcer.update(NODE, [MODEL, OTHER])
    assert announcer.due(7, 1) == [OTHER]
    assert announcer.due(8, 1 + SPREAD_GAP_S) == [NODE, MODEL, OTHER]


def test_what_failed_is_tried_again_sooner(announcer: Announcer) -> None:
    announcer.due(8, 0)
    announcer.failed(MODEL, 5)
    announcer.failed(OTHER, 5)
    assert announcer.due(8, 5 + RETRY_S - 1) == []
    assert announcer.due(8, 5 + RETRY_S) == [MODEL]
