"""`aci-p2p simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from aci_p2p.cli import simulate
from aci_p2p.testing.simulator import (
    STRATEGIES,
    Invariant,
    InvariantBroken,
    Measurement,
    Scenario,
    Simulation,
    load_scenario,
    trial,
)
from tests.cli.conftest import Cli, one_line

SMALL = ("simulate", "--nodes", "8", "--hours", "0.03", "--interval", "60")


def test_the_trace_comes_last(cli: Cli) -> None:
    first, second = (cli(*SMALL, "--faults", "all", "--adversaries", "0.2", "--seed", "7") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stderr == ""
    *_, last = first.stdout.splitlines()
    word, trace = last.split()
    assert (word, len(bytes.fromhex(trace))) == ("trace", 32)
    assert "answered" in first.stdout
    assert "who cheated" in first.stdout


def test_json_and_html(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "page.html"
    done = cli(*SMALL, "--html", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["jobs"] == report["answered"] > 0
    assert report["trace"] in picture.read_text()


def test_a_scenario_from_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "world.toml"
    file.write_text('nodes = 4\nhours = 0.02\njobs = [{consumer = 0, at_s = 20.0, prompt = "why?"}]\n')
    done = cli("simulate", "--scenario", str(file), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answered"] == 1
    file.write_text("nodes = 0\n")
    assert "2 to 100000 nodes" in one_line(cli("simulate", "--scenario", str(file)), 2)
    assert "No such file" in one_line(cli("simulate", "--scenario", str(tmp_path / "none.toml")), 2)


def test_planned_jobs_run_in_the_simulator_and_on_real_nodes(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "world.toml"
    jobs = (
        '{consumer = 0, at_s = 20.0, prompt = "Why?", max_tokens = 4}',
        '{consumer = 0, at_s = 21.0, prompt = "[b]", model = 1}',
    )
    file.write_text(f"nodes = 3\nhours = 0.02\nasks = false\njobs = [{', '.join(jobs)}]\n")
    simulated, real = (
        cli("simulate", "--scenario", str(file)),
        cli("simulate", "--scenario", str(file), "--real", "memory"),
    )
    assert real.returncode == 0, real.stderr
    *table, trace = real.stdout.splitlines()
    assert table == simulated.stdout.splitlines()[:3]
    assert [row.split()[:2] for row in table] == [["consumer", "asks"], ["0", "Why?"], ["0", "[b]"]]
    assert "failed: no bids" in table[2]
    assert trace.startswith("trace ")
    documents = [
        json.loads(cli("simulate", "--scenario", str(file), "--json", *real).stdout)["planned"]
        for real in ((), ("--real", "memory"))
    ]
    assert documents[0] == documents[1]
    assert documents[0][0]["tokens"] > 0
    file.write_text("nodes = 3\n")
    assert "random jobs" in one_line(cli("simulate", "--scenario", str(file), "--real", "memory"), 2)


def test_options_that_do_not_go_together(cli: Cli) -> None:
    for options, problem in (
        (("--random", "3", "--nodes", "5"), "--nodes"),
        (("--random", "3", "--scenario", "a.toml"), "--scenario"),
        (("--strategy", "magic"), "magic"),
        (("--real", "memory", "--nodes", "5"), "--real"),
        (("--real", "sockets"), "sockets"),
        (("--nodes", "1"), "2<=x<="),
    ):
        done = cli("simulate", *options)
        assert done.returncode == 2
        assert problem in done.stderr


def test_a_page_that_cannot_be_written(cli: Cli) -> None:
    assert "cannot write" in one_line(cli(*SMALL, "--html", "/proc/page.html"), 2)


def test_the_strategies_are_listed(cli: Cli) -> None:
    listing = cli("simulate", "--strategies").stdout
    assert "payment refusal" in listing
    assert "escrow on chain" in listing


def test_what_strategies_gain_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Measurement(nodes=4, unearned=0, income=5 * 10**18, honest_income=2 * 10**18, jobs=10, spoiled=3)
    measured: list[Scenario] = []

    def measure(scenario: Scenario) -> Measurement:
        measured.append(scenario)
        return found

    monkeypatch.setattr(simulate, "measure_strategy", measure)
    table = CliRunner().invoke(simulate.command, ["--measure", "--strategy", "wrong prompt"]).output
    assert measured == [trial("wrong prompt")]
    heading, row = table.splitlines()
    assert heading.split()[:3] == ["strategy", "goal", "profit"]
    assert "be paid without computing" in row
    assert "3 ACI" in row
    assert "30%" in row
    assert len(CliRunner().invoke(simulate.command, ["--measure"]).output.splitlines()) == 1 + len(STRATEGIES)


def test_a_world_that_breaks_by_itself_is_a_failure_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_self: Simulation, _progress: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Simulation, "run", fail)
    done = CliRunner().invoke(simulate.command, ["--random", "42", "--keep", str(tmp_path)])
    assert isinstance(done.exception, simulate.SimulationFailed)
    assert "ZeroDivisionError" in str(done.exception)
    assert (tmp_path / "random-42.json").exists()


def test_a_failure_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_self: Simulation, _progress: object) -> None:
        raise InvariantBroken(Invariant.MONEY, "gone")

    monkeypatch.setattr(Simulation, "run", fail)
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    world = ["--nodes", "8", "--hours", "0.1", "--seed", "4", "--adversaries", "0.25", "--strategy", "bid spam"]
    done = runner.invoke(simulate.command, [*world, "--faults", "disk full", "--models", "2", "--keep", str(tmp_path)])
    error = done.exception
    assert isinstance(error, simulate.SimulationFailed)
    assert error.hint is not None
    again = "--nodes 8 --hours 0.1 --seed 4 --adversaries 0.25 --strategy 'bid spam' --faults 'disk full' --models 2"
    assert again in error.hint
    kept = load_scenario(tmp_path / "seed-4.json")
    assert (kept.nodes, kept.strategies, kept.models) == (8, ("bid spam",), 2)
    done = runner.invoke(simulate.command, ["--random", "42"])
    assert isinstance(done.exception, simulate.SimulationFailed)
    assert "--random 42" in str(done.exception.hint)
