"""The table of connections: one a pair, ghosts, water marks, relayed ones, who is held to account."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from aci_p2p.network import NetworkConfig, PeerUnreachable
from aci_p2p.network.libp2p import admission, connections, host, open_libp2p_network, upgrade, yamux
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.connections import Connection, source_of
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import ACCEPTED
from aci_p2p.tasks import open_background
from tests.network.driver import (
    ECHO,
    PATIENCE_S,
    TOPIC,
    Opener,
    echo,
    eventually,
    make_key,
    select_record,
    validate_record,
)

LISTEN = TcpAddress("ip4", "127.0.0.1", 0)
BACKGROUND = "/test/background/1"
RELAY = make_key(77).node_id
CIRCUIT = TcpAddress("ip4", "192.0.2.1", 4001, None, RELAY)


@asynccontextmanager
async def hosts(count: int, config: NetworkConfig | None = None) -> AsyncGenerator[list[Host]]:
    """Hosts that listen on loopback, the smallest identity first."""
    async with open_background() as nursery:
        keys = sorted((make_key(100 + number) for number in range(count)), key=lambda key: key.node_id)
        opened = [Host(key, nursery, config) for key in keys]
        for one in opened:
            await one.listen(LISTEN)
        yield opened


async def echo_bytes(_peer: NodeId, stream: YamuxStream) -> None:
    """Send back what comes."""
    while True:
        await stream.write(await stream.read(1000))


async def answers(stream: YamuxStream) -> bool:
    """Whether a stream still works."""
    await stream.write(b"x")
    with trio.fail_after(PATIENCE_S):
        return await stream.read(10) == b"x"


async def connect_relayed(a: Host, b: Host) -> Connection:
    """Connect two hosts as through a relay: over a pair of streams in memory."""
    ours, theirs = trio.testing.memory_stream_pair()
    b._nursery.start_soon(b.adopt_inbound, theirs, CIRCUIT, RELAY, a.node_id)
    return await a.adopt_outbound(ours, b.node_id, CIRCUIT, RELAY)


@pytest.mark.parametrize("who_first", [0, 1])
async def test_extra_connection_is_closed_when_nothing_is_on_it(who_first: int) -> None:
    async with hosts(2) as both:
        small, large = both
        first, second = both[who_first], both[1 - who_first]
        with small.serve(ECHO, echo_bytes), large.serve(ECHO, echo_bytes):
            await first.dial(second.node_id, second.addresses)
            streams = [await small.open_stream(large.node_id, ECHO), await large.open_stream(small.node_id, ECHO)]
            (before,) = first.connections.of(second.node_id)
            await second.dialler.dial_direct(first.node_id, first.addresses)
            for one, other in ((small, large), (large, small)):
                kept = one.connection(other.node_id)
                assert kept is not None
                assert kept.outbound == (one is small)
                assert len(one.connections.of(other.node_id)) == 2
            for stream in streams:
                assert await answers(stream)
            for stream in streams:
                stream.close()
            await eventually(lambda: all(len(one.connections.all) == 1 for one in both))
            assert (before in first.connections.all) == (first is small)
            assert [one.outbound for one in small.connections.all] == [True]
            assert await answers(await large.open_stream(small.node_id, ECHO))


async def test_dials_of_both_sides_at_once_lose_no_stream() -> None:
    done = 0

    async def talk(here: Host, there: Host) -> None:
        nonlocal done
        here.learn(there.node_id, there.addresses)
        for _ in range(5):
            stream = await here.open_stream(there.node_id, ECHO)
            for _ in range(3):
                assert await answers(stream)
            stream.close()
        done += 1

    for _ in range(5):
        async with hosts(2) as (a, b):
            with a.serve(ECHO, echo_bytes), b.serve(ECHO, echo_bytes):
                async with trio.open_nursery() as nursery:
                    for _ in range(4):
                        nursery.start_soon(talk, a, b)
                        nursery.start_soon(talk, b, a)
                await eventually(lambda: len(a.connections.all) == len(b.connections.all) == 1)
    assert done == 40


async def test_gossip_moves_to_the_connection_that_stays(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.addresses[0])
            nursery.start_soon(b.connect, a.addresses[0])
        await eventually(lambda: len(a.connections()) == len(b.connections()) == 1)
        assert (a.connections()[0].outbound, b.connections()[0].outbound) in {(True, False), (False, True)}
        await eventually(lambda: a.connections()[0].streams == 2)


async def test_direct_connection_replaces_a_relayed_one() -> None:
    moved: list[NodeId] = []
    async with hosts(2) as (a, b):
        b.on_moved.append(moved.append)
        with b.serve(ECHO, echo_bytes):
            relayed = await connect_relayed(a, b)
            assert (relayed.relay, relayed.is_local, relayed.place) == (RELAY, False, CIRCUIT)
            assert [one.relay for one in b.connections.describe()] == [RELAY]
            assert await a.dial(b.node_id) is relayed
            stream = await a.open_stream(b.node_id, ECHO)
            assert await answers(stream)
            direct = await a.dialler.dial_direct(b.node_id, [CIRCUIT, *b.addresses])
            assert a.connection(b.node_id) is direct
            assert moved == [a.node_id]
            assert await answers(stream)
            stream.close()
            await eventually(lambda: a.connections.all == [direct] and len(b.connections.all) == 1)


@pytest.mark.parametrize("direct_first", [False, True])
@pytest.mark.parametrize("who_directly", [0, 1])
async def test_direct_connection_is_used_whoever_dialled_it(who_directly: int, *, direct_first: bool) -> None:
    async with hosts(2) as both:
        one, other = both[who_directly], both[1 - who_directly]
        if not direct_first:
            await connect_relayed(other, one)
        direct = await one.dialler.dial_direct(other.node_id, other.addresses)
        if direct_first:
            await connect_relayed(other, one)
        assert one.connection(other.node_id) is direct
        await eventually(lambda: one.connections.all == [direct] and len(other.connections.all) == 1)


async def test_connection_that_is_to_be_retired_outlives_the_one_that_broke() -> None:
    async with hosts(2) as (a, b):
        with b.serve(ECHO, echo_bytes):
            relayed = await connect_relayed(a, b)
            stream = await a.open_stream(b.node_id, ECHO)
            direct = await a.dialler.dial_direct(b.node_id, b.addresses)
            await direct.muxer.close()
            await eventually(lambda: a.connections.all == [relayed])
            stream.close()
            await trio.sleep(0.1)
            assert a.connections.all == [relayed]
            assert await answers(await a.open_stream(b.node_id, ECHO))


async def test_relayed_stranger_is_not_let_in() -> None:
    async with hosts(3) as (a, b, c):
        ours, theirs = trio.testing.memory_stream_pair()
        b._nursery.start_soon(b.adopt_inbound, theirs, CIRCUIT, RELAY, a.node_id)
        with pytest.raises(PeerUnreachable, match="is not"):
            await a.adopt_outbound(ours, c.node_id, CIRCUIT, RELAY)
        await b.throw_out(a.node_id)
        with pytest.raises(PeerUnreachable):
            await connect_relayed(a, b)
        await eventually(lambda: not a.peers)
        assert not b.peers
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"x")


async def test_handshakes_through_a_relay_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(upgrade, "HANDSHAKE_SECONDS", 0.2)
    async with hosts(2) as (a, b):
        ours, theirs = trio.testing.memory_stream_pair()
        with trio.fail_after(PATIENCE_S):
            await b.adopt_inbound(theirs, CIRCUIT, RELAY, a.node_id)
            assert await ours.receive_some(100) == b""
            ours, theirs = trio.testing.memory_stream_pair()
            with pytest.raises(PeerUnreachable, match="handshake"):
                await a.adopt_outbound(ours, b.node_id, CIRCUIT, RELAY)
            while await theirs.receive_some(100):
                pass
        assert b.admission.under_way == 0


async def test_peer_that_comes_back_at_once_has_moved() -> None:
    """Its connection is still there when it dials again: nobody hears that it left, only that another is to be used."""
    moved: list[NodeId] = []
    async with hosts(2) as (a, b):
        b.on_moved.append(moved.append)
        await a.dial(b.node_id, b.addresses)
        (before,) = b.connections.all
        await a.dialler.dial_direct(b.node_id, b.addresses)
        assert moved == [a.node_id]
        assert b.connection(a.node_id) is not before
        await eventually(lambda: before not in b.connections.all)
        assert a.peers == (b.node_id,)


async def test_peer_that_vanished_does_not_look_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamux, "KEEPALIVE_SECONDS", 0.1)
    monkeypatch.setattr(yamux, "KEEPALIVE_TIMEOUT_SECONDS", 0.1)
    async with hosts(2) as (a, b):
        await a.dial(b.node_id, b.addresses)
        (there,) = b.connections.all

        def swallow(*_: object) -> None:
            """Send nothing."""

        # Its answers stop, but its end of the TCP connection stays open, as when its machine has lost power.
        monkeypatch.setattr(there.muxer, "send", swallow)
        await eventually(lambda: not a.peers)


FROZEN = """
import trio
from aci_p2p.network.libp2p import open_libp2p_network
from tests.network.driver import make_key, select_record, validate_record

