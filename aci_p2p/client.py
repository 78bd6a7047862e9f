"""The consumer API: ask a model of the network, get text, tokens, proof and receipt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import trio

from aci_p2p.attempts import Attempts, Patience, Update, open_attempts
from aci_p2p.config import (
    DEFAULT_BID_WINDOW_MS,
    DEFAULT_BUSY_WAIT_MS,
    DEFAULT_LATENCY_VALUE,
    DEFAULT_MAX_TOKENS,
    DEFAULT_PROVIDERS,
    DEFAULT_RETRY_COST,
    DEFAULT_SLOTS,
    ClientConfig,
    NodeConfig,
)
from aci_p2p.consumer import JobResult
from aci_p2p.executor import ModelStore
from aci_p2p.node import Node, NodeParts, open_node
from aci_p2p.protocol import cbor
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError, LocalError, ResourceError
from aci_p2p.protocol.feasibility import why_impossible
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Deliver
from aci_p2p.protocol.messages import MAX_SHARES, MAX_TEMPERATURE_MILLI, MAX_TOKENS, Conversation, Receipt, Turn
from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.protocol.proof import ProofFile, VerifiedProof, encode_proof, verify_proof
from aci_p2p.protocol.publications import MAX_LATENCY_MS, CapabilityRecord
from aci_p2p.protocol.request import ImpossibleJob, JobRequest
from aci_p2p.protocol.terms import SelectionTerms, Verification
from aci_p2p.protocol.wire import to_value
from aci_p2p.tasks import open_background

DEFAULT_AT_ONCE: Final = DEFAULT_SLOTS
"""Questions of a batch that run together: one provider's slots."""
MILLI: Final = 1_000
VERIFICATIONS: Final = {"optimistic": Verification.OPTIMISTIC}
"""What `Requirements` may ask for, by name."""


class UnknownModel(LocalError):
    """No model of that name is known here."""

    code = "unknown_model"

    def __init__(self, model: str, known: Sequence[str]) -> None:
        super().__init__(
            f"unknown model {model!r}", hint=f"known: {', '.join(known)}; or give a weights root of 64 hex digits"
        )
        self.model = model


class NotConnected(ResourceError):
    """The node is connected to nobody, so nobody can hear its offer."""

    code = "not_connected"


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a consumer asks of its provider."""

    max_price: int = ONE_ACI
    """Most to pay for the whole job, base units (10^-18 ACI)."""
    max_latency_ms: int = MAX_LATENCY_MS
    """Longest promised time to the first token, milliseconds."""
    bid_window_ms: int = DEFAULT_BID_WINDOW_MS
    """How long to wait for bids, milliseconds; less when all known providers have bid."""
    min_provider_stake: int = 0
    """Least stake of a provider, base units."""
    verification: str = "optimistic"
    """How the answer is checked: accepted unless it is challenged within a day."""
    priority_fee: int = 0
    """What to pay to be served before others, base units."""
    latency_value: int = DEFAULT_LATENCY_VALUE
    """What a second until the first token is worth, base units: so much more a faster provider may cost."""
    retry_cost: int = DEFAULT_RETRY_COST
    """What a provider's failure costs, base units: times its likelihood, so much more a surer one may cost."""
    quantisations: tuple[str, ...] = ()
    """Weight formats that will do, such as `none`; empty: any."""
    regions: tuple[str, ...] = ()
    """Regions that will do, as providers name them; empty: any."""

    def __post_init__(self) -> None:
        """Raises LocalError on a verification that is not offered."""
        if self.verification not in VERIFICATIONS:
            msg = f"{self.verification!r} is not how answers are verified"
            raise LocalError(msg, hint=f"one of: {', '.join(VERIFICATIONS)}")

    @property
    def terms(self) -> SelectionTerms:
        """What bids are held to."""
        return SelectionTerms(
            self.min_provider_stake, self.latency_value, self.retry_cost, self.quantisations, self.regions
        )


