"""A consumer's own experience: what counts, how much, for how long, and what counts for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import JobRecord, StreamEnded
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import AbortCode, Receipt
from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.protocol.provider import GenerationFailed
from aci_p2p.protocol.reputation import (
    FULL_WEIGHT_PAID,
    HALF_LIFE_MS,
    MAX_OUTCOMES,
    MAX_STANDINGS,
    Outcome,
    Reputation,
    decayed,
    outcomes,
)
from aci_p2p.protocol.selection import Standing
from aci_p2p.protocol.terms import PassedOver, Passing
from tests.protocol.driver import (
    CONSUMER,
    MODEL_ROOT,
    NETWORK,
    NOW,
    PROVIDER,
    RIVAL,
    STRANGER,
    ConsumerBench,
    ProviderBench,
    alter,
    opened,
)

OTHER_MODEL = bytes([99]) * 32


@pytest.fixture
def reputation() -> Reputation:
    return Reputation(CONSUMER.node_id, NETWORK)


def outcome(number: int = 0, **changes: object) -> Outcome:
    made = Outcome(number.to_bytes(32), PROVIDER.node_id, MODEL_ROOT, good=True, paid=FULL_WEIGHT_PAID, at=NOW)
    return alter(made, **changes)


def standing(reputation: Reputation, now: int = NOW) -> Standing:
    return reputation.standing(PROVIDER.node_id, MODEL_ROOT, now)


# How much counts.


def test_strangers_are_expected_to_answer_four_times_in_five(reputation: Reputation) -> None:
    assert standing(reputation) == Standing(800, 0)


def test_answers_raise_and_failures_lower_it(reputation: Reputation) -> None:
    reputation.add(outcome(1))
    assert standing(reputation) == Standing(5_000 * 1_000 // 6_000, 1_000)
    reputation.add(outcome(2, good=False, paid=0))
    assert standing(reputation) == Standing(5_000 * 1_000 // 7_000, 2_000)


def test_it_is_of_one_provider_with_one_model(reputation: Reputation) -> None:
    reputation.add(outcome(1))
    assert reputation.standing(RIVAL.node_id, MODEL_ROOT, NOW) == Standing(800, 0)
    assert reputation.standing(PROVIDER.node_id, OTHER_MODEL, NOW) == Standing(800, 0)


@pytest.mark.parametrize(
    ("paid", "weight"),
    [(0, 250), (FULL_WEIGHT_PAID // 2, 625), (FULL_WEIGHT_PAID, 1_000), (10**6 * ONE_ACI, 1_000)],
)
def test_an_answer_counts_by_what_it_cost_and_no_more_than_one_job(paid: int, weight: int) -> None:
    assert outcome(paid=paid).weight == weight


def test_one_huge_job_does_not_decide(reputation: Reputation) -> None:
    reputation.add(outcome(1, paid=10**9 * ONE_ACI))
    for number in range(2, 6):
        reputation.add(outcome(number, good=False))
    assert standing(reputation).success_milli == 500


def test_it_decays(reputation: Reputation) -> None:
    reputation.add(outcome(1, good=False))
    assert standing(reputation) == Standing(666, 1_000)
    assert standing(reputation, NOW + HALF_LIFE_MS) == Standing(727, 500)
    assert standing(reputation, NOW + 40 * HALF_LIFE_MS) == Standing(800, 0)
    # A clock that was set back makes nothing grow.
    assert standing(reputation, NOW - HALF_LIFE_MS) == Standing(666, 1_000)


@given(st.integers(0, 1_000), st.integers(0, 20 * HALF_LIFE_MS), st.integers(0, HALF_LIFE_MS))
def test_decay_never_grows_and_halves(weight: int, age: int, more: int) -> None:
    assert 0 <= decayed(weight, age + more) <= decayed(weight, age) <= weight
    assert decayed(weight, age + HALF_LIFE_MS) == decayed(weight, age) // 2


# What is remembered.


def test_a_job_counts_once_as_what_it_became(reputation: Reputation) -> None:
    reputation.add(outcome(1))
    reputation.add(outcome(1))
    assert standing(reputation).experience == 1_000
    reputation.add(outcome(1, good=False))
    assert standing(reputation) == Standing(666, 1_000)


def test_the_latest_outcomes_are_remembered(reputation: Reputation) -> None:
    reputation.add(outcome(0, good=False))
    for number in range(1, MAX_OUTCOMES + 1):
        reputation.add(outcome(number))
    assert standing(reputation) == Standing(36_000 * 1_000 // 37_000, 1_000 * MAX_OUTCOMES)


def test_memory_is_bounded(reputation: Reputation) -> None:
    reputation.add(outcome(0))
    for number in range(MAX_STANDINGS):
        reputation.add(outcome(0, model_root=number.to_bytes(32)))
    assert len(reputation) == MAX_STANDINGS
    assert standing(reputation).experience == 0


# What counts.


def finished(bench: ConsumerBench | None = None) -> JobRecord:
    return (bench or ConsumerBench()).reach(State.PENDING).last


def test_our_answered_job_counts(reputation: Reputation) -> None:
    job = finished()
    assert list(outcomes(job, CONSUMER.node_id, NETWORK)) == [
        Outcome(job.job_id, PROVIDER.node_id, MODEL_ROOT, good=True, paid=job.price, at=job.updated_at)
    ]
    reputation.note(job)
    assert standing(reputation).success_milli > 800


@pytest.mark.parametrize(
    ("state", "goods"),
    [
        (State.FINAL, [True]),
        (State.CHALLENGED, [True]),
        (State.DISMISSED, [True]),
        (State.UPHELD, [False]),
        (State.INCONCLUSIVE, []),
        (State.CONSUMER_FAULT, []),
    ],
)
def test_a_verdict_decides(state: State, goods: list[bool]) -> None:
    found = outcomes(replace(finished(), state=state), CONSUMER.node_id, NETWORK)
    assert [one.good for one in found] == goods


def test_a_failure_counts_and_a_cancellation_does_not() -> None:
    failed = ConsumerBench().reach(State.STREAMING)
    failed.feed(StreamEnded("gone"))
    (one,) = outcomes(failed.last, CONSUMER.node_id, NETWORK)
    assert (one.provider, one.good, one.weight) == (PROVIDER.node_id, False, 1_000)
    nobody = ConsumerBench()
    nobody.start()
    nobody.time_out()
    assert not list(outcomes(nobody.last, CONSUMER.node_id, NETWORK))


def test_who_was_passed_over_for_failing_counts() -> None:
    job = finished()
    receipt = opened(job.receipt, Receipt)
    passed = (PassedOver(RIVAL.node_id, Passing.FAILED), PassedOver(STRANGER.node_id, Passing.DECLINED))
    told = Sealer(CONSUMER, NETWORK).seal(replace(receipt, passed=passed), NOW)
    found = list(outcomes(replace(job, receipt=told.data), CONSUMER.node_id, NETWORK))
    assert [(one.provider, one.good) for one in found] == [(RIVAL.node_id, False), (PROVIDER.node_id, True)]


def test_who_began_an_answer_that_another_ended_has_failed() -> None:
    job = finished()
    receipt = opened(job.receipt, Receipt)
    shares = (replace(receipt.shares[0], provider=RIVAL.node_id), *receipt.shares)
    told = Sealer(CONSUMER, NETWORK).seal(replace(receipt, shares=shares), NOW)
    found = list(outcomes(replace(job, receipt=told.data), CONSUMER.node_id, NETWORK))
    assert [(one.provider, one.good, one.paid) for one in found] == [
        (RIVAL.node_id, False, 0), (PROVIDER.node_id, True, job.price),
    ]  # fmt: skip


def signed_by(key: KeyPair) -> Callable[[JobRecord], JobRecord]:
    def sign(job: JobRecord) -> JobRecord:
        return replace(job, receipt=Sealer(key, NETWORK).seal(opened(job.receipt, Receipt), NOW).data)

    return sign


FOREIGN: dict[str, Callable[[JobRecord], JobRecord]] = {
    "signed by a friend of the provider": signed_by(STRANGER),
    "signed by the provider": signed_by(PROVIDER),
    "not signed": lambda job: replace(job, receipt=job.receipt[:-1] + b"\1"),
    "no receipt": lambda job: replace(job, receipt=b""),
    "of another job": lambda job: replace(job, job_id=bytes(32)),
    "of another provider": lambda job: replace(job, peer=RIVAL.node_id),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_counts_that_we_have_not_signed(reputation: Reputation, name: str) -> None:
    for _ in range(100):
        reputation.note(FOREIGN[name](finished()))
    assert standing(reputation) == reputation.standing(RIVAL.node_id, MODEL_ROOT, NOW) == Standing(800, 0)


def test_a_providers_own_consumers_count_for_nothing(reputation: Reputation) -> None:
    """It runs a thousand jobs for names of its own, and their receipts are as good as any to themselves."""
    job = finished()
    own = Reputation(STRANGER.node_id, NETWORK)
    sybil = signed_by(STRANGER)(job)
    for number in range(1_000):
        reputation.note(replace(sybil, job_id=number.to_bytes(32)))
    own.note(sybil)
    assert standing(reputation) == Standing(800, 0)
    assert standing(own).success_milli > 800


def test_jobs_that_we_served_count_for_nothing() -> None:
    served = ProviderBench().reach(State.REVEALED).last
    assert served.role is Party.PROVIDER
    assert not list(outcomes(served, CONSUMER.node_id, NETWORK))
    assert not list(outcomes(served, PROVIDER.node_id, NETWORK))
    # Our own failure says nothing of the consumer whom we served.
    broken = ProviderBench().reach(State.STREAMING)
    broken.feed(GenerationFailed(AbortCode.EXECUTOR_FAILED, "dead"))
    assert broken.last.blame is Party.PROVIDER
    assert not list(outcomes(broken.last, PROVIDER.node_id, NETWORK))
