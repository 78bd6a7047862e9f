"""What must hold of a consumer's job that has ended or goes on with the next provider."""

from __future__ import annotations

from typing import Any

from aci_p2p.protocol.consumer import (
    BidArrived,
    NoBids,
    ProviderFault,
    Start,
)
from aci_p2p.protocol.errors import RemoteError, ResourceError
from aci_p2p.protocol.job import (
    Cancel,
    Chosen,
    CloseStream,
    Failed,
    FrameArrived,
    OpenStream,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import (
    AbortCode,
    Award,
)
from tests.protocol.driver import (
    PROVIDER,
    RIVAL,
    STRANGER,
    ConsumerBench,
    abort,
    make_bid,
    make_offer,
    of,
    one,
    opened,
)

RESTING = (State.DRAFT, State.OFFERED, State.AWARDED, State.STREAMING, State.COMMITTED)
ON_STREAM = (State.AWARDED, State.STREAMING, State.COMMITTED)


def kinds(effects: list[Any]) -> list[type[Any]]:
    return [type(effect) for effect in effects]


def assert_over(bench: ConsumerBench) -> None:
    """Nothing that may still come has any effect."""
    assert bench.job.over
    offer = make_offer()
    for event in (
        Start(),
        BidArrived(make_bid(offer, STRANGER)),
        FrameArrived(b""),
        FrameArrived(bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now).data),
        StreamEnded(""),
        TimerFired(),
        Cancel(),
    ):
        assert bench.feed(event) == []


def assert_fault(bench: ConsumerBench, detail: str, tokens: int) -> None:
    """The provider failed and the record says so."""
    assert bench.job.state is State.PROVIDER_FAULT
    record = bench.last
    assert (record.state, record.blame, record.peer) == (State.PROVIDER_FAULT, Party.PROVIDER, PROVIDER.node_id)
    assert (record.price, record.proof, record.receipt) == (0, b"", b"")
    assert detail in record.detail
    error = bench.error
    assert isinstance(error, ProviderFault)
    assert isinstance(error, RemoteError)
    assert (error.code, error.provider, error.tokens) == ("provider_fault", PROVIDER.node_id, tokens)
    assert error.message == f"provider {PROVIDER.node_id.short} failed after {tokens} tokens: {record.detail}"
    assert error.hint
    assert_over(bench)


def assert_declined(bench: ConsumerBench, effects: list[Any], why: str) -> None:
    """The provider is out, the rival has the award; when it vanishes too, the job is over and nobody is to blame."""
    back, award = bench.records[-2:]
    assert (back.state, award.state) == (State.OFFERED, State.AWARDED)
    assert one(effects, Chosen).provider == RIVAL.node_id
    assert one(effects, OpenStream).provider == RIVAL.node_id
    assert opened(of(effects, Send)[-1].data, Award, bench.now) == Award(bench.job.job_id, bench.other.digest)
    assert (award.peer, award.blame, award.detail) == (RIVAL.node_id, Party.NOBODY, "")
    assert why in bench.job._last_decline
    assert bench.job._last_decline.startswith(PROVIDER.node_id.short)

    effects = bench.feed(StreamEnded("gone too"))
    message = f"every chosen provider declined; the last: {RIVAL.node_id.short}: gone too"
    assert_no_bids(bench, message, bids=2)
    assert kinds(effects) == [Persist, SetTimer, CloseStream, Persist, CloseStream, Failed]


def assert_no_bids(bench: ConsumerBench, message: str, bids: int) -> None:
    state = State.REJECTED if bids else State.EXPIRED
    assert bench.job.state is state
    assert (bench.last.state, bench.last.blame, bench.last.detail) == (state, Party.NOBODY, message)
    error = bench.error
    assert isinstance(error, NoBids)
    assert isinstance(error, ResourceError)
    assert (error.code, error.message, error.bids) == ("no_bids", message, bids)
    assert error.hint
    assert_over(bench)
