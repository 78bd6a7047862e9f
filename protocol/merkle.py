"""Merkle trees over SHA-256, as in RFC 6962 section 2.1 (Certificate Transparency).

Leaves and nodes are hashed under different prefixes, so a node can never be passed off as a leaf. A tree of n leaves
splits at the largest power of two below n; no leaf is ever duplicated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.hashing import DIGEST_BYTES

LEAF_PREFIX: Final = b"\x00"
"""Before the entry of a leaf (RFC 6962 section 2.1)."""
NODE_PREFIX: Final = b"\x01"
"""Before the two children of a node (RFC 6962 section 2.1)."""


class NotInTree(RemoteError):
    """An inclusion path does not lead from its leaf to the root."""

    code = "not_in_tree"


def leaf_hash(*parts: bytes | bytearray | memoryview) -> bytes:
    """Hash of the leaf whose entry is the concatenation of `parts`, 32 bytes.

    Parts are hashed one after the other without being joined, so large ones are not copied. Where their borders carry
    meaning the caller frames them.
    """
    state = hashlib.sha256(LEAF_PREFIX)
    for part in parts:
        state.update(part)
    return state.digest()


def merkle_root(leaf_hashes: Iterable[bytes]) -> bytes:
    """Root of the tree over `leaf_hashes` (32 bytes each, in order), 32 bytes; SHA-256 of nothing without leaves.

    Reads the leaves once and holds one hash per tree level. Raises LocalError on a hash of another length.
    """
    complete: list[bytes] = []
    for index, leaf in enumerate(leaf_hashes):
        if len(leaf) != DIGEST_BYTES:
            msg = f"a leaf hash is {DIGEST_BYTES} bytes, not {len(leaf)}"
            raise LocalError(msg)
        node, below = leaf, index
        # Each low bit set in the index is a complete left neighbour of the height reached.
        while below & 1:
            node = _node_hash(complete.pop(), node)
            below >>= 1
        complete.append(node)
    if not complete:
        return hashlib.sha256().digest()
    root = complete.pop()
    while complete:
        root = _node_hash(complete.pop(), root)
    return root


def inclusion_path(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Audit path of leaf `index` (RFC 6962 section 2.1.1): the sibling hashes from the leaf up, 32 bytes each.

    Raises LocalError when there is no such leaf.
    """
    if not 0 <= index < len(leaf_hashes):
        msg = f"there is no leaf {index} in a tree of {len(leaf_hashes)}"
        raise LocalError(msg)
    path: list[bytes] = []
    start, end = 0, len(leaf_hashes)
    while end - start > 1:
        split = start + _split(end - start)
        if index < split:
            path.append(merkle_root(leaf_hashes[split:end]))
            end = split
        else:
            path.append(merkle_root(leaf_hashes[start:split]))
            start = split
    return tuple(reversed(path))


def verify_inclusion(root: bytes, leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> None:
    """Check that leaf hash `leaf` is at `index` of the tree of `size` leaves with this `root`.

    After RFC 9162 section 2.1.3.2. Raises NotInTree, also on a path of the wrong length or with hashes of one.
    """
    if not 0 <= index < size:
        msg = f"there is no leaf {index} in a tree of {size}"
        raise NotInTree(msg)
    if any(len(item) != DIGEST_BYTES for item in (root, leaf, *path)):
        msg = f"a hash in the inclusion path is not {DIGEST_BYTES} bytes"
        raise NotInTree(msg)
    node, last = leaf, size - 1
    for sibling in path:
        if last == 0:
            msg = "the inclusion path is too long"
            raise NotInTree(msg)
        if index & 1 or index == last:
            node = _node_hash(sibling, node)
            # A last node without a right neighbour was promoted until it became a right child.
            while not index & 1 and index:
                index >>= 1
                last >>= 1
        else:
            node = _node_hash(node, sibling)
        index >>= 1
        last >>= 1
    if last != 0 or node != root:
        msg = "the inclusion path does not lead to the root"
        raise NotInTree(msg)


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(NODE_PREFIX + left + right).digest()


def _split(size: int) -> int:
    """Largest power of two below `size`, which is at least 2."""
    return 1 << (size - 1).bit_length() - 1
