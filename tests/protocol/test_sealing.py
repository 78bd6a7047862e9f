"""Prompts that only the winner reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.commitments import input_bytes
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.job import Send
from aci_p2p.protocol.messages import KEM_KEY_BYTES, SEAL_BYTES, Conversation, Opening, Turn
from aci_p2p.protocol.sealing import Binding, OpeningKey, seal_opening
from aci_p2p.protocol.validation import MessageRefused, Reason
from tests.protocol.driver import CONSUMER, NETWORK, OPENING, OPENING_KEY, PROVIDER, REQUEST, Market, Seller, of

BINDING = Binding(NETWORK, bytes(32), CONSUMER.node_id, PROVIDER.node_id, bytes(32))
SEALED = seal_opening(OPENING, OPENING_KEY.public, BINDING)
PLAIN = cbor.encode(wire.to_value(OPENING))


def test_what_is_sealed_opens() -> None:
    assert len(OPENING_KEY.public) == KEM_KEY_BYTES
    assert len(SEALED) == len(PLAIN) + SEAL_BYTES
    assert OPENING_KEY.open(SEALED, BINDING) == OPENING


def test_the_same_seed_makes_the_same_key() -> None:
    again = OpeningKey(bytes([10]) * 32)
    assert again.public == OPENING_KEY.public != OpeningKey(bytes(32)).public
    assert again.open(SEALED, BINDING) == OPENING


def test_nothing_is_sealed_alike_twice() -> None:
    again = seal_opening(OPENING, OPENING_KEY.public, BINDING)
    assert again[:1120] != SEALED[:1120]
    assert again[1120:] != SEALED[1120:]


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_what_was_altered_does_not_open(place: int, change: int) -> None:
    altered = SEALED[:place] + bytes([SEALED[place] ^ change]) + SEALED[place + 1 :]
    with pytest.raises(MessageRefused) as caught:
        OPENING_KEY.open(altered, BINDING)
    assert caught.value.validation.reason is Reason.BAD_SEAL


@pytest.mark.parametrize("size", [0, 1, 1_119, 1_120, SEAL_BYTES - 1, SEAL_BYTES, len(SEALED) - 1])
def test_what_was_cut_does_not_open(size: int) -> None:
    with pytest.raises(MessageRefused):
        OPENING_KEY.open(SEALED[:size], BINDING)


def test_what_is_sealed_must_be_an_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    for plaintext in (b"\xff", cbor.encode({1: 1})):

        def encode(_value: object, plaintext: bytes = plaintext) -> bytes:
            return plaintext

        monkeypatch.setattr(cbor, "encode", encode)
        sealed = seal_opening(OPENING, OPENING_KEY.public, BINDING)
        with pytest.raises(MessageRefused) as caught:
            OPENING_KEY.open(sealed, BINDING)
        assert caught.value.validation.reason is Reason.MALFORMED


def test_an_opening_out_of_bounds() -> None:
    with pytest.raises(LocalError):
        seal_opening(Opening(OPENING.conversation, b"", b"", ()), OPENING_KEY.public, BINDING)


@given(st.text(max_size=200), st.integers(1, 5))
def test_no_frame_holds_the_prompt(text: str, turns: int) -> None:
    """Not a word of it travels outside the seal: neither in a frame of the stream nor in the offer."""
    conversation = Conversation(tuple(Turn("user", f"{number} A secret: {text}") for number in range(turns)))
    market = Market([Seller(PROVIDER)], replace(REQUEST, conversation=conversation)).run()
    assert market.consumer.job.price
    frames = [send.data for bench in (market.consumer, *market.providers) for send in of(bench.effects, Send)]
    assert len(frames) > 6
    for frame in (*frames, market.consumer.job.offer.data):
        assert f"A secret: {text}".encode() not in frame
    assert input_bytes(conversation) == market.consumer.job.offer.body.input_bytes
