"""Envelopes: every reason to refuse one, and that nothing signed for one purpose stands for another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol import cbor
from aci_p2p.protocol.cbor import Value
from aci_p2p.protocol.envelope import MAX_SKEW_MS, VERSION, Envelope, Sealer, kind_of, open_envelope
from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.messages import KINDS, Abort, AbortCode, Award, Commit, Kind, Proof, Tokens
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import CONSUMER, NETWORK, NOW, PROVIDER
from tests.protocol.strategies import messages as messages_of

BODY = Abort(bytes(range(32)), AbortCode.BUSY, "not now")
LIFETIME = 60_000


def digest(domain: str, *parts: bytes) -> bytes:
    """The specification's hash, written anew."""
    framed = (len(part).to_bytes(8, "big") + part for part in (f"aci-p2p/1/{domain}".encode(), *parts))
    return hashlib.sha256(b"".join(framed)).digest()


def raw(
    *,
    domain: str = "sign/ABORT",
    signed_network: str = NETWORK,
    extra: dict[int, Value] | None = None,
    drop: int | None = None,
    **changes: Value,
) -> bytes:
    """An envelope with a good signature over whatever fields; `drop` takes one away behind the signature."""
    fields: dict[str, Value] = {
        "version": 1, "kind": 10, "network": NETWORK, "sender": CONSUMER.node_id.public_key, "sequence": 5,
        "issued_at": NOW, "expires_at": NOW + LIFETIME,
        "body": cbor.encode({1: BODY.job_id, 2: 2, 3: "not now", 4: 0}),
    }  # fmt: skip
    value: dict[int, Value] = dict(enumerate({**fields, **changes}.values(), 1)) | (extra or {})
    value[9] = CONSUMER.sign(digest(domain, signed_network.encode(), cbor.encode(value)))
    return cbor.encode({key: item for key, item in value.items() if key != drop})


def seal(body: object = BODY, *, lifetime_ms: int | None = None) -> Envelope[Any]:
    return Sealer(CONSUMER, NETWORK).seal(body, NOW, lifetime_ms=lifetime_ms)


def refuse(data: bytes, decision: Decision, reason: Reason, body: type[Any] = Abort, now: int | None = NOW) -> None:
    with pytest.raises(MessageRefused) as caught:
        open_envelope(data, body, network=NETWORK, now=now)
    assert caught.value.validation == Validation(decision, reason)
    assert isinstance(caught.value, RemoteError)
    assert caught.value.code == "message_refused"
    assert caught.value.message.startswith(f"message refused: {reason.replace('_', ' ')}")


def test_the_layout_is_the_specified_one() -> None:
    data = raw()
    envelope = open_envelope(data, Abort, network=NETWORK, now=NOW)
    assert envelope.body == BODY
    assert envelope.data == data
    assert envelope.sender == envelope.header.sender == CONSUMER.node_id
    assert envelope.digest == digest("envelope", data)
    assert (envelope.header.kind, envelope.header.sequence, envelope.header.network) == (Kind.ABORT, 5, NETWORK)


def test_sealed_as_specified() -> None:
    envelope = seal()
    assert envelope.data == raw(sequence=NOW << 10)
    assert envelope.header.version == VERSION == 1
    assert open_envelope(envelope.data, Abort, network=NETWORK, now=NOW) == envelope


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
@settings(max_examples=10)
@given(data=st.data())
def test_every_kind_is_sealed_and_opened(kind: Kind, data: st.DataObject) -> None:
    rules = KINDS[kind]
    body = data.draw(messages_of(rules.body))
    envelope = seal(body)
    assert open_envelope(envelope.data, rules.body, network=NETWORK, now=NOW) == envelope
    assert kind_of(envelope.data) is kind
    assert envelope.header.expires_at == NOW + rules.lifetime_ms


