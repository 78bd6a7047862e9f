"""Inbound handshakes: how many at once, how many a second, and for how long."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network.libp2p import admission
from aci_p2p.network.libp2p.admission import Admission
from aci_p2p.network.libp2p.connections import LOOPBACK
from aci_p2p.network.libp2p.upgrade import HANDSHAKE_SECONDS

SOURCE = "192.0.2.1"


class Doorkeeper:
    """Begins handshakes that never end by themselves, and notes when they are ended."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.admission = Admission()
        self.ended: list[tuple[str, float]] = []
        self._nursery = nursery

    async def begin(self, source: str) -> None:
        """Let a handshake begin."""
        self._nursery.start_soon(self._handshake, source)
        await trio.testing.wait_all_tasks_blocked()

    async def _handshake(self, source: str) -> None:
        with self.admission.handshaking(source):
            await trio.sleep(math.inf)
        self.ended.append((source, trio.current_time()))


async def test_handshake_has_so_much_time(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        door = Doorkeeper(nursery)
        started = trio.current_time()
        await door.begin(SOURCE)
        assert door.admission.under_way == 1
    assert door.ended == [(SOURCE, started + HANDSHAKE_SECONDS)]
    assert door.admission.under_way == 0


async def test_one_too_many_of_a_source_ends_its_oldest(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        door = Doorkeeper(nursery)
        await door.begin("192.0.2.2")
        for _ in range(admission.MAX_HANDSHAKES_PER_SOURCE):
            await door.begin(SOURCE)
        assert not door.ended
        await door.begin(SOURCE)
        assert [source for source, _ in door.ended] == [SOURCE]
        assert door.admission.under_way == 1 + admission.MAX_HANDSHAKES_PER_SOURCE
        nursery.cancel_scope.cancel()


async def test_this_machine_may_have_as_many_as_there_are(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_HANDSHAKES", 40)
    async with trio.open_nursery() as nursery:
        door = Doorkeeper(nursery)
        await door.begin(SOURCE)
        for _ in range(39):
            await door.begin(LOOPBACK)
        assert not door.ended
        await door.begin(LOOPBACK)
        assert [source for source, _ in door.ended] == [SOURCE]
        nursery.cancel_scope.cancel()


async def test_rate_of_a_source(autojump_clock: MockClock) -> None:
    door = Admission()
    burst = [door.admits(SOURCE) for _ in range(100)]
    assert burst == [True] * int(admission.HANDSHAKE_BURST) + [False] * (100 - int(admission.HANDSHAKE_BURST))
    assert door.refused == 100 - admission.HANDSHAKE_BURST
    assert door.admits("192.0.2.2")
    assert all(door.admits(LOOPBACK) for _ in range(1000))
    await trio.sleep(10)
    assert sum(door.admits(SOURCE) for _ in range(100)) == min(
        10 * admission.HANDSHAKES_PER_SECOND, admission.HANDSHAKE_BURST
    )
    await trio.sleep(1)
    assert sum(door.admits(SOURCE) for _ in range(100)) == admission.HANDSHAKES_PER_SECOND


async def test_sources_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_SOURCES", 10)
    await trio.lowlevel.checkpoint()
    door = Admission()
    for number in range(100):
        assert door.admits(f"192.0.2.{number}")
    assert len(door._allowances) == 10
