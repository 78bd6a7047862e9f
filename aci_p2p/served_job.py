"""One job that a provider has won: runs the model and streams what it produces."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.executor import (
    EngineDescription,
    Executor,
    ExecutorFailed,
    FinishReason,
    GenerationRequest,
    Message,
    ModelUnavailable,
    PromptTooLong,
    Sampling,
    WeightsMismatch,
)
from aci_p2p.jobs import JobShell, StreamPump
from aci_p2p.network.api import Stream
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    Effect,
    Failed,
    Finished,
    FrameArrived,
    HoldGeneration,
    ResumeGeneration,
    StartGeneration,
    StopGeneration,
)
from aci_p2p.protocol.messages import AbortCode, Conversation, Finish, Offer
from aci_p2p.protocol.provider import (
    GenerationEnded,
    GenerationFailed,
    Produced,
    ProviderEvent,
    ProviderJob,
)
from aci_p2p.protocol.publications import Engine
from aci_p2p.store import Store
from aci_p2p.tasks import open_background

_FINISH: Final = {FinishReason.STOP: Finish.STOP, FinishReason.LENGTH: Finish.LENGTH}

log = logging.getLogger("aci_p2p.provider")


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a running job is."""

    job_id: bytes
    """32 bytes."""
    consumer: NodeId
    """For whom."""
    model: str
    """Name in our model store."""
    elapsed_s: float
    """Seconds since its award."""
    tokens: int
    """Tokens produced."""
    tokens_per_s: float
    """Decoding speed after the first part; 0 before there is a second."""


class ServedJob(JobShell[ProviderEvent]):
    """One job that we won."""

    def __init__(
        self, job: ProviderJob, offer: Envelope[Offer], store: Store, clock: Clock, executor: Executor, model: str
    ) -> None:
        super().__init__(job, store, clock)
        self._job = job
        self._offer = offer
        self._executor = executor
        self._model = model
        self._started = trio.current_time()
        self._first: tuple[float, int] | None = None
        self._last = 0.0
        self._tokens = 0
        self._generation = trio.CancelScope()
        self._flowing = trio.Event()
        self._flowing.set()
        self._tasks: trio.Nursery | None = None
        self.latency_s: float | None = None
        self.unavailable = False
        self.error: AciError | None = LocalError("the job did not run to its end")

    @property
    def model_root(self) -> bytes:
        """Weights root, 32 bytes."""
        return self._offer.body.model_root

    @property
    def price(self) -> int:
        """What it costs, base units."""
        return self._job.price

    @property
    def paid(self) -> int:
        """What of it was promised while it ran, base units."""
        return self._job.paid

    def progress(self) -> JobProgress:
        """How far it is."""
        elapsed = trio.current_time() - self._started
        first, tokens = self._first or (0.0, 0)
        speed = (self._tokens - tokens) / (self._last - first) if self._last > first else 0.0
        return JobProgress(self._job.job_id, self._offer.sender, self._model, elapsed, self._tokens, speed)

    def _note(self, tokens: int) -> None:
        self._last = trio.current_time()
        self._tokens += tokens
        if self._first is None:
            self._first = self._last, self._tokens

    async def serve(self, stream: Stream, frame: bytes) -> None:
        """Run the job to its end, or until its consumer is gone."""
        self._pump = StreamPump(self.tell)
        async with trio.open_nursery() as streams:
            streams.start_soon(self._pump.run, nullcontext(stream))
            async with open_background() as tasks:
                self._tasks = tasks
                try:
                    await self.run(FrameArrived(frame))
                except AciError as error:
                    # Our own trouble, such as a full disk.
                    self.error = error

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case StartGeneration():
                assert self._tasks is not None  # set before the first event
                self._tasks.start_soon(self._generate, effect)
            case HoldGeneration():
                self._flowing = trio.Event()
            case ResumeGeneration():
                self._flowing.set()
            case StopGeneration():
                self._generation.cancel()
            case Finished():
                self.error = None
            case Failed(error):
                self.error = error
            case _:
                msg = f"a provider's job has no {type(effect).__name__}"
                raise AssertionError(msg)

    async def _generate(self, run: StartGeneration) -> None:
        with self._generation:
            try:
                await self._stream_answer(run)
            except AciError as error:
                failure = _failure(error)
                # What is wrong with a consumer's prompt is nothing that the provider's owner can mend.
                is_ours = failure.abort not in (AbortCode.PROMPT_TOO_LONG, AbortCode.INVALID_PROMPT)
                level = logging.WARNING if is_ours else logging.INFO
                log.log(level, "generation failed", extra={"fields": {"model": self._model, "error": error}})
                self.unavailable = isinstance(error, ModelUnavailable | WeightsMismatch)
                await self.tell(failure)

    async def _stream_answer(self, run: StartGeneration) -> None:
        messages = _messages(run.conversation)
        seed = run.seed if run.temperature_milli else b""
        sampling = Sampling(run.temperature_milli, seed)
        request = GenerationRequest(messages, run.max_tokens, sampling, run.accepted)
        finish: FinishReason | None = None
        started = trio.current_time()
        async with self._executor.generate(self._model, request) as generation:
            if generation.input_tokens > run.max_input_tokens:
                msg = f"the prompt takes {generation.input_tokens} tokens, the offer pays for {run.max_input_tokens}"
                raise PromptTooLong(msg)
            async for chunk in generation:
                if self.latency_s is None:
                    self.latency_s = trio.current_time() - started
                if chunk.tokens or chunk.text:
                    self._note(len(chunk.tokens))
                    await self.tell(Produced(chunk.tokens, chunk.text, generation.input_tokens))
                finish = chunk.finish or finish
                if not self._flowing.is_set():
                    await self._flowing.wait()
        if finish is None:
            msg = "the executor did not say why it ended"
            raise ExecutorFailed(msg)
        engine = engine_of(self._executor.describe(self._model))
        await self.tell(GenerationEnded(_FINISH[finish], generation.input_tokens, engine))


def _failure(error: AciError) -> GenerationFailed:
    """What the consumer is told: nothing of our files and machine, which the messages of other errors may name."""
    match error:
        case PromptTooLong():
            return GenerationFailed(AbortCode.PROMPT_TOO_LONG, error.message)
        case ModelUnavailable() | WeightsMismatch():
            return GenerationFailed(AbortCode.MODEL_UNAVAILABLE, "the provider cannot serve the model any more")
        case LocalError():
            return GenerationFailed(AbortCode.INVALID_PROMPT, "the model's chat template refuses the conversation")
        case _:
            return GenerationFailed(AbortCode.EXECUTOR_FAILED, "the computation failed")


def _messages(conversation: Conversation) -> tuple[Message, ...]:
    return tuple(Message(turn.role, turn.content) for turn in conversation.turns)


def engine_of(description: EngineDescription) -> Engine:
    """What runs a model, as messages carry it."""
    return Engine(description.engine, description.profile, description.device, description.quantisation)
