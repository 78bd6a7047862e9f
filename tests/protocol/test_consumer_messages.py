"""What the consumer makes of messages that are none, of another job, out of order or untrue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aci_p2p.protocol.commitments import (
    input_bytes,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.job import (
    Chosen,
    CloseStream,
    Deliver,
    Failed,
    FrameArrived,
    OpenStream,
    Persist,
    Send,
    SetTimer,
)
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import (
    MAX_CHUNK_TEXT_BYTES,
    MAX_DETAIL_BYTES,
    Abort,
    AbortCode,
    Accept,
    Award,
    Commit,
    Engine,
    Finish,
    Input,
    Kind,
    Proof,
    Reveal,
    Tokens,
)
from aci_p2p.protocol.proof import MAX_ANSWER_BYTES
from tests.protocol.consuming import (
    ON_STREAM,
    assert_declined,
    assert_fault,
    kinds,
)
from tests.protocol.driver import (
    CONVERSATION,
    NETWORK,
    NOW,
    PARTS,
    PROVIDER,
    PROVIDER_SECRETS,
    REQUEST,
    RIVAL,
    STRANGER,
    TEXT,
    TOKENS,
    ConsumerBench,
    abort,
    make_proof,
    of,
    one,
    opened,
)


@pytest.fixture
def bench() -> ConsumerBench:
    return ConsumerBench()


def other_network(bench: ConsumerBench) -> bytes:
    return Sealer(PROVIDER, "aci-main").seal(abort(bench.job, AbortCode.BUSY), bench.now).data


def other_sender(bench: ConsumerBench) -> bytes:
    return Sealer(RIVAL, NETWORK).seal(abort(bench.job, AbortCode.BUSY), bench.now).data


def other_job(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(Abort(bytes(32), AbortCode.BUSY, ""), bench.now).data


def other_kind(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(Award(bench.job.job_id, bytes(32)), bench.now).data


def expired(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now - 60_000).data


def from_future(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now + 30_001).data


def forged(bench: ConsumerBench) -> bytes:
    good = bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now).data
    return good[:-1] + bytes([good[-1] ^ 1])


def garbage(_bench: ConsumerBench) -> bytes:
    return b"\xff" * 100


def nothing(_bench: ConsumerBench) -> bytes:
    return b""


def oversized(_bench: ConsumerBench) -> bytes:
    return b"\x58" * ((1 << 20) + 1)


BAD_FRAMES: dict[Callable[[ConsumerBench], bytes], str] = {
    other_network: "wrong network",
    other_sender: "wrong sender",
    other_job: "wrong job",
    other_kind: "wrong kind",
    expired: "expired",
    from_future: "from future",
    forged: "bad signature",
    garbage: "not canonical",
    nothing: "not canonical",
    oversized: "not canonical",
}


@pytest.mark.parametrize("state", ON_STREAM)
@pytest.mark.parametrize("make", BAD_FRAMES)
def test_bad_frames(bench: ConsumerBench, state: State, make: Callable[[ConsumerBench], bytes]) -> None:
    reason = f"message refused: {BAD_FRAMES[make]}"
    bench.reach(state)
    effects = bench.feed(FrameArrived(make(bench)))
    farewell = opened(of(effects, Send)[0].data, Abort, bench.now)
    assert (farewell.job_id, farewell.abort) == (bench.job.job_id, AbortCode.PROTOCOL)
    assert farewell.detail.startswith(reason)
    if state is State.AWARDED:
        assert kinds(effects) == [Persist, SetTimer, Send, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
        assert_declined(bench, effects, reason)
    else:
        assert kinds(effects) == [Persist, Send, CloseStream, Failed]
        assert_fault(bench, reason, tokens=0 if state is State.STREAMING else 3)


BODIES: dict[Kind, Callable[[bytes], object]] = {
    Kind.ACCEPT: lambda job_id: Accept(job_id, bytes(32), bytes(32)),
    Kind.INPUT: lambda job_id: Input(job_id, CONVERSATION, bytes(32), bytes(32)),
    Kind.TOKENS: lambda job_id: Tokens(job_id, 0, (1,), ""),
    Kind.COMMIT: lambda job_id: Commit(job_id, bytes(32)),
    Kind.REVEAL: lambda job_id: Reveal(job_id, bytes(32), b"\x00"),
    Kind.AWARD: lambda job_id: Award(job_id, bytes(32)),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        (State.AWARDED, {Kind.ACCEPT}),
        (State.STREAMING, {Kind.TOKENS, Kind.COMMIT}),
        (State.COMMITTED, {Kind.REVEAL}),
    ],
)
def test_kinds_out_of_order(bench: ConsumerBench, state: State, allowed: set[Kind], kind: Kind) -> None:
    bench.reach(state)
    bench.receive(BODIES[kind](bench.job.job_id))
    said = bench.job._last_decline if state is State.AWARDED else bench.last.detail
    assert ("wrong kind" in said) == (kind not in allowed)


def test_an_accept_of_another_award(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    assert_declined(bench, bench.accept(award_digest=bytes(32)), "wrong job")


def test_an_accept_that_was_seen_before(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    accept = Accept(bench.job.job_id, bench.job._award_digest, PROVIDER_SECRETS.nonce)
    frame = FrameArrived(bench.peer.seal(accept, bench.now).data)
    bench.feed(frame)
    bench.feed(frame)
    assert_fault(bench, "wrong kind", tokens=0)


@pytest.mark.parametrize(
    ("index", "tokens", "text", "reason"),
    [
        (0, (11, 12), "again", "out of order"),
        (1, (12,), "overlap", "out of order"),
        (3, (14,), "gap", "out of order"),
        (2, (), "", "malformed"),
        (2, (1,) * 7, "too many", "too many tokens"),
    ],
)
def test_tokens_that_do_not_continue(
    bench: ConsumerBench, index: int, tokens: tuple[int, ...], text: str, reason: str
) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (11, 12), "a")
    effects = bench.part(index, tokens, text)
    assert kinds(effects) == [Persist, Send, CloseStream, Failed]
    assert_fault(bench, reason, tokens=2)


def test_as_many_tokens_as_asked_for(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (11, 12), "a")
    assert of(bench.part(2, (1,) * 6, ""), Deliver)
    bench.part(8, (1,), "")
    assert_fault(bench, "too many tokens", tokens=8)


def test_no_more_text_than_a_proof_holds() -> None:
    bench = ConsumerBench(replace(REQUEST, max_tokens=100)).reach(State.STREAMING)
    whole = "é" * (MAX_CHUNK_TEXT_BYTES // 2)
    parts = MAX_ANSWER_BYTES // MAX_CHUNK_TEXT_BYTES
    for index in range(parts):
        assert of(bench.part(index, (1,), whole), Deliver)
    bench.part(parts, (1,), "a")
    assert_fault(bench, "too large", tokens=parts)


def changed(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    if isinstance(value, Finish):
        return Finish.LENGTH
    if isinstance(value, int):
        return value + 1
    if isinstance(value, Engine):
        return Engine("other", "x", "y", "z")
    return STRANGER.node_id


FREE = {"input_tokens", "engine"}
"""What the provider states on its own account; nothing seen on the stream says otherwise."""


@pytest.mark.parametrize("field", Proof.__dataclass_fields__)
def test_a_proof_with_one_field_changed(bench: ConsumerBench, field: str) -> None:
    bench.reach(State.COMMITTED)
    honest = make_proof(bench.job.offer, bench.chosen)
    changes: dict[str, Any] = {field: changed(getattr(honest, field))}
    effects = bench.reveal(**changes)
    if field in FREE:
        assert bench.job.state is State.PENDING
        return
    assert kinds(effects) == [Persist, Send, CloseStream, Failed]
    assert opened(one(effects, Send).data, Abort, bench.now).abort is AbortCode.PROTOCOL
    expected = {
        "job_id": "another job",
        "consumer": "another consumer",
        "offer_digest": "another offer",
        "bid_digest": "wrong job",
        "model_root": "another model",
        "input_commitment": "another prompt",
        "temperature_milli": "another temperature",
    }
    assert_fault(bench, expected.get(field, "bad commitment"), tokens=3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input_tokens": 0}, "more prompt tokens"),
        ({"input_tokens": input_bytes(CONVERSATION) + 2 * 16 + 128 + 1}, "more prompt tokens"),
        ({"output_tokens": 9}, "more tokens than were asked for"),
        ({"output_tokens": 2}, "bad commitment"),
    ],
)
def test_a_proof_with_counts_that_cannot_be(bench: ConsumerBench, changes: dict[str, Any], problem: str) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(**changes)
    assert_fault(bench, problem, tokens=3)


def test_as_many_prompt_tokens_as_there_can_be(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(input_tokens=input_bytes(CONVERSATION) + 2 * 16 + 128)
    assert bench.job.state is State.PENDING


def test_a_seed_of_another_nonce(bench: ConsumerBench) -> None:
    """A provider that fixes another nonce than it accepted with, seed and all."""
    bench.reach(State.AWARDED)
    bench.accept(provider_nonce=bytes(32))
    bench.answer()
    bench.reveal()
    assert_fault(bench, "bad commitment", tokens=3)


def test_a_proof_signed_by_another(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(key=RIVAL)
    assert_fault(bench, "wrong sender", tokens=3)


def test_a_reveal_that_does_not_open_its_commitment(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(salt=bytes(32))
    assert_fault(bench, "bad commitment", tokens=3)


def test_a_commitment_to_something_else(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    for index, (tokens, text) in zip((0, 2, 3), PARTS, strict=True):
        bench.part(index, tokens, text)
    bench.receive(Commit(bench.job.job_id, bytes(32)))
    bench.reveal()
    assert_fault(bench, "bad commitment", tokens=3)


@pytest.mark.parametrize(
    ("tokens", "text"), [((11, 12, 14), TEXT), (TOKENS, TEXT + "!"), (TOKENS[:-1], TEXT), ((), TEXT), (TOKENS, "")]
)
def test_another_answer_than_was_streamed(bench: ConsumerBench, tokens: tuple[int, ...], text: str) -> None:
    """Tokens and text, commitment and proof agree with each other, but not with what came."""
    bench.reach(State.STREAMING)
    for index, (part, words) in zip((0, 2, 3), PARTS, strict=True):
        bench.part(index, part, words)
    job_id = bench.job.job_id
    hashes: dict[str, Any] = {"tokens_hash": tokens_digest(job_id, tokens), "text_hash": text_digest(job_id, text)}
    root = output_root(hashes["tokens_hash"], hashes["text_hash"])
    bench.receive(Commit(job_id, output_commitment(job_id, PROVIDER.node_id, root, PROVIDER_SECRETS.salt)))
    bench.reveal(output_tokens=len(tokens), **hashes)
    assert_fault(bench, "bad commitment", tokens=3)


@pytest.mark.parametrize("frame", [b"\x00", b"\xff" * 64])
def test_a_proof_that_is_none(bench: ConsumerBench, frame: bytes) -> None:
    bench.reach(State.COMMITTED)
    bench.receive(Reveal(bench.job.job_id, PROVIDER_SECRETS.salt, frame))
    assert_fault(bench, "message refused", tokens=3)


def test_a_proof_signed_at_another_time(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    proof = Sealer(PROVIDER, NETWORK).seal(make_proof(bench.job.offer, bench.chosen), 1_000, lifetime_ms=1)
    bench.receive(Reveal(bench.job.job_id, PROVIDER_SECRETS.salt, proof.data))
    assert_fault(bench, "expired", tokens=3)


def test_farewells_fit_whatever_they_say(bench: ConsumerBench) -> None:
    send = bench.job._abort(AbortCode.PROTOCOL, "é" * MAX_DETAIL_BYTES, NOW)
    detail = opened(send.data, Abort).detail
    assert detail == "é" * (MAX_DETAIL_BYTES // 2)
    assert opened(bench.job._abort(AbortCode.BUSY, "aé" * MAX_DETAIL_BYTES, NOW).data, Abort).detail == "aé" * 170 + "a"


def test_text_alone_comes_once_at_the_end(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (1,), "a")
    assert kinds(bench.part(1, (), "b")) == [SetTimer, Deliver]
    bench.part(1, (), "c")
    assert_fault(bench, "malformed", tokens=1)
