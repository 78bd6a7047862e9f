"""Codecs at their bounds, declarations, and every message there and back."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from typing import Annotated, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol import cbor, messages, publications, terms
from aci_p2p.protocol.cbor import Value
from aci_p2p.protocol.envelope import Header
from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import KIND_OF, KINDS, BidSummary, Body, Kind, Turn
from aci_p2p.protocol.pricing import BPS, itemise
from aci_p2p.protocol.proof import ProofFile
from aci_p2p.protocol.publications import TOKEN_PRICE, Engine
from aci_p2p.protocol.terms import FEE, Verification
from aci_p2p.protocol.wire import (
    DIGEST,
    UINT64_MAX,
    Amount,
    Bytes,
    Codec,
    EnumOf,
    ListOf,
    Malformed,
    Node,
    Struct,
    Text,
    Uint,
    Wire,
    cddl_name,
    cddl_of,
    fields_of,
    from_value,
    to_value,
)
from tests.protocol.strategies import messages as messages_of


class Colour(IntEnum):
    RED = 1
    BLUE = 3


@dataclass(frozen=True, slots=True)
class Point:
    y: Annotated[int, Wire(2, Uint(10))]
    x: Annotated[int, Wire(1, Uint(10))]


@dataclass(frozen=True, slots=True)
class Line:
    points: Annotated[tuple[Point, ...], Wire(5, ListOf(Struct(Point), 2))]


NODE = bytes(range(32))

GOOD: list[tuple[Codec[Any], Any, Value]] = [
    (Uint(), 0, 0),
    (Uint(), UINT64_MAX, UINT64_MAX),
    (Uint(5), 5, 5),
    (Bytes(2), b"ab", b"ab"),
    (Bytes(4, minimum=1), b"a", b"a"),
    (Bytes(4, minimum=1), b"abcd", b"abcd"),
    (Bytes(1, minimum=0), b"", b""),
    (DIGEST, bytes(32), bytes(32)),
    (Text(4), "", ""),
    (Text(4), "éé", "éé"),
    (Amount(), 0, b""),
    (Amount(), 255, b"\xff"),
    (Amount(), 256, b"\x01\x00"),
    (Amount(), (1 << 128) - 1, b"\xff" * 16),
    (Amount(2), 65_535, b"\xff\xff"),
    (Node(), NodeId(NODE), NODE),
    (EnumOf(Colour), Colour.BLUE, 3),
    (ListOf(Uint(9), 2), (), []),
    (ListOf(Uint(9), 2), (1, 9), [1, 9]),
    (Struct(Point), Point(x=1, y=2), {1: 1, 2: 2}),
]


def test_integers_end_at_64_bits() -> None:
    assert UINT64_MAX == 2**64 - 1


@pytest.mark.parametrize(("codec", "value", "wire_value"), GOOD)
def test_codecs_within_bounds(codec: Codec[Any], value: object, wire_value: Value) -> None:
    encoded = codec.encode(value)
    assert (encoded, type(encoded)) == (wire_value, type(wire_value))
    decoded = codec.decode(wire_value)
    assert (decoded, type(decoded)) == (value, type(value))


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (Uint(), -1),
        (Uint(), UINT64_MAX + 1),
        (Uint(5), 6),
        (Bytes(2), b"a"),
        (Bytes(2), b"abc"),
        (Bytes(4, minimum=1), b""),
        (Bytes(4, minimum=1), b"abcde"),
        (Text(4), "éée"),
        (Text(3), "aaaa"),
        (Amount(), -1),
        (Amount(), 1 << 128),
        (Amount(2), 65_536),
        (ListOf(Uint(9), 2), (1, 2, 3)),
        (ListOf(Uint(9), 2), (10,)),
        (Struct(Point), Point(x=1, y=11)),
    ],
)
def test_codecs_do_not_write_out_of_bounds(codec: Codec[Any], value: object) -> None:
    with pytest.raises(LocalError):
        codec.encode(value)


BAD: list[tuple[Codec[Any], list[Value]]] = [
    (Uint(5), [-1, 6, True, False, b"", "1", [], {}]),
    (Uint(), [-1]),
    (Bytes(2), [b"a", b"abc", "ab", 5, True, [1, 2], {}]),
    (Bytes(4, minimum=1), [b"", b"abcde"]),
    (Text(4), ["éée", b"aa", 1, False, [], {}]),
    (Amount(), [b"\0", b"\0\1", b"\1" * 17, 5, "", [], {}, True]),
    (Amount(2), [b"\1\0\0"]),
    (Node(), [NODE[:-1], NODE + b"\0", b"", "a" * 32, 1, [], {}]),
    (EnumOf(Colour), [0, 2, 4, -1, True, False, b"", "RED", [], {}]),
    (ListOf(Uint(9), 2), [[1, 2, 3], [10], [True], 1, b"", "", {}, {0: 1}]),
    (Struct(Point), [{1: 1}, {}, {1: 1, 2: 2, 3: 3}, {1: 1, 3: 2}, {1: 1, 2: 11}, [1, 1], 1]),
]


@pytest.mark.parametrize(("codec", "value"), [(codec, value) for codec, values in BAD for value in values])
def test_codecs_do_not_read_out_of_bounds(codec: Codec[Any], value: Value) -> None:
    with pytest.raises(Malformed) as caught:
        codec.decode(value)
    assert caught.value.code == "malformed"
    assert isinstance(caught.value, RemoteError)


@pytest.mark.parametrize(
    ("codec", "cddl"),
    [
        (Uint(), "uint"),
        (Uint(5), "0..5"),
        (Bytes(2), "bstr .size 2"),
        (Bytes(4, minimum=1), "bstr .size (1..4)"),
        (Text(4), "tstr .size (0..4)"),
        (Amount(), "amount"),
        (Amount(2), "bstr .size (0..2)"),
        (Node(), "node-id"),
        (EnumOf(Colour), "1 / 3"),
        (ListOf(Uint(9), 2), "[0*2 0..9]"),
        (Struct(Point), "point"),
    ],
)
def test_cddl_of_codecs(codec: Codec[Any], cddl: str) -> None:
    assert codec.cddl() == cddl


def test_cddl_of_a_message() -> None:
    assert cddl_of(Point) == "point = {\n  1: 0..10, ; x\n  2: 0..10, ; y\n}"
    assert cddl_name(BidSummary) == "bid-summary"


def test_errors_name_the_field() -> None:
    with pytest.raises(LocalError, match=re.escape("Line.points: Point.x: 11 is not between 0 and 10")):
        to_value(Line((Point(x=11, y=0),)))
    with pytest.raises(Malformed, match=re.escape("Line.points: Point.x: expected an integer between 0 and 10")):
        from_value(Line, {5: [{1: 11, 2: 0}]})
    with pytest.raises(Malformed, match=re.escape("Line.points: Point has missing or unknown fields")):
        from_value(Line, {5: [{1: 1}]})
    with pytest.raises(Malformed, match="Line is not a map"):
        from_value(Line, [])


def test_declarations_are_checked() -> None:
    @dataclass(frozen=True, slots=True)
    class Bare:
        x: int

    @dataclass(frozen=True, slots=True)
    class Double:
        x: Annotated[int, Wire(1, Uint()), Wire(2, Uint())]

    @dataclass(frozen=True, slots=True)
    class Clash:
        x: Annotated[int, Wire(1, Uint())]
        y: Annotated[int, Wire(1, Uint())]

    for cls, problem in ((Bare, "Bare.x"), (Double, "Double.x"), (Clash, "key twice")):
        with pytest.raises(TypeError, match=problem):
            fields_of(cls)


def test_fields_come_in_order_of_their_keys() -> None:
    assert [(name, wire.key) for name, wire in fields_of(Point)] == [("x", 1), ("y", 2)]


# Every message.

DECLARED = [
    Header,
    ProofFile,
    *(
        cls
        for module in (messages, publications, terms)
        for cls in vars(module).values()
        if isinstance(cls, type) and is_dataclass(cls) and cls.__name__ != "KindRules"
        if cls.__module__ == module.__name__
    ),
]


def test_every_body_has_a_kind() -> None:
    assert {rules.body for rules in KINDS.values()} == set(Body.__args__)
    assert list(KINDS) == list(Kind)
    assert {cls: KINDS[kind].body for cls, kind in KIND_OF.items()} == {cls: cls for cls in KIND_OF}
    assert set(Body.__args__) < set(DECLARED)


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_every_message_there_and_back(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages_of(cls))
    value = cbor.decode(cbor.encode(to_value(message)), max_bytes=1 << 22)
    assert from_value(cls, value) == message
    assert isinstance(value, dict)
    missing = data.draw(st.sampled_from(list(value)))
    with pytest.raises(Malformed, match="missing or unknown"):
        from_value(cls, {key: item for key, item in value.items() if key != missing})
    with pytest.raises(Malformed, match="missing or unknown"):
        from_value(cls, {**value, data.draw(st.integers(0, 99).filter(lambda key: key not in value)): 0})


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.__name__)
def test_keys_count_from_one(cls: type[Any]) -> None:
    """And follow the order in which the fields are written down."""
    assert [name for name, _ in fields_of(cls)] == [field.name for field in fields(cls)]
    assert [wire.key for _, wire in fields_of(cls)] == list(range(1, len(fields(cls)) + 1))


def longest(codec: Codec[Any]) -> object:
    """The value that takes the most bytes."""
    value: object
    match codec:
        case Uint():
            value = codec.maximum
        case Bytes():
            value = b"\xff" * codec.size
        case Text():
            value = "x" * codec.size
        case Amount():
            value = (1 << 8 * codec.size) - 1
        case Node():
            value = NodeId(NODE)
        case EnumOf():
            value = max(cast("type[IntEnum]", codec.enum))
        case ListOf():
            value = (longest(cast("ListOf[object]", codec).item),) * codec.maximum
        case Struct():
            value = codec.type(**{name: longest(field.codec) for name, field in fields_of(codec.type)})
        case _:
            raise NotImplementedError(codec)
    return value


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.INPUT], ids=lambda kind: kind.name)
def test_the_largest_message_fits_its_envelope(kind: Kind) -> None:
    rules = KINDS[kind]
    body = cbor.encode(to_value(longest(Struct(rules.body))))
    header = Header(
        version=255, kind=max(Kind), network="x" * 32, sender=NodeId(NODE), sequence=UINT64_MAX, issued_at=UINT64_MAX,
        expires_at=UINT64_MAX, body=body, signature=bytes(64),
    )  # fmt: skip
    assert len(cbor.encode(to_value(header))) <= rules.max_bytes


def test_the_largest_prompt_fits_its_envelope() -> None:
    """The turns share one budget of bytes, so the largest has as many turns as may be."""
    count = messages.MAX_INPUT_TURNS
    turn = Turn("r" * 16, "x" * (messages.MAX_INPUT_BYTES // count - 16))
    conversation = messages.Conversation((turn,) * count)
    accepted = (messages.MAX_TOKEN_ID,) * messages.MAX_TOKENS
    opening = cbor.encode(to_value(messages.Opening(conversation, bytes(32), bytes(32), accepted)))
    assert len(opening) <= messages.MAX_OPENING_BYTES
    body = cbor.encode(to_value(messages.Input(bytes(32), bytes(messages.MAX_OPENING_BYTES + messages.SEAL_BYTES))))
    assert len(body) + 300 < KINDS[Kind.INPUT].max_bytes


def test_the_dearest_bid_is_an_amount() -> None:
    tokens = messages.MAX_INPUT_BYTES + 16 * messages.MAX_INPUT_TURNS + 128 + messages.MAX_TOKENS
    dearest = (1 << 8 * TOKEN_PRICE.size) - 1
    dearest_fee = (1 << 8 * FEE.size) - 1
    worst = itemise(
        tokens * dearest, licence_bps=BPS, verification=Verification.IMMEDIATE, priority_fee=dearest_fee
    ).total
    assert Amount().decode(Amount().encode(worst)) == worst


def test_names_are_declared_once() -> None:
    assert fields_of(Engine) is fields_of(Engine)