async def main():
    rules = {"record_validator": validate_record, "record_selector": select_record}
    async with open_libp2p_network(make_key(2), **rules) as network:
        print(network.addresses[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.slow
async def test_program_that_hangs_does_not_look_connected(open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps its TCP connection and acknowledges what we send."""
    monkeypatch.setattr(yamux, "KEEPALIVE_SECONDS", 0.5)
    monkeypatch.setattr(yamux, "KEEPALIVE_TIMEOUT_SECONDS", 0.5)
    command = partial(trio.run_process, [sys.executable, "-c", FROZEN], stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery, open_libp2p(1) as network:
        program: trio.Process = await nursery.start(command)
        try:
            assert program.stdout is not None
            await network.connect(bytes(await program.stdout.receive_some()).decode().strip())
            await trio.sleep(1.5)
            assert len(network.peers) == 1
            program.send_signal(signal.SIGSTOP)
            await eventually(lambda: not network.peers)
        finally:
            program.kill()


async def test_round_trip_is_measured() -> None:
    async with hosts(2) as (a, b):
        await a.dial(b.node_id, b.addresses)
        (described,) = a.connections.describe()
        assert described.round_trip_ms is not None
        assert 0 < described.round_trip_ms < 1000


async def test_least_useful_connections_are_closed_above_high_water(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.0)
    monkeypatch.setattr(host, "TRIM_SECONDS", 0.05)
    async with hosts(8, NetworkConfig(low_water=4, high_water=6)) as (ours, *others):
        busy, needed, dialled, *strangers = others
        with ours.serve(ECHO, echo_bytes), ours.serve(BACKGROUND, echo_bytes, background=True):
            ours.connections.protected.append(lambda: [needed.node_id])
            for other in (busy, needed, strangers[0]):
                await other.dial(ours.node_id, ours.addresses)
            streams = [await busy.open_stream(ours.node_id, ECHO)]
            await ours.dial(dialled.node_id, dialled.addresses)
            for other in strangers[1:3]:
                await other.dial(ours.node_id, ours.addresses)
            (await strangers[0].open_stream(ours.node_id, ECHO)).reset()
            held = [await stranger.open_stream(ours.node_id, BACKGROUND) for stranger in strangers[:3]]
            assert all([await answers(stream) for stream in held])
            await trio.sleep(0.1)
            assert len(ours.peers) == 6
            await strangers[3].dial(ours.node_id, ours.addresses)
            await eventually(lambda: len(ours.peers) == 4)
            kept = {one.node_id for one in (busy, needed, dialled, strangers[3])}
            assert set(ours.peers) == kept
            assert ours.connections.trimmed == 3
            assert all([await answers(stream) for stream in streams])


async def test_those_that_we_used_lately_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer opens, and opens again, does not count: any could keep its place so."""
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.0)
    async with hosts(6, NetworkConfig(low_water=3, high_water=4)) as (ours, *others):
        for other in others[:4]:
            await other.dial(ours.node_id, ours.addresses)
        with others[0].serve(ECHO, echo_bytes):
            (await ours.open_stream(others[0].node_id, ECHO)).reset()
        with ours.serve(ECHO, echo_bytes):
            for _ in range(3):
                stream = await others[1].open_stream(ours.node_id, ECHO)
                assert await answers(stream)
                stream.reset()
        await others[4].dial(ours.node_id, ours.addresses)
        await eventually(lambda: len(ours.peers) == 3)
        assert set(ours.peers) == {others[index].node_id for index in (0, 3, 4)}


async def test_those_that_peers_hold_in_use_are_closed_when_no_others_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.0)
    async with hosts(6, NetworkConfig(low_water=2, high_water=4)) as (ours, *others):
        with ours.serve(ECHO, echo_bytes), others[0].serve(ECHO, echo_bytes):
            for other in others[:4]:
                await other.dial(ours.node_id, ours.addresses)
            used = await ours.open_stream(others[0].node_id, ECHO)
            for other in others[1:4]:
                assert await answers(await other.open_stream(ours.node_id, ECHO))
            # One that is idle goes first, though it is the youngest: at once, or when it has just been made.
            with suppress(PeerUnreachable):
                await others[4].dial(ours.node_id, ours.addresses)
            await eventually(lambda: len(ours.peers) == 2)
            assert set(ours.peers) == {others[0].node_id, others[3].node_id}
            assert await answers(used)


async def test_young_connections_are_spared_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.5)
    monkeypatch.setattr(host, "TRIM_SECONDS", 0.05)
    async with hosts(5, NetworkConfig(low_water=1, high_water=2)) as (ours, *others):
        for other in others:
            await other.dial(ours.node_id, ours.addresses)
        assert len(ours.peers) == 4
        await eventually(lambda: len(ours.peers) <= 2)
        assert others[0].node_id not in ours.peers
        assert others[3].node_id in ours.peers


