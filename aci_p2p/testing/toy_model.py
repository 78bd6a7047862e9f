"""A model small enough for simulations that still obeys the rules by which real models are verified.

Its logits are a hash of everything before them, so that a teacher-forced pass over an answer finds the same logits as
its generation did, other weights give another answer, and nothing can be told about the answer without computing it.
"""

# ruff: noqa: ARG002 - the executor has one model, whatever it is called

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import trio

from aci_p2p.executor import (
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
    PromptTooLong,
    Sampling,
    TokenChunk,
)
from aci_p2p.executor.sampling import check_accepted, check_sampling, choose
from aci_p2p.protocol.hashing import digest

VOCABULARY: Final = 256
"""Token ids: one for each byte, so that any prompt can be read."""
END: Final = 0
"""Token id that ends an answer."""
CONTEXT: Final = 4_096
"""Longest sequence, tokens."""
MEAN_ANSWER: Final = 32
"""Tokens of an answer without a limit, on average."""

_VOWELS: Final = ("a", "e", "i", "o", "u", "ai", "au", "ei", "an", "en", "in", "on", "un", "as", "is", "us")
_SYLLABLES: Final = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in _VOWELS)
_SCALE: Final = np.float32(1 / 4096)
_END_BONUS: Final = np.float32(100)


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer."""

    token: int
    """Its id."""
    text: str
    """Its text; empty for END."""
    finish: FinishReason | None
    """Set with the last one."""


class ToyModel:
    """A deterministic model. `name` stands for its weights: another name, another model."""

    def __init__(self, name: str = "toy", *, rounding: int = 0) -> None:
        """`rounding`: bits that every logit loses, as quantised weights would have it; 0 is the true model."""
        self.name = name
        self.root = digest("toy-model", name.encode())
        self._rounding = rounding

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation: its bytes, each turn behind its role."""
        return tuple(b"".join(f"{message.role}\n{message.content}\n".encode() for message in messages))

    def logits(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Logits after each of `tokens`, shape (VOCABULARY,) each."""
        state = hashlib.sha256(self.root)
        for token in tokens:
            state.update(token.to_bytes(1))
            yield self._spread(state.digest())

    def _spread(self, key: bytes) -> npt.NDArray[np.float32]:
        raw = np.frombuffer(hashlib.shake_128(key).digest(2 * VOCABULARY), "<u2")
        if self._rounding:
            raw = (raw >> self._rounding) << self._rounding
        logits = raw.astype(np.float32) * _SCALE
        if key[0] < 256 // MEAN_ANSWER:
            logits[END] += _END_BONUS
        return logits

    def answer(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, accepted: Sequence[int] = ()
    ) -> Iterator[Step]:
        """The answer to a prompt, token by token; what comes behind the `accepted` ones, of `max_tokens` in all."""
        state = hashlib.sha256(self.root + bytes(prompt) + bytes(accepted))
        for index in range(len(accepted), max_tokens):
            token = choose(self._spread(state.digest()), sampling, index)
            state.update(token.to_bytes(1))
            if token == END:
                yield Step(token, "", FinishReason.STOP)
                return
            text = _SYLLABLES[token] + (" " if token % 3 == 0 else "")
            yield Step(token, text, FinishReason.LENGTH if index == max_tokens - 1 else None)


@dataclass(slots=True)
class _Counts:
    running: int = 0
    produced: int = 0


class _ToyGeneration(Generation):
    def __init__(self, chunks: AsyncIterator[TokenChunk], input_tokens: int) -> None:
        self._chunks = chunks
        self._input_tokens = input_tokens

    @property
    def input_tokens(self) -> int:
        return self._input_tokens

    async def __anext__(self) -> TokenChunk:
        return await anext(self._chunks)


class ToyExecutor(Executor):
    """Runs one toy model in the event loop, at a chosen speed; can be told to fail and to lie."""

    def __init__(
        self,
        model: ToyModel,
        *,
        tokens_per_second: float = 100.0,
        fail_after: int | None = None,
        runs: ToyModel | None = None,
        stop_after: int | None = None,
    ) -> None:
        """`model` is the one that it claims to run; its lies are found by running that again (`forward`).

        `fail_after`: tokens that it makes of every answer, after which it dies; None: never. `runs`: what it runs in
        truth, another model or a rounded one. `stop_after`: tokens after which it says that the model ended; None:
        where it does.
        """
        self._model = model
        self._pace_s = 1 / tokens_per_second
        self._fail_after = fail_after
        self._runs = runs or model
        self._stop_after = stop_after
        self._counts = _Counts()

    async def load(self, model: str) -> ModelInfo:
        await trio.lowlevel.checkpoint()
        return ModelInfo(model, self._model.root, CONTEXT, VOCABULARY)

    @asynccontextmanager
    async def generate(self, model: str, request: GenerationRequest) -> AsyncGenerator[Generation]:
        check_sampling(request.sampling)
        check_accepted(request.accepted, VOCABULARY, (END,), request.max_tokens)
        prompt = self._model.encode(request.messages)
        if len(prompt) + request.max_tokens > CONTEXT:
            msg = f"the prompt takes {len(prompt)} tokens, the context is {CONTEXT}"
            raise PromptTooLong(msg)
        await trio.lowlevel.checkpoint()
        self._counts.running += 1
        try:
            yield _ToyGeneration(self._chunks(prompt, request), len(prompt))
        finally:
            self._counts.running -= 1

    async def _chunks(self, prompt: Sequence[int], request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        accepted = request.accepted
        if len(accepted) == request.max_tokens or END in accepted:
            finish = FinishReason.STOP if END in accepted else FinishReason.LENGTH
            yield TokenChunk(len(accepted), (), "", finish)
            return
        steps = self._runs.answer(prompt, request.max_tokens, request.sampling, accepted)
        for made, step in enumerate(steps):
            await trio.sleep(self._pace_s)
            if made == self._fail_after:
                msg = "the executor died"
                raise ExecutorFailed(msg)
            self._counts.produced += 1
            index = len(accepted) + made
            if made + 1 == self._stop_after:
                yield TokenChunk(index, (step.token,), step.text, FinishReason.STOP)
                return
            yield TokenChunk(index, (step.token,), step.text, step.finish)

    async def encode(self, model: str, messages: Sequence[Message]) -> tuple[int, ...]:
        await trio.lowlevel.checkpoint()
        return self._model.encode(messages)

    async def forward(self, model: str, tokens: Sequence[int], *, start: int = 0) -> ForwardResult:
        await trio.lowlevel.checkpoint()
        rows = list(self._runs.logits(tokens))[start:]
        return ForwardResult(np.stack(rows) if rows else np.empty((0, VOCABULARY), np.float32))

    def describe(self, model: str) -> EngineDescription:
        return EngineDescription("aci-toy/1", "toy", "simulated", "none")

    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(self._counts.running, 0, self._counts.produced, 0)
