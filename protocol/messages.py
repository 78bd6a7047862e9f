"""The messages of the market and of a job, and what each kind may claim.

Offers, bids and asks go over gossip; the rest goes over the direct stream between consumer and provider, except
records, which live in the DHT. All of them travel in signed envelopes (`aci_p2p.protocol.envelope`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Final, TypeAlias

from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import (
    ADDRESSES,
    MAX_LATENCY_MS,
    NAME,
    TOKEN_PRICE,
    Ask,
    CapabilityRecord,
    Engine,
    NodeRecord,
)
from aci_p2p.protocol.terms import (
    FEE,
    LABEL,
    MAX_EXPERIENCE,
    MAX_PASSED,
    SUCCESS_MILLI_MAX,
    PassedOver,
    Price,
    SelectionTerms,
    Verification,
)
from aci_p2p.protocol.wire import DIGEST, Amount, Bytes, EnumOf, ListOf, Node, Struct, Text, Uint, Wire

NONCE_BYTES: Final = 32
"""Nonces and salts: 256 bits, beyond guessing."""
MAX_TOKENS: Final = 32_768
"""Largest output of one job, tokens: the longest answers of current models."""
MAX_TOKEN_ID: Final = (1 << 32) - 1
"""Token ids are 32-bit; current vocabularies end below 2^18."""
MAX_CHUNK_TOKENS: Final = 1_024
"""Tokens in one stream message."""
MAX_CHUNK_TEXT_BYTES: Final = 65_536
"""UTF-8 bytes in one stream message."""
MAX_INPUT_BYTES: Final = 512 << 10
"""UTF-8 bytes of all turns of a prompt; 128 Ki tokens at four bytes each."""
MAX_INPUT_TURNS: Final = 1_024
"""Turns of a conversation."""
KEM_KEY_BYTES: Final = 1_216
"""A public key of MLKEM768-X25519: 1,184 bytes of ML-KEM-768, then 32 of X25519."""
SEAL_BYTES: Final = 1_136
"""What a sealed message has beyond its text: the encapsulated key, 1,120 bytes, and a tag of 16."""
MAX_OPENING_BYTES: Final = MAX_INPUT_BYTES + 5 * MAX_TOKENS + 32_768
"""Bytes of an opening: the largest prompt and output so far, and 16 for each turn, which take half of the rest."""
MAX_DETAIL_BYTES: Final = 512
"""Bytes of an explanation to a peer."""
MAX_TEMPERATURE_MILLI: Final = 10_000
"""Thousandths; above 10 every distribution is flat."""
MAX_BIDS: Final = 64
"""Bids that a consumer weighs for one offer; more providers than any job needs."""
MAX_SHARES: Final = 8
"""Providers that one job may have, one after the other; more failures mean that something else is wrong."""
MAX_ENVELOPE_BYTES: Final = 4_096
"""Bytes of an envelope carried inside another message (an offer or a proof)."""

NONCE: Final = Bytes(NONCE_BYTES)
TEMPERATURE: Final = Uint(MAX_TEMPERATURE_MILLI)


class Kind(IntEnum):
    """What an envelope carries. Numbers are never reused."""

    OFFER = 1
    BID = 2
    AWARD = 3
    ACCEPT = 4
    INPUT = 5
    TOKENS = 6
    COMMIT = 7
    REVEAL = 8
    RECEIPT = 9
    ABORT = 10
    PROOF = 11
    NODE_RECORD = 12
    CAPABILITY_RECORD = 13
    ASK = 14
    VOUCHER = 15
    SETTLED = 16


class AbortCode(IntEnum):
    """Why one side ended a job early."""

    CANCELLED = 1
    """The sender changed its mind."""
    BUSY = 2
    """No free slot by now."""
    MODEL_UNAVAILABLE = 3
    """The model cannot be served (missing or altered weights)."""
    PROMPT_TOO_LONG = 4
    """Prompt and answer exceed the model's context."""
    EXECUTOR_FAILED = 5
    """The computation died."""
    PROTOCOL = 6
    """The other side broke the protocol."""
    TIMEOUT = 7
    """The other side did not act in time."""
    INVALID_PROMPT = 8
    """The model's chat template refuses the conversation."""


