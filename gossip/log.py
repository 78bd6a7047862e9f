"""A bounded, numbered log of a topic's messages, from which others learn what they have missed. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.catchup import MAX_LATEST, MAX_NEWS, Head, News, Since

MAX_LOG_MESSAGES: Final = 4_096
"""Messages kept of one topic: 60 s of 68 a second, the live offers that a node remembers."""
MAX_LOG_BYTES: Final = 2 << 20
"""Payload kept of one topic, bytes: the above in messages of half a kilobyte."""


@dataclass(frozen=True, slots=True)
class _Entry:
    sequence: int
    data: bytes
    expires_at: int


class TopicLog:
    """The accepted, unexpired messages of one topic in the order of their arrival; the oldest make room."""

    def __init__(self, epoch: bytes) -> None:
        """`epoch`: EPOCH_BYTES drawn at random."""
        self._epoch = epoch
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._head = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, identifier: bytes) -> bool:
        return identifier in self._entries

    @property
    def sequence(self) -> int:
        """The latest number."""
        return self._head

    @property
    def payload_bytes(self) -> int:
        """Payload held, bytes."""
        return self._bytes

    def add(self, identifier: bytes, data: bytes, expires_at: int, now: int) -> None:
        """Append a message unless it is there; times in Unix milliseconds."""
        if identifier in self._entries or expires_at <= now:
            return
        self._head += 1
        self._entries[identifier] = _Entry(self._head, data, expires_at)
        self._bytes += len(data)
        self.trim(now)

    def trim(self, now: int) -> None:
        """Forget the oldest messages while they have expired or the log is too large."""
        while self._entries:
            oldest = next(iter(self._entries.values()))
            fits = len(self._entries) <= MAX_LOG_MESSAGES and self._bytes <= MAX_LOG_BYTES
            if fits and oldest.expires_at > now:
                return
            self._entries.popitem(last=False)
            self._bytes -= len(oldest.data)

    def get(self, identifier: bytes, now: int) -> bytes | None:
        """The payload of an unexpired message."""
        entry = self._entries.get(identifier)
        return entry.data if entry is not None and entry.expires_at > now else None

    def head(self) -> Head:
        """How far the log is, with the ids of its latest messages."""
        latest = [identifier for identifier, _ in zip(reversed(self._entries), range(MAX_LATEST), strict=False)]
        return Head(self._epoch, self._head, tuple(reversed(latest)))

    def since(self, request: Since, now: int) -> News:
        """The unexpired messages after a point, the oldest MAX_NEWS of them."""
        after = request.sequence if request.epoch == self._epoch else 0
        news: list[tuple[int, bytes]] = []
        for identifier, entry in reversed(self._entries.items()):
            if entry.sequence <= after:
                break
            if entry.expires_at > now:
                news.append((entry.sequence, identifier))
        news.reverse()
        told = news[:MAX_NEWS]
        sequence = self._head if len(told) == len(news) else told[-1][0]
        return News(self._epoch, sequence, self._head, tuple(identifier for _, identifier in told))
