"""/dnsaddr over a name server of our own on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from dns.asyncresolver import Resolver

from aci_p2p.dht import dnsaddr, joining
from aci_p2p.dht.bootstrap import DnsAddress
from aci_p2p.dht.dnsaddr import resolve_dnsaddr
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.tasks import open_background
from tests.dht.driver import open_peer

PEER: Final = KeyPair(bytes([1]) * 32).node_id
OTHER: Final = KeyPair(bytes([2]) * 32).node_id
Zone = dict[str, list[str]]


@asynccontextmanager
async def open_name_server(answer: Callable[[str], list[str] | None]) -> AsyncGenerator[Resolver]:
    """Answers TXT questions within the block; None: no such name. Yields who asks it."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))

    async def serve() -> None:
        while True:
            packet, asker = await sock.recvfrom(4096)
            query = dns.message.from_wire(packet)
            reply = dns.message.make_response(query)
            name = str(query.question[0].name)
            texts = answer(name)
            if texts is None:
                reply.set_rcode(dns.rcode.NXDOMAIN)
            elif texts:
                quoted = [" ".join(f'"{text[at : at + 200]}"' for at in range(0, len(text), 200)) for text in texts]
                reply.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", *quoted))
            await sock.sendto(reply.to_wire(), asker)

    resolver = Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], sock.getsockname()[1]
    with sock:
        async with open_background() as nursery:
            nursery.start_soon(serve)
            yield resolver


def at(peer: object, host: str = "192.0.2.1") -> str:
    return f"/ip4/{host}/tcp/9400/p2p/{peer}"


async def test_the_records_of_a_name() -> None:
    texts = [
        f"dnsaddr={at(PEER)}", f"dnsaddr={at(OTHER)}", "dnsaddr=/dnsaddr/eu.boot.example", "v=spf1 -all",
        f"DNSADDR={at(PEER)}", "dnsaddr=" + "x" * 300,
    ]  # fmt: skip
    zone: Zone = {"_dnsaddr.boot.example.": texts}
    async with open_name_server(zone.get) as resolver:
        found = await resolve_dnsaddr(DnsAddress("boot.example", None), resolver)
        assert sorted(found) == sorted([at(PEER), at(OTHER), "/dnsaddr/eu.boot.example"])
        assert await resolve_dnsaddr(DnsAddress("boot.example", PEER), resolver) == [at(PEER)]
        assert await resolve_dnsaddr(DnsAddress("boot.example.", PEER), resolver) == [at(PEER)]


async def test_an_address_in_two_strings() -> None:
    long = f"/dns4/{'a' * 60}.{'b' * 60}.example/tcp/9400/p2p/{PEER}"
    async with open_name_server(lambda _name: [f"dnsaddr={long}"]) as resolver:
        assert await resolve_dnsaddr(DnsAddress("boot.example", None), resolver) == [long]


@pytest.mark.parametrize("texts", [None, []])
async def test_a_name_that_is_not_there(texts: list[str] | None) -> None:
    async with open_name_server(lambda _name: texts) as resolver:
        with pytest.raises(ResourceError, match=r"_dnsaddr\.boot\.example\. cannot be resolved: "):
            await resolve_dnsaddr(DnsAddress("boot.example", None), resolver)


async def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsaddr, "RESOLVE_TIMEOUT_S", 0.2)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        await silent.bind(("127.0.0.1", 0))
        resolver = Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], silent.getsockname()[1]
        with trio.fail_after(5), pytest.raises(ResourceError, match="no name server answers"):
            await resolve_dnsaddr(DnsAddress("boot.example", None), resolver)


async def test_a_node_joins_through_a_name(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_peer(hub, 1) as first, open_peer(hub, 2) as second:
        zone: Zone = {
            "_dnsaddr.boot.example.": ["dnsaddr=/dnsaddr/eu.boot.example"],
            "_dnsaddr.eu.boot.example.": [f"dnsaddr={at(OTHER)}", f"dnsaddr={first.address}"],
        }
        async with open_name_server(zone.get) as resolver:

            async def resolve(address: DnsAddress) -> object:
                return await resolve_dnsaddr(address, resolver)

            monkeypatch.setattr(joining, "resolve_dnsaddr", resolve)
            with trio.fail_after(5):
                await second.discovery.join(["/dnsaddr/boot.example"])
        assert second.network.peers == (first.node_id,)
