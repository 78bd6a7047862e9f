"""The doctor: what it says of each thing that can be wrong, and that it says nothing of what is not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.config import NodeConfig, ProviderConfig
from aci_p2p.control import NoNode, NotReady, PeersReport
from aci_p2p.control.server import open_control
from aci_p2p.dht import RecordRules
from aci_p2p.doctor import ORDER, Finding, Level, Subject, diagnose, find_subject, reaching
from aci_p2p.doctor import diagnosis as running_checks
from aci_p2p.doctor import machine as machine_checks
from aci_p2p.doctor.reaching import Probe, Standing, check_bootstrap, check_names, find_standing, open_probe
from aci_p2p.doctor.standing import check_clock, check_hole_punching, check_reachability, check_relay
from aci_p2p.executor import ModelStore
from aci_p2p.keys import KeyRing
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.network.api import AddressInUse, Reachability
from aci_p2p.network.memory import MemoryHub
from aci_p2p.peer_clocks import CLOCK_PROTOCOL, clock_service
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import KeyPair
from tests.cli.conftest import LOOPBACK, Cli, Start, wait_for
from tests.cli.views import NODE, peer, status
from tests.executor.tiny import write_tiny_model

NOW = 1_800_000_000_000
NOBODY = f"/ip4/127.0.0.1/tcp/1/p2p/{NODE}"
"""Where nobody listens."""


def clock() -> int:
    """Virtual time, from NOW."""
    return NOW + virtual_clock()


@pytest.fixture
def hub() -> MemoryHub:
    """The network of one test."""
    return MemoryHub(latency=0.01)


@pytest.fixture
def subject(hub: MemoryHub, tmp_path: Path) -> Subject:
    """A node that does not run, in an empty home, on a network in memory."""

    @asynccontextmanager
    async def open_network(key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
        async with hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as network:
            yield network

    config = NodeConfig(home=tmp_path / "home", network="aci-test", key="node", own_key=True, provider=ProviderConfig())
    return Subject(config, tmp_path / "config.toml", None, clock=clock, open_network=open_network)


@asynccontextmanager
async def open_peer(hub: MemoryHub, number: int, ahead_ms: int = 0) -> AsyncGenerator[Network]:
    """A node that tells its time."""
    rules = RecordRules("aci-test", clock)
    key = KeyPair(bytes([number]) * 32)
    async with hub.open_network(key, record_validator=rules.validate, record_selector=rules.select) as network:
        with network.serve(CLOCK_PROTOCOL, clock_service(lambda: clock() + ahead_ms)):
            yield network


async def examine(subject: Subject, *bootstrap: str) -> dict[str, list[Finding]]:
    """What the doctor finds, by check."""
    told: dict[str, list[Finding]] = {}
    config = replace(subject.config, bootstrap=bootstrap)
    findings = await diagnose(replace(subject, config=config), told.__setitem__)
    assert sorted(told) == sorted(ORDER)
    assert findings == [finding for name in ORDER for finding in told[name]]
    # Whatever is not well comes with something to do.
    assert [one for one in findings if bool(one.action) is (one.level is Level.OK)] == []
    return told


def only(findings: Sequence[Finding], level: Level, *words: str) -> Finding:
    """The only finding, of that level, with these words in it."""
    (finding,) = findings
    assert finding.level is level, finding
    for word in words:
        assert word in f"{finding.message} {finding.action}"
    return finding


# The whole.


async def test_a_healthy_node(subject: Subject, hub: MemoryHub, tmp_path: Path) -> None:
    ModelStore(subject.config.models_path).add_directory(write_tiny_model(tmp_path / "tiny"), "tiny")
    KeyRing(subject.config.keys_path).create("node")
    async with open_peer(hub, 1) as one, open_peer(hub, 2) as two:
        told = await examine(subject, one.addresses[0], two.addresses[0])
    assert {one.level for findings in told.values() for one in findings} == {Level.OK}
    # In the order of the settings, whoever answers first.
    assert [one.message.rpartition(" ")[2] for one in told["bootstrap"]] == [str(one.node_id), str(two.node_id)]
    assert "within" in told["clock"][0].message
    assert "2 peers" in told["clock"][0].message
    assert "tiny is intact" in told["models"][0].message


async def test_a_check_that_fails_or_hangs_is_a_finding(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: Subject) -> list[Finding]:
        await trio.sleep_forever()

    async def fail(_: Subject) -> list[Finding]:
        await trio.lowlevel.checkpoint()
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(running_checks, "CHECK_S", 0.5)
    monkeypatch.setattr(running_checks, "check_key", hang)
    monkeypatch.setattr(running_checks, "check_disk", fail)
    told = await examine(subject)
    only(told["key"], Level.WARNING, "it took over 0.5 s")
    only(told["disk"], Level.PROBLEM, "Permission denied")


# Each thing that can be wrong.


@pytest.mark.parametrize(
    ("ahead_ms", "level", "words"),
    [
        (0, Level.OK, "ms of most clocks of 3 peers"),
        (-9_000, Level.OK, "within 9.0 s"),
        (15_000, Level.WARNING, "15.0 s behind most clocks of 3 peers; from 30 s on messages are refused"),
        (31_000, Level.PROBLEM, "31.0 s behind most clocks of 3 peers: messages are refused"),
        (-3_600_000, Level.PROBLEM, "60 min ahead of most clocks of 3 peers: messages are refused"),
    ],
)
async def test_the_clock(
    autojump_clock: MockClock, subject: Subject, hub: MemoryHub, ahead_ms: int, level: Level, words: str
) -> None:
    async with (
        open_peer(hub, 1, ahead_ms) as one,
        open_peer(hub, 2, ahead_ms) as two,
        # One that is wrong does not matter.
        open_peer(hub, 3, 10_000_000) as three,
        open_probe(subject) as probe,
    ):
        for network in (one, two, three):
            await probe.network.connect(network.addresses[0])
        found = await check_clock(subject, probe)
    only(found, level, words)
    if level is not Level.OK:
        assert "timedatectl" in found[0].action


async def test_the_clock_as_the_running_node_sees_it(subject: Subject, hub: MemoryHub) -> None:
    def answer(path: Path, command: str) -> object:
        assert (path, command) == (subject.config.control_socket_path, "clocks")
        return {"clocks": [{"peer": NODE, "ahead_ms": -40_000.0, "round_trip_ms": 3.0}]}

    async with open_probe(subject) as probe:
        running = replace(subject, status=status(), ask=answer)
        only(await check_clock(running, probe), Level.PROBLEM, "40.0 s ahead of the clock of the only peer asked")


async def test_the_clock_without_peers(subject: Subject, tmp_path: Path) -> None:
    subject.config.home.mkdir()
    subject.config.database_path.write_bytes(b"")
    written = trio.Path(subject.config.database_path)
    changed = int((await written.stat()).st_mtime * 1_000)
    async with open_probe(subject) as probe:
        for behind_ms, level in ((0, Level.OK), (20_000, Level.OK), (90_000, Level.PROBLEM)):
            found = await check_clock(replace(subject, clock=partial(int, changed - behind_ms)), probe)
            assert found[0].level is level
        assert found[0].message == f"it is 90.0 s behind the last change of {subject.config.database_path}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
async def test_a_key_that_others_can_read(subject: Subject, mode: int) -> None:
    KeyRing(subject.config.keys_path).create("node")
    path = subject.config.keys_path / "node.key"
    path.chmod(mode)
    told = await examine(subject)
    only(told["key"], Level.PROBLEM, f"mode {mode:04o}", f"chmod 600 {path}")
    path.chmod(0o600)
    only((await examine(subject))["key"], Level.OK, "readable by its owner alone")
    subject.config.keys_path.chmod(0o770)
    only((await examine(subject))["key"], Level.PROBLEM, f"chmod 700 {subject.config.keys_path}")


async def test_a_key_that_is_none(subject: Subject) -> None:
    only((await examine(subject))["key"], Level.OK, "made when the node first runs")
    subject.config.keys_path.mkdir(parents=True)
    path = subject.config.keys_path / "node.key"
    path.touch(0o600)
    only((await examine(subject))["key"], Level.PROBLEM, "not an ACI key")
    path.unlink()
    path.symlink_to("nowhere")
    only((await examine(subject))["key"], Level.PROBLEM, "symbolic link")


async def test_a_port_that_is_taken(subject: Subject) -> None:
    opened: list[NetworkConfig] = []
    real = subject.open_network

    @asynccontextmanager
    async def open_network(key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
        opened.append(config)
        if config.listen:
            msg = "/ip4/0.0.0.0/tcp/9400 is in use by another program"
            raise AddressInUse(msg, hint="choose another port")
        async with real(key, config, rules) as network:
            yield network

    told = await examine(replace(subject, open_network=open_network))
    only(told["ports"], Level.PROBLEM, "9400 is in use", "ss -ltnp", "--listen")
    # Neither attempt relays for others, and the second one only looks.
    assert [config.relay_server for config in opened] == [False, False]
    assert (opened[1].listen, opened[1].relay_client, opened[1].hole_punching) == ((), False, False)


async def test_ports_of_a_running_node(subject: Subject) -> None:
    running = status()
    running["listen"] = list(subject.config.p2p.listen)
    assert only((await examine_running(subject, running))["ports"], Level.OK, "the running node listens on")
    running["listen"] = ["/ip4/127.0.0.1/tcp/9999"]
    any_port = NetworkConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    told = replace(subject, config=replace(subject.config, p2p=any_port))
    only((await examine_running(told, running))["ports"], Level.OK, "the running node listens on", "tcp/9999")
    running["listen"] = ["/ip4/0.0.0.0/tcp/9999"]
    only((await examine_running(subject, running))["ports"], Level.WARNING, "tcp/9999", "restart")


async def examine_running(subject: Subject, running: object) -> dict[str, list[Finding]]:
    """The same of a node that runs and says this of itself."""

    def answer(_: Path, command: str) -> object:
        return {"clocks": []} if command == "clocks" else PeersReport(peers=[])

    return await examine(replace(subject, status=cast("None", running), ask=answer))


@pytest.mark.parametrize("bootstrap", ["/dns4/no.such.name.invalid/tcp/9400", "/dns/no.such.name.invalid/tcp/9400"])
async def test_a_name_that_cannot_be_resolved(subject: Subject, bootstrap: str) -> None:
    told = replace(subject, config=replace(subject.config, bootstrap=(bootstrap,)))
    only(await check_names(told), Level.PROBLEM, "no.such.name.invalid cannot be resolved", "/etc/resolv.conf")


async def test_names_that_can_be_resolved(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(target: object) -> Sequence[str]:
        await trio.lowlevel.checkpoint()
        if "broken" in str(target):
            msg = "_dnsaddr.broken.example. cannot be resolved: SERVFAIL"
            raise ResourceError(msg)
        return [] if "empty" in str(target) else [NOBODY, NOBODY]

    monkeypatch.setattr(reaching, "resolve_dnsaddr", resolve)
    addresses = ("/dns4/localhost/tcp/1", "/dnsaddr/full.example", "/dnsaddr/empty.example", "/dnsaddr/broken.example")
    findings = await check_names(replace(subject, config=replace(subject.config, bootstrap=(*addresses, NOBODY))))
    by_level = sorted((finding.level.value, finding.message) for finding in findings)
    assert by_level == [
        ("ok", "full.example names 2 addresses"),
        ("ok", "localhost is 127.0.0.1"),
        ("problem", "_dnsaddr.broken.example. cannot be resolved: SERVFAIL"),
        ("problem", "the TXT records of _dnsaddr.empty.example hold no address"),
    ]


async def test_bootstrap_nodes(autojump_clock: MockClock, subject: Subject, hub: MemoryHub) -> None:
    async with open_peer(hub, 5) as one, open_probe(subject) as probe:
        nobody = one.addresses[0].replace(str(one.node_id), NODE)

        async def check(*bootstrap: str) -> list[Finding]:
            return await check_bootstrap(replace(subject, config=replace(subject.config, bootstrap=bootstrap)), probe)

        only(await check(), Level.OK, "none is given")
        only(await check(nobody), Level.PROBLEM)
        only(await check(one.addresses[0]), Level.OK, f"answers: {one.node_id}")
        # One that answers is enough to join.
        assert [one.level for one in await check(nobody, one.addresses[0])] == [Level.OK, Level.WARNING]


async def test_models(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(provider: ProviderConfig) -> list[Finding]:
        return await machine_checks.check_models(replace(subject, config=replace(subject.config, provider=provider)))

    only(await check(ProviderConfig(serve=False)), Level.OK, "none is to be served")
    only(await check(ProviderConfig()), Level.WARNING, "aci-p2p models pull")
    only(await check(ProviderConfig(models=("nope",))), Level.PROBLEM, "nope is to be served")
    folder = write_tiny_model(tmp_path / "tiny")
    ModelStore(subject.config.models_path).add_directory(folder, "tiny")
    only(await check(ProviderConfig()), Level.OK, "tiny is intact")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    only(await check(ProviderConfig()), Level.PROBLEM, "altered", "aci-p2p models remove tiny")
    monkeypatch.setattr(machine_checks, "HASH_S", -1)
    only(await check(ProviderConfig()), Level.WARNING, "aci-p2p models verify tiny")
    weights.write_bytes(whole[:-1])
    monkeypatch.setattr(machine_checks, "HASH_S", 3)
    only(await check(ProviderConfig()), Level.PROBLEM, "tiny")
    weights.unlink()
    only(await check(ProviderConfig()), Level.PROBLEM, "lacks its file model.safetensors")
    shutil.rmtree(folder)
    only(await check(ProviderConfig()), Level.PROBLEM, "the directory of model tiny is gone")


@pytest.mark.parametrize(
    ("free", "level"), [(10**10, Level.OK), (10**9, Level.WARNING), (60 << 20, Level.PROBLEM), (0, Level.PROBLEM)]
)
async def test_disks(subject: Subject, monkeypatch: pytest.MonkeyPatch, free: int, level: Level) -> None:
    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    only(await machine_checks.check_disk(subject), level, "free at")


async def test_a_disk_that_cannot_be_written(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def access(_path: Path, _mode: int) -> bool:
        return False

    monkeypatch.setattr(os, "access", access)
    only(await machine_checks.check_disk(subject), Level.PROBLEM, "cannot be written")


@pytest.mark.parametrize(
    ("opened", "limit", "level", "words"),
    [
        (34, 1_024, Level.OK, "34 of 1024 files"),
        (None, 1_024, Level.OK, "an unknown number of 1024 files"),
        (820, 1_024, Level.WARNING, "soon it can take no more"),
        (1_024, 1_024, Level.PROBLEM, "it can take no more"),
        (34, 511, Level.WARNING, "needs up to 512"),
        (None, 64, Level.WARNING, "needs up to 512"),
    ],
)
async def test_file_descriptors(subject: Subject, opened: int | None, limit: int, level: Level, words: str) -> None:
    running = status()
    running["process"]["file_descriptors"], running["process"]["file_descriptor_limit"] = opened, limit
    only(await machine_checks.check_files(replace(subject, status=running)), level, words)


@pytest.mark.parametrize(("limit", "level"), [(512, Level.OK), (511, Level.WARNING)])
async def test_file_descriptors_of_a_node_to_be_started(
    subject: Subject, limit: int, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "file_descriptor_limit", lambda: limit)
    only(await machine_checks.check_files(subject), level, f"may open {limit} files")


@pytest.mark.parametrize(
    ("script", "level", "words"),
    [
        ("echo 'NVIDIA H100'; echo 'NVIDIA H200'", Level.OK, "NVIDIA H100, NVIDIA H200; not used"),
        ("exit 9", Level.WARNING, "finds no GPU"),
        ("true", Level.WARNING, "finds no GPU"),
        ("exec sleep 60", Level.WARNING, "does not answer"),
    ],
)
async def test_gpus(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, level: Level, words: str
) -> None:
    monkeypatch.setattr(machine_checks, "NVIDIA_S", 1.0)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    cpu, gpu = await machine_checks.check_compute(subject)
    assert cpu.level is Level.OK
    only([gpu], level, words)


async def test_too_many_threads(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(_: int) -> set[int]:
        return {0, 1, 2, 3}

    monkeypatch.setattr(os, "sched_getaffinity", cores, raising=False)
    many = replace(subject, config=replace(subject.config, provider=ProviderConfig(threads=5)))
    only((await machine_checks.check_compute(many))[:1], Level.WARNING, "5 threads on 4 cores", "--threads 3")


async def test_a_setting_that_is_none(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACI_BOOTSTRAPS", "x")
    only(await machine_checks.check_configuration(subject), Level.WARNING, "ACI_BOOTSTRAPS is no setting")


async def test_what_a_running_node_complains_about(subject: Subject) -> None:
    running = status()
    only(await machine_checks.check_node(replace(subject, status=running)), Level.OK, "runs, process 4242")
    running["log"]["errors"] = 1
    running["log"]["last"] = [
        {"at": "2026", "level": "error", "source": "control", "message": "a bug"},
        {"at": "2027", "level": "warning", "source": "node", "message": "no peer"},
    ]
    only(await machine_checks.check_node(replace(subject, status=running)), Level.WARNING, "1 errors", "2026: a bug")
    silence = NoNode(Path("/run/x"), "it hung up", runs=True)
    only(await machine_checks.check_node(replace(subject, silence=silence)), Level.PROBLEM, "it hung up", "restart")


RELAYED = f"/ip4/192.0.2.1/tcp/9400/p2p/{NODE}/p2p-circuit/p2p/{NODE}"
PUBLIC, PRIVATE, UNKNOWN = Reachability.PUBLIC, Reachability.PRIVATE, Reachability.UNKNOWN


@pytest.mark.parametrize(
    ("standing", "levels"),
    [
        (Standing(PUBLIC, ("/ip4/192.0.2.1/tcp/9400",), has_peers=True), "ok ok ok"),
        (Standing(PRIVATE, (RELAYED,), has_peers=True), "warning ok ok"),
        (Standing(PRIVATE, (), has_peers=True), "problem problem ok"),
        (Standing(UNKNOWN, ("/ip4/192.0.2.1/tcp/9400",), has_peers=True), "warning ok ok"),
        (Standing(UNKNOWN, ("/ip4/192.0.2.1/tcp/9400",), has_peers=False), "ok ok ok"),
        (Standing(UNKNOWN, ("/ip4/127.0.0.1/tcp/9400",), has_peers=True), "ok ok ok"),
        (Standing(PRIVATE, ("/ip6/::1/tcp/9400",), has_peers=True), "ok ok ok"),
        (Standing(UNKNOWN, (), has_peers=True, can_listen=False), "ok ok ok"),
    ],
)
async def test_the_place_in_the_network(subject: Subject, standing: Standing, levels: str) -> None:
    checks = (check_reachability, check_relay, check_hole_punching)
    found = [finding.level.value for check in checks for finding in await check(subject, standing)]
    assert " ".join(found) == levels


async def test_the_running_node_knows_its_place(subject: Subject) -> None:
    running = status()
    for state, address, is_local in (
        ("private", "/ip4/192.0.2.1/tcp/9400", False),
        ("public", "/ip4/192.0.2.1/tcp/9400", False),
        ("local", "/ip4/127.0.0.1/tcp/9400", True),
    ):
        running["reachability"]["state"], running["addresses"] = state, [address]
        # It is not probed.
        standing = await find_standing(replace(subject, status=running), cast("Probe", None))
        assert standing.is_local is is_local
        assert is_local or standing.reachability == state


async def test_ways_around_a_nat_that_are_off(subject: Subject) -> None:
    private = Standing(PRIVATE, (), has_peers=True)
    off = replace(subject.config, p2p=NetworkConfig(relay_client=False, hole_punching=False))
    only(await check_relay(replace(subject, config=off), private), Level.PROBLEM, "--relay-client")
    only(await check_hole_punching(replace(subject, config=off), private), Level.WARNING, "--hole-punching")
    dialling = replace(subject.config, p2p=NetworkConfig(listen=()))
    only(await check_reachability(replace(subject, config=dialling), private), Level.OK, "listen nowhere")


async def test_connections_that_stay_at_a_relay(subject: Subject) -> None:
    private = Standing(PRIVATE, (RELAYED,), has_peers=True)
    connections = [peer(), peer(relay=NODE, age_s=61.0), peer(relay=NODE, age_s=59.0)]

    def answer(_path: Path, _command: str) -> object:
        return PeersReport(peers=connections)

    running = replace(subject, status=status(), ask=answer)
    only(await check_hole_punching(running, private), Level.WARNING, "1 of 3 connections stay at a relay")
    connections.pop(1)
    only(await check_hole_punching(running, private), Level.OK, "none of 2 connections")


# The command, on real networks.


@contextmanager
def taken_port() -> Generator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        yield listening.getsockname()[1]


def diagnosis(cli: Cli, *arguments: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Exit code, and levels and messages by check."""
    result = cli("doctor", "--json", *arguments)
    document = json.loads(result.stdout)
    assert document["healthy"] is (result.returncode == 0)
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in document["findings"]:
        assert finding.keys() == {"check", "level", "message", "action"}
        found.setdefault(finding["check"], []).append((finding["level"], finding["message"]))
    return result.returncode, found


