"""AutoNAT v1: whether others can dial us, asked of peers that try it, and trying it for others.

A peer that is asked dials back with a connection that it closes once it knows who answers, only to the address that
the question came from, and not more often than it can afford.

Source: https://github.com/libp2p/specs/blob/master/autonat/README.md
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import trio
from google.protobuf.message import DecodeError

from aci_p2p.network.api import PeerUnreachable, Reachability
from aci_p2p.network.libp2p.addresses import TcpAddress, parse_all
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.dialling import Race
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identity
from aci_p2p.network.libp2p.secure import Security
from aci_p2p.network.libp2p.upstream import AutoNatMessage as Message
from aci_p2p.network.libp2p.varint import VarintError, prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/libp2p/autonat/1.0.0"
"""Stream protocol id."""
MAX_MESSAGE_BYTES = 8 << 10
"""Longest message, bytes."""
MESSAGE_SECONDS = 10.0
"""Time for a peer to say what is to be dialled, seconds."""
DIAL_BACK_SECONDS = 10.0
"""Time for dialling a peer back, seconds."""
MAX_DIALLED = 4
"""Addresses that are dialled for one question."""
DIALS_PER_MINUTE = 30
"""Questions answered by dialling, a minute (go-libp2p's value)."""
DIALS_PER_PEER = 3
"""Of which one peer may ask so many (go-libp2p's value)."""
DIALS_AT_ONCE = 8
"""Questions that are being answered."""

ANSWER_SECONDS = 20.0
"""Time for a peer to dial us back and to say so, seconds."""
FIRST_SECONDS = 2.0
"""Time before the first question, seconds: peers have said by then where they see us."""
PAUSE_SECONDS = 1.0
"""Time between two questions of a round, seconds."""
PATIENCE_SECONDS = 5.0
"""How long a round waits for more peers to ask, seconds, when fewer than a quorum can be."""
ROUND_SECONDS = 900.0
"""Time between two rounds, seconds, give or take a fifth."""
SHORTEST_ROUND_SECONDS = 30.0
"""Time between two rounds, seconds, however often our addresses change."""
QUORUM = 3
"""Answers that must agree; fewer when there are no more peers to ask."""
MAX_ANSWERS = 5
"""Answers of a round."""
MAX_OBSERVED = 2
"""IP addresses of ours, as peers see them, that count."""

log = logging.getLogger("aci_p2p.network")


def presumed_addresses(bound: Iterable[TcpAddress], observed: Iterable[TcpAddress]) -> list[TcpAddress]:
    """Where we may be reached from outside: the IP addresses that most peers see, with the ports at which we listen.

    Right where a NAT forwards our port (as clouds do) or keeps the ports of what goes out (as most home routers do).
    """
    seen = Counter((address.protocol, address.host) for address in observed if not address.is_loopback)
    ports = dict.fromkeys((address.protocol, address.port) for address in bound if not address.is_loopback)
    presumed: list[TcpAddress] = []
    for protocol, port in ports:
        hosts = [host for (of_protocol, host), _ in seen.most_common() if of_protocol == protocol]
        presumed += [TcpAddress(protocol, host, port) for host in hosts[:MAX_OBSERVED]]
    return presumed


class Throttle:
    """How often we dial for others. No I/O; times are seconds of any one clock."""

    def __init__(self) -> None:
        self._dials: deque[tuple[float, NodeId]] = deque()

    def admits(self, peer: NodeId, now: float) -> bool:
        """Whether another question is answered; it counts if so."""
        while self._dials and self._dials[0][0] <= now - 60:
            self._dials.popleft()
        if len(self._dials) >= DIALS_PER_MINUTE or sum(other == peer for _, other in self._dials) >= DIALS_PER_PEER:
            return False
        self._dials.append((now, peer))
        return True


class _Answer(NamedTuple):
    reached: TcpAddress | None
    from_outside: bool


class Round:
    """What the peers that were asked have found. No I/O."""

    def __init__(self) -> None:
        self._answers: OrderedDict[NodeId, _Answer] = OrderedDict()
        self.asked: set[NodeId] = set()

    def __len__(self) -> int:
        return len(self._answers)

    def record(self, peer: NodeId, reached: TcpAddress | None, *, from_outside: bool) -> None:
        """A peer has dialled us at an address, or in vain; `from_outside`: over the Internet."""
        self._answers[peer] = _Answer(reached, from_outside)

    def _decisive(self) -> list[_Answer]:
        """Those who dialled over the Internet, if anybody did; a peer of the local network sees no NAT."""
        answers = list(self._answers.values())
        return [answer for answer in answers if answer.from_outside] or answers

    def verdict(self, *, more_to_ask: bool) -> Reachability | None:
        """What follows; None when more have to be asked. Without a majority PRIVATE: to use relays does no harm."""
        answers = self._decisive()
        yes = sum(answer.reached is not None for answer in answers)
        no = len(answers) - yes
        if max(yes, no) < QUORUM and more_to_ask and len(self._answers) < MAX_ANSWERS:
            return None
        if not answers:
            return None
        return Reachability.PUBLIC if yes > no else Reachability.PRIVATE

    def reached(self) -> list[TcpAddress]:
        """The addresses at which we were reached."""
        return list(dict.fromkeys(answer.reached for answer in self._decisive() if answer.reached is not None))


class AutoNat:
    """Both sides of AutoNAT."""

    def __init__(
        self, host: Host, security: Security, random: Random, identity: Callable[[NodeId], Identity | None]
    ) -> None:
        """`identity` knows what a connected peer has said; `random` chooses peers and moments."""
        self._host = host
        self._security = security
        self._random = random
        self._identity = identity
        self._throttle = Throttle()
        self._dialling = 0
        self._changed = trio.Event()
        host.on_changed.append(self.wake)

    def presumed(self) -> list[TcpAddress]:
        """Where peers see us, see `presumed_addresses`."""
        identities = (self._identity(peer) for peer in self._host.peers)
        observed = [identity.observed for identity in identities if identity is not None and identity.observed]
        return presumed_addresses(self._host.bound_addresses, observed)

    def wake(self) -> None:
        """Something has changed: our addresses, or who is connected."""
        self._changed.set()

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """Answer one question."""
        try:
            with trio.fail_after(MESSAGE_SECONDS):
                message = Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
        except (DecodeError, VarintError, trio.TooSlowError):
            stream.reset()
            return
        answer = await self._dial_back(peer, message)
        await stream.write(prefixed(Message(type=Message.DIAL_RESPONSE, dialResponse=answer).SerializeToString()))

    async def _dial_back(self, peer: NodeId, message: Message) -> Message.DialResponse:
        if message.type != Message.DIAL or message.dial.peer.id != peer.peer_id:
            return Message.DialResponse(status=Message.E_BAD_REQUEST)
        connection = self._host.connection(peer)
        if connection is None or connection.relay is not None:
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText="not over a relay")
        asked = parse_all(message.dial.peer.addrs, MAX_ADDRESSES_PER_PEER)
        own = [address for address in asked if address.relay is None and address.host == connection.place.host]
        if not own:
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText="none of the addresses is yours")
        if self._dialling >= DIALS_AT_ONCE or not self._throttle.admits(peer, trio.current_time()):
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText="too many questions")
        self._dialling += 1
        try:
            with trio.move_on_after(DIAL_BACK_SECONDS):
                reached = await Race(self._security, peer).run(own[:MAX_DIALLED])
                if reached is not None:
                    await reached.secure.close()
                    return Message.DialResponse(status=Message.OK, addr=reached.place.to_bytes())
        finally:
            self._dialling -= 1
        return Message.DialResponse(status=Message.E_DIAL_ERROR)

    async def run(self) -> None:
        """Find out again and again whether others can dial us, until cancelled."""
        await trio.sleep(FIRST_SECONDS * self._random.uniform(1, 2))
        while True:
            began, basis = trio.current_time(), self._basis()
            with trio.move_on_after(ROUND_SECONDS):
                await self._hold_round()
            next_round = began + ROUND_SECONDS * self._random.uniform(0.8, 1.2)
            while self._basis() == basis and trio.current_time() < next_round:
                self._changed = trio.Event()
                with trio.move_on_at(next_round):
                    await self._changed.wait()
            await trio.sleep_until(began + SHORTEST_ROUND_SECONDS)

    def _basis(self) -> tuple[frozenset[TcpAddress], bool]:
        """What a verdict is based on: our addresses, and whether peers beyond the local network can be asked."""
        return frozenset(self._own_addresses()), any(self._is_outside(peer) for peer in self._servers())

    async def _hold_round(self) -> None:
        if not self._host.bound_addresses:
            self._host.set_reachability(Reachability.PRIVATE)
            return
        this_round, patience = Round(), math.inf
        while True:
            remaining = [peer for peer in self._candidates() if peer not in this_round.asked]
            if remaining:
                await self._ask_one(this_round, self._random.choice(remaining))
                if len(this_round):
                    patience = min(patience, trio.current_time() + PATIENCE_SECONDS)
                await trio.sleep(PAUSE_SECONDS)
            more_to_ask = bool(remaining) or trio.current_time() < patience
            if (verdict := this_round.verdict(more_to_ask=more_to_ask)) is not None:
                self._host.announce("autonat", self._translated(this_round.reached()))
                self._host.set_reachability(verdict)
                return
            if not remaining:
                self._changed = trio.Event()
                with trio.move_on_at(patience):
                    await self._changed.wait()

    def _translated(self, reached: Sequence[TcpAddress]) -> list[TcpAddress]:
        """Those of the addresses that are not ours to see: a NAT's that forwards our port."""
        ours = {address.host for address in self._host.addresses}
        return [address for address in reached if address.host not in ours][:MAX_OBSERVED]

    def _servers(self) -> list[NodeId]:
        """Connected peers that can be asked."""
        return [peer for peer in self._host.peers if self._serves(peer)]

    def _serves(self, peer: NodeId) -> bool:
        identity, connection = self._identity(peer), self._host.connection(peer)
        return (
            identity is not None
            and PROTOCOL in identity.protocols
            and connection is not None
            and connection.relay is None
        )

    def _is_outside(self, peer: NodeId) -> bool:
        connection = self._host.connection(peer)
        return connection is not None and _is_outside(connection)

    def _candidates(self) -> list[NodeId]:
        """Whom to ask: peers beyond the local network if there are any."""
        servers = self._servers()
        return [peer for peer in servers if self._is_outside(peer)] or servers

    def _own_addresses(self) -> list[TcpAddress]:
        """Where others may be able to dial us."""
        listed = [address for address in self._host.addresses if address.relay is None]
        return list(dict.fromkeys([*self.presumed(), *listed]))

    async def _ask_one(self, this_round: Round, peer: NodeId) -> None:
        this_round.asked.add(peer)
        connection = self._host.connection(peer)
        addresses = self._host.usable_by(peer, self._own_addresses())[:MAX_ADDRESSES_PER_PEER]
        if connection is None or not addresses:
            return
        try:
            with trio.fail_after(ANSWER_SECONDS):
                answer = await self._ask(peer, addresses)
        except (PeerUnreachable, EndOfStream, StreamReset, DecodeError, VarintError, trio.TooSlowError) as error:
            log.debug("%s does not dial us back: %s", peer.short, error)
            return
        if answer.status == Message.OK:
            reached = _read_address(answer.addr)
            if reached in addresses:
                this_round.record(peer, reached, from_outside=_is_outside(connection))
        elif answer.status == Message.E_DIAL_ERROR:
            this_round.record(peer, None, from_outside=_is_outside(connection))

    async def _ask(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> Message.DialResponse:
        stream = await self._host.open_stream(peer, PROTOCOL)
        try:
            question = Message(type=Message.DIAL)
            question.dial.peer.id = self._host.node_id.peer_id
            question.dial.peer.addrs.extend(address.to_bytes() for address in addresses)
            await stream.write(prefixed(question.SerializeToString()))
            return Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES)).dialResponse
        finally:
            stream.reset()


def _is_outside(connection: Connection) -> bool:
    return connection.place.is_global or not connection.place.is_ip


def _read_address(raw: bytes) -> TcpAddress | None:
    try:
        return TcpAddress.from_bytes(raw)
    except LocalError:
        return None
