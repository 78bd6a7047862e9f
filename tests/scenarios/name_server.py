"""A name server for one zone: `python -m tests.scenarios.name_server ADDRESS ZONE_FILE`, on UDP port 53, till killed.

Where the zone has no such name or type it answers so; other zones it refuses.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.zone


def answer(zone: dns.zone.Zone, question: bytes) -> bytes:
    """The answer to one question. Raises DNSException when it is none."""
    query = dns.message.from_wire(question)
    response = dns.message.make_response(query)
    response.flags |= dns.flags.AA
    asked = query.question[0]
    assert zone.origin is not None
    if not asked.name.is_subdomain(zone.origin):
        response.set_rcode(dns.rcode.REFUSED)
    elif (found := zone.get_rrset(asked.name, asked.rdtype)) is not None:
        response.answer.append(found)
    elif zone.get_node(asked.name) is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    return response.to_wire()


def serve(address: str, zone: dns.zone.Zone) -> None:
    """Answer for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        while True:
            question, asker = server.recvfrom(4096)
            try:
                server.sendto(answer(zone, question), asker)
            except dns.exception.DNSException:
                continue


if __name__ == "__main__":
    serve(sys.argv[1], dns.zone.from_text(Path(sys.argv[2]).read_text(encoding="utf-8"), relativize=False))
