"""What the network seam promises of the DHT, over both implementations."""

from __future__ import annotations

import hashlib

import pytest
import trio

from aci_p2p.network import MAX_RECORD_BYTES, Stream
from aci_p2p.protocol.errors import LocalError, RemoteError
from tests.network.driver import Opener, OpenLine, eventually

KEY = "/aci/node/test"
MODEL = hashlib.sha256(b"model").digest()


@pytest.mark.parametrize("count", [2, 5])
async def test_record_is_found_from_elsewhere(open_line: OpenLine, count: int) -> None:
    async with open_line(count) as networks:
        await networks[0].put_record(KEY, b"value")
        assert await networks[-1].get_record(KEY) == b"value"


async def test_record_survives_its_author(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        await b.connect(a.addresses[0])
        async with open_network(3) as c:
            await c.connect(a.addresses[0])
            await c.put_record(KEY, b"value")
        await eventually(lambda: list(a.peers) == [b.node_id])
        assert await b.get_record(KEY) == b"value"


async def test_newest_record_wins(open_line: OpenLine) -> None:
    async with open_line(3) as (a, b, c):
        await a.put_record(KEY, b"version 2")
        await b.put_record(KEY, b"version 3")
        await c.put_record(KEY, b"version 1")
        assert await a.get_record(KEY) == b"version 3"
        assert await c.get_record(KEY) == b"version 3"


async def test_missing_record_is_none(open_line: OpenLine) -> None:
    async with open_line(2) as (a, _):
        assert await a.get_record("/aci/node/nobody") is None


async def test_bad_record_is_not_put(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with pytest.raises(RemoteError):
            await a.put_record(KEY, b"bad value")
        assert await b.get_record(KEY) is None


@pytest.mark.parametrize("key", ["", "plain", "/ipfs/x", "/aci/" + "x" * 200])
async def test_bad_record_key_is_our_own_fault(open_network: Opener, key: str) -> None:
    async with open_network(1) as network:
        with pytest.raises(LocalError):
            await network.put_record(key, b"value")
        with pytest.raises(LocalError):
            await network.get_record(key)


async def test_oversized_record_is_our_own_fault(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with pytest.raises(LocalError):
            await a.put_record(KEY, bytes(MAX_RECORD_BYTES + 1))
        await a.put_record(KEY, bytes(MAX_RECORD_BYTES))
        assert await b.get_record(KEY) == bytes(MAX_RECORD_BYTES)


@pytest.mark.parametrize("count", [2, 5])
async def test_providers_are_found(open_line: OpenLine, count: int) -> None:
    async with open_line(count) as networks:
        for network in networks[1:]:
            await network.provide(MODEL)
        found = await networks[0].find_providers(MODEL, 10)
        assert set(found) == {network.node_id for network in networks[1:]}


async def test_providers_are_limited(open_line: OpenLine) -> None:
    async with open_line(4) as networks:
        for network in networks:
            await network.provide(MODEL)
        assert len(await networks[0].find_providers(MODEL, 2)) == 2


async def test_nobody_provides(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        await b.provide(MODEL)
        assert list(await a.find_providers(hashlib.sha256(b"other").digest(), 10)) == []


async def test_lonely_node_finds_what_it_has_itself(open_network: Opener) -> None:
    async with open_network(1) as network:
        await network.put_record(KEY, b"value")
        await network.provide(MODEL)
        assert await network.get_record(KEY) == b"value"
        assert list(await network.find_providers(MODEL, 10)) == [network.node_id]


async def test_provider_that_was_found_can_be_dialled(open_line: OpenLine) -> None:
    async def greet(stream: Stream) -> None:
        await stream.send(b"hello")

    async with open_line(3) as (a, _, c):
        with c.serve("/test/greet/1", greet):
            await c.provide(MODEL)
            (provider,) = await a.find_providers(MODEL, 10)
            async with a.open_stream(provider, "/test/greet/1") as stream:
                assert await stream.receive() == b"hello"


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
async def test_bad_provider_key_is_our_own_fault(open_network: Opener, key: bytes) -> None:
    async with open_network(1) as network:
        with pytest.raises(LocalError):
            await network.provide(key)
        with pytest.raises(LocalError):
            await network.find_providers(key, 1)


async def test_lookups_end_when_peers_are_gone(open_network: Opener) -> None:
    async with open_network(1) as a:
        async with open_network(2) as b, open_network(3) as c:
            await b.connect(a.addresses[0])
            await c.connect(a.addresses[0])
            await eventually(lambda: len(a.peers) == 2)
        with trio.fail_after(5):
            await a.put_record(KEY, b"value")
            assert await a.get_record(KEY) == b"value"
            assert list(await a.find_providers(MODEL, 10)) == []
