"""The rules by which signed records are stored and chosen."""

from __future__ import annotations

from typing import Any, Final

import pytest

from aci_p2p.dht import RecordRules, capability_key, node_key
from aci_p2p.dht.announcing import JITTER, REANNOUNCE_S
from aci_p2p.dht.discovery import RECORD_LIFETIME_MS
from aci_p2p.network.api import MAX_RECORD_KEY_BYTES
from aci_p2p.network.checks import RECORD_NAMESPACE
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER, RECORD_SECONDS
from aci_p2p.protocol.envelope import MAX_SKEW_MS, Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import KINDS, Kind
from aci_p2p.protocol.publications import MAX_ADDRESSES, CapabilityRecord, NodeRecord
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import ENGINE, NETWORK, NOW, PRICES

KEY: Final = KeyPair(bytes([1]) * 32)
NODE: Final = KEY.node_id
OTHER: Final = KeyPair(bytes([2]) * 32)
ROOT: Final = bytes([255]) * 32
LIFETIME: Final = 3 * 3_600_000
"""Milliseconds; the longest life of a record."""
NODE_RECORD: Final = NodeRecord(("/ip4/127.0.0.1/tcp/1",), ("provider",), "aci-p2p/1")
CAPABILITY: Final = CapabilityRecord(
    model_root=ROOT,
    model_name="model",
    context=8_192,
    engine=ENGINE,
    **PRICES,
    slots=4,
    addresses=(),
    free_slots=4,
    price_curve=(),
)
RULES: Final = RecordRules(NETWORK, lambda: NOW)


def seal(body: Any, key: KeyPair = KEY, *, at: int = NOW, network: str = NETWORK) -> Envelope[Any]:  # noqa: ANN401 - any message
    return Sealer(key, network).seal(body, at)


def refused(key: str, value: bytes, decision: Decision, reason: Reason, rules: RecordRules = RULES) -> None:
    for check in (rules.open, rules.validate):
        with pytest.raises(MessageRefused) as caught:
            check(key, value)
        assert caught.value.validation == Validation(decision, reason)


def test_keys_name_the_node_and_the_model() -> None:
    assert node_key(NODE) == f"/aci/node/{NODE}"
    assert capability_key(ROOT, NODE) == f"/aci/capability/JEKNVnkbo3jma5nREBBJCDoXFVeKkD56V3xKrvRmWxFG/{NODE}"
    assert capability_key(bytes(32), NODE) != capability_key(ROOT, NODE) != capability_key(ROOT, OTHER.node_id)


def test_the_network_takes_every_key_of_ours() -> None:
    longest = capability_key(ROOT, NodeId(bytes([255]) * 32))
    assert longest.startswith(RECORD_NAMESPACE)
    assert len(longest) <= MAX_RECORD_KEY_BYTES
    assert MAX_ADDRESSES <= MAX_ADDRESSES_PER_PEER


@pytest.mark.parametrize("kind", [Kind.NODE_RECORD, Kind.CAPABILITY_RECORD])
def test_a_record_is_kept_for_as_long_as_it_holds_and_renewed_twice_within(kind: Kind) -> None:
    """So that its holders need not pass it on."""
    assert KINDS[kind].lifetime_ms == 1_000 * RECORD_SECONDS == RECORD_LIFETIME_MS == LIFETIME
    assert 2 * REANNOUNCE_S * (1 + JITTER) < RECORD_SECONDS


@pytest.mark.parametrize(
    ("key", "body"), [(node_key(NODE), NODE_RECORD), (capability_key(ROOT, NODE), CAPABILITY)], ids=["node", "model"]
)
def test_a_record_under_its_key(key: str, body: Any) -> None:  # noqa: ANN401 - any message
    record = seal(body)
    RULES.validate(key, record.data)
    assert RULES.open(key, record.data) == record
    # A clock may be late by the skew; a record lives for an hour, and no longer.
    assert RecordRules(NETWORK, lambda: NOW - MAX_SKEW_MS).open(key, record.data) == record
    assert RecordRules(NETWORK, lambda: NOW + LIFETIME - 1).open(key, record.data) == record
    refused(key, record.data, Decision.IGNORE, Reason.EXPIRED, RecordRules(NETWORK, lambda: NOW + LIFETIME))
    refused(key, record.data, Decision.IGNORE, Reason.FROM_FUTURE, RecordRules(NETWORK, lambda: NOW - MAX_SKEW_MS - 1))
    refused(key, record.data, Decision.REJECT, Reason.WRONG_NETWORK, RecordRules("aci-other", lambda: NOW))
    refused(key, seal(body, network="aci-other").data, Decision.REJECT, Reason.WRONG_NETWORK)
    refused(key, seal(body, OTHER).data, Decision.REJECT, Reason.BAD_RECORD_KEY)
    refused(key, record.data[:-1] + bytes([record.data[-1] ^ 1]), Decision.REJECT, Reason.BAD_SIGNATURE)
    refused(key, b"", Decision.REJECT, Reason.NOT_CANONICAL)
    refused(key, bytes(4_097), Decision.REJECT, Reason.TOO_LARGE)


