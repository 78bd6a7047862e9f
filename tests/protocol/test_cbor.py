"""Strict CBOR: the vectors of RFC 8949, cbor2 as an oracle, and everything that must be refused."""

from __future__ import annotations

import time
from typing import cast

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol import cbor
from aci_p2p.protocol.cbor import MAX_BYTES, MAX_DEPTH, MAX_ITEMS, CborError, NotEncodable, Value
from aci_p2p.protocol.errors import LocalError, RemoteError

UINT64 = (1 << 64) - 1
INTEGERS = st.integers(-UINT64 - 1, UINT64) | st.sampled_from(
    [sign + edge for edge in (0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63) for sign in (0, 1)]
)
LEAVES: st.SearchStrategy[Value] = INTEGERS | st.booleans() | st.binary(max_size=40) | st.text(max_size=20)
VALUES: st.SearchStrategy[Value] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(INTEGERS, inner, max_size=5),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    """Equal, types included (True is not 1)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list) and isinstance(right, list):
        ours, theirs = cast("list[object]", left), cast("list[object]", right)
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(left, dict) and isinstance(right, dict):
        ours_by, theirs_by = cast("dict[object, object]", left), cast("dict[object, object]", right)
        return ours_by.keys() == theirs_by.keys() and all(same(ours_by[key], theirs_by[key]) for key in ours_by)
    return left == right


def refuse(data: bytes, problem: str, offset: int | None = None, *, max_bytes: int = MAX_BYTES) -> None:
    with pytest.raises(CborError) as caught:
        cbor.decode(data, max_bytes=max_bytes)
    error = caught.value
    assert problem in error.problem
    assert offset is None or error.offset == offset
    assert error.message == f"not deterministic CBOR: {error.problem} at byte {error.offset}"
    assert error.code == "cbor"
    assert isinstance(error, RemoteError)


# RFC 8949, appendix A.

ACCEPTED: list[tuple[str, Value]] = [
    ("00", 0), ("01", 1), ("0a", 10), ("17", 23), ("1818", 24), ("1819", 25), ("1864", 100), ("1903e8", 1_000),
    ("1a000f4240", 1_000_000), ("1b000000e8d4a51000", 1_000_000_000_000), ("1bffffffffffffffff", UINT64),
    ("3bffffffffffffffff", -UINT64 - 1), ("20", -1), ("29", -10), ("3863", -100), ("3903e7", -1_000),
    ("f4", False), ("f5", True), ("40", b""), ("4401020304", b"\1\2\3\4"), ("60", ""), ("6161", "a"),
    ("6449455446", "IETF"), ("62225c", '"\\'), ("62c3bc", "\u00fc"), ("63e6b0b4", "\u6c34"),
    ("64f0908591", "\U00010151"), ("80", []), ("83010203", [1, 2, 3]), ("8301820203820405", [1, [2, 3], [4, 5]]),
    ("98190102030405060708090a0b0c0d0e0f101112131415161718181819", list(range(1, 26))), ("a0", {}),
    ("a201020304", {1: 2, 3: 4}),
]  # fmt: skip
REFUSED = [
    ("c249010000000000000000", "tag"), ("c349010000000000000000", "tag"), ("f90000", "floating"),
    ("f98000", "floating"), ("f93c00", "floating"), ("fb3ff199999999999a", "floating"), ("f93e00", "floating"),
    ("f97bff", "floating"), ("fa47c35000", "floating"), ("fa7f7fffff", "floating"), ("fb7e37e43c8800759c", "floating"),
    ("f90001", "floating"), ("f90400", "floating"), ("f9c400", "floating"), ("fbc010666666666666", "floating"),
    ("f97c00", "floating"), ("f97e00", "floating"), ("f9fc00", "floating"), ("fa7f800000", "floating"),
    ("fa7fc00000", "floating"), ("faff800000", "floating"), ("fb7ff0000000000000", "floating"),
    ("fb7ff8000000000000", "floating"), ("fbfff0000000000000", "floating"), ("f6", "null"), ("f7", "simple"),
    ("f0", "simple"), ("f8ff", "reserved"), ("c074323031332d30332d32315432303a30343a30305a", "tag"),
    ("c11a514b67b0", "tag"), ("c1fb41d452d9e5800000", "tag"), ("d74401020304", "tag"), ("d818456449455446", "tag"),
    ("d82076687474703a2f2f7777772e6578616d706c652e636f6d", "tag"), ("a26161016162820203", "key"),
    ("826161a161626163", "key"), ("a56161614161626142616361436164614461656145", "key"),
    ("5f42010243030405ff", "indefinite"), ("7f657374726561646d696e67ff", "indefinite"), ("9fff", "indefinite"),
    ("9f018202039f0405ffff", "indefinite"), ("9f01820203820405ff", "indefinite"), ("83018202039f0405ff", "indefinite"),
    ("83019f0203ff820405", "indefinite"), ("9f0102030405060708090a0b0c0d0e0f101112131415161718181819ff", "indefinite"),
    ("bf61610161629f0203ffff", "indefinite"), ("826161bf61626163ff", "indefinite"),
    ("bf6346756ef563416d7421ff", "indefinite"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "value"), ACCEPTED)
def test_vectors_within_the_subset(data: str, value: Value) -> None:
    assert same(cbor.decode(bytes.fromhex(data)), value)
    assert cbor.encode(value).hex() == data


@pytest.mark.parametrize(("data", "problem"), REFUSED)
def test_vectors_outside_the_subset(data: str, problem: str) -> None:
    cbor2.loads(bytes.fromhex(data))  # well-formed, only not ours
    refuse(bytes.fromhex(data), problem)


# cbor2 as an oracle.


@given(VALUES)
def test_what_we_encode(value: Value) -> None:
    data = cbor.encode(value)
    assert same(cbor.decode(data), value)
    assert same(cbor2.loads(data), value)


@given(VALUES)
def test_what_others_encode(value: Value) -> None:
    """cbor2 keeps the order of insertion: its bytes pass exactly when they are ours."""
    theirs = cbor2.dumps(value)
    if theirs == cbor.encode(value):
        assert same(cbor.decode(theirs), value)
    else:
        refuse(theirs, "out of order")


def agree(data: bytes) -> None:
    """We refuse the bytes, or read what cbor2 reads and would write the same."""
    try:
        value = cbor.decode(data)
    except CborError:
        return
    assert cbor.encode(value) == data
    assert same(cbor2.loads(data), value)


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    agree(data)


@settings(max_examples=200)
@given(VALUES, st.data())
def test_any_change_of_good_bytes(value: Value, data: st.DataObject) -> None:
    good = bytearray(cbor.encode(value))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    agree(bytes(good))


# Refusals, one by one.


@pytest.mark.parametrize("major", range(6))
@pytest.mark.parametrize(
    "argument",
    [
        "1800",
        "1817",
        "190000",
        "190018",
        "1900ff",
        "1a00000000",
        "1a0000ffff",
        "1b0000000000000000",
        "1b00000000ffffffff",
    ],
)
def test_heads_that_are_not_the_shortest(major: int, argument: str) -> None:
    data = bytes.fromhex(argument)
    refuse(bytes([data[0] | major << 5]) + data[1:], "shortest", 0)


@pytest.mark.parametrize("value", [23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, UINT64])
def test_heads_at_their_edges(value: int) -> None:
    size = 1 if value <= 23 else 2 if value < 256 else 3 if value < 65_536 else 5 if value < 2**32 else 9
    for number in (value, -1 - value):
        data = cbor.encode(number)
        assert len(data) == size
        assert cbor.decode(data) == number


@pytest.mark.parametrize("major", range(8))
@pytest.mark.parametrize("info", [28, 29, 30, 31])
def test_heads_that_are_reserved_or_indefinite(major: int, info: int) -> None:
    refuse(bytes([major << 5 | info]) + bytes(16), "indefinite, reserved", 0)


@pytest.mark.parametrize("argument", [value for value in range(32) if value not in (20, 21)])
def test_simple_values_but_booleans(argument: int) -> None:
    refuse(bytes([7 << 5 | argument]) + bytes(8), "simple value" if argument < 24 else "floating point", 0)


@pytest.mark.parametrize("number", range(24))
def test_tags(number: int) -> None:
    refuse(bytes([6 << 5 | number]), "tag", 0)
    refuse(bytes([6 << 5 | number, 0]), "tag", 0)


def test_keys_in_bytewise_order() -> None:
    """RFC 8949 4.2.1 sorts -1 (20) behind 24 (1818); RFC 7049 sorted the shorter one first."""
    assert cbor.encode({-1: 0, 24: 0, 10: 0}).hex() == "a30a001818002000"
    assert cbor.decode(bytes.fromhex("a30a001818002000")) == {10: 0, 24: 0, -1: 0}
    refuse(cbor2.dumps({-1: 0, 24: 0}, canonical=True), "out of order", 3)
    refuse(bytes.fromhex("a302000100"), "out of order", 3)


@pytest.mark.parametrize("key", [0, 23, 24, 300, -1, -300])
def test_keys_repeated(key: int) -> None:
    encoded = cbor.encode(key)
    refuse(b"\xa2" + encoded + b"\0" + encoded + b"\1", "repeated", 2 + len(encoded))


@pytest.mark.parametrize("key", ["40", "60", "80", "a0", "c100", "f4"])
def test_keys_that_are_no_integers(key: str) -> None:
    refuse(bytes.fromhex("a1" + key + "00"), "a map key that is not an integer", 1)


@pytest.mark.parametrize("data", ["61ff", "62c328", "63e28228", "63eda080", "62c080", "64f4908080", "61c3"])
def test_text_that_is_not_utf8(data: str) -> None:
    """Stray and missing continuation bytes, a surrogate, an overlong form, beyond U+10FFFF, a cut character."""
    refuse(bytes.fromhex("81" + data), "text that is not UTF-8", 1)


@pytest.mark.parametrize(
    ("data", "offset"),
    [("", 0), ("18", 0), ("1901", 0), ("1a010101", 0), ("1b01010101010101", 0), ("42ff", 0), ("81", 0), ("8100"[:2], 0),
     ("820018", 2), ("a1", 0), ("a101", 2), ("a10142ff", 2), ("624f", 0)],
)  # fmt: skip
def test_truncated(data: str, offset: int) -> None:
    refuse(bytes.fromhex(data), "", offset)


@given(VALUES)
def test_every_prefix_is_refused(value: Value) -> None:
    data = cbor.encode(value)
    for end in range(len(data)):
        with pytest.raises(CborError):
            cbor.decode(data[:end])


@given(VALUES, st.binary(min_size=1, max_size=3))
def test_nothing_may_follow(value: Value, more: bytes) -> None:
    data = cbor.encode(value)
    refuse(data + more, "trailing bytes", len(data))


@pytest.mark.parametrize(
    "data",
    ["9bffffffffffffffff", "bbffffffffffffffff", "5bffffffffffffffff", "7bffffffffffffffff", "9affffffff", "baffffffff",
     "5affffffff", "7affffffff", "99ffff", "b9ffff", "9b7fffffffffffffff" + "00" * 64, "8000"],
)  # fmt: skip
def test_announcements_beyond_the_document(data: str) -> None:
    refuse(bytes.fromhex(data), "", 0 if data != "8000" else 1)


def nested(levels: int) -> list[Value]:
    value: list[Value] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_depth() -> None:
    """Values may lie in eight arrays or maps, not in nine."""
    deepest = nested(MAX_DEPTH + 1)
    assert cbor.decode(cbor.encode(deepest)) == deepest
    assert cbor.decode(b"\x81" * MAX_DEPTH + b"\0") is not None
    assert cbor.decode(b"\xa1\0" * MAX_DEPTH + b"\0") is not None
    refuse(b"\x81" * (MAX_DEPTH + 1) + b"\0", "nested too deep", MAX_DEPTH + 1)
    refuse(b"\xa1\0" * (MAX_DEPTH + 1) + b"\0", "nested too deep", 2 * (MAX_DEPTH + 1))
    refuse(b"\x81" * 100_000, "nested too deep")
    with pytest.raises(NotEncodable, match="deep"):
        cbor.encode([deepest])
    assert cbor.encode({0: nested(MAX_DEPTH)}) == b"\xa1\0" + b"\x81" * (MAX_DEPTH - 1) + b"\x80"
    with pytest.raises(NotEncodable, match="deep"):
        cbor.encode({0: deepest})


def test_size() -> None:
    largest = bytes(MAX_BYTES - 5)
    data = cbor.encode(largest)
    assert len(data) == MAX_BYTES
    assert cbor.decode(data) == largest
    refuse(cbor.encode(bytes(MAX_BYTES - 4)), f"more than {MAX_BYTES} bytes", MAX_BYTES)
    assert cbor.decode(b"\x42ab", max_bytes=3) == b"ab"
    refuse(b"\x42ab", "more than 2 bytes", 2, max_bytes=2)
    assert cbor.decode(cbor.encode(bytes(MAX_BYTES)), max_bytes=2 * MAX_BYTES) == bytes(MAX_BYTES)


def test_items_of_the_whole_document() -> None:
    most: list[Value] = [False] * MAX_ITEMS
    assert cbor.decode(cbor.encode(most)) == most
    refuse(cbor.encode([*most, False]), "more items", 0)
    half: list[Value] = [False] * (MAX_ITEMS // 2 - 1)
    assert cbor.decode(cbor.encode([half, half])) == [half, half]
    refuse(cbor.encode([half, [*half, False]]), "more items")
    whole = dict.fromkeys(range(MAX_ITEMS), False)
    assert cbor.decode(cbor.encode(cast("Value", whole))) == whole
    refuse(cbor.encode({**whole, MAX_ITEMS: False}), "more items", 0)


def test_a_document_of_nothing_but_arrays_is_cheap() -> None:
    row = cbor.encode(cast("Value", [[]] * 65_535))
    start = time.thread_time()
    refuse(b"\x8f" + row * 15, "more items")
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    "value",
    [None, 1.0, (1,), {1}, bytearray(b"a"), memoryview(b"a"), object(), UINT64 + 1, -UINT64 - 2, {"a": 1}, {b"a": 1},
     {True: 1}, {None: 1}, {1.0: 1}, {UINT64 + 1: 0}, "\ud800", {1: "\udfff"}, [None], {1: None}, [[1.5]]],
)  # fmt: skip
def test_what_has_no_encoding(value: object) -> None:
    with pytest.raises(NotEncodable) as caught:
        cbor.encode(cast("Value", value))
    assert caught.value.code == "not_encodable"
    assert isinstance(caught.value, LocalError)
