"""A user who reads an answer slowly is no reason to blame anybody."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI
from aci_p2p.protocol.lifecycle import LIMITS, Party, State
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor

WORDS = 200


@pytest.mark.parametrize("awaited", [State.REVEALED, State.STREAMING])
async def test_a_pause_beyond_any_timeout(
    autojump_clock: MockClock, open_test_node: OpenTestNode, awaited: State
) -> None:
    text = " ".join(["word"] * WORDS)
    pause = LIMITS[awaited].timeout_ms / 1_000 + 5
    async with (
        open_test_node("provider", executor=ScriptedExecutor(text=text, pace=0.001)) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        async with aci.stream(model=ROOT.hex(), prompt="count", max_tokens=WORDS) as stream:
            first = await anext(stream)
            await trio.sleep(pause)
            assert first + "".join([part async for part in stream]) == text
            assert stream.answer.text == text
        await trio.sleep(1)
        for node in (consumer, provider):
            (job,) = await node.store.jobs()
            assert (job.state, job.blame) == (State.PENDING, Party.NOBODY)
