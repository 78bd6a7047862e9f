"""`aci-p2p providers`, of a running node and without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aci_p2p.control.wire import BadRequest
from tests.scenarios.daemons import Daemon, run_command

pytestmark = pytest.mark.slow


def test_who_serves_a_model(provider: Daemon, tmp_path: Path) -> None:
    node_id = provider.ask("status")["node"]["id"]
    ours = run_command(provider.home, "providers", "rare", "--json")
    # The only provider names itself.
    assert ours.returncode == 0, ours.stderr
    report = json.loads(ours.stdout)
    (itself,) = report["providers"]
    assert (itself["provider"], itself["this_node"], itself["connected"]) == (node_id, True, False)
    shown = run_command(provider.home, "providers", "rare").stdout.splitlines()
    assert shown[1].split()[:3] == [node_id, "this", "node"]
    nobody = run_command(provider.home, "providers", "ab" * 32, "--json")
    assert nobody.returncode == 4
    assert json.loads(nobody.stdout)["providers"] == []
    assert nobody.stderr.startswith("aci-p2p: nobody is found who serves abab")

    # Of another network the running node knows nothing.
    elsewhere = run_command(provider.home, "providers", "rare", "--network", "aci-other", "--json")
    assert (elsewhere.returncode, json.loads(elsewhere.stdout)["providers"]) == (4, [])

    other = tmp_path / "other"
    joined = run_command(other, "providers", report["model_root"], "--bootstrap", provider.address, "--json")
    assert joined.returncode == 0, joined.stderr
    (found,) = json.loads(joined.stdout)["providers"]
    assert (found["provider"], found["connected"], found["model_name"]) == (node_id, True, "rare")
    assert (found["slots"], found["free_slots"], found["input_token_price"]) == (4, 4, "1000000000000")
    assert found == itself | {"this_node": False, "connected": True}

    text = run_command(other, "providers", report["model_root"], "--bootstrap", provider.address)
    assert text.stdout.splitlines()[0].split()[:2] == ["provider", "connected"]
    assert text.stdout.splitlines()[1].split()[:2] == [node_id, "yes"]


def test_the_running_node_wants_a_weights_root(provider: Daemon) -> None:
    for argument in ("", "rare", "ab" * 31):
        with pytest.raises(BadRequest, match="64 hex digits"):
            provider.ask("providers", argument)


def test_unknown_models_are_told_before_anybody_is_asked(tmp_path: Path) -> None:
    result = run_command(tmp_path / "home", "providers", "no-such-model")
    assert result.returncode == 2
    assert "unknown model" in result.stderr
