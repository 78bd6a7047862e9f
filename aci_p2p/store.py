"""What a node keeps on disk: its jobs with their receipts, and which keys it has had. SQLite, durable at each commit.

WAL with synchronous=FULL: a commit that returned survives power loss (NORMAL loses the last ones).
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

import trio

from aci_p2p.database import BUSY_TIMEOUT_S, StoreError, check_version, open_database
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment, PaymentState, recovered, timed_out
from aci_p2p.protocol.lifecycle import LIMITS, Party, State

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_OPEN_STATES: Final = tuple(state.value for state in LIMITS)
"""States that something still leaves."""
_COLUMNS: Final = "node, job_id, role, state, updated_at, model_root, peer, price, blame, detail, proof, receipt"
"""`price` is decimal text: base units go beyond SQLite's 64-bit integers."""
_NO_PROOF: Final = _COLUMNS.replace("proof", "x'' AS proof")
"""Proofs are most of a job's bytes."""
_THIS_JOB: Final = "node = ? AND job_id = ? AND role = ?"
_SUM_PRICE: Final = tuple(f"SUM(CAST(substr(price, {start}, 9) AS INTEGER))" for start in (-9, -18, -27, -36, -45))
"""The sum in parts of nine digits, the lowest first: each sum fits 64 bits for 10^9 jobs."""
_UNFIT: Final = (sqlite3.Error, ValueError, OverflowError, LocalError)
"""What SQLite raises, and what a value does that it cannot hold, or that a damaged file held."""
_UNFIT_TO_READ: Final = (sqlite3.Error, ValueError, OverflowError)
MAX_FOUND: Final = 16
"""Jobs that a prefix of an id may name: more are no help to anybody."""