class Finish(IntEnum):
    """Why generation ended."""

    STOP = 1
    """The model ended its answer."""
    LENGTH = 2
    """`max_tokens` were produced."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A consumer's job, broadcast. Carries commitments only: no prompt."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """Derived from the consumer and both commitments (`derive_job_id`), so nobody else can claim it."""
    model_root: Annotated[bytes, Wire(2, DIGEST)]
    """Weights root of the model to run."""
    input_commitment: Annotated[bytes, Wire(3, DIGEST)]
    """Salted hash of the conversation."""
    nonce_commitment: Annotated[bytes, Wire(4, DIGEST)]
    """Hash of the consumer's nonce, which seeds the sampling."""
    input_bytes: Annotated[int, Wire(5, Uint(MAX_INPUT_BYTES))]
    """UTF-8 bytes of the conversation; an upper bound for its tokens, for the price."""
    input_turns: Annotated[int, Wire(6, Uint(MAX_INPUT_TURNS))]
    """Turns of the conversation, for the same bound."""
    max_tokens: Annotated[int, Wire(7, Uint(MAX_TOKENS))]
    """Largest number of output tokens."""
    temperature_milli: Annotated[int, Wire(8, TEMPERATURE)]
    """Thousandths; 0 is greedy."""
    max_price: Annotated[int, Wire(9, Amount())]
    """Most the consumer pays for the whole job, base units."""
    max_latency_ms: Annotated[int, Wire(10, Uint(MAX_LATENCY_MS))]
    """Longest promised time to the first token, milliseconds."""
    bid_deadline: Annotated[int, Wire(11, Uint())]
    """Bids are weighed until then, Unix milliseconds."""
    verification: Annotated[Verification, Wire(12, EnumOf(Verification))]
    """How the answer is to be checked."""
    priority_fee: Annotated[int, Wire(13, FEE)]
    """What the consumer adds to the price, to be served before others, base units."""


@dataclass(frozen=True, slots=True)
class Bid:
    """A provider's firm price for an offer, broadcast."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The offer's job."""
    offer_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of the offer's envelope: the bid answers these terms and no others."""
    model_root: Annotated[bytes, Wire(3, DIGEST)]
    """Weights root of the offer's model: who has not seen the offer knows on which topic the bid belongs."""
    input_token_price: Annotated[int, Wire(4, TOKEN_PRICE)]
    """Base units for each prompt token."""
    output_token_price: Annotated[int, Wire(5, TOKEN_PRICE)]
    """Base units for each output token."""
    latency_ms: Annotated[int, Wire(6, Uint(MAX_LATENCY_MS))]
    """Expected time from award to first token, milliseconds."""
    addresses: Annotated[tuple[str, ...], Wire(7, ADDRESSES)]
    """Where the provider may be dialled."""
    quantisation: Annotated[str, Wire(8, LABEL)]
    """Weight format that it computes with."""
    region: Annotated[str, Wire(9, LABEL)]
    """Where it says that it is; empty: it does not say."""


@dataclass(frozen=True, slots=True)
class Award:
    """The consumer chooses a bid."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    bid_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of the chosen bid's envelope."""
    accepted_tokens: Annotated[int, Wire(3, Uint(MAX_TOKENS))]
    """Output tokens that the consumer has from providers that failed: the winner goes on behind them."""


