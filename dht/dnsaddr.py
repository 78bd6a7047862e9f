"""`/dnsaddr`: multiaddrs in the TXT records of a domain, so that an operator can move bootstrap nodes.

Source: https://github.com/multiformats/multiaddr/blob/master/protocols/DNSADDR.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from aci_p2p.dht.bootstrap import DnsAddress, peer_of
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.publications import MAX_ADDRESS_BYTES

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver

RESOLVE_TIMEOUT_S: Final = 5.0
"""Seconds for one name, all name servers together."""
MAX_RECORDS: Final = 64
"""TXT records that are read of one name."""

_PREFIX: Final = "dnsaddr="


async def resolve_dnsaddr(address: DnsAddress, resolver: Resolver | None = None) -> Sequence[str]:
    """The multiaddrs in the TXT records of `_dnsaddr.<name>`; only those of the peer if one is named.

    `resolver`: whom to ask; None: the name servers of /etc/resolv.conf. Raises ResourceError.
    """
    # Imported here: most nodes have no use for it, and it takes a tenth of a second.
    from dns import asyncbackend, asyncresolver  # noqa: PLC0415
    from dns.exception import DNSException, Timeout  # noqa: PLC0415
    from dns.rdatatype import TXT  # noqa: PLC0415
    from dns.rdtypes.ANY.TXT import TXT as TxtRecord  # noqa: PLC0415, N811

    question = f"_dnsaddr.{address.name.rstrip('.')}."
    try:
        asking = resolver or asyncresolver.Resolver()
        answer = await asking.resolve(
            question, TXT, lifetime=RESOLVE_TIMEOUT_S, search=False, backend=asyncbackend.get_backend("trio")
        )
    except Timeout:
        msg = f"no name server answers for {question} within {RESOLVE_TIMEOUT_S:g} s"
        raise ResourceError(msg, hint="check the name servers in /etc/resolv.conf") from None
    except (DNSException, OSError) as error:
        msg = f"{question} cannot be resolved: {error}"
        raise ResourceError(msg) from error
    found: list[str] = []
    for record in list(answer)[:MAX_RECORDS]:
        text = b"".join(record.strings).decode("ascii", "replace") if isinstance(record, TxtRecord) else ""
        multiaddr = text.removeprefix(_PREFIX)
        if (
            text.startswith(_PREFIX)
            and len(multiaddr) <= MAX_ADDRESS_BYTES
            and address.peer in {None, peer_of(multiaddr)}
        ):
            found.append(multiaddr)
    return found