async def test_neighbours_in_a_mesh_are_kept(monkeypatch: pytest.MonkeyPatch, open_libp2p: Opener) -> None:
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.3)
    monkeypatch.setattr(host, "TRIM_SECONDS", 0.05)
    config = NetworkConfig(low_water=1, high_water=3)
    rules = {"record_validator": validate_record, "record_selector": select_record}
    async with (
        open_libp2p_network(make_key(1), config, **rules) as ours,  # type: ignore[arg-type]
        open_libp2p(2) as neighbour,
        ours.subscribe(TOPIC, lambda _peer, _data: ACCEPTED, capacity=1),
        neighbour.subscribe(TOPIC, lambda _peer, _data: ACCEPTED, capacity=1),
        hosts(5) as strangers,
    ):
        await neighbour.connect(ours.addresses[0])
        await eventually(lambda: ours.topic_peers(TOPIC))
        for stranger in strangers:
            await stranger.dial(ours.node_id, [TcpAddress.parse(ours.addresses[0])])
        await eventually(lambda: len(ours.peers) <= 3)
        assert neighbour.node_id in ours.peers
        assert ours.statistics().trimmed >= 3


async def test_connections_from_one_source_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_source(_address: str) -> str:
        return "192.0.2.1"

    monkeypatch.setattr(host, "source_of", one_source)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_PER_SOURCE", 2)
    async with hosts(5) as (ours, *others):
        async with trio.open_nursery() as nursery:
            # All at once: what counts is the number at the end of the handshake.
            for other in others:
                nursery.start_soon(_try_to_dial, other, ours)
        assert len(ours.peers) == 2
        # Those that we dial do not count.
        missing = next(other for other in others if other.node_id not in ours.peers)
        await ours.dial(missing.node_id, missing.addresses)