@dataclass(frozen=True, slots=True)
class Accept:
    """The provider binds itself, and fixes its part of the seed before it sees the prompt."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    award_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of the award's envelope."""
    provider_nonce: Annotated[bytes, Wire(3, NONCE)]
    """The provider's part of the sampling seed."""
    kem_key: Annotated[bytes, Wire(4, Bytes(KEM_KEY_BYTES))]
    """To which the prompt is sealed; made for this job alone."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation."""

    role: Annotated[str, Wire(1, Text(16))]
    """`system`, `user` or `assistant`."""
    content: Annotated[str, Wire(2, Text(MAX_INPUT_BYTES))]
    """UTF-8 text."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model is asked."""

    turns: Annotated[tuple[Turn, ...], Wire(1, ListOf(Struct(Turn), MAX_INPUT_TURNS))]
    """Oldest first."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The prompt and the openings of the offer's commitments, to the winner alone."""

    conversation: Annotated[Conversation, Wire(1, Struct(Conversation))]
    """What the model is asked."""
    salt: Annotated[bytes, Wire(2, NONCE)]
    """Opens `input_commitment`."""
    consumer_nonce: Annotated[bytes, Wire(3, NONCE)]
    """Opens `nonce_commitment`; the consumer's part of the sampling seed."""
    accepted: Annotated[tuple[int, ...], Wire(4, ListOf(Uint(MAX_TOKEN_ID), MAX_TOKENS))]
    """Output tokens so far, of providers that failed; as many as the award says."""


@dataclass(frozen=True, slots=True)
class Input:
    """The prompt, sealed to the winner."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    sealed: Annotated[bytes, Wire(2, Bytes(MAX_OPENING_BYTES + SEAL_BYTES, minimum=SEAL_BYTES))]
    """An `Opening` in CBOR, sealed to the key of the ACCEPT (`sealing.seal_opening`)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next part of the answer."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    index: Annotated[int, Wire(2, Uint(MAX_TOKENS))]
    """Position of the first token in the output."""
    tokens: Annotated[tuple[int, ...], Wire(3, ListOf(Uint(MAX_TOKEN_ID), MAX_CHUNK_TOKENS))]
    """Token ids."""
    text: Annotated[str, Wire(4, Text(MAX_CHUNK_TEXT_BYTES))]
    """Their text, whole characters only."""
    input_tokens: Annotated[int, Wire(5, Uint(MAX_TOKEN_ID))]
    """Prompt tokens, chat template included: what is due for reading them."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The provider fixes its output before it is compared with anyone's."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    commitment: Annotated[bytes, Wire(2, DIGEST)]
    """Hash over job, provider, output root and salt (`output_commitment`)."""


@dataclass(frozen=True, slots=True)
class Reveal:
    """The provider opens its commitment with a signed proof."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    salt: Annotated[bytes, Wire(2, NONCE)]
    """Opens the commitment."""
    proof: Annotated[bytes, Wire(3, Bytes(MAX_ENVELOPE_BYTES, minimum=1))]
    """The proof's signed envelope."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The provider's long-lived statement about one answer."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    consumer: Annotated[NodeId, Wire(2, Node())]
    """Who asked."""
    offer_digest: Annotated[bytes, Wire(3, DIGEST)]
    """Digest of the offer's envelope."""
    bid_digest: Annotated[bytes, Wire(4, DIGEST)]
    """Digest of the winning bid's envelope."""
    model_root: Annotated[bytes, Wire(5, DIGEST)]
    """Weights root of the model that ran."""
    input_commitment: Annotated[bytes, Wire(6, DIGEST)]
    """As in the offer."""
    input_tokens: Annotated[int, Wire(7, Uint(MAX_TOKEN_ID))]
    """Prompt tokens, chat template included."""
    output_tokens: Annotated[int, Wire(8, Uint(MAX_TOKENS))]
    """Output tokens."""
    tokens_hash: Annotated[bytes, Wire(9, DIGEST)]
    """Hash of the output token ids (`tokens_digest`)."""
    text_hash: Annotated[bytes, Wire(10, DIGEST)]
    """Hash of the output text (`text_digest`)."""
    finish: Annotated[Finish, Wire(11, EnumOf(Finish))]
    """Why generation ended."""
    temperature_milli: Annotated[int, Wire(12, TEMPERATURE)]
    """As in the offer."""
    seed: Annotated[bytes, Wire(13, DIGEST)]
    """Sampling seed, from both nonces and the job (`derive_seed`)."""
    provider_nonce: Annotated[bytes, Wire(14, NONCE)]
    """As in the accept."""
    engine: Annotated[Engine, Wire(15, Struct(Engine))]
    """What ran the model."""
    first_token: Annotated[int, Wire(16, Uint(MAX_TOKENS))]
    """Position of the first output token of its own; those before came from providers that failed."""