def test_a_home_in_which_nothing_ever_ran(cli: Cli, home: Path) -> None:
    result = cli("doctor", *LOOPBACK)
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "ok       node           it does not run; start it with: aci-p2p join"
    assert [line for line in lines if line.startswith("problem")] == []
    assert "                        -> aci-p2p models pull" in lines
    assert lines[-1] == "0 problems, 1 warning"
    # It changes nothing.
    assert not home.exists()


def test_everything_is_wrong(cli: Cli, home: Path, tmp_path: Path) -> None:
    KeyRing(home / "keys").create("node")
    (home / "keys" / "node.key").chmod(0o644)
    folder = write_tiny_model(tmp_path / "tiny")
    ModelStore(home / "models").add_directory(folder, "tiny")
    (folder / "model.safetensors").write_bytes(b"")
    with taken_port() as port:
        listen = ("--listen", f"/ip4/127.0.0.1/tcp/{port}")
        code, found = diagnosis(cli, *listen, "--bootstrap", "/dns4/no.such.name.invalid/tcp/1", "--bootstrap", NOBODY)
    assert code == 1
    for check, words in (
        ("key", "mode 0644"),
        ("ports", f"tcp/{port}"),
        ("DNS", "no.such.name.invalid cannot be resolved"),
        ("models", "tiny"),
    ):
        ((level, message),) = found[check]
        assert level == "problem"
        assert words in message
    assert [level for level, _ in found["bootstrap"]] == ["problem", "problem"]
    assert any("refused" in message for _, message in found["bootstrap"])
    text = cli("doctor", *listen).stdout
    assert f"-> run: chmod 600 {home / 'keys' / 'node.key'}\n" in text


