"""What a peer says before it leaves is heard, whatever we are sending, and however fast."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI
from aci_p2p.protocol.lifecycle import Party, State
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor


@pytest.mark.parametrize("pace", [0.00001, 0.001, 0.005])
async def test_a_consumer_that_cancels_amid_tokens_is_not_blamed(
    autojump_clock: MockClock, open_test_node: OpenTestNode, pace: float
) -> None:
    executor = ScriptedExecutor(text=" ".join(["word"] * 4_000), pace=pace)
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        async with aci.stream(model=ROOT.hex(), prompt="count", max_tokens=4_000) as stream:
            assert await anext(stream)
        await trio.sleep(5)
        (job,) = await provider.store.jobs()
        assert (job.state, job.blame, job.detail) == (State.CANCELLED, Party.NOBODY, "the consumer cancelled")
        assert not executor.running