async def test_connections_from_one_network_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a /48 of IPv6 comes from as many sources as it likes."""
    numbers = itertools.count()

    def another_source(_address: str) -> str:
        return f"2600:1:1:{next(numbers):x}::/64"

    monkeypatch.setattr(host, "source_of", another_source)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_PER_NETWORK", 2)
    async with hosts(5) as (ours, *others):
        for other in others:
            await _try_to_dial(other, ours)
        assert len(ours.peers) == 2
        # Others still come in.

        def elsewhere(_ip: str) -> str:
            return "2600:1:2::/64"

        monkeypatch.setattr(host, "source_of", elsewhere)
        await others[-1].dial(ours.node_id, ours.addresses)
        assert len(ours.peers) == 3


async def _try_to_dial(dialler: Host, listener: Host) -> None:
    with suppress(PeerUnreachable):
        await dialler.dial(listener.node_id, listener.addresses)


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("127.0.0.1", "loopback"),
        ("127.8.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_who_is_held_to_account(address: str, source: str) -> None:
    assert source_of(address) == source


async def test_connections_tell_the_agent(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        with a.serve(ECHO, echo):
            await b.connect(a.addresses[0])
            await eventually(lambda: b.connections()[0].agent)
            await eventually(lambda: a.connections()[0].agent)
        assert b.connections()[0].agent.startswith("aci-p2p/")
