"""`aci-p2p jobs` and `aci-p2p why`, over a database that a node has written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import AbortCode
from aci_p2p.protocol.selection import Knowledge, StakeTable, Standing
from aci_p2p.protocol.settlement import read_statement, settle
from aci_p2p.protocol.terms import SelectionTerms
from aci_p2p.store import open_archive, open_store
from tests.cli.conftest import Cli, one_line
from tests.protocol.driver import (
    CONSUMER,
    NETWORK,
    NOW,
    PROVIDER,
    REQUEST,
    RIVAL,
    STRANGER,
    ConsumerBench,
    ProviderBench,
    abort,
)

TERMS = SelectionTerms(5, 10**14, 10**14, (), ("eu-west",))


class Known:
    """Experience with nobody but the provider."""

    def standing(self, provider: object, model_root: bytes, now: int) -> Standing:
        return Standing(950, 12_000) if provider == PROVIDER.node_id else Standing(800, 0)


def contested() -> ConsumerBench:
    """A job that the provider has after the rival declined; a stranger's region would not do."""
    stakes = StakeTable({key.node_id: 5 * 10**18 for key in (PROVIDER, RIVAL, STRANGER)})
    bench = ConsumerBench(replace(REQUEST, terms=TERMS), knowledge=Knowledge(stakes, Known()))
    bench.start()
    bench.bid(RIVAL, output_token_price=10**12)
    bench.bid(STRANGER, region="mars\x1b[31m")
    bench.chosen = bench.bid(PROVIDER)
    bench.time_out()
    assert bench.job._working.provider == RIVAL.node_id
    bench.peer = Sealer(RIVAL, NETWORK)
    bench.receive(abort(bench.job, AbortCode.BUSY))
    bench.peer = Sealer(PROVIDER, NETWORK)
    bench.now += 321
    bench.accept()
    bench.serve(PROVIDER)
    assert bench.last.state is State.PENDING
    return bench


def file(home: Path, key: KeyPair, records: Sequence[JobRecord]) -> None:
    """Write a node's records as it would."""

    async def write() -> None:
        async with open_store(home / "aci.sqlite3", key.node_id, threads=False) as store:
            for record in records:
                await store.put_jobs([record])

    trio.run(write)


def served() -> list[JobRecord]:
    """What a provider stores of a job that it is paid for."""
    bench = ProviderBench().reach(State.REVEALED)
    statement = read_statement(bench.receipt().data, PROVIDER.node_id, network=NETWORK)
    change = settle(statement, bench.last, None, bench.now)
    assert change is not None
    return [*bench.records, *change[0]]


@pytest.fixture(scope="module")
def bench() -> ConsumerBench:
    return contested()


@pytest.fixture
def job(home: Path, bench: ConsumerBench) -> str:
    """The id of a job that two nodes of this home have had."""
    file(home, CONSUMER, bench.records)
    file(home, PROVIDER, [replace(record, updated_at=record.updated_at + 9_000) for record in served()])
    return bench.job.job_id.hex()


def test_without_any_job(cli: Cli, home: Path) -> None:
    assert "there are no jobs yet" in one_line(cli("jobs"), 2)
    file(home, CONSUMER, [])
    assert cli("jobs").stdout == "there are no jobs yet\n"
    assert json.loads(cli("jobs", "--json").stdout) == []


def test_list(cli: Cli, job: str) -> None:
    lines = cli("jobs").stdout.splitlines()
    assert lines[0].split() == ["job", "last", "change", "we", "were", "state", "other", "side", "model", "price"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [job[:8], "2027-01-15", "08:00:09", "provider", "pending"],
        [job[:8], "2027-01-15", "08:00:02", "consumer", "pending"],
    ]
    (ours,) = json.loads(cli("jobs", "--role", "consumer", "--json").stdout)
    assert (ours["job_id"], ours["role"], ours["state"], ours["blame"]) == (job, "consumer", "pending", "nobody")
    assert (ours["node"], ours["peer"]) == (str(CONSUMER.node_id), str(PROVIDER.node_id))
    assert len(json.loads(cli("jobs", "-n", "1", "--json").stdout)) == 1


def test_show(cli: Cli, job: str, bench: ConsumerBench) -> None:
    text = cli("jobs", "show", job[:6]).stdout
    for words in (
        f"job {job}", f"we were its consumer, as {CONSUMER.node_id}", f"provider: {PROVIDER.node_id}",
        "+2000  awarded", "+321  accepted", "verification 0.0000195 ACI", "together     0.0000975 ACI",
        f"passed over: {RIVAL.node_id.short}, declined", f"we were its provider, as {PROVIDER.node_id}",
    ):  # fmt: skip
        assert words in text
    documents = json.loads(cli("jobs", "show", job, "--json").stdout)
    (ours,) = [document for document in documents if document["role"] == "consumer"]
    assert [step["state"] for step in ours["timeline"]] == [record.state.value for record in bench.records]
    assert sum(step["after_ms"] for step in ours["timeline"]) == bench.now - NOW
    receipt = ours["receipt"]
    assert receipt["passed_over"] == [{"provider": str(RIVAL.node_id), "why": "declined"}]
    assert sum(map(int, receipt["price"].values())) == int(ours["price_base_units"]) == bench.last.price


