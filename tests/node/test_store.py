"""The database: what it keeps of a job, through restarts, crashes, cancellation and other processes."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from aci_p2p import database
from aci_p2p.database import BUSY_TIMEOUT_S, SCHEMA_VERSION, StoreError
from aci_p2p.files import write_atomically
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import CHALLENGE_WINDOW_MS, FINAL_STATES, LIMITS, Party, State
from aci_p2p.store import Store, StoreStatistics, open_store
from tests.protocol.driver import alter
from tests.protocol.strategies import NODES

NODE: Final = KeyPair(bytes([1]) * 32).node_id
OTHER: Final = KeyPair(bytes([2]) * 32).node_id
ROLES: Final = (Party.CONSUMER, Party.PROVIDER)
NOW: Final = 1_800_000_000_000
RECORD: Final = JobRecord(
    job_id=bytes(32), role=Party.CONSUMER, state=State.PENDING, updated_at=NOW, model_root=bytes([1]) * 32,
    peer=OTHER, price=10**30, blame=Party.NOBODY, detail="", proof=b"proof", receipt=b"receipt",
)  # fmt: skip


def record(number: int = 0, **changes: object) -> JobRecord:
    """A job of its own for each number."""
    return alter(RECORD, job_id=number.to_bytes(32), **changes)


def rows(path: Path, query: str) -> list[Any]:
    """What another connection sees."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "home" / "aci.sqlite3"


async def read(path: Path, node: NodeId = NODE) -> list[JobRecord]:
    """All jobs of a node, by a new connection."""
    async with open_store(path, node) as store:
        return await store.jobs()


# Opening.


async def test_commits_survive_power_loss(path: Path) -> None:
    async with open_store(path, NODE) as store:
        # FULL is 2; it is a property of the connection, WAL of the file.
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert rows(path, "PRAGMA journal_mode") == [("wal",)]
        assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


@pytest.mark.parametrize("threads", [True, False])
async def test_jobs_are_there_after_a_restart(path: Path, threads: bool) -> None:  # noqa: FBT001 - a parameter of the test
    async with open_store(path, NODE, threads=threads) as store:
        assert await store.jobs() == []
        await store.put_jobs([record(1), record(2)])
    async with open_store(path, NODE, threads=threads) as store:
        assert await store.get_job(record(1).job_id, Party.CONSUMER) == record(1)
        assert await store.get_job(record(1).job_id, Party.PROVIDER) is None
        assert await store.get_job(record(3).job_id, Party.CONSUMER) is None


async def refused(path: Path, match: str) -> None:
    """Opening or reading ends in one clear line."""
    with pytest.raises(StoreError, match=match) as caught:
        await read(path)
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint


async def test_a_later_version_is_refused(path: Path) -> None:
    await read(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE jobs")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    await refused(path, rf"aci\.sqlite3 is of version {SCHEMA_VERSION + 1}, this program knows {SCHEMA_VERSION}$")
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'jobs'") == []


def test_no_database(path: Path) -> None:
    write_atomically(path, b"not a database" * 1_000)
    trio.run(refused, path, r"cannot open .*aci\.sqlite3: file is not a database")


def test_a_damaged_database(path: Path) -> None:
    async def fill() -> None:
        async with open_store(path, NODE) as store:
            await store.put_jobs([record(number, proof=bytes(500)) for number in range(100)])

    trio.run(fill)
    content = path.read_bytes()
    write_atomically(path, content[:4096] + b"\xff" * (len(content) - 4096))
    trio.run(refused, path, "the node's database fails: database disk image is malformed")


@pytest.mark.parametrize(
    "damage", ["state = 'frozen'", "price = 'dear'", "blame = ''", "peer = x'00'", "detail = CAST(x'ff' AS TEXT)"]
)
async def test_a_damaged_row(path: Path, damage: str) -> None:
    async with open_store(path, NODE) as store:
        await store.put_jobs([record()])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE jobs SET {damage}")  # noqa: S608 - ours
    await refused(path, "the node's database fails: .")


async def test_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await refused(tmp_path / "file" / "aci.sqlite3", "cannot open .*: .*(File exists|Not a directory)")
    (tmp_path / "folder").mkdir()
    await refused(tmp_path / "folder", "cannot open .*: Is a directory")


async def test_nobody_else_may_read_it(path: Path) -> None:
    """Prompts and answers are in it."""
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(1)])
        for file in (path, path.with_name(path.name + "-wal")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_settling_touches_only_what_waited_long_enough(path: Path) -> None:
    async with open_store(path, NODE) as store:
        old = replace(record(1), state=State.PENDING, updated_at=1)
        new = replace(record(2), state=State.PENDING, updated_at=CHALLENGE_WINDOW_MS)
        running = replace(record(3), state=State.STREAMING, updated_at=1)
        await store.put_jobs([old, new, running])
        (settled,) = await store.settle(CHALLENGE_WINDOW_MS + 1)
        assert settled == replace(old, state=State.FINAL, updated_at=CHALLENGE_WINDOW_MS + 1)
        assert {job.state for job in await store.jobs()} == {State.FINAL, State.PENDING, State.STREAMING}


async def test_a_full_disk(path: Path) -> None:
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(1)])
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages + 4}")
        with pytest.raises(StoreError, match="database or disk is full") as caught:
            await store.put_jobs([record(2), record(3, proof=bytes(100_000))])
        assert caught.value.hint == "check the disk, or move the file away and start anew"
        assert await store.jobs() == [record(1)]
        await store.put_jobs([record(2)])
    assert await read(path) == [record(1), record(2)]


