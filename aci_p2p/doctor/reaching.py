"""What the doctor checks on the network: a short-lived identity of its own looks at what the node would see."""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import trio

from aci_p2p.control.report import LOCAL
from aci_p2p.dht import RecordRules
from aci_p2p.dht.bootstrap import DnsAddress
from aci_p2p.dht.dnsaddr import resolve_dnsaddr
from aci_p2p.doctor.findings import Finding, ok, problem, problem_of, warning
from aci_p2p.doctor.subject import Subject
from aci_p2p.network.api import Network, Reachability, are_local
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import SEED_BYTES, KeyPair

DIAL_S: Final = 6.0
"""Seconds for one address, its name and the handshake included."""
RESOLVE_S: Final = 6.0
"""Seconds for one name."""
REACHABILITY_S: Final = 25.0
"""Seconds for peers to dial back: the network's own round, with few peers to ask, takes 15."""
RELAY_S: Final = 6.0
"""Seconds for a relay's reservation after that."""
MAX_ADDRESSES: Final = 32
"""Addresses that are dialled, those behind `/dnsaddr` included."""

_FAMILIES: Final = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
_CIRCUIT: Final = "/p2p-circuit"


@dataclass(frozen=True, slots=True)
class Probe:
    """The doctor's own place in the network."""

    network: Network
    """Listens where the node would, unless that runs, or cannot."""
    refusal: AciError | None
    """Why it cannot listen there."""


@asynccontextmanager
async def open_probe(subject: Subject) -> AsyncGenerator[Probe]:
    """Take part in the network within the block, under a new key."""
    key = KeyPair(secrets.token_bytes(SEED_BYTES))
    rules = RecordRules(subject.config.network, subject.clock)
    quiet = replace(subject.config.p2p, relay_server=False, mdns=False)
    silent = replace(quiet, listen=(), announce=(), relay_client=False, hole_punching=False)
    async with AsyncExitStack() as stack:
        refusal: AciError | None = None
        if subject.status is None:
            try:
                network = await stack.enter_async_context(subject.open_network(key, quiet, rules))
            except AciError as error:
                refusal = error
            else:
                yield Probe(network, None)
                return
        yield Probe(await stack.enter_async_context(subject.open_network(key, silent, rules)), refusal)


async def check_ports(subject: Subject, probe: Probe) -> list[Finding]:
    """Whether the node can listen where it is told to."""
    await trio.lowlevel.checkpoint()
    told = subject.config.p2p.listen
    if not told:
        return [ok("ports", "the node is told to listen nowhere: it only dials")]
    names = ", ".join(told)
    if probe.refusal:
        text = "see who holds it: ss -ltnp; stop that program, or listen elsewhere: --listen"
        return [problem("ports", probe.refusal.message, text)]
    if subject.status is None:
        return [ok("ports", f"{names} can be listened on")]
    held = subject.status["listen"]
    if len(held) != len(told) or not all(map(_is_bound_to, held, told)):
        text = f"the running node listens on {', '.join(held) or 'nothing'}, not on {names}"
        return [warning("ports", text, "restart the node, or give the doctor the options that it was started with")]
    return [ok("ports", f"the running node listens on {', '.join(held)}")]


def _is_bound_to(held: str, told: str) -> bool:
    """Whether listening at `told` may have given `held`: port 0 is any."""
    place, port = told.rpartition("/")[::2]
    return held == told or (port == "0" and held.rpartition("/")[0] == place)


async def check_names(subject: Subject) -> list[Finding]:
    """Whether the names of bootstrap addresses can be resolved."""
    found: dict[str, list[Finding]] = {address: [] for address in subject.config.bootstrap}
    async with trio.open_nursery() as nursery:
        for address, findings in found.items():
            nursery.start_soon(_look_at_name, address, findings)
    # Told in the order of the settings, whoever answers first.
    return list(chain(*found.values())) or [ok("DNS", "no bootstrap address has a name to resolve")]


