"""What a node logged lately, kept to be shown, and the forms of a line of log."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, cast

from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.text import printable

MAX_EVENTS: Final = 256
"""Events kept; a screen shows a tenth of them."""
MAX_TROUBLES: Final = 32
"""Warnings and errors kept beside them, so that chatter does not push them out."""
MAX_VALUE: Final = 500
"""Characters of a message or a field's value: a peer's text could be long."""

_OURS: Final = "aci_p2p."


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was logged, safe to be shown."""

    at: str
    """UTC, ISO 8601 with milliseconds."""
    level: str
    """In lower case."""
    source: str
    """The part of the program: the logger's name, without the package's."""
    message: str
    """What happened, the same words each time."""
    fields: Mapping[str, str | int | float]
    """To whom and how: from `extra={"fields": {...}}` of the logging call."""
    is_trouble: bool = False
    """Whether it is a warning or an error."""

    def text(self) -> str:
        """For people: `2026-11-24T18:57:30.123Z INFO job done job=7f4b5ff3 tokens=67`."""
        return f"{self.at} {self.level.upper()} {self.tail()}"

    def tail(self) -> str:
        """The message and its fields."""
        return " ".join([self.message, *(f"{name}={_quoted(value)}" for name, value in self.fields.items())])

    def logfmt(self) -> str:
        """Pairs only: `ts=2026-11-24T18:57:30.123Z level=info source=provider msg="job done" job=7f4b5ff3`."""
        head = {"ts": self.at, "level": self.level, "source": self.source, "msg": self.message}
        others = {name: value for name, value in self.fields.items() if name not in head}
        return " ".join(f"{name}={_quoted(value)}" for name, value in {**head, **others}.items())

    def json(self) -> str:
        """A document; the fields stand beside the message."""
        head = {"ts": self.at, "level": self.level, "source": self.source, "msg": self.message}
        others = {name: value for name, value in self.fields.items() if name not in head}
        return json.dumps({**head, **others})


def event_of(record: logging.LogRecord) -> Event:
    """What a record of the logging module says."""
    given: object = getattr(record, "fields", None)
    fields = {
        printable(name): _value(value)
        for name, value in (cast("Mapping[str, object]", given).items() if isinstance(given, Mapping) else ())
    }
    if record.exc_info and record.exc_info[1] is not None:
        fields.setdefault("error", _value(record.exc_info[1]))
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Event(
        at=at,
        level=record.levelname.lower(),
        source=record.name.removeprefix(_OURS),
        message=_shortened(record.getMessage()),
        fields=fields,
        is_trouble=record.levelno >= logging.WARNING,
    )


class LineFormatter(logging.Formatter):
    """Makes each record a line, in one of the forms that the configuration knows."""

    def __init__(self, form: str) -> None:
        """`form`: text, logfmt or json."""
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        event = event_of(record)
        match self._form:
            case "json":
                return event.json()
            case "logfmt":
                return event.logfmt()
            case _:
                return event.text()


class Journal(logging.Handler):
    """Keeps the last events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        """All, the oldest first."""
        self.troubles: deque[Event] = deque(maxlen=MAX_TROUBLES)
        """The warnings and errors, the oldest first."""
        self.warnings = 0
        """Warnings since the start."""
        self.errors = 0
        """Errors since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        event = event_of(record)
        self.events.append(event)
        if event.is_trouble:
            self.troubles.append(event)
            if record.levelno >= logging.ERROR:
                self.errors += 1
            else:
                self.warnings += 1


def _value(value: object) -> str | int | float:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return value
        case AciError():
            return _shortened(value.message)
        case BaseException():
            return _shortened(f"{type(value).__name__}: {value}")
        case _:
            return _shortened(str(value))


def _shortened(text: str) -> str:
    line = printable(text)
    return line if len(line) <= MAX_VALUE else line[: MAX_VALUE - 3] + "..."


def _quoted(value: str | float) -> str:
    text = str(value)
    # JSON's string is what readers of logfmt understand.
    plain = bool(text) and not any(char in ' "=\\' or char.isspace() for char in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
