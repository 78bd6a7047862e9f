"""The node's database file: its tables, their versions, and how it is opened."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Final

from aci_p2p.protocol.errors import LocalError

SCHEMA_VERSION: Final = 2
"""`PRAGMA user_version`; a database with a higher one is from a later program and is refused."""
BUSY_TIMEOUT_S: Final = 5.0
"""Seconds to wait for another process's transaction; ours take milliseconds."""
CACHE_KIB: Final = 256
"""Pages of the database that are kept in memory, KiB, of SQLite's usual 2,000: a job is hardly ever read again."""
BUSY_POLL_S: Final = 0.01
"""Seconds between attempts where SQLite does not wait by itself."""

_SCHEMA: Final = """
CREATE TABLE jobs (
    node BLOB NOT NULL,
    job_id BLOB NOT NULL,
    role TEXT NOT NULL,
    state TEXT NOT NULL,
    updated_at INTEGER NOT NULL,
    model_root BLOB NOT NULL,
    peer BLOB,
    price TEXT NOT NULL,
    blame TEXT NOT NULL,
    detail TEXT NOT NULL,
    proof BLOB NOT NULL,
    receipt BLOB NOT NULL,
    PRIMARY KEY (node, job_id, role)
) STRICT, WITHOUT ROWID;
CREATE TABLE transitions (
    node BLOB NOT NULL,
    job_id BLOB NOT NULL,
    role TEXT NOT NULL,
    state TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX transitions_by_job ON transitions (node, job_id, role);
CREATE TABLE keys (
    node BLOB PRIMARY KEY,
    first_used_at INTEGER NOT NULL,
    last_used_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_PAYMENTS: Final = """
CREATE TABLE payments (
    node BLOB NOT NULL,
    job_id BLOB NOT NULL,
    role TEXT NOT NULL,
    peer BLOB NOT NULL,
    amount TEXT NOT NULL,
    statement BLOB NOT NULL,
    state TEXT NOT NULL,
    PRIMARY KEY (node, job_id, role, peer)
) STRICT, WITHOUT ROWID;
CREATE INDEX payments_by_state ON payments (node, state);
"""
"""Since version 2."""
_TOTALS_INDEX: Final = "CREATE INDEX IF NOT EXISTS jobs_totals ON jobs (node, role, state, price)"
"""Holds all that `totals` reads: the jobs themselves, with their proofs, are a hundred times as large."""
_BY_TIME_INDEX: Final = "CREATE INDEX IF NOT EXISTS jobs_by_time ON jobs (updated_at)"
"""For the latest jobs."""


class StoreError(LocalError):
    """The database cannot be opened or written."""

    code = "store"


def open_database(path: Path) -> sqlite3.Connection:
    """The database at `path`, made if missing. Raises StoreError, sqlite3.Error, OSError."""
    # Prompts and answers are in it: for the owner alone, like the keys beside it.
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
    try:
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables that are missing; refuse a database of a later version."""
    version = check_version(connection, path)
    if version < SCHEMA_VERSION:
        for statement in (_PAYMENTS if version else _SCHEMA + _PAYMENTS).split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute(_BY_TIME_INDEX)
    connection.execute(_TOTALS_INDEX)


def _write_ahead(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # SQLite itself does not wait for another process here.
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_POLL_S)
        else:
            return


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a database's tables. Raises StoreError when it is a later one than ours."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 0 <= version <= SCHEMA_VERSION:
        msg = f"{path} is of version {version}, this program knows {SCHEMA_VERSION}"
        raise StoreError(msg, hint="use the program that wrote it, or another --home")
    return int(version)
