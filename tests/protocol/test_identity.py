"""Node ids are libp2p peer ids, and private keys stay private."""

from __future__ import annotations

import copy
import pickle

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p.peer.id import ID  # pyright: ignore[reportMissingTypeStubs] - py.typed, but it says otherwise

from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.identity import BadSignature, KeyPair, NodeId

SEED = bytes(range(100, 132))
KEY = KeyPair(SEED)


@given(st.binary(min_size=32, max_size=32))
def test_the_peer_id_is_libp2ps(seed: bytes) -> None:
    ours = KeyPair(seed)
    theirs = Ed25519PrivateKey.from_bytes(seed)
    peer = ID.from_pubkey(theirs.get_public_key())
    assert ours.node_id.public_key == theirs.get_public_key().to_bytes()
    assert ours.node_id.peer_id == peer.to_bytes()
    assert str(ours.node_id) == peer.to_base58()
    assert NodeId.parse(peer.to_base58()) == NodeId.from_peer_id(peer.to_bytes()) == ours.node_id


def test_signatures_are_libp2ps() -> None:
    theirs = Ed25519PrivateKey.from_bytes(SEED)
    assert KEY.sign(b"message") == theirs.sign(b"message")
    assert Ed25519PublicKey.from_bytes(KEY.node_id.public_key).verify(b"message", KEY.sign(b"message"))


def test_rfc_8032_vector() -> None:
    """Section 7.1, test 2."""
    key = KeyPair(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.node_id.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert key.sign(b"\x72").hex() == signature
    key.node_id.verify(b"\x72", bytes.fromhex(signature))


def test_names() -> None:
    text = str(KEY.node_id)
    assert text.startswith("12D3KooW")
    assert KEY.node_id.short == text[-8:]
    assert repr(KEY.node_id) == f"NodeId({text})"


def test_node_ids_are_ordered_and_hashed_by_their_key() -> None:
    low, high = NodeId(bytes(32)), NodeId(b"\1" + bytes(31))
    assert low < high
    assert {low, NodeId(bytes(32))} == {low}


@pytest.mark.parametrize("size", [0, 31, 33])
def test_node_ids_of_another_size(size: int) -> None:
    with pytest.raises(LocalError, match=f"32 bytes, not {size}"):
        NodeId(bytes(size))


PEER_ID = KEY.node_id.peer_id


@pytest.mark.parametrize(
    "peer_id",
    [b"", PEER_ID[:-1], PEER_ID + b"\0", b"\1" + PEER_ID[1:], PEER_ID[:3] + b"\2" + PEER_ID[4:], bytes(38),
     b"\x12\x20" + bytes(32)],
)  # fmt: skip
def test_peer_ids_without_an_ed25519_key(peer_id: bytes) -> None:
    """Too short, too long, not inlined, another key type, nothing, and a hashed (RSA) one."""
    with pytest.raises(LocalError, match="does not carry an Ed25519 key"):
        NodeId.from_peer_id(peer_id)
    with pytest.raises(LocalError):
        NodeId.parse(base58.b58encode(peer_id).decode())


@pytest.mark.parametrize(
    "text", ["", "0", "12D3KooW", "l" * 52, "12D3Koo\u00e9", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]
)
def test_text_that_is_no_peer_id(text: str) -> None:
    with pytest.raises(LocalError) as caught:
        NodeId.parse(text)
    assert caught.value.message


def test_hint_for_what_is_not_base58() -> None:
    with pytest.raises(LocalError, match="'0OIl' is not a peer id") as caught:
        NodeId.parse("0OIl")
    assert "12D3KooW" in caught.value.hint


def test_long_text_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(LocalError, match="too long"):
        NodeId.parse("1" * 65)
    with pytest.raises(LocalError, match="does not carry"):
        NodeId.parse("1" * 64)


@pytest.mark.parametrize(
    ("message", "signature"),
    [
        (b"other", KEY.sign(b"message")),
        (b"message", KeyPair(bytes(32)).sign(b"message")),
        (b"message", b""),
        (b"message", bytes(63)),
        (b"message", bytes(64)),
        (b"message", KEY.sign(b"message") + b"\0"),
    ],
)
def test_signatures_that_do_not_verify(message: bytes, signature: bytes) -> None:
    KEY.node_id.verify(b"message", KEY.sign(b"message"))
    with pytest.raises(BadSignature) as caught:
        KEY.node_id.verify(message, signature)
    assert caught.value.code == "bad_signature"
    assert caught.value.message == f"the signature of {KEY.node_id.short} does not verify"
    assert isinstance(caught.value, RemoteError)


def test_the_seed_is_for_storage_only() -> None:
    assert KEY.seed == SEED
    for text in (repr(KEY), str(KEY), f"{KEY}", repr([KEY]), repr(vars(type(KEY)))):
        assert SEED.hex() not in text
        assert repr(SEED)[2:-1] not in text
        assert base58.b58encode(SEED).decode() not in text
    assert repr(KEY) == f"KeyPair({KEY.node_id})"
    assert not hasattr(KEY, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_private_keys_are_not_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY, protocol)
    with pytest.raises(TypeError, match="not pickled"):
        copy.deepcopy(KEY)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_seeds_of_another_size(size: int) -> None:
    with pytest.raises(LocalError, match=f"32 bytes, not {size}") as caught:
        KeyPair(b"\xaa" * size)
    assert "aa" not in caught.value.message.replace("a key", "")
