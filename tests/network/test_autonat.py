"""AutoNAT: whom we dial for others, how we come to a verdict, and peers that lie about it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.network.api import Reachability
from aci_p2p.network.libp2p import autonat
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.autonat import MAX_MESSAGE_BYTES, PROTOCOL, Round, Throttle, presumed_addresses
from aci_p2p.network.libp2p.upstream import AutoNatMessage as Message
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import STRANGER, eventually, make_key
from tests.network.traversing import Traversing, circuits, open_several, open_traversing, reserve

PEERS = [make_key(number).node_id for number in range(100, 150)]
HERE = TcpAddress("ip4", "1.1.1.1", 9400)
PUBLIC, PRIVATE = Reachability.PUBLIC, Reachability.PRIVATE


@pytest.fixture
async def two() -> AsyncGenerator[tuple[Traversing, Traversing]]:
    """One that asks, and one that dials back."""
    async with open_several(2) as (asking, dialling):
        await asking.connect(dialling)
        yield asking, dialling


def question(peer: NodeId, *addresses: TcpAddress) -> Message:
    """Ask to be dialled back."""
    message = Message(type=Message.DIAL)
    message.dial.peer.id = peer.peer_id
    message.dial.peer.addrs.extend(address.to_bytes() for address in addresses)
    return message


async def ask(asking: Traversing, peer: NodeId, message: Message) -> Message.DialResponse:
    """What a peer answers."""
    stream = await asking.host.open_stream(peer, PROTOCOL)
    try:
        with trio.fail_after(15):
            await stream.write(prefixed(message.SerializeToString()))
            return Message.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES)).dialResponse
    finally:
        stream.reset()


def test_dials_for_others_are_bounded() -> None:
    throttle = Throttle()
    assert [throttle.admits(PEERS[0], 0) for _ in range(5)] == [True] * autonat.DIALS_PER_PEER + [False] * 2
    admitted = [throttle.admits(peer, 30) for peer in PEERS[1:]]
    assert sum(admitted) == autonat.DIALS_PER_MINUTE - autonat.DIALS_PER_PEER
    assert not throttle.admits(STRANGER, 59.9)
    assert throttle.admits(PEERS[0], 60)
    assert len(throttle._dials) <= autonat.DIALS_PER_MINUTE


def round_of(*answers: bool | None) -> Round:
    """A round in which peers have answered: reached, or not, or only from the local network (None)."""
    this_round = Round()
    for peer, answer in zip(PEERS, answers, strict=False):
        this_round.record(peer, HERE if answer is not False else None, from_outside=answer is not None)
    return this_round


@pytest.mark.parametrize(
    ("answers", "verdict", "verdict_at_last"),
    [
        ([], None, None),
        ([True], None, PUBLIC),
        ([False], None, PRIVATE),
        ([True, True], None, PUBLIC),
        ([True, False], None, PRIVATE),
        ([True, True, True], PUBLIC, PUBLIC),
        ([False, False, False], PRIVATE, PRIVATE),
        ([True, False, True, False], None, PRIVATE),
        ([True, False, True, False, True], PUBLIC, PUBLIC),
        ([False, True, False, True, False], PRIVATE, PRIVATE),
        ([None], None, PUBLIC),
        ([None, None, None, False], None, PRIVATE),
    ],
)
def test_a_quorum_decides_or_all_that_there_are(
    answers: list[bool | None], verdict: Reachability | None, verdict_at_last: Reachability | None
) -> None:
    assert round_of(*answers).verdict(more_to_ask=True) is verdict
    assert round_of(*answers).verdict(more_to_ask=False) is verdict_at_last


@given(st.lists(st.booleans(), max_size=autonat.MAX_ANSWERS))
def test_a_minority_of_liars_decides_nothing(answers: list[bool]) -> None:
    if answers.count(True) > len(answers) / 2:
        assert round_of(*answers).verdict(more_to_ask=False) is PUBLIC


def test_where_we_are_presumed() -> None:
    ip6 = TcpAddress("ip6", "2001:db8::1", 5)
    observed = [TcpAddress("ip4", host, 50_000) for host in ("1.1.1.1", "2.2.2.2", "3.3.3.3", "1.1.1.1", "2.2.2.2")]
    bound = [TcpAddress("ip4", "0.0.0.0", 9400), TcpAddress("ip4", "127.0.0.1", 7)]  # noqa: S104 - as bound
    expected = [HERE, TcpAddress("ip4", "2.2.2.2", 9400)]
    assert presumed_addresses(bound, [*observed, ip6, TcpAddress("ip4", "127.0.0.1", 1)]) == expected
    assert presumed_addresses([TcpAddress("ip6", "::", 9400)], [*observed, ip6]) == [
        TcpAddress("ip6", "2001:db8::1", 9400)
    ]
    assert presumed_addresses([], observed) == []


async def test_who_can_be_reached_is_told_so_and_gets_no_second_connection(
    two: tuple[Traversing, Traversing],
) -> None:
    asking, dialling = two
    answer = await ask(asking, dialling.id, question(asking.id, *asking.host.addresses))
    assert answer.status == Message.OK
    assert TcpAddress.from_bytes(answer.addr) in asking.host.addresses
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert len(asking.host.connections.all) == len(dialling.host.connections.all) == 1


async def test_who_cannot_be_reached_is_told_so(two: tuple[Traversing, Traversing]) -> None:
    asking, dialling = two
    answer = await ask(asking, dialling.id, question(asking.id, TcpAddress("ip4", "127.0.0.1", 1)))
    assert answer.status == Message.E_DIAL_ERROR
    # Somebody else answers there.
    answer = await ask(asking, dialling.id, question(asking.id, *dialling.host.addresses))
    assert answer.status == Message.E_DIAL_ERROR


async def test_nobody_else_is_dialled(two: tuple[Traversing, Traversing], monkeypatch: pytest.MonkeyPatch) -> None:
    asking, dialling = two

    def race(*_: object) -> None:
        pytest.fail("it was dialled")

    monkeypatch.setattr(autonat, "Race", race)
    for elsewhere in (HERE, TcpAddress("ip4", "127.0.0.2", 1), asking.host.addresses[0].through(STRANGER)):
        assert (await ask(asking, dialling.id, question(asking.id, elsewhere))).status == Message.E_DIAL_REFUSED
    for bad in (question(STRANGER, *asking.host.addresses), Message(type=Message.DIAL_RESPONSE), Message()):
        assert (await ask(asking, dialling.id, bad)).status == Message.E_BAD_REQUEST


async def test_only_some_questions_a_minute_are_answered(two: tuple[Traversing, Traversing]) -> None:
    asking, dialling = two
    answers = [
        (await ask(asking, dialling.id, question(asking.id, *asking.host.addresses))).status
        for _ in range(autonat.DIALS_PER_PEER + 1)
    ]
    assert answers == [Message.OK] * autonat.DIALS_PER_PEER + [Message.E_DIAL_REFUSED]


async def test_only_some_questions_are_answered_at_once(
    two: tuple[Traversing, Traversing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autonat, "DIALS_AT_ONCE", 0)
    asking, dialling = two
    answer = await ask(asking, dialling.id, question(asking.id, *asking.host.addresses))
    assert answer.status == Message.E_DIAL_REFUSED


async def test_who_comes_through_a_relay_is_not_dialled() -> None:
    async with open_several(3) as (server, private, other):
        await reserve(private, server)
        await other.host.dial(private.id, circuits(private))
        answer = await ask(other, private.id, question(other.id, *other.host.addresses))
        assert answer.status == Message.E_DIAL_REFUSED


@pytest.mark.parametrize("sent", [b"\x02\xff\xff", prefixed(b"x" * (MAX_MESSAGE_BYTES + 1))])
async def test_malformed_questions_end(two: tuple[Traversing, Traversing], sent: bytes) -> None:
    asking, dialling = two
    stream = await asking.host.open_stream(dialling.id, PROTOCOL)
    await stream.write(sent)
    with trio.fail_after(5), pytest.raises((StreamReset, EndOfStream)):
        await stream.read(1)
    assert dialling.host.handler_failures == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts within a second."""
    for name, seconds in {"FIRST": 0.05, "PAUSE": 0.01, "PATIENCE": 0.3, "SHORTEST_ROUND": 0.1}.items():
        monkeypatch.setattr(autonat, f"{name}_SECONDS", seconds)


