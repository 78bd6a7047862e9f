"""A provider whose model is gone or altered fails one job, and bids for no more."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from aci_p2p import ACI, NoBids, ProviderFault, Requirements
from aci_p2p.executor import ModelUnavailable, WeightsMismatch
from aci_p2p.executor.api import ExecutorFailed
from aci_p2p.protocol.errors import AciError
from tests.node.conftest import MODEL, ROOT, OpenTestNode, ScriptedExecutor

WINDOW = Requirements(bid_window_ms=200)


@pytest.mark.parametrize("error", [ModelUnavailable(MODEL), WeightsMismatch(MODEL, ROOT, bytes(32))])
async def test_a_model_that_is_gone(autojump_clock: MockClock, open_test_node: OpenTestNode, error: AciError) -> None:
    executor = ScriptedExecutor(fail_at=0, error=error)
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(ProviderFault, match="cannot serve the model any more"):
            await aci.inference(model=ROOT.hex(), prompt="count", requirements=WINDOW)
        with pytest.raises(NoBids, match="no provider has the model"):
            await aci.inference(model=ROOT.hex(), prompt="count", requirements=WINDOW)
        assert provider.provider
        assert provider.provider.statistics().outstanding == 0


async def test_a_worker_that_died_is_replaced(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    executor = ScriptedExecutor(fail_at=0, error=ExecutorFailed("killed"))
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(ProviderFault):
            await aci.inference(model=ROOT.hex(), prompt="count")
        executor.fail_at = None
        assert (await aci.inference(model=ROOT.hex(), prompt="count")).text == executor.text