@dataclass(frozen=True, slots=True)
class Fallback:
    """What to do when a provider fails, is late or is busy."""

    providers: int = DEFAULT_PROVIDERS
    """Providers that may begin, one after the other: the next goes on behind the tokens that have come."""
    consensus: str = "any"
    """Whose answer counts: that of whoever answers."""
    hedge_after_ms: int = 0
    """When no token has come so long after the award, another provider is asked too, and the first to begin goes on;
    milliseconds, 0: never. Both together cost no more than one may: nobody is asked too where nothing would be left."""
    busy_wait_ms: int = DEFAULT_BUSY_WAIT_MS
    """How long after the beginning to ask again where nobody took the job and one was busy, milliseconds: when it says,
    and after 1, 2, 4 and 5 seconds at least."""

    def __post_init__(self) -> None:
        """Raises LocalError on what is not offered."""
        if self.consensus != "any":
            msg = f"{self.consensus!r} is no consensus that is offered"
            raise LocalError(msg, hint="use: any")
        if not 1 <= self.providers <= MAX_SHARES:
            msg = f"a job has 1 to {MAX_SHARES} providers, not {self.providers}"
            raise LocalError(msg)
        if min(self.hedge_after_ms, self.busy_wait_ms) < 0:
            msg = "times to wait are not negative"
            raise LocalError(msg)
        if self.hedge_after_ms and self.providers == 1:
            msg = "a job that one provider may begin cannot be hedged"
            raise LocalError(msg, hint="allow 2 providers (--providers 2), or do not hedge (--hedge-after 0)")

    @property
    def patience(self) -> Patience:
        """When another job is begun for the same answer."""
        return Patience(hedge_after_ms=self.hedge_after_ms, busy_wait_ms=self.busy_wait_ms)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished inference."""

    text: str
    """The answer."""
    tokens: tuple[int, ...]
    """Its token ids."""
    proof: ProofFile
    """What the provider signed, with all openings; `encode_proof` gives the file."""
    receipt: Envelope[Receipt]
    """What we signed: price, and how the provider was chosen."""
    provider: NodeId
    """Who answered."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came of one question of several."""

    number: int
    """Its place among them, from 0."""
    outcome: Answer | AciError
    """The answer, or why there is none."""


