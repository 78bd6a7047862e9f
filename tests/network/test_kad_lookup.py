"""Which peers a lookup asks, on a made-up network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from random import Random

from aci_p2p.network.libp2p.kad_lookup import PATHS, Lookup
from aci_p2p.network.libp2p.kad_table import BUCKET_SIZE, closest, position
from aci_p2p.protocol.identity import NodeId

RANDOM = Random(3)  # noqa: S311 - the same network in every run
NODES = [NodeId(RANDOM.randbytes(32)) for _ in range(400)]
TARGET = position(b"target")
KNOWN = {node: closest(RANDOM.sample(NODES, 120), TARGET, BUCKET_SIZE) for node in NODES}
"""Whom each node names: the nearest to the target of those that it happens to know."""


def run(
    lookup: Lookup, dead: Collection[NodeId] = (), lies: Mapping[NodeId, list[NodeId]] | None = None
) -> list[NodeId]:
    """Ask in turn until all paths are over; who was asked."""
    asked: list[NodeId] = []
    progress = True
    while progress:
        progress = False
        for path in lookup.paths:
            if (peer := lookup.next_peer(path)) is None:
                assert lookup.is_over(path)
                continue
            assert not lookup.is_over(path)
            asked.append(peer)
            progress = True
            if peer in dead:
                lookup.failed(path, peer)
            else:
                closer = lies[peer] if lies and peer in lies else KNOWN.get(peer, ())
                lookup.answered(path, peer, closer)
    return asked


def test_it_finds_the_nearest() -> None:
    lookup = Lookup(TARGET, NODES[:10], ())
    asked = run(lookup)
    assert len(asked) == len(set(asked))
    nearest = closest(NODES, TARGET, BUCKET_SIZE)
    assert len(set(lookup.closest_answered()) & set(nearest)) >= BUCKET_SIZE - 2
    assert lookup.closest_answered() == closest(lookup.closest_answered(), TARGET, BUCKET_SIZE)
    assert len(asked) < 60


def test_the_dead_hide_nobody() -> None:
    dead = set(NODES[::3])
    lookup = Lookup(TARGET, NODES[:10], ())
    run(lookup, dead)
    alive = closest(set(NODES) - dead, TARGET, BUCKET_SIZE)
    assert len(set(lookup.closest_answered()) & set(alive)) >= BUCKET_SIZE - 3
    assert not dead & set(lookup.closest_answered())


def test_who_is_avoided_is_not_asked() -> None:
    avoided = set(NODES[::2])
    assert not avoided & set(run(Lookup(TARGET, NODES[:10], avoided)))


def test_nobody_to_ask() -> None:
    lookup = Lookup(TARGET, NODES[:3], NODES[:3])
    assert not lookup.paths
    assert lookup.closest_answered() == []


def test_a_small_network_is_asked_whole() -> None:
    """Also by one who knows only one other."""
    small = NODES[:BUCKET_SIZE]
    for known in (1, 2, 3, BUCKET_SIZE):
        lookup = Lookup(TARGET, small[:known], ())
        assert len(lookup.paths) == min(known, PATHS)
        asked = run(lookup, lies=dict.fromkeys(small, small))
        assert set(asked) == set(small)


def test_a_liar_leads_one_path_astray() -> None:
    """One that names twenty accomplices nearer to the target than any honest node, who name each other."""
    crowd = [NodeId(RANDOM.randbytes(32)) for _ in range(4_000)]
    accomplices = closest(crowd, TARGET, BUCKET_SIZE)
    start = NODES[:9]
    liar = closest(start, TARGET, 1)[0]
    lies = dict.fromkeys([liar, *accomplices], accomplices)
    lookup = Lookup(TARGET, start, ())
    run(lookup, lies=lies)
    honest = set(closest(NODES, TARGET, BUCKET_SIZE)) & set(lookup.closest_answered())
    assert len(honest) >= BUCKET_SIZE // 2
