"""Finding and being found by nodes of the same local network. Answers are hints: connecting proves the rest.

Sources: https://github.com/libp2p/specs/blob/master/discovery/mdns.md; RFC 6762 (multicast DNS), of which this needs
little: one question, one answer, both by multicast over IPv4.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Final, cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import trio
from dns.rdtypes.ANY.TXT import TXT as TxtRecord  # noqa: N811 - the library's name

from aci_p2p.dht.bootstrap import peer_of
from aci_p2p.network.api import Network
from aci_p2p.network.buckets import TokenBucket
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import MAX_ADDRESS_BYTES, MAX_ADDRESSES
from aci_p2p.tasks import open_background

SERVICE: Final = "_p2p._udp.local."
"""Every libp2p node answers to it; those of other networks are found to be so when they are connected."""
GROUP: Final = ("224.0.0.251", 5353)
"""Multicast group and port of mDNS."""
MAX_PACKET_BYTES: Final = 9_000
"""Largest mDNS packet (RFC 6762 section 17)."""
MAX_FOUND: Final = 16
"""Addresses that are taken from one packet."""
RATE: Final = 1.0
"""Answers, and packets read of others, a second: a small network says all it has to say in that."""
BURST: Final = 20.0
"""Answers and packets at once."""
FIRST_ASK_S: Final = 2.0
"""Seconds from the first question to the second; doubled each time, up to ASK_S."""
ASK_S: Final = 120.0
"""Seconds between questions; everyone hears every answer."""
TTL_S: Final = 120
"""Seconds that others may remember an answer (as in go-libp2p)."""
NAME_CHARACTERS: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
NAME_LENGTH: Final = 32
"""Characters of the random name under which a node answers, of 32 to 63."""

_ASKED_TYPES: Final = (dns.rdatatype.PTR, dns.rdatatype.ANY)
_PREFIX: Final = b"dnsaddr="
_TEXT_BYTES_MAX: Final = 255

log = logging.getLogger("aci_p2p.dht")


def encode_question() -> bytes:
    """Who is there?"""
    message = dns.message.make_query(SERVICE, dns.rdatatype.PTR, flags=0)
    message.id = 0
    return message.to_wire()


def encode_answer(name: str, addresses: Sequence[str]) -> bytes:
    """We are, under a random `name`, and can be dialled at these multiaddrs with `/p2p/`."""
    texts = [b"dnsaddr=" + address.encode() for address in addresses]
    quoted = " ".join(f'"{text.decode()}"' for text in texts if len(text) <= _TEXT_BYTES_MAX)
    instance = f"{name}.{SERVICE}"
    message = dns.message.Message(id=0)
    message.flags = dns.flags.QR | dns.flags.AA
    message.answer.append(dns.rrset.from_text(SERVICE, TTL_S, "IN", "PTR", instance))
    message.additional.append(dns.rrset.from_text(instance, TTL_S, "IN", "TXT", quoted))
    return message.to_wire()


def is_question(message: dns.message.Message) -> bool:
    """Whether somebody asks who is there."""
    service = dns.name.from_text(SERVICE)
    # Whatever the class: its top bit asks for an answer to the asker alone (RFC 6762 section 5.4); ours goes to all.
    asked = [one for one in message.question if one.name == service and one.rdtype in _ASKED_TYPES]
    return not message.flags & dns.flags.QR and bool(asked)


def addresses_in(message: dns.message.Message, own: NodeId) -> list[str]:
    """Where the peers in an answer can be dialled: well-formed multiaddrs of others, at most MAX_FOUND."""
    found: list[str] = []
    if not message.flags & dns.flags.QR:
        return found
    for rrset in [*message.answer, *message.additional]:
        if not rrset.name.is_subdomain(dns.name.from_text(SERVICE)):
            continue
        records = cast("Iterable[object]", rrset)
        texts = [text for record in records if isinstance(record, TxtRecord) for text in record.strings]
        for text in texts:
            address = text.removeprefix(_PREFIX).decode("ascii", "replace")
            peer = peer_of(address)
            if text.startswith(_PREFIX) and len(address) <= MAX_ADDRESS_BYTES and peer not in {None, own}:
                found.append(address)
    return list(dict.fromkeys(found))[:MAX_FOUND]


def decode(packet: bytes) -> dns.message.Message | None:
    """Read a packet; None when it is none that we understand."""
    try:
        return dns.message.from_wire(packet, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return None


class _Mdns:
    def __init__(self, network: Network, found: Callable[[Sequence[str]], None], random: Random) -> None:
        self._network = network
        self._found = found
        self._random = random
        self._name = "".join(random.choice(NAME_CHARACTERS) for _ in range(NAME_LENGTH))

    async def listen(self, sock: trio.socket.SocketType, group: tuple[str, int]) -> None:
        now = trio.current_time()
        answers, reads = TokenBucket.full(RATE, BURST, now), TokenBucket.full(RATE, BURST, now)
        while True:
            packet, _ = await sock.recvfrom(MAX_PACKET_BYTES)
            now = trio.current_time()
            # A packet is parsed only while there are few: parsing is what costs.
            if not reads.take(1, now) or (message := decode(packet)) is None:
                continue
            if is_question(message):
                addresses = list(self._network.addresses)[:MAX_ADDRESSES]
                if addresses and answers.take(1, now):
                    await _send(sock, encode_answer(self._name, addresses), group)
            elif addresses := addresses_in(message, self._network.node_id):
                for peer in {peer for address in addresses if (peer := peer_of(address)) is not None}:
                    self._network.learn_addresses(peer, [one for one in addresses if peer_of(one) == peer])
                self._found(addresses)

    async def ask(self, sock: trio.socket.SocketType, group: tuple[str, int]) -> None:
        gap = FIRST_ASK_S
        while True:
            await _send(sock, encode_question(), group)
            await trio.sleep(gap * self._random.uniform(0.5, 1))
            gap = min(2 * gap, ASK_S)


async def _send(sock: trio.socket.SocketType, packet: bytes, group: tuple[str, int]) -> None:
    try:
        await sock.sendto(packet, group)
    except OSError as error:
        # No network at the moment, most likely.
        log.debug("mDNS: %s", error)


@asynccontextmanager
async def open_mdns(
    network: Network,
    found: Callable[[Sequence[str]], None],
    random: Random,
    *,
    group: tuple[str, int] = GROUP,
    interface: str = "0.0.0.0",  # noqa: S104 - the system chooses
) -> AsyncGenerator[None]:
    """Ask and answer on the local network within the block; `found` gets the addresses of others.

    `interface`: IPv4 address of the one to use. A system without multicast is logged, and then nobody is found.
    """
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        try:
            await _join_group(sock, group, interface)
        except OSError as error:
            log.warning("no mDNS on this machine: %s", error)
            yield
            return
        mdns = _Mdns(network, found, random)
        async with open_background() as nursery:
            nursery.start_soon(mdns.listen, sock, group)
            nursery.start_soon(mdns.ask, sock, group)
            yield
    finally:
        sock.close()


async def _join_group(sock: trio.socket.SocketType, group: tuple[str, int], interface: str) -> None:
    """Share the port with the other programs of this machine that speak mDNS, and hear the group. Raises OSError."""
    address, port = group
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    await sock.bind(("", port))
    own = socket.inet_aton(interface)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(address) + own)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, struct.pack("B", 255))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
