"""`status` and `peers`: what the node of a home says, in whatever state it was left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from aci_p2p import control
from aci_p2p.cli.entry import EXIT_INTERRUPTED
from aci_p2p.cli.peers import peers_table
from aci_p2p.cli.status import bootstrap_line, status_rows
from aci_p2p.cli.texts import duration, print_table
from aci_p2p.config import NodeConfig
from aci_p2p.control import StatusReport
from aci_p2p.control.server import open_control
from tests.cli.conftest import LOOPBACK, Cli, Process, Start, finish, one_line, wait_for
from tests.cli.views import CONSUMER, HOSTILE, NODE, peer, status

ROOT = "ab" * 32
"""Weights root of some model."""


def rows() -> dict[str, list[str]]:
    """What is shown, by what stands before it."""
    found: dict[str, list[str]] = {}
    label = ""
    for name, value in status_rows(status()):
        label = name or label
        found.setdefault(label, []).append(value)
    return found


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    running = status()
    running["process"]["file_descriptors"] = None
    assert "unknown of 1024 files" in dict(status_rows(running))["machine"]


def test_everything_is_shown() -> None:
    assert rows() == {
        "node": [NODE, "key node, network aci-test, aci-p2p 0.1.0"],
        "running": ["for 3 d 4 h, process 4242"],
        "addresses": [f"/ip4/192.0.2.1/tcp/9400/p2p/{NODE}", f"/ip4/127.0.0.1/tcp/9400/p2p/{NODE}"],
        "reachability": ["private: peers could not dial back"],
        "relays": [CONSUMER],
        "bootstrap": [
            "/dns4/boot.aci/tcp/9400: reached",
            "/ip4/192.0.2.9/tcp/9400: not reached, 3 attempts: connection refused",
        ],
        "peers": [
            "7 connected (3 in, 5 out, 1 through relays)",
            "40 known, 4 of 30 dials failed, 2 connections trimmed, 1 peer banned",
        ],
        "relaying": ["for 2 peers, 1 connection of others under way"],
        "hole punching": ["3 connections made direct, 1 not"],
        "gossip": ["900 messages accepted, 0 dropped, refused: 3 expired"],
        "market": [
            "offers: 12 in the last minute, 120 in all; 0 waiting, 1 dropped, 2 caught up",
            "bids: 12 in the last minute, 120 in all; 0 waiting, 1 dropped, 2 caught up",
        ],
        "serves": ["smollm2: context 8192, 0.000001 ACI a prompt token, 0.000004 ACI an output token"],
        "slots": ["4, of which 3 free"],
        "working on": [f"7f4b5ff3 for {CONSUMER[-8:]}, smollm2: 67 tokens, 22.8 tokens/s, 4 s"],
        "since start": ["15 bids (2 open), 31 jobs done, 2 failed, 0.0123 ACI earned"],
        "all jobs": ["as provider: 120 final, 2 provider fault"],
        "earned": ["1 ACI"],
        "machine": ["120 MiB (at most 130 MiB), 34 of 1024 files, 5 threads, 41 tasks, 12 s of CPU"],
        "home": ["/var/lib/aci"],
        "config file": ["none"],
        "log": ["0 errors, 2 warnings", "2026-11-24T18:57:30.123Z WARNING no peer"],
    }


def test_bootstrap_addresses_in_every_state() -> None:
    reached, failed = status()["bootstrap"]
    reached["failures"] = failed["failures"]
    assert bootstrap_line(reached) == "/dns4/boot.aci/tcp/9400: reached (in part: connection refused)"
    failed["failures"] *= 2
    failed["attempts"] = 1
    assert bootstrap_line(failed).endswith("9400: not reached, 1 attempt: connection refused")
    failed["reached"] = None
    assert bootstrap_line(failed) == "/ip4/192.0.2.9/tcp/9400: being tried"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3_600, "1 h"), (90_061, "1 d 1 h"), (-5, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_for_each_peer_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    relayed = peer(relay=NODE, round_trip_ms=None, topics=[], agent="", direction="out", score=-3.0)
    print_table(peers_table([peer(), relayed, peer(agent=HOSTILE)]))
    head, first, second, third = capsys.readouterr().out.splitlines()
    assert head.split() == ["peer", "address", "dir", "relay", "age", "rtt", "streams", "score", "topics", "program"]
    assert first.split() == [
        CONSUMER, "/ip4/192.0.2.7/tcp/50412", "in", "-", "1", "min", "11", "s", "12.3", "ms", "2", "1.2", "offers,bids",
        "aci-p2p/0.1.0",
    ]  # fmt: skip
    assert second.split()[2:] == ["out", NODE[-8:], "1", "min", "11", "s", "2", "-3.0", "-", "-"]
    assert third.isprintable()


@pytest.mark.parametrize("command", ["status", "peers"])
def test_no_node(cli: Cli, home: Path, command: str) -> None:
    for arguments in ((), ("--json",)):
        line = one_line(cli(command, *arguments), 4)
        assert str(home / "run" / "node.sock") in line
        assert line.endswith("start one with: aci-p2p join")


@pytest.mark.parametrize("command", ["status", "peers"])
async def test_a_node_that_starts(cli: Cli, home: Path, command: str) -> None:
    async with open_control(NodeConfig(home=home, key="node").control_socket_path):
        line = one_line(await trio.to_thread.run_sync(cli, command), 4)
    assert "the node that runs here is starting or stopping; try again in a moment" in line


@pytest.mark.parametrize("arguments", [("infer", "Hello!"), ("providers", ROOT), ("market",)])
async def test_commands_of_the_network_wait_for_it(start: Start, home: Path, arguments: tuple[str, ...]) -> None:
    async with open_control(NodeConfig(home=home, key="node").control_socket_path):
        process = start(*arguments)
        await assert_it_waits(process)
        process.send_signal(signal.SIGINT)
        result = await trio.to_thread.run_sync(finish, process)
    assert result.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in result.stderr


async def test_one_that_was_stopping_is_not_waited_for_longer(start: Start, home: Path) -> None:
    async with open_control(NodeConfig(home=home, key="node").control_socket_path):
        process = start("infer", "Hello!")
        await assert_it_waits(process)
    result = await trio.to_thread.run_sync(finish, process)
    assert result.returncode == 2
    assert "no node is known to ask, and none runs here" in result.stderr


async def assert_it_waits(process: Process) -> None:
    """A command has said that it waits for the node that starts."""
    assert process.stderr is not None
    line = await trio.to_thread.run_sync(process.stderr.readline)
    assert line == "the node that runs here is starting or stopping; waiting for it ...\n"


def ask(cli: Cli, *arguments: str) -> dict[str, Any]:
    result = cli(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_two_nodes_of_one_machine(cli: Cli, start: Start, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    address = wait_for(start("join", "--no-serve", *LOOPBACK), "listening on ")
    second = start("join", "--no-serve", *LOOPBACK, "--bootstrap", address, "--log-format", "json", at=other)
    assert wait_for(second, "joined: ") == "connected to 1 of 1 nodes given"
    mine, others = ask(cli, "status"), ask(cli, "status", "--home", str(other))
    assert mine["addresses"] == [address]
    assert mine["node"] != others["node"]
    assert others["bootstrap"] == [{"address": address, "reached": True, "attempts": 0, "failures": []}]
    text = cli("status").stdout
    assert "reachability  local: it listens on this machine alone\n" in text
    assert f"node          {address.rpartition('/')[2]}\n" in text
    assert "  1 connected (1 in, 0 out)\n" in text
    assert [len(line) for line in text.splitlines()] == [len(line.rstrip()) for line in text.splitlines()]
    peers = ask(cli, "peers", "--home", str(other))["peers"]
    assert [(entry["peer"], entry["direction"]) for entry in peers] == [(address.rpartition("/")[2], "out")]
    assert address.rpartition("/")[2] in cli("peers", "--home", str(other)).stdout
    # Each home has a node of its own, and one that ends takes its socket with it.
    second.terminate()
    done = finish(second)
    assert done.returncode == 0
    assert all(json.loads(line)["ts"].endswith("Z") for line in done.stderr.splitlines())
    assert one_line(cli("status", "--home", str(other)), 4)
    assert not (other / "run" / "node.sock").exists()


def test_what_kill_leaves(cli: Cli, start: Start, home: Path) -> None:
    first = start("join", "--no-serve", *LOOPBACK)
    wait_for(first, "listening on ")
    before = ask(cli, "status")
    first.send_signal(signal.SIGKILL)
    finish(first)
    socket = home / "run" / "node.sock"
    assert socket.is_socket()
    assert "the node that made it is gone" in one_line(cli("status"), 4)
    wait_for(start("join", "--no-serve", *LOOPBACK), "listening on ")
    after = ask(cli, "status")
    assert before["process"]["pid"] != after["process"]["pid"]


def test_many_questions_leave_nothing_behind(cli: Cli, start: Start, home: Path) -> None:
    wait_for(start("join", "--no-serve", *LOOPBACK), "listening on ")
    path = home / "run" / "node.sock"

    def figures() -> tuple[int, int]:
        process = cast("StatusReport", control.ask(path, "status"))["process"]
        return process["file_descriptors"] or 0, process["tasks"]

    before = figures()
    for _ in range(200):
        control.ask(path, "peers")
    # Each of them would leave one; a few come and go with the node's own work.
    assert all(after - earlier < 100 for after, earlier in zip(figures(), before, strict=True))
