"""Circuit relay v2: reservations, circuits, their limits, and relays and peers that mean no good."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import cast

import pytest
import trio
from libp2p.peer.envelope import make_unsigned  # pyright: ignore[reportMissingTypeStubs] - py.typed, but it says otherwise
from trio.testing import MockClock

from aci_p2p.clock import MS_PER_S, system_clock
from aci_p2p.network.api import PeerUnreachable, Reachability
from aci_p2p.network.libp2p import relay, relay_server
from aci_p2p.network.libp2p.circuit import (
    HOP,
    MAX_MESSAGE_BYTES,
    STOP,
    CircuitError,
    RelayedStream,
    hop_connect,
    hop_reserve,
    hop_status,
    named_peer,
    read_hop,
    read_stop,
    stop_connect,
)
from aci_p2p.network.libp2p.connections import LOOPBACK
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.relay_server import Capacity, Circuit, sign_voucher
from aci_p2p.network.libp2p.secure import SecureChannel, Security
from aci_p2p.network.libp2p.upgrade import multiplex_outbound
from aci_p2p.network.libp2p.upstream import (
    Envelope,
    HopMessage,
    Limit,
    PeerId,
    Reservation,
    Status,
    StopMessage,
    Voucher,
)
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import (
    MAX_BUFFERED_BYTES,
    WINDOW_BYTES,
    EndOfStream,
    StreamReset,
    Yamux,
    YamuxStream,
)
from aci_p2p.protocol.identity import NodeId
from tests.network.attack import until_refused
from tests.network.driver import ECHO, STRANGER, eventually, make_key
from tests.network.traversing import (
    Traversing,
    answered,
    circuits,
    exchange,
    open_several,
    open_traversing,
    reserve,
)

PEERS = [make_key(number).node_id for number in range(100, 400)]
SOURCES = [f"10.0.{number}.1" for number in range(100)]


@pytest.fixture
async def three() -> AsyncGenerator[tuple[Traversing, Traversing, Traversing]]:
    """A relay, a node that it relays for, and one that knows neither."""
    async with open_several(3) as (server, private, other):
        await reserve(private, server)
        yield server, private, other


Three = tuple[Traversing, Traversing, Traversing]


def test_reservations_are_bounded() -> None:
    capacity = Capacity()
    count = relay_server.MAX_RESERVATIONS_PER_SOURCE
    for peer in PEERS[:count]:
        assert capacity.reserve(peer, "1.1.1.1", 0) == Status.OK
    assert capacity.reserve(PEERS[count], "1.1.1.1", 0) == Status.RESERVATION_REFUSED
    assert capacity.reserve(PEERS[0], "1.1.1.1", 0) == Status.OK
    for number, peer in enumerate(PEERS[count : relay_server.MAX_RESERVATIONS]):
        assert capacity.reserve(peer, SOURCES[number % 100], 0) == Status.OK
    assert len(capacity.reserving) == relay_server.MAX_RESERVATIONS
    assert capacity.reserve(STRANGER, "2.2.2.2", 0) == Status.RESERVATION_REFUSED
    capacity.release(PEERS[0])
    assert capacity.reserve(STRANGER, "2.2.2.2", 0) == Status.OK
    assert capacity.reserve(PEERS[0], "3.3.3.3", relay_server.RESERVATION_SECONDS) == Status.OK
    assert capacity.reserving == (PEERS[0],)


def test_this_machine_may_have_more_reservations() -> None:
    capacity = Capacity()
    for peer in PEERS[: relay_server.MAX_RESERVATIONS]:
        assert capacity.reserve(peer, LOOPBACK, 0) == Status.OK
    assert capacity.reserve(STRANGER, LOOPBACK, 0) == Status.RESERVATION_REFUSED


def to(target: NodeId, initiator: NodeId = PEERS[0], source: str = LOOPBACK) -> Circuit:
    """A circuit."""
    return Circuit(initiator, source, target)


def test_circuits_need_a_reservation_that_holds() -> None:
    capacity = Capacity()
    assert capacity.open_circuit(to(PEERS[1]), 0) == Status.NO_RESERVATION
    assert capacity.reserve(PEERS[1], "1.1.1.1", 0) == Status.OK
    assert capacity.open_circuit(to(PEERS[1], PEERS[1]), 0) == Status.PERMISSION_DENIED
    assert capacity.open_circuit(to(PEERS[1]), relay_server.RESERVATION_SECONDS - 1) == Status.OK
    assert capacity.open_circuit(to(PEERS[1]), relay_server.RESERVATION_SECONDS) == Status.NO_RESERVATION
    capacity.release(PEERS[1])
    assert capacity.open_circuit(to(PEERS[1]), 0) == Status.NO_RESERVATION


def capacity_for(targets: list[NodeId]) -> Capacity:
    """Reservations for some peers."""
    capacity = Capacity()
    for target in targets:
        assert capacity.reserve(target, LOOPBACK, 0) == Status.OK
    return capacity


LIMIT = relay_server.MAX_CIRCUITS_PER_PEER


@pytest.mark.parametrize(
    ("circuits_that_fit", "one_more"),
    [
        ([to(PEERS[1], initiator) for initiator in PEERS[100 : 100 + LIMIT]], to(PEERS[1], STRANGER)),
        ([to(target, STRANGER) for target in PEERS[1 : 1 + LIMIT]], to(PEERS[50], STRANGER)),
        # Both ends of a circuit hold what it carries: one kind counts like the other.
        ([to(target, PEERS[60]) for target in PEERS[1 : 1 + LIMIT]], to(PEERS[60], STRANGER)),
        ([to(PEERS[n % 60], PEERS[100 + n], SOURCES[1]) for n in range(32)], to(PEERS[59], STRANGER, SOURCES[1])),
        ([to(PEERS[1], PEERS[100 + n], SOURCES[1]) for n in range(4)], to(PEERS[1], STRANGER, SOURCES[1])),
    ],
)
def test_circuits_of_each_are_bounded(circuits_that_fit: list[Circuit], one_more: Circuit) -> None:
    capacity = capacity_for(PEERS[:61])
    for circuit in circuits_that_fit:
        assert capacity.open_circuit(circuit, 0) == Status.OK
    assert capacity.open_circuit(one_more, 0) == Status.RESOURCE_LIMIT_EXCEEDED
    capacity.close_circuit(circuits_that_fit[0])
    assert capacity.open_circuit(one_more, 0) == Status.OK


def test_circuits_are_bounded_in_all() -> None:
    capacity = capacity_for(PEERS[:100])
    pairs = [to(PEERS[n % 100], PEERS[100 + n % 200]) for n in range(relay_server.MAX_CIRCUITS)]
    assert {capacity.open_circuit(circuit, 0) for circuit in pairs} == {Status.OK}
    assert capacity.open_circuit(to(PEERS[99], STRANGER), 0) == Status.RESOURCE_LIMIT_EXCEEDED
    assert capacity.circuits == relay_server.MAX_CIRCUITS


def test_slow_readers_at_the_ends_of_circuits_do_not_cut_off_who_sends() -> None:
    assert relay_server.MAX_CIRCUITS_PER_PEER * WINDOW_BYTES <= MAX_BUFFERED_BYTES - 4 * WINDOW_BYTES


def test_vouchers_are_signed_envelopes() -> None:
    key = make_key(1)
    envelope = Envelope.FromString(sign_voucher(key, STRANGER, 1_700_000_000))
    voucher = Voucher.FromString(envelope.payload)
    assert (voucher.relay, voucher.peer, voucher.expiration) == (
        key.node_id.peer_id,
        STRANGER.peer_id,
        1_700_000_000,
    )
    assert envelope.payload_type == b"\x03\x02"
    assert envelope.public_key.SerializeToString() == key.node_id.peer_id[2:]
    signed = make_unsigned("libp2p-relay-rsvp", envelope.payload_type, envelope.payload)
    key.node_id.verify(signed, envelope.signature)


async def test_a_circuit_carries_streams_both_ways(three: Three) -> None:
    server, private, other = three
    (address,) = circuits(private)
    assert address.relay_address.port == server.host.addresses[0].port
    connection = await other.host.dial(private.id, [address])
    assert connection.relay == server.id
    assert other.relayed(private) == [True]
    await eventually(lambda: private.relayed(other) == [True])
    await exchange(other.host, private.id, bytes(1 << 20))
    await exchange(private.host, other.id)
    assert server.traversal.server.capacity.circuits == 1
    assert private.host.connections.of(other.id)[0].relay == server.id
    await connection.muxer.close()
    await eventually(lambda: server.traversal.server.capacity.circuits == 0)
    await eventually(lambda: not private.relayed(other))


async def test_only_who_cannot_be_reached_has_reservations(three: Three) -> None:
    server, private, _ = three
    assert circuits(private)
    private.host.set_reachability(Reachability.PUBLIC)
    await eventually(lambda: not circuits(private))
    assert not private.traversal.client.reservations
    assert server.traversal.server.capacity.reserving == (private.id,)


async def test_relays_that_nobody_can_reach_relay_for_nobody() -> None:
    async with open_several(2) as (server, private):
        server.host.set_reachability(Reachability.PRIVATE)
        await private.connect(server)
        private.host.set_reachability(Reachability.PRIVATE)
        await eventually(lambda: private.traversal.client._refusals.until(server.id) > 0)
        assert not private.traversal.client.reservations
        assert not server.traversal.server.capacity.reserving


async def test_peers_that_have_dialled_us_are_no_relays_for_us() -> None:
    async with open_several(2) as (server, private):
        await server.connect(private)
        private.host.set_reachability(Reachability.PRIVATE)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not server.traversal.server.capacity.reserving


async def test_two_relays_are_kept_and_a_lost_one_replaced() -> None:
    async with open_several(4) as (private, *servers):
        for server in servers:
            await private.connect(server)
        private.host.set_reachability(Reachability.PRIVATE)
        await eventually(lambda: len(private.traversal.client.reservations) == relay.RELAYS)
        lost, kept = (one.relay for one in private.traversal.client.reservations)
        connection = private.host.connection(lost)
        assert connection is not None
        await connection.muxer.close()
        (third,) = {server.id for server in servers} - {lost, kept}
        await eventually(lambda: {one.relay for one in private.traversal.client.reservations} == {kept, third})
        await eventually(lambda: {address.relay for address in circuits(private)} == {kept, third})


async def test_a_reservation_ends_with_the_connection(three: Three) -> None:
    server, private, other = three
    (address,) = circuits(private)
    connection = private.host.connection(server.id)
    assert connection is not None
    await connection.muxer.close()
    await eventually(lambda: not server.traversal.server.capacity.reserving)
    await eventually(lambda: not circuits(private))
    with pytest.raises(PeerUnreachable, match="no reservation"):
        await other.host.dial(private.id, [address])


@pytest.mark.slow
async def test_reservations_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "RENEW_AT", 0.001)
    async with open_several(2) as (server, private):
        await reserve(private, server)
        first = server.traversal.server.capacity._reserved[private.id].until
        await eventually(lambda: server.traversal.server.capacity._reserved[private.id].until > first + 1)
        assert circuits(private)


async def test_both_relays_and_the_dialler_may_lead_the_way_only_once(three: Three) -> None:
    server, private, other = three
    (address,) = circuits(private)
    await other.host.dial(private.id, [address])
    await eventually(lambda: private.relayed(other))
    # Over the relayed connection, the private node is asked to relay itself.
    assert await ask(other.host, private.id, hop_reserve()) == Status.PERMISSION_DENIED
    assert await ask(other.host, private.id, hop_connect(server.id)) == Status.PERMISSION_DENIED
    # Nor does a client take a relay that it reaches through a relay.
    through = server.host.addresses[0].through(private.id)
    with pytest.raises(PeerUnreachable, match="through a relay"):
        await other.traversal.client.dial(STRANGER, through)


async def ask(host: Host, peer: NodeId, message: bytes) -> Status.ValueType:
    """What a relay says to a message."""
    stream = await host.open_stream(peer, HOP)
    try:
        with trio.fail_after(5):
            await stream.write(message)
            return (await read_hop(stream, HopMessage.STATUS)).status
    finally:
        stream.reset()


MALFORMED = {
    "garbage": b"\x05\xff\xff\xff\xff\xff",
    "empty": prefixed(b""),
    "too long": prefixed(b"x" * (MAX_MESSAGE_BYTES + 1)),
    "no peer": prefixed(HopMessage(type=HopMessage.CONNECT).SerializeToString()),
    "bad peer": prefixed(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"x" * 38)).SerializeToString()),
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_questions_are_answered_as_such(three: Three, message: bytes) -> None:
    server, private, other = three
    await other.connect(server)
    assert await ask(other.host, server.id, message) == Status.MALFORMED_MESSAGE
    await other.host.dial(private.id, circuits(private))
    assert server.host.handler_failures == 0


async def test_questions_that_make_no_sense_are_refused(three: Three) -> None:
    server, private, other = three
    await other.connect(server)
    assert await ask(other.host, server.id, hop_status(Status.OK)) == Status.UNEXPECTED_MESSAGE
    assert await ask(other.host, server.id, hop_connect(other.id)) == Status.PERMISSION_DENIED
    assert await ask(other.host, server.id, hop_connect(server.id)) == Status.NO_RESERVATION
    assert await ask(other.host, server.id, hop_connect(STRANGER)) == Status.NO_RESERVATION
    assert await ask(private.host, server.id, hop_connect(private.id)) == Status.PERMISSION_DENIED
    assert server.traversal.server.capacity.circuits == 0


async def test_a_flood_of_reservations_is_answered_and_holds_one(three: Three) -> None:
    server, _, other = three
    await other.connect(server)
    for _ in range(50):
        assert await ask(other.host, server.id, hop_reserve()) == Status.OK
    assert len(server.traversal.server.capacity.reserving) == 2


async def test_silent_questions_end(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "MESSAGE_SECONDS", 0.05)
    server, _, other = three
    await other.connect(server)
    stream = await other.host.open_stream(server.id, HOP)
    with trio.fail_after(5), pytest.raises(StreamReset):
        await stream.read(1)


@pytest.mark.parametrize(
    ("name", "value"), [("CIRCUIT_SECONDS", 0.3), ("CIRCUIT_BYTES", 2000), ("CIRCUIT_IDLE_SECONDS", 0.3)]
)
async def test_circuits_have_their_limits(
    three: Three, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    server, private, other = three
    await other.connect(server)
    monkeypatch.setattr(relay_server, name, value)
    monkeypatch.setattr(relay_server, "_limit", Limit)
    (address,) = circuits(private)
    connection = await other.host.dial(private.id, [address])
    if name == "CIRCUIT_BYTES":
        with pytest.raises(StreamReset):
            await exchange(other.host, private.id, bytes(4000))
    await eventually(lambda: connection.muxer.is_closed)
    assert server.traversal.server.capacity.circuits == 0


async def test_a_target_that_does_not_answer_frees_the_circuit(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "MESSAGE_SECONDS", 0.1)
    server, _, other = three
    async with open_traversing(9) as mute:
        mute.host._protocols[STOP].serve = lambda _peer, stream: wait_and_read(stream)
        await reserve(mute, server)
        await other.connect(server)
        assert await ask(other.host, server.id, hop_connect(mute.id)) == Status.CONNECTION_FAILED
        assert server.traversal.server.capacity.circuits == 0
        # What it was asked on is reset.
        connection = server.host.connection(mute.id)
        assert connection is not None
        await eventually(lambda: connection.muxer.stream_count == 0)


async def wait_and_read(stream: YamuxStream) -> None:
    """Take everything and say nothing."""
    while True:
        await stream.read(1 << 16)


async def test_circuits_from_strangers_are_refused(three: Three) -> None:
    _, private, other = three
    await other.connect(private)
    assert await offer(other.host, private.id, STRANGER) == Status.PERMISSION_DENIED
    assert set(private.host.peers) >= {other.id}
    assert STRANGER not in private.host.peers


async def offer(host: Host, target: NodeId, initiator: NodeId) -> Status.ValueType:
    """What a peer says to a circuit that we pass on."""
    stream = await host.open_stream(target, STOP)
    try:
        await stream.write(stop_connect(initiator, Limit()))
        with trio.fail_after(5):
            return (await read_stop(stream, StopMessage.STATUS)).status
    finally:
        stream.reset()


async def test_relays_cannot_pass_on_themselves_or_us(three: Three) -> None:
    server, private, _ = three
    assert await offer(server.host, private.id, server.id) == Status.PERMISSION_DENIED
    assert await offer(server.host, private.id, private.id) == Status.PERMISSION_DENIED


@pytest.mark.parametrize("message", [prefixed(b""), prefixed(b"\xff"), prefixed(b"\x08\x01")])
async def test_malformed_offers_are_answered_as_such(three: Three, message: bytes) -> None:
    server, private, _ = three
    stream = await server.host.open_stream(private.id, STOP)
    await stream.write(message)
    assert (await read_stop(stream, StopMessage.STATUS)).status == Status.MALFORMED_MESSAGE
    assert private.host.handler_failures == 0


@pytest.mark.parametrize("honest", [True, False])
async def test_who_comes_through_a_relay_is_who_it_said(three: Three, honest: bool) -> None:  # noqa: FBT001
    server, private, _ = three
    visitor = make_key(7)
    stream = await server.host.open_stream(private.id, STOP)
    await stream.write(stop_connect(visitor.node_id if honest else STRANGER, Limit()))
    assert (await read_stop(stream, StopMessage.STATUS)).status == Status.OK
    secure = await Security(visitor).secure_outbound(RelayedStream(stream, Limit()), private.id)
    await multiplex_outbound(secure, "here")
    with trio.fail_after(5):
        if honest:
            await eventually(lambda: visitor.node_id in private.host.peers)
        else:
            await until_refused(secure)
            assert not {visitor.node_id, STRANGER} & set(private.host.peers)


def answer_with(message: bytes) -> Callable[[NodeId, YamuxStream], Awaitable[None]]:
    """A relay that always says the same."""

    async def serve(_peer: NodeId, stream: YamuxStream) -> None:
        await read_hop(stream)
        await stream.write(message)

    return serve


IN_AN_HOUR = system_clock() // MS_PER_S + 3600
LIES = {
    "an end in the past": hop_status(Status.OK, reservation=Reservation(expire=1)),
    "no end": hop_status(Status.OK),
    "a number that is no status": prefixed(HopMessage(type=HopMessage.STATUS, status=77).SerializeToString()),  # type: ignore[arg-type]
    "a question": hop_reserve(),
    "garbage": b"\x02\xff\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", LIES.values(), ids=LIES)
async def test_relays_that_make_no_sense_are_left_alone(answer: bytes) -> None:
    async with open_several(2) as (server, private):
        server.host._protocols[HOP].serve = answer_with(answer)
        await private.connect(server)
        private.host.set_reachability(Reachability.PRIVATE)
        await eventually(lambda: private.traversal.client._refusals.until(server.id) > trio.current_time())
        assert not circuits(private)
        with pytest.raises(PeerUnreachable, match=r"does not (lead to|complete)"):
            await private.host.dial(STRANGER, [server.host.addresses[0].through(server.id)])


async def test_only_the_relays_own_addresses_are_announced() -> None:
    """A relay must not have us announce, and others dial, whomever it likes."""
    async with open_several(2) as (server, private):
        elsewhere = server.host.addresses[0].__class__("ip4", "198.51.100.1", 1)
        addrs = [elsewhere.to_bytes(), elsewhere.to_bytes(STRANGER), b"\xff", *[elsewhere.to_bytes(server.id)] * 3]
        reservation = Reservation(expire=IN_AN_HOUR, addrs=addrs)
        server.host._protocols[HOP].serve = answer_with(hop_status(Status.OK, reservation=reservation))
        await reserve(private, server)
        dialled = server.host.addresses[0].through(server.id)
        assert circuits(private) == [elsewhere.through(server.id), dialled]


async def test_a_relay_that_drops_a_circuit_ends_the_connection(three: Three) -> None:
    server, private, other = three
    await other.host.dial(private.id, circuits(private))
    stream = await other.host.open_stream(private.id, ECHO)
    await answered(stream)
    connection = other.host.connection(server.id)
    assert connection is not None
    await connection.muxer.close()
    with trio.fail_after(5), pytest.raises((StreamReset, EndOfStream)):
        await stream.read(1)
    await eventually(lambda: not other.relayed(private))


async def test_worn_circuits_are_replaced_and_their_streams_go_on(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(relay_server, "CIRCUIT_BYTES", 200_000)
    _, private, other = three
    async with open_traversing(8) as dialler:
        first = await dialler.host.dial(private.id, circuits(private))
        stream = await dialler.host.open_stream(private.id, ECHO)
        await answered(stream)
        assert dialler.host.connection(private.id) is first
        await answered(stream, bytes(100_000))
        await eventually(lambda: dialler.host.connection(private.id) is not first)
        await answered(stream)
        stream.close()
        await eventually(lambda: dialler.relayed(private) == [True])
        await exchange(dialler.host, private.id)
    assert other.relayed(private) == []


async def test_circuits_are_worn_at_half_of_their_time(mock_clock: MockClock) -> None:
    stream = Yamux(cast("SecureChannel", None), is_initiator=True).open_stream()
    relayed, without_limit = RelayedStream(stream, Limit(duration=100)), RelayedStream(stream, Limit())
    worn: list[bool] = []
    for seconds in (49, 1, 10**6):
        mock_clock.jump(seconds)
        worn += [relayed.is_worn, without_limit.is_worn]
    assert worn == [False, False, True, False, True, False]


async def test_circuits_through_ourselves_lead_nowhere(three: Three) -> None:
    server, private, _ = three
    with pytest.raises(PeerUnreachable, match="ourselves"):
        await server.traversal.client.dial(private.id, server.host.addresses[0].through(server.id))


async def test_messages_name_their_peer() -> None:
    assert named_peer(StopMessage(peer=PeerId(id=STRANGER.peer_id))) == STRANGER
    with pytest.raises(CircuitError):
        named_peer(HopMessage())
