"""What the network tests share: endpoints of both implementations, and waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from aci_p2p.network import Network, Stream
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.identity import KeyPair

Opener = Callable[[int], AbstractAsyncContextManager[Network]]
"""Opens one endpoint for a block; the number decides its key."""
OpenLine = Callable[[int], AbstractAsyncContextManager[list[Network]]]
"""Opens so many endpoints, each connected to the one before it."""

ECHO = "/test/echo/1"
TOPIC = "test/offers"
PATIENCE_S = 20.0
"""Longest wait for what should come at once, seconds: the machine may be busy."""


def make_key(number: int) -> KeyPair:
    """A distinct key for each number."""
    return KeyPair(number.to_bytes(32))


STRANGER = make_key(99).node_id


def validate_record(_key: str, value: bytes) -> None:
    """The tests' record rule: whatever begins with `bad` is refused."""
    if value.startswith(b"bad"):
        msg = "a bad record"
        raise RemoteError(msg)


def select_record(_key: str, values: Sequence[bytes]) -> int:
    """The tests' selection rule: the greatest is the newest."""
    return max(range(len(values)), key=lambda index: values[index])


def open_on(hub: MemoryHub, number: int) -> AbstractAsyncContextManager[Network]:
    """An in-memory endpoint."""
    key = make_key(number)
    return hub.open_network(key, record_validator=validate_record, record_selector=select_record)


async def echo(stream: Stream) -> None:
    """Send back every frame."""
    while True:
        await stream.send(await stream.receive())


async def wait_for_ever(_stream: Stream) -> None:
    """Hold a stream without reading it."""
    await trio.sleep_forever()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, at most PATIENCE_S."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - there is no event for what tests wait for
            await trio.sleep(0.005)


async def told(network: Network, condition: Callable[[], object]) -> None:
    """Wait until a condition holds, looking only when the network says that something has changed."""
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await network.changed()


async def joined(publisher: Network, *others: Network) -> None:
    """Wait until the publisher knows that the others have joined the tests' topic."""
    await eventually(lambda: {other.node_id for other in others} <= set(publisher.topic_peers(TOPIC)))
