"""A provider behind a NAT with no port open: jobs reach it through a relay, and the doctor says how it is.

The command itself, on machines of its own: a bootstrap node in public, which also relays; provider and consumer behind
one router each; a name server. Names lead to the bootstrap node by `/dns`, `/dnsaddr` and the hosts file.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pytest

from tests.conftest import REPOSITORY
from tests.network.namespaces import Laboratory, Nat
from tests.scenarios.daemons import COMMAND, Daemon, Launch, add_tiny_model, environment, until

pytestmark = [pytest.mark.netns, pytest.mark.scenario, pytest.mark.slow, pytest.mark.timeout(600)]

BOOT = "11.0.0.1"
"""Address of the bootstrap node and the name server."""
EVERYWHERE = "/ip4/0.0.0.0/tcp/9400"
RELAYED_S = 60.0
"""Longest time for a provider to find out that it needs a relay, and to get one, seconds."""
COMMAND_S = 90.0
"""Longest time for a command, seconds."""


@dataclass(frozen=True, slots=True)
class World:
    """What runs where."""

    laboratory: Laboratory
    """The machines."""
    boot: Daemon
    """The bootstrap node."""
    provider: Daemon
    """The provider, which has a relay."""
    root: str
    """Weights root of the model that it serves, in hex."""
    homes: Path
    """Where homes are made."""

    def run(self, machine: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run `aci-p2p` on a machine to its end, with a home of the machine's name."""
        home = self.homes / machine
        with self.laboratory.start(
            machine, *COMMAND, *arguments, env=_environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            out, err = process.communicate(timeout=COMMAND_S)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def infer(self, bootstrap: str) -> dict[str, Any]:
        """What the consumer gets for a question."""
        ask = ("infer", "--bootstrap", bootstrap, "--model", self.root, "--max-tokens", "8", "--json", "Hello!")
        result = self.run("consumer", *ask)
        assert result.returncode == 0, result.stderr.decode()
        return cast("dict[str, Any]", json.loads(result.stdout))

    def diagnose(self, machine: str, *arguments: str) -> dict[str, tuple[str, str]]:
        """What the doctor says on a machine: level and message of each check's first finding."""
        result = self.run(machine, "doctor", "--json", *arguments)
        findings: list[dict[str, str]] = json.loads(result.stdout)["findings"]
        return {one["check"]: (one["level"], one["message"]) for one in reversed(findings)}


def _environment(home: Path) -> dict[str, str]:
    return environment(home) | {"PYTHONPATH": str(REPOSITORY)}


def _on(laboratory: Laboratory, machine: str) -> Launch:
    def launch(command: Sequence[str], env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        path = {"PYTHONPATH": str(REPOSITORY)}
        return laboratory.start(machine, *command, env=env | path, stdout=output, stderr=output)

    return launch


def _build(laboratory: Laboratory) -> None:
    laboratory.add_segment("public")
    laboratory.add_machine("boot")
    laboratory.attach("boot", "public", f"{BOOT}/24")
    # No hole can be punched through the consumer's router.
    nats = {"provider": Nat.PORT_PRESERVING, "consumer": Nat.RANDOM_PORTS}
    for number, (machine, nat) in enumerate(nats.items(), 1):
        segment = f"home{number}"
        laboratory.add_segment(segment)
        outside, inside = ("public", f"11.0.0.{10 * number}/24"), (segment, f"10.0.{number}.1/24")
        laboratory.add_router(f"router{number}", outside, inside, nat)
        laboratory.add_machine(machine)
        laboratory.attach(machine, segment, f"10.0.{number}.2/24", gateway=f"10.0.{number}.1")


def _serve_names(laboratory: Laboratory, boot: str, folder: Path) -> None:
    """Let every machine ask the name server, and know a name from the hosts file."""
    zone = folder / "zone"
    zone.write_text(
        "$ORIGIN aci.\n$TTL 60\n@ SOA boot admin 1 60 60 60 60\n@ NS boot\n"
        f'boot A {BOOT}\n_dnsaddr.boot TXT "dnsaddr=/ip4/{BOOT}/tcp/9400/p2p/{boot}"\n'
    )
    (folder / "resolv.conf").write_text(f"nameserver {BOOT}\noptions timeout:2 attempts:2\n")
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{BOOT} boot-of-the-hosts-file\n")
    for name in ("resolv.conf", "hosts"):
        laboratory.replace_file(f"/etc/{name}", folder / name)
    server = (*COMMAND[:1], "-m", "tests.scenarios.name_server", BOOT, str(zone))
    laboratory.start("boot", *server, env=dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)})


@pytest.fixture
def world(laboratory: Laboratory, tmp_path: Path) -> Iterator[World]:
    """All machines, the provider reachable through the relay."""
    _build(laboratory)
    boot = Daemon(tmp_path / "boot", "--no-serve", listen=EVERYWHERE, launch=_on(laboratory, "boot"))
    boot.start()
    until(lambda: boot.is_up)
    _serve_names(laboratory, boot.ask("status")["node"]["id"], tmp_path)
    told = ("--bootstrap", "/dns/boot.aci/tcp/9400")
    provider = Daemon(tmp_path / "provider", *told, listen=EVERYWHERE, launch=_on(laboratory, "provider"))
    root = add_tiny_model(provider.home, tmp_path / "tiny")
    provider.start()
    until(lambda: provider.is_up)
    until(lambda: provider.ask("status")["reachability"]["relays"], seconds=RELAYED_S)
    yield World(laboratory, boot, provider, root, tmp_path)
    provider.stop()
    boot.stop()


def test_a_provider_behind_a_nat(world: World) -> None:
    boot = world.boot.ask("status")["node"]["id"]
    provider = world.provider.ask("status")

    # By each kind of name, through the relay.
    for bootstrap in ("/dns/boot.aci/tcp/9400", "/dnsaddr/boot.aci", "/dns4/boot-of-the-hosts-file/tcp/9400"):
        answer = world.infer(bootstrap)
        assert answer["provider"] == provider["node"]["id"]
        assert answer["output_tokens"]

    assert provider["reachability"]["state"] == "private"
    assert provider["reachability"]["relays"] == [boot]

    relayed = ("warning", "private: a NAT or a firewall is between; others come through a relay, which costs time")
    reserved = ("ok", f"reserved at {boot}")

    # The provider's side: the running node's word for it.
    serving = world.diagnose("provider", "--listen", EVERYWHERE, "--bootstrap", "/dns/boot.aci/tcp/9400")
    assert serving["DNS"] == ("ok", f"boot.aci is {BOOT}")
    assert (serving["reachability"], serving["relay"]) == (relayed, reserved)

    # The consumer's side: no node runs there, so that the doctor finds out for itself.
    asking = world.diagnose("consumer", "--listen", EVERYWHERE, "--bootstrap", "/dnsaddr/boot.aci")
    assert asking["DNS"] == ("ok", "boot.aci names 1 addresses")
    assert asking["bootstrap"][0] == "ok"
    assert (asking["reachability"], asking["relay"]) == (relayed, reserved)