def test_a_record_under_another_kind_of_key() -> None:
    refused(node_key(NODE), seal(CAPABILITY).data, Decision.REJECT, Reason.WRONG_KIND)
    refused(capability_key(ROOT, NODE), seal(NODE_RECORD).data, Decision.REJECT, Reason.WRONG_KIND)


@pytest.mark.parametrize(
    "key",
    [
        capability_key(bytes(32), NODE),
        capability_key(ROOT, OTHER.node_id),
        capability_key(ROOT[:31], NODE),
        capability_key(ROOT, NODE) + "/",
        capability_key(ROOT, NODE)[:-1],
        capability_key(ROOT, NODE).replace("/aci/capability/", "/aci/capability//"),
        "/aci/capability/",
        f"/aci/capability/{NODE}",
    ],
)
def test_a_capability_under_a_key_that_is_not_its_own(key: str) -> None:
    refused(key, seal(CAPABILITY).data, Decision.REJECT, Reason.BAD_RECORD_KEY)


@pytest.mark.parametrize("key", [node_key(OTHER.node_id), node_key(NODE) + "/", "/aci/node/", f"/aci/node/{NODE}\0"])
def test_a_node_record_under_a_key_that_is_not_its_own(key: str) -> None:
    refused(key, seal(NODE_RECORD).data, Decision.REJECT, Reason.BAD_RECORD_KEY)


@pytest.mark.parametrize("key", ["", "/aci/", f"/aci/nodes/{NODE}", f"/pk/{NODE}", f"aci/node/{NODE}", str(NODE)])
def test_a_key_of_no_kind(key: str) -> None:
    refused(key, seal(NODE_RECORD).data, Decision.REJECT, Reason.BAD_RECORD_KEY)


def test_a_key_that_is_too_long_is_refused_unread() -> None:
    for start in ("/aci/node/", "/aci/capability/", ""):
        refused(start + "1" * (MAX_RECORD_KEY_BYTES + 1 - len(start)), b"", Decision.REJECT, Reason.BAD_RECORD_KEY)
        if start:
            refused(start + "1" * (MAX_RECORD_KEY_BYTES - len(start)), b"", Decision.REJECT, Reason.NOT_CANONICAL)


# Choosing.


def test_the_newest_is_chosen() -> None:
    key = node_key(NODE)
    old, new, newer = (seal(NODE_RECORD, at=NOW - 20 + at).data for at in (0, 10, 20))
    assert RULES.select(key, [old, new, newer]) == 2
    assert RULES.select(key, [newer, new, old]) == 0
    assert RULES.select(key, [old, newer, new]) == 1
    assert RULES.select(key, [old]) == 0


def test_of_equals_the_last_is_chosen() -> None:
    """So that storing a record again refreshes it."""
    key = node_key(NODE)
    old, same = seal(NODE_RECORD, at=NOW - 10).data, seal(NODE_RECORD).data
    twin = seal(NodeRecord((), (), "other")).data
    assert RULES.select(key, [same, same]) == 1
    assert RULES.select(key, [same, twin, old]) == 1
    assert RULES.select(key, [twin, same]) == 1


def test_what_is_refused_is_not_chosen() -> None:
    key = node_key(NODE)
    good = seal(NODE_RECORD, at=NOW - LIFETIME + 1).data
    bad = [
        b"",
        seal(NODE_RECORD, OTHER).data,
        seal(NODE_RECORD, at=NOW - LIFETIME).data,
        seal(NODE_RECORD, at=NOW + MAX_SKEW_MS + 1).data,
        seal(NODE_RECORD, network="aci-other").data,
        seal(CAPABILITY).data,
    ]
    assert RULES.select(key, [*bad, good]) == len(bad)
    assert RULES.select(key, [good, *bad]) == 0
    # Whoever reads the chosen one checks it again.
    assert RULES.select(key, bad) == 0
