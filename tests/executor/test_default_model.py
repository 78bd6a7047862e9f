"""The default model in the real worker: transformers' tokens, quick cancellation, an event loop that keeps going."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from aci_p2p.executor.api import Executor, GenerationRequest, Message, Sampling
from aci_p2p.executor.process import open_process_executor
from aci_p2p.executor.store import ModelStore
from aci_p2p.protocol.catalogue import DEFAULT_MODEL

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

GREEDY = Sampling()
VECTORS: dict[str, Any] = json.loads((Path(__file__).with_name("vectors") / "greedy_smollm2.json").read_text())
CANCEL_S = 0.05
"""Seconds from leaving a generation to its end in the worker."""
TICK_S = 0.01
"""Seconds between ticks, and the most by which 99 of 100 may be late."""
ATTEMPTS = 5
"""The median counts: other programs on the machine may disturb some attempts, not most."""
LONG_PROMPT = "Tell me about the history of the city of Rome, its emperors and its buildings. " * 60


@pytest.fixture
def store(aci_home: Path) -> ModelStore:
    override = os.environ.get("ACI_TEST_MODEL_DIR")
    if override is None:
        return ModelStore(aci_home / "models")
    store = ModelStore(aci_home / "test-models")
    store.add_directory(Path(override), DEFAULT_MODEL)
    return store


def messages_of(case: dict[str, Any]) -> list[Message]:
    return [Message(message["role"], message["content"]) for message in case["messages"]]


async def answer(executor: Executor, messages: Sequence[Message], sampling: Sampling = GREEDY) -> list[int]:
    async with executor.generate(DEFAULT_MODEL, GenerationRequest(messages, VECTORS["max_tokens"], sampling)) as chunks:
        return [token async for chunk in chunks for token in chunk.tokens]


async def answers(
    store: ModelStore, count: int, *, threads: int, at_once: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """Answers to the first `count` conversations, `at_once` at a time."""
    found: dict[int, list[int]] = {}
    places = trio.CapacityLimiter(at_once)
    async with open_process_executor(store, threads=threads, max_batch=at_once) as executor:

        async def run(number: int, case: dict[str, Any]) -> None:
            async with places:
                found[number] = await answer(executor, messages_of(case), sampling)

        async with trio.open_nursery() as nursery:
            for number, case in enumerate(VECTORS["cases"][:count]):
                nursery.start_soon(run, number, case)
    return [found[number] for number in range(len(found))]


async def test_token_ids_of_transformers(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        for case in VECTORS["cases"]:
            assert list(await executor.encode(DEFAULT_MODEL, messages_of(case))) == case["prompt"]


async def test_greedy_answers_of_transformers(store: ModelStore) -> None:
    """20 conversations, 64 tokens each, token for token; four at a time in one batch."""
    assert [len(case["answer"]) for case in VECTORS["cases"]] == [64] * 20
    assert await answers(store, 20, threads=1, at_once=4) == [case["answer"] for case in VECTORS["cases"]]


async def test_threads_and_batches_change_no_token(store: ModelStore) -> None:
    assert await answers(store, 8, threads=3, at_once=7) == [case["answer"] for case in VECTORS["cases"][:8]]


async def test_samples_do_not_depend_on_the_batch(store: ModelStore) -> None:
    sampling = Sampling(800, bytes(range(32)))
    together = await answers(store, 5, threads=2, at_once=5, sampling=sampling)
    assert len({*map(tuple, together), *(tuple(case["answer"]) for case in VECTORS["cases"])}) == 25
    async with open_process_executor(store) as executor:
        for number in (0, 4):
            assert await answer(executor, messages_of(VECTORS["cases"][number]), sampling) == together[number]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(800, bytes(range(32)))], ids=["greedy", "sampled"])
async def test_answers_go_on_from_wherever_they_were_cut(store: ModelStore, sampling: Sampling) -> None:
    emoji = [Message("user", "Repeat this, nothing else: 😀👩‍👩‍👧🇪🇺🎉漢字é😀🚀🌍🎈")]
    async with open_process_executor(store) as executor:
        for messages in (emoji, messages_of(VECTORS["cases"][0])):
            request = GenerationRequest(messages, VECTORS["max_tokens"], sampling)
            async with executor.generate(DEFAULT_MODEL, request) as generation:
                whole = [chunk async for chunk in generation]
            tokens = [token for chunk in whole for token in chunk.tokens]
            for split in {1, 2, 9, 40, len(tokens) - 1} & {*range(1, len(tokens))}:
                continued = replace(request, accepted=tuple(tokens[:split]))
                async with executor.generate(DEFAULT_MODEL, continued) as generation:
                    assert [chunk async for chunk in generation] == whole[split:]


async def test_forward_confirms_the_answers(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        for case in VECTORS["cases"][:5]:
            tokens = [*case["prompt"], *case["answer"]]
            result = await executor.forward(DEFAULT_MODEL, tokens[:-1], start=len(case["prompt"]) - 1)
            assert result.logits.argmax(-1).tolist() == case["answer"]


@pytest.mark.undisturbed
@pytest.mark.parametrize(
    ("prompt", "wait_s"), [("Tell me a long story.", 0.5), (LONG_PROMPT, 0.1)], ids=["decode", "prefill"]
)
async def test_cancelling_stops_within_50_ms(store: ModelStore, prompt: str, wait_s: float) -> None:
    latencies: list[float] = []
    async with open_process_executor(store) as executor:
        await executor.load(DEFAULT_MODEL)
        for _ in range(ATTEMPTS):
            async with executor.generate(DEFAULT_MODEL, GenerationRequest([Message("user", prompt)], 1000)) as chunks:
                with trio.move_on_after(wait_s):
                    async for chunk in chunks:
                        assert chunk.finish is None
                assert executor.statistics().running == 1
                left = time.perf_counter()
            while executor.statistics().running:  # noqa: ASYNC110 - a counter, not an event
                await trio.sleep(0.0005)
            latencies.append(time.perf_counter() - left)
    assert statistics.median(latencies) < CANCEL_S, latencies


@pytest.mark.undisturbed
async def test_the_event_loop_keeps_going(store: ModelStore) -> None:
    late: list[float] = []

    async def tick() -> None:
        due = trio.current_time() + TICK_S
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            late.append(now - due)
            due = max(due + TICK_S, now)

    percentiles: list[float] = []
    async with open_process_executor(store) as executor:
        await executor.load(DEFAULT_MODEL)
        for _ in range(ATTEMPTS):
            late.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tick)
                await answer(executor, [Message("user", LONG_PROMPT[:1000])])
                nursery.cancel_scope.cancel()
            percentiles.append(float(np.quantile(late, 0.99)))
    assert statistics.median(percentiles) < TICK_S, percentiles
