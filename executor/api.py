"""The `Executor` interface: what every back end does, whatever it runs on.

Executors run models; they know nothing of peers, money or jobs. The numpy reference (profile `fp32-ref`) is the default
and the yardstick that verification uses; torch, ExLlamaV2 and HTTP back ends implement the same interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from aci_p2p.protocol.errors import LocalError, ResourceError

if TYPE_CHECKING:
    # Most processes that talk to an executor never see an array: loading numpy takes a fifth of a second.
    import numpy as np
    import numpy.typing as npt

PROFILE: Final = "fp32-ref"
"""Numeric profile of the reference: outputs are comparable with those of any fp32 forward pass."""


class ModelUnavailable(LocalError):
    """The model is not in the store, or a file of it is missing or unreadable."""

    code = "model_unavailable"


class WeightsMismatch(LocalError):
    """The files' Merkle root is not the expected one: the weights, tokenizer or config were altered."""

    code = "weights_mismatch"

    def __init__(self, model: str, expected: bytes, actual: bytes) -> None:
        """`model` by its name in the store; the two weights roots have 32 bytes."""
        super().__init__(
            f"the files of model {model} were altered: their weights root is {actual.hex()}, not {expected.hex()}",
            hint="remove the model from the store and fetch it again",
        )
        self.model = model
        self.expected = expected
        self.actual = actual


class PromptTooLong(LocalError):
    """Prompt tokens plus `max_tokens` exceed the model's context."""

    code = "prompt_too_long"


class TemplateRefused(LocalError):
    """The model's chat template does not accept the conversation, or cannot be rendered."""

    code = "template_refused"


class ExecutorFailed(ResourceError):
    """The worker process died (segfault, out of memory) or refused: the job failed, the node did not."""

    code = "executor_failed"


class FinishReason(StrEnum):
    """Why generation ended."""

    STOP = "stop"
    """The model produced an end-of-sequence token."""
    LENGTH = "length"
    """`max_tokens` were produced."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, rendered with the model's own chat template."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """UTF-8 text."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Integers only, so that it can be signed."""

    temperature_milli: int = 0
    """Thousandths; 0 is greedy (the largest logit, lowest id on a tie)."""
    seed: bytes = b""
    """32 bytes when sampling: keys the Philox stream of the seeded Gumbel-max draw, counter = token index."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation."""

    messages: Sequence[Message]
    """The conversation so far, oldest first."""
    max_tokens: int
    """Largest number of tokens of the whole output, those of `accepted` included; at least 1."""
    sampling: Sampling = Sampling()
    """How tokens are chosen."""
    accepted: tuple[int, ...] = ()
    """The output's first tokens, which anybody has produced before: they are read behind the prompt, and the output
    goes on after them. If they are all of it, one chunk without tokens says why it ended."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens produced since the last chunk, with their text."""

    index: int
    """Position of the first of `tokens` in the output, from 0; a continued output begins behind `accepted`."""
    tokens: tuple[int, ...]
    """Token ids, one or more, an end-of-sequence token included; empty only in a last chunk that flushes text."""
    text: str
    """Their text. Bytes of a character still incomplete are held back for a later chunk; one that the accepted tokens
    began comes whole."""
    finish: FinishReason | None = None
    """Set in the last chunk only."""


class Generation(AsyncIterator[TokenChunk]):
    """A generation that runs: its chunks, in order, until one has `finish` set. Made by `Executor.generate` only."""

    @property
    @abstractmethod
    def input_tokens(self) -> int:
        """Tokens of the prompt, those of the chat template included and accepted ones not."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model."""

    name: str
    """Name in the model store."""
    root: bytes
    """Weights root: SHA-256 Merkle root over weights, tokenizer and config, 32 bytes."""
    context: int
    """Longest sequence, tokens."""
    vocabulary: int
    """Number of token ids."""


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What runs the model, as it goes into proofs. Self-declared."""

    engine: str
    """Back end and version, for example `aci-numpy/0.1.0`."""
    profile: str
    """Numeric profile: which outputs are comparable and with what tolerance, for example `fp32-ref`."""
    device: str
    """Hardware in words, for example `cpu x86_64`."""
    quantisation: str
    """Weight format as computed with, for example `bf16` or `none`."""


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Teacher-forced forward pass over given tokens, for checking a result."""

    logits: npt.NDArray[np.float32]
    """Shape (len(tokens) - start, vocabulary): row i holds the logits after token start + i."""


@dataclass(frozen=True, slots=True)
class ExecutorStatistics:
    """A snapshot of the executor's queue."""

    running: int
    """Generations being decoded."""
    waiting: int
    """Generations accepted but not begun."""
    produced: int
    """Tokens produced since the executor opened."""
    restarts: int
    """Worker processes that died and were replaced."""


class Executor(ABC):
    """A running back end. Made only by `async with`."""

    @abstractmethod
    async def load(self, model: str) -> ModelInfo:
        """Verify the files of a model in the store against its root, then load it; cheap when loaded already.

        Loading takes seconds, in which the generations that already run on the same worker stand still: load the
        models that are served before work is taken.

        Raises ModelUnavailable, WeightsMismatch, ExecutorFailed.
        """

    @abstractmethod
    def generate(self, model: str, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Stream a generation within the block; leaving it (or cancelling) stops the computation within 50 ms.

        Entering the block loads the model if need be. It raises ModelUnavailable, WeightsMismatch, TemplateRefused,
        PromptTooLong, ExecutorFailed, and LocalError for a request that makes no sense (a message without a known
        role, a temperature out of range, sampling without a seed, accepted tokens that cannot be continued). Iterating
        raises ExecutorFailed.
        """

    @abstractmethod
    async def encode(self, model: str, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation under the model's chat template, ready for generation."""

    @abstractmethod
    async def forward(self, model: str, tokens: Sequence[int], *, start: int = 0) -> ForwardResult:
        """Logits after each of `tokens[start:]`, in one pass, without sampling."""

    @abstractmethod
    def describe(self, model: str) -> EngineDescription:
        """What goes into proofs for a model of the store, loaded or not."""

    @abstractmethod
    def statistics(self) -> ExecutorStatistics:
        """A snapshot of the counters."""
