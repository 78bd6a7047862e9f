"""`aci-p2p market` and `aci-p2p price`, of a running node and without one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import SOON_S, Start, finish
from tests.scenarios.daemons import Daemon, run_command

pytestmark = pytest.mark.slow


def test_what_is_asked_and_what_it_costs(provider: Daemon, tmp_path: Path) -> None:
    node_id = provider.ask("status")["node"]["id"]
    ours = run_command(provider.home, "market", "--json")
    assert ours.returncode == 0, ours.stderr
    (market,) = json.loads(ours.stdout)["models"]
    assert [(ask["provider"], ask["own"]) for ask in market["asks"]] == [(node_id, True)]

    other = tmp_path / "other"
    outside = (market["model_root"], "--bootstrap", provider.address)
    joined = run_command(other, "market", *outside, "--json")
    assert joined.returncode == 0, joined.stderr
    (found,) = json.loads(joined.stdout)["models"][0]["asks"]
    assert (found["provider"], found["own"], found["model_name"]) == (node_id, False, "rare")
    assert (found["slots"], found["free_slots"], found["output_token_price"]) == (4, 4, "4000000000000")

    text = run_command(provider.home, "market", "rare").stdout.splitlines()
    assert text[0] == f"{market['model_root']}:"
    assert text[1].split() == ["provider", "prompt", "token", "output", "token", "latency", "free", "region", "age"]
    assert f"{node_id} (this node)" in text[2]
    assert "4 of 4" in text[2]

    cost = json.loads(
        run_command(other, "price", *outside, "--tokens", "1000", "--prompt-tokens", "10", "--json").stdout
    )
    assert (cost["asks"], cost["slots"], cost["free_slots"]) == (1, 4, 4)
    assert cost["quartiles"]["job"] == [str(10 * 10**12 + 1_000 * 4 * 10**12)] * 5
    assert cost["cheapest_free"] == cost["quartiles"]["job"][0]
    assert int(cost["suggestion"]["output_token_price"]) == 4 * 10**12
    assert cost["suggestion"]["reason"].startswith("0 of 4 slots are taken")

    picture = run_command(provider.home, "price", "rare").stdout
    assert "lowest" in picture
    assert [line.split()[-1] for line in picture.splitlines()[1:6]] == ["#" * 24] * 5
    assert "a job of 100 + 500 tokens now: 0.0021 ACI at the cheapest" in picture
    assert "to providers: ask 0.000004 ACI for an output token" in picture


def test_watching(provider: Daemon, start: Start) -> None:
    watcher = start("market", "--watch", "--json", "rare", at=provider.home)
    assert watcher.stdout is not None
    looks = [json.loads(watcher.stdout.readline()) for _ in range(3)]
    assert [len(look["models"][0]["asks"]) for look in looks] == [1, 1, 1]
    assert looks[0]["at_ms"] < looks[1]["at_ms"] < looks[2]["at_ms"]
    watcher.send_signal(signal.SIGINT)
    assert finish(watcher, SOON_S).returncode == 0
    # A pipe has every look, too.
    watcher = start("market", "--watch", "rare", at=provider.home)
    assert watcher.stdout is not None
    lines = [watcher.stdout.readline() for _ in range(8)]
    assert sum("(this node)" in line for line in lines) == 2
    watcher.send_signal(signal.SIGINT)
    assert finish(watcher, SOON_S).returncode == 0


def test_a_node_of_another_network_is_not_asked(provider: Daemon) -> None:
    result = run_command(provider.home, "market", "rare", "--network", "aci-other")
    assert result.returncode == 4


def test_nobody_asks(tmp_path: Path, provider: Daemon) -> None:
    for command in ("market", "price"):
        result = run_command(tmp_path / "other", command, "ab" * 32, "--bootstrap", provider.address)
        assert result.returncode == 4
        assert result.stderr.startswith(f"aci-p2p: nobody asks anything for {'ab' * 32}")
