"""The toy model goes on with an answer like a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aci_p2p.executor import ExecutorFailed, FinishReason, GenerationRequest, Message, Sampling, TokenChunk
from aci_p2p.protocol.errors import LocalError
from aci_p2p.testing import ToyExecutor, ToyModel
from aci_p2p.testing.toy_model import END, VOCABULARY

MODEL = ToyModel()


async def chunks(executor: ToyExecutor, request: GenerationRequest) -> list[TokenChunk]:
    async with executor.generate("toy", request) as generation:
        assert generation.input_tokens == len(MODEL.encode(request.messages))
        return [chunk async for chunk in generation]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(700, bytes(range(32)))], ids=["greedy", "sampled"])
async def test_an_answer_goes_on_from_wherever_it_was_cut(sampling: Sampling) -> None:
    executor = ToyExecutor(MODEL)
    request = GenerationRequest((Message("user", "How long is a piece of string?"),), 24, sampling)
    whole = await chunks(executor, request)
    tokens = tuple(token for chunk in whole for token in chunk.tokens)
    assert len(tokens) > 4
    for split in range(1, len(tokens)):
        assert await chunks(executor, replace(request, accepted=tokens[:split])) == whole[split:]


@pytest.mark.parametrize("accepted", [(VOCABULARY,), (END, 5), (5,) * 25])
async def test_what_cannot_be_continued(accepted: tuple[int, ...]) -> None:
    request = GenerationRequest((Message("user", "Go on"),), 24, accepted=accepted)
    with pytest.raises(LocalError):
        await chunks(ToyExecutor(MODEL), request)


@pytest.mark.parametrize(("accepted", "finish"), [((5, END), FinishReason.STOP), ((5,) * 24, FinishReason.LENGTH)])
async def test_a_whole_answer_only_ends(accepted: tuple[int, ...], finish: FinishReason) -> None:
    request = GenerationRequest((Message("user", "Go on"),), 24, accepted=accepted)
    assert await chunks(ToyExecutor(MODEL), request) == [TokenChunk(len(accepted), (), "", finish)]


async def test_it_dies_after_tokens_of_its_own() -> None:
    executor = ToyExecutor(MODEL, fail_after=2)
    request = GenerationRequest((Message("user", "Go on"),), 24, accepted=(5, 6, 7))
    made: list[int] = []
    with pytest.raises(ExecutorFailed):
        async with executor.generate("toy", request) as generation:
            async for chunk in generation:
                made.append(chunk.index)  # noqa: PERF401 - what came before it died
    assert made == [3, 4]