async def test_a_place_that_is_taken(path: Path) -> None:
    path.with_name(f"{path.name}-wal").mkdir(parents=True)
    start = trio.current_time()
    await refused(path, r"cannot open .*: (disk I/O error|unable to open database file)")
    assert trio.current_time() - start < BUSY_TIMEOUT_S / 2


async def test_opening_waits_for_another_process(path: Path) -> None:
    """Another node of this home that is just making the file."""
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")

        async def let_go() -> None:
            await trio.sleep(0.1)
            other.commit()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go)
            assert await read(path) == []


async def test_opening_does_not_wait_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        await refused(path, "cannot open .*: database is locked")


async def test_opening_together(tmp_path: Path) -> None:
    for number in range(5):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read, tmp_path / f"{number}.sqlite3")


# Jobs.


RECORDS = st.builds(
    JobRecord,
    job_id=st.binary(min_size=32, max_size=32),
    role=st.sampled_from(ROLES),
    state=st.sampled_from(State),
    updated_at=st.integers(0, (1 << 63) - 1),
    model_root=st.binary(min_size=32, max_size=32),
    peer=st.none() | NODES,
    price=st.integers(0, 1 << 300) | st.sampled_from([(1 << 63) - 1, 1 << 63, 1 << 64, 10**30]),
    blame=st.sampled_from(Party),
    detail=st.text(),
    proof=st.binary(max_size=200) | st.just(bytes(100_000)),
    receipt=st.binary(max_size=200),
)


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that all examples of a test use, since making one takes long."""
    return tmp_path_factory.mktemp("shared") / "aci.sqlite3"


@given(st.lists(RECORDS, unique_by=lambda job: (job.job_id, job.role), max_size=8))
def test_every_field_comes_back(shared_path: Path, jobs: list[JobRecord]) -> None:
    async def main() -> None:
        async with open_store(shared_path, NODE, threads=False) as store:
            store._connection.execute("PRAGMA synchronous = OFF")
            await store.put_jobs(jobs)
            for job in jobs:
                assert await store.get_job(job.job_id, job.role) == job

    trio.run(main)


async def test_the_latest_of_one_role_come_without_their_proofs(path: Path) -> None:
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(number, updated_at=NOW + number) for number in range(5)])
        await store.put_jobs([record(9, role=Party.PROVIDER, updated_at=NOW + 9)])
        assert await store.recent(Party.CONSUMER, 2) == [
            record(number, updated_at=NOW + number, proof=b"") for number in (4, 3)
        ]
    async with open_store(path, OTHER) as store:
        assert not await store.recent(Party.CONSUMER, 2)


async def test_jobs_come_latest_first(path: Path) -> None:
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(number, updated_at=NOW + at) for number, at in enumerate((5, 9, 1))])
        assert [job.updated_at - NOW for job in await store.jobs()] == [9, 5, 1]


async def test_a_job_is_replaced_and_its_path_kept(path: Path) -> None:
    states = [State.OFFERED, State.AWARDED, State.OFFERED, State.AWARDED, State.ACCEPTED]
    async with open_store(path, NODE) as store:
        for at, state in enumerate(states):
            # Several within one millisecond, and another job between them.
            await store.put_jobs([record(1, state=state, updated_at=NOW + at // 3), record(2, state=state)])
        assert await store.get_job(record(1).job_id, Party.CONSUMER) == record(1, state=states[-1], updated_at=NOW + 1)
        path_taken = [(state, NOW + at // 3) for at, state in enumerate(states)]
        assert await store.history(record(1).job_id, Party.CONSUMER) == path_taken
        assert await store.history(record(1).job_id, Party.PROVIDER) == []
    assert len(await read(path)) == 2


async def test_transitions_of_one_transaction_keep_their_order(path: Path) -> None:
    states = [State.REVEALED, State.RECEIPTED, State.PENDING]
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(state=state) for state in states])
        assert await store.history(record().job_id, Party.CONSUMER) == [(state, NOW) for state in states]
        assert await store.jobs() == [record(state=State.PENDING)]


async def test_storing_twice_is_storing_once(path: Path) -> None:
    async with open_store(path, NODE) as store:
        for _ in range(3):
            await store.put_jobs([record()])
        assert await store.jobs() == [record()]
        assert await store.history(record().job_id, Party.CONSUMER) == [(State.PENDING, NOW)]


async def test_both_sides_of_a_job(path: Path) -> None:
    """A node that serves itself, or two nodes of one home."""
    theirs = record(role=Party.PROVIDER, state=State.CANCELLED)
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(), theirs])
        assert await store.get_job(record().job_id, Party.CONSUMER) == record()
        assert await store.get_job(record().job_id, Party.PROVIDER) == theirs
        assert await store.history(record().job_id, Party.PROVIDER) == [(State.CANCELLED, NOW)]


async def test_nodes_of_one_home_do_not_meet(path: Path) -> None:
    """A job that one node failed may be won by another of the same home."""
    failed, won = record(state=State.PROVIDER_FAULT), record(state=State.STREAMING)
    async with open_store(path, NODE) as ours, open_store(path, OTHER) as others:
        await ours.put_jobs([failed])
        await others.put_jobs([won])
        for store, job in ((ours, failed), (others, won)):
            assert await store.jobs() == [job]
            assert await store.get_job(job.job_id, job.role) == job
            assert await store.history(job.job_id, job.role) == [(job.state, NOW)]
        assert await ours.recover(NOW) == []
        assert [job.state for job in await others.recover(NOW)] == [State.CANCELLED]
        assert await ours.jobs() == [failed]


INVALID: Final[list[dict[str, object]]] = [
    {"job_id": None},
    {"proof": "text"},
    {"updated_at": 1 << 63},
    {"detail": "\ud800"},
]


@pytest.mark.parametrize("changes", INVALID)
async def test_a_batch_is_stored_whole_or_not_at_all(path: Path, changes: dict[str, object]) -> None:
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(1, state=State.OFFERED)])
        with pytest.raises(StoreError, match="the node's database fails"):
            await store.put_jobs([record(1), record(2), alter(record(3), **changes), record(4)])
        assert await store.jobs() == [record(1, state=State.OFFERED)]
        assert await store.history(record(1).job_id, Party.CONSUMER) == [(State.OFFERED, NOW)]
        await store.put_jobs([record(1)])
        assert await store.jobs() == [record(1)]


async def test_what_waits_is_stored_in_one_transaction(path: Path) -> None:
    begun: list[str] = []
    async with open_store(path, NODE) as store:
        store._connection.set_trace_callback(begun.append)
        async with trio.open_nursery() as nursery, store._lock:
            for number in range(10):
                nursery.start_soon(store.put_jobs, [record(number)])
            await wait_all_tasks_blocked()
            assert store.statistics() == StoreStatistics(waiting=10, writes=0, transactions=0)
        store._connection.set_trace_callback(None)
        assert store.statistics() == StoreStatistics(waiting=0, writes=10, transactions=1)
    assert begun.count("BEGIN IMMEDIATE") == 1
    assert len(await read(path)) == 10


async def test_what_does_not_fit_harms_nobody_else(path: Path) -> None:
    refused: list[int] = []

    async def put(opened: Store, number: int) -> None:
        try:
            await opened.put_jobs([record(number, updated_at=2**70 if number == 5 else NOW)])
        except StoreError:
            refused.append(number)

    async with open_store(path, NODE) as store, trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(put, store, number)
    assert refused == [5]
    assert len(await read(path)) == 9


async def test_keys_are_noted(path: Path) -> None:
    async with open_store(path, NODE) as ours, open_store(path, OTHER) as others:
        await ours.note_key(NOW)
        await others.note_key(NOW + 1)
        await ours.note_key(NOW + 2)
    assert await read(path) == []
    query = "SELECT node, first_used_at, last_used_at FROM keys ORDER BY first_used_at"
    assert rows(path, query) == [(NODE.public_key, NOW, NOW + 2), (OTHER.public_key, NOW + 1, NOW + 1)]


# Recovery.


STOPPED: Final = (State.CANCELLED, "the node stopped", Party.NOBODY)
RECOVERED: Final[dict[State, tuple[State, str, Party]]] = {
    State.DRAFT: STOPPED,
    State.OFFERED: STOPPED,
    State.AWARDED: STOPPED,
    State.ACCEPTED: STOPPED,
    State.STREAMING: STOPPED,
    State.UNPAID: STOPPED,
    State.COMMITTED: STOPPED,
    State.RECEIPTED: (State.PENDING, "as it was", Party.NOBODY),
}
"""What a stop makes of a job: state, detail and blame. The other states stay."""


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("state", State)
async def test_recovery_after_a_stop(path: Path, state: State, role: Party) -> None:
    job = record(state=state, role=role, detail="as it was")
    now = NOW + LIMITS[State.REVEALED].timeout_ms - 1
    async with open_store(path, NODE) as store:
        await store.put_jobs([job])
        changed = await store.recover(now)
        if state not in RECOVERED:
            assert changed == []
            assert await store.jobs() == [job]
            assert await store.history(job.job_id, role) == [(state, NOW)]
            return
        new_state, detail, blame = RECOVERED[state]
        expected = replace(job, state=new_state, updated_at=now, detail=detail, blame=blame)
        assert changed == [expected]
        assert await store.jobs() == [expected]
        assert await store.history(job.job_id, role) == [(state, NOW), (new_state, now)]
        assert await store.recover(now) == []


async def test_recovery_leaves_no_job_running(path: Path) -> None:
    waiting = {State.REVEALED, State.PENDING, State.CHALLENGED}
    assert set(RECOVERED) == set(State) - FINAL_STATES - waiting
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(number, state=state) for number, state in enumerate(State)])
        assert len(await store.recover(NOW)) == len(RECOVERED)
        assert {job.state for job in await store.jobs()} <= FINAL_STATES | waiting


async def test_an_answer_waits_an_hour_for_its_receipt(path: Path) -> None:
    limit = LIMITS[State.REVEALED].timeout_ms
    async with open_store(path, NODE) as store:
        await store.put_jobs([record(state=State.REVEALED, role=Party.PROVIDER)])
        assert await store.settle(NOW + limit - 1) == []
        (ended,) = await store.settle(NOW + limit)
        assert (ended.state, ended.blame) == (State.CONSUMER_FAULT, Party.CONSUMER)


async def test_a_job_is_final_when_its_challenge_window_is_over(path: Path) -> None:
    assert LIMITS[State.PENDING].timeout_ms == CHALLENGE_WINDOW_MS
    async with open_store(path, NODE) as store:
        await store.put_jobs([record()])
        assert await store.recover(NOW + CHALLENGE_WINDOW_MS - 1) == []
        end = NOW + CHALLENGE_WINDOW_MS
        assert await store.recover(end) == [record(state=State.FINAL, updated_at=end)]
        assert await store.recover(end + CHALLENGE_WINDOW_MS) == []


# Cancellation, other processes, crashes.


async def test_a_cancelled_write_is_finished(path: Path) -> None:
    """A transaction that began is not left half done, and the event loop runs on while it waits for the disk."""
    async with open_store(path, NODE) as store, trio.open_nursery() as nursery:
        with closing(sqlite3.connect(path, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("INSERT INTO keys VALUES (?, 1, 1)", (OTHER.public_key,))
            first, second = trio.CancelScope(), trio.CancelScope()
            returned: list[int] = []

            async def put(number: int, scope: trio.CancelScope) -> None:
                with scope:
                    await store.put_jobs([record(number)])
                    returned.append(number)

            nursery.start_soon(put, 1, first)
            await wait_all_tasks_blocked()
            nursery.start_soon(put, 2, second)
            await wait_all_tasks_blocked()
            first.cancel()
            second.cancel()
            await trio.sleep(0.02)
            assert returned == []
            other.commit()
        await store.put_jobs([record(3)])
        # The one that had begun is stored, and its caller knows; the one that had not is not.
        assert returned == [1]
        assert await store.jobs() == [record(1), record(3)]


async def test_a_write_that_another_began_is_finished_too(path: Path) -> None:
    async with open_store(path, NODE) as store, trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(3)]
        returned: list[int] = []

        async def put(number: int) -> None:
            with scopes[number]:
                await store.put_jobs([record(number)])
                returned.append(number)

        with closing(sqlite3.connect(path)) as other:
            async with store._lock:
                for number in range(3):
                    nursery.start_soon(put, number)
                    await wait_all_tasks_blocked()
                scopes[0].cancel()
                await wait_all_tasks_blocked()
                other.execute("BEGIN IMMEDIATE")
            await wait_all_tasks_blocked()
            scopes[2].cancel()
            await wait_all_tasks_blocked()
            other.rollback()
    assert sorted(returned) == [1, 2]
    assert sorted(job.job_id for job in await read(path)) == [record(1).job_id, record(2).job_id]


async def test_two_processes_on_one_file(path: Path) -> None:
    async with open_store(path, NODE) as store, trio.open_nursery() as nursery:
        writer = await nursery.start(partial(trio.run_process, start_command(path), capture_stdout=True))
        for number in range(30):
            await store.put_jobs([record(number)])
        with trio.fail_after(30):
            assert await writer.wait() == 0
        assert len(await store.jobs()) == 30
    assert len(await read(path, OTHER)) == 60


def start_command(path: Path, count: int = 30) -> Sequence[str]:
    """A process that stores two jobs a transaction, and tells the number of each transaction once it is stored."""
    script = f"""
