"""What the network seam promises, over both implementations: connections, streams, shutdown."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio
import trio.testing

from aci_p2p.network import (
    MAX_FRAME_BYTES,
    DialledOurselves,
    Network,
    NoFreeStream,
    PeerUnreachable,
    Stream,
    StreamClosed,
)
from aci_p2p.network.limits import MAX_STREAMS_PER_PEER, MAX_STREAMS_TO_PEER
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.version import SOFTWARE
from tests.network.driver import ECHO, PATIENCE_S, STRANGER, Opener, OpenLine, echo, eventually, make_key, told


async def test_address_names_the_node(open_network: Opener) -> None:
    async with open_network(1) as network:
        assert network.node_id == make_key(1).node_id
        (address,) = network.addresses
        assert address.endswith(f"/p2p/{network.node_id}")


async def test_connection_is_known_on_both_sides(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        await eventually(lambda: list(a.peers) == [b.node_id])
        assert list(b.peers) == [a.node_id]
        assert a.statistics().peers == 1


def is_connected(one: Network, other: Network) -> bool:
    """Whether the one knows of a connection to the other."""
    return other.node_id in one.peers


async def test_connections_are_told_to_who_waits_on_both_sides(open_network: Opener) -> None:
    async with open_network(1) as a, trio.open_nursery() as nursery, open_network(2) as b:
        for one, other in ((a, b), (b, a)):
            nursery.start_soon(told, one, partial(is_connected, one, other))
        await trio.testing.wait_all_tasks_blocked()
        await b.connect(a.addresses[0])
        while nursery.child_tasks:
            await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(told, a, lambda: not a.peers)
        await trio.testing.wait_all_tasks_blocked()


async def test_nothing_is_told_while_nothing_changes(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            # Whatever connecting brings about.
            with trio.move_on_after(2) as scope:
                while True:
                    await a.changed()
                    scope.deadline = trio.current_time() + 0.3
            with trio.move_on_after(0.3) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a.changed)
                    async with a.open_stream(b.node_id, ECHO) as stream:
                        await stream.send(b"x")
                        await stream.receive()
            assert scope.cancelled_caught


async def test_connecting_again_changes_nothing(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        assert await b.connect(a.addresses[0]) == a.node_id
        assert await a.connect(b.addresses[0]) == b.node_id
        assert list(b.peers) == [a.node_id]


async def test_peer_that_left_is_forgotten(open_network: Opener) -> None:
    async with open_network(1) as a:
        async with open_network(2) as b:
            await b.connect(a.addresses[0])
        await eventually(lambda: not a.peers)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/ip4/127.0.0.1/tcp/0", "/memory/x", "/ip4/1/tcp/2/p2p/x", "/" * 600]
)
async def test_bad_address_is_our_own_fault(open_network: Opener, address: str) -> None:
    async with open_network(1) as network:
        with pytest.raises(LocalError):
            await network.connect(address)


async def test_connecting_to_ourselves_is_refused(open_network: Opener) -> None:
    async with open_network(1) as network:
        for address in (network.addresses[0], network.addresses[0].split("/p2p/")[0]):
            with pytest.raises(DialledOurselves):
                await network.connect(address)
        assert not network.peers
        assert not network.known_peers()


async def test_whoever_answers_is_found(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        bare = b.addresses[0].split("/p2p/")[0]
        assert await a.connect(bare) == b.node_id
        assert await a.connect(bare) == b.node_id
        assert list(a.peers) == [b.node_id]
        assert a.known_peers()[0].addresses == tuple(b.addresses)


async def test_nobody_answers_at_an_address_that_names_nobody(open_network: Opener) -> None:
    async with open_network(1) as a:
        async with open_network(2) as b:
            bare = b.addresses[0].split("/p2p/")[0]
        with pytest.raises(PeerUnreachable):
            await a.connect(bare)


async def test_peer_that_is_gone_is_unreachable(open_network: Opener) -> None:
    async with open_network(1) as a:
        async with open_network(2) as b:
            address = b.addresses[0]
        with pytest.raises(PeerUnreachable, match=b.node_id.short):
            await a.connect(address)


async def test_somebody_else_at_the_address_is_unreachable(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        address = b.addresses[0].replace(str(b.node_id), str(STRANGER))
        with pytest.raises(PeerUnreachable):
            await a.connect(address)
        assert not a.peers


async def test_unknown_peer_is_unreachable(open_network: Opener) -> None:
    async with open_network(1) as network:
        with pytest.raises(PeerUnreachable):
            async with network.open_stream(STRANGER, ECHO):
                pass


async def test_unknown_protocol_is_unreachable(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with pytest.raises(PeerUnreachable, match=r"/no/such/1"):
            async with a.open_stream(b.node_id, "/no/such/1"):
                pass
        assert a.statistics().streams == 0


async def test_learnt_addresses_are_dialled(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        a.learn_addresses(b.node_id, ["nonsense", *b.addresses])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
        assert list(a.peers) == [b.node_id]


async def test_addresses_that_name_another_node_are_not_learnt(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        a.learn_addresses(STRANGER, b.addresses)
        with pytest.raises(PeerUnreachable):
            async with a.open_stream(STRANGER, ECHO):
                pass


@pytest.mark.parametrize("frame", [b"", b"x", b"y" * 70_000, b"z" * MAX_FRAME_BYTES], ids=len)
async def test_frames_arrive_whole(open_line: OpenLine, frame: bytes) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                assert stream.peer == b.node_id
                await stream.send(frame)
                assert await stream.receive() == frame


async def test_frames_arrive_in_order(open_line: OpenLine) -> None:
    frames = [bytes([number]) * number for number in range(200)]
    async with open_line(2) as (a, b), trio.open_nursery() as nursery:
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:

                async def send_all() -> None:
                    for frame in frames:
                        await stream.send(frame)

                nursery.start_soon(send_all)
                assert [await stream.receive() for _ in frames] == frames


async def test_streams_are_independent(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as first, a.open_stream(b.node_id, ECHO) as second:
                await first.send(b"first")
                await second.send(b"second")
                assert await second.receive() == b"second"
                assert await first.receive() == b"first"


async def test_oversized_frame_is_our_own_fault(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                with pytest.raises(LocalError):
                    await stream.send(bytes(MAX_FRAME_BYTES + 1))
                await stream.send(b"still open")
                assert await stream.receive() == b"still open"


async def test_what_was_sent_before_the_end_arrives(open_line: OpenLine) -> None:
    received: list[bytes] = []
    ended = trio.Event()

    async def collect(stream: Stream) -> None:
        try:
            while True:
                received.append(await stream.receive())
        except StreamClosed:
            ended.set()

    async with open_line(2) as (a, b):
        with b.serve(ECHO, collect):
            async with a.open_stream(b.node_id, ECHO) as stream:
                for number in range(50):
                    await stream.send(bytes([number]))
            with trio.fail_after(5):
                await ended.wait()
    assert received == [bytes([number]) for number in range(50)]


async def test_what_a_handler_sent_before_it_returned_arrives(open_line: OpenLine) -> None:
    async def greet(stream: Stream) -> None:
        await stream.send(b"hello")
        await stream.send(b"good-bye")

    async with open_line(2) as (a, b):
        with b.serve(ECHO, greet):
            async with a.open_stream(b.node_id, ECHO) as stream:
                assert await stream.receive() == b"hello"
                assert await stream.receive() == b"good-bye"
                with pytest.raises(StreamClosed):
                    await stream.receive()
        assert b.statistics().handler_failures == 0


async def test_sending_to_a_handler_that_has_returned_fails(open_line: OpenLine) -> None:
    async def leave(stream: Stream) -> None:
        await stream.receive()

    async with open_line(2) as (a, b):
        with b.serve(ECHO, leave):
            async with a.open_stream(b.node_id, ECHO) as stream:
                with pytest.raises(StreamClosed), trio.fail_after(5):
                    while True:
                        await stream.send(b"anybody there?")


async def test_failing_block_resets_the_stream(open_line: OpenLine) -> None:
    outcomes: list[str] = []
    done = trio.Event()

    async def observe(stream: Stream) -> None:
        try:
            await stream.receive()
        except StreamClosed:
            outcomes.append("closed")
        done.set()

    async with open_line(2) as (a, b):
        with b.serve(ECHO, observe):
            with pytest.raises(ZeroDivisionError):
                async with a.open_stream(b.node_id, ECHO):
                    raise ZeroDivisionError
            with trio.fail_after(5):
                await done.wait()
    assert outcomes == ["closed"]


async def test_cancelled_block_resets_the_stream(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            with trio.move_on_after(0.05) as scope:
                async with a.open_stream(b.node_id, ECHO) as stream:
                    await stream.receive()
            assert scope.cancelled_caught
            await eventually(lambda: b.statistics().streams == 0)
        assert a.statistics().streams == 0


async def test_cancelled_receive_loses_nothing(open_line: OpenLine) -> None:
    async def send_in_parts(stream: Stream) -> None:
        await stream.receive()
        await stream.send(b"x" * 200_000)
        await trio.sleep_forever()

    async with open_line(2) as (a, b):
        with b.serve(ECHO, send_in_parts):
            async with a.open_stream(b.node_id, ECHO) as stream:
                with trio.move_on_after(0.02):
                    await stream.receive()
                await stream.send(b"go")
                frame = b""
                while not frame:
                    with trio.move_on_after(0.0005):
                        frame = await stream.receive()
                assert frame == b"x" * 200_000


async def test_slow_reader_holds_the_writer_back(open_line: OpenLine) -> None:
    go = trio.Event()
    received = 0
    done = trio.Event()

    async def read_late(stream: Stream) -> None:
        nonlocal received
        await go.wait()
        while received < 64:
            await stream.receive()
            received += 1
        done.set()

    async with open_line(2) as (a, b), trio.open_nursery() as nursery:
        with b.serve(ECHO, read_late):
            async with a.open_stream(b.node_id, ECHO) as stream:
                sent = 0

                async def send_all() -> None:
                    nonlocal sent
                    for _ in range(64):
                        await stream.send(bytes(64 << 10))
                        sent += 1

                nursery.start_soon(send_all)
                await eventually(lambda: sent)
                await trio.sleep(0.2)
                assert sent <= 16
                go.set()
                with trio.fail_after(5):
                    await done.wait()


async def test_failing_handler_is_contained(open_line: OpenLine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "aci_p2p.network")

    async def fail(_stream: Stream) -> None:
        raise ZeroDivisionError

    async with open_line(2) as (a, b):
        with b.serve("/test/fail/1", fail), b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, "/test/fail/1") as stream:
                with pytest.raises(StreamClosed):
                    await stream.receive()
            assert b.statistics().handler_failures == 1
            assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"alive")
                assert await stream.receive() == b"alive"


async def test_handlers_are_cancelled_when_serving_ends(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            opening = a.open_stream(b.node_id, ECHO)
            stream = await opening.__aenter__()
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        with pytest.raises(StreamClosed):
            await stream.receive()
        await opening.__aexit__(None, None, None)
        await eventually(lambda: b.statistics().streams == 0)
        assert b.statistics().handler_failures == 0
        with pytest.raises(PeerUnreachable):
            async with a.open_stream(b.node_id, ECHO):
                pass


async def test_one_handler_a_protocol(open_network: Opener) -> None:
    async with open_network(1) as network:
        with network.serve(ECHO, echo), pytest.raises(LocalError), network.serve(ECHO, echo):
            pass
        with network.serve(ECHO, echo):
            pass


async def test_streams_to_one_peer_are_bounded(open_network: Opener, open_line: OpenLine) -> None:
    async with open_line(2) as (a, b), open_network(3) as c, trio.open_nursery() as nursery:
        scopes: list[trio.CancelScope] = []

        async def hold() -> None:
            with trio.CancelScope() as scope:
                async with a.open_stream(b.node_id, ECHO):
                    scopes.append(scope)
                    await trio.sleep_forever()

        with b.serve(ECHO, echo), c.serve(ECHO, echo):
            for _ in range(MAX_STREAMS_TO_PEER):
                nursery.start_soon(hold)
            await eventually(lambda: b.statistics().streams == MAX_STREAMS_TO_PEER == len(scopes))
            with pytest.raises(NoFreeStream):
                async with a.open_stream(b.node_id, ECHO):
                    pass
            # Others are open to us, and it has room again when one has ended.
            await a.connect(c.addresses[0])
            async with a.open_stream(c.node_id, ECHO) as stream:
                await stream.send(b"another peer")
                assert await stream.receive() == b"another peer"
            scopes.pop().cancel()
            await eventually(lambda: b.statistics().streams == MAX_STREAMS_TO_PEER - 1)
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"room again")
                assert await stream.receive() == b"room again"
            nursery.cancel_scope.cancel()


async def test_streams_that_cannot_be_opened_are_not_counted(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        for _ in range(MAX_STREAMS_TO_PEER + 1):
            with pytest.raises(PeerUnreachable, match="does not serve"):
                async with a.open_stream(b.node_id, ECHO):
                    pass


async def test_streams_of_one_peer_are_bounded(open_line: OpenLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aci_p2p.network.outbound.MAX_STREAMS_TO_PEER", MAX_STREAMS_PER_PEER + 1)
    async with open_line(2) as (a, b), trio.open_nursery() as nursery:
        opened = 0

        async def hold() -> None:
            nonlocal opened
            async with a.open_stream(b.node_id, ECHO):
                opened += 1
                await trio.sleep_forever()

        with b.serve(ECHO, echo):
            for _ in range(MAX_STREAMS_PER_PEER - 8):  # the implementation's own streams count, too
                nursery.start_soon(hold)
            await eventually(lambda: opened == MAX_STREAMS_PER_PEER - 8)
            async with AsyncExitStack() as stack:
                with pytest.raises(PeerUnreachable):
                    for _ in range(9):
                        await stack.enter_async_context(a.open_stream(b.node_id, ECHO))
            await eventually(lambda: b.statistics().streams == MAX_STREAMS_PER_PEER - 8)
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"room again")
                assert await stream.receive() == b"room again"
            nursery.cancel_scope.cancel()


async def test_connection_lost_closes_its_streams(open_network: Opener) -> None:
    async with open_network(1) as a:
        opening = open_network(2)
        b = await opening.__aenter__()
        await a.connect(b.addresses[0])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await opening.__aexit__(None, None, None)
                with pytest.raises(StreamClosed), trio.fail_after(5):
                    await stream.receive()


async def test_leaving_with_live_streams_is_quick(open_network: Opener) -> None:
    async with trio.open_nursery() as nursery, open_network(1) as a:
        async with open_network(2) as b:
            await b.connect(a.addresses[0])

            async def hold() -> None:
                with pytest.raises(StreamClosed):
                    async with b.open_stream(a.node_id, ECHO) as stream:
                        await stream.receive()

            with a.serve(ECHO, echo):
                for _ in range(10):
                    nursery.start_soon(hold)
                await trio.sleep(0.1)
                started = trio.current_time()
        assert trio.current_time() - started < 1


async def test_cancellation_ends_everything(open_network: Opener) -> None:
    with trio.fail_after(PATIENCE_S), trio.move_on_after(0.1) as scope:
        async with open_network(1) as a, open_network(2) as b:
            await a.connect(b.addresses[0])
            with b.serve(ECHO, echo):
                async with a.open_stream(b.node_id, ECHO) as stream:
                    await stream.receive()
    assert scope.cancelled_caught


async def test_errors_of_the_block_come_out_as_they_are(open_network: Opener) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_network(1) as a, open_network(2) as b:
            await a.connect(b.addresses[0])
            raise ZeroDivisionError


async def test_connections_say_who_dialled_and_known_peers_outlive_them(open_network: Opener) -> None:
    async with open_network(1) as a:
        assert not a.connections()
        assert not a.known_peers()
        async with open_network(2) as b:
            await a.connect(b.addresses[0])
            await eventually(lambda: len(b.connections()) == 1)
            (from_a,), (from_b,) = a.connections(), b.connections()
            assert (from_a.peer, from_a.outbound, from_a.relay) == (b.node_id, True, None)
            assert from_a.address.removesuffix(f"/p2p/{b.node_id}") == b.addresses[0].removesuffix(f"/p2p/{b.node_id}")
            assert (from_b.peer, from_b.outbound, from_b.relay) == (a.node_id, False, None)
            for one in (from_a, from_b):
                assert 0 <= one.age_s < 10
                assert one.score == 0
            await eventually(lambda: a.connections()[0].agent == b.connections()[0].agent == SOFTWARE)
            assert from_a.round_trip_ms is not None
            assert 0 <= from_a.round_trip_ms < 1000
            assert (a.statistics().inbound, a.statistics().outbound) == (0, 1)
            assert (b.statistics().inbound, b.statistics().outbound) == (1, 0)
        await eventually(lambda: not a.connections())
        (known,) = a.known_peers()
        assert known.peer == b.node_id
        assert b.addresses[0] in known.addresses


async def test_connections_are_in_the_order_in_which_they_were_made(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b, open_network(3) as c, open_network(4) as d:
        await a.connect(c.addresses[0])
        await b.connect(a.addresses[0])
        await a.connect(d.addresses[0])
        await eventually(lambda: len(a.connections()) == 3)
        assert [one.peer for one in a.connections()] == [c.node_id, b.node_id, d.node_id]
        # The latest first; who has dialled us has said where to find it by now, or will.
        await eventually(lambda: len(a.known_peers()) == 3)
        assert [one.peer for one in a.known_peers()] == [d.node_id, b.node_id, c.node_id]
        for known, network in zip(a.known_peers(), (d, b, c), strict=True):
            assert known.addresses == tuple(network.addresses)
            assert await a.connect(known.addresses[0]) == known.peer


async def test_peer_that_comes_back_is_the_latest_known(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        async with open_network(3) as c:
            await a.connect(c.addresses[0])
            await a.connect(b.addresses[0])
        await eventually(lambda: list(a.peers) == [b.node_id])
        assert [one.peer for one in a.known_peers()] == [b.node_id, c.node_id]
        async with open_network(3) as c:
            await c.connect(a.addresses[0])
            await eventually(lambda: [one.peer for one in a.known_peers()] == [c.node_id, b.node_id])


async def test_streams_of_a_connection_are_counted(open_line: OpenLine) -> None:
    async with open_line(2) as (a, b):
        with b.serve(ECHO, echo):
            async with AsyncExitStack() as stack:
                for _ in range(5):
                    await stack.enter_async_context(a.open_stream(b.node_id, ECHO))
                await eventually(lambda: a.connections()[0].streams >= 5 <= b.connections()[0].streams)
            await eventually(lambda: a.connections()[0].streams <= 2 >= b.connections()[0].streams)


async def test_failed_dials_are_counted(open_network: Opener) -> None:
    async with open_network(1) as a, open_network(2) as b:
        address = b.addresses[0].replace(str(b.node_id), str(STRANGER))
        with pytest.raises(PeerUnreachable):
            await a.connect(address)
        assert (a.statistics().dials, a.statistics().dial_failures) == (1, 1)
        await a.connect(b.addresses[0])
        await a.connect(b.addresses[0])
        assert (a.statistics().dials, a.statistics().dial_failures) == (2, 1)


async def test_a_closed_network_reaches_nobody(open_network: Opener) -> None:
    async with open_network(1) as remote:
        with remote.serve(ECHO, echo):
            async with open_network(2) as network:
                await network.connect(remote.addresses[0])
            assert not network.peers
            for _ in range(2):
                with pytest.raises(PeerUnreachable):
                    async with network.open_stream(remote.node_id, ECHO):
                        pass
                with pytest.raises(PeerUnreachable):
                    await network.connect(remote.addresses[0])
                with pytest.raises(PeerUnreachable):
                    await network.connect(remote.addresses[0].partition("/p2p/")[0])
            await eventually(lambda: not remote.peers)


async def test_streams_that_are_opened_while_a_network_closes_fail_as_others_do(open_network: Opener) -> None:
    async def use(network: Network, remote: NodeId, opened: trio.Event) -> None:
        with pytest.raises((PeerUnreachable, StreamClosed)):
            while True:
                async with network.open_stream(remote, ECHO) as stream:
                    await stream.send(b"hello")
                    await stream.receive()
                opened.set()

    async with open_network(1) as remote, trio.open_nursery() as nursery:
        with remote.serve(ECHO, echo):
            for _ in range(5):
                async with open_network(2) as network:
                    await network.connect(remote.addresses[0])
                    opened = trio.Event()
                    nursery.start_soon(use, network, remote.node_id, opened)
                    await opened.wait()
        nursery.cancel_scope.deadline = trio.current_time() + 5
    assert not nursery.cancel_scope.cancelled_caught