@pytest.mark.usefixtures("impatient")
async def test_one_peer_is_enough_when_there_are_no_more(two: tuple[Traversing, Traversing]) -> None:
    asking, _ = two
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.traversal.autonat.run)
        await eventually(lambda: asking.host.reachability is PUBLIC)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("impatient")
async def test_who_does_not_listen_cannot_be_reached() -> None:
    async with open_traversing(1, listen=()) as silent, trio.open_nursery() as nursery:
        nursery.start_soon(silent.traversal.autonat.run)
        await eventually(lambda: silent.host.reachability is PRIVATE)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("impatient")
async def test_changes_are_noticed(two: tuple[Traversing, Traversing], monkeypatch: pytest.MonkeyPatch) -> None:
    asking, dialling = two
    asking.host.set_reachability(PUBLIC)
    found: list[Message.ResponseStatus.ValueType] = [Message.E_DIAL_ERROR]

    async def dial_back(*_: object) -> Message.DialResponse:
        await trio.lowlevel.checkpoint()
        return Message.DialResponse(status=found[-1], addr=asking.host.addresses[0].to_bytes())

    monkeypatch.setattr(dialling.traversal.autonat, "_dial_back", dial_back)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.traversal.autonat.run)
        await eventually(lambda: asking.host.reachability is PRIVATE)
        # Another address: another round.
        found.append(Message.OK)
        asking.host.announce("test", [HERE])
        await eventually(lambda: asking.host.reachability is PUBLIC)
        nursery.cancel_scope.cancel()
    assert dialling.host.reachability is Reachability.UNKNOWN


@pytest.mark.usefixtures("impatient")
async def test_being_reached_where_we_did_not_ask_for_is_no_answer(two: tuple[Traversing, Traversing]) -> None:
    asking, dialling = two

    async def lie(_peer: NodeId, stream: YamuxStream) -> None:
        await read_prefixed(stream, MAX_MESSAGE_BYTES)
        answer = Message.DialResponse(status=Message.OK, addr=HERE.to_bytes())
        await stream.write(prefixed(Message(type=Message.DIAL_RESPONSE, dialResponse=answer).SerializeToString()))

    dialling.host._protocols[PROTOCOL].serve = lie
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.traversal.autonat.run)
        await trio.sleep(0.6)
        nursery.cancel_scope.cancel()
    assert asking.host.reachability is Reachability.UNKNOWN
    assert HERE not in asking.host.addresses


async def test_an_address_that_only_others_see_is_announced_once_they_have_reached_it(
    two: tuple[Traversing, Traversing],
) -> None:
    asking, _ = two
    seen = TcpAddress("ip4", "1.1.1.1", asking.host.addresses[0].port)
    assert asking.traversal.autonat._translated([seen, asking.host.addresses[0]]) == [seen]
