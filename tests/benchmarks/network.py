"""The libp2p network alone: two hosts on loopback in one process, and gossip in a full mesh of eight. Run:
`.venv/bin/python tests/benchmarks/network.py [--json]` (or `make bench`).

Rates are per second of processor time, so that other programs on the machine do not show.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import combinations

import trio
import trio.lowlevel

from aci_p2p.network import Network, Stream
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.validation import ACCEPTED

ECHO = "/test/echo/1"
DRAIN = "/test/drain/1"
TOPIC = "test/offers"
PAYLOAD = bytes(1024)
REQUESTS = 3000
STREAMS = 500
FRAMES = 64
FRAME_BYTES = 1 << 19
MESSAGES = 5000
MESH = 8
MESH_MESSAGES = 300
IN_FLIGHT = 256


@dataclass(frozen=True)
class Figures:
    """Per second of processor time, both ends of the connection included, unless they say otherwise."""

    dial_ms: float
    """TCP, Noise, yamux and a ping, milliseconds of processor time."""
    requests: float
    """1 KiB requests answered with as much, one after the other on one stream."""
    streams: float
    """Streams opened for one such request each."""
    megabytes: float
    """10^6 bytes one way in frames of 512 KiB."""
    messages: float
    """1 KiB gossip messages from one host to another."""
    mesh_messages: float
    """1 KiB gossip messages that each of eight fully connected hosts receives."""
    idle_percent: float
    """Processor time of those eight hosts when nothing happens, per cent of one core."""
    machine: str
    """Where this was measured."""


def open_host(number: int) -> AbstractAsyncContextManager[Network]:
    """A host on loopback that keeps any DHT record."""
    key = KeyPair(number.to_bytes(32))
    return open_libp2p_network(key, record_validator=lambda _key, _value: None, record_selector=lambda _key, _values: 0)


async def echo(stream: Stream) -> None:
    """Send back every frame."""
    while True:
        await stream.send(await stream.receive())


async def drain(stream: Stream) -> None:
    """Read frames and drop them, then say so."""
    for _ in range(FRAMES):
        await stream.receive()
    await stream.send(b"done")


async def measure_streams(a: Network, b: Network) -> tuple[float, float, float]:
    """Requests on one stream, streams of one request, and megabytes, per second."""
    with b.serve(ECHO, echo), b.serve(DRAIN, drain):
        started = time.process_time()
        async with a.open_stream(b.node_id, ECHO) as stream:
            for _ in range(REQUESTS):
                await stream.send(PAYLOAD)
                await stream.receive()
        requests = REQUESTS / (time.process_time() - started)
        started = time.process_time()
        for _ in range(STREAMS):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(PAYLOAD)
                await stream.receive()
        streams = STREAMS / (time.process_time() - started)
        started = time.process_time()
        async with a.open_stream(b.node_id, DRAIN) as stream:
            for _ in range(FRAMES):
                await stream.send(bytes(FRAME_BYTES))
            await stream.receive()
        return requests, streams, FRAMES * FRAME_BYTES / 1e6 / (time.process_time() - started)


async def measure_gossip(publisher: Network, others: list[Network], messages: int) -> float:
    """Messages a second that reach all others."""
    before = [other.statistics().gossip_accepted for other in others]

    def arrived() -> int:
        return min(other.statistics().gossip_accepted - count for other, count in zip(others, before, strict=True))

    started = time.process_time()
    for number in range(messages):
        await publisher.publish(TOPIC, number.to_bytes(8) + PAYLOAD[8:])
        while arrived() < number - IN_FLIGHT:
            await trio.lowlevel.checkpoint()
    while arrived() < messages:
        await trio.lowlevel.checkpoint()
    return messages / (time.process_time() - started)


@asynccontextmanager
async def open_mesh(count: int) -> AsyncGenerator[list[Network]]:
    """So many hosts, each connected to and gossiping with each."""
    async with AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(open_host(number)) for number in range(1, count + 1)]
        for left, right in combinations(networks, 2):
            await left.connect(right.addresses[0])
        for network in networks:
            await stack.enter_async_context(network.subscribe(TOPIC, lambda _peer, _data: ACCEPTED, capacity=1))
        while any(len(network.topic_peers(TOPIC)) < count - 1 for network in networks):  # noqa: ASYNC110
            await trio.sleep(0.01)
        yield networks


async def measure() -> Figures:
    """All figures, one after the other."""
    async with open_host(1) as a, open_host(2) as b:
        started = time.process_time()
        await a.connect(b.addresses[0])
        dial_ms = 1e3 * (time.process_time() - started)
    async with open_mesh(2) as (a, b):
        requests, streams, megabytes = await measure_streams(a, b)
        messages = await measure_gossip(a, [b], MESSAGES)
    async with open_mesh(MESH) as (first, *others):
        mesh_messages = await measure_gossip(first, others, MESH_MESSAGES)
        await trio.sleep(1)
        started = time.process_time()
        await trio.sleep(5)
        idle_percent = 100 * (time.process_time() - started) / 5
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return Figures(
        dial_ms=round(dial_ms, 1),
        requests=round(requests),
        streams=round(streams),
        megabytes=round(megabytes),
        messages=round(messages),
        mesh_messages=round(mesh_messages),
        idle_percent=round(idle_percent, 1),
        machine=machine,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    figures = asdict(trio.run(measure))
    if as_json:
        print(json.dumps(figures, indent=2))
    for name, value in () if as_json else figures.items():
        print(f"{name:<16} {value}")