@dataclass(frozen=True, slots=True)
class BidSummary:
    """A bid as it was weighed, so that anyone can replay the choice."""

    provider: Annotated[NodeId, Wire(1, Node())]
    """Who bid."""
    bid_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of the bid's envelope."""
    worst_price: Annotated[int, Wire(3, Amount())]
    """Most that the job can cost under this bid, base units."""
    latency_ms: Annotated[int, Wire(4, Uint(MAX_LATENCY_MS))]
    """Promised time to the first token, milliseconds."""
    stake: Annotated[int, Wire(5, Amount())]
    """What the provider has at stake, base units."""
    success_milli: Annotated[int, Wire(6, Uint(SUCCESS_MILLI_MAX))]
    """How likely it is to answer, by the consumer's own experience; thousandths."""
    experience: Annotated[int, Wire(7, Uint(MAX_EXPERIENCE))]
    """How much experience that is; thousandths of a job."""
    quantisation: Annotated[str, Wire(8, LABEL)]
    """As in the bid."""
    region: Annotated[str, Wire(9, LABEL)]
    """As in the bid."""


@dataclass(frozen=True, slots=True)
class Share:
    """One provider's part of an answer, and what it is paid for it."""

    provider: Annotated[NodeId, Wire(1, Node())]
    """Who produced it."""
    bid_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of its bid's envelope, which fixes the prices."""
    input_tokens: Annotated[int, Wire(3, Uint(MAX_TOKEN_ID))]
    """Prompt tokens that it read, chat template included."""
    first_token: Annotated[int, Wire(4, Uint(MAX_TOKENS))]
    """Output tokens of others that it read behind the prompt: where its own begin."""
    output_tokens: Annotated[int, Wire(5, Uint(MAX_TOKENS))]
    """Output tokens of its own that were accepted."""
    charges: Annotated[Price, Wire(6, Struct(Price))]
    """What it is owed, item by item."""

    @property
    def price(self) -> int:
        """What it is owed in all, base units."""
        return self.charges.total


SHARE: Final = Struct(Share)


@dataclass(frozen=True, slots=True)
class Voucher:
    """The consumer's promise to pay for what has come so far; each takes the place of the one before."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    share: Annotated[Share, Wire(2, SHARE)]
    """What has come of this provider."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The consumer's statement that it has the answer, what it owes to whom, and how it chose."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    offer_digest: Annotated[bytes, Wire(2, DIGEST)]
    """Digest of the offer's envelope."""
    proof_digest: Annotated[bytes, Wire(3, DIGEST)]
    """Digest of the proof's envelope."""
    shares: Annotated[tuple[Share, ...], Wire(4, ListOf(SHARE, MAX_SHARES))]
    """Of each provider in the order of the answer; the last has proved it."""
    price: Annotated[int, Wire(5, Amount())]
    """What the job costs, base units: the sum of the shares."""
    rule: Annotated[str, Wire(6, NAME)]
    """Name and version of the selection rule."""
    bids: Annotated[tuple[BidSummary, ...], Wire(7, ListOf(Struct(BidSummary), MAX_BIDS))]
    """What was weighed, in order of arrival."""
    terms: Annotated[SelectionTerms, Wire(8, Struct(SelectionTerms))]
    """What the bids were held to."""
    passed: Annotated[tuple[PassedOver, ...], Wire(9, ListOf(Struct(PassedOver), MAX_PASSED))]
    """Who was chosen before the provider, and does not have the job; in order."""

    @property
    def provider(self) -> NodeId | None:
        """Who has proved the answer."""
        return self.shares[-1].provider if self.shares else None