def test_beside_a_running_node(cli: Cli, start: Start, tmp_path: Path) -> None:
    first = wait_for(start("join", "--no-serve", *LOOPBACK), "listening on ")
    code, found = diagnosis(cli, *LOOPBACK)
    assert code == 0
    assert found["node"][0][1].startswith(first.rpartition("/")[2])
    # Another home, whose node does not run: it could join, and could be reached.
    code, found = diagnosis(cli, *LOOPBACK, "--bootstrap", first, "--home", str(tmp_path / "other"))
    assert code == 0
    assert found["bootstrap"] == [("ok", f"{first.partition('/p2p/')[0]} answers: {first.rpartition('/')[2]}")]
    assert found["clock"][0][1].startswith("within ")
    assert found["clock"][0][1].endswith("of the clock of the only peer asked")
    impostor = first.replace(first.rpartition("/")[2], NODE)
    code, found = diagnosis(cli, *LOOPBACK, "--bootstrap", impostor, "--home", str(tmp_path / "other"))
    assert (code, found["bootstrap"][0][0]) == (1, "problem")


def test_a_subject_that_hangs(tmp_path: Path) -> None:
    config = NodeConfig(home=tmp_path, key="node")
    assert find_subject(config, tmp_path).silence is None
    path = config.control_socket_path
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as rude:
        rude.bind(str(path))
        rude.listen(1)
        with hanging_up(rude):
            found = find_subject(config, tmp_path)
    assert found.status is None
    assert isinstance(found.silence, NoNode)
    assert find_subject(config, tmp_path).silence is None


async def test_a_subject_that_starts(tmp_path: Path) -> None:
    config = NodeConfig(home=tmp_path, key="node")
    async with open_control(config.control_socket_path):
        found = await trio.to_thread.run_sync(find_subject, config, tmp_path)
    assert found.status is None
    assert isinstance(found.silence, NotReady)


@contextmanager
def hanging_up(listening: socket.socket) -> Generator[None]:
    """Hangs up on the first who connects."""

    def hang_up() -> None:
        connection, _ = listening.accept()
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    yield
    thread.join()