def test_why(cli: Cli, job: str) -> None:
    text = cli("why", job[:6]).stdout
    assert "expected cost = at most + first token x 0.0001 ACI per s + failing x 0.0001 ACI" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].isalnum()}
    assert rows[PROVIDER.node_id.short].endswith("<- winner")
    assert rows[RIVAL.node_id.short].endswith("declined")
    assert rows[STRANGER.node_id.short].endswith("in region mars [31m, not eu-west")
    assert "95.0 %" in rows[PROVIDER.node_id.short]
    assert "12.0 jobs" in rows[PROVIDER.node_id.short]
    assert text.splitlines()[-1] == "computed again from the signed offer and receipt: the same provider wins"


def test_why_for_programs(cli: Cli, job: str, bench: ConsumerBench) -> None:
    document: dict[str, Any] = json.loads(cli("why", job, "--json").stdout)
    assert (document["replays"], document["problem"], document["rule"]) == (True, None, "expected-cost/1")
    assert document["provider"] == str(PROVIDER.node_id)
    assert [bid["verdict"] for bid in document["bids"]][:2] == ["declined", "winner"]
    costs = [int(bid["expected_cost_base_units"]) for bid in document["bids"][:2]]
    assert costs == sorted(costs)
    (won,) = [bid for bid in document["bids"] if bid["verdict"] == "winner"]
    summary = next(one for one in bench.job.receipt.body.bids if one.provider == PROVIDER.node_id)
    # 300 ms at 0.0001 ACI a second, and a failure in twenty at 0.0001 ACI.
    assert int(won["expected_cost_base_units"]) == summary.worst_price + 3 * 10**13 + 5 * 10**12


def test_a_receipt_that_does_not_replay(cli: Cli, home: Path, bench: ConsumerBench) -> None:
    receipt = replace(bench.job.receipt.body, passed=())
    forged = Sealer(CONSUMER, NETWORK).seal(receipt, NOW)
    file(home, CONSUMER, [replace(bench.last, receipt=forged.data)])
    result = cli("why", bench.job.job_id.hex()[:4])
    assert result.returncode == 3
    assert "<- winner" in result.stdout
    assert "the same provider wins" not in result.stdout
    assert f"and {RIVAL.node_id.short} should have won" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("why", "ffff"), "there is no job ffff"),
        (("jobs", "show", "xyz"), "is no job id"),
        (("why", ""), "is no job id"),
    ],
)
def test_jobs_that_are_not_there(cli: Cli, job: str, arguments: tuple[str, ...], why: str) -> None:
    assert not job.startswith("ffff")
    assert why in one_line(cli(*arguments), 2)


def test_jobs_that_say_nothing_of_a_choice(cli: Cli, home: Path) -> None:
    nobody = ConsumerBench()
    nobody.start()
    nobody.time_out()
    file(home, CONSUMER, nobody.records)
    assert "nobody bid within 2 s" in one_line(cli("why", nobody.job.job_id.hex()), 2)
    assert "expired: nobody bid within 2 s" in cli("jobs", "show", nobody.job.job_id.hex()).stdout


def test_what_we_served_its_consumer_explains(cli: Cli, home: Path) -> None:
    records = served()
    file(home, PROVIDER, records)
    assert "its consumer knows" in one_line(cli("why", records[-1].job_id.hex()), 2)


def test_a_prefix_of_several_jobs(home: Path, bench: ConsumerBench, cli: Cli) -> None:
    others = [replace(bench.last, job_id=bytes([170, number]) + bytes(30)) for number in range(3)]
    file(home, CONSUMER, others)
    assert "the beginning of several jobs" in one_line(cli("jobs", "show", "aa0"), 2)
    with open_archive(home / "aci.sqlite3") as archive:
        assert [filed.job.job_id for filed in archive.find("AA01")] == [others[1].job_id]
        assert [filed.job.proof for filed in archive.jobs(2)] == [b"", b""]


def test_reading_beside_a_running_node(home: Path, bench: ConsumerBench) -> None:
    """The node's own connection stays open, with a transaction under way."""

    async def main() -> None:
        async with open_store(home / "aci.sqlite3", CONSUMER.node_id, threads=False) as store:
            await store.put_jobs([bench.last])
            store._connection.execute("BEGIN IMMEDIATE")
            with open_archive(home / "aci.sqlite3") as archive:
                assert len(archive.jobs(9)) == 1
            store._connection.execute("ROLLBACK")

    trio.run(main)
