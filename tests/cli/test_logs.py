"""Lines of log: one for each event, in the form that is wanted, with nothing in it that a terminal would obey."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from aci_p2p.control import Journal, LineFormatter
from aci_p2p.control.journal import MAX_EVENTS, MAX_TROUBLES, MAX_VALUE
from aci_p2p.protocol.errors import LocalError
from tests.cli.views import HOSTILE

AT = 1_800_000_000.25
FIELDS: dict[str, object] = {
    "job": "7f4b", "tokens": 67, "speed": 1.5, "ok": True, "price": "0.1 ACI", "empty": "", "quote": 'a"b\\c',
    "error": LocalError("no room", hint="make some"), "bug": ValueError("x"),
}  # fmt: skip


def record(message: str = "job done", level: int = logging.INFO, **extra: Any) -> logging.LogRecord:  # noqa: ANN401
    made = logging.LogRecord("aci_p2p.provider", level, __file__, 1, message, (), None)
    made.created = AT
    made.__dict__.update(extra)
    return made


def test_for_people() -> None:
    line = LineFormatter("text").format(record(fields=FIELDS))
    assert line == (
        "2027-01-15T08:00:00.250Z INFO job done job=7f4b tokens=67 speed=1.5 ok=true "
        r'price="0.1 ACI" empty="" quote="a\"b\\c" error="no room" bug="ValueError: x"'
    )


def test_as_pairs() -> None:
    line = LineFormatter("logfmt").format(record(fields={"job": "7f4b", "msg": "not this one"}))
    assert line == 'ts=2027-01-15T08:00:00.250Z level=info source=provider msg="job done" job=7f4b'


def test_as_documents() -> None:
    document = json.loads(LineFormatter("json").format(record(fields={**FIELDS, "ts": "not this one"})))
    assert document == {
        "ts": "2027-01-15T08:00:00.250Z", "level": "info", "source": "provider", "msg": "job done", "job": "7f4b",
        "tokens": 67, "speed": 1.5, "ok": "true", "price": "0.1 ACI", "empty": "", "quote": 'a"b\\c',
        "error": "no room", "bug": "ValueError: x",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["text", "logfmt", "json"])
def test_a_peers_text_is_harmless_and_short(form: str) -> None:
    made = record("%s said so", fields={HOSTILE: HOSTILE, "long": "y" * 10_000})
    made.args = (HOSTILE * 1_000,)
    line = LineFormatter(form).format(made)
    assert line.isprintable()
    assert len(line) < 4 * MAX_VALUE


@pytest.mark.parametrize("form", ["text", "logfmt", "json"])
def test_an_exception_is_a_field(form: str) -> None:
    error = ValueError("first\nsecond")
    line = LineFormatter(form).format(record("it broke", exc_info=(ValueError, error, None)))
    assert re.search(r'error("?)[=:] ?"ValueError: first second"', line)


def test_the_journal_forgets_chatter_before_trouble() -> None:
    journal = Journal()
    journal.handle(record("trouble", logging.WARNING))
    journal.handle(record("worse", logging.ERROR, fields={"why": "x"}))
    for number in range(MAX_EVENTS + 5):
        journal.handle(record(f"chatter {number}"))
    assert len(journal.events) == MAX_EVENTS
    assert journal.events[-1].message == f"chatter {MAX_EVENTS + 4}"
    assert [event.tail() for event in journal.troubles] == ["trouble", "worse why=x"]
    assert (journal.warnings, journal.errors) == (1, 1)
    for _ in range(MAX_TROUBLES):
        journal.handle(record("again", logging.WARNING))
    assert {event.message for event in journal.troubles} == {"again"}
    assert journal.warnings == MAX_TROUBLES + 1
