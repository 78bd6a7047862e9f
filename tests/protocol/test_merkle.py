"""Merkle trees: the vectors of Certificate Transparency, and that only true inclusion paths verify."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.merkle import NotInTree, inclusion_path, leaf_hash, merkle_root, verify_inclusion

ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
LEAVES = [leaf_hash(entry) for entry in ENTRIES]
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
"""Roots over the first 0 to 8 entries (test data of the Certificate Transparency log)."""
PATHS = {
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
"""Audit paths by leaf index and tree size, from the same data."""
HASH = bytes(32)

trees = st.integers(1, 40).map(lambda size: [leaf_hash(bytes([index])) for index in range(size)])


@pytest.mark.parametrize("size", range(len(ROOTS)))
def test_known_roots(size: int) -> None:
    assert merkle_root(LEAVES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size"), PATHS)
def test_known_paths(index: int, size: int) -> None:
    path = inclusion_path(LEAVES[:size], index)
    assert tuple(item.hex() for item in path) == PATHS[index, size]
    verify_inclusion(bytes.fromhex(ROOTS[size]), LEAVES[index], index, size, path)


def test_leaf_and_node_are_hashed_apart() -> None:
    assert leaf_hash(b"entry") == hashlib.sha256(b"\x00entry").digest()
    assert merkle_root([HASH, HASH]) == hashlib.sha256(b"\x01" + HASH + HASH).digest()


def test_parts_of_a_leaf_are_joined() -> None:
    assert leaf_hash(b"en", bytearray(b"tr"), memoryview(b"y")) == leaf_hash(b"entry")


def test_a_last_leaf_repeated_is_another_tree() -> None:
    assert merkle_root(LEAVES[:3]) != merkle_root([*LEAVES[:3], LEAVES[2]])


@given(st.lists(st.binary(max_size=8), min_size=2, max_size=40))
def test_root_is_that_of_the_definition(entries: list[bytes]) -> None:
    assert merkle_root(leaf_hash(entry) for entry in entries) == _definition(entries)


def _definition(entries: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = max(k for k in (2**n for n in range(10)) if k < len(entries))
    return hashlib.sha256(b"\x01" + _definition(entries[:split]) + _definition(entries[split:])).digest()


@given(trees)
def test_every_leaf_has_a_path(leaves: list[bytes]) -> None:
    root = merkle_root(leaves)
    for index, leaf in enumerate(leaves):
        verify_inclusion(root, leaf, index, len(leaves), inclusion_path(leaves, index))


@given(trees, st.data())
def test_nothing_else_verifies(leaves: list[bytes], data: st.DataObject) -> None:
    size, root = len(leaves), merkle_root(leaves)
    index = data.draw(st.integers(0, size - 1), "index")
    path = inclusion_path(leaves, index)
    leaf = leaves[index]
    flipped = bytes([leaf[0] ^ 1]) + leaf[1:]
    false: list[tuple[bytes, bytes, int, int, tuple[bytes, ...]]] = [
        (root, flipped, index, size, path),
        (flipped, leaf, index, size, path),
        (root, leaf, index, size, (*path, HASH)),
        (root, leaf, size, size, path),
        (root, leaf, -1, size, path),
        (root, leaf, 0, 0, ()),
        (root, leaf[:-1], index, size, path),
        (root[:-1], leaf, index, size, path),
    ]
    false += [(root, leaf, other, size, path) for other in range(size) if other != index]
    if path:
        false += [
            (root, leaf, index, size, path[:-1]),
            (root, leaf, index, size, path[1:]),
            (root, leaf, index, size, (path[0] + b"\x00", *path[1:])),
            (root, leaf, index, size, (flipped, *path[1:])),
        ]
    if any(a != b for a, b in pairwise(path)):
        false.append((root, leaf, index, size, tuple(reversed(path))))
    for case in false:
        with pytest.raises(NotInTree):
            verify_inclusion(*case)


def test_a_border_moved_between_leaf_and_sibling_is_refused() -> None:
    leaf, sibling = LEAVES[:2]
    with pytest.raises(NotInTree):
        verify_inclusion(bytes.fromhex(ROOTS[2]), leaf + sibling[:1], 0, 2, (sibling[1:],))


def test_a_tree_made_smaller_than_its_path_is_refused() -> None:
    with pytest.raises(NotInTree):
        verify_inclusion(bytes.fromhex(ROOTS[2]), LEAVES[1], 0, 1, (LEAVES[0],))


@pytest.mark.parametrize("index", [-1, 3])
def test_no_path_to_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(LocalError):
        inclusion_path(LEAVES[:3], index)


def test_a_leaf_hash_of_another_length_is_refused() -> None:
    with pytest.raises(LocalError):
        merkle_root([HASH, b"short"])