# Refusals.


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_size(kind: Kind) -> None:
    rules = KINDS[kind]
    refuse(b"\xff" * (rules.max_bytes + 1), Decision.REJECT, Reason.TOO_LARGE, rules.body)
    refuse(b"\xff" * rules.max_bytes, Decision.REJECT, Reason.NOT_CANONICAL, rules.body)


def test_encoding() -> None:
    refuse(b"", Decision.REJECT, Reason.NOT_CANONICAL)
    refuse(raw() + b"\0", Decision.REJECT, Reason.NOT_CANONICAL)
    refuse(raw(body=b"\xff"), Decision.REJECT, Reason.NOT_CANONICAL)
    refuse(raw(body=cbor.encode({1: BODY.job_id, 2: 2, 3: "", 4: 0}) + b"\0"), Decision.REJECT, Reason.NOT_CANONICAL)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"\x80",
        raw(drop=9),
        raw(drop=1),
        raw(extra={10: 0}),
        raw(kind=99),
        raw(version=True),
        raw(version="1"),
        raw(network="x" * 33),
        raw(sender=bytes(31)),
        raw(sequence=-1),
        raw(sequence=b""),
        raw(issued_at=-1),
        raw(expires_at="soon"),
        raw(body=b""),
        raw(body=[]),
        raw(body=cbor.encode(1)),
        raw(body=cbor.encode({1: BODY.job_id, 2: 2, 3: ""})),
        raw(body=cbor.encode({1: BODY.job_id, 2: 2, 3: "", 4: 0, 5: 0})),
        raw(body=cbor.encode({1: BODY.job_id, 2: 99, 3: "", 4: 0})),
        raw(body=cbor.encode({1: BODY.job_id[1:], 2: 2, 3: "", 4: 0})),
        raw(body=cbor.encode({1: BODY.job_id, 2: 2, 3: "x" * 513, 4: 0})),
    ],
)
def test_fields(data: bytes) -> None:
    refuse(data, Decision.REJECT, Reason.MALFORMED)


@pytest.mark.parametrize(
    "data", [raw(version=2), raw(version=0), raw(version=300), raw(version=2, extra={10: 0}), raw(version=2, drop=8)]
)
def test_later_versions_are_nobodys_fault(data: bytes) -> None:
    refuse(data, Decision.IGNORE, Reason.UNKNOWN_VERSION)
    with pytest.raises(MessageRefused) as caught:
        kind_of(data)
    assert caught.value.validation == Validation(Decision.IGNORE, Reason.UNKNOWN_VERSION)


def test_kind() -> None:
    refuse(seal(Commit(bytes(32), bytes(32))).data, Decision.REJECT, Reason.WRONG_KIND)
    refuse(seal(Commit(bytes(32), bytes(32))).data, Decision.REJECT, Reason.WRONG_KIND, Award)


def test_network() -> None:
    other = Sealer(CONSUMER, "aci-main")
    assert other.network == "aci-main"
    refuse(other.seal(BODY, NOW).data, Decision.REJECT, Reason.WRONG_NETWORK)


@pytest.mark.parametrize("lifetime", [0, -1, LIFETIME + 1, -NOW])
def test_lifetime(lifetime: int) -> None:
    refuse(raw(expires_at=NOW + lifetime), Decision.REJECT, Reason.BAD_LIFETIME)
    refuse(raw(expires_at=NOW + lifetime), Decision.REJECT, Reason.BAD_LIFETIME, now=None)
    with pytest.raises(LocalError, match="lives 60000 ms at most"):
        seal(lifetime_ms=lifetime)


def test_lifetime_at_its_edges() -> None:
    for lifetime in (1, LIFETIME):
        data = raw(expires_at=NOW + lifetime, sequence=NOW << 10)
        assert open_envelope(data, Abort, network=NETWORK, now=NOW).header.expires_at == NOW + lifetime
        assert seal(lifetime_ms=lifetime).data == data