@dataclass(frozen=True, slots=True)
class Settled:
    """The provider has stored what it is owed."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    amount: Annotated[int, Wire(2, Amount())]
    """The most that it holds the consumer's signature for, base units."""


@dataclass(frozen=True, slots=True)
class Abort:
    """One side ends the job early."""

    job_id: Annotated[bytes, Wire(1, DIGEST)]
    """The job."""
    abort: Annotated[AbortCode, Wire(2, EnumOf(AbortCode))]
    """Why."""
    detail: Annotated[str, Wire(3, Text(MAX_DETAIL_BYTES))]
    """The same in words, for people."""
    retry_at: Annotated[int, Wire(4, Uint())] = 0
    """BUSY: when to ask again, Unix milliseconds; 0: not told."""


Body: TypeAlias = (
    Offer
    | Bid
    | Award
    | Accept
    | Input
    | Tokens
    | Commit
    | Reveal
    | Receipt
    | Abort
    | Proof
    | NodeRecord
    | CapabilityRecord
    | Ask
    | Voucher
    | Settled
)
"""Every message that travels in an envelope."""

SECOND: Final = 1_000
"""Milliseconds."""
RECORD_LIFETIME_MS: Final = 3 * 3_600 * SECOND
"""Longest life of a record in the DHT, milliseconds; `RECORD_SECONDS` follows from it. A node that is gone is forgotten
then."""
_YEAR: Final = 365 * 24 * 3_600 * SECOND


@dataclass(frozen=True, slots=True)
class KindRules:
    """What every message of a kind is held to."""

    body: type[Any]
    """Its dataclass."""
    max_bytes: int
    """Largest envelope, bytes."""
    lifetime_ms: int
    """Longest time from issue to expiry, milliseconds."""


KINDS: Final[dict[Kind, KindRules]] = {
    Kind.OFFER: KindRules(Offer, 1_024, 60 * SECOND),
    Kind.BID: KindRules(Bid, 4_096, 60 * SECOND),
    Kind.AWARD: KindRules(Award, 1_024, 60 * SECOND),
    Kind.ACCEPT: KindRules(Accept, 2_048, 60 * SECOND),
    Kind.INPUT: KindRules(Input, MAX_OPENING_BYTES + 65_536, 60 * SECOND),
    Kind.TOKENS: KindRules(Tokens, MAX_CHUNK_TEXT_BYTES + 8_192, 60 * SECOND),
    Kind.COMMIT: KindRules(Commit, 1_024, 60 * SECOND),
    Kind.REVEAL: KindRules(Reveal, MAX_ENVELOPE_BYTES + 1_024, 60 * SECOND),
    Kind.RECEIPT: KindRules(Receipt, 32_768, 10 * _YEAR),
    Kind.ABORT: KindRules(Abort, 2_048, 60 * SECOND),
    Kind.PROOF: KindRules(Proof, MAX_ENVELOPE_BYTES, 10 * _YEAR),
    Kind.NODE_RECORD: KindRules(NodeRecord, 4_096, RECORD_LIFETIME_MS),
    Kind.CAPABILITY_RECORD: KindRules(CapabilityRecord, 4_096, RECORD_LIFETIME_MS),
    Kind.ASK: KindRules(Ask, 4_096, 60 * SECOND),
    Kind.VOUCHER: KindRules(Voucher, 1_024, 10 * _YEAR),
    Kind.SETTLED: KindRules(Settled, 1_024, 60 * SECOND),
}
"""Sizes bound memory before decoding; lifetimes bound how long a replay must be remembered."""

KIND_OF: Final[dict[type[Any], Kind]] = {rules.body: kind for kind, rules in KINDS.items()}
"""The kind of each message class."""
