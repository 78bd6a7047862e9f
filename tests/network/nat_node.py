"""A node of the NAT tests: a program that is told what to do on standard input and answers in JSON lines."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import trio

from aci_p2p.network import Network, Stream
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import ECHO, echo, make_key, select_record, validate_record


def _describe(network: Network) -> object:
    return {
        "addresses": list(network.addresses),
        "reachability": network.reachability.value,
        "statistics": asdict(network.statistics()),
        "connections": [[str(one.peer), one.relay is not None, one.outbound] for one in network.connections()],
    }


class _Streams:
    """Streams that stay open between commands."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        self._network = network
        self._nursery = nursery
        self._open: dict[str, Stream] = {}

    async def open(self, peer: str) -> None:
        await self._nursery.start(self._hold, peer)

    async def _hold(self, peer: str, task_status: trio.TaskStatus[None]) -> None:
        async with self._network.open_stream(NodeId.parse(peer), ECHO) as stream:
            self._open[peer] = stream
            task_status.started()
            await trio.sleep_forever()

    async def say(self, peer: str) -> str:
        await self._open[peer].send(b"hello")
        return (await self._open[peer].receive()).decode()


async def _obey(network: Network, streams: _Streams, line: str) -> object:
    command, _, argument = line.partition(" ")
    if command == "describe":
        return _describe(network)
    if command == "connect":
        return str(await network.connect(argument))
    if command == "open":
        await streams.open(argument)
        return None
    assert command == "say"
    return await streams.say(argument)


async def main(number: int, *listen: str) -> None:
    """Run until the input ends."""
    async with (
        open_libp2p_network(
            make_key(number),
            NetworkConfig(listen=listen),
            record_validator=validate_record,
            record_selector=select_record,
        ) as network,
        trio.open_nursery() as nursery,
    ):
        streams = _Streams(network, nursery)
        with network.serve(ECHO, echo):
            while line := (await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)).strip():
                try:
                    answer = {"ok": await _obey(network, streams, line)}
                except Exception as error:  # noqa: BLE001 - the test is told
                    answer = {"error": repr(error)}
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), *sys.argv[2:])