def test_expiry() -> None:
    data = seal(lifetime_ms=10).data
    assert open_envelope(data, Abort, network=NETWORK, now=NOW + 9).body == BODY
    refuse(data, Decision.IGNORE, Reason.EXPIRED, now=NOW + 10)


def test_from_the_future() -> None:
    data = seal().data
    assert open_envelope(data, Abort, network=NETWORK, now=NOW - MAX_SKEW_MS).body == BODY
    refuse(data, Decision.IGNORE, Reason.FROM_FUTURE, now=NOW - MAX_SKEW_MS - 1)


@pytest.mark.parametrize("now", [None, NOW])
def test_without_a_clock(now: int | None) -> None:
    """A stored statement is read at any time; its signature still counts."""
    old = Sealer(CONSUMER, NETWORK).seal(BODY, 1_000).data
    if now is None:
        assert open_envelope(old, Abort, network=NETWORK, now=now).body == BODY
    else:
        refuse(old, Decision.IGNORE, Reason.EXPIRED, now=now)
    refuse(old[:-1] + b"\0", Decision.REJECT, Reason.BAD_SIGNATURE, now=None)


def test_signature_of_another() -> None:
    refuse(raw(sender=PROVIDER.node_id.public_key), Decision.REJECT, Reason.BAD_SIGNATURE)


