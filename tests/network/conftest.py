"""Networks for tests: the same fixtures over both implementations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

import pytest
import trio

from aci_p2p.network import Network
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.identity import KeyPair


def validate_record(_key: str, value: bytes) -> None:
    """The tests' record rule: whatever begins with `bad` is refused."""
    if value.startswith(b"bad"):
        msg = "a bad record"
        raise RemoteError(msg)


def select_record(_key: str, values: Sequence[bytes]) -> int:
    """The tests' selection rule: the greatest is the newest."""
    return max(range(len(values)), key=lambda index: values[index])


def make_key(number: int) -> KeyPair:
    """A distinct key for each number."""
    return KeyPair(number.to_bytes(32))


class Opener(Protocol):
    """Opens one endpoint for a block."""

    def __call__(self, number: int) -> AbstractAsyncContextManager[Network]:
        """`number` decides the key."""
        ...


OpenSwarm = Callable[[int], AbstractAsyncContextManager[list[Network]]]
Eventually = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture
def open_libp2p() -> Opener:
    """Opens libp2p endpoints on loopback."""

    def open_one(number: int) -> AbstractAsyncContextManager[Network]:
        key = make_key(number)
        return open_libp2p_network(key, record_validator=validate_record, record_selector=select_record)

    return open_one


@pytest.fixture
def hub() -> MemoryHub:
    """The medium of the in-memory endpoints of one test."""
    return MemoryHub()


@pytest.fixture
def open_memory(hub: MemoryHub) -> Opener:
    """Opens in-memory endpoints on one hub."""

    def open_one(number: int) -> AbstractAsyncContextManager[Network]:
        key = make_key(number)
        return hub.open_network(key, record_validator=validate_record, record_selector=select_record)

    return open_one


@pytest.fixture(params=["memory", "libp2p"])
def open_network(request: pytest.FixtureRequest, open_memory: Opener, open_libp2p: Opener) -> Opener:
    """Opens endpoints of each implementation in turn."""
    return open_memory if request.param == "memory" else open_libp2p


@pytest.fixture
def open_line(open_network: Opener) -> OpenSwarm:
    """Opens endpoints of which each is connected to the one before it."""

    @asynccontextmanager
    async def open_all(count: int) -> AsyncGenerator[list[Network]]:
        async with AsyncExitStack() as stack:
            networks = [await stack.enter_async_context(open_network(number)) for number in range(1, count + 1)]
            for left, right in zip(networks, networks[1:], strict=False):
                await right.connect(left.addresses[0])
            yield networks

    return open_all


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a condition holds, at most five seconds."""

    async def wait(condition: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not condition():
                await trio.sleep(0.005)

    return wait
