"""What the tests of the two state machines share: fixed parties, and benches that run a machine in virtual time.

A bench checks what must hold of every step, whatever a test is about: see `Bench.feed`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar, cast

from aci_p2p.protocol.commitments import (
    derive_seed,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.consumer import ConsumerJob, Start
from aci_p2p.protocol.envelope import Envelope, Sealer, kind_of, open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import (
    AskForQuotes,
    Broadcast,
    CloseStream,
    Deliver,
    Effect,
    Failed,
    Finished,
    FrameArrived,
    JobRecord,
    OpenStream,
    Payment,
    PaymentState,
    Persist,
    Send,
    SetTimer,
    StartGeneration,
    StopGeneration,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import FINAL_STATES, TRANSITIONS, Party, State
from aci_p2p.protocol.messages import (
    KINDS,
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    Commit,
    Conversation,
    Finish,
    Input,
    Kind,
    Offer,
    Opening,
    Proof,
    Receipt,
    Reveal,
    Share,
    Tokens,
    Turn,
    Voucher,
)
from aci_p2p.protocol.provider import GenerationEnded, GenerationFailed, Produced, ProviderJob, ProviderSecrets
from aci_p2p.protocol.publications import Engine
from aci_p2p.protocol.request import JobRequest, JobSecrets
from aci_p2p.protocol.round import BidArrived, QuotesAsked
from aci_p2p.protocol.sealing import Binding, OpeningKey, seal_opening
from aci_p2p.protocol.selection import ExpectedCost, Knowledge, SelectionRule
from aci_p2p.protocol.settlement import read_statement, settle
from aci_p2p.protocol.terms import ANY_PROVIDER, Price

T = TypeVar("T")

NETWORK: Final = "aci-test"
NOW: Final = 1_800_000_000_000
"""When every test begins, Unix milliseconds."""
CONSUMER: Final = KeyPair(bytes([1]) * 32)
PROVIDER: Final = KeyPair(bytes([2]) * 32)
RIVAL: Final = KeyPair(bytes([3]) * 32)
STRANGER: Final = KeyPair(bytes([4]) * 32)
MODEL_ROOT: Final = bytes([5]) * 32
SECRETS: Final = JobSecrets(salt=bytes([6]) * 32, nonce=bytes([7]) * 32)
PROVIDER_SECRETS: Final = ProviderSecrets(nonce=bytes([8]) * 32, salt=bytes([9]) * 32, kem_seed=bytes([10]) * 32)
OPENING_KEY: Final = OpeningKey(PROVIDER_SECRETS.kem_seed)
CONVERSATION: Final = Conversation((Turn("system", "Be brief."), Turn("user", "Où est la gare ?")))
OPENING: Final = Opening(CONVERSATION, SECRETS.salt, SECRETS.nonce, ())
ENGINE: Final = Engine("fake/1", "fp32-ref", "cpu", "none")
REQUEST: Final = JobRequest(
    model_root=MODEL_ROOT,
    conversation=CONVERSATION,
    max_tokens=8,
    temperature_milli=700,
    max_price=10**18,
    max_latency_ms=5_000,
    bid_window_ms=2_000,
    expected_bidders=frozenset(),
    max_providers=1,
)
PARTS: Final = (((11, 12), "Tout "), ((13,), "droit"), ((), "."))
"""The answer of the fake model: tokens and text of each part."""
TOKENS: Final = tuple(token for tokens, _ in PARTS for token in tokens)
TEXT: Final = "".join(text for _, text in PARTS)
INPUT_TOKENS: Final = 21
PRICES: Final = {"input_token_price": 3 * 10**12, "output_token_price": 5 * 10**12}
"""Of the provider's bid, base units for each token."""
COMPUTE: Final = 3 * 10**12 * INPUT_TOKENS + 5 * 10**12 * len(TOKENS)
CHARGES: Final = Price(COMPUTE, licence=0, verification=COMPUTE // 4, priority=0)
PRICE: Final = COMPUTE + COMPUTE // 4

STORED_BEFORE: Final = {
    Kind.AWARD: {State.AWARDED},
    Kind.ACCEPT: {State.ACCEPTED},
    Kind.INPUT: {State.STREAMING},
    Kind.TOKENS: {State.STREAMING},
    Kind.VOUCHER: {State.STREAMING},
    Kind.COMMIT: {State.COMMITTED},
    Kind.REVEAL: {State.REVEALED},
    Kind.ABORT: FINAL_STATES | {State.OFFERED},
}
"""The state that must be on disk before a message is sent: one of these must be the last that was stored."""


def alter(message: T, **changes: object) -> T:
    """`dataclasses.replace` for fields named at run time."""
    return cast("T", replace(cast("Any", message), **changes))


def of(effects: Sequence[Effect], kind: type[T]) -> list[T]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def one(effects: Sequence[Effect], kind: type[T]) -> T:
    """The only effect of a kind."""
    (effect,) = of(effects, kind)
    return effect


def sent(effects: Sequence[Effect]) -> list[Kind]:
    """The kinds of the frames sent, in order."""
    return [kind_of(effect.data) for effect in of(effects, Send)]


def opened(frame: bytes, body: type[T], now: int = NOW) -> T:
    """The body of a frame that passes every check."""
    return open_envelope(frame, body, network=NETWORK, now=now).body


def make_offer(sealer: Sealer | None = None, request: JobRequest = REQUEST) -> Envelope[Offer]:
    """An offer as a consumer's job makes it."""
    job = ConsumerJob(sealer or Sealer(CONSUMER, NETWORK), request, SECRETS, ExpectedCost())
    job.handle(Start(), NOW)
    return job.offer


def make_bid(
    offer: Envelope[Offer], key: KeyPair = PROVIDER, *, lifetime_ms: int = 60_000, now: int = NOW, **terms: object
) -> Envelope[Bid]:
    """A bid for an offer."""
    bid = Bid(
        job_id=offer.body.job_id, offer_digest=offer.digest, model_root=offer.body.model_root, **PRICES,
        latency_ms=300, addresses=("/ip4/192.0.2.1",),
        quantisation="none", region="eu-west",
    )  # fmt: skip
    return Sealer(key, NETWORK).seal(alter(bid, **terms), now, lifetime_ms=lifetime_ms)


def make_proof(offer: Envelope[Offer], bid: Envelope[Bid], **changes: object) -> Proof:
    """What an honest provider would state, with changes."""
    job_id = offer.body.job_id
    proof = Proof(
        job_id=job_id,
        consumer=offer.sender,
        offer_digest=offer.digest,
        bid_digest=bid.digest,
        model_root=offer.body.model_root,
        input_commitment=offer.body.input_commitment,
        input_tokens=INPUT_TOKENS,
        output_tokens=len(TOKENS),
        tokens_hash=tokens_digest(job_id, TOKENS),
        text_hash=text_digest(job_id, TEXT),
        finish=Finish.STOP,
        temperature_milli=offer.body.temperature_milli,
        seed=derive_seed(SECRETS.nonce, PROVIDER_SECRETS.nonce, job_id),
        provider_nonce=PROVIDER_SECRETS.nonce,
        engine=ENGINE,
        first_token=0,
    )
    return alter(proof, **changes)


class Bench:
    """Feeds one machine with events and keeps what it asked for."""

    def __init__(self, job: ConsumerJob | ProviderJob, peer: KeyPair) -> None:
        """`peer`: who signs the frames of the other side."""
        self.job = job
        self.peer = Sealer(peer, NETWORK)
        self.now = NOW
        self.effects: list[Effect] = []
        self.records: list[JobRecord] = []
        self.payments: dict[NodeId, Payment] = {}
        self.timer: int | None = None
        self.connected = job.role is Party.PROVIDER

    def feed(self, event: object) -> list[Effect]:
        """One step. Checks what holds of every step:

        every move is in the table, stored, and stored before its message is sent; there is one stream at a time, and
        frames go into an open one; whoever waits has a timer; nothing follows the end, and after it no event has any
        effect.
        """
        before, was_over = self.job.state, self.job.over
        effects = cast("Callable[[object, int], list[Effect]]", self.job.handle)(event, self.now)
        if was_over:
            assert not effects
            assert self.job.state is before
        self._check_storage(before, effects)
        self._check_stream(effects)
        for effect in effects:
            if isinstance(effect, SetTimer):
                assert effect.at > self.now
                self.timer = effect.at
        ends = [index for index, effect in enumerate(effects) if isinstance(effect, Failed | Finished)]
        assert self.job.over == (was_over or bool(ends))
        assert ends in ([], [len(effects) - 1])
        if ends:
            assert of(effects, CloseStream)
        if self.job.role is Party.PROVIDER and of(effects, Failed) and before is not State.OFFERED:
            assert of(effects, StopGeneration)
        self.effects += effects
        return effects

    def _check_stream(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, OpenStream):
                assert not self.connected
                self.connected = True
            elif isinstance(effect, CloseStream):
                self.connected = False
            elif isinstance(effect, Send):
                assert self.connected

    def _check_storage(self, state: State, effects: Sequence[Effect]) -> None:
        before = state
        for effect in effects:
            if isinstance(effect, Persist):
                record = effect.record
                assert record.state in {target for (source, _), target in TRANSITIONS.items() if source is state}
                assert (record.job_id, record.role, record.updated_at) == (self.job.job_id, self.job.role, self.now)
                assert record.model_root == MODEL_ROOT
                self.records.append(record)
                for payment in effect.payments:
                    assert (payment.job_id, payment.role) == (self.job.job_id, self.job.role)
                    self.payments[payment.peer] = payment
                state = record.state
            elif isinstance(effect, Send):
                kind = kind_of(effect.data)
                left = before is State.OFFERED and self.job.role is Party.PROVIDER
                assert state in STORED_BEFORE.get(kind, {before}) or (left and kind is Kind.ABORT)
                # Whatever is sent passes the checks of whoever reads it.
                opened(effect.data, KINDS[kind].body, self.now)
        # A provider that leaves before the award has nothing to store.
        assert self.job.state in (state, State.CANCELLED)
        if self.job.state is not state:
            assert (self.job.role, before) == (Party.PROVIDER, State.OFFERED)

    @property
    def last(self) -> JobRecord:
        """What is stored of the job."""
        return self.records[-1]

    @property
    def error(self) -> AciError:
        """Why the job failed."""
        return one(self.effects, Failed).error

    def receive(self, body: object) -> list[Effect]:
        """A frame with `body` comes, signed by the other side."""
        return self.feed(FrameArrived(self.peer.seal(body, self.now).data))

    def time_out(self) -> list[Effect]:
        """The timer fires, when it is due."""
        assert self.timer is not None
        self.now = self.timer
        return self.feed(TimerFired())


class ConsumerBench(Bench):
    """A consumer's job, facing frames made by hand."""

    job: ConsumerJob

    def __init__(
        self, request: JobRequest = REQUEST, rule: SelectionRule | None = None, knowledge: Knowledge | None = None
    ) -> None:
        sealer = Sealer(CONSUMER, NETWORK)
        super().__init__(ConsumerJob(sealer, request, SECRETS, rule or ExpectedCost(), knowledge), PROVIDER)

    def bid(self, key: KeyPair = PROVIDER, *, lifetime_ms: int = 60_000, **terms: Any) -> Envelope[Bid]:  # noqa: ANN401 - fields of a bid
        """A bid arrives; returned."""
        bid = make_bid(self.job.offer, key, lifetime_ms=lifetime_ms, **terms)
        self.feed(BidArrived(bid))
        return bid

    def reach(self, state: State) -> ConsumerBench:
        """Go the honest way to a state in which the consumer rests, with a dearer rival waiting behind."""
        steps: dict[State, Callable[[], object]] = {
            State.DRAFT: self.start,
            State.OFFERED: self.award,
            State.AWARDED: self.accept,
            State.STREAMING: self.answer,
            State.COMMITTED: self.reveal,
        }
        while self.job.state is not state:
            steps.pop(self.job.state)()
        return self

    def start(self) -> None:
        """Make the offer, and broadcast it since nobody can be asked."""
        self.feed(Start())
        self.feed(QuotesAsked(frozenset()))

    def award(self) -> None:
        """Take two bids and choose the provider's."""
        self.chosen = self.bid()
        self.other = self.bid(RIVAL, output_token_price=6 * 10**12)
        self.time_out()

    def accept(self, **changes: object) -> list[Effect]:
        """The provider accepts."""
        award = next(effect.data for effect in reversed(self.effects) if isinstance(effect, Send))
        digest = open_envelope(award, Award, network=NETWORK, now=None).digest
        accept = Accept(self.job.job_id, digest, PROVIDER_SECRETS.nonce, OPENING_KEY.public)
        return self.receive(alter(accept, **changes))

    def part(self, index: int, tokens: tuple[int, ...], text: str) -> list[Effect]:
        """A part of the answer comes."""
        return self.receive(Tokens(self.job.job_id, index, tokens, text, INPUT_TOKENS))

    def answer(self, key: KeyPair = PROVIDER) -> None:
        """The whole answer comes, and its commitment."""
        index = 0
        for tokens, text in PARTS:
            self.part(index, tokens, text)
            index += len(tokens)
        self.receive(Commit(self.job.job_id, self.commitment(key)))

    def serve(self, key: KeyPair) -> None:
        """The whole answer comes from the holder of `key`, with commitment and proof."""
        self.answer(key)
        self.reveal(key=key)

    def commitment(self, key: KeyPair = PROVIDER) -> bytes:
        """What the honest provider commits to."""
        job_id = self.job.job_id
        root = output_root(tokens_digest(job_id, TOKENS), text_digest(job_id, TEXT))
        return output_commitment(job_id, key.node_id, root, PROVIDER_SECRETS.salt)

    def reveal(
        self, *, key: KeyPair = PROVIDER, salt: bytes = PROVIDER_SECRETS.salt, **changes: object
    ) -> list[Effect]:
        """The provider reveals its proof, with changes."""
        proof = Sealer(key, NETWORK).seal(make_proof(self.job.offer, self.chosen, **changes), self.now)
        return self.receive(Reveal(self.job.job_id, salt, proof.data))


class ProviderBench(Bench):
    """A provider's job, facing frames made by hand."""

    job: ProviderJob

    def __init__(self, *, bid_lifetime_ms: int = 60_000) -> None:
        self.offer = make_offer()
        self.bid = make_bid(self.offer, lifetime_ms=bid_lifetime_ms)
        super().__init__(ProviderJob(Sealer(PROVIDER, NETWORK), self.offer, self.bid, PROVIDER_SECRETS), CONSUMER)

    def reach(self, state: State) -> ProviderBench:
        """Go the honest way to a state in which the provider rests."""
        steps: dict[State, Callable[[], object]] = {
            State.OFFERED: self.award,
            State.ACCEPTED: self.input,
            State.STREAMING: self.generate,
        }
        while self.job.state is not state:
            steps.pop(self.job.state)()
        return self

    def award(self, **changes: object) -> list[Effect]:
        """The consumer's award comes."""
        return self.receive(alter(Award(self.job.job_id, self.bid.digest, 0), **changes))

    def input(
        self, *, key: bytes = OPENING_KEY.public, binding: dict[str, Any] | None = None, **changes: object
    ) -> list[Effect]:
        """The prompt comes, with changes of the opening and of what it is bound to."""
        frames = [effect.data for effect in of(self.effects, Send) if kind_of(effect.data) is Kind.ACCEPT]
        award = open_envelope(frames[0], Accept, network=NETWORK, now=None).body.award_digest if frames else bytes(32)
        bound = Binding(NETWORK, self.job.job_id, CONSUMER.node_id, PROVIDER.node_id, award)
        sealed = seal_opening(alter(OPENING, **changes), key, alter(bound, **(binding or {})))
        return self.receive(Input(self.job.job_id, sealed))

    def generate(self) -> list[Effect]:
        """The model runs to its end."""
        for tokens, text in PARTS:
            self.feed(Produced(tokens, text, INPUT_TOKENS))
        return self.feed(GenerationEnded(Finish.STOP, INPUT_TOKENS, ENGINE))

    def share(self, output_tokens: int, **changes: object) -> Share:
        """What the provider is owed for so many of its tokens."""
        compute = 3 * 10**12 * INPUT_TOKENS + 5 * 10**12 * output_tokens
        charges = Price(compute, licence=0, verification=compute // 4, priority=0)
        return alter(Share(PROVIDER.node_id, self.bid.digest, INPUT_TOKENS, 0, output_tokens, charges), **changes)

    def voucher(self, output_tokens: int, **changes: object) -> list[Effect]:
        """A promise to pay for so many tokens comes."""
        return self.receive(Voucher(self.job.job_id, self.share(output_tokens, **changes)))

    def receipt(self, **changes: object) -> Envelope[Receipt]:
        """The consumer's receipt."""
        reveal = of(self.effects, Send)[-1].data
        proof = open_envelope(opened(reveal, Reveal, self.now).proof, Proof, network=NETWORK, now=None)
        receipt = Receipt(
            job_id=self.job.job_id,
            offer_digest=self.offer.digest,
            proof_digest=proof.digest,
            shares=(self.share(len(TOKENS)),),
            price=PRICE,
            rule="expected-cost/1",
            bids=(),
            terms=ANY_PROVIDER,
            passed=(),
        )
        return self.peer.seal(alter(receipt, **changes), self.now)


@dataclass(slots=True)
class Model:
    """A fake model: what it produces for any prompt."""

    parts: Sequence[tuple[tuple[int, ...], str]] = PARTS
    """Tokens and text of each part."""
    failure: GenerationFailed | None = None
    """How it fails after its parts, if it does."""
    mute: bool = False
    """Whether it never ends."""

    def events(self, accepted: int) -> list[Any]:
        """The events of one generation."""
        end = self.failure or GenerationEnded(Finish.STOP, INPUT_TOKENS, ENGINE)
        made, parts = 0, list[Produced]()
        for tokens, text in self.parts:
            made += len(tokens)
            if made > accepted or (made == accepted and not tokens):
                parts.append(Produced(tokens, text, INPUT_TOKENS))
        return [*parts, *([] if self.mute else [end])]


@dataclass(slots=True)
class Seller:
    """A provider in the pair driver."""

    key: KeyPair
    """Its key."""
    model: Model = field(default_factory=Model)
    """What it runs."""
    terms: dict[str, Any] = field(default_factory=dict[str, Any])
    """Changes to its bid."""
    dead: bool = False
    """Whether its stream opens but nobody answers."""
    unreachable: bool = False
    """Whether its stream does not open."""


class Market:
    """A consumer's job against the real jobs of its providers, over streams in memory, in virtual time."""

    def __init__(self, sellers: Sequence[Seller], request: JobRequest = REQUEST) -> None:
        """`sellers` all bid."""
        self.consumer = ConsumerBench(request)
        self.sellers = {seller.key.node_id: seller for seller in sellers}
        self.providers: list[ProviderBench] = []
        """One for each stream that was opened, in order."""
        self.now = NOW
        self._queue: deque[tuple[Bench, Any]] = deque()
        self._stream: tuple[ConsumerBench, ProviderBench | None] | None = None
        self._bids = dict[bytes, Envelope[Bid]]()

    def run(self) -> Market:
        """Until nobody has anything left to do."""
        self._feed(self.consumer, Start())
        while self._step():
            pass
        return self._settle()

    def _step(self) -> bool:
        if self._queue:
            bench, event = self._queue.popleft()
            if isinstance(event, Iterator):
                # The model works while frames travel.
                work = cast("Iterator[object]", event)
                following = next(work, None)
                if following is None:
                    return True
                self._queue.append((bench, work))
                event = following
            self._feed(bench, event)
            return True
        waiting = [bench for bench in (self.consumer, *self.providers) if bench.timer and not bench.job.over]
        if not waiting:
            return False
        due = min(waiting, key=lambda bench: bench.timer or 0)
        self.now = due.timer or 0
        due.timer = None
        self._feed(due, TimerFired())
        return True

    def _feed(self, bench: Bench, event: object) -> None:
        bench.now = self.now
        for effect in bench.feed(event):
            match effect:
                case AskForQuotes():
                    self._queue.append((bench, QuotesAsked(frozenset())))
                case Broadcast(offer):
                    for seller in self.sellers.values():
                        bid = make_bid(offer, seller.key, now=self.now, **seller.terms)
                        self._bids[seller.key.node_id.public_key] = bid
                        self._queue.append((bench, BidArrived(bid)))
                case OpenStream(node):
                    self._open(self.sellers[node])
                case Send(data):
                    self._pass_on(bench, FrameArrived(data))
                case CloseStream():
                    self._pass_on(bench, StreamEnded("the stream ended"))
                    self._hang_up(bench)
                case StartGeneration():
                    model = self.sellers[bench.job._sealer.node_id].model
                    self._queue.append((bench, iter(model.events(len(effect.accepted)))))
                case _:
                    pass

    def _open(self, seller: Seller) -> None:
        if seller.unreachable:
            self._queue.append((self.consumer, StreamEnded("nobody there")))
            return
        provider = ProviderBench()
        provider.offer, provider.bid = self.consumer.job.offer, self._bids[seller.key.node_id.public_key]
        provider.job = ProviderJob(Sealer(seller.key, NETWORK), provider.offer, provider.bid, PROVIDER_SECRETS)
        self.providers.append(provider)
        self._stream = (self.consumer, None if seller.dead else provider)

    def _pass_on(self, bench: Bench, event: object) -> None:
        if self._stream is None or bench not in self._stream:
            return
        other = self._stream[1] if bench is self.consumer else self._stream[0]
        if other:
            self._queue.append((other, event))

    def _hang_up(self, bench: Bench) -> None:
        """Close the stream: what waits for `bench` is dropped."""
        if self._stream is not None and bench in self._stream:
            self._stream = None
        self._queue = deque(
            (other, event)
            for other, event in self._queue
            if other is not bench or not isinstance(event, FrameArrived | StreamEnded)
        )

    def _settle(self) -> Market:
        """Every provider is told what it is owed."""
        for payment in self.consumer.payments.values():
            if payment.state is not PaymentState.OWED:
                continue
            (provider,) = (bench for bench in self.providers if bench.job._sealer.node_id == payment.peer)
            statement = read_statement(payment.statement, payment.peer, network=NETWORK)
            change = settle(statement, provider.last, provider.payments.get(CONSUMER.node_id), self.now)
            if change is not None:
                records, held = change
                provider.records += records
                provider.payments[CONSUMER.node_id] = held
        return self

    @property
    def answer(self) -> str:
        """What the consumer's user saw."""
        return "".join(part.text for part in of(self.consumer.effects, Deliver))


def abort(job: ConsumerJob | ProviderJob, code: AbortCode, detail: str = "") -> Abort:
    """An abort of a job."""
    return Abort(job.job_id, code, detail)
