"""The address cache alone."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.dht.address_cache import (
    MAX_AGE_MS,
    MAX_CACHED,
    MAX_FILE_BYTES,
    MAX_UNDIALLED,
    AddressCache,
    CacheDamaged,
    CachedPeer,
)
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.publications import MAX_ADDRESS_BYTES, MAX_ADDRESSES
from tests.protocol.driver import NOW

PEER: Final = KeyPair(bytes([1]) * 32).node_id
ADDRESS: Final = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(32))


def file(**changes: object) -> bytes:
    """A sound file but for the changes to its only entry."""
    entry: dict[str, object] = {"peer": str(PEER), "addresses": [ADDRESS], "seen": NOW}
    return json.dumps({"version": 1, "peers": [entry | changes]}).encode()


def test_what_is_kept_comes_back_the_latest_first() -> None:
    cache = AddressCache()
    cache.note(node(1), (f"/ip4/192.0.2.1/tcp/1/p2p/{node(1)}",), NOW - 50)
    cache.note(node(2), (f"/ip4/192.0.2.1/tcp/2/p2p/{node(2)}", f"/ip4/192.0.2.1/tcp/3/p2p/{node(2)}"), NOW - 70)
    cache.note(node(2), (f"/ip4/192.0.2.1/tcp/4/p2p/{node(2)}",), NOW - 30)
    again = AddressCache.decode(cache.encode(), NOW)
    assert again.peers == cache.peers
    assert [(cached.peer, cached.seen) for cached in again.peers] == [(node(2), NOW - 30), (node(1), NOW - 50)]
    assert again.peers[0].addresses == (f"/ip4/192.0.2.1/tcp/4/p2p/{node(2)}",)


def test_the_cache_is_bounded_and_the_oldest_goes_first() -> None:
    cache = AddressCache()
    for number in range(1, MAX_CACHED + 11):
        cache.note(node(number), [f"/ip4/192.0.2.1/tcp/{one}/p2p/{node(number)}" for one in range(1, 20)], NOW + number)
    assert [cached.peer for cached in cache.peers] == [node(number) for number in range(MAX_CACHED + 10, 10, -1)]
    assert all(len(cached.addresses) == MAX_ADDRESSES for cached in cache.peers)
    assert len(cache.encode()) <= MAX_FILE_BYTES


def test_who_only_dials_us_does_not_displace_whom_we_have_dialled() -> None:
    """Identities are free, and so is saying where one can be dialled."""
    cache = AddressCache()

    def come(number: int, *, dialled: bool) -> None:
        cache.note(node(number), [f"/ip4/192.0.2.1/tcp/1/p2p/{node(number)}"], NOW + number, dialled=dialled)

    for number in range(1, MAX_CACHED + 1):
        come(number, dialled=True)
    # It stays whom we have dialled when it dials us later.
    come(MAX_CACHED, dialled=False)
    for number in range(1_000, 2_000):
        come(number, dialled=False)
    again = AddressCache.decode(cache.encode(), NOW + 2_000)
    assert again.peers == cache.peers
    kept = [cached.peer for cached in again.peers]
    ours, theirs = MAX_CACHED - MAX_UNDIALLED, MAX_UNDIALLED
    assert kept[:ours] == [node(number) for number in range(MAX_CACHED, MAX_CACHED - ours, -1)]
    assert kept[ours:] == [node(number) for number in range(1_999, 1_999 - theirs, -1)]


def test_a_full_cache_of_longest_addresses_can_be_read_again() -> None:
    cache = AddressCache()
    for number in range(MAX_CACHED):
        tail = f"/p2p/{node(number)}"
        name = "x" * (MAX_ADDRESS_BYTES - len(tail))
        cache.note(node(number), [name[:-1] + str(one) + tail for one in range(MAX_ADDRESSES)], NOW)
    assert AddressCache.decode(cache.encode(), NOW).peers == cache.peers


def test_what_cannot_be_dialled_is_not_kept() -> None:
    cache = AddressCache()
    cache.note(PEER, (), NOW)
    cache.note(PEER, ("x" * (MAX_ADDRESS_BYTES + 1),), NOW)
    assert cache.peers == ()


def test_the_old_is_forgotten_and_the_future_is_now() -> None:
    assert AddressCache.decode(file(seen=NOW - MAX_AGE_MS), NOW).peers == ()
    (kept,) = AddressCache.decode(file(seen=NOW - MAX_AGE_MS + 1), NOW).peers
    assert kept == CachedPeer(PEER, (ADDRESS,), NOW - MAX_AGE_MS + 1)
    # A clock that ran ahead keeps nobody for ever.
    (kept,) = AddressCache.decode(file(seen=NOW * 1_000), NOW).peers
    assert kept.seen == NOW


def test_addresses_of_others_are_left_out() -> None:
    assert AddressCache.decode(file(addresses=["/ip4/192.0.2.1/tcp/1", 7, None, "x" * 300, ADDRESS]), NOW).peers == (
        CachedPeer(PEER, (ADDRESS,), NOW),
    )
    assert AddressCache.decode(file(addresses=[f"/ip4/192.0.2.1/tcp/1/p2p/{node(3)}"]), NOW).peers == ()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"7", b"{}", b'{"version": 1}', b'{"version": 2, "peers": []}',
        b'{"version": 1, "peers": 7}', b'{"version": 1, "peers": [7]}', b'{"version": 1, "peers": [{}]}',
        b'{"version": 1, "peers": {"a": 1}}', b"\xff\xfe", b"[" * 100_000, b" " * (MAX_FILE_BYTES + 1),
        file(peer="nobody"), file(peer=7), file(addresses="x"), file(seen="now"), file(seen=1.5), file(seen=True),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_apart(data: bytes) -> None:
    with pytest.raises(CacheDamaged, match="the address cache is damaged: "):
        AddressCache.decode(data, NOW)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["version", "peers", "peer", "seen"]), inner),
)


@given(json_values | st.fixed_dictionaries({"version": st.just(1), "peers": st.lists(json_values)}))
def test_no_file_is_more_than_damaged(value: Any) -> None:  # noqa: ANN401 - any JSON
    try:
        cache = AddressCache.decode(json.dumps(value).encode(), NOW)
    except CacheDamaged:
        return
    assert cache.peers == ()
