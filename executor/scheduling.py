"""Continuous batching: which job runs next in the worker.

Every step computes one chunk of one prompt and then one token of every generation that has its prompt behind it
(Yu et al. 2022, Orca; Agrawal et al. 2023, SARATHI). So a long prompt delays the others by a chunk at a time.
"""

from __future__ import annotations

import sys
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from aci_p2p.executor.api import ExecutorFailed, Message, PromptTooLong, Sampling, WeightsMismatch
from aci_p2p.executor.frames import (
    LOGITS_BYTES,
    TOKEN_BYTES,
    Accepted,
    Begun,
    Chunk,
    Credit,
    Encode,
    Encoded,
    Ended,
    Ending,
    Failed,
    Forward,
    Generate,
    Load,
    Loaded,
    Logits,
    Reply,
    Start,
    Turn,
)
from aci_p2p.executor.parallel import Array, Team
from aci_p2p.executor.reference import PREFILL_CHUNK, KeyValueCache, LlamaModel
from aci_p2p.executor.sampling import check_accepted, check_sampling, choose
from aci_p2p.executor.store import ModelStore, StoredModel
from aci_p2p.executor.tokenizer import ChatTokenizer, Detokenizer
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.text import printable

LOADED_MODELS_MAX: Final = 2
"""Models in memory at once; the one unused longest makes room for another."""


