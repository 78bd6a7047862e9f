"""Frames between node and worker: whatever is sent arrives, however the pipe cuts it, and garbage does not."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.executor.frames import (
    FRAME_BYTES_MAX,
    Accepted,
    Begun,
    Cancel,
    Chunk,
    Credit,
    Encode,
    Encoded,
    Ended,
    Ending,
    Failed,
    Forward,
    FrameReader,
    Generate,
    Load,
    Loaded,
    Logits,
    Reply,
    Request,
    Turn,
    encode_frame,
)
from aci_p2p.protocol.errors import AciError, LocalError

NUMBERS = st.integers(0, (1 << 64) - 1)
NAMES = st.text(st.characters(codec="utf-8"), max_size=30)
DIGESTS = st.binary(min_size=32, max_size=32)
TURNS = st.lists(st.builds(Turn, NAMES.filter(lambda name: len(name.encode()) <= 64), NAMES), max_size=3).map(tuple)
MESSAGES: st.SearchStrategy[Request | Reply] = st.one_of(
    st.builds(Load, NUMBERS, NAMES),
    st.builds(Generate, NUMBERS, NAMES, TURNS, NUMBERS, NUMBERS, st.binary(max_size=32), NUMBERS, st.binary()),
    st.builds(Encode, NUMBERS, NAMES, TURNS),
    st.builds(Forward, NUMBERS, NAMES, st.binary(max_size=40), NUMBERS),
    st.builds(Cancel, NUMBERS),
    st.builds(Credit, NUMBERS, NUMBERS),
    st.builds(Loaded, NUMBERS, DIGESTS, NUMBERS, NUMBERS),
    st.builds(Accepted, NUMBERS, NUMBERS),
    st.builds(Begun, NUMBERS),
    st.builds(Chunk, NUMBERS, NUMBERS, st.lists(NUMBERS, max_size=3).map(tuple), NAMES, st.sampled_from(Ending)),
    st.builds(Encoded, NUMBERS, st.binary(max_size=40)),
    st.builds(Logits, NUMBERS, st.binary(max_size=40)),
    st.builds(Ended, NUMBERS),
    st.builds(Failed, NUMBERS, NAMES, NAMES, NAMES, st.lists(DIGESTS, max_size=2).map(tuple)),
)


@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_what_is_sent_arrives(messages: list[Request | Reply], sizes: list[int]) -> None:
    stream = b"".join(map(encode_frame, messages))
    reader, arrived, at, turn = FrameReader(), list[Request | Reply](), 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        arrived += reader.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert arrived == messages


@given(st.binary(min_size=5, max_size=60))
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    with suppress(AciError):
        list(FrameReader().feed(data))


@given(MESSAGES, st.data())
def test_a_changed_byte_is_another_message_or_none(message: Request | Reply, data: st.DataObject) -> None:
    frame = bytearray(encode_frame(message))
    frame[data.draw(st.integers(4, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        arrived = list(FrameReader().feed(bytes(frame)))
    except AciError:
        return
    assert message not in arrived


@pytest.mark.parametrize(
    "data",
    [
        (FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"\0",
        (1).to_bytes(4, "big") + b"\x0e",
        (1).to_bytes(4, "big") + b"\xff",
        (1).to_bytes(4, "big") + b"\x04\xa0",
        (3).to_bytes(4, "big") + b"\x04\xa1\x00\x20",
    ],
)
def test_refused_at_once(data: bytes) -> None:
    with pytest.raises(AciError):
        list(FrameReader().feed(data))


def test_a_large_frame_waits_for_its_end() -> None:
    frame = encode_frame(Logits(1, bytes(1 << 20)))
    reader = FrameReader()
    assert list(reader.feed(frame[:-1])) == []
    assert list(reader.feed(frame[-1:])) == [Logits(1, bytes(1 << 20))]


def test_bounds_hold_when_writing() -> None:
    with pytest.raises(LocalError):
        encode_frame(Load(1, "m" * 129))
