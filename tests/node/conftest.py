"""Nodes over the in-memory network, in virtual time, with a scripted executor: for tests of the node's own logic."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import trio

from aci_p2p.clock import virtual_clock
from aci_p2p.config import NodeConfig, ProviderConfig
from aci_p2p.dht import RecordRules
from aci_p2p.executor.api import (
    EngineDescription,
    Executor,
    ExecutorFailed,
    ExecutorStatistics,
    FinishReason,
    ForwardResult,
    Generation,
    GenerationRequest,
    Message,
    ModelInfo,
    TokenChunk,
)
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.network.memory import MemoryHub
from aci_p2p.node import Node, NodeParts, open_node
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import KeyPair

ROOT = hashlib.sha256(b"scripted model").digest()
MODEL = "scripted"


class ScriptedGeneration(Generation):
    """Chunks with the length of a prompt."""

    def __init__(self, chunks: AsyncIterator[TokenChunk], input_tokens: int) -> None:
        self._chunks = chunks
        self._input_tokens = input_tokens

    @property
    def input_tokens(self) -> int:
        return self._input_tokens

    async def __anext__(self) -> TokenChunk:
        return await anext(self._chunks)


@dataclass
class ScriptedExecutor(Executor):
    """Says a fixed text one word a chunk, at a fixed pace; can fail or hang at a chosen chunk."""

    text: str = "one two three four"
    """What it answers, always."""
    pace: float = 0.01
    """Seconds for each chunk."""
    fail_at: int | None = None
    """Chunk before which `error` is raised."""
    error: AciError = field(default_factory=lambda: ExecutorFailed("the worker died"))
    """What is raised at `fail_at`."""
    input_tokens: int = 10
    """Tokens of every prompt."""
    finish: FinishReason | None = FinishReason.STOP
    """What the last chunk says."""
    running: int = 0
    """Generations in progress."""

    async def load(self, model: str) -> ModelInfo:
        return ModelInfo(model, ROOT, 4096, 1000)

    @asynccontextmanager
    async def generate(self, model: str, request: GenerationRequest) -> AsyncGenerator[Generation]:
        self.running += 1
        try:
            async with aclosing(self._chunks(request)) as chunks:
                yield ScriptedGeneration(chunks, self.input_tokens)
        finally:
            self.running -= 1

    async def _chunks(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk]:
        words = self.text.split(" ")[: request.max_tokens]
        for index, word in enumerate(words):
            await trio.sleep(self.pace)
            if index == self.fail_at:
                raise self.error
            last = index == len(words) - 1
            yield TokenChunk(index, (index,), word + ("" if last else " "), self.finish if last else None)

    async def encode(self, model: str, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(range(self.input_tokens))

    async def forward(self, model: str, tokens: Sequence[int], *, start: int = 0) -> ForwardResult:
        return ForwardResult(np.zeros((len(tokens) - start, 1000), np.float32))

    def describe(self, model: str) -> EngineDescription:
        return EngineDescription("scripted/1", "fp32-ref", "cpu", "none")

    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(self.running, 0, 0, 0)


def due(compute: int) -> int:
    """What a job costs whose tokens cost `compute` base units: a quarter more, for verification."""
    return compute + -(-compute // 4)


OpenTestNode = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
def hub() -> MemoryHub:
    """The network of one test."""
    return MemoryHub(latency=0.01)


@pytest.fixture
def open_test_node(hub: MemoryHub, tmp_path: Path) -> OpenTestNode:
    """Opens nodes called `name`; with an executor they provide the scripted model."""
    counter = itertools.count(1)

    @asynccontextmanager
    async def open_network(key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
        async with hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as network:
            yield network

    @asynccontextmanager
    async def opener(
        name: str,
        bootstrap: Sequence[str] = (),
        *,
        executor: ScriptedExecutor | None = None,
        price: int = 100,
        slots: int = 2,
        asks: bool = True,
    ) -> AsyncGenerator[Node]:
        @asynccontextmanager
        async def open_executor() -> AsyncGenerator[Executor]:
            assert executor is not None
            yield executor

        def entropy(size: int) -> bytes:
            return hashlib.sha256(f"{name} {next(counter)}".encode()).digest()[:size]

        provider = None
        if executor is not None:
            provider = ProviderConfig(
                models=(MODEL,), input_token_price=1, output_token_price=price, slots=slots, asks=asks
            )
        config = NodeConfig(home=tmp_path / name, network="aci-test", bootstrap=tuple(bootstrap), provider=provider)
        parts = NodeParts(
            open_network=open_network, open_executor=open_executor, clock=virtual_clock, entropy=entropy, threads=False
        )
        async with open_node(config, parts=parts) as node:
            yield node

    return opener
