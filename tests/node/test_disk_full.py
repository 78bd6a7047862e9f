"""A provider that cannot write its database says so, and goes on when it can."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI, NoBids
from aci_p2p.database import StoreError
from aci_p2p.provider import PROBE_S
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor


async def fail(*_arguments: object) -> None:
    msg = "the disk is full"
    raise StoreError(msg)


async def test_a_job_that_cannot_be_stored(
    autojump_clock: MockClock,
    open_test_node: OpenTestNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aci_p2p.provider")
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        assert provider.provider is not None
        with monkeypatch.context() as patch:
            patch.setattr(provider.store, "put_jobs", fail)
            patch.setattr(provider.store, "note_key", fail)
            with pytest.raises(NoBids, match="every chosen provider declined"):
                await aci.inference(model=ROOT.hex(), prompt="count")
            assert "the disk is full" in str([getattr(record, "fields", None) for record in caplog.records])
            # It does not bid for what it could not do.
            with pytest.raises(NoBids, match="nobody bid"):
                await aci.inference(model=ROOT.hex(), prompt="count")
            assert provider.provider.statistics().failed == 1
            assert [record.free_slots for record in provider.provider.capabilities()] == [0]
        await trio.sleep(PROBE_S)
        # More jobs than slots: each gave its own back.
        for _ in range(provider.provider.statistics().slots + 1):
            assert (await aci.inference(model=ROOT.hex(), prompt="count")).text
        assert provider.provider.capabilities()[0].free_slots