import trio
from pathlib import Path
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.store import open_store

def record(number):
    root, peer = bytes(32), NodeId(bytes(32))
    return JobRecord(
        number.to_bytes(32), Party.CONSUMER, State.PENDING, 0, root, peer, 0, Party.NOBODY, "", b"", b""
    )

async def main():
    async with open_store(Path({str(path)!r}), NodeId({OTHER.public_key!r})) as store:
        for number in range({count}):
            await store.put_jobs([record(2 * number), record(2 * number + 1)])
            print(number, flush=True)

trio.run(main)
"""
    return [sys.executable, "-c", script]


@pytest.mark.parametrize("acknowledged", [1, 50])
def test_killed_amid_commits(path: Path, acknowledged: int) -> None:
    """Whatever was acknowledged is there, and no transaction is there by half."""
    with subprocess.Popen(start_command(path, 1_000_000), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(acknowledged)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    assert [int(line) for line in lines] == list(range(len(lines)))
    stored = sorted(int.from_bytes(job.job_id) for job in trio.run(read, path, OTHER))
    assert stored == list(range(len(stored)))
    assert len(stored) in (2 * len(lines), 2 * len(lines) + 2)
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


async def test_totals_are_exact_and_of_one_node(path: Path) -> None:
    largest = 2**128 - 1
    async with open_store(path, NODE) as store:
        assert await store.totals() == []
        jobs = [record(1, price=largest), record(2, price=largest), record(3, price=123_456_789_012)]
        jobs += [record(4, price=0, state=State.CANCELLED), record(5, role=Party.PROVIDER, price=10**9)]
        await store.put_jobs(jobs)
        found = {(total.role, total.state): (total.jobs, total.price) for total in await store.totals()}
    assert found == {
        (Party.CONSUMER, State.PENDING): (3, 2 * largest + 123_456_789_012),
        (Party.CONSUMER, State.CANCELLED): (1, 0),
        (Party.PROVIDER, State.PENDING): (1, 10**9),
    }
    async with open_store(path, OTHER) as store:
        assert await store.totals() == []


async def test_totals_are_read_from_their_index_in_an_older_file_too(path: Path) -> None:
    names = "SELECT name FROM sqlite_master WHERE type = 'index' AND name = 'jobs_totals'"
    plan = "EXPLAIN QUERY PLAN SELECT role, state, COUNT(*), price FROM jobs WHERE node = x'' GROUP BY role, state"
    async with open_store(path, NODE):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP INDEX jobs_totals")
    async with open_store(path, NODE):
        assert rows(path, names) == [("jobs_totals",)]
        assert "COVERING INDEX jobs_totals" in str(rows(path, plan))
