"""Hypothesis strategies for messages, made from their declarations."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, cast

from hypothesis import strategies as st

from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.wire import Amount, Bytes, Codec, EnumOf, ListOf, Node, Struct, Text, Uint, fields_of

NODES = st.integers(1, 255).map(lambda number: KeyPair(bytes([number]) * 32).node_id)
SHORT = 24
"""Longest byte string, text or list that is tried where a declaration allows more; the edges have their own tests."""


def values(codec: Codec[Any]) -> st.SearchStrategy[Any]:
    """Any value within a codec's bounds."""
    strategy: st.SearchStrategy[Any]
    match codec:
        case Uint():
            strategy = st.integers(0, codec.maximum) | st.just(codec.maximum)
        case Bytes():
            low = codec.size if codec.minimum is None else codec.minimum
            strategy = st.binary(min_size=low, max_size=max(low, min(codec.size, SHORT)))
        case Text():
            # A character takes four bytes at most.
            strategy = st.text(max_size=min(codec.size, SHORT) // 4)
        case Amount():
            most = (1 << 8 * codec.size) - 1
            strategy = st.integers(0, most) | st.just(most)
        case Node():
            strategy = NODES
        case EnumOf():
            strategy = st.sampled_from(cast("type[IntEnum]", codec.enum))
        case ListOf():
            strategy = st.lists(values(cast("ListOf[object]", codec).item), max_size=min(codec.maximum, 4)).map(tuple)
        case Struct():
            strategy = messages(codec.type)
        case _:
            raise NotImplementedError(codec)
    return strategy


def messages(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Any message of a class."""
    return st.builds(cls, **{name: values(wire.codec) for name, wire in fields_of(cls)})