@dataclass(frozen=True, slots=True)
class JobTotal:
    """All our jobs of one role that stand in one state."""

    role: Party
    """CONSUMER or PROVIDER: which side we were."""
    state: State
    """Where they stand."""
    jobs: int
    """How many."""
    price: int
    """What they cost together, base units; jobs without a complete answer count as 0."""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What a node has stored since its start, and what waits for it."""

    waiting: int
    """Writes that the next transaction will hold."""
    writes: int
    """Writes that were stored."""
    transactions: int
    """Transactions that stored them: fewer where several came at once."""


class _Write:
    """What one caller waits to have stored."""

    def __init__(self, records: Sequence[JobRecord], payments: Sequence[Payment]) -> None:
        self.records = records
        self.payments = payments
        self.scope = trio.CancelScope()
        self.is_stored = False


class Store:
    """The node's database. Made by `open_store`; one call at a time."""

    def __init__(self, connection: sqlite3.Connection, node: NodeId, *, threads: bool) -> None:
        """`node`: whose jobs these are; several nodes of one home may share the file."""
        self._connection = connection
        self._node = node
        self._threads = threads
        self._lock = trio.Lock()
        self._waiting: list[_Write] = []
        self._writes = 0
        self._transactions = 0

    def statistics(self) -> StoreStatistics:
        """What waits, and what was stored."""
        return StoreStatistics(waiting=len(self._waiting), writes=self._writes, transactions=self._transactions)

    async def put_jobs(self, records: Sequence[JobRecord], payments: Sequence[Payment] = ()) -> None:
        """Insert or replace jobs and payments, and note transitions, in one durable transaction. Raises StoreError.

        What several jobs wait to store goes into the same transaction: a commit costs more than what is in it. A write
        that is cancelled after its transaction began is stored all the same, and its caller learns of it. One that is
        cancelled in that very moment may be stored, too; storing it again then notes its transitions twice.
        """
        write = _Write(records, payments)
        self._waiting.append(write)
        try:
            with write.scope:
                async with self._lock:
                    if write in self._waiting:
                        await self._commit_waiting()
                    if not write.is_stored:
                        # One of them may not fit, which is no fault of the others.
                        await self._commit([write])
        finally:
            if write in self._waiting:
                self._waiting.remove(write)

    async def _commit_waiting(self) -> None:
        writes, self._waiting = self._waiting, []
        for write in writes:
            write.scope.shield = True
        with suppress(StoreError):
            await self._commit(writes)
        for write in writes:
            write.scope.shield = write.is_stored

    async def _commit(self, writes: Sequence[_Write]) -> None:
        """Store them in one transaction; the caller holds the lock. Raises StoreError."""
        records = [record for write in writes for record in write.records]
        payments = [payment for write in writes for payment in write.payments]
        await self._run_locked(self._put_jobs, records, payments)
        self._transactions += 1
        self._writes += len(writes)
        for write in writes:
            write.is_stored = True

    async def payments(self, job_id: bytes, role: Party) -> list[Payment]:
        """What a job's providers are paid, or what we are paid for it. Raises StoreError."""
        return await self._run(self._select_payments, _THIS_JOB, self._key(job_id, role))

    async def owed(self, since: int) -> list[Payment]:
        """What we owe for jobs that moved since then (Unix ms), and providers may not know. Raises StoreError."""
        node, consumer = self._node.public_key, Party.CONSUMER.value
        jobs = "SELECT job_id FROM jobs WHERE node = ? AND role = ? AND updated_at >= ?"
        where = f"node = ? AND state = 'owed' AND role = ? AND job_id IN ({jobs})"
        return await self._run(self._select_payments, where, (node, consumer, node, consumer, since))

    async def paid(self, role: Party) -> int:
        """All that we were promised as a provider, or have promised as a consumer, base units. Raises StoreError."""

        def total() -> int:
            query = "SELECT amount FROM payments WHERE node = ? AND role = ?"
            rows = self._connection.execute(query, (self._node.public_key, role.value))
            return sum(int(amount) for (amount,) in rows)

        return await self._run(total)

    async def served(self, job_id: bytes) -> tuple[JobRecord | None, Payment | None]:
        """One job that we served, if we have it, and what we were promised for it. Raises StoreError."""

        def select() -> tuple[list[JobRecord], list[Payment]]:
            key = self._key(job_id, Party.PROVIDER)
            return self._select(_THIS_JOB, key), self._select_payments(_THIS_JOB, key)

        jobs, payments = await self._run(select)
        return next(iter(jobs), None), next(iter(payments), None)

    async def get_job(self, job_id: bytes, role: Party) -> JobRecord | None:
        """One job, if we have it in that role. Raises StoreError."""
        rows = await self._run(self._select, _THIS_JOB, self._key(job_id, role))
        return rows[0] if rows else None

    async def jobs(self) -> list[JobRecord]:
        """All our jobs, latest first. Raises StoreError."""
        return await self._run(self._select, "node = ? ORDER BY updated_at DESC", (self._node.public_key,))

    async def recent(self, role: Party, limit: int) -> list[JobRecord]:
        """Our latest jobs of one role, `limit` at most, latest first; without their proofs. Raises StoreError."""
        where = "node = ? AND role = ? ORDER BY updated_at DESC LIMIT ?"
        return await self._run(self._select, where, (self._node.public_key, role.value, limit), _NO_PROOF)

    async def totals(self) -> list[JobTotal]:
        """How many jobs stand where, and what they cost. Raises StoreError."""

        def select() -> list[JobTotal]:
            sums = ", ".join(_SUM_PRICE)
            query = f"SELECT role, state, COUNT(*), {sums} FROM jobs WHERE node = ? GROUP BY role, state"  # noqa: S608 - ours, values are bound
            return [
                JobTotal(Party(role), State(state), jobs, sum(part * 10 ** (9 * at) for at, part in enumerate(parts)))
                for role, state, jobs, *parts in self._connection.execute(query, (self._node.public_key,))
            ]

        return await self._run(select)

    async def history(self, job_id: bytes, role: Party) -> list[tuple[State, int]]:
        """The job's transitions in order: state and Unix milliseconds. Raises StoreError."""

        def select() -> list[tuple[State, int]]:
            query = f"SELECT state, at FROM transitions WHERE {_THIS_JOB} ORDER BY rowid"  # noqa: S608 - ours, values are bound
            rows = self._connection.execute(query, self._key(job_id, role))
            return [(State(state), at) for state, at in rows]

        return await self._run(select)

    async def recover(self, now: int) -> list[JobRecord]:
        """End the jobs that a stop or crash interrupted, and those that have waited for as long as they may.

        What was promised for interrupted ones is owed. Returns what changed. Raises StoreError.
        """

        def close() -> None:
            with self._connection:
                self._connection.execute(
                    "UPDATE payments SET state = 'owed' WHERE node = ? AND state = 'running'", (self._node.public_key,)
                )

        await self._run(close)
        return await self._change(recovered, now)

    async def settle(self, now: int) -> list[JobRecord]:
        """End the jobs that have waited for as long as they may; what changed. Raises StoreError."""
        return await self._change(timed_out, now)

    async def _change(self, change: Callable[[JobRecord, int], JobRecord | None], now: int) -> list[JobRecord]:
        marks = ", ".join("?" * len(_OPEN_STATES))
        rows = await self._run(self._select, f"node = ? AND state IN ({marks})", (self._node.public_key, *_OPEN_STATES))
        changed = [record for job in rows if (record := change(job, now)) is not None]
        if changed:
            await self.put_jobs(changed)
        return changed

    async def note_key(self, now: int) -> None:
        """Note that our key is in use. Raises StoreError."""

        def note() -> None:
            with self._connection:
                self._connection.execute(
                    "INSERT INTO keys VALUES (?, ?, ?) ON CONFLICT (node) DO UPDATE SET last_used_at = ?",
                    (self._node.public_key, now, now, now),
                )

        await self._run(note)

    def _put_jobs(self, records: Sequence[JobRecord], payments: Sequence[Payment]) -> None:
        by_job: dict[tuple[bytes, Party], list[JobRecord]] = {}
        for job in records:
            by_job.setdefault((job.job_id, job.role), []).append(job)
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for steps in by_job.values():
                self._put_job(steps)
            for payment in payments:
                row = (
                    *self._key(payment.job_id, payment.role), payment.peer.public_key, str(payment.amount),
                    payment.statement, payment.state.value,
                )  # fmt: skip
                self._connection.execute("INSERT OR REPLACE INTO payments VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _put_job(self, steps: Sequence[JobRecord]) -> None:
        """Store where a job stands after some steps, and each step that is a transition."""
        job = steps[-1]
        key = self._key(job.job_id, job.role)
        stands = self._connection.execute(f"SELECT state, updated_at FROM jobs WHERE {_THIS_JOB}", key).fetchone()  # noqa: S608 - ours, values are bound
        for step in steps:
            moved = step.state.value, step.updated_at
            # Storing a job again, or what was paid for it later, is no transition.
            if moved != stands:
                self._connection.execute("INSERT INTO transitions VALUES (?, ?, ?, ?, ?)", (*key, *moved))
            stands = moved
        row = (
            *key, *stands, job.model_root, job.peer.public_key if job.peer else None, str(job.price), job.blame.value,
            job.detail, job.proof, job.receipt,
        )  # fmt: skip
        self._connection.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _key(self, job_id: bytes, role: Party) -> tuple[bytes, bytes, str]:
        return self._node.public_key, job_id, role.value

    def _select(self, where: str, arguments: tuple[Any, ...], columns: str = _COLUMNS) -> list[JobRecord]:
        query = f"SELECT {columns} FROM jobs WHERE {where}"  # noqa: S608 - `where` is ours, values are bound
        return [_record(row) for row in self._connection.execute(query, arguments)]

    def _select_payments(self, where: str, arguments: tuple[Any, ...]) -> list[Payment]:
        query = f"SELECT job_id, role, peer, amount, statement, state FROM payments WHERE {where}"  # noqa: S608 - `where` is ours, values are bound
        return [
            Payment(job_id, Party(role), NodeId(peer), int(amount), statement, PaymentState(state))
            for job_id, role, peer, amount, statement, state in self._connection.execute(query, arguments)
        ]

    async def _run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        async with self._lock:
            return await self._run_locked(function, *arguments)

    async def _run_locked(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function of the database; the caller holds the lock. Raises StoreError."""
        try:
            if not self._threads:
                return function(*arguments)
            # Not abandoned on cancel: a transaction that began is finished, and the caller learns of it.
            return await trio.to_thread.run_sync(function, *arguments)
        except _UNFIT as error:
            msg = f"the node's database fails: {error}"
            raise StoreError(msg, hint="check the disk, or move the file away and start anew") from error


def _record(row: tuple[Any, ...]) -> JobRecord:
    _, job_id, role, state, updated_at, model_root, peer, price, blame, detail, proof, receipt = row
    return JobRecord(
        job_id=job_id, role=Party(role), state=State(state), updated_at=updated_at, model_root=model_root,
        peer=NodeId(peer) if peer else None, price=int(price), blame=Party(blame), detail=detail, proof=proof,
        receipt=receipt,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FiledJob:
    """A job in a database, with whose it is."""

    node: NodeId
    """The node of ours that had it."""
    job: JobRecord
    """The job as it stands."""


class Archive:
    """The jobs of all nodes that share a database, for reading. Made by `open_archive`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def jobs(self, limit: int, role: Party | None = None) -> list[FiledJob]:
        """The latest jobs, of one role if that is given, `limit` at most, latest first; without their proofs."""
        where = "role = ? OR ? IS NULL ORDER BY updated_at DESC LIMIT ?"
        value = role.value if role else None
        return self._select(where, (value, value, limit), _NO_PROOF)

    def find(self, prefix: str) -> list[FiledJob]:
        """The jobs whose id in hex begins with `prefix`, in either role; MAX_FOUND at most."""
        # The index on transitions holds all ids; the jobs themselves are a hundred times as large.
        query = "SELECT DISTINCT node, job_id, role FROM transitions WHERE substr(hex(job_id), 1, ?) = ? LIMIT ?"
        keys = self._connection.execute(query, (len(prefix), prefix.upper(), MAX_FOUND)).fetchall()
        return [filed for key in keys for filed in self._select(_THIS_JOB, key)]

    def history(self, filed: FiledJob) -> list[tuple[State, int]]:
        """The transitions of a job in order: state and Unix milliseconds."""
        query = f"SELECT state, at FROM transitions WHERE {_THIS_JOB} ORDER BY rowid"  # noqa: S608 - ours, values are bound
        key = (filed.node.public_key, filed.job.job_id, filed.job.role.value)
        return [(State(state), at) for state, at in self._connection.execute(query, key)]

    def _select(self, where: str, arguments: tuple[Any, ...], columns: str = _COLUMNS) -> list[FiledJob]:
        query = f"SELECT {columns} FROM jobs WHERE {where}"  # noqa: S608 - `where` is ours, values are bound
        return [FiledJob(NodeId(row[0]), _record(row)) for row in self._connection.execute(query, arguments)]


@contextmanager
def open_archive(path: Path) -> Generator[Archive]:
    """The database at `path` for reading within the block; a running node may write to it meanwhile.

    Raises StoreError, also when there is none, or when it fails within the block.
    """
    if not path.exists():
        msg = f"there are no jobs yet: {path} does not exist"
        raise StoreError(msg, hint="another folder is named with --home")
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as opened:
            check_version(opened, path)
            yield Archive(opened)
    except _UNFIT_TO_READ as error:
        msg = f"cannot read {path}: {error}"
        raise StoreError(msg, hint="check the disk and the permissions of the folder") from error


class MakeStore(Protocol):
    """Makes a store over an open database; Store itself does."""

    def __call__(self, connection: sqlite3.Connection, node: NodeId, *, threads: bool) -> Store:
        """As Store's constructor."""
        ...


@asynccontextmanager
async def open_store(
    path: Path, node: NodeId, *, threads: bool = True, make: MakeStore = Store
) -> AsyncGenerator[Store]:
    """The database at `path`, made if missing, within the block. Raises StoreError.

    It is written in a thread, since a durable commit takes milliseconds; without `threads` the event loop waits, which
    virtual time needs (trio's autojump clock does not wait for threads). `make`: Store, or a kind of it.
    """
    try:
        connection = await trio.to_thread.run_sync(open_database, path) if threads else open_database(path)
    except (sqlite3.Error, OSError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        msg = f"cannot open {path}: {problem}"
        raise StoreError(msg, hint="check the disk and the permissions of the folder") from error
    try:
        yield make(connection, node, threads=threads)
    finally:
        connection.close()