@dataclass(slots=True)
class Flag:
    """Set from another thread when a job is cancelled."""

    up: bool = False
    """Whether it is."""

    def __call__(self) -> bool:
        """Whether it is."""
        return self.up


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in memory."""

    stored: StoredModel
    """Where it came from."""
    llama: LlamaModel
    """Its weights."""
    tokenizer: ChatTokenizer
    """Its tokenizer."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """Tokens that pass through a model: what generations and forward passes have in common."""

    job: int
    """Number of the job."""
    cancelled: Flag
    """Asked before every layer."""
    model: _Model
    """The model."""
    tokens: Sequence[int]
    """The prompt with the accepted tokens behind it, or the tokens to check."""
    cache: KeyValueCache
    """Its length says how far the tokens are done."""

    def next_chunk(self) -> Sequence[int]:
        """The tokens of the next prefill step."""
        return self.tokens[self.cache.length : self.cache.length + PREFILL_CHUNK]


@dataclass(slots=True, eq=False)
class _Generation(_Sequence):
    """An answer being generated."""

    sampling: Sampling
    """How tokens are chosen."""
    input_tokens: int
    """Those of the prompt."""
    max_tokens: int
    """Most tokens of the output."""
    credit: int
    """Chunks that may be sent."""
    detokenizer: Detokenizer
    """Makes text of the tokens."""
    produced: int
    """Tokens of the output so far, accepted ones included."""
    last: int = 0
    """The newest token, not yet in the cache."""


@dataclass(slots=True, eq=False)
class _Check(_Sequence):
    """A forward pass over given tokens."""

    start: int
    """First token whose logits are wanted."""


@dataclass(slots=True)
class Scheduler:
    """The jobs of one worker. Not thread-safe but for the flags."""

    store: ModelStore
    """Where models are."""
    send: Callable[[Reply], None]
    """Gives a reply to the node; may block."""
    max_batch: int
    """Most generations computed in one step."""
    team: Team
    """Computes the matrix products."""
    _models: OrderedDict[str, _Model] = field(default_factory=OrderedDict[str, _Model])
    """In memory, the one used longest ago first."""
    _waiting: deque[_Generation] = field(default_factory=deque[_Generation])
    """Accepted, without a place in the batch."""
    _prefilling: deque[_Generation | _Check] = field(default_factory=deque[_Generation | _Check])
    """Whose tokens are not all in the cache; the first is being computed."""
    _decoding: list[_Generation] = field(default_factory=list[_Generation])
    """Whose prompt is in the cache."""

    def start(self, request: Start, cancelled: Flag) -> None:
        """Begin a job; what goes wrong is reported to the node."""
        if cancelled():
            self.send(Ended(request.job))
            return
        with self._reporting(request.job):
            model = self._model(request.model)
            match request:
                case Load():
                    sizes = model.llama.architecture
                    self.send(Loaded(request.job, model.stored.root, sizes.context, sizes.vocabulary))
                    self.send(Ended(request.job))
                case Encode():
                    tokens = model.tokenizer.encode(_messages(request.turns))
                    self.send(Encoded(request.job, np.array(tokens, "<u4").tobytes()))
                    self.send(Ended(request.job))
                case Forward():
                    self._prefilling.append(_check(request, model, cancelled))
                case Generate():
                    generation = _generation(request, model, cancelled)
                    self.send(Accepted(request.job, generation.input_tokens))
                    ending = _ending(generation, request.accepted[-TOKEN_BYTES:])
                    if ending is Ending.NONE:
                        self._waiting.append(generation)
                    else:
                        text = generation.detokenizer.finish()
                        self.send(Chunk(request.job, generation.produced, (), text, ending))
                        self.send(Ended(request.job))

    def add_credit(self, credit: Credit) -> None:
        """Let a generation send more chunks; one that is over needs none."""
        for sequence in (*self._waiting, *self._prefilling, *self._decoding):
            if sequence.job == credit.job and isinstance(sequence, _Generation):
                sequence.credit += credit.chunks

    def step(self) -> bool:
        """Compute a little. False when nothing can be done before the next request."""
        self._drop_cancelled()
        while self._waiting and self._running() < self.max_batch:
            generation = self._waiting.popleft()
            self._prefilling.append(generation)
            self.send(Begun(generation.job))
        ready = [generation for generation in self._decoding if generation.credit > 0]
        idle = not ready and not self._prefilling
        if self._prefilling:
            self._prefill(self._prefilling[0])
        for model in {id(generation.model): generation.model for generation in ready}.values():
            self._decode(model, [generation for generation in ready if generation.model is model])
        return not idle

    def _running(self) -> int:
        return len(self._decoding) + sum(isinstance(sequence, _Generation) for sequence in self._prefilling)

    def _drop_cancelled(self) -> None:
        for sequence in [*self._waiting, *self._prefilling, *self._decoding]:
            if sequence.cancelled():
                self._end(sequence)

    def _end(self, sequence: _Generation | _Check) -> None:
        self._forget(sequence)
        self.send(Ended(sequence.job))

    def _forget(self, sequence: _Generation | _Check) -> None:
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif isinstance(sequence, _Generation):
            (self._decoding if sequence in self._decoding else self._waiting).remove(sequence)

    def _prefill(self, sequence: _Generation | _Check) -> None:
        """One chunk of a sequence's tokens."""
        with self._reporting(sequence.job, sequence):
            chunk = sequence.next_chunk()
            end = sequence.cache.length + len(chunk)
            if isinstance(sequence, _Check):
                outputs = min(len(chunk), max(0, end - sequence.start))
            else:
                outputs = int(end == len(sequence.tokens))
            logits = sequence.model.llama.prefill(chunk, sequence.cache, sequence.cancelled, outputs=outputs)
            if logits is None:
                self._end(sequence)
            elif isinstance(sequence, _Check):
                self._send_logits(sequence, logits)
            elif outputs:
                self._prefilling.remove(sequence)
                self._decoding.append(sequence)
                self._produce(sequence, logits[0])

    def _send_logits(self, check: _Check, logits: Array) -> None:
        rows = max(1, LOGITS_BYTES // (logits.shape[1] * TOKEN_BYTES))
        for first in range(0, len(logits), rows):
            self.send(Logits(check.job, logits[first : first + rows].astype("<f4", copy=False).tobytes()))
        if check.cache.length == len(check.tokens):
            self._end(check)

    def _decode(self, model: _Model, generations: list[_Generation]) -> None:
        """One token of each of the generations."""
        try:
            results = model.llama.decode(
                [generation.last for generation in generations],
                [generation.cache for generation in generations],
                [generation.cancelled for generation in generations],
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the jobs that did not cause it
            if len(generations) == 1:
                self._fail(generations[0].job, error, generations[0])
            else:
                for generation in generations:
                    self._decode(model, [generation])
            return
        for generation, logits in zip(generations, results, strict=True):
            with self._reporting(generation.job, generation):
                if logits is None:
                    self._end(generation)
                else:
                    self._produce(generation, logits)

    def _produce(self, generation: _Generation, logits: Array) -> None:
        """Choose the next token and send it."""
        index = generation.produced
        token = generation.last = choose(logits, generation.sampling, index)
        generation.produced += 1
        generation.credit -= 1
        ending = _ending(generation, token.to_bytes(TOKEN_BYTES, "little"))
        text = generation.detokenizer.push(token)
        if ending is not Ending.NONE:
            text += generation.detokenizer.finish()
        self.send(Chunk(generation.job, index, (token,), text, ending))
        if ending is not Ending.NONE:
            self._end(generation)

    def _model(self, name: str) -> _Model:
        """The model of that name, verified and loaded if it is not in memory, while the other jobs wait."""
        model = self._models.get(name)
        if model is None:
            self._make_room()
            stored = self.store.open(name)
            stored.verify()
            llama = LlamaModel.load(stored.directory, self.team)
            tokenizer = ChatTokenizer(stored.directory, llama.architecture.vocabulary)
            # What was read is what was verified only if nothing was written meanwhile.
            stored.verify()
            model = self._models[name] = _Model(stored, llama, tokenizer)
        self._models.move_to_end(name)
        return model

    def _make_room(self) -> None:
        if len(self._models) < LOADED_MODELS_MAX:
            return
        used = {sequence.model.stored.name for sequence in (*self._waiting, *self._prefilling, *self._decoding)}
        for name in self._models:
            if name not in used:
                del self._models[name]
                return
        msg = f"the executor is busy with {LOADED_MODELS_MAX} other models"
        raise ExecutorFailed(msg, hint="try again when one is done")

    @contextmanager
    def _reporting(self, job: int, sequence: _Generation | _Check | None = None) -> Generator[None]:
        """Let an error in the block fail the job alone."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a job must not take the others with it
            self._fail(job, error, sequence)

    def _fail(self, job: int, error: Exception, sequence: _Generation | _Check | None) -> None:
        if sequence is not None:
            self._forget(sequence)
        self.send(failure(job, error))


def failure(job: int, error: Exception) -> Failed:
    """The reply for a job that failed with `error`; unexpected ones go to standard error as well."""
    if isinstance(error, WeightsMismatch):
        return Failed(job, error.code, error.message, error.hint, (error.expected, error.actual))
    if isinstance(error, AciError):
        return Failed(job, error.code, error.message, error.hint, ())
    if isinstance(error, MemoryError):
        hint = "use a smaller model or fewer jobs at once"
        return Failed(job, ExecutorFailed.code, "the executor is out of memory", hint, ())
    traceback.print_exception(error, file=sys.stderr)
    msg = f"the executor failed: {type(error).__name__}: {printable(str(error))[:200]}"
    return Failed(job, ExecutorFailed.code, msg, "", ())


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [Message(turn.role, turn.content) for turn in turns]


def _ending(generation: _Generation, last: bytes) -> Ending:
    """Whether the output ends with its `last` token, in 4 bytes little-endian; empty: there is none yet."""
    if last and int.from_bytes(last, "little") in generation.model.tokenizer.stop_tokens:
        return Ending.STOP
    return Ending.LENGTH if generation.produced == generation.max_tokens else Ending.NONE


def _generation(request: Generate, model: _Model, cancelled: Flag) -> _Generation:
    """Raises LocalError, TemplateRefused, PromptTooLong."""
    sampling = Sampling(request.temperature_milli, request.seed)
    check_sampling(sampling)
    tokens = model.tokenizer.encode(_messages(request.turns))
    accepted = np.frombuffer(request.accepted, "<u4").tolist()
    sizes = model.llama.architecture
    check_accepted(accepted, sizes.vocabulary, model.tokenizer.stop_tokens, request.max_tokens)
    if not tokens:
        msg = "the prompt is empty"
        raise LocalError(msg)
    if len(tokens) + request.max_tokens > sizes.context:
        msg = f"the prompt has {len(tokens)} tokens; {request.max_tokens} more exceed the context of {sizes.context}"
        raise PromptTooLong(msg, hint="shorten the prompt or ask for fewer tokens")
    return _Generation(
        request.job,
        cancelled,
        model,
        [*tokens, *accepted],
        model.llama.new_cache(),
        sampling=sampling,
        input_tokens=len(tokens),
        max_tokens=request.max_tokens,
        credit=request.credit,
        detokenizer=model.tokenizer.detokenizer(accepted),
        produced=len(accepted),
    )


def _check(request: Forward, model: _Model, cancelled: Flag) -> _Check:
    """Raises LocalError, PromptTooLong."""
    tokens = np.frombuffer(request.tokens, "<u4")
    sizes = model.llama.architecture
    if len(tokens) > sizes.context:
        msg = f"{len(tokens)} tokens exceed the context of {sizes.context}"
        raise PromptTooLong(msg)
    if not request.start < len(tokens) or int(tokens.max()) >= sizes.vocabulary:
        msg = "there is no token to start from, or a token id beyond the vocabulary"
        raise LocalError(msg)
    return _Check(request.job, cancelled, model, tokens.tolist(), model.llama.new_cache(), start=request.start)
