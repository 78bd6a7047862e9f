"""The table of a job's life: total, without dead ends, and with one party for every timeout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.lifecycle import (
    CHALLENGE_WINDOW_MS,
    FINAL_STATES,
    LIMITS,
    TRANSITIONS,
    IllegalTransition,
    Limit,
    Party,
    State,
    Trigger,
    advance,
    diagram,
)

S, T = State, Trigger

TABLE = {
    S.DRAFT: {T.OFFER: S.OFFERED, T.CANCEL: S.CANCELLED, T.TIMEOUT: S.EXPIRED},
    S.OFFERED: {
        T.AWARD: S.AWARDED, T.NO_BID: S.REJECTED, T.CANCEL: S.CANCELLED, T.PROVIDER_FAILS: S.PROVIDER_FAULT,
        T.TIMEOUT: S.EXPIRED,
    },
    S.AWARDED: {
        T.ACCEPT: S.ACCEPTED, T.DECLINE: S.OFFERED, T.CANCEL: S.CANCELLED, T.CONSUMER_FAILS: S.CONSUMER_FAULT,
        T.TIMEOUT: S.OFFERED,
    },
    S.ACCEPTED: {
        T.INPUT: S.STREAMING, T.CANCEL: S.CANCELLED, T.PROVIDER_FAILS: S.PROVIDER_FAULT,
        T.CONSUMER_FAILS: S.CONSUMER_FAULT, T.FAIL_OVER: S.OFFERED, T.TIMEOUT: S.CONSUMER_FAULT,
    },
    S.STREAMING: {
        T.TOKENS: S.STREAMING, T.VOUCHER: S.STREAMING, T.HOLD: S.UNPAID, T.COMMIT: S.COMMITTED,
        T.CANCEL: S.CANCELLED, T.PROVIDER_FAILS: S.PROVIDER_FAULT, T.CONSUMER_FAILS: S.CONSUMER_FAULT,
        T.FAIL_OVER: S.OFFERED, T.TIMEOUT: S.PROVIDER_FAULT,
    },
    S.UNPAID: {
        T.VOUCHER: S.STREAMING, T.CANCEL: S.CANCELLED, T.PROVIDER_FAILS: S.PROVIDER_FAULT,
        T.CONSUMER_FAILS: S.CONSUMER_FAULT, T.TIMEOUT: S.CONSUMER_FAULT,
    },
    S.COMMITTED: {
        T.REVEAL: S.REVEALED, T.CANCEL: S.CANCELLED, T.PROVIDER_FAILS: S.PROVIDER_FAULT,
        T.CONSUMER_FAILS: S.CONSUMER_FAULT, T.FAIL_OVER: S.OFFERED, T.TIMEOUT: S.PROVIDER_FAULT,
    },
    S.REVEALED: {T.RECEIPT: S.RECEIPTED, T.CANCEL: S.CANCELLED, T.TIMEOUT: S.CONSUMER_FAULT},
    S.RECEIPTED: {T.RECORD: S.PENDING, T.TIMEOUT: S.PENDING},
    S.PENDING: {T.CHALLENGE: S.CHALLENGED, T.TIMEOUT: S.FINAL},
    S.CHALLENGED: {T.UPHOLD: S.UPHELD, T.DISMISS: S.DISMISSED, T.TIMEOUT: S.INCONCLUSIVE},
}  # fmt: skip


@pytest.mark.parametrize("state", State)
def test_every_pair(state: State) -> None:
    """The whole table, as it was decided."""
    for trigger in Trigger:
        target = TABLE.get(state, {}).get(trigger)
        assert TRANSITIONS.get((state, trigger)) is target
        if target is not None:
            assert advance(state, trigger) is target
            continue
        with pytest.raises(IllegalTransition) as caught:
            advance(state, trigger)
        error = caught.value
        assert (error.state, error.trigger, error.code) == (state, trigger, "illegal_transition")
        assert error.message == f"a job that is {state.value} has no {trigger.value}"
        assert isinstance(error, LocalError)


def test_limits() -> None:
    assert {state: (limit.timeout_ms, limit.blame) for state, limit in LIMITS.items()} == {
        S.DRAFT: (60_000, Party.CONSUMER),
        S.OFFERED: (10_000, Party.CONSUMER),
        S.AWARDED: (5_000, Party.PROVIDER),
        S.ACCEPTED: (5_000, Party.CONSUMER),
        S.STREAMING: (60_000, Party.PROVIDER),
        S.COMMITTED: (10_000, Party.PROVIDER),
        S.UNPAID: (10_000, Party.CONSUMER),
        S.REVEALED: (3_600_000, Party.CONSUMER),
        S.RECEIPTED: (60_000, Party.NOBODY),
        S.PENDING: (CHALLENGE_WINDOW_MS, Party.NOBODY),
        S.CHALLENGED: (CHALLENGE_WINDOW_MS, Party.VALIDATORS),
    }
    assert CHALLENGE_WINDOW_MS == 24 * 60 * 60 * 1_000


def test_every_state_ends_or_times_out() -> None:
    for state in State:
        exits = [trigger for source, trigger in TRANSITIONS if source is state]
        if state in FINAL_STATES:
            assert not exits
            assert state not in LIMITS
        else:
            assert TRANSITIONS[state, Trigger.TIMEOUT] is LIMITS[state].leads_to
            assert isinstance(LIMITS[state].blame, Party)


@pytest.mark.parametrize(
    ("blame", "fault"), [(Party.PROVIDER, State.PROVIDER_FAULT), (Party.CONSUMER, State.CONSUMER_FAULT)]
)
def test_faults_name_who_is_blamed(blame: Party, fault: State) -> None:
    faults = {limit.leads_to for limit in LIMITS.values() if limit.blame is blame}
    assert faults & {State.PROVIDER_FAULT, State.CONSUMER_FAULT} == {fault}


def test_every_state_is_reached() -> None:
    reached = {State.DRAFT}
    while new := {target for (source, _), target in TRANSITIONS.items() if source in reached} - reached:
        reached |= new
    assert reached == set(State)


def test_every_state_can_end() -> None:
    ending = set(FINAL_STATES)
    while new := {source for (source, _), target in TRANSITIONS.items() if target in ending} - ending:
        ending |= new
    assert ending == set(State)
    # Even if nobody does anything: each timeout leads on, and never round in a circle.
    for state in LIMITS:
        steps = 0
        while state not in FINAL_STATES:
            state, steps = LIMITS[state].leads_to, steps + 1  # noqa: PLW2901 - the walk starts at each state
            assert steps < len(LIMITS)


def test_final_states() -> None:
    assert {
        S.FINAL, S.EXPIRED, S.REJECTED, S.CANCELLED, S.PROVIDER_FAULT, S.CONSUMER_FAULT, S.UPHELD, S.DISMISSED,
        S.INCONCLUSIVE,
    } == FINAL_STATES  # fmt: skip


@given(st.lists(st.sampled_from(Trigger), max_size=40))
def test_walks_stay_in_the_table(triggers: list[Trigger]) -> None:
    state = State.DRAFT
    for trigger in triggers:
        legal = (state, trigger) in TRANSITIONS
        try:
            after = advance(state, trigger)
        except IllegalTransition:
            assert not legal
            continue
        assert legal
        assert state not in FINAL_STATES
        state = after


def test_a_limit_is_a_plain_value() -> None:
    assert Limit(60_000, Party.PROVIDER, State.PROVIDER_FAULT) == LIMITS[State.STREAMING]


def test_diagram() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> draft"]
    assert "    draft --> offered: offer" in lines
    assert "    awarded --> offered: decline, timeout 5 s (provider)" in lines
    assert "    streaming --> streaming: tokens, voucher" in lines
    assert "    accepted --> consumer_fault: consumer fails, timeout 5 s (consumer)" in lines
    assert "    challenged --> inconclusive: timeout 86400 s (validators)" in lines
    assert {line for line in lines if line.endswith("[*]")} == {f"    {state.value} --> [*]" for state in FINAL_STATES}
    arrows = {(source.value, target.value) for (source, _), target in TRANSITIONS.items()}
    drawn = {tuple(line.split(":")[0].split(" --> ")) for line in (line.strip() for line in lines[2:])}
    assert {pair for pair in drawn if pair[1] != "[*]"} == arrows