async def _look_at_name(address: str, findings: list[Finding]) -> None:
    _, protocol, name, *_ = [*address.split("/"), "", ""]
    try:
        with trio.fail_after(RESOLVE_S):
            if protocol in _FAMILIES:
                found = await trio.socket.getaddrinfo(name, None, family=_FAMILIES[protocol], type=socket.SOCK_STREAM)
                hosts = sorted({str(entry[4][0]) for entry in found})
                findings.append(ok("DNS", f"{name} is {', '.join(hosts)}"))
            elif (target := DnsAddress.parse(address)) is not None:
                records = await resolve_dnsaddr(target)
                if not records:
                    text = f"the TXT records of _dnsaddr.{target.name} hold no address"
                    findings.append(problem("DNS", text, "tell its operator, or use another --bootstrap"))
                    return
                findings.append(ok("DNS", f"{target.name} names {len(records)} addresses"))
    except trio.TooSlowError:
        findings.append(problem("DNS", f"no name server answers for {name}", "check /etc/resolv.conf"))
    except socket.gaierror as error:
        text = f"{name} cannot be resolved: {error.strerror}"
        findings.append(problem("DNS", text, "check the spelling, /etc/hosts and /etc/resolv.conf"))
    except AciError as error:
        findings.append(problem_of("DNS", error, "check the spelling and /etc/resolv.conf"))


async def check_bootstrap(subject: Subject, probe: Probe) -> list[Finding]:
    """Whether each bootstrap node answers, as the one who it is said to be."""
    told = subject.config.bootstrap
    if not told:
        return [ok("bootstrap", "none is given: the node waits to be found, or comes back from its cache")]
    results: dict[str, str] = {}
    failures: dict[str, AciError] = {}

    async def dial(address: str) -> None:
        try:
            with trio.fail_after(DIAL_S):
                peer = await probe.network.connect(address)
            results[address] = f"{address.partition('/p2p/')[0]} answers: {peer}"
        except trio.TooSlowError:
            failures[address] = AciError(f"{address}: no answer within {DIAL_S:g} s")
        except AciError as error:
            failures[address] = error

    addresses = list(dict.fromkeys(await _behind(told)))[:MAX_ADDRESSES]
    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(dial, address)
    action = "check that it runs and that no firewall is between, or use another --bootstrap"
    make = warning if results else problem
    # Told in the order of the settings, whoever answers first.
    found = [ok("bootstrap", results[address]) for address in addresses if address in results]
    failed = [failures[address] for address in addresses if address in failures]
    found += [make("bootstrap", error.message, error.hint or action) for error in failed]
    return found or [problem("bootstrap", "no name leads to an address", "see DNS above")]


async def _behind(told: Sequence[str]) -> list[str]:
    """The addresses to dial: those behind `/dnsaddr` instead of it. What cannot be resolved, DNS tells."""
    found: list[str] = []
    for address in told:
        try:
            target = DnsAddress.parse(address)
            with trio.fail_after(RESOLVE_S):
                found += [address] if target is None else list(await resolve_dnsaddr(target))
        except (AciError, trio.TooSlowError):
            continue
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Standing:
    """How it is with the node's place in the network: its own word for it, or what the probe found out."""

    reachability: Reachability
    """Whether others can open connections to it."""
    addresses: tuple[str, ...]
    """Where others may dial it."""
    has_peers: bool
    """Whether anybody could be asked."""
    can_listen: bool = True
    """Whether it can listen where it is told to."""

    @property
    def relays(self) -> list[str]:
        """Peer ids of the relays through which it can be reached."""
        through = [address.partition(_CIRCUIT)[0] for address in self.addresses if _CIRCUIT in address]
        return list(dict.fromkeys(address.rpartition("/p2p/")[2] for address in through))

    @property
    def is_local(self) -> bool:
        """Whether it listens on this machine alone."""
        return are_local(self.addresses)


async def find_standing(subject: Subject, probe: Probe) -> Standing:
    """What the running node says, or what peers say of the probe, which takes seconds."""
    if subject.status is not None:
        status = subject.status
        state = status["reachability"]["state"]
        reachability = Reachability.UNKNOWN if state == LOCAL else Reachability(state)
        return Standing(reachability, tuple(status["addresses"]), bool(status["network"]["peers"]))
    network = probe.network
    has_peers = bool(network.peers)
    if has_peers and network.addresses and probe.refusal is None:
        with trio.move_on_after(REACHABILITY_S):
            while network.reachability is Reachability.UNKNOWN and network.peers:
                await network.changed()
        if network.reachability is Reachability.PRIVATE and subject.config.p2p.relay_client:
            with trio.move_on_after(RELAY_S):
                while not any(_CIRCUIT in address for address in network.addresses):
                    await network.changed()
    return Standing(network.reachability, tuple(network.addresses), has_peers, probe.refusal is None)
