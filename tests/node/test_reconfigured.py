"""A provider that takes other prices, slots and models while it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI, NoBids, ProviderConfig, Requirements, serving
from aci_p2p.executor import ModelInfo, ModelUnavailable
from aci_p2p.protocol.errors import LocalError
from tests.node.conftest import MODEL, ROOT, OpenTestNode, ScriptedExecutor, due

WINDOW = Requirements(bid_window_ms=200)
OTHER_ROOT = bytes([9]) * 32


class TwoModels(ScriptedExecutor):
    """Has another model, too."""

    async def load(self, model: str) -> ModelInfo:
        if model == "other":
            return ModelInfo(model, OTHER_ROOT, 4096, 1000)
        if model != MODEL:
            raise ModelUnavailable(model)
        return await super().load(model)


async def test_prices_slots_and_models(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=TwoModels()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        assert (await aci.inference(model=ROOT.hex(), prompt="count")).receipt.body.price == due(10 + 4 * 100)
        config = provider.config.provider
        assert config
        dearer = replace(config, input_token_price=2, output_token_price=200, slots=3)
        await provider.provide(dearer)
        assert provider.config.provider == dearer
        answer = await aci.inference(model=ROOT.hex(), prompt="count")
        assert answer.receipt.body.price == due(20 + 4 * 200)
        assert provider.provider
        (record,) = provider.provider.capabilities()
        assert (record.input_token_price, record.output_token_price, record.slots) == (2, 200, 3)
        (found,) = await consumer.find_providers(ROOT)
        assert found.body.output_token_price == 200

        await provider.provide(replace(dearer, models=("other",)))
        assert (await aci.inference(model=OTHER_ROOT.hex(), prompt="count")).text
        with pytest.raises(NoBids):
            await aci.inference(model=ROOT.hex(), prompt="count", requirements=WINDOW)


async def test_what_cannot_be_served_changes_nothing(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=TwoModels()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        before = provider.config
        for models, words in ((("other", "missing"), "missing"), ((), "there is no model in the store")):
            with pytest.raises(LocalError, match=words):
                await provider.provide(ProviderConfig(models=models, slots=9))
        assert provider.config == before
        assert (await aci.inference(model=ROOT.hex(), prompt="count")).receipt.body.price == due(10 + 4 * 100)


async def test_no_more_models_than_a_node_may_offer(
    autojump_clock: MockClock, open_test_node: OpenTestNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_OFFERED", 1)
    async with (
        open_test_node("provider", executor=TwoModels()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        await provider.provide(ProviderConfig(models=("other", MODEL)))
        assert provider.provider
        assert [record.model_root for record in provider.provider.capabilities()] == [OTHER_ROOT]
        assert (await aci.inference(model=OTHER_ROOT.hex(), prompt="count")).text


async def test_running_jobs_end_as_they_began(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=TwoModels(pace=1.0), slots=2) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
        aci.stream(model=ROOT.hex(), prompt="count") as stream,
    ):
        async for _ in stream:
            break
        config = provider.config.provider
        assert config
        await provider.provide(replace(config, models=("other",), output_token_price=999, slots=1))
        assert provider.provider
        assert provider.provider.statistics().running == 1
        # The one slot is taken.
        with pytest.raises(NoBids):
            await aci.inference(model=OTHER_ROOT.hex(), prompt="count", requirements=WINDOW)
        async for _ in stream:
            pass
        assert stream.answer.receipt.body.price == due(10 + 4 * 100)
        await trio.sleep(1)
        assert (await aci.inference(model=OTHER_ROOT.hex(), prompt="count")).receipt.body.price == due(10 + 4 * 999)


async def test_bootstrap_addresses_come_and_go(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with open_test_node("first") as first, open_test_node("second", first.addresses[:1]) as second:
        (address,) = first.addresses[:1]
        nobody = f"{address[:-4]}aaaa"
        await second.discovery.join([nobody], require=False)
        assert {report.address for report in second.discovery.bootstrap_report()} == {address, nobody}
        second.discovery.forget([address, "never named"])
        assert [report.address for report in second.discovery.bootstrap_report()] == [nobody]
        assert first.node_id in second.network.peers
