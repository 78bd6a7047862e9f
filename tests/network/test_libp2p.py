"""What only the libp2p implementation has: ports, addresses, dialling, and staying off the terminal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Container, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Final

import pytest
import trio

from aci_p2p.network import MAX_FRAME_BYTES, AddressInUse, Network, PeerUnreachable, StreamClosed
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import addresses, connections, host, identify, kad_streams, open_libp2p_network, upgrade
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identify
from aci_p2p.network.libp2p.negotiation import select_inbound
from aci_p2p.network.libp2p.secure import RawChannel, Security
from aci_p2p.network.libp2p.yamux import Yamux, YamuxStream
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import MAX_ADDRESSES
from aci_p2p.tasks import open_background
from tests.network.driver import (
    ECHO,
    PATIENCE_S,
    STRANGER,
    Opener,
    echo,
    eventually,
    make_key,
    select_record,
    validate_record,
    wait_for_ever,
)


def open_at(number: int, listen: Sequence[str]) -> AbstractAsyncContextManager[Network]:
    """An endpoint that listens at given addresses."""
    return open_libp2p_network(
        make_key(number),
        NetworkConfig(listen=tuple(listen)),
        record_validator=validate_record,
        record_selector=select_record,
    )


async def test_port_in_use_is_named(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network:
        address = network.addresses[0].split("/p2p/")[0]
        with pytest.raises(AddressInUse, match=address):
            async with open_at(2, [address]):
                pass


@pytest.mark.parametrize("address", ["nonsense", "/dns/localhost/tcp/0", "/ip4/192.0.2.77/tcp/0"])
async def test_address_that_cannot_be_bound(address: str) -> None:
    with pytest.raises(LocalError):
        async with open_at(1, [address]):
            pass


async def test_port_is_free_again_afterwards() -> None:
    async with open_at(1, ["/ip4/127.0.0.1/tcp/0"]) as first, open_at(2, ["/ip4/127.0.0.1/tcp/0"]) as second:
        await first.connect(second.addresses[0])
        address = second.addresses[0].split("/p2p/")[0]
    async with open_at(2, [address]):
        pass


async def test_a_further_stream_does_not_wait_for_its_protocol(
    open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = trio.Event()

    async def answer_late(stream: YamuxStream, supported: Container[str]) -> str:
        await gate.wait()
        return await select_inbound(stream, supported)

    async with open_libp2p(1) as client, open_libp2p(2) as server:
        await client.connect(server.addresses[0])
        with server.serve(ECHO, echo):
            async with client.open_stream(server.node_id, ECHO, eager=True) as stream:
                await stream.send(b"first")
                assert await stream.receive() == b"first"
            monkeypatch.setattr(host, "select_inbound", answer_late)
            with trio.fail_after(PATIENCE_S):
                async with client.open_stream(server.node_id, ECHO, eager=True) as stream:
                    await stream.send(b"second")
                    gate.set()
                    assert await stream.receive() == b"second"
        # It is served no more, and then known to be so.
        with pytest.raises(StreamClosed):
            async with client.open_stream(server.node_id, ECHO, eager=True) as stream:
                await stream.receive()
        with pytest.raises(PeerUnreachable):
            async with client.open_stream(server.node_id, ECHO, eager=True):
                pass


async def test_all_interfaces_are_named_with_the_port() -> None:
    async with open_at(1, ["/ip4/0.0.0.0/tcp/0"]) as network:
        ports = {address.split("/")[4] for address in network.addresses}
        assert len(ports) == 1
        assert "0" not in ports
        assert not any("/0.0.0.0/" in address for address in network.addresses)


OWN: Final = [
    "/ip4/127.0.0.1/tcp/1",
    "/ip4/169.254.7.7/tcp/1",
    "/ip4/10.0.0.7/tcp/1",
    "/ip4/8.8.4.4/tcp/1",
    "/ip4/127.0.0.2/tcp/1",
    "/ip4/192.168.1.7/tcp/1",
]
MANY: Final = [f"/ip4/10.0.0.{number}/tcp/1" for number in range(20)]


@pytest.mark.parametrize(
    ("interfaces", "announced"),
    [
        # From the whole internet, from the local network in the machine's order, from the cable, from the machine.
        (OWN, [OWN[3], OWN[2], OWN[5], OWN[1], OWN[0]]),
        ([OWN[0], *MANY], MANY[:MAX_ADDRESSES]),
        ([OWN[0], *MANY[: MAX_ADDRESSES - 1]], [*MANY[: MAX_ADDRESSES - 1], OWN[0]]),
        ([OWN[0], *MANY[:MAX_ADDRESSES]], MANY[:MAX_ADDRESSES]),
        ([OWN[0], OWN[4]], [OWN[0], OWN[4]]),
        ([f"/ip4/127.0.0.{number}/tcp/1" for number in range(1, 20)], [f"/ip4/127.0.0.{n}/tcp/1" for n in range(1, 9)]),
        ([], []),
    ],
    ids=["order", "many", "room for loopback", "no room for loopback", "loopback only", "much loopback", "none"],
)
async def test_the_most_useful_addresses_are_announced(
    monkeypatch: pytest.MonkeyPatch, interfaces: list[str], announced: list[str]
) -> None:
    def get_interfaces(_port: int) -> list[str]:
        return [*interfaces, "/ip6/2001:db8::1/tcp/1"]

    monkeypatch.setattr(addresses, "get_available_interfaces", get_interfaces)
    async with open_at(1, ["/ip4/0.0.0.0/tcp/0"]) as network:
        assert network.addresses == tuple(f"{address}/p2p/{network.node_id}" for address in announced)
        assert len(announced) <= MAX_ADDRESSES


async def test_several_listen_addresses() -> None:
    async with open_at(1, ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.2/tcp/0"]) as network, open_at(2, []) as dialler:
        assert len(network.addresses) == 2
        assert list(dialler.addresses) == []
        await dialler.connect(network.addresses[1])


async def test_node_that_only_dials_can_be_talked_to(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_at(2, []) as b:
        await b.connect(a.addresses[0])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"


async def test_addresses_are_tried_in_turn(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b, open_libp2p(3) as c:
        somebody_else = c.addresses[0].split("/p2p/")[0]
        a.learn_addresses(b.node_id, ["/ip4/127.0.0.1/tcp/1", somebody_else, b.addresses[0]])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO):
                assert b.node_id in a.peers


async def test_unreachable_peer_says_why(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network:
        with pytest.raises(PeerUnreachable) as caught:
            await network.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}")
        assert STRANGER.short in caught.value.message
        assert "/ip4/127.0.0.1/tcp/1 cannot be dialled: connection refused" in caught.value.message
        assert "\n" not in caught.value.message


async def test_unknown_host_name_is_said(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network:
        with pytest.raises(PeerUnreachable, match=r"/dns/nowhere\.invalid/tcp/1 cannot be resolved"):
            await network.connect(f"/dns/nowhere.invalid/tcp/1/p2p/{STRANGER}")


async def test_host_name_is_resolved(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        port = TcpAddress.parse(b.addresses[0]).port
        assert await a.connect(f"/dns4/localhost/tcp/{port}/p2p/{b.node_id}") == b.node_id


async def test_silent_listener_is_given_up(open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "HANDSHAKE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_libp2p(1) as network:
            with trio.fail_after(PATIENCE_S), pytest.raises(PeerUnreachable):
                await network.connect(f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}/p2p/{STRANGER}")


async def test_connections_of_both_directions_at_once(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        with a.serve(ECHO, echo), b.serve(ECHO, echo):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.connect, b.addresses[0])
                nursery.start_soon(b.connect, a.addresses[0])
            for here, there in ((a, b), (b, a)):
                async with here.open_stream(there.node_id, ECHO) as stream:
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"
            assert list(a.peers) == [b.node_id]
            assert list(b.peers) == [a.node_id]


async def test_many_dials_at_once_make_one_connection(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        a.learn_addresses(b.node_id, b.addresses)
        with b.serve(ECHO, wait_for_ever):

            async def hold() -> None:
                async with a.open_stream(b.node_id, ECHO):
                    await trio.sleep_forever()

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(hold)
                await eventually(lambda: b.statistics().streams == 10)
                nursery.cancel_scope.cancel()
        assert list(b.peers) == [a.node_id]


async def test_cancelled_dial_leaves_nothing(open_libp2p: Opener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_libp2p(1) as network:
            address = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}/p2p/{STRANGER}"
            with trio.move_on_after(0.05) as scope:
                await network.connect(address)
            assert scope.cancelled_caught
            assert not network.peers
            with trio.move_on_after(0.05) as scope:
                await network.connect(address)
            assert scope.cancelled_caught


async def test_connections_are_bounded(open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_INBOUND_CONNECTIONS", 2)
    async with open_libp2p(1) as network, open_libp2p(2) as a, open_libp2p(3) as b, open_libp2p(4) as c:
        await a.connect(network.addresses[0])
        await b.connect(network.addresses[0])
        with pytest.raises(PeerUnreachable):
            await c.connect(network.addresses[0])
        assert len(network.peers) == 2


async def test_oldest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    async with open_background() as nursery:
        dialler, *others = (Host(make_key(number), nursery) for number in range(1, 7))
        for other in others:
            await other.listen(TcpAddress.parse("/ip4/127.0.0.1/tcp/0"))
        busy, *_ = [await dialler.dial(other.node_id, other.addresses) for other in others[:3]]
        stream = busy.muxer.open_stream()
        stream.mark_in_use()
        await dialler.dial(others[3].node_id, others[3].addresses)
        assert set(dialler.peers) == {others[index].node_id for index in (0, 2, 3)}
        stream.reset()
        await dialler.dial(others[4].node_id, others[4].addresses)
        assert set(dialler.peers) == {others[index].node_id for index in (2, 3, 4)}
        for connection in [await dialler.dial(other.node_id) for other in others[2:]]:
            connection.muxer.open_stream().mark_in_use()
        with pytest.raises(PeerUnreachable, match="in use"):
            await dialler.dial(others[0].node_id)


async def test_nothing_is_kept_of_streams_that_are_over() -> None:
    served = trio.Event()

    async def serve(_peer: NodeId, _stream: YamuxStream) -> None:
        await trio.lowlevel.checkpoint()
        served.set()

    async with open_background() as nursery:
        a, b = Host(make_key(1), nursery), Host(make_key(2), nursery)
        await b.listen(TcpAddress.parse("/ip4/127.0.0.1/tcp/0"))
        await a.dial(b.node_id, b.addresses)
        with b.serve(ECHO, serve):
            await a.open_stream(b.node_id, ECHO)
            await served.wait()
            await eventually(lambda: not b._inbound_streams)


async def test_cancelled_send_spoils_the_stream(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        await a.connect(b.addresses[0])
        with b.serve(ECHO, wait_for_ever):
            async with a.open_stream(b.node_id, ECHO) as stream:
                with trio.move_on_after(0.1) as scope:
                    await stream.send(bytes(MAX_FRAME_BYTES))
                assert scope.cancelled_caught
                with pytest.raises(StreamClosed):
                    await stream.send(b"would be read as part of the frame before")


async def test_star_of_five_finds_providers_quickly(open_libp2p: Opener) -> None:
    key = bytes(32)
    async with (
        open_libp2p(1) as boot,
        open_libp2p(2) as a,
        open_libp2p(3) as b,
        open_libp2p(4) as c,
        open_libp2p(5) as d,
    ):
        for network in (a, b, c, d):
            await network.connect(boot.addresses[0])
        for network in (a, b, c):
            await network.provide(key)
        with trio.fail_after(5):
            found = await d.find_providers(key, 10)
        assert set(found) == {a.node_id, b.node_id, c.node_id}


async def test_swarm_behind_one_bootstrap_node_meshes(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as boot, open_libp2p(2) as a, open_libp2p(3) as b:
        await a.connect(boot.addresses[0])
        await b.connect(boot.addresses[0])
        await eventually(lambda: b.node_id in a.peers and a.node_id in b.peers)


def test_seam_does_not_import_libp2p() -> None:
    probe = "import sys, aci_p2p.network, aci_p2p.network.memory; print([m for m in sys.modules if 'libp2p' in m])"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], open_libp2p: Opener) -> None:
    async def quarrel() -> None:
        async with open_libp2p(1) as a, open_libp2p(2) as b:
            with pytest.raises(PeerUnreachable):
                await a.connect(b.addresses[0].replace(str(b.node_id), str(STRANGER)))

    trio.run(quarrel)
    assert capfd.readouterr() == ("", "")


async def fail(*_: object, **__: object) -> None:
    """A bug of ours."""
    raise ZeroDivisionError


def fail_at_once(*_: object) -> bytes:
    """The same where nothing is awaited."""
    raise ZeroDivisionError


async def fail_on_streams(channel: RawChannel | YamuxStream, protocols: Container[str]) -> str:
    """A bug of ours in the negotiation of streams; that of connections works."""
    if isinstance(channel, YamuxStream):
        raise ZeroDivisionError
    return await select_inbound(channel, protocols)


@pytest.mark.parametrize(
    ("place", "name", "bug", "message"),
    [
        (Security, "secure_inbound", fail, "the connection from 127.0.0.1 failed"),
        (Security, "secure_outbound", fail, "the handshake with /ip4/127.0.0.1/tcp/"),
        (Yamux, "_read_frames", fail, "the connection to "),
        (host, "select_inbound", fail_on_streams, "a stream from "),
        (Identify, "_encode", fail_at_once, "serving "),
        (identify, "_read", fail, " does not say what it serves"),
        (kad_streams, "prefixed", fail_at_once, " did not answer a DHT query"),
    ],
    ids=["inbound", "outbound", "connection", "stream", "server", "identify", "lookup"],
)
async def test_our_own_bugs_can_be_seen(
    open_libp2p: Opener,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: object,
    name: str,
    bug: object,
    message: str,
) -> None:
    def seen() -> bool:
        return any(
            message in record.getMessage() and "ZeroDivisionError" in (record.exc_text or "")
            for record in caplog.records
            if (record.name, record.levelname) == ("aci_p2p.network", "DEBUG")
        )

    caplog.set_level("DEBUG", "aci_p2p.network")
    monkeypatch.setattr(place, name, bug)
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        with suppress(PeerUnreachable):
            await a.connect(b.addresses[0])
            await a.find_providers(bytes(32), 1)
        await eventually(seen)


LOGGING = """
import logging
root = logging.getLogger()
before = [root.level, list(root.handlers)]
import aci_p2p.network.libp2p
assert [root.level, list(root.handlers)] == before
log, ours = logging.getLogger("libp2p"), logging.getLogger("aci_p2p.network")
assert log.level == logging.WARNING and ours.level == logging.NOTSET
assert ours.propagate and logging.getLogger("aci_p2p").propagate
logging.getLogger("libp2p.security.noise").error("a peer's mistake")
class Keep(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
log.addHandler(Keep())
root.addHandler(Keep())
logging.getLogger("libp2p.security.noise").error("another")
ours.error("our bug")
"""


@pytest.mark.parametrize("debug", [None, "DEBUG"])
def test_logging_is_left_to_the_program(debug: str | None, tmp_path: Path) -> None:
    """Nothing is printed unasked; handlers of the program get all; what LIBP2P_DEBUG does, it does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIBP2P_DEBUG")}
    program = LOGGING
    if debug is not None:
        environment |= {"LIBP2P_DEBUG": debug, "LIBP2P_DEBUG_FILE": str(tmp_path / "log")}
        program = program.replace("log.level == logging.WARNING", "log.level == logging.DEBUG")
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "another\nour bug\n"
    assert ("a peer's mistake" in done.stderr) == (debug is not None)
    assert debug is not None or done.stderr == ""


INTERRUPTED = """
import signal
import trio
import trio.testing
from aci_p2p.network.libp2p import open_libp2p_network
from tests.network.driver import ECHO, echo, make_key, select_record, validate_record

async def interrupt():
    # While all tasks wait: what trio raises in the midst of a running one comes out as it may.
    await trio.testing.wait_all_tasks_blocked()
    signal.raise_signal(signal.SIGINT)

async def main():
    rules = {"record_validator": validate_record, "record_selector": select_record}
    async with open_libp2p_network(make_key(1), **rules) as a, open_libp2p_network(make_key(2), **rules) as b:
        await a.connect(b.addresses[0])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                trio.lowlevel.spawn_system_task(interrupt)
                await stream.receive()

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_interrupt_ends_at_once_and_silently() -> None:
    arguments = [sys.executable, "-W", "error", "-c", INTERRUPTED]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
