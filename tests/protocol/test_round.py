"""What counts as a quote."""

from __future__ import annotations

from typing import Any

import pytest

from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.messages import Abort, AbortCode, Award
from aci_p2p.protocol.round import QuoteDeclined, read_quote
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import NETWORK, NOW, PROVIDER, RIVAL, ConsumerBench, make_bid


@pytest.fixture
def bench() -> ConsumerBench:
    bench = ConsumerBench()
    bench.start()
    return bench


def test_a_quote(bench: ConsumerBench) -> None:
    bid = make_bid(bench.job.offer, PROVIDER)
    assert read_quote(bid.data, PROVIDER.node_id, bench.job.offer, NOW) == bid


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"offer_digest": bytes(32)}, Reason.WRONG_JOB), ({"model_root": bytes([1]) * 32}, Reason.WRONG_MODEL)],
)
def test_a_quote_for_something_else(bench: ConsumerBench, changes: dict[str, Any], reason: Reason) -> None:
    offer = bench.job.offer
    with pytest.raises(MessageRefused) as caught:
        read_quote(make_bid(offer, PROVIDER, **changes).data, PROVIDER.node_id, offer, NOW)
    assert caught.value.validation == Validation(Decision.REJECT, reason)


def test_a_quote_of_another(bench: ConsumerBench) -> None:
    offer = bench.job.offer
    with pytest.raises(MessageRefused) as caught:
        read_quote(make_bid(offer, RIVAL).data, PROVIDER.node_id, offer, NOW)
    assert caught.value.validation == Validation(Decision.REJECT, Reason.WRONG_SENDER)


def test_what_is_no_quote(bench: ConsumerBench) -> None:
    offer = bench.job.offer
    award = Sealer(PROVIDER, NETWORK).seal(Award(offer.body.job_id, bytes(32), 0), NOW)
    with pytest.raises(MessageRefused) as caught:
        read_quote(award.data, PROVIDER.node_id, offer, NOW)
    assert caught.value.validation == Validation(Decision.REJECT, Reason.WRONG_KIND)


@pytest.mark.parametrize(("detail", "words"), [("no slot", "no slot"), ("", "busy")])
@pytest.mark.parametrize(("told", "retry_at"), [(NOW + 1_000, NOW + 1_000), (0, None)])
def test_a_provider_says_why_it_gives_none(
    bench: ConsumerBench, detail: str, words: str, told: int, retry_at: int | None
) -> None:
    offer = bench.job.offer
    abort = Sealer(PROVIDER, NETWORK).seal(Abort(offer.body.job_id, AbortCode.BUSY, detail, told), NOW)
    with pytest.raises(QuoteDeclined) as caught:
        read_quote(abort.data, PROVIDER.node_id, offer, NOW)
    assert (caught.value.message, caught.value.retry_at) == (words, retry_at)