def test_signed_for_another_purpose() -> None:
    """The same fields, signed under another kind or network: the domain is not only what the map says."""
    refuse(raw(domain="sign/AWARD"), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse(raw(domain="envelope"), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse(raw(signed_network="aci-main"), Decision.REJECT, Reason.BAD_SIGNATURE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", 7), ("network", "aci-tess"), ("sender", PROVIDER.node_id.public_key), ("sequence", 6),
     ("issued_at", NOW + 1), ("expires_at", NOW + LIFETIME - 1),
     ("body", cbor.encode({1: BODY.job_id, 2: 3, 3: "", 4: 0}))],
)  # fmt: skip
def test_every_field_is_signed(name: str, value: Value) -> None:
    changes: dict[str, Any] = {name: value}
    good, changed = cbor.decode(raw()), cbor.decode(raw(**changes))
    assert isinstance(good, dict)
    assert isinstance(changed, dict)
    forged = cbor.encode({**changed, 9: good[9]})
    body = KINDS[Kind(7 if name == "kind" else 10)].body
    with pytest.raises(MessageRefused) as caught:
        open_envelope(forged, body, network=value if name == "network" else NETWORK, now=NOW)  # type: ignore[arg-type]
    assert caught.value.validation == Validation(Decision.REJECT, Reason.BAD_SIGNATURE)


def test_no_bit_may_flip() -> None:
    data = seal().data
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(MessageRefused):
                open_envelope(bytes(flipped), Abort, network=NETWORK, now=NOW)


@pytest.mark.parametrize(
    "key",
    [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f", b"\xff" * 32],
    ids=["order 4", "identity", "order 2", "not canonical"],
)
def test_keys_for_which_anything_verifies(key: bytes) -> None:
    """Small-order public keys, under which R = identity, S = 0 would sign every message."""
    good = cbor.decode(raw())
    assert isinstance(good, dict)
    for signature in (b"\1" + bytes(63), bytes(64), key + bytes(32)):
        refuse(cbor.encode({**good, 4: key, 9: signature}), Decision.REJECT, Reason.BAD_SIGNATURE)


def test_signatures_are_not_malleable() -> None:
    """S plus the group order verifies under sloppy implementations (RFC 8032 section 8.4)."""
    order = 2**252 + 27_742_317_777_372_353_535_851_937_790_883_648_493
    good = cbor.decode(raw())
    assert isinstance(good, dict)
    signature = good[9]
    assert isinstance(signature, bytes)
    s = int.from_bytes(signature[32:], "little") + order
    refuse(cbor.encode({**good, 9: signature[:32] + s.to_bytes(32, "little")}), Decision.REJECT, Reason.BAD_SIGNATURE)


# Sealing.


def test_sequence_grows_whatever_the_clock_does() -> None:
    sealer = Sealer(CONSUMER, NETWORK)
    assert sealer.node_id == CONSUMER.node_id
    clock = [NOW, NOW, NOW + 1, NOW - 60_000, NOW - 60_000, NOW + 5]
    sequences = [sealer.seal(BODY, now).header.sequence for now in clock]
    base = NOW << 10
    assert sequences == [base, base + 1, base + 1024, base + 1025, base + 1026, base + 5 * 1024]


@pytest.mark.parametrize(
    "body",
    [
        Abort(bytes(31), AbortCode.BUSY, ""),
        Abort(bytes(32), AbortCode.BUSY, "x" * 513),
        Abort(bytes(32), AbortCode.BUSY, "\ud800"),
    ],
)
def test_bodies_out_of_bounds_are_not_sealed(body: Abort) -> None:
    with pytest.raises(LocalError):
        seal(body)


def test_a_network_id_out_of_bounds() -> None:
    assert Sealer(CONSUMER, "é" * 16).seal(BODY, NOW).header.network == "é" * 16
    with pytest.raises(LocalError, match=r"Header\.network"):
        Sealer(CONSUMER, "é" * 16 + "x").seal(BODY, NOW)


def test_what_would_be_too_large_is_not_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind has fields so large, so one gets a smaller envelope here."""
    largest = 2_000
    monkeypatch.setitem(KINDS, Kind.TOKENS, replace(KINDS[Kind.TOKENS], max_bytes=largest))

    def part(size: int) -> Tokens:
        return Tokens(bytes(32), 0, (), "x" * size, 1)

    size = 1_000 + largest - len(seal(part(1_000)).data)
    assert len(seal(part(size)).data) == largest
    with pytest.raises(LocalError, match=f"takes {largest + 1} bytes, {largest} at most"):
        seal(part(size + 1))


def test_statements_outlive_messages() -> None:
    year = 365 * 24 * 3_600 * 1_000
    kept = {Kind.PROOF, Kind.RECEIPT, Kind.VOUCHER}
    assert {kind for kind, rules in KINDS.items() if rules.lifetime_ms == 10 * year} == kept
    assert {rules.lifetime_ms for kind, rules in KINDS.items() if kind not in kept} == {
        60_000, 3 * 3_600_000,
    }  # fmt: skip


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"\xff", lambda: raw(drop=9), lambda: raw(kind=0)])
def test_the_kind_of_no_envelope(make: Callable[[], bytes]) -> None:
    with pytest.raises(MessageRefused):
        kind_of(make())


def test_refusals_say_more_where_there_is_more() -> None:
    with pytest.raises(MessageRefused, match=r"message refused: malformed \(Header has missing or unknown fields\)"):
        open_envelope(raw(drop=2), Abort, network=NETWORK, now=NOW)
    with pytest.raises(MessageRefused, match=r"message refused: not canonical \(truncated\)"):
        open_envelope(b"", Proof, network=NETWORK, now=NOW)


def test_what_is_opened_again_is_checked_against_the_clock_again() -> None:
    """Its signature is not: that was good, and is kept with all that it signs."""
    envelope = seal()
    expires_at = envelope.header.expires_at
    forged = envelope.data[:-1] + bytes([envelope.data[-1] ^ 1])
    for _ in range(2):
        assert open_envelope(envelope.data, Abort, network=NETWORK, now=expires_at - 1) == envelope
        refuse(envelope.data, Decision.IGNORE, Reason.EXPIRED, now=expires_at)
        refuse(forged, Decision.REJECT, Reason.BAD_SIGNATURE)
        refuse(envelope.data, Decision.REJECT, Reason.WRONG_KIND, Award)
        with pytest.raises(MessageRefused, match="wrong network"):
            open_envelope(envelope.data, Abort, network="aci-other", now=NOW)