class AnswerStream:
    """An inference in progress: iterate over it for text, or over `updates` for everything that happens."""

    def __init__(self, job: Attempts, providers: Sequence[Envelope[CapabilityRecord]]) -> None:
        """Made by `ACI.stream`."""
        self._job = job
        self.providers = providers
        """Providers of the model that were known before the offer."""

    @property
    def job_id(self) -> bytes:
        """32 bytes."""
        return self._job.job_id

    @property
    def updates(self) -> AsyncIterator[Update]:
        """Offers, bids, choices and text as they come, and what went wrong on the way: FailedOver, Hedged, Waiting.

        Before the first token those of two jobs may be mixed. Raises the AciError that ends the job.
        """
        return self._job

    @property
    def answer(self) -> Answer:
        """The finished inference. Raises the AciError that ended it otherwise."""
        return _answer(self._job.result)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The next part of the text. Raises the AciError that ends the job."""
        async for update in self._job:
            if isinstance(update, Deliver) and update.text:
                return update.text
        raise StopAsyncIteration


class ACI:
    """A client of the network: `async with ACI(config) as aci`, or over a node that runs already.

    Example:
        async with ACI(NodeConfig(bootstrap=("/ip4/192.0.2.1/tcp/9400/p2p/12D3KooW...",))) as aci:
            answer = await aci.inference(prompt="What is the capital of France?")
            print(answer.text)
    """

    def __init__(self, node: Node | NodeConfig | None = None, *, parts: NodeParts | None = None) -> None:
        """`node`: a running node, or the configuration of one to run; `parts` replaces its parts, for tests."""
        self._given = node
        self._parts = parts
        self._stack = AsyncExitStack()
        self._node: Node | None = None

    async def __aenter__(self) -> Self:
        if isinstance(self._given, Node):
            self._node = self._given
        else:
            self._node = await self._stack.enter_async_context(open_node(self._given, parts=self._parts))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @property
    def node(self) -> Node:
        """The node underneath; only within the block."""
        if self._node is None:
            msg = "ACI is used outside its `async with` block"
            raise LocalError(msg)
        return self._node

    async def inference(
        self,
        *,
        prompt: str | Sequence[Turn],
        model: str = DEFAULT_MODEL,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        requirements: Requirements | None = None,
        fallback: Fallback | None = None,
    ) -> Answer:
        """Run one inference to its end.

        `prompt` is a question or a whole conversation; `model` a name or a weights root in hex; `temperature` 0 is
        greedy; when a provider fails, `fallback` says how many may take its place. Raises UnknownModel, NotConnected,
        ImpossibleJob, NoBids, PromptRefused, ProviderFault.
        """
        async with self.stream(
            prompt=prompt,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            requirements=requirements,
            fallback=fallback,
        ) as stream:
            async for _ in stream:
                pass
            return stream.answer

    @asynccontextmanager
    async def stream(
        self,
        *,
        prompt: str | Sequence[Turn],
        model: str = DEFAULT_MODEL,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        requirements: Requirements | None = None,
        fallback: Fallback | None = None,
    ) -> AsyncGenerator[AnswerStream]:
        """Run one inference within the block, streaming; leaving it early cancels the job. As `inference`."""
        wanted, fallback = requirements or Requirements(), fallback or Fallback()
        root = resolve_model(model, self.node.config)
        conversation = conversation_of(prompt)
        if not 1 <= max_tokens <= MAX_TOKENS:
            msg = f"max_tokens is between 1 and {MAX_TOKENS}"
            raise LocalError(msg)
        # Not a number is neither below nor above.
        if not 0 <= temperature * MILLI <= MAX_TEMPERATURE_MILLI:
            msg = f"the temperature is between 0 and {MAX_TEMPERATURE_MILLI // MILLI}"
            raise LocalError(msg)
        if not self.node.network.peers:
            msg = "this node is connected to nobody"
            raise NotConnected(msg, hint="give the address of a running node with --bootstrap")
        providers = await self._find_providers(root)
        connected = {record.sender for record in providers} & set(self.node.network.peers)
        request = JobRequest(
            model_root=root,
            conversation=conversation,
            max_tokens=max_tokens,
            temperature_milli=round(temperature * MILLI),
            max_price=wanted.max_price,
            max_latency_ms=wanted.max_latency_ms,
            bid_window_ms=wanted.bid_window_ms,
            expected_bidders=frozenset(connected),
            max_providers=fallback.providers,
            terms=wanted.terms,
            verification=VERIFICATIONS[wanted.verification],
            priority_fee=wanted.priority_fee,
        )
        why = why_impossible(request, providers, self.node.stakes)
        if why and not self._asking(root):
            raise ImpossibleJob(why, hint="ask for less, pay more, or wait for other providers")
        async with open_attempts(self.node.open_job, request, fallback.patience, self.node.clock) as job:
            yield AnswerStream(job, providers)

    @asynccontextmanager
    async def batch(
        self,
        prompts: Sequence[str | Sequence[Turn]],
        *,
        at_once: int = DEFAULT_AT_ONCE,
        model: str = DEFAULT_MODEL,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        requirements: Requirements | None = None,
        fallback: Fallback | None = None,
    ) -> AsyncGenerator[AsyncIterator[BatchResult]]:
        """Run many inferences within the block, `at_once` at a time: iterate over their results, in order of arrival.

        One that fails ends none of the others; leaving early cancels the rest. Raises UnknownModel, and LocalError on a
        prompt that asks nothing, before anybody is asked; the rest is as in `inference`.
        """
        resolve_model(model, self.node.config)
        if isinstance(prompts, str):
            msg = "a batch takes several prompts, not one"
            raise LocalError(msg)
        questions = enumerate([conversation_of(prompt).turns for prompt in prompts])
        if at_once < 1:
            msg = "at least one question is asked at once"
            raise LocalError(msg)

        async def work(results: trio.MemorySendChannel[BatchResult]) -> None:
            with results, suppress(trio.BrokenResourceError):
                for number, prompt in questions:
                    outcome: Answer | AciError
                    try:
                        outcome = await self.inference(
                            prompt=prompt,
                            model=model,
                            max_tokens=max_tokens,
                            temperature=temperature,
                            requirements=requirements,
                            fallback=fallback,
                        )
                    except AciError as error:
                        outcome = error
                    await results.send(BatchResult(number, outcome))

        send, receive = trio.open_memory_channel[BatchResult](0)
        with receive:
            async with open_background() as tasks:
                with send:
                    for _ in range(min(at_once, len(prompts))):
                        tasks.start_soon(work, send.clone())
                yield receive

    async def _find_providers(self, root: bytes) -> Sequence[Envelope[CapabilityRecord]]:
        """Providers of a model in the DHT, unless there are some whose asks are known: these are asked at once."""
        if not self._asking(root):
            return await self.node.find_providers(root)
        self.node.asks.follow(root)
        return ()

    def _asking(self, root: bytes) -> bool:
        return self.node.asks.book.providers(root, self.node.clock()) > 0

    async def verify_proof(self, proof: ProofFile | bytes) -> VerifiedProof:
        """Check a proof offline; nobody is asked. Raises ProofInvalid."""
        data = proof if isinstance(proof, bytes) else encode_proof(proof)
        return await trio.to_thread.run_sync(verify_proof, data)


def resolve_model(model: str, config: NodeConfig) -> bytes:
    """The weights root that a name stands for: a root in hex, a model of our store, or one of the catalogue.

    Raises UnknownModel.
    """
    try:
        root = bytes.fromhex(model)
    except ValueError:
        root = b""
    if len(root) == DIGEST_BYTES:
        return root
    if model in CATALOGUE:
        return CATALOGUE[model].root
    try:
        return ModelStore(config.models_path).open(model).root
    except AciError:
        stored = [entry.name for entry in ModelStore(config.models_path).list()]
        raise UnknownModel(model, sorted({*CATALOGUE, *stored})) from None


def requirements_of(wanted: ClientConfig) -> Requirements:
    """What the settings ask of a provider."""
    return Requirements(
        max_price=wanted.max_price,
        max_latency_ms=wanted.max_latency_ms,
        bid_window_ms=wanted.bid_window_ms,
        min_provider_stake=wanted.min_provider_stake,
        priority_fee=wanted.priority_fee,
        latency_value=wanted.latency_value,
        retry_cost=wanted.retry_cost,
        quantisations=wanted.quantisations,
        regions=wanted.regions,
    )


def fallback_of(wanted: ClientConfig) -> Fallback:
    """What the settings say about providers that fail, are late or busy."""
    return Fallback(wanted.providers, hedge_after_ms=wanted.hedge_after_ms, busy_wait_ms=wanted.busy_wait_ms)


def conversation_of(prompt: str | Sequence[Turn]) -> Conversation:
    """A question, or a conversation, as it is sent. Raises LocalError when it asks nothing, or cannot be sent."""
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if not any(turn.content.strip() for turn in turns):
        msg = "the prompt is empty"
        raise LocalError(msg)
    conversation = Conversation(turns)
    # What no message can carry is refused before anybody is asked.
    cbor.encode(to_value(conversation))
    return conversation


def _answer(result: JobResult) -> Answer:
    return Answer(result.text, result.tokens, result.file, result.receipt, result.provider)
