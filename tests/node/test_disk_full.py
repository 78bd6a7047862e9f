"""A provider that cannot write its database says so, and goes on when it can."""

from __future__ import annotations

import logging

import pytest
from trio.testing import MockClock

from aci_p2p import ACI, NoBids
from aci_p2p.store import StoreError
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor


async def test_a_job_that_cannot_be_stored(
    autojump_clock: MockClock,
    open_test_node: OpenTestNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_records: object) -> None:
        msg = "the disk is full"
        raise StoreError(msg)

    caplog.set_level(logging.INFO, "aci_p2p.provider")
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(provider.store, "put_jobs", fail)
            with pytest.raises(NoBids, match="every chosen provider declined"):
                await aci.inference(model=ROOT.hex(), prompt="count")
        assert "the disk is full" in str([getattr(record, "fields", None) for record in caplog.records])
        assert (await aci.inference(model=ROOT.hex(), prompt="count")).text
