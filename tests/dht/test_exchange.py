"""Peer exchange: what is believed, kept and passed on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest

from aci_p2p.dht import exchange
from aci_p2p.dht.exchange import BURST, MAX_NODES, MIN_GAP_S, RATE, RecordExchange, exchange_topic
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import Commit
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord, PriceStep
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import ENGINE, NETWORK, NOW, PRICES

OWN: Final = KeyPair(bytes([1]) * 32)
NEIGHBOUR: Final = KeyPair(bytes([2]) * 32).node_id
ROOT: Final = bytes([5]) * 32
NODE: Final = NodeRecord(("/ip4/192.0.2.1/tcp/1",), ("provider",), "aci-p2p/1")
CAPABILITY: Final = CapabilityRecord(
    model_root=ROOT, model_name="model", context=8_192, engine=ENGINE, **PRICES, slots=4, addresses=("/a",),
    free_slots=4, price_curve=(),
)  # fmt: skip
LIFETIME: Final = 3 * 3_600_000


def seal(body: Any, number: int = 3, *, at: int = NOW) -> Envelope[Any]:  # noqa: ANN401 - any message
    return Sealer(KeyPair(number.to_bytes(32)), NETWORK).seal(body, at)


@pytest.fixture
def heard() -> RecordExchange:
    return RecordExchange(NETWORK, OWN.node_id, b"salt")


def refused(
    heard: RecordExchange, data: bytes, decision: Decision, reason: Reason, at: float = 0.0, by: NodeId = NEIGHBOUR
) -> None:
    with pytest.raises(MessageRefused) as caught:
        heard.hear(by, data, NOW, at)
    assert caught.value.validation == Validation(decision, reason)


def test_the_topic_names_the_network() -> None:
    assert exchange_topic("aci-main") == "/aci/aci-main/peers/1"


def test_records_of_both_kinds_are_kept_until_they_expire(heard: RecordExchange) -> None:
    node, capability = seal(NODE), seal(CAPABILITY, 4)
    assert heard.hear(NEIGHBOUR, node.data, NOW, 0) == node
    assert heard.hear(NEIGHBOUR, capability.data, NOW, 0) is None
    assert heard.nodes(NOW + LIFETIME - 1) == [node]
    assert heard.providers(ROOT, NOW + LIFETIME - 1) == [capability]
    assert heard.providers(bytes(32), NOW) == []
    assert heard.nodes(NOW + LIFETIME) == []
    assert heard.providers(ROOT, NOW + LIFETIME) == []


def test_the_latest_heard_come_first(heard: RecordExchange) -> None:
    records = [seal(NODE, number) for number in range(3, 8)]
    for at, record in enumerate(records):
        heard.hear(NEIGHBOUR, record.data, NOW, at)
    assert heard.nodes(NOW) == records[::-1]


def test_our_own_records_are_passed_on_but_of_no_use_to_us(heard: RecordExchange) -> None:
    sealer = Sealer(OWN, NETWORK)
    assert heard.hear(NEIGHBOUR, sealer.seal(NODE, NOW).data, NOW, 0) is None
    heard.hear(NEIGHBOUR, sealer.seal(CAPABILITY, NOW).data, NOW, 0)
    assert heard.nodes(NOW) == []
    assert heard.providers(ROOT, NOW) == []


def test_a_node_without_addresses_is_no_help(heard: RecordExchange) -> None:
    heard.hear(NEIGHBOUR, seal(replace(NODE, addresses=())).data, NOW, 0)
    assert heard.nodes(NOW) == []


def test_what_no_honest_node_forwards(heard: RecordExchange) -> None:
    good = seal(NODE).data
    reject = Decision.REJECT
    refused(heard, b"", reject, Reason.NOT_CANONICAL)
    refused(heard, good[:-1] + bytes([good[-1] ^ 1]), reject, Reason.BAD_SIGNATURE)
    refused(heard, seal(Commit(bytes(32), bytes(32))).data, reject, Reason.WRONG_KIND)
    refused(heard, Sealer(OWN, "aci-other").seal(NODE, NOW).data, reject, Reason.WRONG_NETWORK)
    refused(heard, seal(replace(CAPABILITY, free_slots=5)).data, reject, Reason.MALFORMED)
    for curve in ([500, 500], [600, 500], [0]):
        steps = tuple(PriceStep(load, 1_000) for load in curve)
        refused(heard, seal(replace(CAPABILITY, price_curve=steps)).data, reject, Reason.MALFORMED)
    assert heard.nodes(NOW) == []
    # None of it keeps the real one out.
    assert heard.hear(NEIGHBOUR, good, NOW, 0) is not None


def test_what_is_late_or_early_is_ignored(heard: RecordExchange) -> None:
    refused(heard, seal(NODE, at=NOW - LIFETIME).data, Decision.IGNORE, Reason.EXPIRED)
    refused(heard, seal(NODE, at=NOW + 60_000).data, Decision.IGNORE, Reason.FROM_FUTURE)


def test_an_older_record_does_not_replace_a_newer_one(heard: RecordExchange) -> None:
    old, new = seal(NODE, at=NOW - 1_000), seal(NODE)
    heard.hear(NEIGHBOUR, new.data, NOW, 0)
    for replayed in (old, new):
        refused(heard, replayed.data, Decision.IGNORE, Reason.REPLAYED, at=MIN_GAP_S + 1)
    assert heard.nodes(NOW) == [new]


def test_a_node_is_heard_now_and_then(heard: RecordExchange) -> None:
    first, second, third = (seal(NODE, at=NOW + number) for number in range(3))
    heard.hear(NEIGHBOUR, first.data, NOW, 0)
    refused(heard, second.data, Decision.IGNORE, Reason.FLOODED, at=MIN_GAP_S - 1)
    assert heard.hear(NEIGHBOUR, third.data, NOW, MIN_GAP_S) == third
    # Its models have gaps of their own.
    for root in range(10):
        heard.hear(NEIGHBOUR, seal(replace(CAPABILITY, model_root=bytes([root]) * 32)).data, NOW, MIN_GAP_S)


def test_a_withdrawal_is_heard_at_once_but_not_again_and_again(heard: RecordExchange) -> None:
    ended = replace(CAPABILITY, slots=0, free_slots=0)
    heard.hear(NEIGHBOUR, seal(CAPABILITY).data, NOW, 0)
    heard.hear(NEIGHBOUR, seal(ended, at=NOW + 1).data, NOW, 1)
    assert heard.providers(ROOT, NOW) == []
    refused(heard, seal(ended, at=NOW + 2).data, Decision.IGNORE, Reason.FLOODED, at=2)
    refused(heard, seal(CAPABILITY, at=NOW + 3).data, Decision.IGNORE, Reason.FLOODED, at=3)
    # What was taken back does not come back with an older record.
    refused(heard, seal(CAPABILITY).data, Decision.IGNORE, Reason.REPLAYED, at=100)
    heard.hear(NEIGHBOUR, seal(CAPABILITY, at=NOW + 4).data, NOW, 1 + MIN_GAP_S)
    assert heard.providers(ROOT, NOW)


def test_a_neighbour_passes_on_so_much_and_no_more(heard: RecordExchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BURST", 20.0)
    records = [seal(NODE, number).data for number in range(3, 44)]
    for data in records[:20]:
        heard.hear(NEIGHBOUR, data, NOW, 0)
    refused(heard, records[20], Decision.IGNORE, Reason.FLOODED)
    # Another one is not concerned.
    heard.hear(OWN.node_id, records[21], NOW, 0)
    heard.hear(NEIGHBOUR, records[22], NOW, 1 / RATE)
    refused(heard, records[23], Decision.IGNORE, Reason.FLOODED, at=1 / RATE)
    assert BURST > MAX_NODES / 2


def test_the_rates_of_neighbours_are_bounded(heard: RecordExchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_NEIGHBOURS", 3)
    for number in range(3, 10):
        heard.hear(NodeId(bytes([number]) * 32), seal(NODE, number).data, NOW, 0)
    assert list(heard._rates) == [NodeId(bytes([number]) * 32) for number in (7, 8, 9)]


def test_the_sample_is_bounded_and_no_flood_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_NODES", 20)
    heard = RecordExchange(NETWORK, OWN.node_id, b"salt")
    honest = [seal(NODE, number) for number in range(3, 33)]
    flood = [seal(NODE, number) for number in range(100, 130)]
    kept = [heard.hear(NEIGHBOUR, record.data, NOW, at) is not None for at, record in enumerate(honest)]
    assert kept[:20] == [True] * 20
    for at, record in enumerate(flood, 100):
        heard.hear(NEIGHBOUR, record.data, NOW, at)
    sample = {record.sender for record in heard.nodes(NOW)}
    assert len(sample) == 20
    # About as many of each as there are, though the flood came last: half and half.
    assert 5 <= len(sample & {record.sender for record in honest}) <= 15
    # Another node keeps others.
    other = RecordExchange(NETWORK, OWN.node_id, b"pepper")
    for at, record in enumerate([*honest, *flood]):
        other.hear(NEIGHBOUR, record.data, NOW, at)
    assert {record.sender for record in other.nodes(NOW)} != sample
